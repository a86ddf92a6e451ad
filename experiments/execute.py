"""Execution of one point in a worker process: warm-up, recording or training, then grading."""

import contextlib
import dataclasses
import fcntl
import json
import os
import sys
import time
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from etils import epath

from configs.common import Config as ConfigValues
from experiments.manifest import data_checksums, lag_histogram
from experiments.measures import STRIDE
from experiments.sweep import Line, Point, benchmark_results
from oapl_jax import build, train
from oapl_jax.config import Config as Typed
from oapl_jax.errors import NotFinite
from oapl_jax.evaluate import evaluate_benchmarks
from oapl_jax.files import write_atomically
from oapl_jax.record import record_dataset
from oapl_jax.rollout.dataset import Dataset, read_manifest
from oapl_jax.tracking.metrics import read_lines
from oapl_jax.tracking.progress import Progress, StopRequest, log


def execute(run: Point, root: epath.Path, stop: StopRequest) -> None:
    """Executes a run to its end or until a stop is requested; resumes an earlier try.

    Writes log.txt and, at the end, the outcome file: "ended" with the metrics, or "failed" with the
    reason if loss or gradient were not finite; the lags and checksums are for the manifest. Any
    other error is raised and leaves no outcome.
    """
    workdir = run.workdir(root)
    workdir.mkdir(parents=True, exist_ok=True)
    with (workdir / "log.txt").open("a") as file, contextlib.ExitStack() as closing:
        closing.callback(sys.stdout.flush)
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        # A worker of a launcher that was killed may still be saving.
        fcntl.flock(file, fcntl.LOCK_EX)
        closing.callback(fcntl.flock, file, fcntl.LOCK_UN)
        if run.outcome(root).exists():
            return
        started = time.process_time()
        outcome = {"warm_up": warm_up, "generate": generate, "train": trained}[run.kind](
            run, root, stop
        )
        if outcome is not None:
            outcome["lags"] = lag_histogram(read_lines(workdir / "metrics.jsonl"))
            outcome["data"] = data_checksums(run.resolve(root).data.data_dir)
            outcome["core_seconds"] = round(time.process_time() - started, 1)
            write_atomically(run.outcome(root), [json.dumps(outcome).encode()])


def warm_up(run: Point, root: epath.Path, stop: StopRequest) -> dict[str, Any] | None:
    """Runs and grades the supervised stage; a stopped one restarts from step 0."""
    config = typed(run.resolve(root))
    # Graded once, below.
    unevaluated = dataclasses.replace(config.evaluation, every=0)
    config = dataclasses.replace(config, evaluation=unevaluated)
    with contextlib.closing(build.Run(config, run.workdir(root))) as opened:
        begun = train.init_run(opened, stop)
        if begun is None:
            return None
        opened.versions.publish(0, begun[0].params)
        if stop.requested:
            return None
        return {"outcome": "ended", **grade(opened, 0, begun[0].params, run)}


def typed(config: ConfigValues) -> Typed:
    return Typed.from_dict(config.to_dict())


def generate(run: Point, root: epath.Path, stop: StopRequest) -> dict[str, Any] | None:
    """Records one group for each of the first `run.prompts` training prompts, from version 0."""
    assert run.start is not None
    config, rollouts = typed(run.resolve(root)), run.workdir(root) / "rollouts"
    progress = Progress("generate", run.prompts, 0)
    with contextlib.closing(build.Run(config, run.workdir(root))) as opened:
        record_dataset(
            opened,
            rollouts,
            step=None,
            version_dir=config.model.path,
            split="train",
            limit=run.prompts or None,
            groups_per_shard=256,
            progress=lambda done: progress.step(done, {}),
        )
    if stop.requested:
        return None
    shards = Dataset(rollouts).manifest["shards"]
    return {"outcome": "ended", "shards": [shard["xxh128"] for shard in shards.values()]}


def trained(run: Point, root: epath.Path, stop: StopRequest) -> dict[str, Any] | None:
    """Trains, and grades the last policy on `run.split`; a run that is not finite has metrics up to
    its last step and no grade."""
    config, workdir = typed(run.resolve(root)), run.workdir(root)
    opened = build.Run(config, workdir)
    if run.forget_every:
        opened.optimizer = resetting(opened.optimizer, every=run.forget_every)
    try:
        ended = train.train(opened, stop)
    except NotFinite as error:
        metrics = summary(read_lines(workdir / "metrics.jsonl"), config, run)
        return {"outcome": "failed", "reason": str(error), **metrics}
    if ended is None:
        return None
    with contextlib.closing(build.Run(config, workdir)) as opened:
        if run.publish:
            opened.versions.publish(config.num_steps, ended[1].params)
        graded = grade(opened, config.num_steps, ended[1].params, run)
    metrics = summary(read_lines(workdir / "metrics.jsonl"), config, run)
    return {"outcome": "ended", **graded, **metrics}


def grade(opened: build.Run, step: int, params: Any, run: Point) -> dict[str, Any]:
    """Results of a policy on the point's split, or on its benchmarks."""
    if run.benchmarks:
        for at in run.at_steps or (step,):
            directory = opened.workdir / "evaluation"
            n = run.samples or opened.config.evaluation.n
            evaluate_benchmarks(
                opened, run.benchmarks, directory, step=at, version_dir=None, n=n, log=log
            )
        return benchmark_results(opened.workdir)
    if not run.split:
        return {}
    evaluation = dataclasses.replace(opened.config.evaluation, **run.grading)
    opened.config = dataclasses.replace(opened.config, evaluation=evaluation)
    graded = opened.evaluate(step, params, run.split)
    return {run.split: {k: v for k, v in graded.items() if not isinstance(v, tuple)}}


def collect(run: Point, root: epath.Path, graded: Mapping[str, Any]) -> Line:
    """The outcome of a point that the commands of oapl_jax executed, from the files of its workdir.

    Args:
      graded: what oapl_jax.evaluate printed of the point's split, if it has one.
    """
    workdir = run.workdir(root)
    config, lines = typed(run.resolve(root)), read_lines(workdir / "metrics.jsonl")
    found: Line = {"outcome": "ended"}
    if run.kind == "generate":
        shards = read_manifest(workdir / "rollouts")["shards"]
        found["shards"] = [shard["xxh128"] for shard in shards.values()]
    elif graded:
        found[run.split] = {k: v for k, v in graded.items() if not isinstance(v, list)}
    return {
        **found,
        **benchmark_results(workdir),
        **summary(lines, config, run),
        "lags": lag_histogram(lines),
        "data": data_checksums(config.data.data_dir),
    }


def summary(lines: list[dict[str, Any]], config: Typed, run: Point) -> dict[str, Any]:
    """Summarises metrics.jsonl, which omits values that are not finite; {} without a step.

    Returns:
      "generations": rollouts sampled so far; those of a recorded dataset count once;
      "skipped": steps that were not finite;
      "drift": KL(pi_lag || pi) in nats a token before the last step of a window, mean over windows
        (0 at lag 1, where each step starts at pi_lag), if a window was completed;
      "progress": step, generations, pass@1 and entropy of each validation;
      "validation": pass@k of each validation, by k, if it has more than pass@1;
      "curve": kl, entropy and reward of every STRIDE-th step.
    """
    if not lines:
        return {}
    # A completed run ends with a window.
    after = 0.0 if lines[-1]["step"] == config.num_steps else np.inf
    lag = [*(line["lag/mean"] for line in lines), after]
    ends = [line for line, now, then in zip(lines, lag, lag[1:], strict=False) if then <= now]
    drift = [line["kl"] for line in ends if "kl" in line]
    recorded = run.stream.prompts * config.group_size if run.stream and run.stream.prompts else None

    def generations(line: Mapping[str, Any]) -> int:
        groups = line["buffer/added"] if not run.stream else line["recorded/taken"]
        return int(min(groups * config.group_size, recorded or np.inf))

    graded = [line for line in lines if "eval/pass@1" in line]
    validation = {
        f"pass@{k}": [line[f"eval/pass@{k}"] for line in graded]
        for k in config.evaluation.ks
        if graded
    }
    return {
        "generations": generations(lines[-1]),
        "skipped": int(lines[-1]["skipped"]),
        "progress": [
            [line["step"], generations(line), line["eval/pass@1"], line["eval/entropy"]]
            for line in graded
        ],
        "curve": {
            key: [
                float(f"{line[key]:.3g}") if key in line else None
                for line in lines[STRIDE - 1 :: STRIDE]
            ]
            for key in ("kl", "entropy", "reward")
        },
        **({"drift": float(np.mean(drift))} if drift and len(drift) == len(ends) else {}),
        **({"validation": validation} if len(validation) > 1 else {}),
    }


def resetting(
    optimizer: optax.GradientTransformation, *, every: int
) -> optax.GradientTransformation:
    """Resets Adam's moments and bias correction every so many steps; the schedule goes on.

    With `every` a window of the lag policy, no gradient of one window affects the next. A skipped
    (non-finite) step is not counted.
    """
    adam = lambda part: isinstance(part, optax.ScaleByAdamState)

    def update(updates, state, params=None):
        step, inner = state
        kept = step % every != 0
        reset = lambda part: jax.tree.map(lambda x: x * kept.astype(x.dtype), part)
        inner = jax.tree.map(lambda p: reset(p) if adam(p) else p, inner, is_leaf=adam)
        updates, inner = optimizer.update(updates, inner, params)
        return updates, (step + 1, inner)

    return optax.GradientTransformation(
        lambda params: (jnp.zeros((), jnp.int32), optimizer.init(params)), update
    )
