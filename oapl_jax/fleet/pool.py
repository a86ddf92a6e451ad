"""Servers of a fleet: membership, choice of a server for each group, and shared refresh state.

A Pool lives in one event loop; sampler.py runs it in a thread.
"""

import asyncio
import contextlib
import dataclasses
import json
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Coroutine

import aiohttp
import jax
import numpy as np
from etils import epath

from oapl_jax.config import FleetConfig
from oapl_jax.fleet.admission import Requirements
from oapl_jax.fleet.client import Aborted, Mixed, ServerError, SGLangClient
from oapl_jax.fleet.server import COUNTS, DRAINING, READY, ServerState
from oapl_jax.rollout.sampler import Attempt, Sampled, Sampling
from oapl_jax.structs import Prompt
from oapl_jax.weights import publisher


@dataclasses.dataclass(frozen=True)
class PublishedVersion:
    """A published version and its probe."""

    number: int  # the learner's step
    path: str  # of the directory, for learner and servers alike
    tokens: list[list[int]]  # rows of the probe
    logp: np.ndarray  # float64[all]: log-probs at temperature 1 of the rows' tokens after the first
    dtype: str  # of the learner's computation

    @classmethod
    def read(cls, number: int, path: str) -> "PublishedVersion":
        """Checks a version directory (UserError if it is damaged) and reads its probe."""
        publisher.check_version(epath.Path(path))
        probe = publisher.read_probe(epath.Path(path))
        logp = np.array([value for row in probe["logp"] for value in row], np.float64)
        return cls(number, path, probe["tokens"], logp, probe["dtype"])


@dataclasses.dataclass(eq=False)
class Pool:
    """All servers of a fleet."""

    config: FleetConfig
    requirements: Requirements
    allow_older: bool  # see Fleet
    log: Callable[[str], None]  # logs one sentence
    spawn: Callable[[Coroutine], asyncio.Task]  # starts a task of the fleet

    def __post_init__(self):
        self.servers: dict[str, ServerState] = {}  # by URL
        self.counts: dict[str, Counter[str]] = {}  # by URL, of every server that ever joined
        self.target_version: PublishedVersion | None = None  # of all servers
        self.target_since = 0.0  # time
        self.published: dict[int, PublishedVersion] = {}  # versions that a server may hold
        self._controllers: dict[str, asyncio.Task] = {}
        self._changed = asyncio.Event()

    def versions(self) -> set[int]:
        """Versions that servers hold, load or are brought to. Any thread."""
        target, servers = self.target_version, list(self.servers.values())
        held = {v for s in servers for v in (s.version, s.target) if v is not None}
        return held | ({target.number} if target else set())

    def set_target(self, version: PublishedVersion) -> None:
        """Makes all controllers bring their servers to a version."""
        self.target_version, self.target_since = version, time.monotonic()
        self.published[version.number] = version
        keep = self.versions()
        self.published = {n: v for n, v in self.published.items() if n in keep}
        self._wake_controllers()

    def can_sample(self, server: ServerState) -> bool:
        """Tells if new groups may go to a server."""
        target = self.target_version
        right = target is not None and server.version == target.number
        return server.state == READY and (right or self.allow_older)

    async def sample(self, prompt: Prompt, *, n: int, sampling: Sampling) -> Sampled:
        """Requests a group, from another server after each failure, at most `attempts` times."""
        attempts: list[Attempt] = []
        rollouts, failures, server = (), 0, None
        while not rollouts and failures < self.config.attempts:
            if failures:
                await asyncio.sleep(self.config.backoff_after(failures))
            server = await self._pick(avoid=server)
            version, started, reason = server.version, time.monotonic(), "failed"
            assert version is not None
            try:
                rollouts = await server.generate(prompt, n=n, sampling=sampling)
            except ServerError as error:
                if isinstance(error, Aborted | Mixed):
                    reason = "aborted" if isinstance(error, Aborted) else "mixed"
            seconds = time.monotonic() - started
            if not rollouts:
                attempts.append(Attempt(server.url, version, reason, seconds))
                failures += reason != "aborted"  # an abort for a refresh is no fault of the group
        assert server
        return Sampled(prompt, rollouts, server.url, seconds, tuple(attempts))

    async def _pick(self, avoid: ServerState | None) -> ServerState:
        """Waits (until the no-server timeout) for servers, and returns the least busy one."""
        while True:
            ready = [server for server in self.servers.values() if self.can_sample(server)]
            if ready:
                return min(ready, key=lambda s: (s is avoid, s.in_flight))
            await self._changed.wait()

    # Refresh slots

    def has_refresh_slot(self) -> bool:
        """Tells if one more server may be refreshed now."""
        slots = max(1, int(self.config.refresh_fraction * len(self.servers)))
        return sum(s.refreshing for s in self.servers.values()) < slots

    @contextlib.asynccontextmanager
    async def refresh_slot(self, server: ServerState) -> AsyncIterator[None]:
        """Waits for a refresh slot and holds it."""
        while not self.has_refresh_slot():
            await self._changed.wait()
        server.refreshing = True
        try:
            yield
        finally:
            server.refreshing = False
            self._wake_controllers()

    def _wake_controllers(self) -> None:
        for server in self.servers.values():
            server.wake.set()
        self._notify()

    def _notify(self) -> None:
        """Wakes every wait for a change of any server."""
        self._changed.set()
        self._changed = asyncio.Event()

    # Membership

    async def watch(self, control: Callable[[ServerState], Coroutine]) -> None:
        """Adds and removes servers as the list changes; `control` runs as long as its server."""
        connector = aiohttp.TCPConnector(limit=0, force_close=True)  # no stale connections
        async with aiohttp.ClientSession(connector=connector) as session:
            logged = False
            while True:
                try:
                    urls, logged = await read_servers(self.config, session), False
                except (OSError, ValueError, aiohttp.ClientError) as error:
                    urls = {url for url, server in self.servers.items() if not server.leaving}
                    if not logged:
                        logged = True
                        self.log(f"the list of servers can't be read and stays as it is: {error}")
                for url in sorted(urls - self.servers.keys()):
                    server = self.servers[url] = self._open(url, session)
                    self._controllers[url] = self.spawn(control(server))
                for url in sorted(self.servers.keys() - urls):
                    if not self.servers[url].leaving:
                        self.servers[url].leaving = True
                        self.spawn(self._leave(self.servers[url]))
                await asyncio.sleep(self.config.poll_every)

    def _open(self, url: str, session: aiohttp.ClientSession) -> ServerState:
        client = SGLangClient(
            session,
            url,
            connect_deadline=self.config.connect_deadline,
            deadline=self.config.control_deadline,
        )
        counts = self.counts.setdefault(url, Counter(dict.fromkeys(COUNTS, 0)))
        counts["joined"] += 1
        return ServerState(
            client=client,
            config=self.config,
            requirements=self.requirements,
            counts=counts,
            log=self.log,
            notify=self._notify,
        )

    async def _leave(self, server: ServerState) -> None:
        self._controllers.pop(server.url).cancel()
        server.enter(DRAINING, "it left the list of servers")
        await server.drain(time.monotonic() + self.config.drain_deadline)
        del self.servers[server.url]
        self._notify()


async def read_servers(config: FleetConfig, session: aiohttp.ClientSession) -> set[str]:
    """Reads the URLs of this host's servers.

    With several hosts, host i takes every n-th URL, so that no server is refreshed by two hosts.

    Raises:
      OSError, ValueError, aiohttp.ClientError: if the list can't be read.
    """
    if config.router:
        url = config.router.rstrip("/") + "/workers"
        async with asyncio.timeout(config.control_deadline):
            async with session.get(url, raise_for_status=True) as response:
                content = json.loads(await response.read())
        try:
            names = [worker["url"] for worker in content["workers"]]
        except (LookupError, TypeError) as error:
            raise ValueError(f"{url} returned no list of workers") from error
    elif config.servers_file:
        text = await asyncio.to_thread(epath.Path(config.servers_file).read_text)
        names = [line.partition("#")[0] for line in text.splitlines()]
    else:
        names = config.servers
    urls = [name.strip().rstrip("/") for name in names if name.strip()]
    urls = sorted({url if "://" in url else f"http://{url}" for url in urls})
    return set(urls[jax.process_index() :: jax.process_count()])
