"""Buffers and prompt streams for the tests of rollout/."""

from oapl_jax.config import BufferConfig
from oapl_jax.curriculum import Curriculum
from oapl_jax.curriculum.stream import Uniform


def buffer_config(**changes) -> BufferConfig:
    values = dict(
        mode="clear_on_sync",
        max_age=100,
        max_reuse=1,
        capacity=16,
        zero_variance="keep",
        zero_variance_weight=0.1,
    )
    return BufferConfig(**values | changes)


def uniform(stream) -> Curriculum:
    """The whole stream, in its order."""
    return Curriculum(stream, Uniform(), candidates=1, picks=1, top_p=0.5, seed=0)
