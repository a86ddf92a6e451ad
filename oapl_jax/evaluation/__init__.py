"""Evaluation: how good a policy is, and how sure of that one can be.

`evaluate` samples and grades a split in memory, as training does now and then. Benchmarks (run.py)
keep every response on disk: sampling goes on where a kill left it, and grading can be done again
without any sampling. compare.py tests two of their results against each other.
"""

from oapl_jax.evaluation.estimators import interval, maj_at_n, pass_at_k
from oapl_jax.evaluation.in_memory import evaluate, in_order, table

__all__ = ["evaluate", "in_order", "interval", "maj_at_n", "pass_at_k", "table"]
