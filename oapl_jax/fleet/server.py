"""A server of a fleet: what it holds, whether it may sample now, and the groups asked of it."""

import asyncio
import time
from collections import Counter
from typing import Any

from oapl_jax.fleet.client import Server
from oapl_jax.fleet.failures import Aborted, Mixed, ServerError
from oapl_jax.fleet.inflight import GivenUp, InFlight
from oapl_jax.fleet.shared import Shared
from oapl_jax.rollout.sampler import Sampling
from oapl_jax.structs import Prompt, Rollout

# A server's states. A starting one has not answered yet, or waits for the first version; a draining
# one finishes what is in flight; a lost one did not do what it was asked; a refused one failed its
# contract, a version or a probe. The last two are tried again.
STARTING, READY, DRAINING = "starting", "ready", "draining"
REFRESHING, LOST, REFUSED = "refreshing", "lost", "refused"

REQUESTS = ("sampled", "attempts_failed", "aborted", "mixed", "tokens")
COUNTS = (*REQUESTS, "joined", "refreshed", "refresh_refused", "probe_failed", LOST, REFUSED)


class Member:
    """A server and what is known of it; it lives in one event loop, and any thread may look at it.

    Attributes:
      state: one of those above.
      reason: why it is not ready.
      version: that it holds and was probed for; None if that is not known.
      target: that it is told to take, or None.
      refreshing: whether it has one of the turns that the fleet's share allows.
      requests: in flight.
      by_contract: whether it is refused for what it is, not for what it did.
      probe_gap: of its last probe, nats.
      refresh_seconds: of its last refresh.
      retry_at: when it is to be tried again, if it is not ready.
      woken: set for its keeper (keeper.py) to look at it at once.
      counts: what happened here, since the URL was first a member.
    """

    def __init__(self, server: Server, shared: Shared, counts: Counter[str]):
        self.server, self.url, self._shared, self.counts = server, server.url, shared, counts
        self.state, self.reason = STARTING, "it has not answered yet"
        self.version: int | None = None
        self.target: int | None = None
        self.requests = InFlight(shared)
        self.refreshing = self.by_contract = self.leaving = False
        self.probe_gap = self.refresh_seconds = 0.0
        self.retry_at, self.woken = 0.0, asyncio.Event()
        self._failures = 0  # in a row
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
        generating = self.server.generate(
            prompt.tokens.tolist(),
            n=n,
            sampling=sampling,
            stop_ids=terms.stop_ids,
            vocab_size=terms.model_config.vocab_size,
            version=self.version,
            mixed_versions=settings.mixed_versions,
            deadline=settings.request_deadline,
        )
        try:
            answer = await self.requests.run(generating)
        except GivenUp as error:
            (reason,) = error.args
            self.counts[reason] += 1
            kind = Aborted if reason == "aborted" else ServerError
            raise kind(f"{self.url}: given up since the server is {self.state}") from error
        except ServerError as error:
            self.counts["mixed" if isinstance(error, Mixed) else "attempts_failed"] += 1
            if self.state == READY:
                self.fail(LOST, f"a request failed: {error}")
                self.woken.set()
            if isinstance(error, Aborted):  # nobody here asked for it
                raise ServerError(str(error)) from error
            raise
        self._failures = 0
        self.counts["sampled"] += 1
        self.counts["mixed"] += answer.mixed
        self.counts["tokens"] += sum(len(r.tokens) for r in answer.rollouts)
        return answer.rollouts

    async def leave(self) -> None:
        """Groups in flight are finished, within the deadline of a drain."""
        self.leaving = True
        self.enter(DRAINING, "it left the list of servers")
        await self.requests.finish(time.monotonic() + self._shared.settings.drain_deadline)

    def fail(self, state: str, reason: str, *, tell: bool = False) -> None:
        """It is lost or refused, and tried again after a while that grows with each failure."""
        self.counts[state] += self.state != state
        self._failures += 1
        self.retry_at = time.monotonic() + self._shared.settings.backoff_after(self._failures)
        self.enter(state, reason)
        if tell and self._told != state:  # not at every try
            self._told = state
            self._shared.say(f"server {self.url} is {state}: {reason}")

    def enter(self, state: str, reason: str = "") -> None:
        self.state, self.reason = state, reason
        if state == READY and self._told:
            self._told = ""
            self._shared.say(f"server {self.url} is ready again, with version {self.version}")
        self._shared.notify()

    def tell(self, sentence: str) -> None:
        """Says something of it to people, once."""
        if sentence not in self._warned:
            self._warned.add(sentence)
            self._shared.say(f"server {self.url}: {sentence}")
