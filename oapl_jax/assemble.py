"""The groups of one gradient step -> its batch: advantages, weights, packed rows, denominator."""

import dataclasses
from typing import Any

import jax
import numpy as np

from oapl_jax.build import Config, Job
from oapl_jax.learner import packing as batching
from oapl_jax.objectives import OBJECTIVES, Objective, hyper_parameters
from oapl_jax.objectives.aggregation import sequence_weights
from oapl_jax.structs import Batch, Group


def make_batch(config: Config, objective: Objective, groups: list[Group], step: int) -> Batch:
    """Advantages of whole groups, aggregation weights of the whole batch, packed rows."""
    compares = "group_size" in hyper_parameters(OBJECTIVES[config.objective.name].loss)
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
        max_prompt_tokens=config.data.max_prompt_tokens,
        max_response_tokens=config.rollout.max_response_tokens,
        together=config.group_size if compares else 1,
    )


def recompute(job: Job, logp_step: Any, batch: Batch, step: int) -> Batch:
    """The batch with the log-probs that the objective wants from the learner's forward pass.

    Of the reference, version 0, if the job has one; and with `denominator = "learner"` those of
    each rollout's version in the place of the samplers' own.
    """
    if job.needs_reference_logp:
        batch = dataclasses.replace(batch, reference_logp=logp_step(job.reference, batch))
    if job.config.objective.denominator != "learner":
        return batch
    behavior_logp = batch.behavior_logp
    for lag in np.unique(jax.device_get(batch.lag)):
        mine = (batch.lag == lag)[..., None]
        logp = logp_step(job.load_version(step - int(lag)), batch)
        behavior_logp = jax.numpy.where(mine, logp, behavior_logp)
    return dataclasses.replace(batch, behavior_logp=behavior_logp)
