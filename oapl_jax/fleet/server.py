"""State of one server of a fleet, and its requests in flight."""

import asyncio
import dataclasses
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

from oapl_jax.config import FleetConfig
from oapl_jax.fleet.admission import Requirements
from oapl_jax.fleet.client import Aborted, GroupRequest, Mixed, ServerError, SGLangClient
from oapl_jax.rollout.sampler import Sampling
from oapl_jax.structs import Prompt, Rollout

# States. starting: no response yet, or waits for the first version. draining: finishes its requests
# in flight. lost: a request failed. refused: failed admission, a version or a probe. Lost and
# refused servers are retried.
STARTING, READY, DRAINING = "starting", "ready", "draining"
REFRESHING, LOST, REFUSED = "refreshing", "lost", "refused"

COUNTS = (
    *("sampled", "attempts_failed", "aborted", "mixed", "tokens"),  # of requests
    *("joined", "refreshed", "refresh_refused", "probe_failed", LOST, REFUSED),
)


@dataclasses.dataclass(eq=False, kw_only=True)
class ServerState:
    """A server's state, changed in the fleet's event loop; any thread may read it."""

    client: SGLangClient
    config: FleetConfig
    requirements: Requirements
    counts: Counter[str]  # by the names in COUNTS, since the URL first joined
    log: Callable[[str], None]  # logs one sentence
    notify: Callable[[], None]  # called after each change of state
    state: str = STARTING
    reason: str = "no response yet"  # why the server is not ready
    version: int | None = None  # loaded and probed; None if unknown
    target: int | None = None  # version that is being loaded
    refreshing: bool = False  # holds one of the fleet's refresh slots
    not_admitted: bool = False  # refused by check_server, not for a failure
    leaving: bool = False  # removed from the list of servers; drains
    probe_gap: float = 0.0  # largest log-prob difference of the last probe, nats
    refresh_seconds: float = 0.0  # of the last refresh
    retry_at: float = 0.0  # time of the next try, if not ready
    # Makes the server's ServerController act at once.
    wake: asyncio.Event = dataclasses.field(default_factory=asyncio.Event)

    def __post_init__(self):
        self.url = self.client.url
        self._in_flight: dict[asyncio.Task, str] = {}  # request -> why it was aborted, if it was
        self._failures = 0  # in a row
        self._logged_failure = ""  # state that was logged last
        self._warned: set[str] = set()

    @property
    def in_flight(self) -> int:
        return len(self._in_flight)

    def report(self) -> dict[str, Any]:
        """Returns the state, for logs and tests."""
        names = ("state", "reason", "version", "in_flight", "probe_gap", "refresh_seconds")
        return {**{name: getattr(self, name) for name in names}, **self.counts}

    async def generate(self, prompt: Prompt, *, n: int, sampling: Sampling) -> tuple[Rollout, ...]:
        """Samples one group from the loaded version.

        Raises:
          Aborted: if the group was aborted for a refresh.
          ServerError: if the request failed; the server is admitted anew before its next group.
        """
        request = GroupRequest(
            tokens=prompt.tokens.tolist(),
            n=n,
            sampling=sampling,
            stop_ids=self.requirements.stop_ids,
            vocab_size=self.requirements.model_config.vocab_size,
            version=self.version,
            mixed_versions=self.config.mixed_versions,
        )
        sampling_task = self.client.generate(request, deadline=self.config.request_deadline)
        task = asyncio.create_task(sampling_task)  # `abort` cancels the request, not its caller
        self._in_flight[task] = ""
        try:
            await asyncio.wait({task})
        finally:
            task.cancel()
            aborted = self._in_flight.pop(task)
        if aborted:
            self.counts[aborted] += 1
            kind = Aborted if aborted == "aborted" else ServerError
            raise kind(f"{self.url}: request ended since the server is {self.state}")
        try:
            rollouts, mixed = task.result()
        except ServerError as error:
            self.counts["mixed" if isinstance(error, Mixed) else "attempts_failed"] += 1
            if self.state == READY:
                self.fail(LOST, f"a request failed: {error}")
                self.wake.set()
            if isinstance(error, Aborted):  # by another client
                raise ServerError(str(error)) from error
            raise
        self._failures = 0
        self.counts["sampled"] += 1
        self.counts["mixed"] += mixed
        self.counts["tokens"] += sum(len(r.tokens) for r in rollouts)
        return rollouts

    def abort(self, reason: str) -> None:
        """Cancels every request in flight; `reason` is counted: "aborted" or "attempts_failed"."""
        for task in self._in_flight:
            if not task.done():
                self._in_flight[task] = reason
                task.cancel()

    async def drain(self, until: float) -> bool:
        """Waits for the requests in flight, and aborts those left at the time `until`.

        Returns:
          whether any was aborted.
        """
        if self._in_flight:
            seconds = max(until - time.monotonic(), 0)
            await asyncio.wait(set(self._in_flight), timeout=seconds)
        late = {task for task in self._in_flight if not task.done()}
        if late:
            self.abort("aborted")
            await asyncio.wait(late)
        return bool(late)

    def enter(self, state: str, reason: str = "") -> None:
        """Changes the state."""
        self.state, self.reason = state, reason
        if state == READY and self._logged_failure:
            self._logged_failure = ""
            self.log(f"server {self.url} is ready again, with version {self.version}")
        self.notify()

    def fail(self, state: str, reason: str, *, log: bool = False) -> None:
        """Marks the server lost or refused; each failure in a row doubles the time to the retry."""
        self.counts[state] += self.state != state
        self._failures += 1
        self.retry_at = time.monotonic() + self.config.backoff_after(self._failures)
        self.enter(state, reason)
        if log and self._logged_failure != state:  # once, not at each retry
            self._logged_failure = state
            self.log(f"server {self.url} is {state}: {reason}")

    def warn(self, sentence: str) -> None:
        """Logs a sentence about the server, once."""
        if sentence not in self._warned:
            self._warned.add(sentence)
            self.log(f"server {self.url}: {sentence}")
