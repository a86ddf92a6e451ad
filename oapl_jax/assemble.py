"""The groups of one gradient step -> its batch, and the log-probs that it recomputes."""

from typing import Any

from oapl_jax.build import Config, Job
from oapl_jax.learner.packing import build_batch
from oapl_jax.learner.train_step import recompute_logps
from oapl_jax.objectives import Objective
from oapl_jax.structs import Batch, Group


def make_batch(config: Config, objective: Objective, groups: list[Group], step: int) -> Batch:
    """`build_batch` by the settings of a run."""
    return build_batch(
        groups,
        objective,
        aggregation=config.objective.aggregation,
        constant_length=config.objective.constant_length,
        zero_variance_weight=(
            config.zero_variance_weight if config.buffer.zero_variance == "weight" else 1.0
        ),
        step=step,
        micro_batches=config.learner.micro_batches,
        row_length=config.learner.row_length,
        rows_multiple=config.learner.rows_multiple,
        max_prompt_tokens=config.data.max_prompt_tokens,
        max_response_tokens=config.rollout.max_response_tokens,
    )


def recompute(job: Job, logp_step: Any, batch: Batch, step: int) -> Batch:
    """`recompute_logps` by the settings of a run."""
    learner_denominator = job.config.objective.denominator == "learner"
    return recompute_logps(
        batch,
        logp_step,
        step=step,
        reference=job.reference if job.needs_reference_logp else None,
        load_version=job.load_version if learner_denominator else None,
    )
