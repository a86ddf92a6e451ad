"""Control of one server: admission, health checks, refresh to the target version, and retries."""

import asyncio
import contextlib
import time

import numpy as np

from oapl_jax.fleet.admission import check_server, dtype_of
from oapl_jax.fleet.client import Refused, ServerError, WrongVersion
from oapl_jax.fleet.pool import Pool, PublishedVersion
from oapl_jax.fleet.server import DRAINING, LOST, READY, REFRESHING, REFUSED, STARTING, ServerState


class ServerController:
    """Keeps one server ready, in an asyncio task of its own."""

    def __init__(self, server: ServerState, pool: Pool):
        self._server, self._client, self._pool = server, server.client, pool
        self._dtype = "auto"  # of the server's computation
        self._reached, self._created = False, time.monotonic()
        self._target_since = pool.target_since  # of the latest target that it knows
        self._refused_updates = 0  # in a row
        self._update_at = self._checked_at = 0.0

    async def run(self) -> None:
        """Controls the server until cancelled."""
        server, config = self._server, self._pool.config
        while True:
            try:
                await self._step()
            except ServerError as error:
                refused = isinstance(error, WrongVersion | Refused)
                late = time.monotonic() - self._created > config.start_deadline
                if refused or self._reached or late:
                    server.fail(REFUSED if refused else LOST, str(error), log=True)
                    server.abort("attempts_failed")
                else:
                    server.reason = str(error)
                    server.retry_at = time.monotonic() + config.backoff
                if refused:
                    server.version = None
            wait, now = config.health_every, time.monotonic()
            if server.state != READY:
                wait = min(wait, max(server.retry_at - now, 0))
            elif self._update_at > now:
                wait = min(wait, self._update_at - now)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(wait):
                    await server.wake.wait()
            server.wake.clear()

    async def _step(self) -> None:
        """Does whatever is due: admission, a refresh or a health check."""
        server, pool = self._server, self._pool
        if self._target_since != pool.target_since:  # forget earlier refusals
            self._target_since = pool.target_since
            if self._refused_updates:
                self._update_at = self._refused_updates = 0
            if server.state in (STARTING, REFUSED):
                server.retry_at = 0.0
        now, target = time.monotonic(), pool.target_version
        stale = target is not None and server.version != target.number
        if server.state != READY:
            if now >= server.retry_at:
                await self._admit()
        elif stale and (
            not pool.allow_older or (now >= self._update_at and pool.has_refresh_slot())
        ):
            await self._refresh()
        elif now >= self._checked_at + pool.config.health_every:
            await self._client.check_health()
            self._checked_at = time.monotonic()

    async def _admit(self) -> None:
        """Makes a server ready: requirements, target version unless it holds it, probe."""
        server, pool = self._server, self._pool
        await self._client.check_health()  # other routes work before a starting server is healthy
        self._checked_at = time.monotonic()
        info = await self._client.info()
        refusals, warnings = await check_server(self._client, info, pool.requirements)
        self._reached, self._dtype = True, dtype_of(info)
        for warning in warnings:
            server.warn(warning)
        server.not_admitted, target = bool(refusals), pool.target_version
        if refusals:
            server.fail(REFUSED, "; ".join(refusals), log=True)
        elif target is None:
            server.enter(STARTING, "waits for the first version")
            server.retry_at = time.monotonic() + pool.config.health_every
        elif server.version == target.number and await self._client.version() == str(target.number):
            await self._probe(target)
            server.enter(READY)
        else:
            await self._refresh()

    async def _refresh(self) -> None:
        """Drains the server, loads the target version and probes it, in a refresh slot.

        If older versions are allowed, the server then samples at least as long as the refresh took:
        versions that come faster than servers load them must leave time to sample.
        """
        server, pool = self._server, self._pool
        started, seconds = time.monotonic(), pool.config.drain_deadline
        if not pool.allow_older:  # it samples nothing before it has the target version
            await self._drain(pool.target_since + seconds)
        async with pool.refresh_slot(server):
            try:
                if pool.allow_older:
                    await self._drain(time.monotonic() + seconds)
                assert pool.target_version
                await self._load(pool.target_version)
            finally:
                server.target = None
        now = time.monotonic()
        server.refresh_seconds = now - started
        self._update_at = max(self._update_at, now + server.refresh_seconds)

    async def _drain(self, until: float) -> None:
        self._server.enter(DRAINING, "finishes its requests before a refresh")
        if await self._server.drain(until):
            with contextlib.suppress(Refused):  # a server without the route
                await self._client.abort_all()

    async def _load(self, target: PublishedVersion) -> None:
        """Loads and probes a version; a server that refuses it may continue with its older one."""
        server, pool, refusal = self._server, self._pool, None
        server.target = target.number
        server.enter(REFRESHING, f"loads version {target.number}")
        # SGLang updates a busy server only half: new weights under the old name.
        await self._client.flush_cache()
        try:
            deadline = pool.config.update_deadline
            await self._client.update(target.path, target.number, deadline=deadline)
        except Refused as error:
            held = await self._client.version()
            if held != str(target.number):  # else it refused after it had loaded the weights
                server.counts["refresh_refused"] += 1
                if not pool.allow_older or server.version is None or held != str(server.version):
                    raise
                refusal, target = error, pool.published[server.version]
        if refusal is None:
            await self._client.flush_cache()
        await self._probe(target)
        server.version = target.number
        if refusal is None:
            server.counts["refreshed"] += 1
        else:
            self._refused_updates += 1
            backoff = pool.config.backoff_after(self._refused_updates)
            self._update_at = time.monotonic() + backoff
            server.warn(f"it continues with version {server.version}: {refusal}")
        server.enter(READY)

    async def _probe(self, version: PublishedVersion) -> None:
        """Compares the server's log-probs of the version's probe with the learner's.

        Raises:
          WrongVersion: if the name or the log-probs are not those of the version.
        """
        server, requirements = self._server, self._pool.requirements
        rows, held = await self._client.score(version.tokens)
        if held != {str(version.number)}:
            raise WrongVersion(f"it holds version {', '.join(held)} instead of {version.number}")
        server.probe_gap = float(np.abs(np.concatenate(rows) - version.logp).max())
        limit = requirements.tolerance(self._dtype, requirements.dtype, version.dtype)
        if not server.probe_gap <= limit:  # NaN fails too
            server.counts["probe_failed"] += 1
            raise WrongVersion(
                f"its log-probs differ from the learner's version {version.number} by "
                f"{server.probe_gap:.3g} nats (fleet.probe_tolerance allows {limit:g})"
            )
