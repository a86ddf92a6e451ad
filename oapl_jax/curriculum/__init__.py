"""Curricula: which prompts are sampled. A stream asks a teacher, which is chosen here by name."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
from etils import epath
from jax.sharding import Mesh

from oapl_jax.curriculum import rates as by_rate
from oapl_jax.curriculum.actor_curator import ActorCurator
from oapl_jax.curriculum.curator import Curator
from oapl_jax.curriculum.rates import PassRates
from oapl_jax.curriculum.stream import Curriculum
from oapl_jax.curriculum.teacher import Teacher, Uniform
from oapl_jax.errors import UserError
from oapl_jax.learner.optimizer import make_optimizer
from oapl_jax.model import hf
from oapl_jax.model.config import ModelConfig

__all__ = ["CURRICULA", "Curriculum", "Teacher"]


def open_actor_curator(
    *,
    curator: Mapping[str, Any],
    policy: ModelConfig,
    mesh: Mesh,
    seed: int,
    max_prompt_tokens: int,
    num_steps: int,
    **_: Any,
) -> ActorCurator:
    """Opens the curator's checkpoint, or makes a fresh network.

    Args:
      curator: the section of the configuration.
      policy: the policy's sizes: both read the same tokens.
      mesh: the learner's.
      seed: of a fresh network.
      max_prompt_tokens: of a prompt.
      num_steps: of the learner. The curator's learning rate decays over `passes` times as many, as
        if each studied one choice.

    Raises:
      UserError: if its vocabulary is not the policy's, or prompts do not fit it.
    """
    settings = dict(curator)
    path, architecture = settings.pop("path"), settings.pop("architecture")
    optimizer = make_optimizer(**settings.pop("optim"), num_steps=num_steps * settings["passes"])
    start: Any = seed
    if path:
        config = hf.load_config(epath.Path(path))
    else:
        sizes = {**architecture, "vocab_size": policy.vocab_size}
        config = ModelConfig.from_hf(sizes, source="curriculum.curator.architecture")
    if config.vocab_size != policy.vocab_size or config.max_positions < max_prompt_tokens:
        raise UserError(
            f"the curator has {config.vocab_size} tokens and {config.max_positions} positions, and "
            f"reads prompts of {max_prompt_tokens} tokens out of {policy.vocab_size}; correct "
            "curriculum.curator.path or its architecture"
        )
    if path:
        start = hf.load_params(epath.Path(path), config, mesh=mesh)
        start.pop("head", None)  # of tokens, where it is not the embedding; a curator has its own
    model = Curator(
        dataclasses.replace(config, tie_embeddings=True),
        jnp.dtype(settings.pop("dtype")),
        settings.pop("remat"),
    )
    return ActorCurator(
        model, optimizer, mesh, start, max_prompt_tokens=max_prompt_tokens, **settings
    )


# Each takes what it needs of: the sections `rates`, `window` and `curator` of config.curriculum,
# and the arguments of `open_actor_curator`.
CURRICULA: dict[str, Callable[..., Teacher]] = {
    "uniform": lambda **_: Uniform(),
    "window": lambda *, rates, window, **_: PassRates(
        functools.partial(by_rate.window, **window), **rates
    ),
    "learnability": lambda *, rates, **_: PassRates(by_rate.learnability, **rates),
    "actor_curator": open_actor_curator,
}
