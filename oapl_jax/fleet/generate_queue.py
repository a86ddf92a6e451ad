"""Where the threads of one `Fleet.generate` meet: prompts are pulled, sampled, and groups taken."""

import asyncio
import threading
from collections import deque
from collections.abc import Iterator

from oapl_jax.rollout.sampler import Sampled


class Call:
    """One `generate`: prompts come in by one thread, groups go out by another. Any thread."""

    def __init__(self, max_in_flight: int):
        self._most = max_in_flight
        self._changed = threading.Condition()
        self._finished: deque[Sampled] = deque()
        self._handed: Sampled | None = None  # until its taker is back for the next
        self._tasks: set[asyncio.Task] = set()  # the fleet's thread only
        self._exhausted = self._stopped = False
        self._failure: BaseException | None = None
        self.outstanding = 0

    def wait_for_room(self) -> bool:
        """Waits until another prompt may be taken; False if none will be."""
        with self._changed:
            self._changed.wait_for(
                lambda: self._over() or max(self.outstanding, len(self._finished)) < self._most
            )
            return not self._over()

    def _over(self) -> bool:
        return self._stopped or self._failure is not None

    def take(self) -> bool:
        """A prompt was taken; False if it is too late for it."""
        with self._changed:
            self.outstanding += not self._over()
            return not self._over()

    def start(self, task: asyncio.Task) -> None:
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        if self._over():
            task.cancel()

    def cancel_tasks(self) -> None:
        for task in self._tasks:
            task.cancel()

    def deliver(self, sampled: Sampled) -> None:
        with self._changed:
            if not self._stopped:
                self.outstanding -= 1
                self._finished.append(sampled)
            self._changed.notify_all()

    def exhaust(self) -> None:
        """No prompt comes any more."""
        with self._changed:
            self._exhausted = True
            self._changed.notify_all()

    def fail(self, error: BaseException) -> None:
        with self._changed:
            self._failure = self._failure or error
            self._changed.notify_all()

    def stop(self) -> int:
        """Ends it; returns how many prompts will not come out."""
        with self._changed:
            left = self.outstanding + len(self._finished)
            self._stopped, self.outstanding = True, 0
            self._finished.clear()
            self._changed.notify_all()
            return left

    def results(self) -> Iterator[Sampled]:
        """Groups as they are done, until all are or it is stopped.

        Each wait ends: a group in flight has its deadlines, and a pull that blocks is ended by who
        made the prompts.
        """
        while True:
            with self._changed:
                self._handed = None
                self._changed.wait_for(
                    lambda: (
                        self._finished or self._over() or (self._exhausted and not self.outstanding)
                    )
                )
                if self._finished:
                    self._handed = self._finished.popleft()
                    self._changed.notify_all()
                elif self._failure and not self._stopped:
                    raise self._failure
                else:
                    return
            yield self._handed

    def versions(self) -> set[int]:
        """Of the groups that are done and not yet in the hands of who takes them."""
        with self._changed:
            done = [*self._finished, *([self._handed] if self._handed else [])]
        return {s.rollouts[0].policy_version for s in done if s.rollouts}
