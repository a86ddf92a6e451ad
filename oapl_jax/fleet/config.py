"""The settings of a fleet."""

import dataclasses
from collections.abc import Mapping

from oapl_jax.errors import UserError
from oapl_jax.fleet.responses import MIXED_VERSIONS


@dataclasses.dataclass(frozen=True)
class FleetSettings:
    """The section `fleet` of a configuration. Every deadline and interval is in seconds.

    Attributes:
      servers: URLs.
      servers_file: or a file with one URL a line ("#" begins a comment), read again and again, so
        that servers may join and leave. Replace it by a rename, so that no half is read.
      router: or the URL of a sglang-router, whose `GET /workers` is the list. Nothing else goes
        through it: it can't pin a group to one server and version, and it forwards no call that
        changes weights. So the fleet spreads the requests itself, as it has to.
      members_every: between two looks at the file or the router.
      max_in_flight: groups requested at a time, over all servers.
      attempts: of a group that fails, each on another server where there is one.
      backoff: before a server that failed is tried again; doubles with each failure in a row.
      backoff_limit: the most that it grows to.
      health_every: between two looks at a server that serves.
      connect_deadline: to open a connection.
      answer_deadline: for a control call (health, contract, probe, flush with its retries).
      request_deadline: for the rollouts of one group.
      drain_deadline: for groups in flight when their server is to be refreshed (0: none), then they
        are aborted and requested again.
      update_deadline: for a server to load a version.
      start_deadline: for a server to answer for the first time.
      no_server_deadline: that groups wait with no server ready before the run ends.
      refresh_share: of the servers, that may be refreshed at a time; at least one always may.
      probe_gap: largest difference in nats of a log-prob of a version's probe between learner and
        server, for "float32" (both sides) and "bfloat16" (any other pair of dtypes).
      mixed_versions: what becomes of a response that spans two versions: see `answer.read_group`.

    Raises:
      UserError: for a value that can't work.
    """

    servers: tuple[str, ...]
    servers_file: str
    router: str
    members_every: float
    max_in_flight: int
    attempts: int
    backoff: float
    backoff_limit: float
    health_every: float
    connect_deadline: float
    answer_deadline: float
    request_deadline: float
    drain_deadline: float
    update_deadline: float
    start_deadline: float
    no_server_deadline: float
    refresh_share: float
    probe_gap: Mapping[str, float]
    mixed_versions: str

    def __post_init__(self):
        named = [name for name in ("servers", "servers_file", "router") if getattr(self, name)]
        if len(named) != 1:
            raise UserError(
                f"fleet names its servers by {' and '.join(named) or 'nothing'}; set exactly one "
                "of fleet.servers, fleet.servers_file and fleet.router"
            )
        if self.mixed_versions not in MIXED_VERSIONS:
            raise UserError(
                f"fleet.mixed_versions={self.mixed_versions!r} is not one of "
                f"{', '.join(MIXED_VERSIONS)}"
            )
        if set(self.probe_gap) != {"float32", "bfloat16"}:
            raise UserError("fleet.probe_gap needs a value for float32 and one for bfloat16")
        for name, value in (
            *((f.name, getattr(self, f.name)) for f in dataclasses.fields(self) if f.type is float),
            *((f"probe_gap.{dtype}", value) for dtype, value in self.probe_gap.items()),
        ):
            if not (value > 0 or (name == "drain_deadline" and value == 0)):
                raise UserError(f"fleet.{name}={value} must be above 0")
        for name in ("max_in_flight", "attempts"):
            if getattr(self, name) < 1:
                raise UserError(f"fleet.{name}={getattr(self, name)} must be at least 1")
        if self.refresh_share > 1:
            raise UserError(f"fleet.refresh_share={self.refresh_share} must be at most 1")
        least = max(self.start_deadline, self.drain_deadline + self.update_deadline)
        if self.no_server_deadline < least:
            raise UserError(
                f"fleet.no_server_deadline={self.no_server_deadline:g} would end a run whose "
                "servers are still within fleet.start_deadline or fleet.drain_deadline + "
                f"fleet.update_deadline; it must be at least {least:g}"
            )

    def backoff_after(self, failures: int) -> float:
        """Seconds to wait after so many failures in a row."""
        return min(self.backoff * 2.0 ** (failures - 1), self.backoff_limit)
