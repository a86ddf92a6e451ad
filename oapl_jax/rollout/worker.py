"""The worker: prompts in, rewarded groups out, into the buffer.

It runs in turns with the learner (`produce`, deterministic), or beside it in a thread (`start`).
"""

import threading
import time
from collections import defaultdict
from collections.abc import Callable, Sequence

import numpy as np
from etils import epath

from oapl_jax.buffer import Buffer
from oapl_jax.data.prompts import Prompts
from oapl_jax.rollout.sampler import Sampler, Sampling
from oapl_jax.structs import Group, Prompt, Rollout


class Worker:
    """Draws prompts, samples a group for each, rewards it and adds it to the buffer.

    Args:
      prompts: the stream of prompts.
      sampler: holds the behavior policy.
      reward: prompt and rollout -> reward.
      buffer: takes the groups.
      group_size: rollouts a prompt.
      sampling: how tokens are drawn.
      prompts_per_call: prompts sampled at a time.
      deadline: seconds that the thread may wait for room in the buffer.
    """

    def __init__(
        self,
        prompts: Prompts,
        sampler: Sampler,
        reward: Callable[[Prompt, Rollout], float],
        buffer: Buffer,
        *,
        group_size: int,
        sampling: Sampling,
        prompts_per_call: int,
        deadline: float,
    ):
        self._prompts, self._sampler, self._reward, self._buffer = prompts, sampler, reward, buffer
        self._group_size, self._sampling = group_size, sampling
        self._prompts_per_call, self._deadline = prompts_per_call, deadline
        self._delivered = prompts.state()
        self._totals: dict[str, float] = defaultdict(float)
        self._wanted: tuple[int, epath.Path] | None = None
        self._serving: tuple[int, epath.Path] | None = None
        self._thread: threading.Thread | None = None
        self._stopping = False
        self._failure: BaseException | None = None

    @property
    def version(self) -> int:
        """The version that serves from the next portion on; -1 before the first."""
        return self._wanted[0] if self._wanted else -1

    def versions(self) -> set[int]:
        """What must not be collected: the version that serves next, and the one sampled from now.

        Ask before `Buffer.versions`: a portion in between is then in one of the two.
        """
        return {version for version, _ in filter(None, (self._serving, self._wanted))}

    def serve(self, version: int, path: epath.Path) -> None:
        """From the next portion of prompts on, samples from this published version."""
        with self._buffer.lock:
            self._wanted = (version, path)
            self._buffer.sync(version)

    def produce(self) -> None:
        """Samples and adds one portion of groups."""
        self._serving = self._wanted
        if self._serving and self._serving[0] != self._sampler.version:
            self._sampler.refresh(*self._serving)
        prompts = [next(self._prompts) for _ in range(self._prompts_per_call)]
        start = time.monotonic()
        samples = self._sampler.generate(prompts, n=self._group_size, sampling=self._sampling)
        seconds = time.monotonic() - start
        groups = [self._rewarded(p, rollouts) for p, rollouts in zip(prompts, samples, strict=True)]
        with self._buffer.lock:  # the buffer and the place in the prompts change together
            for group in groups:
                self._buffer.add(group)
            self._delivered = self._prompts.state()
            self._count(groups, seconds)

    def _rewarded(self, prompt: Prompt, rollouts: Sequence[Rollout]) -> Group:
        reward = np.array([self._reward(prompt, rollout) for rollout in rollouts], np.float32)
        return Group(prompt, tuple(rollouts), reward)

    def _count(self, groups: Sequence[Group], seconds: float) -> None:
        rollouts = [r for g in groups for r in g.rollouts]
        self._totals["groups"] += len(groups)
        self._totals["rollouts"] += len(rollouts)
        self._totals["tokens"] += sum(len(r.tokens) for r in rollouts)
        self._totals["truncated"] += sum(r.finish_reason == "length" for r in rollouts)
        self._totals["zero_variance"] += sum(g.zero_variance for g in groups)
        self._totals["reward"] += float(sum(g.reward.sum() for g in groups))
        self._totals["seconds"] += seconds

    def take_metrics(self) -> dict[str, float]:
        """What was sampled since the last call; empty if nothing was."""
        with self._buffer.lock:
            if not self._totals["groups"]:
                return {}  # seconds waited since then belong to the groups that follow
            total, self._totals = self._totals, defaultdict(float)
        return {
            "rollout/groups": total["groups"],
            "rollout/reward": total["reward"] / total["rollouts"],
            "rollout/length": total["tokens"] / total["rollouts"],
            "rollout/truncated": total["truncated"] / total["rollouts"],
            "rollout/zero_variance": total["zero_variance"] / total["groups"],
            "rollout/tokens_per_second": total["tokens"] / total["seconds"],
            "rollout/seconds": total["seconds"],
            "rollout/waiting_seconds": float(total["waiting"]),
        }

    def state(self) -> dict:
        """The place in the prompts up to which groups were added (the rest is redrawn); totals."""
        return {"prompts": self._delivered, "totals": dict(self._totals)}

    def restore(self, state: dict) -> None:
        self._prompts.restore(state["prompts"])
        self._delivered = state["prompts"]
        self._totals = defaultdict(float, state["totals"])

    def start(self) -> None:
        """Produces in a thread, as long as the buffer has room."""
        self._thread = threading.Thread(target=self._run, name="worker", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            while not self._stopping:
                waited = self._buffer.wait(
                    lambda: self._stopping or self._buffer.has_room(self._prompts_per_call),
                    what="room in the buffer (rollout.deadline): the learner takes no groups",
                    deadline=self._deadline,
                )
                with self._buffer.lock:
                    self._totals["waiting"] += waited
                if not self._stopping:
                    self.produce()
        except BaseException as failure:  # raised again in the learner's thread
            self._failure = failure
            self._buffer.wake()

    def check(self) -> None:
        """Raises what the thread died of."""
        if self._failure:
            raise self._failure

    def stop(self) -> None:
        """Ends the thread after the portion that it is sampling."""
        self._stopping = True
        self._buffer.wake()
        if self._thread:
            self._thread.join()
