"""Opens what a configuration names as the source of groups: sampler, buffer, worker, records."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from etils import epath

from oapl_jax import multihost as hosts
from oapl_jax.build import Job
from oapl_jax.check import recorded_groups
from oapl_jax.curriculum import CURRICULA, Curriculum
from oapl_jax.data.prompts import response_text
from oapl_jax.files import checksum
from oapl_jax.preferences import JUDGES, Preferences
from oapl_jax.preferences.comparators import RecordedComparators, SampledComparators
from oapl_jax.rollout.buffer import Buffer
from oapl_jax.rollout.dataset import Shards, ShardWriter, describe
from oapl_jax.rollout.ledger import FILE, Ledger, ZeroRewardGuard
from oapl_jax.rollout.recorded import Recorded
from oapl_jax.rollout.source import Supply
from oapl_jax.rollout.worker import Worker
from oapl_jax.structs import Group, Prompt, Rollout
from oapl_jax.weights import publisher


def open_supply(job: Job) -> Supply:
    """Opens what the configuration's `rollout` and `buffer` name.

    Raises:
      UserError: for a recorded set that is not of this task, tokenizer or model, or is damaged.
    """
    config = job.config
    ledger = Ledger(job.workdir / hosts.own(FILE))
    buffer = Buffer(**config.buffer, seed=config.seed, on_end=ledger.end)
    first = not jax.process_index()  # it alone takes from a recorded set
    recorded = open_recorded(job, ledger) if first and config.rollout.source != "live" else None
    writer = open_writer(job) if config.rollout.record else None
    if config.rollout.source == "shards":
        sampler = job.local_sampler(config.seed)  # never asked
    else:
        older_versions = config.buffer.mode != "clear_on_sync"
        sampler = job.new_sampler(config.seed, older_versions=older_versions)
    curriculum = open_curriculum(job)
    unpaid = ZeroRewardGuard(limit=config.rollout.unpaid_groups, decode=job.policy.tokenizer.decode)

    def record(group: Group) -> None:
        curriculum.teacher.ended(group)
        if writer:
            writer.add(group)
        unpaid.note(group)

    preferences = open_preferences(job) if job.compares else None
    worker = Worker(
        curriculum,
        sampler,
        preferences.reward if preferences else functools.partial(verify, job),
        buffer,
        ledger=ledger,
        record=record,
        group_size=config.group_size,
        sampling=job.sampling,
        prompts_per_call=config.rollout.prompts_per_call,
        reward_threads=config.rollout.reward_threads,
        deadline=config.rollout.deadline,
    )
    of_set = recorded_groups(config)
    live = (config.groups_per_step - of_set) // jax.process_count()
    return Supply(
        job,
        live,
        of_set if recorded else 0,
        ledger,
        buffer,
        curriculum,
        unpaid,
        sampler,
        worker,
        preferences,
        recorded,
        writer,
    )


def open_curriculum(job: Job) -> Curriculum:
    config, settings = job.config, job.config.curriculum
    teacher = CURRICULA[settings.name](
        rates=settings.rates,
        window=settings.window,
        curator=settings.curator,
        policy=job.policy.config,
        mesh=job.mesh,
        seed=config.seed,
        max_prompt_tokens=config.data.max_prompt_tokens,
        num_steps=config.num_steps,
    )
    return Curriculum(
        job.prompt_stream(),
        teacher,
        candidates=settings.candidates,
        picks=config.rollout.prompts_per_call,
        top_p=settings.top_p,
        seed=config.seed,
    )


def verify(job: Job, prompt: Prompt, rollouts: Sequence[Rollout]) -> np.ndarray:
    """float32[n], what the verifier of the task gives each rollout."""
    return np.array([job.grader.reward(prompt, rollout) for rollout in rollouts], np.float32)


def open_preferences(job: Job) -> Preferences:
    """Rewards by comparison, of version 0 or of a recorded set.

    Raises:
      UserError: for a judge or a set that can't be opened.
    """
    settings, count = job.config.preferences, job.config.preferences.comparators
    judge = JUDGES[settings.judge](**settings[settings.judge].to_dict())
    if settings.shards:
        comparators = RecordedComparators(epath.Path(settings.shards), about(job, {}), count=count)
    else:
        comparators = SampledComparators(
            job.local_sampler(job.config.seed + 2),  # other random numbers than the group's
            version=0,
            path=publisher.version_path(job.workdir / "versions", 0),
            count=count,
            sampling=job.sampling,
        )
    return Preferences(
        judge,
        comparators,
        beta=settings.beta,
        text=lambda rollout: response_text(job.policy.tokenizer, rollout.tokens),
        verify=job.grader.reward,
    )


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
        identify=lambda version: checksum(
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
