"""The buffer of groups between worker and learner, and the store that guards it.

Prompt position, ledger, curriculum and buffer move together under one lock, which is private to
GroupStore: a prompt is reserved, its group is committed, groups are taken for a gradient step.
Whenever the lock is free the parts agree, so a checkpoint can be taken at any time.
"""

import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from etils import epath

from oapl_jax.config import BufferConfig
from oapl_jax.curriculum import Curriculum
from oapl_jax.errors import RunError
from oapl_jax.rollout.dataset import RecordedStream
from oapl_jax.rollout.ledger import Ledger
from oapl_jax.rollout.sampler import Sampled
from oapl_jax.structs import Group, Prompt, decode_groups, encode_groups


class Buffer:
    """Holds groups until gradient steps have used them; not thread-safe (see GroupStore).

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


class GroupStore:
    """Reserves prompts, commits groups, and hands groups to the learner. Any thread.

    Args:
      prompts: the prompt stream behind its curriculum.
      recorded: the recorded dataset, if a share of the groups comes from one.
      on_group: called with each rewarded group before the buffer drops any (record, guard).
    """

    def __init__(
        self,
        prompts: Curriculum,
        buffer: Buffer,
        ledger: Ledger,
        recorded: RecordedStream | None,
        *,
        group_size: int,
        on_group: Callable[[Group], None],
    ):
        self._prompts, self._buffer, self._ledger = prompts, buffer, ledger
        self._recorded, self._group_size, self._on_group = recorded, group_size, on_group
        self._changed = threading.Condition()
        self._target: tuple[int, epath.Path] | None = None
        self._loading = -1  # the version of the last refresh request
        self._again: list[int] = []  # reserved before a restart and never committed
        self._outstanding: set[int] = set()  # reserved and not committed yet
        self._rewarding: dict[int, int] = {}  # stream index -> version of groups being rewarded
        self._totals: dict[str, float] = defaultdict(float)  # since the last metrics
        self._busy_since = 0.0  # when the first outstanding prompt was reserved

    def __len__(self) -> int:
        with self._changed:
            return len(self._buffer)

    @property
    def target_version(self) -> int:
        """Version that samples from the next prompt on; -1 before the first."""
        return self._target[0] if self._target else -1

    def set_target(self, version: int, path: epath.Path) -> None:
        with self._changed:
            self._target = (version, path)
            self._buffer.sync(version)
            self._changed.notify_all()

    def start_refresh(self) -> tuple[int, epath.Path] | None:
        """The target version, pinned from here on even if another one replaces it meanwhile."""
        with self._changed:
            self._loading = self.target_version
            return self._target

    def versions(self, sampler_versions: set[int]) -> set[int]:
        """Versions whose files must stay.

        The sampler's are read before this call: a group that leaves it meanwhile is being rewarded
        or in the buffer.
        """
        with self._changed:
            pinned = {self.target_version, self._loading, *self._rewarding.values()}
            return (pinned | sampler_versions | self._buffer.versions()) - {-1}

    def held_versions(self) -> set[int]:
        with self._changed:
            return self._buffer.versions()

    def reserve(self) -> Prompt:
        """The next prompt to sample, in the ledger as requested."""
        with self._changed:
            if not self._outstanding:
                self._busy_since = time.monotonic()
            prompt = self._prompts.at(self._again.pop(0)) if self._again else next(self._prompts)
            self._outstanding.add(prompt.stream_index)
            self._ledger.request(prompt, self._group_size)
            return prompt

    def has_room(self, count: int = 1) -> bool:
        """True if `count` more prompts fit beside those outstanding."""
        with self._changed:
            return self._buffer.has_room(len(self._outstanding) + count)

    def pin(self, sampled: Sampled) -> None:
        """Pins the version of a group while it is rewarded."""
        with self._changed:
            if sampled.rollouts:
                self._rewarding[sampled.prompt.stream_index] = sampled.rollouts[0].policy_version

    def commit(self, sampled: Sampled, reward: np.ndarray) -> None:
        """Adds a rewarded group to the buffer, or counts a prompt without rollouts as failed."""
        prompt, rollouts = sampled.prompt, sampled.rollouts
        with self._changed:
            self._ledger.sampled(sampled, reward)
            self._outstanding.remove(prompt.stream_index)
            self._rewarding.pop(prompt.stream_index, None)
            if not self._outstanding:
                self._totals["seconds"] += time.monotonic() - self._busy_since
            if rollouts:
                group = Group(prompt, rollouts, reward)
                self._prompts.scorer.ended(group)
                self._on_group(group)
                self._count(group, sampled.seconds)
                self._buffer.add(group)
            else:
                self._totals["failed"] += 1
            self._changed.notify_all()

    def take(self, sampled: int, recorded: int, step: int) -> list[Group]:
        """Groups of one gradient step: `sampled` from the buffer, `recorded` from the dataset."""
        with self._changed:
            groups = self._buffer.sample(sampled, step)
            self._changed.notify_all()
            return groups + (self._recorded.take(recorded, step) if self._recorded else [])

    def expire(self, step: int) -> None:
        with self._changed:
            self._buffer.expire(step)
            self._changed.notify_all()

    def trained(self, groups: Sequence[Group], score: Callable[[], Any]) -> None:
        """Tells the curriculum which groups a gradient step has used.

        `score` gives [S, C], the log-probs of their tokens by the learner after the step; it is
        called only if the curriculum needs them.
        """
        scorer = self._prompts.scorer
        logp = np.asarray(score()) if scorer.rescores else None
        with self._changed:
            scorer.trained(groups, logp)

    def wait(
        self, condition: Callable[[], bool], name: str, *, deadline: float, check: Callable[[], Any]
    ) -> float:
        """Waits until `condition()` holds, evaluated at each change; returns the seconds waited.

        Raises a RunError that names the wait at the deadline, and what `check` raises before.
        """
        start = time.monotonic()
        with self._changed:
            check()
            while not condition():
                if time.monotonic() - start > deadline:
                    raise RunError(f"waited {deadline:.0f} s for {name}")
                self._changed.wait(timeout=0.2)
                check()
        return time.monotonic() - start

    def notify(self) -> None:
        with self._changed:
            self._changed.notify_all()

    def _count(self, group: Group, seconds: float) -> None:
        self._totals["groups"] += 1
        self._totals["rollouts"] += len(group.rollouts)
        self._totals["tokens"] += sum(len(r.tokens) for r in group.rollouts)
        self._totals["truncated"] += sum(r.finish_reason == "length" for r in group.rollouts)
        self._totals["right_and_stopped"] += group.right_and_stopped
        self._totals["zero_variance"] += group.zero_variance
        self._totals["reward"] += float(group.reward.sum())
        self._totals["latency"] += seconds

    def count_waiting(self, seconds: float) -> None:
        """Adds seconds that the sampler waited for room."""
        with self._changed:
            self._totals["waiting"] += seconds

    def counts(self) -> dict[str, float]:
        """Ends of all groups so far, and the curriculum's metrics."""
        with self._changed:
            counts = {f"buffer/{name}": float(n) for name, n in self._buffer.counts.items()}
            recorded = self._recorded.counts if self._recorded else {}
            counts |= {f"recorded/{name}": float(n) for name, n in recorded.items()}
            counts["prompts/dropped"] = float(self._prompts.dropped)
            return counts | self._prompts.metrics()

    def take_metrics(self) -> dict[str, float]:
        """Sampling since the last call; empty if no group was committed."""
        with self._changed:
            if not self._totals["groups"]:
                return {}  # seconds waited since then belong to the next groups
            if self._outstanding:
                now = time.monotonic()
                self._totals["seconds"] += now - self._busy_since
                self._busy_since = now
            total, self._totals = self._totals, defaultdict(float)
        return {
            "rollout/groups": total["groups"],
            "rollout/failed": total["failed"],
            "rollout/reward": total["reward"] / total["rollouts"],
            "rollout/length": total["tokens"] / total["rollouts"],
            "rollout/truncated": total["truncated"] / total["rollouts"],
            "rollout/right_and_stopped": total["right_and_stopped"] / total["rollouts"],
            "rollout/zero_variance": total["zero_variance"] / total["groups"],
            "rollout/tokens_per_second": total["tokens"] / total["seconds"],
            "rollout/seconds": total["seconds"],
            "rollout/latency": total["latency"] / total["groups"],
            "rollout/waiting_seconds": float(total["waiting"]),
        }

    def curriculum_arrays(self) -> Any | None:
        """Arrays of the curriculum on the mesh, saved beside `snapshot`; None if it has none."""
        return self._prompts.scorer.arrays()

    def snapshot(self, shards: Callable[[], int | None]) -> dict[str, Any]:
        """State for a checkpoint; `shards` writes pending recorded groups and counts the shards."""
        with self._changed:
            prompts = self._prompts.state()
            again = sorted({*self._again, *self._outstanding})
            pending = {*prompts["chosen"], *again, *self._buffer.stream_indices()}
            return {
                "buffer": self._buffer.state(),
                "prompts": prompts,
                "again": again,
                "totals": dict(self._totals),
                "scorer": self._prompts.scorer.state(pending),
                "ledger": self._ledger.position(),
                "recorded": self._recorded.state() if self._recorded else None,
                "shards": shards(),
            }

    def restore(self, state: dict[str, Any], read: Callable[[Any], Any]) -> None:
        """Continues from a snapshot, without "buffer" if the groups held are sampled again.

        `read` takes the curriculum's arrays for shapes and shardings, and gives those saved.
        """
        with self._changed:
            if "buffer" in state:
                self._buffer.restore(state["buffer"])
            self._prompts.restore(state["prompts"])
            self._again = list(state["again"])
            self._totals = defaultdict(float, state["totals"])
            self._prompts.scorer.restore(state["scorer"], read, self._prompts.at)
            self._ledger.resume(state["ledger"], self._buffer.stream_indices())
            if self._recorded:
                self._recorded.restore(state["recorded"])
