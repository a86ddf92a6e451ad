"""Preferences: what each response of a group is worth by comparison, in the place of a verifier.

A judge compares responses with those of the reference policy, objective by objective (judge.py,
rubric.py, language_model.py; comparators.py); winner.py turns that into one target a response,
which is the group's reward. objectives/prosper.py regresses onto it.
"""

import functools
import threading
from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np

from oapl_jax.errors import RunError
from oapl_jax.preferences.judge import Callback, Judge, Response
from oapl_jax.preferences.language_model import LanguageModel
from oapl_jax.preferences.rubric import Rubric
from oapl_jax.preferences.winner import blackwell_winner
from oapl_jax.structs import Prompt, Rollout

# Each is made of the configuration's section of its name.
JUDGES = {"rubric": Rubric, "language_model": LanguageModel, "callable": Callback}


class Preferences:
    """Rewards whole groups by a judge. Any thread.

    A response that was cut off loses to every one that was not, under all objectives, and draws
    with the others; no judge is asked.

    Args:
      judge: compares what was not cut off.
      comparators: prompt -> responses of the reference policy.
      beta: see `blackwell_winner`.
      text: rollout -> its text without special tokens.
      verify: prompt and rollout -> what the verifier of the task gives.
    """

    def __init__(
        self,
        judge: Judge,
        comparators: Callable[[Prompt], Sequence[Rollout]],
        *,
        beta: float,
        text: Callable[[Rollout], str],
        verify: Callable[[Prompt, Rollout], float],
    ):
        self._judge, self._comparators, self._beta = judge, comparators, beta
        self._text, self._verify = text, verify
        self._lock = threading.Lock()  # of the next two
        self._counts: Counter[str] = Counter(comparisons=0, missing=0, unscored=0)
        self._totals: Counter[str] = Counter()  # since the last metrics

    def reward(self, prompt: Prompt, rollouts: Sequence[Rollout]) -> np.ndarray:
        """float32[G], the targets g of a group.

        Raises:
          RunError: if the judge's answer is not what it must be.
        """
        preference = self._compare(prompt, rollouts, self._comparators(prompt))
        winner = blackwell_winner(preference, beta=self._beta)
        with self._lock:
            self._counts["comparisons"] += preference.size
            self._counts["missing"] += int(np.isnan(preference).sum())
            if winner.worst < 0:
                self._counts["unscored"] += 1
            else:
                names = self._judge.objectives
                self._totals["groups"] += 1
                self._totals["value"] += winner.value[winner.worst]
                self._totals[f"worst/{names[winner.worst]}"] += 1
                for name, value in zip(names, winner.value, strict=True):
                    if not np.isnan(value):
                        self._totals[f"scored/{name}"] += 1
                        self._totals[f"value/{name}"] += value
        return winner.target.astype(np.float32)

    def _compare(
        self, prompt: Prompt, rollouts: Sequence[Rollout], comparators: Sequence[Rollout]
    ) -> np.ndarray:
        """[J, G, M], cut-off responses included."""
        mine, theirs = (
            np.array([r.finish_reason != "length" for r in of]) for of in (rollouts, comparators)
        )
        number = len(self._judge.objectives)
        decided = (1 + mine[:, None].astype(np.float64) - theirs[None, :]) / 2
        preference = np.repeat(decided[None], number, axis=0)
        whole = np.ix_(np.arange(number), mine, theirs)
        if not preference[whole].size:
            return preference
        judged = self._judge.compare(
            prompt, self._responses(prompt, rollouts), self._responses(prompt, comparators)
        )
        if judged.shape != preference[whole].shape:
            raise RunError(
                f"the judge's preferences for prompt {prompt.id} have the shape {judged.shape} and "
                f"not {preference[whole].shape}, objectives x responses x comparators"
            )
        if np.any((judged < 0) | (judged > 1)):
            raise RunError(f"a preference for prompt {prompt.id} is not within 0 and 1")
        preference[whole] = judged
        return preference

    def _responses(self, prompt: Prompt, rollouts: Sequence[Rollout]) -> list[Response]:
        return [
            Response(self._text(r), functools.partial(self._verify, prompt, r))
            for r in rollouts
            if r.finish_reason != "length"
        ]

    def metrics(self) -> dict[str, float]:
        """Means over the groups since the last call, and counts since this process began."""
        with self._lock:
            counts, (total, self._totals) = dict(self._counts), (self._totals, Counter())
        out = {**counts, **self._judge.metrics()}
        if total["groups"]:
            out["value"] = total["value"] / total["groups"]
        for name in self._judge.objectives:
            if total[f"scored/{name}"]:
                out[f"value/{name}"] = total[f"value/{name}"] / total[f"scored/{name}"]
                out[f"worst/{name}"] = total[f"worst/{name}"] / total["groups"]
        return {f"preferences/{name}": float(value) for name, value in out.items()}
