"""Evaluation: pass@k of a policy, with its uncertainty.

`evaluate` samples and grades a split in memory, as training does now and then. benchmark.py keeps
every response on disk; compare.py tests two of its results against each other.
"""

from oapl_jax.evaluation.estimators import interval, maj_at_n, pass_at_k, pass_curve
from oapl_jax.evaluation.in_memory import evaluate, in_order, table

__all__ = ["evaluate", "in_order", "interval", "maj_at_n", "pass_at_k", "pass_curve", "table"]
