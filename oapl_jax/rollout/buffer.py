"""The buffer between worker and learner; counts every group that it drops."""

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from oapl_jax.config import BufferConfig
from oapl_jax.structs import Group, decode_groups, encode_groups


class Buffer:
    """Holds groups until gradient steps have used them; not thread-safe (see group_store.py).

    Modes: "clear_on_sync": a new version empties the buffer (arXiv 2602.19362, algorithm 1) and
    each group trains once, oldest first. "keep_with_anchor": groups of older versions stay, each
    with its own behavior log-probs. "replay": groups are drawn at random, up to `max_reuse` times.

    Args:
      seed: of the draws of "replay".
      on_end: called with the end of each group and the gradient step: "trained" at the first step
        that uses it, "expired" or "zero_variance" (step None).

    `counts` balances: its entries but "added" and "reused", plus the groups held, sum to "added".
    """

    def __init__(
        self, config: BufferConfig, *, seed: int, on_end: Callable[[Group, str, int | None], None]
    ):
        self._config, self._seed, self._on_end = config, seed, on_end
        self._max_uses = config.max_reuse if config.mode == "replay" else 1
        self._held: list[tuple[Group, int]] = []  # with the number of uses so far
        self._version = 0  # the newest that the sampler serves
        self.counts: Counter[str] = Counter()

    def __len__(self) -> int:
        return len(self._held)

    def versions(self) -> set[int]:
        return {group.policy_version for group, _ in self._held}

    def stream_indices(self) -> set[int]:
        """Positions in the prompt stream of the groups held."""
        return {group.prompt.stream_index for group, _ in self._held}

    def has_room(self, count: int) -> bool:
        return len(self._held) + count <= self._config.capacity

    def add(self, group: Group) -> None:
        """Adds a group, or drops and counts it."""
        self.counts["added"] += 1
        if self._config.zero_variance == "drop" and group.zero_variance:
            self._end(group, "zero_variance")
        elif self._config.mode == "clear_on_sync" and group.policy_version != self._version:
            self._end(group, "expired")
        else:
            self._held.append((group, 0))

    def sync(self, version: int) -> None:
        """The sampler now serves `version`; "clear_on_sync" drops the groups of any other."""
        self._version = version
        if self._config.mode == "clear_on_sync":
            self._drop(lambda group: group.policy_version != version)

    def expire(self, step: int) -> None:
        """Drops the groups that are too old for a gradient step at `step`."""
        if self._config.mode != "clear_on_sync":
            self._drop(lambda group: step - group.policy_version > self._config.max_age)

    def sample(self, count: int, step: int) -> list[Group]:
        """`count` groups for one gradient step; none if it holds fewer."""
        if len(self._held) < count:
            return []
        chosen: Sequence[int] = range(count)
        if self._config.mode == "replay":
            rng = np.random.default_rng([self._seed, step])
            chosen = sorted(rng.choice(len(self._held), size=count, replace=False))
        groups, held = [], len(self._held)
        for i in chosen:
            group, uses = self._held[i]
            self._held[i] = (group, uses + 1)
            groups.append(group)
            self.counts["reused"] += uses > 0
            if not uses:
                self._on_end(group, "trained", step)
        self._held = [(group, uses) for group, uses in self._held if uses < self._max_uses]
        self.counts["trained"] += held - len(self._held)
        return groups

    def state(self) -> dict[str, Any]:
        """State for a checkpoint: JSON values, and the groups as bytes."""
        return {
            "groups": encode_groups([group for group, _ in self._held]),
            "uses": [uses for _, uses in self._held],
            "version": self._version,
            "counts": dict(self.counts),
        }

    def restore(self, state: dict[str, Any]) -> None:
        self._held = list(zip(decode_groups(state["groups"]), state["uses"], strict=True))
        self._version, self.counts = state["version"], Counter(state["counts"])

    def _drop(self, stale: Callable[[Group], bool]) -> None:
        for group, uses in self._held:
            if stale(group) and uses:
                self.counts["trained"] += 1
            elif stale(group):
                self._end(group, "expired")
        self._held = [held for held in self._held if not stale(held[0])]

    def _end(self, group: Group, end: str) -> None:
        self.counts[end] += 1
        self._on_end(group, end, None)
