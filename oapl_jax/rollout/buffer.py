"""The buffer between worker and learner, with a count for every group that it drops."""

import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np

from oapl_jax.errors import RunError, UserError
from oapl_jax.structs import Group, Prompt, Rollout

MODES = ("clear_on_sync", "keep_with_anchor", "replay")
ZERO_VARIANCE = ("keep", "drop", "weight")


class Buffer:
    """Holds groups until gradient steps have used them. Safe to share between two threads.

    Args:
      mode: "clear_on_sync": a new version empties it (arXiv 2602.19362, algorithm 1), each group
        trains once, oldest first. "keep_with_anchor": groups of older versions stay, each with its
        own behavior log-probs. "replay": groups are drawn at random, up to `max_reuse` times.
      max_age: steps after which a group is dropped as expired ("keep_with_anchor" and "replay").
      max_reuse: gradient steps that may use one group ("replay").
      capacity: groups held at most, for who asks `has_room` before it adds.
      zero_variance: whether groups with equal rewards are kept, dropped, or kept with a weight.
      seed: of the draws of "replay".
      on_end: hears what became of each group ("trained" at the gradient step that first used it,
        "expired" or "zero_variance", without a step); called with the lock held.

    `counts` says what happened to every group that was ever added: the sum of all its entries but
    "added" and "reused", plus the groups still held, is "added".

    Raises:
      UserError: for an unknown mode, or a group that may never be used.
    """

    def __init__(
        self,
        *,
        mode: str,
        max_age: int,
        max_reuse: int,
        capacity: int,
        zero_variance: str,
        seed: int,
        on_end: Callable[[Group, str, int | None], None],
    ):
        if mode not in MODES:
            raise UserError(f"buffer.mode={mode!r} is unknown; choose one of {', '.join(MODES)}")
        if zero_variance not in ZERO_VARIANCE:
            raise UserError(
                f"buffer.zero_variance={zero_variance!r} is unknown; choose one of "
                f"{', '.join(ZERO_VARIANCE)}"
            )
        if max_reuse < 1:
            raise UserError(
                f"buffer.max_reuse={max_reuse} lets no group train; it must be at least 1"
            )
        self._mode, self._max_age, self._capacity, self._seed = mode, max_age, capacity, seed
        self._uses = max_reuse if mode == "replay" else 1
        self._on_end = on_end
        self._drop_zero_variance = zero_variance == "drop"
        self._held: list[tuple[Group, int]] = []  # with the number of uses so far
        self._version = 0  # the newest that the sampler serves
        self._changed = threading.Condition(threading.RLock())
        self.counts: Counter[str] = Counter()

    def __len__(self) -> int:
        return len(self._held)

    @property
    def lock(self) -> threading.Condition:
        """Held by who needs the buffer and the worker's place in the prompts to agree."""
        return self._changed

    def versions(self) -> set[int]:
        """Policy versions that held groups refer to."""
        with self._changed:
            return {g.policy_version for g, _ in self._held}

    def draws(self) -> set[int]:
        """Places in the stream of prompts of the groups held."""
        with self._changed:
            return {g.prompt.stream_index for g, _ in self._held}

    def has_room(self, count: int) -> bool:
        return len(self._held) + count <= self._capacity

    def add(self, group: Group) -> None:
        """Takes a group, or counts why not."""
        with self._changed:
            self.counts["added"] += 1
            if self._drop_zero_variance and group.zero_variance:
                self.counts["zero_variance"] += 1
                self._on_end(group, "zero_variance", None)
            elif self._mode == "clear_on_sync" and group.policy_version != self._version:
                self.counts["expired"] += 1
                self._on_end(group, "expired", None)
            else:
                self._held.append((group, 0))
            self._changed.notify_all()

    def sync(self, version: int) -> None:
        """The sampler now serves `version`; "clear_on_sync" drops the groups of any other."""
        with self._changed:
            self._version = version
            if self._mode == "clear_on_sync":
                self._keep([g.policy_version == version for g, _ in self._held])

    def expire(self, step: int) -> None:
        """Drops what is too old for a gradient step at `step`."""
        with self._changed:
            if self._mode != "clear_on_sync":
                self._keep([step - g.policy_version <= self._max_age for g, _ in self._held])

    def sample(self, count: int, step: int) -> list[Group]:
        """`count` groups for one gradient step, or none if it holds fewer."""
        with self._changed:
            if len(self._held) < count:
                return []
            if self._mode == "replay":
                rng = np.random.default_rng([self._seed, step])
                chosen = sorted(rng.choice(len(self._held), size=count, replace=False))
            else:
                chosen = range(count)
            groups = [self._held[i][0] for i in chosen]
            for i in chosen:
                group, uses = self._held[i]
                self._held[i] = (group, uses + 1)
                self.counts["reused"] += uses > 0
                if not uses:
                    self._on_end(group, "trained", step)
            trained = len(self._held)
            self._held = [(g, uses) for g, uses in self._held if uses < self._uses]
            self.counts["trained"] += trained - len(self._held)
            self._changed.notify_all()
            return groups

    def wait(self, condition, *, what: str, deadline: float, alive=lambda: None) -> float:
        """Waits until `condition()` holds; returns the seconds waited.

        Args:
          condition: looked at whenever the buffer changes.
          what: named in the error.
          deadline: seconds.
          alive: called at each look; raises if the other side has died.

        Raises:
          RunError: when the deadline has passed.
        """
        start = time.monotonic()
        with self._changed:
            alive()
            while not condition():
                if time.monotonic() - start > deadline:
                    raise RunError(f"waited {deadline:.0f} s for {what}")
                self._changed.wait(timeout=0.2)
                alive()
        return time.monotonic() - start

    def wake(self) -> None:
        """Makes waiting threads look at their condition again."""
        with self._changed:
            self._changed.notify_all()

    def state(self) -> tuple[dict, dict[str, np.ndarray]]:
        """What a checkpoint needs: JSON-able data and flat arrays."""
        with self._changed:
            meta, arrays = flatten([g for g, _ in self._held])
            meta["uses"] = [uses for _, uses in self._held]
            meta["version"], meta["counts"] = self._version, dict(self.counts)
            return meta, arrays

    def restore(self, meta: dict, arrays: dict[str, np.ndarray]) -> None:
        with self._changed:
            self._held = list(zip(unflatten(meta, arrays), meta["uses"], strict=True))
            self._version, self.counts = meta["version"], Counter(meta["counts"])

    def _keep(self, mask: Sequence[bool]) -> None:
        kept = [held for held, keep in zip(self._held, mask, strict=True) if keep]
        for group, uses in (h for h, keep in zip(self._held, mask, strict=True) if not keep):
            self.counts["trained" if uses else "expired"] += 1
            if not uses:
                self._on_end(group, "expired", None)
        self._held = kept
        self._changed.notify_all()


def flatten(groups: Sequence[Group]) -> tuple[dict, dict[str, np.ndarray]]:
    """Groups as JSON-able data and a few flat arrays, since their lengths differ."""
    rollouts = [r for g in groups for r in g.rollouts]
    meta = {
        "prompts": [
            [g.prompt.id, g.prompt.stream_index, g.prompt.text, g.prompt.answer, g.prompt.task]
            for g in groups
        ],
        "prompt_lengths": [len(g.prompt.tokens) for g in groups],
        "group_sizes": [len(g.rollouts) for g in groups],
        "lengths": [len(r.tokens) for r in rollouts],
        "versions": [r.policy_version for r in rollouts],
        "finish_reasons": [r.finish_reason for r in rollouts],
    }
    join = lambda parts, dtype: np.concatenate([np.zeros(1, dtype), *parts]).astype(dtype)
    arrays = {  # each begins with one zero: an array of no elements can't be saved
        "prompt_tokens": join([g.prompt.tokens for g in groups], np.int32),
        "tokens": join([r.tokens for r in rollouts], np.int32),
        "behavior_logp": join([r.behavior_logp for r in rollouts], np.float32),
        "reward": join([g.reward for g in groups], np.float32),
    }
    return meta, arrays


def unflatten(meta: dict, arrays: dict[str, np.ndarray]) -> list[Group]:
    """The inverse of `flatten`."""

    def split(name: str, lengths: Sequence[int]) -> list[np.ndarray]:
        return np.split(np.asarray(arrays[name])[1:], np.cumsum(lengths)[:-1]) if lengths else []

    rollouts = map(
        Rollout,
        split("tokens", meta["lengths"]),
        split("behavior_logp", meta["lengths"]),
        meta["versions"],
        meta["finish_reasons"],
    )
    prompt_tokens = split("prompt_tokens", meta["prompt_lengths"])
    rewards = split("reward", meta["group_sizes"])
    groups = []
    for (name, draw, text, answer, task), tokens, reward in zip(
        meta["prompts"], prompt_tokens, rewards, strict=True
    ):
        prompt = Prompt(name, draw, tokens, text, answer, task)
        groups.append(Group(prompt, tuple(next(rollouts) for _ in reward), reward))
    return groups
