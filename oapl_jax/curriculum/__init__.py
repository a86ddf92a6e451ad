"""Curricula: the choice of the prompts that are sampled."""

import functools
from collections.abc import Callable

from oapl_jax.curriculum import pass_rates
from oapl_jax.curriculum.actor_curator import ActorCurator
from oapl_jax.curriculum.stream import Curriculum, PromptScorer

__all__ = ["CURRICULA", "Curriculum", "PromptScorer"]

# Each takes the sections `rates`, `window` and `curator` of the configuration and the further
# arguments of ActorCurator, and ignores those that it does not need.
CURRICULA: dict[str, Callable[..., PromptScorer]] = {
    "uniform": lambda **_: PromptScorer(),
    "window": lambda *, rates, window, **_: pass_rates.PassRates(
        functools.partial(pass_rates.window, config=window), rates
    ),
    "learnability": lambda *, rates, **_: pass_rates.PassRates(pass_rates.learnability, rates),
    "actor_curator": lambda *, rates, window, **arguments: ActorCurator(**arguments),
}
