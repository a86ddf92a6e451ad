"""Where groups come from: sampled live, recorded before, or both; opened, saved, stopped as one."""

import dataclasses
import json
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from etils import epath

from oapl_jax import multihost as hosts
from oapl_jax.build import Job
from oapl_jax.curriculum import Curriculum
from oapl_jax.errors import FleetLost, RunError
from oapl_jax.preferences import Preferences
from oapl_jax.resize import take_over
from oapl_jax.rollout.buffer import Buffer, flatten, unflatten
from oapl_jax.rollout.dataset import ShardWriter
from oapl_jax.rollout.ledger import FILE, Ledger, ZeroRewardGuard, rewind
from oapl_jax.rollout.recorded import Recorded
from oapl_jax.rollout.sampler import Sampler
from oapl_jax.rollout.worker import Worker
from oapl_jax.structs import Group
from oapl_jax.tracking.progress import StopRequest


@dataclasses.dataclass(frozen=True)
class Supply:
    job: Job
    live: int  # groups of a gradient step that this host samples
    from_record: int  # and those that it takes from a recorded set
    ledger: Ledger
    buffer: Buffer
    curriculum: Curriculum
    unpaid: ZeroRewardGuard
    sampler: Sampler
    worker: Worker
    preferences: Preferences | None
    recorded: Recorded | None
    writer: ShardWriter | None
    in_use: set[int] = dataclasses.field(default_factory=set)  # versions, by all hosts

    def serve(self, version: int, path: epath.Path) -> None:
        """The version that is due samples from now on."""
        if self.live and self.worker.version != version:
            self.worker.serve(version, path)

    def versions(self) -> set[int]:
        """Versions that are sampled from, or that held groups refer to, on any host.

        Of several hosts, those that they said when they last took a step: until another version
        serves, none is added to them. Before the first step the pins have what buffers refer to.
        """
        return self._versions() if jax.process_count() == 1 else self.in_use

    def _versions(self) -> set[int]:
        return self.worker.versions() | self.buffer.versions()

    def collect(self, step: int, stop: StopRequest) -> tuple[list[Group], float]:
        """The groups of one gradient step, the same on all hosts (none: stopped), and the seconds
        waited for them."""
        self.buffer.expire(step)
        started, lost = time.monotonic(), ""
        try:
            self._await(step, stop)
        except FleetLost as error:
            lost = str(error)
        self._agree(step, stop, lost)
        # Whoever stops leaves the groups in the buffer, and the checkpoint has them.
        groups = [] if stop.requested else self._of_all_hosts(self._take(step), step)
        return groups, time.monotonic() - started

    def _await(self, step: int, stop: StopRequest) -> None:
        """Returns when this host's part of the live groups is in the buffer, or on a stop."""
        config, buffer, worker = self.job.config, self.buffer, self.worker
        started, enough = time.monotonic(), lambda: len(buffer) >= self.live
        what = f"{self.live} groups for step {step} (rollout.deadline)"
        if config.rollout.overlap and self.live:
            worker.start()
            buffer.wait(
                lambda: enough() or bool(stop.requested),
                what=what,
                deadline=config.rollout.deadline,
                alive=worker.check,
            )
        # Replay has enough for long: without fresh groups it would see the first ones only.
        fresh = self.live and config.buffer.mode == "replay"
        fresh = fresh and buffer.has_room(config.rollout.prompts_per_call)
        while not (config.rollout.overlap or stop.requested) and (fresh or not enough()):
            worker.produce()
            fresh = False
            if time.monotonic() - started > config.rollout.deadline:
                seconds = f"{config.rollout.deadline:.0f} s"
                raise RunError(
                    f"sampled {seconds} for {what}; what became of groups: {buffer.counts}"
                )

    def _agree(self, step: int, stop: StopRequest, lost: str) -> None:
        """All hosts stop if one does, and know which versions any of them uses.

        Raises:
          FleetLost: if one has lost its servers.
          HostLost: if one does not come.
        """
        deadline = self.job.config.rollout.deadline
        hosts.meet(f"step {step}", deadline=deadline)
        mine = json.dumps([stop.requested, lost, sorted(self._versions())]).encode()
        said = hosts.gather(mine, f"the state at step {step}", deadline=deadline)
        stops, losses, versions = zip(*map(json.loads, said), strict=True)
        self.in_use.clear()
        self.in_use.update(*versions)
        if any(losses):
            raise FleetLost(next(filter(None, losses)))
        stop.requested = stop.requested or next(filter(None, stops), "")

    def _of_all_hosts(self, groups: list[Group], step: int) -> list[Group]:
        """The groups of a step, the same on all hosts, in the order of their draws."""
        if jax.process_count() == 1:
            return groups
        mine, deadline = hosts.encode(*flatten(groups)), self.job.config.rollout.deadline
        said = hosts.gather(mine, f"the groups of step {step}", deadline=deadline)
        everyone = [group for content in said for group in unflatten(*hosts.decode(content))]
        return sorted(everyone, key=lambda group: group.prompt.stream_index)

    def _take(self, step: int) -> list[Group]:
        groups = self.buffer.sample(self.live, step)
        if self.recorded:
            with self.buffer.lock:  # for the ledger
                taken = self.recorded.take(self.from_record, step)
            for group in taken:
                self.unpaid.note(group)
            groups += taken
        return groups

    def learned(self, groups: list[Group], rescore: Callable[[], Any]) -> None:
        """Tells the curriculum what a gradient step was taken on.

        Args:
          groups: of the step.
          rescore: gives [S, C], the log-probs of their tokens by the learner after the step;
            called only if the curriculum needs them.
        """
        teacher, logp = self.curriculum.teacher, None
        if teacher.rescores:
            logp = np.asarray(rescore())
        with self.buffer.lock:
            teacher.trained(groups, logp)

    def metrics(self) -> dict[str, float]:
        """What was sampled since the last call, and what became of all groups so far."""
        counts = {f"buffer/{name}": count for name, count in self.buffer.counts.items()}
        recorded = self.recorded.counts if self.recorded else {}
        counts |= {f"recorded/{name}": count for name, count in recorded.items()}
        counts |= self.job.grader.metrics() | self.curriculum.metrics()
        counts["prompts/dropped"] = self.curriculum.dropped
        counts |= self.preferences.metrics() if self.preferences else {}
        return {**self.worker.take_metrics(), **self.sampler.metrics(), **counts}

    def state(self) -> bytes:
        """This host's share of a checkpoint."""
        with self.buffer.lock:  # buffer, place in the prompts and end of the ledger agree
            buffer, groups = self.buffer.state()
            worker = self.worker.state()
            to_come = {*worker["prompts"]["chosen"], *worker["again"]}
            state = {
                "buffer": buffer,
                "worker": worker,
                "teacher": self.curriculum.teacher.state(to_come | self.buffer.draws()),
                "ledger": self.ledger.position(),
                "recorded": self.recorded.state() if self.recorded else None,
                "unpaid": self.unpaid.count,
                "shards": self.writer.flush() if self.writer else None,
            }
        return hosts.encode(state, groups)

    def restore(self, shares: list[bytes], read: Callable[[Any], Any]) -> None:
        """Goes on from the shares of all hosts that saved.

        Args:
          shares: as `state` gave them. If they are of another number of hosts, what was in their
            buffers is sampled again: see resize.py.
          read: takes the teacher's arrays for their shapes and shardings; gives those saved.
        """
        saved = [hosts.decode(share) for share in shares]
        host, count = jax.process_index(), jax.process_count()
        if len(saved) == count:
            state, groups = saved[host]
            self.buffer.restore(state["buffer"], groups)
        else:
            state = take_over([state for state, _ in saved], host=host, hosts=count)
            if not host:
                for gone in range(count, len(saved)):
                    rewind(self.job.workdir / hosts.own(FILE, gone), saved[gone][0]["ledger"])
        self.worker.restore(state["worker"])
        self.curriculum.teacher.restore(state["teacher"], read, self.curriculum.at)
        self.ledger.resume(state["ledger"], self.buffer.draws())
        self.unpaid.count = state["unpaid"]
        if self.recorded:
            self.recorded.restore(state["recorded"])
        if self.writer:
            self.writer.keep(state["shards"])

    def stop(self) -> None:
        """Nothing is sampled any more; what was in flight is sampled again by who resumes."""
        self.worker.stop()

    def close(self) -> None:
        self.stop()
        self.ledger.close()
