"""Servers of a fleet: the state machine of each, and the pool that they form.

A Pool lives in one event loop; sampler.py runs it in a thread. Each server is admitted, refreshed
to the target version, checked and retried by a task of its own.
"""

import asyncio
import contextlib
import dataclasses
import functools
import json
import re
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Coroutine

import aiohttp
import jax
import numpy as np
from etils import epath

from oapl_jax.config import FleetConfig
from oapl_jax.errors import UserError
from oapl_jax.fleet.addresses import read_server_list, server_url
from oapl_jax.fleet.admission import Requirements, check_server, dtype_of
from oapl_jax.fleet.client import (
    MALFORMED,
    Aborted,
    GroupRequest,
    Mixed,
    Refused,
    ServerError,
    SGLangClient,
    Unauthorized,
    WrongVersion,
    bearer,
)
from oapl_jax.model import hf
from oapl_jax.rollout.sampler import Attempt, Sampled, Sampling
from oapl_jax.structs import Prompt, Rollout
from oapl_jax.weights import publisher

# States. starting: no response yet, or waits for the first version. draining: finishes its requests
# in flight. lost: a request failed. refused: failed admission, a version or a probe. Lost and
# refused servers are retried.
STARTING, READY, DRAINING = "starting", "ready", "draining"
REFRESHING, LOST, REFUSED = "refreshing", "lost", "refused"

ADAPTER_NAME = re.compile(r"v\d{6,}-[0-9a-f]{12}")  # of published adapters
COUNTS = (
    *("sampled", "attempts_failed", "aborted", "mixed", "tokens"),  # of requests
    *("joined", "refreshed", "refresh_refused", "probe_failed", LOST, REFUSED),
)


@dataclasses.dataclass(frozen=True)
class PublishedVersion:
    """A published version and its probe."""

    number: int  # the learner's step
    path: str  # of the directory, for the learner, and for servers without a fetcher
    tokens: list[list[int]]  # rows of the probe
    logp: np.ndarray  # float64[all]: log-probs at temperature 1 of the rows' tokens after the first
    dtype: str  # of the learner's computation
    adapter: str = ""  # unique name of LoRA adapters; "" for a version of all weights

    @classmethod
    def read(cls, number: int, path: str) -> "PublishedVersion":
        """Checks a version directory (UserError if it is damaged) and reads its probe."""
        publisher.check_version(epath.Path(path))
        probe = publisher.read_probe(epath.Path(path))
        logp = np.array([value for row in probe["logp"] for value in row], np.float64)
        adapter = publisher.read_manifest(epath.Path(path))["files"].get(hf.ADAPTER)
        name = f"v{number:06d}-{adapter['xxh128'][:12]}" if adapter else ""  # ADAPTER_NAME
        return cls(number, path, probe["tokens"], logp, probe["dtype"], name)


class Server:
    """One server: its state, its requests in flight, and the control that keeps it ready.

    Changed in the fleet's event loop; any thread may read it.
    """

    def __init__(self, client: SGLangClient, pool: "Pool"):
        self.client, self.url, self.pool = client, client.url, pool
        self.counts = pool.counts.setdefault(self.url, Counter(dict.fromkeys(COUNTS, 0)))
        self.state, self.reason = STARTING, "no response yet"  # the reason why it is not ready
        self.version: int | None = None  # loaded and probed; None if unknown
        self.target: int | None = None  # version that is being loaded
        self.adapter = ""  # name of the loaded version's, if it is one
        self.refreshing = False  # holds one of the fleet's refresh slots
        self.not_admitted = False  # refused by check_server or for its key, not for a failure
        self.leaving = False  # removed from the list of servers; drains
        self.probe_gap = 0.0  # largest log-prob difference of the last probe, nats
        self.refresh_seconds = 0.0  # of the last refresh
        self.wake = asyncio.Event()  # makes `control` act at once
        self._retry_at = 0.0  # time of the next try, if not ready
        self._in_flight: dict[asyncio.Task, str] = {}  # request -> why it was aborted, if it was
        self._sampling: dict[asyncio.Task, int | None] = {}  # request -> version
        self._adapters: dict[int, str] = {}  # loaded, by version
        self._failures = self._refused_updates = 0  # in a row
        self._logged_failure = ""  # state that was logged last
        self._warned: set[str] = set()
        self._dtype = "auto"  # of its computation
        self._reached, self._created = False, time.monotonic()
        self._target_since = pool.target_since  # of the latest target that it knows
        self._update_at = self._checked_at = 0.0

    @property
    def in_flight(self) -> int:
        return len(self._in_flight)

    def versions(self) -> set[int]:
        """Versions that are loaded, being loaded, or sampled from by requests in flight."""
        held = (self.version, self.target, *list(self._sampling.values()))
        return {version for version in held if version is not None}

    def describe(self) -> str:
        """Returns the state and its reason, for a server that must not sample now."""
        if self.state == READY and self.pool.target_version:
            target = self.pool.target_version.number
            return f"{self.url} has version {self.version} and is to load version {target}"
        return f"{self.url} is {self.state} ({self.reason})"

    async def generate(self, prompt: Prompt, *, n: int, sampling: Sampling) -> tuple[Rollout, ...]:
        """Samples one group from the loaded version.

        Raises:
          Aborted: if the group was aborted for a refresh.
          ServerError: if the request failed; the server must pass admission again first.
        """
        config, requirements = self.pool.config, self.pool.requirements
        request = GroupRequest(
            tokens=prompt.tokens.tolist(),
            n=n,
            sampling=sampling,
            stop_ids=requirements.stop_ids,
            vocab_size=requirements.model_config.vocab_size,
            version=self.version,
            adapter=self.adapter,
            mixed_versions=config.mixed_versions,
        )
        sampling_task = self.client.generate(request, deadline=config.request_deadline)
        task = asyncio.create_task(sampling_task)  # `abort` cancels the request, not its caller
        self._in_flight[task], self._sampling[task] = "", self.version
        try:
            await asyncio.wait({task})
        finally:
            task.cancel()
            aborted = self._in_flight.pop(task)
            del self._sampling[task]
        if aborted:
            self.counts[aborted] += 1
            kind = Aborted if aborted == "aborted" else ServerError
            raise kind(f"{self.url}: request ended since the server is {self.state}")
        try:
            rollouts, mixed = task.result()
        except ServerError as error:
            self.counts["mixed" if isinstance(error, Mixed) else "attempts_failed"] += 1
            if self.state == READY:
                self._fail(LOST, f"a request failed: {error}")
                self.wake.set()
            if isinstance(error, Aborted):  # by another client
                raise ServerError(str(error)) from error
            raise
        self._failures = 0
        self.counts["sampled"] += 1
        self.counts["mixed"] += mixed
        self.counts["tokens"] += sum(len(r.tokens) for r in rollouts)
        return rollouts

    def _abort(self, reason: str) -> None:
        """Cancels every request in flight; `reason` is counted: "aborted" or "attempts_failed"."""
        for task in self._in_flight:
            if not task.done():
                self._in_flight[task] = reason
                task.cancel()

    async def drain(self, until: float, reason: str) -> bool:
        """Waits for the requests in flight; True if some were left at `until` and are aborted."""
        self._enter(DRAINING, reason)
        if self._in_flight:
            seconds = max(until - time.monotonic(), 0)
            await asyncio.wait(set(self._in_flight), timeout=seconds)
        late = {task for task in self._in_flight if not task.done()}
        if late:
            self._abort("aborted")
            await asyncio.wait(late)
        return bool(late)

    def _enter(self, state: str, reason: str = "") -> None:
        self.state, self.reason = state, reason
        if state == READY and self._logged_failure:
            self._logged_failure = ""
            self.pool.log(f"server {self.url} is ready again, with version {self.version}")
        self.pool.notify()

    def _fail(self, state: str, reason: str, *, log: bool = False) -> None:
        """Marks the server lost or refused; each failure in a row doubles the time to the retry."""
        self.counts[state] += self.state != state
        self._failures += 1
        self._retry_at = time.monotonic() + self.pool.config.backoff_after(self._failures)
        self._enter(state, reason)
        if log and self._logged_failure != state:  # once, not at each retry
            self._logged_failure = state
            self.pool.log(f"server {self.url} is {state}: {reason}")

    def _warn(self, sentence: str) -> None:
        if sentence not in self._warned:
            self._warned.add(sentence)
            self.pool.log(f"server {self.url}: {sentence}")

    async def control(self) -> None:
        """Keeps the server ready until cancelled."""
        config = self.pool.config
        while True:
            try:
                await self._step()
            except ServerError as error:
                refused = isinstance(error, WrongVersion | Refused)
                self.not_admitted |= isinstance(error, Unauthorized)
                late = time.monotonic() - self._created > config.start_deadline
                if refused or self._reached or late:
                    self._fail(REFUSED if refused else LOST, str(error), log=True)
                    self._abort("attempts_failed")
                else:
                    self.reason = str(error)
                    self._retry_at = time.monotonic() + config.backoff
                if refused:
                    self.version = None
            wait, now = config.health_every, time.monotonic()
            if self.state != READY:
                wait = min(wait, max(self._retry_at - now, 0))
            elif self._update_at > now:
                wait = min(wait, self._update_at - now)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(wait):
                    await self.wake.wait()
            self.wake.clear()

    async def _step(self) -> None:
        """Runs the admission, refresh or health check that is due."""
        pool = self.pool
        if self._target_since != pool.target_since:  # forget earlier refusals
            self._target_since = pool.target_since
            if self._refused_updates:
                self._update_at = self._refused_updates = 0
            if self.state in (STARTING, REFUSED):
                self._retry_at = 0.0
        now, target = time.monotonic(), pool.target_version
        stale = target is not None and self.version != target.number
        if self.state != READY:
            if now >= self._retry_at:
                await self._admit()
        elif stale and (
            not pool.allow_older or (now >= self._update_at and pool.has_refresh_slot())
        ):
            await self._refresh()
        elif now >= self._checked_at + pool.config.health_every:
            await self.client.check_health()
            self._checked_at = time.monotonic()

    async def _admit(self) -> None:
        """Makes a server ready: requirements, target version unless it holds it, probe."""
        await self.client.check_health()  # other routes work before a starting server is healthy
        self._checked_at = time.monotonic()
        info = await self.client.info()
        self._reached = True
        try:
            refusals, warnings = await check_server(self.client, info, self.pool.requirements)
        except MALFORMED as error:
            raise ServerError(f"it describes itself wrongly ({type(error).__name__})") from error
        self._dtype = dtype_of(info)
        for warning in warnings:
            self._warn(warning)
        self.not_admitted, target = bool(refusals), self.pool.target_version
        if refusals:
            self._fail(REFUSED, "; ".join(refusals), log=True)
        elif target is None:
            self._enter(STARTING, "waits for the first version")
            self._retry_at = time.monotonic() + self.pool.config.health_every
        elif (
            not target.adapter
            and self.version == target.number
            and await self.client.version() == str(target.number)
        ):
            await self._probe(target)
            self._enter(READY)
        else:
            await self._refresh()

    async def _refresh(self) -> None:
        """Drains the server, loads the target version and probes it, in a refresh slot.

        If older versions are allowed, the server then samples at least as long as the refresh took:
        versions that come faster than servers load them must leave time to sample.
        """
        pool, started = self.pool, time.monotonic()
        assert pool.target_version
        if pool.target_version.adapter:
            await self._load_adapter(pool.target_version)
            return
        if not pool.allow_older:  # it samples nothing before it has the target version
            await self._drain_for_refresh(pool.target_since)
        async with pool.refresh_slot(self):
            try:
                if pool.allow_older:
                    await self._drain_for_refresh(time.monotonic())
                await self._load(pool.target_version)
            finally:
                self.target = None
        now = time.monotonic()
        self.refresh_seconds = now - started
        self._update_at = max(self._update_at, now + self.refresh_seconds)

    async def _load_adapter(self, target: PublishedVersion) -> None:
        """Loads and probes adapters beside those of requests in flight, of which none is drained.

        Adapters of older versions without requests are unloaded, also those of a learner that was
        killed.
        """
        pool, started = self.pool, time.monotonic()
        self.target = target.number
        try:
            kept = self._adapters.keys() & self.versions()
            self._adapters = {version: self._adapters[version] for version in kept}
            used = {target.adapter, *self._adapters.values()}
            for name in sorted(await self.client.adapters() - used):
                if ADAPTER_NAME.fullmatch(name):
                    with contextlib.suppress(Refused):  # unloaded meanwhile
                        await self.client.unload_adapter(name)
            deadline = pool.config.update_deadline
            path = await self._path_of(target)
            await self.client.load_adapter(target.adapter, path, deadline=deadline)
            self._adapters[target.number] = target.adapter
            await self._probe(target)
        except Refused as error:
            self.counts["refresh_refused"] += 1
            if self.state != READY or not pool.allow_older:
                raise
            self._postpone_update(error)
            return
        finally:
            self.target = None
        self.version, self.adapter = target.number, target.adapter
        self.counts["refreshed"] += 1
        self.refresh_seconds = time.monotonic() - started
        self._enter(READY)

    async def _path_of(self, version: PublishedVersion) -> str:
        """The version's directory as the server reads it: a copy, if a fetcher runs beside it."""
        port, deadline = self.pool.config.fetch_port, self.pool.config.update_deadline
        if not port:
            return version.path
        return await self.client.fetch(version.path, port=port, deadline=deadline)

    def _postpone_update(self, refusal: Refused) -> None:
        """Samples from the older version for a while, longer after each refusal."""
        self._refused_updates += 1
        backoff = self.pool.config.backoff_after(self._refused_updates)
        self._update_at = time.monotonic() + backoff
        self._warn(f"it continues with version {self.version}: {refusal}")

    async def _drain_for_refresh(self, since: float) -> None:
        until = since + self.pool.config.drain_deadline
        if await self.drain(until, "finishes its requests before a refresh"):
            with contextlib.suppress(Refused):  # a server without the route
                await self.client.abort_all()

    async def _load(self, target: PublishedVersion) -> None:
        """Loads and probes a version; a server that refuses it may continue with its older one."""
        pool, refusal = self.pool, None
        self.target = target.number
        self._enter(REFRESHING, f"loads version {target.number}")
        # SGLang updates a busy server only half: new weights under the old name.
        await self.client.flush_cache()
        try:
            deadline = pool.config.update_deadline
            path = await self._path_of(target)
            await self.client.update(path, target.number, deadline=deadline)
        except Refused as error:
            held = await self.client.version()
            if held != str(target.number):  # else it refused after it had loaded the weights
                self.counts["refresh_refused"] += 1
                if not pool.allow_older or self.version is None or held != str(self.version):
                    raise
                refusal, target = error, pool.published[self.version]
        if refusal is None:
            await self.client.flush_cache()
        await self._probe(target)
        self.version = target.number
        if refusal is None:
            self.counts["refreshed"] += 1
        else:
            self._postpone_update(refusal)
        self._enter(READY)

    async def _probe(self, version: PublishedVersion) -> None:
        """Raises WrongVersion if name or log-probs of the version's probe are not the learner's."""
        requirements = self.pool.requirements
        rows, held = await self.client.score(version.tokens, adapter=version.adapter)
        if not version.adapter and held != {str(version.number)}:
            raise WrongVersion(f"it holds version {', '.join(held)} instead of {version.number}")
        self.probe_gap = float(np.abs(np.concatenate(rows) - version.logp).max())
        limit = requirements.tolerance(self._dtype, requirements.dtype, version.dtype)
        if not self.probe_gap <= limit:  # NaN fails too
            self.counts["probe_failed"] += 1
            raise WrongVersion(
                f"its log-probs differ from the learner's version {version.number} by "
                f"{self.probe_gap:.3g} nats (fleet.probe_tolerance allows {limit:g})"
            )


@dataclasses.dataclass(eq=False)
class Pool:
    """All servers of a fleet."""

    config: FleetConfig
    requirements: Requirements
    api_key: str = dataclasses.field(repr=False)  # of servers and router; "" for none
    allow_older: bool  # see Fleet
    log: Callable[[str], None]  # logs one sentence
    spawn: Callable[[Coroutine], asyncio.Task]  # starts a task of the fleet

    def __post_init__(self):
        self.servers: dict[str, Server] = {}  # by URL
        self.counts: dict[str, Counter[str]] = {}  # by URL, of every server that ever joined
        self.target_version: PublishedVersion | None = None  # of all servers
        self.target_since = 0.0  # time
        self.published: dict[int, PublishedVersion] = {}  # versions that a server may hold
        self.list_fault = ""  # why the list of servers could not be read last; "" if it was
        self._controls: dict[str, asyncio.Task] = {}  # by URL
        self._changed = asyncio.Event()

    def versions(self) -> set[int]:
        """Versions that servers hold or load, and the target version. Any thread."""
        target, servers = self.target_version, list(self.servers.values())
        held = {version for server in servers for version in server.versions()}
        return held | ({target.number} if target else set())

    def set_target(self, version: PublishedVersion) -> None:
        """Makes all servers load a version, each when it is drained and has a refresh slot."""
        self.target_version, self.target_since = version, time.monotonic()
        self.published[version.number] = version
        keep = self.versions()
        self.published = {n: v for n, v in self.published.items() if n in keep}
        self._wake_servers()

    def can_sample(self, server: Server) -> bool:
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

    async def _pick(self, avoid: Server | None) -> Server:
        """Waits (until the no-server timeout) for servers, and returns the least busy one."""
        while True:
            ready = [server for server in self.servers.values() if self.can_sample(server)]
            if ready:
                return min(ready, key=lambda s: (s is avoid, s.in_flight))
            await self._changed.wait()

    def has_refresh_slot(self) -> bool:
        slots = max(1, int(self.config.refresh_fraction * len(self.servers)))
        return sum(s.refreshing for s in self.servers.values()) < slots

    @contextlib.asynccontextmanager
    async def refresh_slot(self, server: Server) -> AsyncIterator[None]:
        while not self.has_refresh_slot():
            await self._changed.wait()
        server.refreshing = True
        try:
            yield
        finally:
            server.refreshing = False
            self._wake_servers()

    def _wake_servers(self) -> None:
        for server in self.servers.values():
            server.wake.set()
        self.notify()

    def notify(self) -> None:
        """Wakes every wait for a change of any server."""
        self._changed.set()
        self._changed = asyncio.Event()

    async def watch(self) -> None:
        connector = aiohttp.TCPConnector(limit=0, force_close=True)  # no stale connections
        config, listed = self.config, False
        deadlines = dict(connect_deadline=config.connect_deadline, deadline=config.control_deadline)
        client = functools.partial(SGLangClient, api_key=self.api_key, **deadlines)
        async with aiohttp.ClientSession(connector=connector) as session:
            while True:
                try:
                    urls = await read_servers(config, session, self.api_key)
                    listed, self.list_fault = True, ""
                except (UserError, OSError, aiohttp.ClientError) as error:
                    if isinstance(error, UserError) and not listed:
                        raise  # no wait mends it
                    urls = {url for url, server in self.servers.items() if not server.leaving}
                    if not self.list_fault:
                        self.log(f"the list of servers can't be read and stays as it is: {error}")
                    self.list_fault = f"the list of servers can't be read: {error}"
                for url in sorted(urls - self.servers.keys()):
                    server = Server(client(session, url), self)
                    server.counts["joined"] += 1
                    self.servers[url], self._controls[url] = server, self.spawn(server.control())
                for url in sorted(self.servers.keys() - urls):
                    if not self.servers[url].leaving:
                        self.servers[url].leaving = True
                        self.spawn(self._leave(self.servers[url]))
                await asyncio.sleep(config.poll_every)

    async def _leave(self, server: Server) -> None:
        self._controls.pop(server.url).cancel()
        until = time.monotonic() + self.config.drain_deadline
        await server.drain(until, "it left the list of servers")
        del self.servers[server.url]
        self.notify()


async def read_servers(
    config: FleetConfig, session: aiohttp.ClientSession, api_key: str
) -> set[str]:
    """Reads the URLs of this host's servers.

    With several hosts, host i takes every n-th URL, so that no server is refreshed by two hosts.

    Raises:
      OSError, aiohttp.ClientError: if the list can't be read now.
      UserError: if it names no servers that can be reached, or its source is no such list.
    """
    if config.router:
        urls = await _ask_router(config, session, api_key)
    elif config.servers_file:
        read = functools.partial(read_server_list, of="fleet.servers_file")
        urls = await asyncio.to_thread(read, config.servers_file)
    else:
        urls = [server_url(url, of="fleet.servers") for url in config.servers]
    return set(sorted(set(urls))[jax.process_index() :: jax.process_count()])


async def _ask_router(
    config: FleetConfig, session: aiohttp.ClientSession, api_key: str
) -> list[str]:
    """Returns the workers' URLs; see read_servers."""
    url = server_url(config.router, of="fleet.router") + "/workers"
    timeout = aiohttp.ClientTimeout(total=config.control_deadline)
    try:
        async with session.get(url, headers=bearer(api_key), timeout=timeout) as response:
            content = await response.read()
            if response.status in (401, 403):
                raise UserError(f"{url} demands another key than that of fleet.api_key_file")
            if response.status not in (404, 405):
                response.raise_for_status()
    except TimeoutError as error:  # it has no message
        late = f"{url} failed: no response in {config.control_deadline:g} s"
        raise TimeoutError(late) from error
    try:
        names = [str(worker["url"]) for worker in json.loads(content)["workers"]]
    except (LookupError, TypeError, ValueError) as error:
        raise UserError(
            f"{url} returned no list of workers; fleet.router must name a sglang-router, "
            "and fleet.servers a server"
        ) from error
    return [server_url(name, of=url) for name in names]
