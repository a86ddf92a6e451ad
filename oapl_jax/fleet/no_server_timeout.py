"""Training pauses while no server is ready; for too long, and it ends."""

import time
from collections.abc import Callable, Sequence

from oapl_jax.errors import FleetLost, RunError, UserError
from oapl_jax.fleet.config import FleetSettings
from oapl_jax.fleet.server import Member


class Pause:
    """Notices when groups wait and no server is ready, and says so.

    Args:
      settings: of the fleet.
      say: takes a sentence for people.
    """

    def __init__(self, settings: FleetSettings, say: Callable[[str], None]):
        self._deadline, self._say = settings.no_server_deadline, say
        self._since: float | None = None
        self._before = 0.0  # seconds of earlier pauses
        self._told = self._served = False

    @property
    def seconds(self) -> float:
        """Of all pauses so far. Any thread."""
        since = self._since
        return self._before + (time.monotonic() - since if since else 0.0)

    def look(self, members: Sequence[Member], *, waiting: bool) -> UserError | RunError | None:
        """To be called again and again; what must end the run is returned.

        Args:
          members: of the fleet, now.
          waiting: whether anybody wants groups.
        """
        now, serving = time.monotonic(), any(m.serves for m in members)
        self._served = self._served or serving
        if serving or not waiting:
            if self._since:
                self._before += now - self._since
            if self._told:
                self._say("a server is ready, training goes on")
            self._since, self._told = None, False
            return None
        self._since = self._since or now
        seconds, deadline = now - self._since, self._deadline
        states = "; ".join(f"{m.url} is {m.state} ({m.reason})" for m in members)
        states = states or "the list of servers is empty"
        if members and not self._served and all(m.by_contract for m in members):
            return UserError(f"no server can be used: {states}")
        if seconds > deadline:
            return FleetLost(
                f"no server was ready for {deadline:g} s (fleet.no_server_deadline): {states}; the "
                "same command goes on from the newest checkpoint"
            )
        if not self._told and (seconds > deadline / 2 or not any(m.hopeful for m in members)):
            self._told = True
            self._say(
                f"no server is ready: training pauses, for {deadline - seconds:.0f} s at most "
                f"(fleet.no_server_deadline); {states}"
            )
        return None
