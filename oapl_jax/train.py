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
from logging.handlers import QueueHandler
from typing import Any

import jax
import numpy as np
from absl import flags
from etils import epath

from oapl_jax import multihost
from oapl_jax.build import Run
from oapl_jax.config import Config, changed_settings, save_config
from oapl_jax.data.synthetic.demonstrations import demonstrations
from oapl_jax.errors import FleetLost, NotFinite, UserError, exit_with_code
from oapl_jax.evaluation import table
from oapl_jax.files import write_atomically
from oapl_jax.launch import origins, package_versions, read_command_line, use_compile_cache
from oapl_jax.learner import packing, sft, train_step
from oapl_jax.learner.optimizer import make_optimizer
from oapl_jax.learner.train_step import TrainState
from oapl_jax.rewards.function.verifier import find_function
from oapl_jax.structs import Batch, Group
from oapl_jax.tracking.metrics import (
    CompileClock,
    MetricsWriter,
    StepClock,
    group_metrics,
    read_lines,
    residuals_by_lag,
)
from oapl_jax.tracking.plots import plot_learning
from oapl_jax.tracking.progress import (
    Progress,
    StopRequest,
    command_again,
    keep_running_without_terminal,
    log,
    queue_library_logs,
    write_library_logs,
)
from oapl_jax.tracking.trackers import check_trackers, trackers
from oapl_jax.weights import lease
from oapl_jax.weights.publisher import finished_steps

MAX_SKIPPED = 3  # consecutive steps with a non-finite loss, gradient or update before an abort
Loop = dict[str, Any]  # JSON values of the loop: test results before, seconds, pinned versions


def run(
    config: Config,
    workdir: epath.Path,
    stop: StopRequest,
    *,
    restore_step: int | None = None,
    library_logs: QueueHandler | None = None,
) -> dict[str, Any] | None:
    """Trains until `config.num_steps`; returns the results, or None if stopped before.

    `library_logs` are written to log.txt in the workdir.

    Raises:
      UserError: for settings or files that do not fit, before any work.
      RunError: for a run that can't continue; what it saved stays.
    """
    run = Run(config, workdir)
    ended = train(run, stop, restore_step=restore_step, library_logs=library_logs)
    return None if ended is None else ended[0]


def train(
    run: Run,
    stop: StopRequest,
    *,
    restore_step: int | None = None,
    library_logs: QueueHandler | None = None,
) -> tuple[dict[str, Any], TrainState] | None:
    """Trains a run, of which a caller may have replaced parts, and closes it.

    Returns the results and the last state, or None if stopped before the end.
    """
    clock = CompileClock()
    with contextlib.ExitStack() as closing, multihost.abort_on_peer_failure():
        if not jax.process_index():
            closing.enter_context(lease.hold(run.workdir, log=log, lost=multihost.exit_now))
            run.leased = True
        multihost.barrier("the lease", deadline=run.config.rollout.deadline)
        if library_logs:  # a second process must not open the log of the first
            path = run.workdir / multihost.per_host_path("log.txt")
            closing.enter_context(write_library_logs(library_logs, path))
        closing.callback(run.close)
        begun = begin(run, stop, restore_step)
        if begun is None:
            return None
        return train_from(run, *begun, stop, clock)


def begin(run: Run, stop: StopRequest, restore_step: int | None) -> tuple[TrainState, Loop] | None:
    """Checks settings and files, then resumes or initializes; None if stopped meanwhile.

    The configuration is saved once nothing is left that could refuse it.
    """
    config, host0 = run.config, not jax.process_index()
    if restore_step is not None:
        run.checkpoint_step(restore_step)
    check_trackers(config.tracking)
    for change in changed_settings(run.workdir, run.given.to_dict()) if host0 else ():
        log(f"changed since this run began: {change}")
    if host0 and config.lag.mode != "uniform" and config.lag.steps >= config.num_steps > 0:
        log(
            f"lag.steps={config.lag.steps} is no shorter than num_steps={config.num_steps}: "
            "version 0 serves the whole run"
        )
    if run.source.live or config.evaluation.every:
        run.check_grader()
    resumes = run.checkpoints.steps() or restore_step is not None
    begun = resume(run, restore_step) if resumes else init_run(run, stop)
    if begun is not None and host0:
        save_config(run.workdir, run.given.to_dict())
    return begun


def train_from(
    run: Run, state: TrainState, loop: Loop, stop: StopRequest, clock: CompileClock
) -> tuple[dict[str, Any], TrainState] | None:
    """The training loop, from a state to `num_steps` or a stop; as `train`."""
    config, source = run.config, run.source
    section = functools.partial(multihost.collective_section, deadline=config.rollout.deadline)
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
        return_logp=source.live and config.rollout.kept_share > 0,
        **settings,
    )
    logp_fn = train_step.make_logp_step(run.model, run.mesh, **settings)
    frozen = [run.frozen] if run.frozen else []  # the step donates all of the state

    def logp_after(params: Any, batch: Batch, step: int) -> np.ndarray:
        with section(f"log-probs after gradient step {step + 1}"):
            return jax.device_get(logp_fn(run.whole(params), batch))

    shardings = train_step.batch_shardings(run.mesh)
    first = int(state.step)
    opened = trackers(config.tracking, run.workdir, start_step=first, config=config.to_dict())
    metrics_file = MetricsWriter(opened)
    progress = Progress("train", config.num_steps, first)

    with contextlib.closing(metrics_file), contextlib.closing(progress):
        if not first:
            save(run, state, loop, metrics_file)
        stop.waits_for = "the current step"
        spent = StepClock()
        for step in range(first, config.num_steps):
            started = time.monotonic()
            publish_and_serve(run, step, state.params, loop)
            spent("publish")
            try:
                groups, waited = source.collect(step, stop)
            except FleetLost:
                save_and_stop(run, state, loop, metrics_file)
                raise
            if not groups:
                break
            spent("groups")
            batch = packing.to_mesh(build_batch(run, groups, step), shardings)
            spent("pack")
            with section(f"gradient step {step + 1}"):
                batch = recompute_logps(run, logp_fn, batch, step)
                spent("recompute")
                learning = time.monotonic()
                state, metrics = step_fn(state, batch, *frozen)
                metrics = jax.device_get(metrics)
            learned = time.monotonic() - learning
            spent("learn")
            source.store.trained(groups, functools.partial(logp_after, state.params, batch, step))
            responses = metrics.pop("responses")
            source.note(groups, step, responses)
            spent("curriculum")
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
            if "residual" in responses:
                values |= residuals_by_lag(groups, step, responses["residual"])
            spent("evaluate")
            values |= spent.take()
            progress.step(done, metrics_file.write(done, values))
            check_finite(run, done, metrics, "optim")
            # After a skipped step the weights may be ruined, though finite: older checkpoints stay.
            sound = not metrics["skipped_in_a_row"] or done == config.num_steps
            if due(config.checkpoint.every) and sound:
                save(run, state, loop, metrics_file)
            run.checkpoints.check()
            spent("checkpoint")  # counts in the next step's line
        source.stop()
        step = int(state.step)
        if step < config.num_steps:
            save_and_stop(run, state, loop, metrics_file)
            return None
        after = run.evaluate(step, state.params, "test") if config.evaluation.every else {}
    return {"before": loop["before"], "after": after, "seconds": loop["seconds"]}, state


def init_run(run: Run, stop: StopRequest) -> tuple[TrainState, Loop] | None:
    """State at step 0, from a checkpoint or fresh weights, after the warm-up if there is one.

    Returns None if a stop was requested in the warm-up, of which nothing is saved.
    """
    config, started = run.config, time.monotonic()
    section = functools.partial(multihost.collective_section, deadline=config.rollout.deadline)
    with section("loading the model"):
        params: Any = run.start_params()
    if config.warmup.num_steps:
        shown = {"loss": "loss {:.3f}"}
        progress = Progress("warm up", config.warmup.num_steps, 0, shown)
        stop.waits_for = "the current step of the warm-up"
        with section("the warm-up") as warmup, contextlib.closing(progress):

            def on_step(step: int, metrics: dict[str, Any]) -> bool:
                warmup.progress()
                progress.step(step, {"loss": metrics["loss"]})
                check_finite(run, step, metrics, "warmup.optim")
                return agree_to_stop(stop, f"warm-up step {step}", config.rollout.deadline)

            params = warm_up(run, params, on_step)
        if stop.requested:
            return None
    seconds = {"warmup": time.monotonic() - started, "rl": 0.0}
    with section("the first state"):
        state = train_step.init_state(run.model, run.optimizer, run.mesh, params)
    stop.waits_for = "the evaluation of step 0 and its checkpoint"
    before = run.evaluate(0, state.params, "test") if config.evaluation.every else {}
    return state, {"before": before, "seconds": seconds, "pins": {}, "frozen": run.frozen_digest}


def agree_to_stop(stop: StopRequest, name: str, deadline: float) -> bool:
    """True if any host was asked to stop; all hosts must call it."""
    mine = stop.requested.encode()
    asked = [text.decode() for text in multihost.allgather_bytes(mine, name, deadline=deadline)]
    stop.requested = next(filter(None, asked), "")
    return bool(stop.requested)


def warm_up(run: Run, params: Any, on_step: Callable[[int, dict[str, Any]], bool]) -> Any:
    """Parameters after the supervised stage on noisy demonstrations; `on_step`: see sft.warm_up."""
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
        on_step=on_step,
        frozen=run.frozen,
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


def check_finite(run: Run, step: int, metrics: dict[str, Any], optim: str) -> None:
    """Raises NotFinite after MAX_SKIPPED consecutive skipped steps, naming the section `optim`."""
    if metrics["skipped_in_a_row"] == MAX_SKIPPED:
        saved = run.checkpoints.steps()
        again = f"resumes from checkpoint step {saved[-1]}" if saved else "begins again"
        raise NotFinite(
            f"loss, gradient or update was not finite in {MAX_SKIPPED} steps up to {step}; lower "
            f"{optim}.learning_rate or look at the rewards; the same command {again}"
        )


def resume(run: Run, restore_step: int | None) -> tuple[TrainState, Loop]:
    """Restores a checkpoint, the newest by default; removes later ones and later versions."""
    step, deadline = run.checkpoint_step(restore_step), run.config.rollout.deadline
    with multihost.collective_section(f"the restore of step {step}", deadline=deadline):
        state, loop, host_states = run.checkpoints.restore(step, run.abstract_state)
    if loop.get("frozen", "") != run.frozen_digest:
        raise UserError(
            f"model.path={run.config.model.path} has other weights than when this run began, and "
            f"the adapters of {run.workdir} fit no others; put them back, or give another --workdir"
        )
    run.source.restore(host_states, functools.partial(run.checkpoints.restore_curriculum, step))
    if later := run.checkpoints.delete_after(step):
        log(f"removed the later checkpoint steps {', '.join(map(str, later))}")
    run.versions.keep_only({v for pins in loop["pins"].values() for v in pins if v <= step})
    for version, names in run.versions.repair().items():
        log(f"version {version} was damaged: restored {', '.join(names)} from its Orbax step")
    log(f"resumed from checkpoint step {step} of {run.workdir}")
    return state, loop


def save(run: Run, state: TrainState, loop: Loop, metrics: MetricsWriter) -> None:
    """Starts to save everything that moves, and pins the versions that the checkpoint needs.

    Metrics, ledger and recorded groups are on the disk or in the bucket before.
    """
    step, deadline = int(state.step), run.config.rollout.deadline
    held = run.source.held_versions(f"the pins of step {step}")
    kept = [str(s) for s in run.checkpoints.steps()]
    loop["pins"] = {s: versions for s, versions in loop["pins"].items() if s in kept}
    loop["pins"][str(step)] = sorted(needed_versions(run, step) | held)
    curriculum = run.source.store.curriculum_arrays()
    # Before the section: a thread that scores prompts waits for it with the store's lock.
    snapshot = run.source.snapshot()
    with multihost.collective_section(f"the checkpoint of step {step}", deadline=deadline):
        probe = run.versions.probe(state.params)
        metrics.sync()
        run.checkpoints.save(step, state, loop, snapshot, probe=probe, curriculum=curriculum)


def save_and_stop(run: Run, state: TrainState, loop: Loop, metrics: MetricsWriter) -> None:
    """Stops sampling and saves; returns when the checkpoint is on disk."""
    run.source.stop()
    run.checkpoints.wait()
    save(run, state, loop, metrics)
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


def summary(workdir: epath.Path, ended: str) -> str:
    """One line for a stopped or failed run: what is saved, what is lost, the command that goes on.

    `ended` says why it ended.
    """
    directory = workdir / "checkpoints"
    saved = finished_steps(directory) if directory.exists() else []
    lines = read_lines(workdir / multihost.per_host_path("metrics.jsonl"))
    reached = lines[-1]["step"] if lines else 0
    if not saved:
        lost = "the warm-up" + (f" and steps 1 to {reached}" if reached else "")
        return f"{ended}; saved: nothing; lost: {lost}; begin again: {command_again()}"
    lost = f"steps {saved[-1] + 1} to {reached}" if reached > saved[-1] else "no finished step"
    return (
        f"{ended}; saved: step {saved[-1]} in {directory}; lost: {lost}, and groups in flight, "
        f"which are sampled again; resume: {command_again()}"
    )


def dry_run(config: Config, workdir: epath.Path, *, restore_step: int | None) -> str:
    """The settings with their origins, the packages, and the run as `plan.dry_run` describes it."""
    from oapl_jax import plan  # here, since no run needs it

    jax.config.update("jax_enable_compilation_cache", False)  # nothing is written
    check_trackers(config.tracking)
    if config.rewards.function:
        find_function(config.rewards.function)
    described = plan.dry_run(config, workdir, restore_step=restore_step)
    settings = [
        f"  {name} = {value!r}  ({place})" for name, (value, place) in origins(config).items()
    ]
    packages = ", ".join(f"{name} {version}" for name, version in package_versions().items())
    return "\n".join(["Settings", *settings, described, "", f"Packages\n  {packages}"])


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
    restore_step = flags.DEFINE_integer(
        "restore_step", None, "checkpoint step to resume from; later ones are removed"
    )
    dry = flags.DEFINE_bool("dry-run", False, "print what the run would be, and write nothing")
    config, workdir = read_command_line()
    multihost.initialize(
        pod=pod.value, coordinator=coordinator.value, hosts=count.value, host=host.value
    )
    if dry.value:
        print(dry_run(config, workdir, restore_step=restore_step.value))
        return
    use_compile_cache(config.compile_cache, workdir)
    keep_running_without_terminal()
    library_logs = queue_library_logs()
    stop = StopRequest()
    with multihost.abort_on_peer_failure():
        try:
            result = run(
                config, workdir, stop, restore_step=restore_step.value, library_logs=library_logs
            )
        except UserError:  # a mistake: nothing has begun
            raise
        except Exception as error:
            log(summary(workdir, f"failed ({type(error).__name__})"))
            raise
    if result is None:
        log(summary(workdir, f"stopped by {stop.requested}"))
    if result is None or jax.process_index():
        return
    if install.value is not None:
        result["seconds"]["install"] = install.value
    report(config, workdir, result)


if __name__ == "__main__":
    exit_with_code(main)
