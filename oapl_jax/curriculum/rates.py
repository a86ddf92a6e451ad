"""Curricula by pass rate: a window of difficulty, and learnability.

Both know a prompt by the groups that it was sampled for, so they help where prompts come again.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from oapl_jax.curriculum.teacher import Teacher
from oapl_jax.errors import UserError
from oapl_jax.structs import Group, Prompt

Rates = Float[np.ndarray, " C"]


def window(rate: Rates, *, low: float, high: float, outside: float) -> Rates:
    """log weight: 1 for a rate within [low, high], `outside` for another (arXiv 2502.01456).

    The source drops what is outside once it is sampled; here it is sampled less, which saves
    responses, and never not at all, since the policy changes.
    """
    return np.where((rate >= low) & (rate <= high), 0.0, np.log(outside))


def learnability(rate: Rates) -> Rates:
    """log of p (1 - p), the variance of a reward that is 0 or 1 (arXiv 2502.12272).

    The source estimates p from responses sampled for that alone; here it is what training saw.
    """
    return np.log(rate) + np.log1p(-rate)


class PassRates(Teacher):
    """Weighs each candidate by its estimated pass rate

        p = (s + k p0) / (n + k),

    where at each group of the prompt n becomes `decay` n + G, and s `decay` s + the sum of rewards.

    Args:
      weigh: rates -> log weights.
      decay: within 0 (the last group alone) and 1 (all groups alike).
      prior_rate: p0, within 0 and 1 but neither, so that no rate is 0 or 1.
      prior_count: k, above 0.
    """

    def __init__(
        self,
        weigh: Callable[[Rates], Rates],
        *,
        decay: float,
        prior_rate: float,
        prior_count: float,
    ):
        self._weigh, self._decay = weigh, decay
        self._prior_rate, self._prior_count = prior_rate, prior_count
        self._known: dict[str, tuple[float, float]] = {}  # id -> (n, s)

    def rates(self, prompts: Sequence[Prompt]) -> Rates:
        """The estimates; `prior_rate` for what was never sampled."""
        n, s = np.array([self._known.get(prompt.id, (0.0, 0.0)) for prompt in prompts]).T
        k = self._prior_count
        return (s + k * self._prior_rate) / (n + k)

    def logits(self, prompts: Sequence[Prompt]) -> np.ndarray:
        return self._weigh(self.rates(prompts))

    def ended(self, group: Group) -> None:
        """Raises a UserError for rewards that are no pass rates."""
        low, high = float(np.min(group.reward)), float(np.max(group.reward))
        if low < 0 or high > 1:
            raise UserError(
                f"prompt {group.prompt.id} has rewards within {low:g} and {high:g}, of which no "
                "pass rate can be made; set curriculum.name to 'uniform' or 'actor_curator'"
            )
        n, s = self._known.get(group.prompt.id, (0.0, 0.0))
        n = self._decay * n + len(group.reward)
        s = self._decay * s + float(np.sum(group.reward, dtype=np.float64))
        self._known[group.prompt.id] = (n, s)

    def metrics(self) -> dict[str, float]:
        return {"curriculum/known": len(self._known)}

    def state(self, alive: set[int]) -> dict[str, Any]:
        return {"known": {name: list(counts) for name, counts in self._known.items()}}

    def restore(self, state: dict[str, Any], read: Any, at: Any) -> None:
        self._known = {name: (n, s) for name, (n, s) in state["known"].items()}
