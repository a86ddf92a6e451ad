"""Keeps a server of a fleet serving, in an asyncio task of its own.

It admits the server (contract, weights, probe), looks at its health, brings it to the version that
is wanted, and tries again when it was lost.
"""

import asyncio
import contextlib
import time

import numpy as np

from oapl_jax.fleet.admission import allowed_gap, examine
from oapl_jax.fleet.failures import ProbeFailed, Refused, ServerError, WrongVersion
from oapl_jax.fleet.server import DRAINING, LOST, READY, REFRESHING, REFUSED, STARTING, Member
from oapl_jax.fleet.shared import Shared, Version


class Keeper:
    """Of one member; `shared` is what it goes by, like all others."""

    def __init__(self, member: Member, shared: Shared):
        self._member, self._server, self._shared = member, member.server, shared
        self._dtype = "auto"  # that the server computes in
        self._answered, self._born = False, time.monotonic()
        self._heard = shared.asked  # when the last version was wanted that it knows of
        self._refused_updates = 0  # in a row
        self._update_at = self._looked_at = 0.0

    async def keep(self) -> None:
        """Until cancelled."""
        member, settings = self._member, self._shared.settings
        while True:
            try:
                self._hear_of_version()
                await self._next()
            except (WrongVersion, ProbeFailed, Refused) as error:
                member.fail(REFUSED, str(error), tell=True)
                member.requests.give_up("attempts_failed")
                member.version = None
            except ServerError as error:
                if self._answered or time.monotonic() - self._born > settings.start_deadline:
                    member.fail(LOST, str(error), tell=True)
                    member.requests.give_up("attempts_failed")
                else:
                    member.reason = str(error)
                    member.retry_at = time.monotonic() + settings.backoff
            wait, now = settings.health_every, time.monotonic()
            if member.state != READY:
                wait = min(wait, max(member.retry_at - now, 0))
            elif self._update_at > now:
                wait = min(wait, self._update_at - now)
            try:
                async with asyncio.timeout(wait):
                    await member.woken.wait()
            except TimeoutError:
                pass
            member.woken.clear()

    def _hear_of_version(self) -> None:
        """If another version is wanted than before, what was refused does not count."""
        if self._heard == self._shared.asked:
            return
        self._heard = self._shared.asked
        if self._refused_updates:
            self._update_at = self._refused_updates = 0
        if self._member.state in (STARTING, REFUSED):
            self._member.retry_at = 0.0

    async def _next(self) -> None:
        """What is to be done now, if anything is."""
        now, shared = time.monotonic(), self._shared
        if self._member.state != READY:
            if now >= self._member.retry_at:
                await self._admit()
        elif self._may_update() and (not shared.older_versions or shared.has_turn()):
            await self._refresh()
        elif now >= self._looked_at + shared.settings.health_every:
            await self._server.health()
            self._looked_at = time.monotonic()

    async def _admit(self) -> None:
        """To ready, from anything: contract, the wanted weights unless it has them still, probe."""
        member, server, shared = self._member, self._server, self._shared
        await server.health()  # a server that still starts answers the other routes before
        self._looked_at = time.monotonic()
        found = await examine(server, shared.terms)
        self._answered, self._dtype = True, found.dtype
        for warning in found.warnings:
            member.tell(warning)
        member.by_contract, wanted = bool(found.refusals), shared.wanted
        if found.refusals:
            member.fail(REFUSED, "; ".join(found.refusals), tell=True)
        elif wanted is None:
            member.enter(STARTING, "it waits for the first version")
            member.retry_at = time.monotonic() + shared.settings.health_every
        elif member.version == wanted.number and await server.version() == str(wanted.number):
            await self._probe(wanted)
            member.enter(READY)
        else:
            await self._refresh()

    def _may_update(self) -> bool:
        """Whether it holds another version than the wanted one, and is not to be left alone."""
        wanted = self._shared.wanted
        if wanted is None or self._member.version == wanted.number:
            return False
        return not self._shared.older_versions or time.monotonic() >= self._update_at

    async def _refresh(self) -> None:
        """Drain, update, flush, probe; never more servers at once than their share.

        Where older versions may serve, it then serves at least as long as that took: versions that
        come faster than a server takes them would leave it no time to sample.
        """
        member, shared = self._member, self._shared
        started, patience = time.monotonic(), shared.settings.drain_deadline
        if not shared.older_versions:  # it has nothing to do until it has the wanted version
            await self._drain(shared.asked + patience)
        while not shared.has_turn():
            await shared.change()
        member.refreshing = True
        try:
            if shared.older_versions:
                await self._drain(time.monotonic() + patience)
            assert shared.wanted
            await self._load(shared.wanted)
        finally:
            member.refreshing, member.target = False, None
            for other in shared.members.values():
                other.woken.set()
            shared.notify()
        now = time.monotonic()
        member.refresh_seconds = now - started
        self._update_at = max(self._update_at, now + member.refresh_seconds)

    async def _drain(self, until: float) -> None:
        self._member.enter(DRAINING, "it finishes what is in flight before a refresh")
        if await self._member.requests.finish(until):
            with contextlib.suppress(Refused):  # who lacks the route ends what nobody waits for
                await self._server.abort_all()

    async def _load(self, target: Version) -> None:
        member = self._member
        member.target = target.number
        member.enter(REFRESHING, f"it takes version {target.number}")
        await self._server.flush()  # idle now; SGLang updates a server that is not only by half
        refusal = await self._update(target)
        if refusal is None:
            await self._server.flush()
            await self._probe(target)
            member.version = target.number
            member.counts["refreshed"] += 1
        else:
            assert member.version is not None
            await self._probe(self._shared.published[member.version])
            self._refused_updates += 1
            backoff = self._shared.settings.backoff_after(self._refused_updates)
            self._update_at = time.monotonic() + backoff
            member.tell(f"it goes on with version {member.version}: {refusal}")
        member.enter(READY)

    async def _update(self, target: Version) -> Refused | None:
        """The server has the version, or it said no and may go on with the one that it has.

        Raises:
          Refused: if it said no and may not.
        """
        member, deadline = self._member, self._shared.settings.update_deadline
        try:
            await self._server.update(target.path, target.number, deadline=deadline)
        except Refused as error:
            held = await self._server.version()
            if held == str(target.number):  # it may take the weights and say no all the same
                return None
            member.counts["refresh_refused"] += 1
            known = self._shared.older_versions and member.version is not None
            if known and held == str(member.version):
                return error
            raise
        return None

    async def _probe(self, version: Version) -> None:
        """Compares the server's log-probs of fixed rows with the learner's.

        Raises:
          WrongVersion, ProbeFailed: if it does not hold what it should.
        """
        member, terms = self._member, self._shared.terms
        rows, held = await self._server.score(version.tokens)
        if held != {str(version.number)}:
            raise WrongVersion(f"it holds version {', '.join(held)} instead of {version.number}")
        member.probe_gap = float(np.abs(np.concatenate(rows) - version.logp).max())
        limit = allowed_gap(terms.probe_gap, self._dtype, terms.dtype, version.dtype)
        if not member.probe_gap <= limit:  # nor if it is no number
            member.counts["probe_failed"] += 1
            raise ProbeFailed(
                f"its log-probs differ from the learner's version {version.number} by "
                f"{member.probe_gap:.3g} nats (fleet.probe_gap allows {limit:g})"
            )
