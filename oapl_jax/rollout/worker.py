"""The worker: prompts in, rewarded groups out, into the buffer.

It runs in turns with the learner (`produce`, deterministic), or beside it in a thread (`start`).
"""

import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait

import numpy as np
from etils import epath

from oapl_jax.curriculum import Curriculum
from oapl_jax.data.prompts import PromptStream
from oapl_jax.errors import RunError
from oapl_jax.rollout.buffer import Buffer
from oapl_jax.rollout.ledger import Ledger
from oapl_jax.rollout.sampler import Sampled, Sampler, Sampling
from oapl_jax.structs import Group, Prompt, Rollout


class Worker:
    """Draws prompts, samples a group for each, rewards it and adds it to the buffer.

    Args:
      prompts: the stream of prompts, or what a curriculum makes of it.
      sampler: holds the behavior policy.
      reward: prompt and its rollouts -> float32[n], their rewards; called in threads.
      buffer: takes the groups.
      ledger: hears of every rollout that is asked for.
      record: takes each rewarded group before the buffer does; nothing it keeps may change.
      group_size: rollouts a prompt.
      sampling: how tokens are drawn.
      prompts_per_call: prompts that `produce` samples.
      reward_threads: groups rewarded at a time; with one they are added in the order in which they
        were sampled.
      deadline: seconds that the thread may wait for room in the buffer, and `stop` for the thread.
    """

    def __init__(
        self,
        prompts: PromptStream | Curriculum,
        sampler: Sampler,
        reward: Callable[[Prompt, Sequence[Rollout]], np.ndarray],
        buffer: Buffer,
        *,
        ledger: Ledger,
        record: Callable[[Group], None],
        group_size: int,
        sampling: Sampling,
        prompts_per_call: int,
        reward_threads: int,
        deadline: float,
    ):
        self._prompts, self._sampler, self._reward, self._buffer = prompts, sampler, reward, buffer
        self._ledger, self._record = ledger, record
        self._group_size, self._sampling = group_size, sampling
        self._prompts_per_call, self._deadline = prompts_per_call, deadline
        self._graders = ThreadPoolExecutor(reward_threads, thread_name_prefix="reward")
        self._deliveries: list[Future] = []
        self._again: list[int] = []  # draws that a run before this one took and did not deliver
        self._outstanding: set[int] = set()  # draws that are sampled or rewarded now
        self._rewarding: dict[int, int] = {}  # versions of the draws that are rewarded now
        self._totals: dict[str, float] = defaultdict(float)
        self._busy_since = 0.0  # when the first of the outstanding draws was taken
        self._wanted: tuple[int, epath.Path] | None = None
        self._loading = -1  # the version that the sampler is told to take
        self._thread: threading.Thread | None = None
        self._stopping = False
        self._failure: BaseException | None = None

    @property
    def version(self) -> int:
        """The version that serves from the next prompt on; -1 before the first."""
        return self._wanted[0] if self._wanted else -1

    def versions(self) -> set[int]:
        """What must not be collected: the version that serves next, those that the sampler holds,
        and those whose groups are rewarded now.

        Ask before `Buffer.versions`: a group in between is then in one of the two.
        """
        sampled = self._sampler.versions()  # first: what it gives away is rewarded from then on
        with self._buffer.lock:
            return {self.version, self._loading, *sampled, *self._rewarding.values()} - {-1}

    def serve(self, version: int, path: epath.Path) -> None:
        """From the next prompt on, samples from this published version."""
        with self._buffer.lock:
            self._wanted = (version, path)
            self._buffer.sync(version)

    def produce(self) -> None:
        """Samples and adds one portion of groups."""
        self._refresh()
        self._sample(self._take() for _ in range(self._prompts_per_call))
        self.check()

    def _sample(self, prompts: Iterator[Prompt]) -> None:
        """Samples the prompts and returns when all are in the buffer."""
        stream = self._sampler.generate(prompts, n=self._group_size, sampling=self._sampling)
        for sampled in stream:
            if sampled.rollouts:
                with self._buffer.lock:
                    version = sampled.rollouts[0].policy_version
                    self._rewarding[sampled.prompt.stream_index] = version
            self._deliveries = [future for future in self._deliveries if not future.done()]
            self._deliveries.append(self._graders.submit(self._deliver, sampled))
        self._await_rewards()

    def _await_rewards(self) -> None:
        late = wait(self._deliveries, self._deadline).not_done
        if late:
            raise RunError(
                f"{len(late)} groups were not rewarded in {self._deadline:.0f} s (rollout.deadline)"
            )

    def _refresh(self) -> None:
        with self._buffer.lock:  # from here on nobody collects it, even if another is served
            wanted, self._loading = self._wanted, self.version
        if wanted and wanted[0] != self._sampler.version:
            self._sampler.refresh(*wanted)

    def _take(self) -> Prompt:
        with self._buffer.lock:  # the ledger, the outstanding and the place in the prompts agree
            if not self._outstanding:
                self._busy_since = time.monotonic()
            prompt = self._prompts.at(self._again.pop(0)) if self._again else next(self._prompts)
            self._outstanding.add(prompt.stream_index)
            self._ledger.request(prompt, self._group_size)
        return prompt

    def _take_as_there_is_room(self) -> Iterator[Prompt]:
        """Prompts without end, as long as what is outstanding has room in the buffer too."""
        has_room = lambda: self._buffer.has_room(len(self._outstanding) + 1)
        while not self._stopping:
            waited = self._buffer.wait(
                lambda: self._stopping or has_room(),
                what="room in the buffer (rollout.deadline): the learner takes no groups",
                deadline=self._deadline,
                alive=self.check,
            )
            with self._buffer.lock:
                self._totals["waiting"] += waited
            if not self._stopping:
                self._refresh()
                yield self._take()

    def _deliver(self, sampled: Sampled) -> None:
        """Rewards a group and adds it; what fails here is raised again by `check`."""
        try:
            prompt, rollouts = sampled.prompt, sampled.rollouts
            reward = self._reward(prompt, rollouts) if rollouts else np.empty(0, np.float32)
            with self._buffer.lock:
                self._ledger.sampled(sampled, reward)
                self._outstanding.remove(prompt.stream_index)
                self._rewarding.pop(prompt.stream_index, None)
                if not self._outstanding:
                    self._totals["seconds"] += time.monotonic() - self._busy_since
                if rollouts:
                    group = Group(prompt, rollouts, reward)
                    self._record(group)
                    self._count(group, sampled.seconds)
                    self._buffer.add(group)
                else:
                    self._totals["failed"] += 1
                    self._buffer.wake()  # there is room again
        except BaseException as failure:
            self._fail(failure)

    def _count(self, group: Group, seconds: float) -> None:
        self._totals["groups"] += 1
        self._totals["rollouts"] += len(group.rollouts)
        self._totals["tokens"] += sum(len(r.tokens) for r in group.rollouts)
        self._totals["truncated"] += sum(r.finish_reason == "length" for r in group.rollouts)
        self._totals["zero_variance"] += group.zero_variance
        self._totals["reward"] += float(group.reward.sum())
        self._totals["latency"] += seconds

    def take_metrics(self) -> dict[str, float]:
        """What was sampled since the last call; empty if nothing was."""
        with self._buffer.lock:
            if not self._totals["groups"]:
                return {}  # seconds waited since then belong to the groups that follow
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
            "rollout/zero_variance": total["zero_variance"] / total["groups"],
            "rollout/tokens_per_second": total["tokens"] / total["seconds"],
            "rollout/seconds": total["seconds"],
            "rollout/latency": total["latency"] / total["groups"],
            "rollout/waiting_seconds": float(total["waiting"]),
        }

    def state(self) -> dict:
        """The place in the prompts, the draws taken before it that were not delivered, totals."""
        again = sorted({*self._again, *self._outstanding})
        return {"prompts": self._prompts.state(), "again": again, "totals": dict(self._totals)}

    def restore(self, state: dict) -> None:
        self._prompts.restore(state["prompts"])
        self._again = list(state["again"])
        self._totals = defaultdict(float, state["totals"])

    def start(self) -> None:
        """Produces in a thread, as long as the buffer has room; a second call changes nothing."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="worker", daemon=True)
            self._thread.start()

    def _run(self) -> None:
        try:
            self._sample(self._take_as_there_is_room())
        except BaseException as failure:
            self._fail(failure)

    def _fail(self, failure: BaseException) -> None:
        self._failure = self._failure or failure
        self._buffer.wake()

    def check(self) -> None:
        """Raises what a thread died of, in the learner's."""
        if self._failure:
            raise self._failure

    def stop(self) -> None:
        """Ends the thread; the draws in flight stay in `state`, to be sampled again.

        Raises:
          RunError: if it, or a reward, has not ended within the deadline.
        """
        self._stopping = True
        self._buffer.wake()
        self._sampler.close()
        if self._thread:
            self._thread.join(self._deadline)
            if self._thread.is_alive():
                raise RunError(
                    f"the worker's thread did not end in {self._deadline:.0f} s (rollout.deadline)"
                )
        try:
            self._await_rewards()
        finally:
            self._graders.shutdown(wait=False, cancel_futures=True)
