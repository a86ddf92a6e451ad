"""Keeps a server process up, and restarts it on another version when it is told to."""

import asyncio
import collections
import contextlib
import dataclasses
import time
from collections.abc import Iterator, Sequence

import aiohttp

from oapl_jax.errors import RunError
from oapl_jax.fleet.restart_proxy.process import Child

MAX_BACKOFF = 30.0  # seconds


@dataclasses.dataclass(frozen=True)
class Version:
    """What a server holds.

    Attributes:
      name: the learner's step, as servers say it.
      path: of its directory.
      manifest: xxh128 of its manifest; a run that was killed publishes a step anew, and perhaps not
        the same weights.
    """

    name: str
    path: str
    manifest: str


@dataclasses.dataclass(frozen=True)
class Order:
    """A version to be taken; `refused` becomes "" once it is, or else the reason."""

    version: Version
    refused: asyncio.Future[str]


class Supervisor:
    """A server process, the version that it holds, and the requests that it works on.

    Args:
      session: to ask the server with.
      command: starts the server; {model} stands for the directory, {port} for `server_port`.
      version: to start with.
      server_port: where the server listens, on this machine.
      start_deadline: seconds from a start of the server to its first token.
      drain_deadline: seconds for the requests in flight before a restart; then they are given up.
      stop_deadline: seconds for the server to end by itself.
      restarts: of a server that died by itself, at most so many ...
      window: ... in so many seconds.

    Attributes:
      state: "starting", then "ready", "draining" or "restarting"; only a ready server is asked.
      version: that the server holds, or held before it went down.
      counts: of versions taken (`refreshes`) and not (`failed_refreshes`), deaths of the server,
        and requests that a restart gave up.
    """

    def __init__(
        self,
        session: aiohttp.ClientSession,
        command: Sequence[str],
        *,
        version: Version,
        server_port: int,
        start_deadline: float,
        drain_deadline: float,
        stop_deadline: float,
        restarts: int,
        window: float,
    ):
        self.state, self.version, self.url = "starting", version, f"http://127.0.0.1:{server_port}"
        self.counts = {"refreshes": 0, "failed_refreshes": 0, "deaths": 0, "given_up": 0}
        self._session, self._command, self._port = session, tuple(command), server_port
        self._start_deadline, self._drain_deadline = start_deadline, drain_deadline
        self._stop_deadline, self._restarts, self._window = stop_deadline, restarts, window
        self._in_flight = 0
        self._idle = asyncio.Event()
        self._orders: asyncio.Queue[Order] = asyncio.Queue()
        self._deaths: collections.deque[float] = collections.deque()
        self._child: Child | None = None

    @contextlib.contextmanager
    def request(self) -> Iterator[str]:
        """Around a request to a ready server; gives the version that answers it.

        A restart waits for it, or ends it with the process.
        """
        self._in_flight += 1
        try:
            yield self.version.name
        finally:
            self._in_flight -= 1
            if not self._in_flight:
                self._idle.set()

    async def take(self, version: Version) -> str:
        """Restarts the server on a version, after those ordered before.

        Returns:
          "" when it serves, or the reason why another version does.
        """
        order = Order(version, asyncio.get_running_loop().create_future())
        self._orders.put_nowait(order)
        return await asyncio.shield(order.refused)  # a caller that hangs up changes nothing

    async def run(self) -> None:
        """Keeps the server up until it is cancelled, which ends the server.

        Raises:
          RunError: if the server does not start, or dies too often.
        """
        try:
            await self._start(self.version)
            while True:
                order = await self._order_or_death()
                await (self._revive() if order is None else self._refresh(order))
        finally:
            if self._child is not None:
                await self._child.end(self._stop_deadline)

    async def _start(self, version: Version) -> None:
        places = {"{model}": version.path, "{port}": str(self._port)}
        command = list(self._command)
        for place, value in places.items():
            command = [word.replace(place, value) for word in command]
        say(f"starts the server on version {version.name} ({version.path})")
        began = time.monotonic()
        self._child = await Child.start(command)
        # Not /health: some servers answer that one before they have compiled their first step.
        url = f"{self.url}/health_generate"
        try:
            await self._child.healthy(self._session, url, self._start_deadline)
        except RunError:
            await self._child.end(self._stop_deadline)
            raise
        self.version, self.state = version, "ready"
        say(f"version {version.name} serves after {time.monotonic() - began:.0f} s")

    async def _order_or_death(self) -> Order | None:
        """The next order; None if the server dies before."""
        assert self._child is not None
        death = asyncio.ensure_future(self._child.exit_code())
        order = asyncio.ensure_future(self._orders.get())
        try:
            await asyncio.wait({death, order}, return_when=asyncio.FIRST_COMPLETED)
            if order.done():
                return order.result()
            say(f"the server died, with exit code {death.result()}")
            return None
        finally:
            death.cancel()
            order.cancel()

    async def _revive(self) -> None:
        """Starts the same version again, with growing pauses."""
        assert self._child is not None
        self.state = "restarting"
        await self._child.end(self._stop_deadline)  # what is left of its workers
        while True:
            now = time.monotonic()
            self.counts["deaths"] += 1
            self._deaths.append(now)
            while self._deaths[0] < now - self._window:
                self._deaths.popleft()
            if len(self._deaths) > self._restarts:
                raise RunError(
                    f"the server died {len(self._deaths)} times within {self._window:g} s "
                    f"(--restarts={self._restarts}); its own messages say why"
                )
            await asyncio.sleep(min(2.0 ** (len(self._deaths) - 1), MAX_BACKOFF))
            try:
                return await self._start(self.version)
            except RunError as error:
                say(str(error))

    async def _refresh(self, order: Order) -> None:
        """Restarts the server on the ordered version, or on the old one if that fails."""
        assert self._child is not None
        if order.version == self.version:
            order.refused.set_result("")
            return
        self.state = "draining"
        await self._drain()
        self.state = "restarting"
        old = self.version
        await self._child.end(self._stop_deadline)
        try:
            await self._start(order.version)
        except RunError as error:
            self.counts["failed_refreshes"] += 1
            reason = f"version {order.version.name} does not start: {error}"
            say(reason)
            try:
                await self._start(old)
            except RunError as again:
                order.refused.set_result(f"{reason}; nor does version {old.name}: {again}")
                raise
            order.refused.set_result(f"{reason}; version {old.name} serves again")
        else:
            self.counts["refreshes"] += 1
            order.refused.set_result("")

    async def _drain(self) -> None:
        self._idle.clear()
        if self._in_flight:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._idle.wait(), self._drain_deadline)
        if self._in_flight:
            self.counts["given_up"] += self._in_flight
            say(f"gives {self._in_flight} requests up after {self._drain_deadline:g} s")


def say(message: str) -> None:
    print(f"supervise: {message}", flush=True)
