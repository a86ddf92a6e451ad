"""Training: open the job, begin or resume, then the loop.

    python -m oapl_jax.train --config=configs/arithmetic.py --workdir=runs/a [--config.seed=1]

Each gradient step: publish if the lag policy says so; let the version that it names sample groups;
pack them; step; now and then evaluate and save. Every random number follows from the seed and the
step, and everything else that moves is in the checkpoint, so a killed run goes on as if it had not
been.
"""

import contextlib
import dataclasses
import json
import time
from typing import Any

import jax
import numpy as np
from absl import flags
from etils import epath

from oapl_jax import batching, learner, publisher
from oapl_jax.begin import begin
from oapl_jax.buffer import Buffer
from oapl_jax.checkpoint import check_config
from oapl_jax.command import read_command_line
from oapl_jax.errors import RunError, exit_with_code
from oapl_jax.evaluate import table
from oapl_jax.job import Config, Job, open_job
from oapl_jax.lag import LagPolicy
from oapl_jax.metrics import CompileClock, MetricsWriter, group_metrics, read_lines
from oapl_jax.models import hf
from oapl_jax.objectives import Objective, bind
from oapl_jax.objectives.aggregation import sequence_weights
from oapl_jax.report.learning import draw
from oapl_jax.report.progress import Progress, StopRequest, say
from oapl_jax.rollout.worker import Worker
from oapl_jax.structs import Batch, Group

NON_FINITE_IN_A_ROW = 3  # steps with a non-finite loss or gradient after which a run gives up


def run(config: Config, workdir: epath.Path, stop: StopRequest) -> dict[str, Any] | None:
    """Trains until `config.num_steps`; returns the results, or None if it was stopped before.

    Raises:
      UserError: for settings or files that do not fit, before any work.
      RunError: for a run that can't go on; what was saved stays.
    """
    clock = CompileClock()
    job = open_job(config, workdir)
    for change in check_config(workdir / "config.json", config.to_dict()):
        say(f"changed since this run began: {change}")
    objective = bind(**config.objective)
    lag = LagPolicy(**config.lag, seed=config.seed)
    buffer = Buffer(**config.buffer, seed=config.seed)
    worker = Worker(
        job.prompt_stream(),
        job.new_sampler(config.seed),
        job.grader.reward,
        buffer,
        group_size=config.group_size,
        sampling=job.sampling,
        prompts_per_call=config.rollout.prompts_per_call,
        deadline=config.rollout.deadline,
    )
    state, loop = resume(job, worker, buffer) if job.checkpoints.steps() else begin(job)

    settings = dict(temperature=config.rollout.temperature, logp_chunk=config.learner.logp_chunk)
    train_step = learner.make_train_step(job.model, objective, job.optimizer, job.mesh, **settings)
    logp_step = learner.make_logp_step(job.model, job.mesh, **settings)
    shardings = learner.batch_shardings(job.mesh)
    first = int(state.step)
    metrics_file = MetricsWriter(workdir, start_step=first, tensorboard=config.tensorboard)
    progress = Progress("train", config.num_steps, first)

    with contextlib.ExitStack() as closing:
        closing.callback(job.checkpoints.close)
        for part in (metrics_file.close, progress.close, worker.stop):
            closing.callback(part)
        if not first:
            save(job, state, loop, worker, buffer, lag)
        for step in range(first, config.num_steps):
            started = time.monotonic()
            publish_and_serve(job, step, state.params, loop, worker, buffer, lag)
            if config.rollout.overlap and step == first:
                worker.start()
            groups, waited = collect(config, step, worker, buffer, stop)
            if not groups:
                break
            batch = batching.to_mesh(make_batch(config, objective, groups, step), shardings)
            if config.objective.denominator == "learner":
                batch = recompute_denominator(job, logp_step, batch, step)
            learning = time.monotonic()
            state, of_step = train_step(state, batch)
            of_step = jax.device_get(of_step)
            learned = time.monotonic() - learning
            loop["seconds"]["rl"] += time.monotonic() - started

            done = step + 1
            due = lambda every, done=done: done % every == 0 or done == config.num_steps
            values = {**of_step, **group_metrics(groups, step), **worker.take_metrics()}
            values |= {f"buffer/{name}": count for name, count in buffer.counts.items()}
            values |= {
                "learner/tokens_per_second": int(np.sum(batch.segments > 0)) / learned,
                "learner/waiting_seconds": waited,
                "compile/seconds": clock.seconds,
                "compile/programs": clock.programs,
            }
            if due(config.evaluation.every):
                result = job.grade(done, state.params, "validation")
                values |= {f"eval/{k}": v for k, v in result.items() if not isinstance(v, tuple)}
            progress.step(done, metrics_file.write(done, values))
            check_finite(job, done, int(of_step["skipped_in_a_row"]))
            if due(config.checkpoint.every):
                save(job, state, loop, worker, buffer, lag)
            job.checkpoints.check()
            if stop.requested:
                break
        worker.stop()
        step = int(state.step)
        if step < config.num_steps:
            job.checkpoints.wait()
            save(job, state, loop, worker, buffer, lag)
            job.checkpoints.wait()
            say(f"stopped by {stop.requested} at step {step}; the same command goes on")
            return None
        after = job.grade(step, state.params, "test")
    return {"before": loop["before"], "after": after, "seconds": loop["seconds"]}


def check_finite(job: Job, step: int, skipped_in_a_row: int) -> None:
    """Raises a RunError once too many steps in a row had to be skipped."""
    if skipped_in_a_row == NON_FINITE_IN_A_ROW:
        raise RunError(
            f"loss or gradient was not finite in {NON_FINITE_IN_A_ROW} steps up to {step}; lower "
            f"optim.learning_rate ({job.config.optim.learning_rate}) or look at the rewards; the "
            f"same command resumes from checkpoint step {job.checkpoints.steps()[-1]}"
        )


def resume(job: Job, worker: Worker, buffer: Buffer) -> tuple[learner.TrainState, dict[str, Any]]:
    """The newest checkpoint. Versions published after it are removed: they will be published
    again."""
    step = job.checkpoints.steps()[-1]
    state, loop, groups = job.checkpoints.restore(step, job.abstract_state())
    buffer.restore(loop["buffer"], groups)
    worker.restore(loop["worker"])
    pinned = {v for versions in loop["pins"].values() for v in versions if v <= step}
    publisher.collect(job.workdir / "versions", keep=pinned)
    say(f"resumed from checkpoint step {step} of {job.workdir}")
    return state, loop


def save(
    job: Job, state: learner.TrainState, loop: dict, worker: Worker, buffer: Buffer, lag: LagPolicy
) -> None:
    """Starts to save everything that moves, and notes which versions the step will need."""
    step = int(state.step)
    with buffer.lock:  # the buffer and the worker's place in the prompts belong together
        loop["buffer"], groups = buffer.state()
        loop["worker"] = worker.state()
    kept = [str(s) for s in job.checkpoints.steps()]
    loop["pins"] = {s: versions for s, versions in loop["pins"].items() if s in kept}
    loop["pins"][str(step)] = sorted(lag.needs(step) | buffer.versions())
    job.checkpoints.save(step, state, loop, groups)


def publish_and_serve(
    job: Job, step: int, params: Any, loop: dict, worker: Worker, buffer: Buffer, lag: LagPolicy
) -> None:
    """Publishes the learner's weights if it is time; the sampler serves the version that is due."""
    versions = job.workdir / "versions"
    if lag.publishes(step):
        publisher.publish(
            params,
            job.policy.config,
            version=step,
            directory=versions,
            tokenizer=job.policy.tokenizer,
            dtype=job.config.publish_dtype,
        )
        pinned = {v for kept in loop["pins"].values() for v in kept}
        in_use = worker.versions() | buffer.versions()
        publisher.collect(versions, keep=pinned | in_use | lag.needs(step))
    due = lag.serves(step)
    if worker.version != due:
        worker.serve(due, publisher.version_path(versions, due))


def collect(
    config: Config, step: int, worker: Worker, buffer: Buffer, stop: StopRequest
) -> tuple[list[Group], float]:
    """The groups of one gradient step (none: stopped), and the seconds waited for them."""
    buffer.expire(step)
    started, enough = time.monotonic(), lambda: len(buffer) >= config.groups_per_step
    what = f"{config.groups_per_step} groups for step {step} (rollout.deadline)"
    if config.rollout.overlap:
        buffer.wait(
            lambda: enough() or bool(stop.requested),
            what=what,
            deadline=config.rollout.deadline,
            alive=worker.check,
        )
    # Replay has enough for long: without fresh groups it would see the first ones only.
    fresh = config.buffer.mode == "replay" and buffer.has_room(config.rollout.prompts_per_call)
    while not (config.rollout.overlap or stop.requested) and (fresh or not enough()):
        worker.produce()
        fresh = False
        if time.monotonic() - started > config.rollout.deadline:
            seconds = f"{config.rollout.deadline:.0f} s"
            raise RunError(f"sampled {seconds} for {what}; what became of groups: {buffer.counts}")
    # Whoever stops leaves the groups in the buffer, and the checkpoint has them.
    groups = [] if stop.requested else buffer.sample(config.groups_per_step, step)
    return groups, time.monotonic() - started


def make_batch(config: Config, objective: Objective, groups: list[Group], step: int) -> Batch:
    """Advantages of whole groups, aggregation weights of the whole batch, packed rows."""
    advantages = [np.asarray(objective.advantage(g.reward)) for g in groups]
    lengths = np.array([len(r.tokens) for g in groups for r in g.rollouts])
    weights = sequence_weights(
        lengths, config.objective.aggregation, constant_length=config.objective.constant_length
    )
    if config.buffer.zero_variance == "weight":
        mixed = np.array([not g.zero_variance for g in groups for _ in g.rollouts])
        weights = weights * np.where(mixed, 1.0, config.zero_variance_weight)
    return batching.make_batch(
        groups,
        advantages,
        weights,
        step=step,
        micro_batches=config.learner.micro_batches,
        row_length=config.learner.row_length,
        rows_multiple=config.learner.rows_multiple,
        max_response_tokens=config.rollout.max_response_tokens,
    )


def recompute_denominator(job: Job, logp_step: Any, batch: Batch, step: int) -> Batch:
    """The batch with the lagged policies' log-probs from the learner's own forward pass."""
    behavior_logp = batch.behavior_logp
    for lag in np.unique(jax.device_get(batch.lag)):
        path = publisher.version_path(job.workdir / "versions", step - int(lag))
        publisher.check_version(path)
        params = hf.load_params(path, job.policy.config, mesh=job.mesh)
        mine = (batch.lag == lag)[..., None]
        behavior_logp = jax.numpy.where(mine, logp_step(params, batch), behavior_logp)
    return dataclasses.replace(batch, behavior_logp=behavior_logp)


def report(config: Config, workdir: epath.Path, result: dict[str, Any]) -> None:
    """Writes result.json and learning.png, and prints the table."""
    (workdir / "result.json").write_text(json.dumps(result, indent=1))
    lines = read_lines(workdir / "metrics.jsonl")
    before, after = result["before"], result["after"]
    title = f"{config.data.task}: {config.objective.name}, lag {config.lag.mode} {config.lag.steps}"
    draw(lines, before, after, workdir / "learning.png", title=title)
    say(table({"before": before, "after": after}))
    for name in ("metrics.jsonl", "tensorboard", "learning.png", "checkpoints", "result.json"):
        if (workdir / name).exists():
            say(f"{name:<14}{workdir / name}")


def main() -> None:
    install = flags.DEFINE_float("install_seconds", None, "seconds of the install, for result.json")
    config, workdir = read_command_line()
    workdir.mkdir(parents=True, exist_ok=True)
    result = run(config, workdir, StopRequest())
    if result is None:
        return
    if install.value is not None:
        result["seconds"]["install"] = install.value
    report(config, workdir, result)


if __name__ == "__main__":
    exit_with_code(main)
