"""One run of a grid: what decides it, and how it is done, in a process that does nothing else.

A run may start from the weights of another (the warm-up, which all runs of a seed share) and train
on what another recorded. Its key is a hash of its settings, of theirs, and of its configuration, so
a run is done once, whoever asks for it, and anew where a default has changed.
"""

import contextlib
import dataclasses
import fcntl
import functools
import hashlib
import importlib
import json
import os
import signal
import sys
import time
from collections.abc import Mapping
from typing import Any

import numpy as np
from etils import epath

from experiments.forgetful import forgetful
from oapl_jax import train
from oapl_jax.begin import begin
from oapl_jax.build import Config, Job, open_job
from oapl_jax.errors import NotFinite
from oapl_jax.record import make_set
from oapl_jax.rollout.dataset import Shards
from oapl_jax.tracking.metrics import read_lines
from oapl_jax.tracking.progress import Progress, StopRequest
from oapl_jax.weights.publisher import version_path

OUTCOME = "outcome.json"
# How a policy is graded at the end of its run: samples a problem, and the k of pass@k.
GRADES = {"validation": dict(n=16, ks=(1, 8)), "test": dict(n=64, ks=(1, 8, 64))}
STRIDE = 8  # steps between two points of a curve: each is the last of a block of so many


@dataclasses.dataclass(frozen=True)
class Run:
    """Attributes:
    kind: "warm_up": the supervised stage, published as version 0. "generate": a set of rollouts
      of `start`. "train": a whole run of oapl_jax.train.
    config: module of configs/ and what stands behind the colon, such as "arithmetic:chain_sum".
    objective: its name there.
    seed: of everything but the problems, which are the same for all.
    overrides: names and values of the configuration, as of --config.NAME=VALUE, sorted.
    split: of the problems that grade the run's last policy.
    start: whose version 0 the run starts from; None for a warm-up.
    stream: whose rollouts it trains on; None samples its own.
    prompts: of the training split, of "generate".
    forget_every: steps after which Adam's moments begin anew; 0 is never.
    """

    kind: str
    config: str
    objective: str
    seed: int
    overrides: tuple[tuple[str, Any], ...]
    split: str
    start: "Run | None" = None
    stream: "Run | None" = None
    prompts: int = 0
    forget_every: int = 0

    @property
    def settings(self) -> dict[str, Any]:
        """JSON-able; other runs by their keys."""
        mine = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        others = {name: run.key for name, run in mine.items() if isinstance(run, Run)}
        return {**mine, "overrides": dict(self.overrides), **others}

    @property
    def key(self) -> str:
        return key_of(self)

    @property
    def needed(self) -> bool:
        """Whether other runs may read its directory."""
        return self.kind != "train" or dict(self.overrides).get("rollout.record", False)

    def workdir(self, root: epath.Path) -> epath.Path:
        return root / "runs" / self.key

    def rollouts(self, root: epath.Path) -> epath.Path:
        """The set that it recorded."""
        return self.workdir(root) / "rollouts"

    def resolve(self, root: epath.Path) -> Config:
        """Its configuration.

        Raises:
          KeyError, TypeError, ValueError: for an override or a choice that does not exist.
        """
        module, _, choice = self.config.partition(":")
        choices = [part for part in (choice, f"objective={self.objective}") if part]
        config = importlib.import_module(f"configs.{module}").get_config(",".join(choices))
        values = {
            "seed": self.seed,
            "data.data_dir": os.fspath(root / "data"),
            "tensorboard": False,
        }
        if self.start:
            values |= {"warmup.num_steps": 0, "model.path": os.fspath(weights(self.start, root))}
        if self.stream:
            recorded = self.stream.kind == "train"
            values |= {
                "rollout.source": "shards",
                "rollout.shards": os.fspath(self.stream.rollouts(root)),
                "rollout.recorded_order": "recorded" if recorded else "shuffled",
                "rollout.recorded_version": -1 if recorded else 0,
            }
        config.update_from_flattened_dict(values | dict(self.overrides))
        return config


@functools.cache  # the same run is asked for again and again, and a configuration takes a while
def key_of(run: Run) -> str:
    config = run.resolve(epath.Path("/")).to_dict()  # paths of all runs below the same root
    text = json.dumps([run.settings, config], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def run_of(kind: str, config: str, *, overrides: Mapping[str, Any], **others: Any) -> Run:
    """A Run with overrides from a mapping."""
    return Run(kind, config, overrides=tuple(sorted(overrides.items())), **others)


def weights(start: Run, root: epath.Path) -> epath.Path:
    """The version 0 that a warm-up published."""
    return version_path(start.workdir(root) / "versions", 0)


def do(run: Run, root: epath.Path) -> None:
    """Does a run to its end, or until SIGTERM, and goes on where an earlier try has stopped.

    Leaves log.txt and, at its end, outcome.json: "ended" with what was found, or "failed" with the
    reason for a policy whose loss is not finite, a finding too. An exception leaves no outcome.
    """
    stop = StopRequest()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of the whole group; the grid says when to stop
    workdir = run.workdir(root)
    workdir.mkdir(parents=True, exist_ok=True)
    with (workdir / "log.txt").open("a") as log, contextlib.ExitStack() as closing:
        closing.callback(sys.stdout.flush)
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
        # Of a grid that was killed a process may still be leaving; the next grid has a deadline.
        fcntl.flock(log, fcntl.LOCK_EX)
        closing.callback(fcntl.flock, log, fcntl.LOCK_UN)  # 1 and 2 hold it too
        if not (workdir / OUTCOME).exists():
            _do(run, root, stop)


def _do(run: Run, root: epath.Path, stop: StopRequest) -> None:
    started = time.process_time()
    of_kind = {"warm_up": warm_up, "generate": generate, "train": trained}[run.kind]
    outcome: dict[str, Any] | None = of_kind(run, root, stop)
    if outcome is not None:
        outcome["core_seconds"] = round(time.process_time() - started, 1)
        aside = run.workdir(root) / f"{OUTCOME}.new"
        aside.write_text(json.dumps(outcome))
        aside.replace(run.workdir(root) / OUTCOME)


def warm_up(run: Run, root: epath.Path, stop: StopRequest) -> dict[str, Any] | None:
    """The supervised stage, graded; it begins anew after a stop."""
    config = run.resolve(root)
    config.evaluation.every = 0  # it is graded once, below
    job = open_job(config, run.workdir(root))
    try:
        state, _ = begin(job)
        job.publish(0, state.params)
        return None if stop.requested else {"outcome": "ended", **grade(job, 0, state.params, run)}
    finally:
        job.close()


def generate(run: Run, root: epath.Path, stop: StopRequest) -> dict[str, Any] | None:
    """One group for each of the first `run.prompts` training prompts, from version 0; its outcome
    has the checksums of the set."""
    assert run.start is not None
    job = open_job(run.resolve(root), run.workdir(root))
    progress = Progress("generate", run.prompts, 0)
    try:
        make_set(
            job,
            run.rollouts(root),
            step=None,
            version_dir=os.fspath(weights(run.start, root)),
            split="train",
            limit=run.prompts,
            groups_per_shard=256,
            progress=lambda done: progress.step(done, {}),
        )
        if stop.requested:
            return None
        shards = Shards(run.rollouts(root)).manifest["shards"]
        return {"outcome": "ended", "shards": [of["xxh128"] for of in shards.values()]}
    finally:
        job.close()


def trained(run: Run, root: epath.Path, stop: StopRequest) -> dict[str, Any] | None:
    """A run of oapl_jax.train, with its last policy graded on `run.split`; of one whose loss is no
    longer finite the metrics up to there."""
    config, workdir = run.resolve(root), run.workdir(root)
    job = open_job(config, workdir)
    if run.forget_every:
        job = dataclasses.replace(job, optimizer=forgetful(job.optimizer, every=run.forget_every))
    of_run = lambda: summary(read_lines(workdir / "metrics.jsonl"), config, run)
    try:
        ended = train.run_job(job, stop)
    except NotFinite as error:
        return {"outcome": "failed", "reason": str(error), **of_run()}
    if ended is None:
        return None
    _, params = ended
    job = open_job(config, workdir)
    try:
        graded = grade(job, config.num_steps, params, run)
    finally:
        job.close()
    return {"outcome": "ended", **graded, **of_run()}


def grade(job: Job, step: int, params: Any, run: Run) -> dict[str, Any]:
    """What a policy is worth on the split of the run, under the name of the split."""
    job.config.evaluation.update(GRADES[run.split])
    graded = job.grade(step, params, run.split)
    return {run.split: {k: v for k, v in graded.items() if not isinstance(v, tuple)}}


def summary(lines: list[dict[str, Any]], config: Config, run: Run) -> dict[str, Any]:
    """What the metrics of a run say.

    Returns:
      Nothing of a run without a step; else
      "generations": rollouts sampled for it so far, of a recorded set those taken at least once;
      "skipped": steps that were not finite;
      "drift": KL(pi_lag || pi), nats a token, before the last step of a window, mean over windows
        (0 at lag 1, where each step begins at pi_lag);
      "progress": step, generations, pass@1 and entropy of each evaluation on the validation split;
      "curve": kl, entropy and reward of every STRIDE-th step.
    """
    if not lines:
        return {}
    # A whole run ends with a window.
    after = 0.0 if lines[-1]["step"] == config.num_steps else np.inf
    lag = [*(line["lag/mean"] for line in lines), after]
    value = lambda line, key: line.get(key, np.nan)  # metrics leave out what is not finite
    ends = [line for line, now, then in zip(lines, lag, lag[1:], strict=False) if then <= now]
    made = run.stream.prompts * config.group_size if run.stream and run.stream.prompts else np.inf

    def generations(line: Mapping[str, Any]) -> int:
        groups = line["buffer/added"] if not run.stream else line["recorded/taken"]
        return int(min(groups * config.group_size, made))

    graded = [line for line in lines if "eval/pass@1" in line]
    points = lines[STRIDE - 1 :: STRIDE]
    short = lambda x: float(f"{x:.3g}")
    return {
        "generations": generations(lines[-1]),
        "skipped": int(lines[-1]["skipped"]),
        "drift": float(np.mean([value(line, "kl") for line in ends])) if ends else float("nan"),
        "progress": [
            [line["step"], generations(line), line["eval/pass@1"], line["eval/entropy"]]
            for line in graded
        ],
        "curve": {
            key: [short(value(line, key)) for line in points] for key in ("kl", "entropy", "reward")
        },
    }
