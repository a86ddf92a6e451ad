"""Training: open the job, begin or resume, then the loop.

    python -m oapl_jax.train --config=configs/arithmetic.py --workdir=runs/a [--config.seed=1]

Each gradient step: publish if the lag policy says so; let the version that it names sample groups;
pack them; step; now and then evaluate and save. Every random number follows from the seed and the
step, and everything else that moves is in the checkpoint, so a killed run goes on as if it had not
been.
"""

import contextlib
import functools
import json
import time
from typing import Any

import jax
import numpy as np
from absl import flags
from etils import epath

from oapl_jax import heartbeat
from oapl_jax import multihost as hosts
from oapl_jax.assemble import make_batch, recompute
from oapl_jax.begin import begin
from oapl_jax.build import Config, Job, open_job
from oapl_jax.compile_cache import keep_programs
from oapl_jax.errors import FleetLost, NotFinite, exit_with_code
from oapl_jax.evaluation import table
from oapl_jax.launch import read_command_line
from oapl_jax.learner import packing as batching
from oapl_jax.learner import train_step as learner
from oapl_jax.objectives import bind
from oapl_jax.open_supply import open_supply
from oapl_jax.rollout.source import Supply
from oapl_jax.saved_config import check_config
from oapl_jax.tracking.metrics import CompileClock, MetricsWriter, group_metrics, read_lines
from oapl_jax.tracking.plots import draw
from oapl_jax.tracking.progress import Progress, StopRequest, say
from oapl_jax.weights import publisher
from oapl_jax.weights.lag import LagPolicy

NON_FINITE_IN_A_ROW = 3  # steps with a non-finite loss or gradient after which a run gives up


def run(config: Config, workdir: epath.Path, stop: StopRequest) -> dict[str, Any] | None:
    """Trains until `config.num_steps`; returns the results, or None if it was stopped before.

    Raises:
      UserError: for settings or files that do not fit, before any work.
      RunError: for a run that can't go on; what was saved stays.
    """
    ended = run_job(open_job(config, workdir), stop)
    return None if ended is None else ended[0]


def run_job(job: Job, stop: StopRequest) -> tuple[dict[str, Any], Any] | None:
    """`run` for a job that is open, as it is or with parts of it replaced; closes it. Returns the
    last policy's parameters beside the results."""
    config, workdir, clock = job.config, job.workdir, CompileClock()
    if not jax.process_index():
        for change in check_config(workdir / "config.json", config.to_dict()):
            say(f"changed since this run began: {change}")
    hosts.meet("the saved configuration", deadline=config.rollout.deadline)
    objective = bind(config.objective.name, config.objective, group_size=config.group_size)
    lag = LagPolicy(**config.lag, seed=config.seed)
    supply = open_supply(job)
    if supply.live or config.evaluation.every:
        job.check_rewards()
    state, loop = resume(job, supply) if job.checkpoints.steps() else begin(job)

    settings = dict(temperature=config.rollout.temperature, logp_chunk=config.learner.logp_chunk)
    train_step = learner.make_train_step(
        job.model,
        objective,
        job.optimizer,
        job.mesh,
        kl_weight=config.objective.kl_weight,
        ess_power=config.objective.ess_power,
        to_reference=config.objective.denominator == "reference",
        **settings,
    )
    logp_step = learner.make_logp_step(job.model, job.mesh, **settings)
    shardings = learner.batch_shardings(job.mesh)
    first = int(state.step)
    metrics_file = MetricsWriter(workdir, start_step=first, tensorboard=config.tensorboard)
    progress = Progress("train", config.num_steps, first)

    with contextlib.ExitStack() as closing, heartbeat.ending_at_once():
        closing.callback(job.close)
        for part in (metrics_file.close, progress.close, supply.close):
            closing.callback(part)
        if not first:
            save(job, state, loop, supply, lag)
        for step in range(first, config.num_steps):
            started = time.monotonic()
            publish_and_serve(job, step, state.params, loop, supply, lag)
            try:
                groups, waited = supply.collect(step, stop)
            except FleetLost:
                leave(job, state, loop, supply, lag)
                raise
            if not groups:
                break
            batch = batching.to_mesh(make_batch(config, objective, groups, step), shardings)
            with heartbeat.together(f"gradient step {step + 1}", deadline=config.rollout.deadline):
                batch = recompute(job, logp_step, batch, step)
                learning = time.monotonic()
                state, of_step = train_step(state, batch)
                of_step = jax.device_get(of_step)
            learned = time.monotonic() - learning
            supply.learned(groups, functools.partial(logp_step, state.params, batch))
            loop["seconds"]["rl"] += time.monotonic() - started

            done = step + 1
            due = lambda every, done=done: every and (done % every == 0 or done == config.num_steps)
            values = {**of_step, **group_metrics(groups, step), **supply.metrics()}
            values |= {
                "learner/tokens_per_second": int(np.sum(batch.segments > 0)) / learned,
                "learner/waiting_seconds": waited,
                "rl_seconds": loop["seconds"]["rl"],
                "compile/seconds": clock.seconds,
                "compile/programs": clock.programs,
            }
            if due(config.evaluation.every):
                result = job.grade(done, state.params, "validation")
                values |= {f"eval/{k}": v for k, v in result.items() if not isinstance(v, tuple)}
            progress.step(done, metrics_file.write(done, values))
            check_finite(job, done, int(of_step["skipped_in_a_row"]))
            if due(config.checkpoint.every):
                save(job, state, loop, supply, lag)
            job.checkpoints.check()
        supply.stop()
        step = int(state.step)
        if step < config.num_steps:
            leave(job, state, loop, supply, lag)
            say(f"stopped by {stop.requested} at step {step}; the same command goes on")
            return None
        after = job.grade(step, state.params, "test") if config.evaluation.every else {}
    results = {"before": loop["before"], "after": after, "seconds": loop["seconds"]}
    return results, state.params


def check_finite(job: Job, step: int, skipped_in_a_row: int) -> None:
    """Raises NotFinite once too many steps in a row had to be skipped."""
    if skipped_in_a_row == NON_FINITE_IN_A_ROW:
        raise NotFinite(
            f"loss or gradient was not finite in {NON_FINITE_IN_A_ROW} steps up to {step}; lower "
            f"optim.learning_rate ({job.config.optim.learning_rate}) or look at the rewards; the "
            f"same command resumes from checkpoint step {job.checkpoints.steps()[-1]}"
        )


def resume(job: Job, supply: Supply) -> tuple[learner.TrainState, dict[str, Any]]:
    """The newest checkpoint. Versions published after it are removed: they will be published
    again."""
    step = job.checkpoints.steps()[-1]
    with heartbeat.together(f"the restore of step {step}", deadline=job.config.rollout.deadline):
        state, loop, shares = job.checkpoints.restore(step, job.abstract_state())
    supply.restore(shares, functools.partial(job.checkpoints.restore_teacher, step))
    pinned = {v for versions in loop["pins"].values() for v in versions if v <= step}
    job.collect_versions(pinned)
    say(f"resumed from checkpoint step {step} of {job.workdir}")
    return state, loop


def save(job: Job, state: learner.TrainState, loop: dict, supply: Supply, lag: LagPolicy) -> None:
    """Starts to save everything that moves, and notes which versions the step will need."""
    step, deadline = int(state.step), job.config.rollout.deadline
    held = hosts.union(supply.buffer.versions(), f"the pins of step {step}", deadline=deadline)
    kept = [str(s) for s in job.checkpoints.steps()]
    loop["pins"] = {s: versions for s, versions in loop["pins"].items() if s in kept}
    loop["pins"][str(step)] = sorted(needed_versions(job, step, lag) | held)
    teacher = supply.curriculum.teacher.arrays()
    with heartbeat.together(f"the checkpoint of step {step}", deadline=deadline):
        probe = job.probe(state.params)
        job.checkpoints.save(step, state, loop, supply.state(), probe=probe, teacher=teacher)


def leave(job: Job, state: learner.TrainState, loop: dict, supply: Supply, lag: LagPolicy) -> None:
    """Saves, and returns when it is on disk."""
    supply.stop()
    job.checkpoints.wait()
    save(job, state, loop, supply, lag)
    job.checkpoints.wait()


def needed_versions(job: Job, step: int, lag: LagPolicy) -> set[int]:
    """What may serve at `step` or later, and version 0 if the objective or a recorded set has it
    as its reference."""
    denominator = job.config.objective.denominator
    recorded = job.config.rollout.source != "live" and denominator == "learner"
    return lag.needs(step) | ({0} if recorded or job.has_reference else set())


def publish_and_serve(
    job: Job, step: int, params: Any, loop: dict, supply: Supply, lag: LagPolicy
) -> None:
    """Publishes the learner's weights if it is time; the sampler serves the version that is due."""
    # Of recorded rollouts nothing but version 0 is ever asked for.
    if lag.publishes(step) and (supply.live or step == 0):
        job.publish(step, params)
        pinned = {v for kept in loop["pins"].values() for v in kept}
        job.collect_versions(pinned | supply.versions() | needed_versions(job, step, lag))
    due = lag.serves(step)
    supply.serve(due, publisher.version_path(job.workdir / "versions", due))


def report(config: Config, workdir: epath.Path, result: dict[str, Any]) -> None:
    """Writes result.json and learning.png, and prints the table if the run evaluates."""
    (workdir / "result.json").write_text(json.dumps(result, indent=1))
    lines = read_lines(workdir / "metrics.jsonl")
    before, after = result["before"], result["after"]
    title = f"{config.data.task}: {config.objective.name}, lag {config.lag.mode} {config.lag.steps}"
    draw(lines, before if after else {}, after, workdir / "learning.png", title=title)
    if before and after:
        say(table({"before": before, "after": after}))
    for name in ("metrics.jsonl", "tensorboard", "learning.png", "checkpoints", "result.json"):
        if (workdir / name).exists():
            say(f"{name:<14}{workdir / name}")


def main() -> None:
    install = flags.DEFINE_float("install_seconds", None, "seconds of the install, for result.json")
    pod = flags.DEFINE_bool("pod", False, "whether this is one of several hosts that JAX can find")
    coordinator = flags.DEFINE_string("coordinator", "", "or where it can't: host 0's address:port")
    count = flags.DEFINE_integer("hosts", 1, "with --coordinator: how many hosts there are")
    host = flags.DEFINE_integer("host", 0, "with --coordinator: which one this is")
    config, workdir = read_command_line()
    hosts.join(pod=pod.value, coordinator=coordinator.value, hosts=count.value, host=host.value)
    workdir.mkdir(parents=True, exist_ok=True)
    keep_programs(config, workdir)
    with heartbeat.ending_at_once():
        result = run(config, workdir, StopRequest())
    if result is None or jax.process_index():
        return
    if install.value is not None:
        result["seconds"]["install"] = install.value
    report(config, workdir, result)


if __name__ == "__main__":
    exit_with_code(main)
