"""Curricula by pass rate: a window of difficulty, and learnability.

Both know a prompt by its past groups, so they help where prompts repeat.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from oapl_jax.config import DifficultyWindowConfig, PassRatesConfig
from oapl_jax.curriculum.stream import PromptScorer
from oapl_jax.errors import UserError
from oapl_jax.structs import Group, Prompt

Rates = Float[np.ndarray, " C"]


def window(rate: Rates, config: DifficultyWindowConfig) -> Rates:
    """log weight: 1 for a rate within [low, high], else `outside` (arXiv 2502.01456).

    The paper drops sampled prompts outside; here they are sampled less, which saves responses, and
    never not at all, since the policy changes.
    """
    return np.where((rate >= config.low) & (rate <= config.high), 0.0, np.log(config.outside))


def learnability(rate: Rates) -> Rates:
    """log of p (1 - p), the variance of a reward that is 0 or 1 (arXiv 2502.12272).

    The paper estimates p from responses sampled for that alone; here from the training groups.
    """
    return np.log(rate) + np.log1p(-rate)


class PassRates(PromptScorer):
    """Scores each candidate by its estimated pass rate

        p = (s + k p0) / (n + k),

    where each group of the prompt updates n to `decay` n + G, and s to `decay` s + sum of rewards.

    Args:
      weigh: rates -> log weights.
      config: `decay`; p0 = `prior_rate`, in (0, 1), so that no rate is 0 or 1; k = `prior_count`.
    """

    awake = True

    def __init__(self, weigh: Callable[[Rates], Rates], config: PassRatesConfig):
        self._weigh, self._config = weigh, config
        self._counts: dict[str, tuple[float, float]] = {}  # id -> (n, s)

    def rates(self, prompts: Sequence[Prompt]) -> Rates:
        """Estimated pass rates; `prior_rate` for a prompt never sampled."""
        n, s = np.array([self._counts.get(prompt.id, (0.0, 0.0)) for prompt in prompts]).T
        k = self._config.prior_count
        return (s + k * self._config.prior_rate) / (n + k)

    def logits(self, prompts: Sequence[Prompt]) -> np.ndarray:
        return self._weigh(self.rates(prompts))

    def ended(self, group: Group) -> None:
        """Raises a UserError for rewards outside [0, 1]."""
        low, high = float(np.min(group.reward)), float(np.max(group.reward))
        if low < 0 or high > 1:
            raise UserError(
                f"prompt {group.prompt.id} has rewards from {low:g} to {high:g}, and a pass rate "
                "needs rewards in [0, 1]; set curriculum.name to 'uniform' or 'actor_curator'"
            )
        n, s = self._counts.get(group.prompt.id, (0.0, 0.0))
        n = self._config.decay * n + len(group.reward)
        s = self._config.decay * s + float(np.sum(group.reward, dtype=np.float64))
        self._counts[group.prompt.id] = (n, s)

    def metrics(self) -> dict[str, float]:
        return {"curriculum/known": len(self._counts)}

    def state(self, alive: set[int]) -> dict[str, Any]:
        return {"known": {name: list(counts) for name, counts in self._counts.items()}}

    def restore(self, state: dict[str, Any], read: Any, at: Any) -> None:
        self._counts = {name: (n, s) for name, (n, s) in state["known"].items()}
