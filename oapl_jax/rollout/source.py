"""The source of groups: sampled live, read from a recorded dataset, or both."""

import dataclasses
import json
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath
from flax import serialization

from oapl_jax import multihost
from oapl_jax.errors import FleetLost, RunError
from oapl_jax.rollout.buffer import GroupStore
from oapl_jax.rollout.dataset import DatasetWriter
from oapl_jax.rollout.kept import KeptNotes
from oapl_jax.rollout.ledger import FILE, Ledger, ZeroRewardGuard
from oapl_jax.rollout.worker import Worker
from oapl_jax.structs import Group, decode_groups, encode_groups
from oapl_jax.tracking.progress import StopRequest


@dataclasses.dataclass(eq=False, kw_only=True)
class GroupSource:
    """Groups for gradient steps, the same on all hosts; saved, resumed and stopped as one."""

    worker: Worker
    store: GroupStore
    ledger: Ledger
    guard: ZeroRewardGuard
    writer: DatasetWriter | None  # records sampled groups, if the run records or keeps any
    notes: KeptNotes | None  # of these groups
    workdir: epath.Path  # of the run, which holds a ledger for each host
    sampled: int  # groups of a gradient step that this host samples
    recorded: int  # groups of a gradient step that this host reads
    fresh: int  # prompts that each step samples where the buffer has room (replay), or 0
    overlap: bool  # whether the worker runs beside the learner
    deadline: float  # seconds that this host waits for groups or for another host
    # Of the sampler, the grader and the preferences.
    more_metrics: Sequence[Callable[[], dict[str, float]]]

    def __post_init__(self):
        self._in_use: set[int] = set()  # versions, by all hosts

    @property
    def live(self) -> bool:
        """True if this run samples."""
        return self.sampled > 0

    def serve(self, version: int, path: epath.Path) -> None:
        if self.live and self.store.target_version != version:
            self.store.set_target(version, path)

    def versions(self) -> set[int]:
        """Versions that any host samples from or holds groups of.

        With several hosts, as exchanged at the latest step: no version is added to them until
        another one serves, and before the first step the pins name those of the buffers.
        """
        return self.worker.versions() if jax.process_count() == 1 else self._in_use

    def held_versions(self, name: str) -> set[int]:
        """Versions of the groups in any host's buffer; all hosts must call it."""
        return multihost.allgather_set(self.store.held_versions(), name, deadline=self.deadline)

    def collect(self, step: int, stop: StopRequest) -> tuple[list[Group], float]:
        """Groups of one gradient step, the same on all hosts (none: stopped), and seconds waited.

        Raises FleetLost or HostLost for any host, and RunError for late or unrewarded groups.
        """
        self.store.expire(step)
        started, lost = time.monotonic(), ""
        try:
            self._await_groups(step, stop)
        except FleetLost as error:
            lost = str(error)
        self._agree(step, stop, lost)
        # On a stop the groups stay in the buffer, and the checkpoint holds them.
        groups = [] if stop.requested else self._take(step)
        return groups, time.monotonic() - started

    def _await_groups(self, step: int, stop: StopRequest) -> None:
        """Returns when the buffer holds this host's groups for the step, or on a stop."""
        started, enough = time.monotonic(), lambda: len(self.store) >= self.sampled
        name = f"{self.sampled} groups for step {step} (rollout.deadline)"
        if self.overlap and self.live:
            self.worker.start()
            ready, check = lambda: enough() or bool(stop.requested), self.worker.check
            self.store.wait(ready, name, deadline=self.deadline, check=check)
        # A replay buffer stays full: without fresh groups it would replay the first ones only.
        fresh = self.live and self.fresh and self.store.has_room(self.fresh)
        while not (self.overlap or stop.requested) and (fresh or not enough()):
            self.worker.produce()
            fresh = False
            if time.monotonic() - started > self.deadline:
                raise RunError(
                    f"sampled {self.deadline:.0f} s for {name}; ends of groups: "
                    f"{self.store.counts()}"
                )

    def _agree(self, step: int, stop: StopRequest, lost: str) -> None:
        """Exchanges stop requests, lost fleets and versions in use between hosts."""
        multihost.barrier(f"step {step}", deadline=self.deadline)
        mine = json.dumps([stop.requested, lost, sorted(self.worker.versions())]).encode()
        name = f"the state at step {step}"
        gathered = multihost.allgather_bytes(mine, name, deadline=self.deadline)
        stops, losses, versions = zip(*map(json.loads, gathered), strict=True)
        self._in_use = set().union(*versions)
        if any(losses):
            raise FleetLost(next(filter(None, losses)))
        stop.requested = stop.requested or next(filter(None, stops), "")

    def _take(self, step: int) -> list[Group]:
        """Groups of all hosts, in the order of the prompt stream."""
        groups = self.store.take(self.sampled, self.recorded, step)
        for group in groups[self.sampled :]:
            self.guard.note(group)
        if jax.process_count() == 1:
            return groups
        name = f"the groups of step {step}"
        gathered = multihost.allgather_bytes(encode_groups(groups), name, deadline=self.deadline)
        every = [group for content in gathered for group in decode_groups(content)]
        return sorted(every, key=lambda group: group.prompt.stream_index)

    def note(self, groups: Sequence[Group], step: int, responses: Mapping[str, np.ndarray]) -> None:
        """Notes what a gradient step computed of the groups that are kept; see `KeptNotes`."""
        if self.notes:
            self.notes.trained(groups, step, responses)

    def metrics(self) -> dict[str, float]:
        """Sampling since the last call, and ends of all groups so far."""
        sources = [self.store.take_metrics, self.store.counts]
        return {k: v for of in (*sources, *self.more_metrics) for k, v in of().items()}

    def snapshot(self) -> bytes:
        """This host's state for a checkpoint; the logs that it refers to are synced."""
        if self.notes:
            self.notes.sync()
        state = self.store.snapshot(self.writer.flush if self.writer else lambda: None)
        state["zero_reward_groups"], groups = self.guard.count, state["buffer"].pop("groups")
        return serialization.msgpack_serialize({"state": json.dumps(state), "groups": groups})

    def restore(self, host_states: Sequence[bytes], read: Callable[[Any], Any]) -> None:
        """Continues from the states of all hosts that saved; see `GroupStore.restore`."""
        saved = []
        for host_state in host_states:
            content: Any = serialization.msgpack_restore(host_state)
            saved.append(json.loads(content["state"]))
            saved[-1]["buffer"]["groups"] = content["groups"]
        host, hosts = jax.process_index(), jax.process_count()
        same = len(saved) == hosts
        state = saved[host] if same else reshard(saved, host=host, hosts=hosts)
        for gone in () if host else range(hosts, len(saved)):  # its groups are sampled again
            ledger = Ledger(self.workdir / multihost.per_host_path(FILE, gone))
            ledger.resume(saved[gone]["ledger"], ())
            ledger.close()
        self.store.restore(state, read)
        self.guard.count = state["zero_reward_groups"]
        if self.writer and state["shards"] is not None:  # None: saved while no group was kept
            self.writer.keep(state["shards"])

    def stop(self) -> None:
        """Stops sampling; prompts in flight are sampled again by the run that resumes."""
        self.worker.stop()

    def close(self) -> None:
        self.stop()
        self.ledger.close()
        for part in (self.writer, self.notes):
            if part:
                part.close()


def reshard(saved: Sequence[dict[str, Any]], *, host: int, hosts: int) -> dict[str, Any]:
    """The state with which one of `hosts` hosts continues the states of another number.

    Host h of H reserved the prompts h, H + h, 2 H + h, ... of one stream. It continues at the first
    round of the new hosts that begins at or before the position of the fastest host; prompts before
    it that were not trained on (held, outstanding, or not reached by a slower host) are sampled
    again, dealt out in turn. Every prompt is sampled, and up to hosts - 1 of them twice.
    """
    streams = [host_state["prompts"] for host_state in saved]
    positions = [stream["stream"]["stream_index"] for stream in streams]
    reached = max(positions)
    start = reached // hosts * hosts
    again = set()
    for old_host, (host_state, position) in enumerate(zip(saved, positions, strict=True)):
        held = decode_groups(host_state["buffer"]["groups"])
        again |= {group.prompt.stream_index for group in held}
        again |= {*host_state["again"], *host_state["prompts"]["chosen"]}
        again |= set(range(position + old_host, reached, len(saved)))
    same = saved[min(host, len(saved) - 1)]
    return {
        "prompts": {**streams[positions.index(reached)], "chosen": []},
        "again": sorted(index for index in again if index < start)[host::hosts],
        "totals": {},
        "scorer": same["scorer"],
        "ledger": same["ledger"] if host < len(saved) else 0,
        "recorded": saved[0]["recorded"],
        "zero_reward_groups": max(host_state["zero_reward_groups"] for host_state in saved),
        "shards": same["shards"],
    }
