"""The worker: samples reserved prompts, rewards the groups and commits them.

It runs in turns with the learner (`produce`, deterministic) or beside it in a thread (`start`).
"""

import dataclasses
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait

import numpy as np

from oapl_jax.errors import RunError
from oapl_jax.rollout.buffer import GroupStore
from oapl_jax.rollout.sampler import Sampled, Sampler, Sampling
from oapl_jax.structs import Prompt, Rollout


@dataclasses.dataclass(eq=False)
class Worker:
    """Samples a group for each reserved prompt."""

    store: GroupStore
    sampler: Sampler | None  # None: all groups are recorded ones
    reward: Callable[[Prompt, Sequence[Rollout]], np.ndarray]  # float32[n]; called in threads
    _: dataclasses.KW_ONLY
    group_size: int
    sampling: Sampling
    prompts_per_call: int  # prompts that `produce` samples
    reward_threads: int  # groups rewarded at a time; one keeps the order of the sampler
    deadline: float  # seconds that the thread waits for room in the buffer, and `stop` for it

    def __post_init__(self):
        self._graders = ThreadPoolExecutor(self.reward_threads, thread_name_prefix="reward")
        self._commits: list[Future] = []
        self._thread: threading.Thread | None = None
        self._stopping = False
        self._failure: BaseException | None = None

    def versions(self) -> set[int]:
        return self.store.versions(self.sampler.versions() if self.sampler else set())

    def produce(self) -> None:
        """Samples and commits `prompts_per_call` groups."""
        self._refresh()
        # All at once: the embedded sampler takes no more slots than they need.
        self._sample([self.store.reserve() for _ in range(self.prompts_per_call)])
        self.check()

    def start(self) -> None:
        """Produces in a thread while the buffer has room; a second call changes nothing."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="worker", daemon=True)
            self._thread.start()

    def check(self) -> None:
        """Raises the error that ended a thread of the worker."""
        if self._failure:
            raise self._failure

    def stop(self) -> None:
        """Ends the thread; prompts in flight stay reserved and are sampled again on resume.

        Raises a RunError if the thread, or a reward, does not end within the deadline.
        """
        self._stopping = True
        self.store.notify()
        if self.sampler:
            self.sampler.close()
        if self._thread:
            self._thread.join(self.deadline)
            if self._thread.is_alive():
                raise RunError(
                    f"the worker's thread did not end in {self.deadline:.0f} s (rollout.deadline)"
                )
        try:
            self._await_rewards()
        finally:
            self._graders.shutdown(wait=False, cancel_futures=True)

    def _run(self) -> None:
        try:
            self._sample(self._reserve_as_there_is_room())
        except BaseException as failure:
            self._fail(failure)

    def _refresh(self) -> None:
        target = self.store.start_refresh()
        assert self.sampler
        if target and target[0] != self.sampler.version:
            self.sampler.refresh(*target)

    def _reserve_as_there_is_room(self) -> Iterator[Prompt]:
        while not self._stopping:
            waited = self.store.wait(
                lambda: self._stopping or self.store.has_room(),
                "room in the buffer (rollout.deadline): the learner takes no groups",
                deadline=self.deadline,
                check=self.check,
            )
            self.store.count_waiting(waited)
            if not self._stopping:
                self._refresh()
                yield self.store.reserve()

    def _sample(self, prompts: Iterable[Prompt]) -> None:
        """Samples the prompts; returns when all groups are committed."""
        assert self.sampler
        groups = self.sampler.generate(prompts, n=self.group_size, sampling=self.sampling)
        for sampled in groups:
            self.store.pin(sampled)
            self._commits = [future for future in self._commits if not future.done()]
            self._commits.append(self._graders.submit(self._commit, sampled))
        self._await_rewards()

    def _commit(self, sampled: Sampled) -> None:
        """Rewards and commits a group; `check` raises its error."""
        try:
            rollouts = sampled.rollouts
            reward = self.reward(sampled.prompt, rollouts) if rollouts else np.empty(0, np.float32)
            self.store.commit(sampled, reward)
        except BaseException as failure:
            self._fail(failure)

    def _await_rewards(self) -> None:
        if late := wait(self._commits, self.deadline).not_done:
            raise RunError(
                f"{len(late)} groups were not rewarded in {self.deadline:.0f} s (rollout.deadline)"
            )

    def _fail(self, failure: BaseException) -> None:
        self._failure = self._failure or failure
        self.store.notify()
