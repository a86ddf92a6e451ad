"""What a step asks of the hosts and of the fleet: memory, time to publish, generated tokens."""

import dataclasses
import math

import jax

from oapl_jax.build import Config
from oapl_jax.check import recorded_groups
from oapl_jax.model import hf
from oapl_jax.model.config import ModelConfig
from oapl_jax.planning.programs import Learner, per_chip

PUBLISHER_BYTES = 1e9  # beside two of the largest tensor; docs/serving.md


def host_memory(plan: Learner, chips_per_host: int) -> dict[str, float]:
    """Bytes on one host at its fullest, by kind: a checkpoint is being written while a version is
    made, with a full buffer."""
    config = plan.config
    response = config.rollout.max_response_tokens
    group = config.group_size * (8 * response) + 4 * config.data.max_prompt_tokens
    largest = max(math.prod(tensor.shape) for tensor in hf.tensors_of(plan.model_config))
    return {
        "copy of the state for a checkpoint": float(chips_per_host * per_chip(plan.state)),
        "copy of the weights to publish": float(chips_per_host * per_chip(plan.state.params)),
        "publisher": 2 * 4 * largest + PUBLISHER_BYTES,
        "buffer": float(config.buffer.capacity * group),
        "batch": 2.0 * sum(leaf.nbytes for leaf in jax.tree.leaves(plan.longest)),
    }


def parameters(config: ModelConfig) -> int:
    return sum(math.prod(tensor.shape) for tensor in hf.tensors_of(config))


def publish_seconds(count: int, dtype_bytes: int, hosts: int, storage: float) -> float:
    """From the learner's parameters to a committed version.

    All hosts write float32 weights; then one reads them and, meanwhile, writes the version.

    Args:
      count: of parameters.
      dtype_bytes: of a number in the version.
      hosts: of the slice.
      storage: bytes/s that a host reads or writes.
    """
    return 4 * count / (hosts * storage) + max(4, dtype_bytes) * count / storage


@dataclasses.dataclass(frozen=True)
class Fleet:
    """What the samplers must deliver.

    Attributes:
      tokens_per_second: generated and used, that keep the learner from waiting; 0 where it learns
        from recorded rollouts alone.
      learning: share of the time that the learner then takes steps; for the rest it publishes.
    """

    tokens_per_second: float
    learning: float


def fleet(config: Config, step_seconds: float, publish: float) -> Fleet:
    """With every response at its greatest length, as in the planned batch, and every group used as
    often as the buffer lets it.

    Publications are `lag.steps` steps apart in a window, otherwise one. If the buffer is cleared at
    each, what it has for the next steps can only come after the publication.
    """
    fresh = config.group_size * (config.groups_per_step - recorded_groups(config))
    uses = config.buffer.max_reuse if config.buffer.mode == "replay" else 1
    generated = fresh / uses * config.rollout.max_response_tokens
    steps = config.lag.steps if config.lag.mode == "window" else 1
    cycle = steps * step_seconds + publish
    cleared = config.lag.mode == "window" and config.buffer.mode == "clear_on_sync"
    time = steps * step_seconds if cleared else cycle
    return Fleet(steps * generated / time, steps * step_seconds / cycle)
