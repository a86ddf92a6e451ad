"""Records a dataset of rollouts from one version of the policy, to train on later.

    python -m oapl_jax.record --config=... --workdir=runs/a --to=runs/round1 [--step=N]

Each prompt of a split comes once, with group_size rewarded rollouts. The version is a checkpoint
step of the workdir, published to DIR/weights; with --version_dir a published version; or, if the
workdir has no checkpoint, the model that the configuration names. After a kill, the same command
samples the prompts that no shard has.
"""

import contextlib
import os
from collections.abc import Callable

from absl import flags
from etils import epath

from oapl_jax import multihost
from oapl_jax.build import Run
from oapl_jax.errors import UserError, exit_with_code
from oapl_jax.files import absolute, checksum, flag_directory
from oapl_jax.launch import read_command_line, use_compile_cache
from oapl_jax.rollout.dataset import DatasetWriter, fill
from oapl_jax.rollout.ledger import ZeroRewardGuard
from oapl_jax.tracking.progress import log
from oapl_jax.weights import lease, publisher
from oapl_jax.weights.checkpoint import Weights


def version_to_sample(
    run: Run, to: epath.Path, step: int | None, version_dir: str | None
) -> tuple[int, epath.Path]:
    """Finds the version that the flags name; publishes it below `to` if it is not published.

    Returns it and its directory; raises a UserError if there is no such checkpoint or version.
    """
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
    """Saves the weights of another program's checkpoint as an Orbax step for the publisher."""
    weights = Weights(to / "start", deadline=run.config.rollout.deadline)
    if not weights.steps():
        params = run.start_params()
        weights.save(0, params, run.versions.probe(params))
    weights.close()
    return weights.path(0)


def record_dataset(
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
    """Records the first `limit` prompts of a split (None: all) into the directory `to`.

    `progress` is called after each shard with the number of groups on disk. Raises a UserError if
    there is no such version, or `to` holds another dataset, and a RunError as `fill` does.
    """
    config, prompts = run.config, run.prompts(split)
    if limit is not None and not 0 < limit <= len(prompts):
        raise UserError(f"--prompts={limit} is not in 1..{len(prompts)}, the size of the split")
    prompts = prompts[:limit]
    run.check_grader()
    version, path = version_to_sample(run, to, step, version_dir)
    weights, n = checksum(path / publisher.MANIFEST), config.group_size
    made = dict(by="record", split=split, prompts=len(prompts), version=version, weights=weights)
    about = run.about(made | {"groups_per_shard": groups_per_shard})
    most, decode = config.rollout.max_zero_reward_groups, run.policy.tokenizer.decode
    guard = ZeroRewardGuard(limit=most, decode=decode)
    writer = DatasetWriter(
        to,
        about,
        groups_per_shard=groups_per_shard,
        weights_digest=lambda version: weights,
        decode=run.response_text,
    )
    with contextlib.closing(writer):
        sampler = run.open_sampler(seed=config.seed, allow_older=False)
        with contextlib.closing(sampler):
            sampler.refresh(version, path)
            fill(
                writer,
                prompts,
                sampler,
                run.grader.reward,
                version=version,
                n=n,
                at_once=n,
                sampling=run.sampling,
                reward_threads=config.rollout.reward_threads,
                note=guard.note,
                progress=lambda responses: progress(responses // n),
            )


def main() -> None:
    to = flags.DEFINE_string("to", None, "directory of the dataset")
    step = flags.DEFINE_integer("step", None, "checkpoint step; the newest by default")
    version_dir = flags.DEFINE_string("version_dir", None, "or a published version's directory")
    split = flags.DEFINE_enum("split", "train", ["train", "validation", "test"], "which prompts")
    limit = flags.DEFINE_integer("prompts", None, "how many of the split, from its beginning")
    groups_per_shard = flags.DEFINE_integer("groups_per_shard", 256, "groups of one file", 1)
    config, workdir = read_command_line()
    if to.value is None:
        raise UserError("--to is missing; add, for example, --to=runs/round1")
    if step.value is not None and version_dir.value is not None:
        raise UserError("--step and --version_dir both name a version; give one of them")
    directory = flag_directory("to", to.value)
    use_compile_cache(config.compile_cache, workdir)
    with (
        lease.hold_bucket(directory, log=log, lost=multihost.exit_now, of="--to"),
        contextlib.closing(Run(config, workdir)) as run,
    ):
        record_dataset(
            run,
            directory,
            step=step.value,
            version_dir=version_dir.value,
            split=split.value,
            limit=limit.value,
            groups_per_shard=groups_per_shard.value,
            progress=lambda done: log(f"{done} groups in {directory}"),
        )


if __name__ == "__main__":
    exit_with_code(main)
