"""The groups of one gradient step -> its batch: advantages, weights, packed rows, denominator."""

import dataclasses
from typing import Any

import jax
import numpy as np

from oapl_jax import batching, publisher
from oapl_jax.job import Config, Job
from oapl_jax.models import hf
from oapl_jax.objectives import Objective
from oapl_jax.objectives.aggregation import sequence_weights
from oapl_jax.structs import Batch, Group


def make_batch(config: Config, objective: Objective, groups: list[Group], step: int) -> Batch:
    """Advantages of whole groups, aggregation weights of the whole batch, packed rows."""
    advantages = [np.asarray(objective.advantage(g.reward)) for g in groups]
    lengths = np.array([len(r.tokens) for g in groups for r in g.rollouts])
    weights = sequence_weights(
        lengths, config.objective.aggregation, constant_length=config.objective.constant_length
    )
    if config.buffer.zero_variance == "weight":
        mixed = np.array([not g.zero_variance for g in groups for _ in g.rollouts])
        weights = weights * np.where(mixed, 1.0, config.zero_variance_weight)
    return batching.make_batch(
        groups,
        advantages,
        weights,
        step=step,
        micro_batches=config.learner.micro_batches,
        row_length=config.learner.row_length,
        rows_multiple=config.learner.rows_multiple,
        max_response_tokens=config.rollout.max_response_tokens,
    )


def recompute_denominator(job: Job, logp_step: Any, batch: Batch, step: int) -> Batch:
    """The batch with other log-probs in the place of the samplers' own.

    From the learner's forward pass with each rollout's own version (`denominator = "learner"`), or
    with version 0 for all ("reference").
    """
    if job.config.objective.denominator == "reference":
        return dataclasses.replace(batch, behavior_logp=logp_step(_published(job, 0), batch))
    behavior_logp = batch.behavior_logp
    for lag in np.unique(jax.device_get(batch.lag)):
        mine = (batch.lag == lag)[..., None]
        logp = logp_step(_published(job, step - int(lag)), batch)
        behavior_logp = jax.numpy.where(mine, logp, behavior_logp)
    return dataclasses.replace(batch, behavior_logp=behavior_logp)


def _published(job: Job, version: int) -> Any:
    path = publisher.version_path(job.workdir / "versions", version)
    publisher.check_version(path)
    return hf.load_params(path, job.policy.config, mesh=job.mesh)
