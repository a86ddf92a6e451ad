"""Training: open the run, initialize or resume, then the loop.

    python -m oapl_jax.train --config=configs/arithmetic.py --workdir=runs/a [--config.seed=1]

Each gradient step: publish if the lag policy says so; sample groups from the version that it
serves; pack them into a batch; step; now and then evaluate and save. All random numbers follow
from the seed and the step, and everything else that moves is in the checkpoint, so a killed run
resumes as if it had not been killed.
"""

import contextlib
import functools
import json
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from absl import flags
from etils import epath

from oapl_jax import build, multihost
from oapl_jax.build import Run
from oapl_jax.config import Config
from oapl_jax.data.synthetic.demonstrations import demonstrations
from oapl_jax.errors import FleetLost, NotFinite, exit_with_code
from oapl_jax.evaluation import table
from oapl_jax.launch import check_saved_config, read_command_line, use_compile_cache
from oapl_jax.learner import packing, sft, train_step
from oapl_jax.learner.optimizer import make_optimizer
from oapl_jax.objectives import Objective, bind
from oapl_jax.rollout.source import GroupSource
from oapl_jax.structs import Batch, Group
from oapl_jax.tracking.metrics import CompileClock, MetricsWriter, group_metrics, read_lines
from oapl_jax.tracking.plots import draw
from oapl_jax.tracking.progress import Progress, StopRequest, say
from oapl_jax.weights.lag import LagPolicy

MAX_SKIPPED = 3  # consecutive steps with a non-finite loss or gradient before a run aborts
Evaluator = Callable[[int, Any, str], dict[str, Any]]


def run(config: Config, workdir: epath.Path, stop: StopRequest) -> dict[str, Any] | None:
    """Trains until `config.num_steps`; returns the results, or None if stopped before.

    Raises:
      UserError: for settings or files that do not fit, before any work.
      RunError: for a run that can't continue; what it saved stays.
    """
    ended = train(config, build.open_run(config, workdir), stop)
    return None if ended is None else ended[0]


def train(
    config: Config, run: Run, stop: StopRequest
) -> tuple[dict[str, Any], train_step.TrainState] | None:
    """`run` with opened parts, some of which a caller may have replaced; closes them.

    Returns the last train state beside the results.
    """
    clock = CompileClock()
    if not jax.process_index():
        for change in check_saved_config(run.workdir, config.to_dict()):
            say(f"changed since this run began: {change}")
    multihost.barrier("the saved configuration", deadline=config.rollout.deadline)
    objective = bind(
        config.objective.name, config.objective.constants, group_size=config.group_size
    )
    lag = LagPolicy(mode=config.lag.mode, steps=config.lag.steps, seed=config.seed)
    source = build.open_source(config, run)
    evaluate = build.open_evaluator(config, run)
    if source.live or config.evaluation.every:
        build.check_grader(config, run)
    if run.checkpoints.steps():
        state, loop = resume(config, run, source)
    else:
        state, loop = init_run(config, run, evaluate)

    settings: dict[str, Any] = dict(
        temperature=config.rollout.temperature, logp_chunk=config.learner.logp_chunk
    )
    step_fn = train_step.make_train_step(
        run.model,
        objective,
        run.optimizer,
        run.mesh,
        kl_weight=config.objective.kl_weight,
        ess_power=config.objective.ess_power,
        to_reference=config.objective.denominator == "reference",
        **settings,
    )
    logp_fn = train_step.make_logp_step(run.model, run.mesh, **settings)
    shardings = train_step.batch_shardings(run.mesh)
    first = int(state.step)
    metrics_file = MetricsWriter(run.workdir, start_step=first, tensorboard=config.tensorboard)
    progress = Progress("train", config.num_steps, first)

    with contextlib.ExitStack() as closing, multihost.abort_on_peer_failure():
        closing.callback(run.close)
        for part in (metrics_file, progress, source):
            closing.callback(part.close)
        if not first:
            save(config, run, state, loop, source, lag)
        for step in range(first, config.num_steps):
            started = time.monotonic()
            publish_and_serve(config, run, step, state.params, loop, source, lag)
            try:
                groups, waited = source.collect(step, stop)
            except FleetLost:
                save_and_stop(config, run, state, loop, source, lag)
                raise
            if not groups:
                break
            batch = packing.to_mesh(build_batch(config, objective, groups, step), shardings)
            name = f"gradient step {step + 1}"
            with multihost.collective_section(name, deadline=config.rollout.deadline):
                batch = train_step.recompute_logps(
                    batch,
                    logp_fn,
                    step=step,
                    reference=run.versions.reference if needs_reference_logp(config) else None,
                    load_version=(
                        run.versions.load if config.objective.denominator == "learner" else None
                    ),
                )
                learning = time.monotonic()
                state, metrics = step_fn(state, batch)
                metrics = jax.device_get(metrics)
            learned = time.monotonic() - learning
            source.store.trained(groups, functools.partial(logp_fn, state.params, batch))
            loop["seconds"]["rl"] += time.monotonic() - started

            done = step + 1
            due = lambda every, done=done: every and (done % every == 0 or done == config.num_steps)
            values = {**metrics, **group_metrics(groups, step), **source.metrics()}
            values |= {
                "learner/tokens_per_second": int(np.sum(batch.segments > 0)) / learned,
                "learner/waiting_seconds": waited,
                "rl_seconds": loop["seconds"]["rl"],
                "compile/seconds": clock.seconds,
                "compile/programs": clock.programs,
            }
            if due(config.evaluation.every):
                result = evaluate(done, state.params, "validation")
                values |= {f"eval/{k}": v for k, v in result.items() if not isinstance(v, tuple)}
            progress.step(done, metrics_file.write(done, values))
            check_finite(config, run, done, int(metrics["skipped_in_a_row"]))
            if due(config.checkpoint.every):
                save(config, run, state, loop, source, lag)
            run.checkpoints.check()
        source.stop()
        step = int(state.step)
        if step < config.num_steps:
            save_and_stop(config, run, state, loop, source, lag)
            say(f"stopped by {stop.requested} at step {step}; the same command resumes")
            return None
        after = evaluate(step, state.params, "test") if config.evaluation.every else {}
    return {"before": loop["before"], "after": after, "seconds": loop["seconds"]}, state


def init_run(
    config: Config, run: Run, evaluate: Evaluator
) -> tuple[train_step.TrainState, dict[str, Any]]:
    """State at step 0, from a checkpoint or fresh weights, after the warm-up if there is one."""
    started = time.monotonic()
    section = functools.partial(multihost.collective_section, deadline=config.rollout.deadline)
    with section("loading the model"):
        params: Any = run.policy.load_params(run.mesh) if run.policy.checkpoint else config.seed
    if config.warmup.num_steps:
        progress = Progress("warm up", config.warmup.num_steps, 0)
        with section("the warm-up") as warmup:

            def log(step: int, line: dict[str, float]) -> None:
                warmup.progress()
                progress.step(step, line)

            params = warm_up(config, run, params, log)
        progress.close()
    seconds = {"warmup": time.monotonic() - started, "rl": 0.0}
    with section("the first state"):
        state = train_step.init_state(run.model, run.optimizer, run.mesh, params)
    before = evaluate(0, state.params, "test") if config.evaluation.every else {}
    return state, {"before": before, "seconds": seconds, "pins": {}}


def warm_up(
    config: Config, run: Run, params: Any, log: Callable[[int, dict[str, float]], None]
) -> Any:
    """Parameters after the supervised stage on demonstrations."""
    warmup, learner = config.warmup, config.learner
    lengths = dict(
        max_prompt_tokens=config.data.max_prompt_tokens,
        max_response_tokens=config.rollout.max_response_tokens,
    )
    stream = demonstrations(
        run.splits["train"],
        run.policy.tokenizer,
        task=config.data.task,
        count=warmup.demonstrations,
        noise=warmup.noise,
        seed=config.seed,
        instruction=config.data.instruction,
        **lengths,
    )
    return sft.warm_up(
        run.model,
        make_optimizer(**warmup.optim, num_steps=warmup.num_steps),
        run.mesh,
        stream,
        params=params,
        num_steps=warmup.num_steps,
        batch_size=warmup.batch_size,
        micro_batches=learner.micro_batches,
        row_length=learner.row_length,
        rows_multiple=learner.rows_multiple,
        logp_chunk=learner.logp_chunk,
        log=log,
        **lengths,
    )


def build_batch(config: Config, objective: Objective, groups: list[Group], step: int) -> Batch:
    """Packs the groups of a gradient step, with advantages and aggregation weights."""
    weighted = config.buffer.zero_variance == "weight"
    return packing.build_batch(
        groups,
        objective,
        aggregation=config.objective.aggregation,
        constant_length=config.objective.constant_length,
        zero_variance_weight=config.buffer.zero_variance_weight if weighted else 1.0,
        step=step,
        micro_batches=config.learner.micro_batches,
        row_length=config.learner.row_length,
        rows_multiple=config.learner.rows_multiple,
        max_prompt_tokens=config.data.max_prompt_tokens,
        max_response_tokens=config.rollout.max_response_tokens,
    )


def needs_reference_logp(config: Config) -> bool:
    return config.objective.denominator == "reference" or config.objective.kl_weight > 0


def check_finite(config: Config, run: Run, step: int, skipped_in_a_row: int) -> None:
    """Raises NotFinite after MAX_SKIPPED consecutive skipped steps."""
    if skipped_in_a_row == MAX_SKIPPED:
        raise NotFinite(
            f"loss or gradient was not finite in {MAX_SKIPPED} steps up to {step}; lower "
            f"optim.learning_rate ({config.optim.learning_rate}) or look at the rewards; the "
            f"same command resumes from checkpoint step {run.checkpoints.steps()[-1]}"
        )


def resume(
    config: Config, run: Run, source: GroupSource
) -> tuple[train_step.TrainState, dict[str, Any]]:
    """Restores the newest checkpoint; removes later versions, which are published again."""
    step = run.checkpoints.steps()[-1]
    name = f"the restore of step {step}"
    with multihost.collective_section(name, deadline=config.rollout.deadline):
        state, loop, shares = run.checkpoints.restore(step, run.abstract_state())
    source.restore(shares, functools.partial(run.checkpoints.restore_curriculum, step))
    run.versions.keep_only({v for pins in loop["pins"].values() for v in pins if v <= step})
    say(f"resumed from checkpoint step {step} of {run.workdir}")
    return state, loop


def save(
    config: Config,
    run: Run,
    state: train_step.TrainState,
    loop: dict[str, Any],
    source: GroupSource,
    lag: LagPolicy,
) -> None:
    """Starts to save everything that moves, and pins the versions that the checkpoint needs."""
    step = int(state.step)
    held = source.held_versions(f"the pins of step {step}")
    kept = [str(s) for s in run.checkpoints.steps()]
    loop["pins"] = {s: versions for s, versions in loop["pins"].items() if s in kept}
    loop["pins"][str(step)] = sorted(needed_versions(config, step, lag) | held)
    curriculum = source.store.curriculum_arrays()
    name = f"the checkpoint of step {step}"
    with multihost.collective_section(name, deadline=config.rollout.deadline):
        probe = run.versions.probe(state.params)
        run.checkpoints.save(
            step, state, loop, source.snapshot(), probe=probe, curriculum=curriculum
        )


def save_and_stop(
    config: Config,
    run: Run,
    state: train_step.TrainState,
    loop: dict[str, Any],
    source: GroupSource,
    lag: LagPolicy,
) -> None:
    """Stops sampling and saves; returns when the checkpoint is on disk."""
    source.stop()
    run.checkpoints.wait()
    save(config, run, state, loop, source, lag)
    run.checkpoints.wait()


def needed_versions(config: Config, step: int, lag: LagPolicy) -> set[int]:
    """Versions that may serve at `step` or later, and version 0 if it is the reference policy."""
    recorded = config.rollout.source != "live" and config.objective.denominator == "learner"
    compared = config.compares and not config.preferences.dataset
    return lag.needs(step) | (
        {0} if recorded or compared or needs_reference_logp(config) else set()
    )


def publish_and_serve(
    config: Config,
    run: Run,
    step: int,
    params: Any,
    loop: dict[str, Any],
    source: GroupSource,
    lag: LagPolicy,
) -> None:
    """Publishes the learner's weights if they are due, and serves the version that is due."""
    # Without sampling, version 0 is the only one that is ever read.
    if lag.publishes(step) and (source.live or step == 0):
        run.versions.publish(step, params)
        pinned = {v for versions in loop["pins"].values() for v in versions}
        needed = needed_versions(config, step, lag)
        run.versions.keep_only(pinned | source.versions() | needed)
    due = lag.serves(step)
    source.serve(due, run.versions.path(due))


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
    pod = flags.DEFINE_bool("pod", False, "join the hosts that the environment (TPU pod) names")
    coordinator = flags.DEFINE_string("coordinator", "", "address:port of host 0, without --pod")
    count = flags.DEFINE_integer("hosts", 1, "number of hosts, with --coordinator")
    host = flags.DEFINE_integer("host", 0, "index of this host, with --coordinator")
    config, workdir = read_command_line()
    multihost.initialize(
        pod=pod.value, coordinator=coordinator.value, hosts=count.value, host=host.value
    )
    workdir.mkdir(parents=True, exist_ok=True)
    use_compile_cache(config.compile_cache, workdir)
    with multihost.abort_on_peer_failure():
        result = run(config, workdir, StopRequest())
    if result is None or jax.process_index():
        return
    if install.value is not None:
        result["seconds"]["install"] = install.value
    report(config, workdir, result)


if __name__ == "__main__":
    exit_with_code(main)
