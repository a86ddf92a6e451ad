"""Where groups come from: sampled live, recorded before, or both; opened, saved, stopped as one."""

import dataclasses
import time
from typing import Any

import numpy as np
from etils import epath

from oapl_jax import publisher
from oapl_jax.buffer import Buffer
from oapl_jax.errors import RunError
from oapl_jax.job import Job
from oapl_jax.report.progress import StopRequest
from oapl_jax.rollout.ledger import Ledger
from oapl_jax.rollout.recorded import Recorded
from oapl_jax.rollout.sampler import Sampler
from oapl_jax.rollout.shards import Shards, ShardWriter, describe
from oapl_jax.rollout.worker import Worker
from oapl_jax.structs import Group


@dataclasses.dataclass(frozen=True)
class Supply:
    job: Job
    live: int  # groups of a gradient step that are sampled; the others are recorded ones
    ledger: Ledger
    buffer: Buffer
    sampler: Sampler
    worker: Worker
    recorded: Recorded | None
    writer: ShardWriter | None

    def serve(self, version: int, path: epath.Path) -> None:
        """The version that is due samples from now on."""
        if self.live and self.worker.version != version:
            self.worker.serve(version, path)

    def versions(self) -> set[int]:
        """Versions that are sampled from, or that held groups refer to."""
        return self.worker.versions() | self.buffer.versions()

    def collect(self, step: int, stop: StopRequest) -> tuple[list[Group], float]:
        """The groups of one gradient step (none: stopped), and the seconds waited for them."""
        config, buffer, worker = self.job.config, self.buffer, self.worker
        buffer.expire(step)
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
        # Whoever stops leaves the groups in the buffer, and the checkpoint has them.
        groups = [] if stop.requested else self._take(step)
        return groups, time.monotonic() - started

    def _take(self, step: int) -> list[Group]:
        groups = self.buffer.sample(self.live, step)
        if self.recorded:
            with self.buffer.lock:  # for the ledger
                groups += self.recorded.take(self.job.config.groups_per_step - self.live, step)
        return groups

    def metrics(self) -> dict[str, float]:
        """What was sampled since the last call, and what became of all groups so far."""
        counts = {f"buffer/{name}": count for name, count in self.buffer.counts.items()}
        recorded = self.recorded.counts if self.recorded else {}
        counts |= {f"recorded/{name}": count for name, count in recorded.items()}
        rewards = self.job.grader.metrics()
        return {**self.worker.take_metrics(), **self.sampler.metrics(), **rewards, **counts}

    def state(self) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        """What a checkpoint needs: JSON-able data and flat arrays."""
        with self.buffer.lock:  # buffer, place in the prompts and end of the ledger agree
            buffer, groups = self.buffer.state()
            state = {
                "buffer": buffer,
                "worker": self.worker.state(),
                "ledger": self.ledger.position(),
                "recorded": self.recorded.state() if self.recorded else None,
                "shards": self.writer.flush() if self.writer else None,
            }
        return state, groups

    def restore(self, state: dict[str, Any], groups: dict[str, np.ndarray]) -> None:
        self.buffer.restore(state["buffer"], groups)
        self.worker.restore(state["worker"])
        self.ledger.resume(state["ledger"], self.buffer.draws())
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


def open_supply(job: Job) -> Supply:
    """Opens what the configuration's `rollout` and `buffer` name.

    Raises:
      UserError: for a recorded set that is not of this task, tokenizer or model, or is damaged.
    """
    config = job.config
    ledger = Ledger(job.workdir / "ledger.jsonl")
    buffer = Buffer(**config.buffer, seed=config.seed, on_end=ledger.end)
    recorded = open_recorded(job, ledger) if config.rollout.source != "live" else None
    writer = open_writer(job) if config.rollout.record else None
    recorded_groups = {
        "live": 0,
        "both": round(config.rollout.recorded_share * config.groups_per_step),
        "shards": config.groups_per_step,
    }[config.rollout.source]
    if config.rollout.source == "shards":
        sampler = job.local_sampler(config.seed)  # never asked
    else:
        older_versions = config.buffer.mode != "clear_on_sync"
        sampler = job.new_sampler(config.seed, older_versions=older_versions)
    worker = Worker(
        job.prompt_stream(),
        sampler,
        job.grader.reward,
        buffer,
        ledger=ledger,
        record=writer.add if writer else lambda group: None,
        group_size=config.group_size,
        sampling=job.sampling,
        prompts_per_call=config.rollout.prompts_per_call,
        reward_threads=config.rollout.reward_threads,
        deadline=config.rollout.deadline,
    )
    live = config.groups_per_step - recorded_groups
    return Supply(job, live, ledger, buffer, sampler, worker, recorded, writer)


def open_recorded(job: Job, ledger: Ledger) -> Recorded:
    rollout = job.config.rollout
    shards = Shards(epath.Path(rollout.shards))
    shards.check(about(job, {}), max_prompt_tokens=job.config.data.max_prompt_tokens)
    return Recorded(
        shards,
        order=rollout.recorded_order,
        seed=job.config.seed,
        policy_version=rollout.recorded_version if rollout.recorded_version >= 0 else None,
        start=job.policy.checkpoint,
        drop_zero_variance=job.config.buffer.zero_variance == "drop",
        ledger=ledger,
    )


def open_writer(job: Job) -> ShardWriter:
    versions = job.workdir / "versions"
    writer = ShardWriter(
        job.workdir / "rollouts",
        about(job, {"by": "train"}),
        groups_per_shard=job.config.rollout.groups_per_shard,
        identify=lambda version: publisher.checksum(
            publisher.version_path(versions, version) / publisher.MANIFEST
        ),
    )
    if not job.checkpoints.steps():
        writer.keep(0)  # of a run that was killed before its first checkpoint
    return writer


def about(job: Job, made: dict[str, Any]) -> dict[str, Any]:
    """What the manifest of a recorded set says of its task, model and sampling."""
    return describe(
        task=job.config.data.task,
        tokenizer=job.policy.tokenizer,
        model=job.policy.config,
        sampling=job.sampling,
        group_size=job.config.group_size,
        made=made,
    )
