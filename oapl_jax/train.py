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

from oapl_jax import multihost
from oapl_jax.build import Run
from oapl_jax.config import Config, save_config
from oapl_jax.data.synthetic.demonstrations import demonstrations
from oapl_jax.errors import FleetLost, NotFinite, exit_with_code
from oapl_jax.evaluation import table
from oapl_jax.files import write_atomically
from oapl_jax.launch import read_command_line, use_compile_cache
from oapl_jax.learner import packing, sft, train_step
from oapl_jax.learner.optimizer import make_optimizer
from oapl_jax.learner.train_step import TrainState
from oapl_jax.structs import Batch, Group
from oapl_jax.tracking.metrics import CompileClock, MetricsWriter, group_metrics, read_lines
from oapl_jax.tracking.plots import plot_learning
from oapl_jax.tracking.progress import Progress, StopRequest, log

MAX_SKIPPED = 3  # consecutive steps with a non-finite loss or gradient before a run aborts
Loop = dict[str, Any]  # JSON values of the loop: test results before, seconds, pinned versions


def run(config: Config, workdir: epath.Path, stop: StopRequest) -> dict[str, Any] | None:
    """Trains until `config.num_steps`; returns the results, or None if stopped before.

    Raises:
      UserError: for settings or files that do not fit, before any work.
      RunError: for a run that can't continue; what it saved stays.
    """
    ended = train(Run(config, workdir), stop)
    return None if ended is None else ended[0]


def train(run: Run, stop: StopRequest) -> tuple[dict[str, Any], TrainState] | None:
    """Trains a run, of which a caller may have replaced parts, and closes it.

    Returns the results and the last state, or None if stopped before the end.
    """
    config, clock = run.config, CompileClock()
    if not jax.process_index():
        for change in save_config(run.workdir, config.to_dict()):
            log(f"changed since this run began: {change}")
    multihost.barrier("the saved configuration", deadline=config.rollout.deadline)
    section = functools.partial(multihost.collective_section, deadline=config.rollout.deadline)
    source = run.source
    if source.live or config.evaluation.every:
        run.check_grader()
    state, loop = resume(run) if run.checkpoints.steps() else init_run(run)

    settings: dict[str, Any] = dict(
        temperature=config.rollout.temperature, logp_chunk=config.learner.logp_chunk
    )
    step_fn = train_step.make_train_step(
        run.model,
        run.objective,
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
        for part in (run, metrics_file, progress, source):
            closing.callback(part.close)
        if not first:
            save(run, state, loop)
        for step in range(first, config.num_steps):
            started = time.monotonic()
            publish_and_serve(run, step, state.params, loop)
            try:
                groups, waited = source.collect(step, stop)
            except FleetLost:
                save_and_stop(run, state, loop)
                raise
            if not groups:
                break
            batch = packing.to_mesh(build_batch(run, groups, step), shardings)
            with section(f"gradient step {step + 1}"):
                batch = recompute_logps(run, logp_fn, batch, step)
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
                result = run.evaluate(done, state.params, "validation")
                values |= {f"eval/{k}": v for k, v in result.items() if not isinstance(v, tuple)}
            progress.step(done, metrics_file.write(done, values))
            check_finite(run, done, int(metrics["skipped_in_a_row"]))
            if due(config.checkpoint.every):
                save(run, state, loop)
            run.checkpoints.check()
        source.stop()
        step = int(state.step)
        if step < config.num_steps:
            save_and_stop(run, state, loop)
            log(f"stopped by {stop.requested} at step {step}; the same command resumes")
            return None
        after = run.evaluate(step, state.params, "test") if config.evaluation.every else {}
    return {"before": loop["before"], "after": after, "seconds": loop["seconds"]}, state


def init_run(run: Run) -> tuple[TrainState, Loop]:
    """State at step 0, from a checkpoint or fresh weights, after the warm-up if there is one."""
    config, started = run.config, time.monotonic()
    section = functools.partial(multihost.collective_section, deadline=config.rollout.deadline)
    with section("loading the model"):
        params: Any = run.policy.load_params(run.mesh) if run.policy.checkpoint else config.seed
    if config.warmup.num_steps:
        progress = Progress("warm up", config.warmup.num_steps, 0)
        with section("the warm-up") as warmup:

            def on_step(step: int, line: dict[str, float]) -> None:
                warmup.progress()
                progress.step(step, line)

            params = warm_up(run, params, on_step)
        progress.close()
    seconds = {"warmup": time.monotonic() - started, "rl": 0.0}
    with section("the first state"):
        state = train_step.init_state(run.model, run.optimizer, run.mesh, params)
    before = run.evaluate(0, state.params, "test") if config.evaluation.every else {}
    return state, {"before": before, "seconds": seconds, "pins": {}}


def warm_up(run: Run, params: Any, on_step: Callable[[int, dict[str, float]], None]) -> Any:
    """Parameters after the supervised stage on noisy demonstrations."""
    config, warmup = run.config, run.config.warmup
    max_response_tokens = config.rollout.max_response_tokens
    stream = demonstrations(
        run.splits["train"],
        run.prompt_template,
        count=warmup.demonstrations,
        noise=warmup.noise,
        seed=config.seed,
        max_response_tokens=max_response_tokens,
    )
    return sft.warm_up(
        run.model,
        make_optimizer(**warmup.optim, num_steps=warmup.num_steps),
        run.mesh,
        stream,
        config.learner,
        params=params,
        num_steps=warmup.num_steps,
        batch_size=warmup.batch_size,
        max_prompt_tokens=config.data.max_prompt_tokens,
        max_response_tokens=max_response_tokens,
        log=on_step,
    )


def build_batch(run: Run, groups: list[Group], step: int) -> Batch:
    """Packs the groups of a gradient step, with advantages and aggregation weights."""
    config, buffer = run.config, run.config.buffer
    return packing.build_batch(
        groups,
        run.objective,
        config.learner,
        aggregation=config.objective.aggregation,
        constant_length=config.objective.constant_length,
        zero_variance_weight=(
            buffer.zero_variance_weight if buffer.zero_variance == "weight" else 1.0
        ),
        step=step,
        max_prompt_tokens=config.data.max_prompt_tokens,
        max_response_tokens=config.rollout.max_response_tokens,
    )


def recompute_logps(
    run: Run, logp_fn: Callable[[Any, Batch], jax.Array], batch: Batch, step: int
) -> Batch:
    """Adds the log-probs of the objective's reference policy, or of each rollout's version."""
    return train_step.recompute_logps(
        batch,
        logp_fn,
        step=step,
        reference=run.versions.reference if needs_reference_logp(run.config) else None,
        load_version=run.versions.load if run.config.objective.denominator == "learner" else None,
    )


def needs_reference_logp(config: Config) -> bool:
    return config.objective.denominator == "reference" or config.objective.kl_weight > 0


def check_finite(run: Run, step: int, skipped_in_a_row: int) -> None:
    """Raises NotFinite after MAX_SKIPPED consecutive skipped steps."""
    if skipped_in_a_row == MAX_SKIPPED:
        raise NotFinite(
            f"loss or gradient was not finite in {MAX_SKIPPED} steps up to {step}; lower "
            f"optim.learning_rate ({run.config.optim.learning_rate}) or look at the rewards; the "
            f"same command resumes from checkpoint step {run.checkpoints.steps()[-1]}"
        )


def resume(run: Run) -> tuple[TrainState, Loop]:
    """Restores the newest checkpoint; removes later versions, which are published again."""
    step, deadline = run.checkpoints.steps()[-1], run.config.rollout.deadline
    with multihost.collective_section(f"the restore of step {step}", deadline=deadline):
        state, loop, host_states = run.checkpoints.restore(step, run.abstract_state)
    run.source.restore(host_states, functools.partial(run.checkpoints.restore_curriculum, step))
    run.versions.keep_only({v for pins in loop["pins"].values() for v in pins if v <= step})
    log(f"resumed from checkpoint step {step} of {run.workdir}")
    return state, loop


def save(run: Run, state: TrainState, loop: Loop) -> None:
    """Starts to save everything that moves, and pins the versions that the checkpoint needs."""
    step, deadline = int(state.step), run.config.rollout.deadline
    held = run.source.held_versions(f"the pins of step {step}")
    kept = [str(s) for s in run.checkpoints.steps()]
    loop["pins"] = {s: versions for s, versions in loop["pins"].items() if s in kept}
    loop["pins"][str(step)] = sorted(needed_versions(run, step) | held)
    curriculum = run.source.store.curriculum_arrays()
    with multihost.collective_section(f"the checkpoint of step {step}", deadline=deadline):
        probe = run.versions.probe(state.params)
        snapshot = run.source.snapshot()
        run.checkpoints.save(step, state, loop, snapshot, probe=probe, curriculum=curriculum)


def save_and_stop(run: Run, state: TrainState, loop: Loop) -> None:
    """Stops sampling and saves; returns when the checkpoint is on disk."""
    run.source.stop()
    run.checkpoints.wait()
    save(run, state, loop)
    run.checkpoints.wait()


def needed_versions(run: Run, step: int) -> set[int]:
    """Versions that may serve at `step` or later, and version 0 if it is the reference policy."""
    config = run.config
    recorded = config.rollout.source != "live" and config.objective.denominator == "learner"
    compared = config.compares and not config.preferences.dataset
    reference = recorded or compared or needs_reference_logp(config)
    return run.lag.needs(step) | ({0} if reference else set())


def publish_and_serve(run: Run, step: int, params: Any, loop: Loop) -> None:
    """Publishes the learner's weights if they are due, and serves the version that is due."""
    # Without sampling, version 0 is the only one that is ever read.
    if run.lag.publishes(step) and (run.source.live or step == 0):
        run.versions.publish(step, params)
        pinned = {v for versions in loop["pins"].values() for v in versions}
        run.versions.keep_only(pinned | run.source.versions() | needed_versions(run, step))
    due = run.lag.serves(step)
    run.source.serve(due, run.versions.path(due))


def report(config: Config, workdir: epath.Path, result: dict[str, Any]) -> None:
    """Writes result.json and learning.png, and prints the table if the run evaluates."""
    write_atomically(workdir / "result.json", [json.dumps(result, indent=1).encode()])
    lines = read_lines(workdir / "metrics.jsonl")
    before, after = result["before"], result["after"]
    title = f"{config.data.task}: {config.objective.name}, lag {config.lag.mode} {config.lag.steps}"
    plot_learning(lines, before if after else {}, after, workdir / "learning.png", title=title)
    if before and after:
        log(table({"before": before, "after": after}))
    for name in ("metrics.jsonl", "tensorboard", "learning.png", "checkpoints", "result.json"):
        if (workdir / name).exists():
            log(f"{name:<14}{workdir / name}")


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
