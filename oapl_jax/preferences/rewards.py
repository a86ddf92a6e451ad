"""Rewards by comparison: judge, comparators of the reference policy, Blackwell winner."""

import functools
import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from oapl_jax.errors import RunError, UserError
from oapl_jax.preferences.judges import Judge, Response
from oapl_jax.preferences.winner import blackwell_winner
from oapl_jax.rollout.dataset import Dataset, differences
from oapl_jax.rollout.sampler import Sampler, Sampling
from oapl_jax.structs import Prompt, Rollout


class Preferences:
    """Rewards whole groups by a judge's comparisons. Thread-safe.

    A truncated response loses to every complete one under all objectives, and ties with the other
    truncated ones; the judge compares complete responses only.

    Args:
      comparators: prompt -> responses of the reference policy.
      beta: see `blackwell_winner`.
      text: rollout -> its text without special tokens.
      verify: (prompt, rollout) -> reward by the verifier of the task.
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
        self._totals: Counter[str] = Counter()  # since the last call of `metrics`

    def reward(self, prompt: Prompt, rollouts: Sequence[Rollout]) -> np.ndarray:
        """float32[G], the targets g of a group.

        Raises:
          RunError: if the judge's result has a wrong shape or lies outside [0, 1].
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
        """[J, G, M], truncated responses included."""
        mine, theirs = (
            np.array([r.finish_reason != "length" for r in of]) for of in (rollouts, comparators)
        )
        number = len(self._judge.objectives)
        decided = (1 + mine[:, None].astype(np.float64) - theirs[None, :]) / 2
        preference = np.repeat(decided[None], number, axis=0)
        whole = np.ix_(np.arange(number), mine, theirs)
        shape = preference[whole].shape
        if 0 in shape:
            return preference
        judged = self._judge.compare(
            prompt, self._responses(prompt, rollouts), self._responses(prompt, comparators)
        )
        if judged.shape != shape:
            raise RunError(
                f"the judge's preferences for prompt {prompt.id} have the shape {judged.shape}, "
                f"not {shape}, objectives x responses x comparators"
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
        """Means over the groups since the last call, and counts since the process began."""
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


class SampledComparators:
    """Samples `count` comparators of each prompt from a published version. Thread-safe.

    `sampler` serves this object alone, one prompt at a time, and loads the version for the first.
    """

    def __init__(
        self, sampler: Sampler, *, version: int, path: epath.Path, count: int, sampling: Sampling
    ):
        self._sampler, self._version, self._path = sampler, version, path
        self._count, self._sampling = count, sampling
        self._lock = threading.Lock()

    def __call__(self, prompt: Prompt) -> tuple[Rollout, ...]:
        with self._lock:
            if self._sampler.version != self._version:
                self._sampler.refresh(self._version, self._path)
            (sampled,) = self._sampler.generate([prompt], n=self._count, sampling=self._sampling)
        return sampled.rollouts


class RecordedComparators:
    """Reads the first `count` responses of a recorded group of the same prompt. Thread-safe.

    The reference is the policy that recorded the dataset, whatever its model and temperature; task
    and tokenizer of `about` (see `dataset.identity`) must be those of the dataset.

    Raises:
      UserError: for a dataset of another task or tokenizer, one with smaller groups, or a prompt
        that it lacks.
    """

    def __init__(self, directory: epath.Path, about: Mapping[str, Any], *, count: int):
        self._dataset = Dataset(directory)
        theirs = self._dataset.manifest["about"]
        differing = differences(about, theirs, ("task", "tokenizer"))
        if differing:
            raise UserError(
                f"preferences.dataset={directory} differs from this run ({differing}); name a "
                "dataset of this task and tokenizer"
            )
        if theirs["group_size"] < count:
            raise UserError(
                f"preferences.dataset={directory} has groups of {theirs['group_size']} responses, "
                f"fewer than preferences.comparators={count}; lower it, or record larger groups"
            )
        self._count, self._lock = count, threading.Lock()
        self._index = {group.prompt.id: i for i, group in enumerate(self._dataset)}

    def __call__(self, prompt: Prompt) -> tuple[Rollout, ...]:
        if prompt.id not in self._index:
            raise UserError(
                f"preferences.dataset={self._dataset.directory} has no responses to prompt "
                f"{prompt.id}; record the whole training split with oapl_jax.record"
            )
        with self._lock:
            return self._dataset[self._index[prompt.id]].rollouts[: self._count]
