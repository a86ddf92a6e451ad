"""What all members of a fleet go by: settings, terms, the wanted version, turns to refresh."""

import asyncio
import dataclasses
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from oapl_jax.fleet.admission import Terms
from oapl_jax.fleet.config import FleetSettings

if TYPE_CHECKING:
    from oapl_jax.fleet.server import Member


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
