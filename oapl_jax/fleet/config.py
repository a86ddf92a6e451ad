"""Settings of a fleet."""

import dataclasses
from collections.abc import Mapping

from oapl_jax.errors import UserError

MIXED_VERSIONS = ("reissue", "keep")


@dataclasses.dataclass(frozen=True)
class FleetConfig:
    """Section `fleet` of a config. Every deadline and interval is in seconds.

    Attributes:
      servers: URLs.
      servers_file: or a file with one URL per line ("#" begins a comment), read every
        `members_every`. Replace it by a rename, so that no partial file is read.
      router: or the URL of a sglang-router, whose `GET /workers` is the list. Requests do not pass
        through it: a router can't pin a group to one server and version, nor forward updates.
      members_every: interval between reads of the list.
      max_in_flight: groups requested at a time, over all servers.
      attempts: of a group; each on another server if there is one.
      backoff: before a failed server is retried; doubles with each failure in a row.
      backoff_limit: largest backoff.
      health_every: interval between health checks of a ready server.
      connect_deadline: to open a connection.
      answer_deadline: for a control request (health, admission, probe, flush with its retries).
      request_deadline: for the rollouts of one group.
      drain_deadline: for requests in flight before a refresh (0: none); then they are aborted.
      update_deadline: for a server to load a version.
      start_deadline: for a server to respond for the first time.
      no_server_deadline: for groups to wait without a ready server before the run ends.
      refresh_share: fraction of the servers that may be refreshed at a time; at least one may.
      probe_gap: nats by which log-probs of a version's probe may differ between learner and server,
        for "float32" (on both sides) and "bfloat16" (any other pair of dtypes).
      mixed_versions: treatment of a response that spans two versions; see client.read_group.

    Raises:
      UserError: for an invalid value.
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
        """Returns the seconds to wait after so many failures in a row."""
        return min(self.backoff * 2.0 ** (failures - 1), self.backoff_limit)
