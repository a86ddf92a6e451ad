"""A server of a fleet, through its life: what it holds, and whether it may sample now.

One asyncio task tends each server: it admits it (contract, weights, probe), looks at its health,
brings it to the version that is wanted, and tries again when it was lost.
"""

import asyncio
import contextlib
import dataclasses
import time
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from oapl_jax.rollout.contract import Terms, allowed_gap, examine
from oapl_jax.rollout.roster import FleetSettings
from oapl_jax.rollout.sampler import Sampling
from oapl_jax.rollout.sglang import Aborted, Mixed, Refused, Server, ServerError, WrongVersion
from oapl_jax.structs import Prompt, Rollout

# A server's states. A starting one has not answered yet, or waits for the first version; a draining
# one finishes what is in flight; a lost one did not do what it was asked; a refused one failed its
# contract, a version or a probe. The last two are tried again.
STARTING, READY, DRAINING = "starting", "ready", "draining"
REFRESHING, LOST, REFUSED = "refreshing", "lost", "refused"

REQUESTS = ("sampled", "attempts_failed", "aborted", "mixed", "tokens")
COUNTS = (*REQUESTS, "joined", "refreshed", "refresh_refused", "probe_failed", LOST, REFUSED)


class ProbeFailed(ServerError):
    """A server's log-probs are not those of the version that it says it holds."""


@dataclasses.dataclass(frozen=True)
class Version:
    """A published version, as servers are told of it.

    Attributes:
      number: learner's step.
      path: as the servers read it.
      tokens: rows of the probe.
      logp: float64[all], the learner's log-prob at temperature 1 of each of their tokens but the
        first of a row.
      dtype: that the learner computed them in.
    """

    number: int
    path: str
    tokens: list[list[int]]
    logp: np.ndarray
    dtype: str

    @classmethod
    def of(cls, number: int, path: str, probe: Mapping[str, Any]) -> "Version":
        logp = [value for row in probe["logp"] for value in row]
        return cls(number, path, probe["tokens"], np.array(logp, np.float64), probe["dtype"])


class Shared:
    """What all members of a fleet go by.

    Attributes:
      settings: of the fleet.
      terms: what each server must be.
      older_versions: whether servers may go on with a version that is not the wanted one.
      say: takes a sentence for people.
      wanted: the version that servers are brought to, since the time `asked`.
      published: the versions that a member may hold.
      members: by URL.
    """

    def __init__(
        self,
        settings: FleetSettings,
        terms: Terms,
        *,
        older_versions: bool,
        say: Callable[[str], None],
    ):
        self.settings, self.terms = settings, terms
        self.older_versions, self.say = older_versions, say
        self.wanted: Version | None = None
        self.asked = 0.0
        self.published: dict[int, Version] = {}
        self.members: dict[str, Member] = {}
        self._changed = asyncio.Event()

    def has_turn(self) -> bool:
        """Whether one more server may be refreshed now."""
        allowed = max(1, int(self.settings.refresh_share * len(self.members)))
        return sum(m.refreshing for m in self.members.values()) < allowed

    def notify(self) -> None:
        """Wakes all that wait for a change of any member."""
        self._changed.set()
        self._changed = asyncio.Event()

    async def change(self, seconds: float | None = None) -> None:
        """Waits for a change of any member, at most so long."""
        try:
            async with asyncio.timeout(seconds):
                await self._changed.wait()
        except TimeoutError:
            pass


class Member:
    """A server and what is known of it; it lives in one event loop, and any thread may look at it.

    Attributes:
      state: one of those above.
      reason: why it is not ready.
      version: that it holds and was probed for; None if that is not known.
      target: that it is told to take, or None.
      refreshing: whether it has one of the turns that the fleet's share allows.
      requests: in flight, each with the reason why it was given up, if it was.
      by_contract: whether it is refused for what it is, not for what it did.
      probe_gap: of its last probe, nats.
      refresh_seconds: of its last refresh.
      counts: what happened here, since the URL was first a member.
    """

    def __init__(self, server: Server, shared: Shared, counts: Counter[str]):
        self.server, self.url, self._shared, self.counts = server, server.url, shared, counts
        self.state, self.reason = STARTING, "it has not answered yet"
        self.version: int | None = None
        self.target: int | None = None
        self.requests: dict[asyncio.Task, str] = {}
        self.refreshing = self.by_contract = self.leaving = False
        self.probe_gap = self.refresh_seconds = 0.0
        self._dtype = "auto"
        self._answered, self._born = False, time.monotonic()
        self._failures = self._refused_updates = 0  # in a row
        self._retry_at = self._update_at = self._looked_at = 0.0
        self._wake = asyncio.Event()
        self._told, self._warned = "", set()

    @property
    def hopeful(self) -> bool:
        """Whether it may be ready soon although nothing went well or wrong yet."""
        return self.state in (STARTING, DRAINING, REFRESHING)

    @property
    def serves(self) -> bool:
        """Whether new groups may go to it."""
        wanted = self._shared.wanted
        right = wanted is not None and self.version == wanted.number
        return self.state == READY and (right or self._shared.older_versions)

    def report(self) -> dict[str, Any]:
        names = ("state", "reason", "version", "probe_gap", "refresh_seconds")
        return {"in_flight": len(self.requests), **{name: getattr(self, name) for name in names}}

    async def request(self, prompt: Prompt, *, n: int, sampling: Sampling) -> tuple[Rollout, ...]:
        """One group of the version that the server holds now.

        Raises:
          Aborted: if it was given up for a refresh.
          ServerError: if it failed; the server is then looked at before it gets another one.
        """
        terms, settings = self._shared.terms, self._shared.settings
        generate = self.server.generate(
            prompt.tokens.tolist(),
            n=n,
            sampling=sampling,
            stop_ids=terms.stop_ids,
            vocab_size=terms.model_config.vocab_size,
            version=self.version,
            mixed_versions=settings.mixed_versions,
            deadline=settings.request_deadline,
        )
        task = asyncio.create_task(generate)
        self.requests[task] = ""
        try:
            await asyncio.wait({task})
        finally:
            task.cancel()
            given_up = self.requests.pop(task)
            self._shared.notify()
        if given_up:
            self.counts[given_up] += 1
            kind = Aborted if given_up == "aborted" else ServerError
            raise kind(f"{self.url}: given up since the server is {self.state}")
        try:
            answer = task.result()
        except ServerError as error:
            self.counts["mixed" if isinstance(error, Mixed) else "attempts_failed"] += 1
            if self.state == READY:
                self._fail(LOST, f"a request failed: {error}")
                self._wake.set()
            if isinstance(error, Aborted):  # nobody here asked for it
                raise ServerError(str(error)) from error
            raise
        self._failures = 0
        self.counts["sampled"] += 1
        self.counts["mixed"] += answer.mixed
        self.counts["tokens"] += sum(len(r.tokens) for r in answer.rollouts)
        return answer.rollouts

    def hear_of_version(self) -> None:
        """Another version is wanted, so what was refused does not count."""
        if self._refused_updates:
            self._update_at = self._refused_updates = 0
        if self.state in (STARTING, REFUSED):
            self._retry_at = 0.0
        self._wake.set()

    async def tend(self) -> None:
        """Keeps it serving, until cancelled."""
        settings = self._shared.settings
        while True:
            try:
                await self._next()
            except (WrongVersion, ProbeFailed, Refused) as error:
                self._fail(REFUSED, str(error), tell=True)
                self._drop("attempts_failed")
                self.version = None
            except ServerError as error:
                if self._answered or time.monotonic() - self._born > settings.start_deadline:
                    self._fail(LOST, str(error), tell=True)
                    self._drop("attempts_failed")
                else:
                    self.reason = str(error)
                    self._retry_at = time.monotonic() + settings.backoff
            wait, now = settings.health_every, time.monotonic()
            if self.state != READY:
                wait = min(wait, max(self._retry_at - now, 0))
            elif self._update_at > now:
                wait = min(wait, self._update_at - now)
            try:
                async with asyncio.timeout(wait):
                    await self._wake.wait()
            except TimeoutError:
                pass
            self._wake.clear()

    async def _next(self) -> None:
        """What is to be done now, if anything is."""
        now, shared = time.monotonic(), self._shared
        if self.state != READY:
            if now >= self._retry_at:
                await self._admit()
        elif self._may_update() and (not shared.older_versions or shared.has_turn()):
            await self._refresh()
        elif now >= self._looked_at + shared.settings.health_every:
            await self.server.health()
            self._looked_at = time.monotonic()

    async def leave(self) -> None:
        """Groups in flight are finished, within the deadline of a drain."""
        self.leaving = True
        self._set(DRAINING, "it left the list of servers")
        await self._finish(time.monotonic() + self._shared.settings.drain_deadline)

    async def _admit(self) -> None:
        """From nothing known to ready: contract, weights unless it has them still, probe."""
        shared = self._shared
        found = await examine(self.server, shared.terms)
        self._answered, self._dtype = True, found.dtype
        for warning in found.warnings:
            self._tell(warning)
        self.by_contract = bool(found.refusals)
        if found.refusals:
            self._fail(REFUSED, "; ".join(found.refusals), tell=True)
        elif shared.wanted is None:
            self._set(STARTING, "it waits for the first version")
            self._retry_at = time.monotonic() + shared.settings.health_every
        elif self._may_update() or await self.server.version() != str(self.version):
            await self._refresh()
        else:
            assert self.version is not None
            await self._probe(shared.published[self.version])
            self._set(READY)

    def _may_update(self) -> bool:
        """Whether it holds another version than the wanted one, and is not to be left alone."""
        wanted = self._shared.wanted
        if wanted is None or self.version == wanted.number:
            return False
        return not self._shared.older_versions or time.monotonic() >= self._update_at

    async def _refresh(self) -> None:
        """Drain, update, flush, probe; never more servers at once than their share.

        Where older versions may serve, it then serves at least as long as that took: versions that
        come faster than a server takes them would leave it no time to sample.
        """
        shared = self._shared
        started, patience = time.monotonic(), shared.settings.drain_deadline
        if not shared.older_versions:  # it has nothing to do until it has the wanted version
            await self._drain(shared.asked + patience)
        while not shared.has_turn():
            await shared.change()
        self.refreshing = True
        try:
            if shared.older_versions:
                await self._drain(time.monotonic() + patience)
            assert shared.wanted
            await self._load(shared.wanted)
        finally:
            self.refreshing, self.target = False, None
            for other in shared.members.values():
                other._wake.set()
            shared.notify()
        now = time.monotonic()
        self.refresh_seconds = now - started
        self._update_at = max(self._update_at, now + self.refresh_seconds)

    async def _drain(self, until: float) -> None:
        self._set(DRAINING, "it finishes what is in flight before a refresh")
        if await self._finish(until):  # a server without this route ends what nobody waits for
            with contextlib.suppress(Refused):
                await self.server.abort_all()

    async def _finish(self, until: float) -> bool:
        """Waits until nothing is in flight; whether something had to be given up."""
        while self.requests and time.monotonic() < until:
            await self._shared.change(until - time.monotonic())
        gives_up = bool(self.requests)
        self._drop("aborted")
        while self.requests:
            await self._shared.change()
        return gives_up

    async def _load(self, target: Version) -> None:
        self.target = target.number
        self._set(REFRESHING, f"it takes version {target.number}")
        await self.server.flush()  # idle now; SGLang updates a server that is not only by half
        refusal = await self._update(target)
        if refusal is None:
            await self.server.flush()
            await self._probe(target)
            self.version = target.number
            self.counts["refreshed"] += 1
        else:
            assert self.version is not None
            await self._probe(self._shared.published[self.version])
            self._refused_updates += 1
            backoff = self._shared.settings.backoff_after(self._refused_updates)
            self._update_at = time.monotonic() + backoff
            self._tell(f"it goes on with version {self.version}: {refusal}")
        self._set(READY)

    async def _update(self, target: Version) -> Refused | None:
        """The server has the version, or it said no and may go on with the one that it has.

        Raises:
          Refused: if it said no and may not.
        """
        deadline = self._shared.settings.update_deadline
        try:
            await self.server.update(target.path, target.number, deadline=deadline)
        except Refused as error:
            held = await self.server.version()
            if held == str(target.number):  # it may take the weights and say no all the same
                return None
            self.counts["refresh_refused"] += 1
            if (
                self._shared.older_versions
                and self.version is not None
                and held == str(self.version)
            ):
                return error
            raise
        return None

    async def _probe(self, version: Version) -> None:
        """Compares the server's log-probs of fixed rows with the learner's.

        Raises:
          WrongVersion, ProbeFailed: if it does not hold what it should.
        """
        rows, held = await self.server.score(version.tokens)
        if held != {str(version.number)}:
            raise WrongVersion(f"it holds version {', '.join(held)} instead of {version.number}")
        self.probe_gap = float(np.abs(np.concatenate(rows) - version.logp).max())
        terms = self._shared.terms
        limit = allowed_gap(terms.probe_gap, self._dtype, terms.dtype, version.dtype)
        if self.probe_gap > limit:
            self.counts["probe_failed"] += 1
            raise ProbeFailed(
                f"its log-probs differ from the learner's version {version.number} by "
                f"{self.probe_gap:.3g} nats (fleet.probe_gap allows {limit:g})"
            )

    def _drop(self, why: str) -> None:
        """Gives up what is in flight; whoever waits for it hears why."""
        for task in self.requests:
            if not task.done():
                self.requests[task] = why
                task.cancel()

    def _fail(self, state: str, reason: str, *, tell: bool = False) -> None:
        self.counts[state] += self.state != state
        self._failures += 1
        self._retry_at = time.monotonic() + self._shared.settings.backoff_after(self._failures)
        self._set(state, reason)
        if tell and self._told != state:  # not at every try
            self._told = state
            self._shared.say(f"server {self.url} is {state}: {reason}")

    def _set(self, state: str, reason: str = "") -> None:
        self.state, self.reason = state, reason
        if state == READY and self._told:
            self._told = ""
            self._shared.say(f"server {self.url} is ready again, with version {self.version}")
        self._shared.notify()

    def _tell(self, sentence: str) -> None:
        if sentence not in self._warned:
            self._warned.add(sentence)
            self._shared.say(f"server {self.url}: {sentence}")
