"""Supervisor of a server process: starts it, restarts it when it dies or must load a version."""

import asyncio
import collections
import contextlib
import dataclasses
import os
import signal
import time
from collections.abc import Coroutine, Iterator, Sequence
from typing import Any

import aiohttp

from oapl_jax.errors import RunError

MAX_BACKOFF = 30.0  # seconds
POLL_EVERY = 0.5  # seconds between two health checks
HEALTH_DEADLINE = 30.0  # seconds for one health check; SGLang's own gives up after 20
KILL_DEADLINE = 10.0  # seconds for the system to end a killed process


@dataclasses.dataclass(frozen=True)
class ServedVersion:
    """A version directory, or any checkpoint."""

    name: str  # the learner's step; "default" for a checkpoint that is no version
    path: str
    # xxh128 of the manifest: a killed run publishes a step again, maybe with other weights.
    manifest: str


@dataclasses.dataclass(kw_only=True)
class Supervisor:
    """A server process, its version, and its requests in flight."""

    command: Sequence[str]  # {model} is replaced by the version's directory, {port} by server_port
    version: ServedVersion  # to start with; then the one loaded now, or before the server went down
    server_port: int  # on this machine
    start_deadline: float  # seconds from a start of the server until it generates a token
    drain_deadline: float  # seconds for requests in flight before a restart; then they are aborted
    stop_deadline: float  # seconds for the server to end after SIGTERM
    restarts: int  # most restarts of a server that died, within ...
    window: float  # ... so many seconds
    # "starting", "ready", "draining" or "restarting"; only a ready server gets requests.
    state: str = dataclasses.field(default="starting", init=False)

    def __post_init__(self):
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.counts = {"refreshes": 0, "failed_refreshes": 0, "deaths": 0, "aborted": 0}
        self._in_flight = 0
        self._idle = asyncio.Event()
        # Versions to load; a future becomes "" once its version is served, or else the reason.
        self._updates: asyncio.Queue[tuple[ServedVersion, asyncio.Future[str]]] = asyncio.Queue()
        self._deaths: collections.deque[float] = collections.deque()
        self._process: asyncio.subprocess.Process | None = None  # leads a process group

    @contextlib.contextmanager
    def request(self) -> Iterator[str]:
        """Marks a request to a ready server; yields the version that serves it.

        A restart drains it, or aborts it by the end of the process.
        """
        self._in_flight += 1
        try:
            yield self.version.name
        finally:
            self._in_flight -= 1
            if not self._in_flight:
                self._idle.set()

    async def update(self, version: ServedVersion) -> str:
        """Restarts the server on a version, after earlier updates.

        Returns:
          "" when the version is served, or the reason why another one is.
        """
        outcome = asyncio.get_running_loop().create_future()
        self._updates.put_nowait((version, outcome))
        return await asyncio.shield(outcome)  # a caller that hangs up cancels no update

    async def run(self) -> None:
        """Keeps the server up until cancelled; then ends it.

        Raises:
          RunError: if the server does not start, or dies too often.
        """
        try:
            await self._start(self.version)
            while True:
                try:
                    update = await self._while_it_runs(self._updates.get())
                except RunError as error:
                    await self._revive(str(error))
                else:
                    await self._restart(*update)
        finally:
            if self._process is not None:
                await self._end()

    async def _start(self, version: ServedVersion) -> None:
        command = [
            word.replace("{model}", version.path).replace("{port}", str(self.server_port))
            for word in self.command
        ]
        log(f"starting the server on version {version.name} ({version.path})")
        started = time.monotonic()
        # The system kills it if this process dies, so that its port is free.
        guarded = ["setpriv", "--pdeathsig=KILL", "--", *command]
        self._process = await asyncio.create_subprocess_exec(*guarded, process_group=0)
        try:
            # Not /health: some servers are healthy before they have compiled their first step.
            healthy = _wait_healthy(f"{self.url}/health_generate")
            await self._while_it_runs(healthy, self.start_deadline)
        except RunError:
            await self._end()
            raise
        self.version, self.state = version, "ready"
        log(f"version {version.name} is served after {time.monotonic() - started:.0f} s")

    async def _while_it_runs(self, coroutine: Coroutine, deadline: float | None = None) -> Any:
        """Returns the result of a coroutine.

        Raises:
          RunError: if the server ends first, or after `deadline` seconds.
        """
        assert self._process is not None
        ended = asyncio.ensure_future(self._process.wait())
        task = asyncio.ensure_future(coroutine)
        try:
            await asyncio.wait({ended, task}, timeout=deadline, return_when="FIRST_COMPLETED")
            if task.done():
                return task.result()
            if ended.done():  # a negative code is the number of a signal
                raise RunError(f"the server ended with exit code {ended.result()}")
            raise RunError(f"the server was not healthy within {deadline:g} s of its start")
        finally:
            ended.cancel()
            task.cancel()

    async def _end(self) -> None:
        """Sends SIGTERM to the server, and after `stop_deadline` seconds SIGKILL to its group.

        Raises:
          RunError: if the group survives SIGKILL.
        """
        assert self._process is not None
        if self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self._process.terminate()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._process.wait(), self.stop_deadline)
        group = self._process.pid
        try:
            async with asyncio.timeout(KILL_DEADLINE):
                os.killpg(group, signal.SIGKILL)
                await self._process.wait()
                while _is_alive(group):  # only after its last process a device or port is free
                    await asyncio.sleep(0.05)
        except ProcessLookupError:
            pass  # the group had ended
        except TimeoutError as error:
            raise RunError(f"process group {group} can't be killed") from error

    async def _revive(self, death: str) -> None:
        """Restarts a dead server on its version, with a growing backoff."""
        log(death)
        self.state = "restarting"
        await self._end()  # its workers
        while True:
            now = time.monotonic()
            self.counts["deaths"] += 1
            self._deaths.append(now)
            while self._deaths[0] < now - self.window:
                self._deaths.popleft()
            if len(self._deaths) > self.restarts:
                deaths = f"the server died {len(self._deaths)} times within {self.window:g} s"
                raise RunError(f"{deaths} (--restarts={self.restarts}); see its own log")
            await asyncio.sleep(min(2.0 ** (len(self._deaths) - 1), MAX_BACKOFF))
            try:
                return await self._start(self.version)
            except RunError as error:
                log(str(error))

    async def _restart(self, version: ServedVersion, outcome: asyncio.Future[str]) -> None:
        """Restarts the server on a version, or on the old one if that fails."""
        if version == self.version:
            outcome.set_result("")
            return
        self.state = "draining"
        self._idle.clear()
        if self._in_flight:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._idle.wait(), self.drain_deadline)
        if self._in_flight:
            self.counts["aborted"] += self._in_flight
            log(f"aborting {self._in_flight} requests after {self.drain_deadline:g} s")
        self.state = "restarting"
        old = self.version
        await self._end()
        try:
            await self._start(version)
        except RunError as error:
            self.counts["failed_refreshes"] += 1
            reason = f"version {version.name} does not start: {error}"
            log(reason)
            try:
                await self._start(old)
            except RunError as again:
                outcome.set_result(f"{reason}; nor does version {old.name}: {again}")
                raise
            outcome.set_result(f"{reason}; version {old.name} is served again")
        else:
            self.counts["refreshes"] += 1
            outcome.set_result("")


def _is_alive(group: int) -> bool:
    """Tells if any process of the group is more than a zombie."""
    for name in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError, ValueError), open(f"/proc/{name}/stat") as file:
            state, _, its_group = file.read().rpartition(")")[2].split()[:3]
            if int(its_group) == group and state not in "ZX":
                return True
    return False


async def _wait_healthy(url: str) -> None:
    timeout = aiohttp.ClientTimeout(total=HEALTH_DEADLINE)
    async with aiohttp.ClientSession(timeout=timeout) as session:
        while True:
            with contextlib.suppress(aiohttp.ClientError, TimeoutError):
                async with session.get(url) as response:
                    if response.status == 200:
                        return
            await asyncio.sleep(POLL_EVERY)


def log(message: str) -> None:
    print(f"restart_proxy: {message}", flush=True)
