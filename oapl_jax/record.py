"""Makes a set of rollouts with one fixed version, to train on later (recorded.py).

    python -m oapl_jax.record --config=... --workdir=runs/a --to=runs/round1 [--step=N]

Each prompt of a split comes once, with exactly group_size rewarded rollouts. The version is a
checkpoint step of the workdir, published to DIR/weights; with --version_dir one that stands
already; or, if the workdir has no checkpoint, the model that the configuration names. What a kill
leaves is whole shards, and the same command makes the others: shard k holds the k-th portion of the
prompts, whoever samples it and in whatever order it comes.
"""

import os
from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
from absl import flags
from etils import epath

from oapl_jax import build
from oapl_jax.build import Run
from oapl_jax.config import Config
from oapl_jax.errors import RunError, UserError, exit_with_code
from oapl_jax.files import absolute, checksum
from oapl_jax.launch import read_command_line, use_compile_cache
from oapl_jax.rollout.dataset import ShardWriter
from oapl_jax.rollout.ledger import ZeroRewardGuard
from oapl_jax.rollout.sampler import Sampled, Sampler, Sampling
from oapl_jax.structs import Group, Prompt, Rollout
from oapl_jax.tracking.progress import say
from oapl_jax.weights import publisher
from oapl_jax.weights.checkpoint import Weights


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
    run: Run, to: epath.Path, step: int | None, version_dir: str | None
) -> tuple[int, epath.Path]:
    """The version to sample from and its directory, published below `to` if need be."""
    steps, start = run.checkpoints.steps(), run.policy.checkpoint
    if version_dir is None and step is None and not steps and start:
        if not (start / publisher.MANIFEST).exists():
            return 0, run.versions.publish_step(_as_step(run, to), 0, to / "weights")
        version_dir = os.fspath(start)
    if version_dir is not None:
        path = absolute(version_dir)
        publisher.check_version(path)
        return publisher.read_manifest(path)["version"], path
    found = run.checkpoint_step(step)
    source = run.workdir / "checkpoints" / str(found)
    return found, run.versions.publish_step(source, found, to / "weights")


def _as_step(run: Run, to: epath.Path) -> epath.Path:
    """The weights of another program's checkpoint as an Orbax step, which the publisher reads."""
    weights = Weights(to / "start")
    if not weights.steps():
        params = run.policy.load_params(run.mesh)
        weights.save(0, params, run.versions.probe(params))
    weights.close()
    return weights.path(0)


def make_set(
    config: Config,
    run: Run,
    to: epath.Path,
    *,
    step: int | None,
    version_dir: str | None,
    split: str,
    limit: int | None,
    groups_per_shard: int,
    progress: Callable[[int], None],
) -> None:
    """The whole command, in a run that is open.

    Raises:
      UserError: if there is no such version or split, or `to` holds another set.
      RunError: see `fill`.
    """
    prompts = build.split_prompts(config, run, split)
    if limit is not None and not 0 < limit <= len(prompts):
        raise UserError(f"--prompts={limit} is asked of a split of {len(prompts)} prompts")
    prompts = prompts[:limit]
    build.check_grader(config, run)
    version, path = fixed_version(run, to, step, version_dir)
    weights = checksum(path / publisher.MANIFEST)
    made = {
        "by": "generate",
        "split": split,
        "prompts": len(prompts),
        "groups_per_shard": groups_per_shard,
        "version": version,
        "weights": weights,
    }
    writer = ShardWriter(
        to,
        build.about(config, run, made),
        groups_per_shard=groups_per_shard,
        identify=lambda version: weights,
    )
    guard = ZeroRewardGuard(
        limit=config.rollout.max_zero_reward_groups, decode=run.policy.tokenizer.decode
    )
    sampler = build.open_sampler(config, run, seed=config.seed, older_versions=False)
    try:
        sampler.refresh(version, path)
        fill(
            writer,
            prompts,
            sampler,
            run.grader.reward,
            version=version,
            n=config.group_size,
            sampling=run.sampling,
            groups_per_shard=groups_per_shard,
            reward_threads=config.rollout.reward_threads,
            note=guard.note,
            progress=progress,
        )
    finally:
        sampler.close()


def main() -> None:
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
    use_compile_cache(config.compile_cache, workdir)
    run = build.open_run(config, workdir)
    try:
        make_set(
            config,
            run,
            directory,
            step=step.value,
            version_dir=version_dir.value,
            split=split.value,
            limit=limit.value,
            groups_per_shard=groups_per_shard.value,
            progress=lambda done: say(f"{done} groups in {directory}"),
        )
    finally:
        run.close()


if __name__ == "__main__":
    exit_with_code(main)
