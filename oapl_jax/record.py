"""Makes a set of rollouts with one fixed version, to train on later (recorded.py).

    python -m oapl_jax.record --config=... --workdir=runs/a --to=runs/round1 [--step=N]

Each prompt of a split comes once, with exactly group_size rewarded rollouts. The version is a
checkpoint step of the workdir, published to DIR/weights; with --version_dir one that stands
already; or, if the workdir has no checkpoint, the model that the configuration names. What a kill
leaves is whole shards, and the same command makes the others: shard k holds the k-th portion of the
prompts, whoever samples it and in whatever order it comes.
"""

from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
from absl import flags
from etils import epath

from oapl_jax.errors import RunError, UserError, exit_with_code
from oapl_jax.files import absolute, checksum
from oapl_jax.rollout.dataset import ShardWriter, describe
from oapl_jax.rollout.ledger import ZeroRewardGuard
from oapl_jax.rollout.sampler import Sampled, Sampler, Sampling
from oapl_jax.structs import Group, Prompt, Rollout
from oapl_jax.weights import publisher


def fill(
    writer: ShardWriter,
    prompts: Sequence[Prompt],
    sampler: Sampler,
    reward: Callable[[Prompt, Rollout], float],
    *,
    version: int,
    n: int,
    sampling: Sampling,
    groups_per_shard: int,
    reward_threads: int,
    note: Callable[[Group], None],
    progress: Callable[[int], None],
) -> None:
    """Samples and rewards the prompts of every shard that is not there yet.

    Args:
      writer: of the set.
      prompts: of the whole set.
      sampler: holds the policy.
      reward: called in threads.
      version: of the policy; a group of another one is not taken.
      n: rollouts a prompt.
      sampling: how tokens are drawn.
      groups_per_shard: the k-th so many prompts are shard k.
      reward_threads: groups rewarded at a time.
      note: takes each rewarded group, and may raise.
      progress: hears how many groups are in whole shards.

    Raises:
      RunError: if prompts could not be sampled; the other shards are there.
    """
    shard_of = {prompt.stream_index: i // groups_per_shard for i, prompt in enumerate(prompts)}
    missing: dict[int, dict[int, Group | None]] = defaultdict(dict)  # shard -> draw -> group
    there = writer.indices()
    for prompt in prompts:
        if shard_of[prompt.stream_index] not in there:
            missing[shard_of[prompt.stream_index]][prompt.stream_index] = None
    wanted = [prompt for prompt in prompts if shard_of[prompt.stream_index] in missing]
    done = len(prompts) - len(wanted)

    def rewarded(sampled: Sampled) -> Group:
        rewards = [reward(sampled.prompt, rollout) for rollout in sampled.rollouts]
        return Group(sampled.prompt, sampled.rollouts, np.array(rewards, np.float32))

    with ThreadPoolExecutor(reward_threads, thread_name_prefix="reward") as graders:
        rewarding: deque[Future[Group]] = deque()

        def settle(until: int) -> None:
            nonlocal done
            while len(rewarding) > until or (rewarding and rewarding[0].done()):
                group = rewarding.popleft().result()
                note(group)
                index = shard_of[group.prompt.stream_index]
                missing[index][group.prompt.stream_index] = group
                groups = [group for group in missing[index].values() if group is not None]
                if len(groups) == len(missing[index]):
                    writer.write(index, groups)
                    del missing[index]
                    done += len(groups)
                    progress(done)

        for sampled in sampler.generate(wanted, n=n, sampling=sampling):
            if {rollout.policy_version for rollout in sampled.rollouts} == {version}:
                rewarding.append(graders.submit(rewarded, sampled))
            settle(until=2 * groups_per_shard)
        settle(until=0)
    lost = [draw for groups in missing.values() for draw, group in groups.items() if group is None]
    if lost:
        raise RunError(
            f"{len(lost)} of {len(prompts)} prompts were not sampled from version {version}, so "
            f"{len(missing)} shards are missing; the same command makes them"
        )


def fixed_version(
    job: Any, to: epath.Path, step: int | None, version_dir: str | None
) -> tuple[int, epath.Path]:
    """The version to sample from and its directory, published below `to` if need be."""
    steps, start = job.checkpoints.steps(), job.policy.checkpoint
    if version_dir is None and step is None and not steps and start:
        if not (start / publisher.MANIFEST).exists():
            return 0, _publish(job, to, 0, _as_step(job, to))
        version_dir = start
    if version_dir is not None:
        path = absolute(version_dir)
        publisher.check_version(path)
        return publisher.read_manifest(path)["version"], path
    if not steps or (step is not None and step not in steps):
        have = ", ".join(map(str, steps)) or "none"
        raise UserError(
            f"{job.workdir} has no checkpoint step {'' if step is None else step} (have: {have}); "
            "choose one, or train first"
        )
    found: int = steps[-1] if step is None else step
    return found, _publish(job, to, found, job.workdir / "checkpoints" / str(found))


def _as_step(job: Any, to: epath.Path) -> epath.Path:
    """The weights of another program's checkpoint as an Orbax step, which the publisher reads."""
    from oapl_jax.weights.checkpoint import Weights  # it knows of this module's floor

    weights = Weights(to / "start")
    if not weights.steps():
        params = job.policy.load_params(job.mesh)
        weights.save(0, params, job.probe(params))
    weights.close()
    return weights.path(0)


def _publish(job: Any, to: epath.Path, version: int, source: epath.Path) -> epath.Path:
    return publisher.publish(
        source,
        job.policy.config,
        version=version,
        directory=to / "weights",
        tokenizer=job.policy.tokenizer,
        dtype=job.config.publish_dtype,
        config_hash=publisher.config_hash(job.config.to_dict()),
    )


def make_set(
    job: Any,
    to: epath.Path,
    *,
    step: int | None,
    version_dir: str | None,
    split: str,
    limit: int | None,
    groups_per_shard: int,
    progress: Callable[[int], None],
) -> None:
    """The whole command, in a job that is open.

    Raises:
      UserError: if there is no such version or split, or `to` holds another set.
      RunError: see `fill`.
    """
    prompts = job.split_prompts(split)
    if limit is not None and not 0 < limit <= len(prompts):
        raise UserError(f"--prompts={limit} is asked of a split of {len(prompts)} prompts")
    prompts = prompts[:limit]
    job.check_rewards()
    version, path = fixed_version(job, to, step, version_dir)
    weights = checksum(path / publisher.MANIFEST)
    about = describe(
        task=job.config.data.task,
        tokenizer=job.policy.tokenizer,
        model=job.policy.config,
        sampling=job.sampling,
        group_size=job.config.group_size,
        made={
            "by": "generate",
            "split": split,
            "prompts": len(prompts),
            "groups_per_shard": groups_per_shard,
            "version": version,
            "weights": weights,
        },
    )
    writer = ShardWriter(
        to, about, groups_per_shard=groups_per_shard, identify=lambda version: weights
    )
    unpaid = ZeroRewardGuard(
        limit=job.config.rollout.unpaid_groups, decode=job.policy.tokenizer.decode
    )
    sampler = job.new_sampler(job.config.seed, older_versions=False)
    try:
        sampler.refresh(version, path)
        fill(
            writer,
            prompts,
            sampler,
            job.grader.reward,
            version=version,
            n=job.config.group_size,
            sampling=job.sampling,
            groups_per_shard=groups_per_shard,
            reward_threads=job.config.rollout.reward_threads,
            note=unpaid.note,
            progress=progress,
        )
    finally:
        sampler.close()


def main() -> None:
    from oapl_jax.build import open_job
    from oapl_jax.compile_cache import keep_programs
    from oapl_jax.launch import read_command_line  # these know of this module's floor
    from oapl_jax.tracking.progress import say

    to = flags.DEFINE_string("to", None, "directory of the set")
    step = flags.DEFINE_integer("step", None, "checkpoint step; the newest by default")
    version_dir = flags.DEFINE_string("version_dir", None, "or a published version's directory")
    split = flags.DEFINE_enum("split", "train", ["train", "validation", "test"], "which prompts")
    limit = flags.DEFINE_integer("prompts", None, "how many of the split, from its beginning")
    groups_per_shard = flags.DEFINE_integer("groups_per_shard", 256, "prompts of one file", 1)
    config, workdir = read_command_line()
    if to.value is None:
        raise UserError("--to is missing; add, for example, --to=runs/round1")
    if step.value is not None and version_dir.value is not None:
        raise UserError("--step and --version_dir both name a version; give one of them")
    directory = absolute(to.value)
    keep_programs(config, workdir)
    job = open_job(config, workdir)
    try:
        make_set(
            job,
            directory,
            step=step.value,
            version_dir=version_dir.value,
            split=split.value,
            limit=limit.value,
            groups_per_shard=groups_per_shard.value,
            progress=lambda done: say(f"{done} groups in {directory}"),
        )
    finally:
        job.close()


if __name__ == "__main__":
    exit_with_code(main)
