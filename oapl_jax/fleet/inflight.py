"""The groups in flight at one server, which may have to be given up."""

import asyncio
import time
from collections.abc import Coroutine
from typing import Any, TypeVar

from oapl_jax.fleet.shared import Shared

X = TypeVar("X")


class GivenUp(Exception):
    """A request was cancelled on purpose; its first argument is the reason."""


class InFlight:
    """Requests to one server, whoever waits for them; tells `shared` of each that ends."""

    def __init__(self, shared: Shared):
        self._shared = shared
        self._reasons: dict[asyncio.Task, str] = {}  # why each was given up, if it was

    def __len__(self) -> int:
        return len(self._reasons)

    async def run(self, request: Coroutine[Any, Any, X]) -> X:
        """Its result.

        Raises:
          GivenUp: if it was given up; else what the request raises.
        """
        task = asyncio.create_task(request)
        self._reasons[task] = ""
        try:
            await asyncio.wait({task})
        finally:
            task.cancel()
            reason = self._reasons.pop(task)
            self._shared.notify()
        if reason:
            raise GivenUp(reason)
        return task.result()

    def give_up(self, reason: str) -> None:
        """Ends every request; whoever waits for it hears why."""
        for task in self._reasons:
            if not task.done():
                self._reasons[task] = reason
                task.cancel()

    async def finish(self, until: float) -> bool:
        """Waits until none is left; those that are at the time `until` are given up, "aborted".

        Returns:
          whether there were such.
        """
        while self._reasons and time.monotonic() < until:
            await self._shared.change(until - time.monotonic())
        late = bool(self._reasons)
        self.give_up("aborted")
        while self._reasons:
            await self._shared.change()
        return late
