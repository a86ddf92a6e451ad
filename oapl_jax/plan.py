"""Plans a configuration for a TPU slice or one GPU; neither is needed, only the TPU's compiler.

python -m oapl_jax.plan --config=configs/competition_math.py --topology=v5e:8x8 [--config.…]
    [--model=qwen3-4b] [--workdir=runs/plan] [--storage=1e9] [--sweep [--enough=6]]
"""

import dataclasses
import functools
import json
import os
import string
import tempfile
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from absl import flags
from etils import epath
from jax.sharding import Mesh

from oapl_jax.config import Config, changed_settings
from oapl_jax.data.synthetic.tasks import TASKS
from oapl_jax.errors import RunError, UserError, exit_with_code
from oapl_jax.files import absolute, write_atomically
from oapl_jax.launch import read_command_line
from oapl_jax.learner.optimizer import make_optimizer
from oapl_jax.model import hf, sharding
from oapl_jax.model.config import ModelConfig
from oapl_jax.model.lora import open_lora
from oapl_jax.model.policy import open_policy
from oapl_jax.model.published import published, published_name
from oapl_jax.model.transformer import REMAT_POLICIES, Transformer
from oapl_jax.objectives import bind
from oapl_jax.planning.count import count
from oapl_jax.planning.estimate import estimate, host_memory
from oapl_jax.planning.hardware import GPUS, PAGES, Slice, make_mesh, open_slice
from oapl_jax.planning.layouts import Layout, kept_plan, layouts_of, meshes, plan_digest, sweep
from oapl_jax.planning.programs import Program, RunPrograms
from oapl_jax.rollout.local_sampler import check_divides
from oapl_jax.tracking.progress import log
from oapl_jax.weights.lag import LagPolicy
from oapl_jax.weights.publisher import config_hash, finished_steps

Plan = dict[str, Any]
Planner = Callable[[Config], Plan]
Keep = Callable[[str, Callable[[], Plan]], Plan]


def main() -> None:
    topology = flags.DEFINE_string("topology", None, "a slice, as v5e:8x8, or one GPU: h200")
    model = flags.DEFINE_string("model", None, "a published model's sizes, not model.path's")
    storage = flags.DEFINE_float("storage", 1e9, "bytes/s between a host and storage of versions")
    sweeps = flags.DEFINE_boolean("sweep", False, "try meshes, remat policies and micro-batches")
    enough = flags.DEFINE_integer("enough", 6, "meshes that fit, at which a sweep ends", 1)
    jax.config.update("jax_platforms", "cpu")  # else jax looks for a TPU
    flags.FLAGS.set_default("workdir", "runs/plan")
    config, workdir = read_command_line()
    if topology.value is None:
        raise UserError("--topology is missing; add, for example, --topology=v5e:8x8")
    name = topology.value
    if name in GPUS and sweeps.value:
        raise UserError(f"--sweep compiles, and for --topology={name} no compiler is here; drop it")
    where = None if name in GPUS else open_slice(name)
    with tempfile.TemporaryDirectory() as scratch:
        sizes, from_checkpoint = model_sizes(config, model.value, epath.Path(scratch))
    workdir.mkdir(parents=True, exist_ok=True)
    if where is None:
        plan = count_run(config, sizes, name, from_checkpoint=from_checkpoint)
        log(count_report(plan))
    else:
        known: dict[str, Any] = dict(from_checkpoint=from_checkpoint, storage=storage.value)
        plan_of = functools.partial(plan_run, sizes=sizes, where=where, **known)
        if sweeps.value:
            suffix = f", {sizes}, {plan_digest()}, {from_checkpoint}, {storage.value:g} bytes/s"
            kept = workdir / f"sweep-{name.replace(':', '-')}.json"
            keep = lambda key, make: kept_plan(kept, key + suffix, make)
            plan = sweep_run(config, sizes, where, plan_of, keep, enough.value)
        else:
            plan = plan_of(config)
        log(report(plan))
    path = workdir / f"{name.replace(':', '-')}.json"
    write_atomically(path, [f"{json.dumps(plan, indent=1)}\n".encode()])
    log(f"\n{path}")


def model_sizes(config: Config, name: str | None, scratch: epath.Path) -> tuple[ModelConfig, bool]:
    """Sizes of the model, and True if its weights come from files.

    Without the name of a published model, `model.path` decides; without that, the architecture. The
    tokenizer of a fresh model is written to `scratch`. Raises a UserError if the checkpoint is
    neither here nor named like a published model, or if prompt and response do not fit.
    """
    path, task = config.model.path, config.data.task
    if name is None and path and not epath.Path(path).exists():
        name = published_name(path)
        log(f"model.path={path} is not on this machine; planned with the sizes of {name}")
    if name is not None:
        sizes = published(name)
    elif path:
        sizes = hf.load_config(path)
    else:
        characters = TASKS[task].characters if task in TASKS else string.printable
        fresh: dict[str, Any] = dict(architecture=config.model.architecture, characters=characters)
        sizes = open_policy(scratch, path="", **fresh).config
    config.check_lengths(sizes.max_positions)
    return sizes, bool(name or path)


def plan_run(
    config: Config, sizes: ModelConfig, where: Slice, *, from_checkpoint: bool, storage: float
) -> Plan:
    """Checks a configuration for a slice as a run does, and estimates it."""
    host, make = where.devices[0].process_index, functools.partial(make_mesh, where)
    meshes = sharding.open_meshes(config.mesh, config.rollout, where.devices, host=host, make=make)
    config.check_layout(mesh=meshes[0].shape, hosts=where.hosts)
    config = config.derived(meshes[0].shape)
    run = programs_of(config, sizes, *meshes, from_checkpoint=from_checkpoint)
    return estimate(run, where, storage=storage, log=log)


def count_run(config: Config, sizes: ModelConfig, gpu: str, *, from_checkpoint: bool) -> Plan:
    """Checks a configuration for one GPU as a run does, and estimates it by count."""
    meshes = sharding.open_meshes(config.mesh, config.rollout, jax.devices()[:1], host=0)
    config.check_layout(mesh=meshes[0].shape, hosts=1)
    config = config.derived(meshes[0].shape)
    return count(programs_of(config, sizes, *meshes, from_checkpoint=from_checkpoint), gpu)


def programs_of(
    config: Config, sizes: ModelConfig, mesh: Mesh, sampler_mesh: Mesh, *, from_checkpoint: bool
) -> RunPrograms:
    """Programs of a run on these meshes; a UserError if the sampler's can't divide the model."""
    objective = config.objective
    not_planned = {
        "the warm-up (warmup.num_steps)": config.warmup.num_steps > 0,
        "the comparators (preferences.judge)": config.compares and not config.preferences.dataset,
        "the curator (curriculum.name)": config.curriculum.name == "actor_curator",
    }
    sections = ("objective", "rollout", "buffer", "lag", "learner")
    names = (*sections, "group_size", "groups_per_step", "publish_dtype")
    run = RunPrograms(
        **{name: config[name] for name in names},
        model=Transformer(
            sizes,
            jnp.dtype(config.model.dtype),
            config.model.remat,
            open_lora(config.model.lora),
        ),
        mesh=mesh,
        sampler_mesh=sampler_mesh,
        from_checkpoint=from_checkpoint,
        loss=bind(objective.name, objective.constants, group_size=config.group_size),
        optimizer=make_optimizer(**config.optim, num_steps=config.num_steps),
        max_prompt_tokens=config.data.max_prompt_tokens,
        evaluates=config.evaluation.every > 0,
        not_planned=tuple(part for part, there in not_planned.items() if there),
    )
    if run.samples or run.evaluates:
        check_divides(sizes, sampler_mesh)
    return run


def with_layout(config: Config, layout: Layout) -> Config:
    """A copy of the configuration with this layout."""
    mesh = dataclasses.replace(config.mesh, **layout.mesh)
    model = dataclasses.replace(config.model, remat=layout.remat)
    learner = dataclasses.replace(
        config.learner,
        micro_batches=layout.micro_batches,
        rows_multiple=layout.mesh["data"] * layout.mesh["fsdp"],
        row_length=layout.row_length(config.learner.row_length),
    )
    return dataclasses.replace(config, mesh=mesh, model=model, learner=learner)


def sweep_run(
    config: Config, sizes: ModelConfig, where: Slice, plan_of: Planner, keep: Keep, enough: int
) -> Plan:
    """The plan of the fastest layout that fits; logs a table of the others.

    `keep` returns the plan under a key, made if it is missing. Raises a UserError if none fits.
    """
    refusal = ""

    def plan_or_refusal(chosen: Config) -> Plan:
        try:
            return plan_of(chosen)
        except (UserError, RunError) as error:  # of this layout; there are others
            return {"fits": False, "chip_fits": False, "refused": str(error)}

    def plan(layout: Layout) -> Plan:
        nonlocal refusal
        chosen = with_layout(config, layout)
        log(f"trying {layout}")
        key = f"{layout}; configuration {config_hash(chosen.to_dict())[:12]}"
        found = keep(key, lambda: plan_or_refusal(chosen))
        if "refused" in found:
            refusal = f"; the last refusal: {found['refused']}"
            log(f"refused: {found['refused']}")
        return found

    sequences = config.group_size * config.groups_per_step
    found = sweep(
        meshes(sequences, sizes, len(where.devices) - where.hosts * config.rollout.devices),
        ["full", *(remat for remat in reversed(REMAT_POLICIES) if remat != "full")],
        functools.partial(layouts_of, sequences),
        plan,
        enough=enough,
    )
    if not found:
        raise UserError(f"nothing fits {where.name}; name a larger --topology{refusal}")
    log("\nFits, the least time of a step first:")
    for layout, result in found:
        bound, used = result["roofline"], max(sum(p["hbm"].values()) for p in result["programs"])
        speed = f"{bound['seconds']:8.3g} s ({bound['binds']})  {bound['mfu']:4.0%} MFU"
        log(f"  {speed}  {size(used):>10}  {layout}")
    log("")
    return found[0][1]


def report(plan: Plan) -> str:
    """A plan as text."""
    batch, hbm, ram = plan["batch"], plan["hbm"], plan["host_memory"]
    lines = [
        f"{plan['topology']}: {plan['chips']} chips on {plan['hosts']} hosts, mesh "
        f"{mesh_text(plan['mesh'])}; "
        f"{plan['model']['parameters'] / 1e9:.3g} billion parameters; {batch['sequences']} "
        f"sequences of {batch['prompt_tokens']} + {batch['response_tokens']} tokens in "
        f"{batch['micro_batches']} micro-batches of {batch['rows']} rows; remat {plan['remat']}\n",
        *([f"Compiled with {plan['compiler_flags']}"] if plan["compiler_flags"] else []),
        verdict(plan),
    ]
    for program in plan["programs"]:
        fits = "fits" if program["fits"] else "does not fit"
        lines.append(f"  {program['program']}: {fits}, {program['because']} a chip")
        if kinds := [f"{kind} {size(used)}" for kind, used in program["hbm"].items()]:
            lines.append("    " + ", ".join(kinds))
        if count := program["resharded by replication"]:
            warning = f"the compiler replicates {count} arrays on every chip to reshard them"
            lines.append(f"    WARNING: {warning}")
    lines += [
        f"  restore: {size(plan['restore']['hbm'])} a chip, no program is compiled",
        f"  a chip: {size(hbm['available'])} for a program, says the compiler; "
        f"{size(hbm['published'])} of HBM, says {PAGES}/{plan['topology'].partition(':')[0]}",
        f"  a host: {ram['total'] / 1e9:.0f} GB of {ram['ram'] / 1e9:.0f} GB of RAM",
    ]
    if "roofline" not in plan:
        return "\n".join(lines)
    flops, bound = plan["flops"], plan["roofline"]
    lines += [
        f"\nFLOPs of a step: {flops['formula']:.3g} by formula, {flops['program']:.3g} in the "
        f"program, of which remat adds {flops['remat_share']:.0%}",
        f"HBM traffic of a step: {size(plan['hbm_traffic'])} a chip; between chip and host "
        f"{size(plan['host_traffic'])}",
        "\nBytes that a chip receives in a step, by collective and mesh axis:",
    ]
    for kind, row in sorted(plan["collectives"].items()):
        for axes, received in sorted(row.items()):
            speed = plan["ici_bandwidth"][axes] / 1e9
            lines.append(f"  {kind:<20}{axes:<16}{size(received):>12} at {speed:.0f} GB/s")
    lines += [
        f"\nA step takes at least {bound['seconds']:.3g} s: compute {bound['compute']:.3g}, HBM "
        f"{bound['hbm']:.3g}, interconnect {bound['interconnect']:.3g}, link to the host "
        f"{bound['host']:.3g}; {bound['binds']} binds",
        f"At most {bound['tokens_per_second']:,.0f} tokens/s and {bound['mfu']:.0%} MFU",
        f"\nPublishing: {plan['publish_seconds']:.3g} s at {plan['storage'] / 1e9:g} GB/s a host",
        *sampler_lines(plan.get("sampler", {})),
        *fleet_lines(plan),
    ]
    return "\n".join(lines)


def sampler_lines(sampler: Plan) -> list[str]:
    """The embedded sampler: its slots, and if it fits its speed."""
    if not sampler:
        return []
    lines = [
        f"\nSampler: mesh {mesh_text(sampler['mesh'])} on each host, {sampler['slots']} slots of "
        f"{sampler['places']} tokens; at least {sampler['slots_that_fit']} fit"
    ]
    for name, bound in sampler.get("bounds", {}).items():
        lines.append(f"  {name}: at least {bound['seconds']:.3g} s, {bound['binds']} binds")
    if "tokens_per_second" in sampler:
        lines.append(
            f"  a token of all slots takes at least {1e3 * sampler['seconds_per_token']:.3g} ms: "
            f"at most {sampler['tokens_per_second']:,.0f} generated tokens/s"
        )
    if "share" in sampler:
        lines.append(
            f"  the rollouts of a step take at least {sampler['seconds']:.3g} s: "
            f"{sampler['share']:.0%} of a step of {sampler['step_seconds']:.3g} s"
        )
    return lines


def count_report(plan: Plan) -> str:
    """A plan by count as text."""
    left = "; ".join(plan["not_planned"])
    lines = [
        f"One {plan['topology']}, by count: nothing is compiled; "
        f"{plan['parameters'] / 1e9:.3g} billion parameters\n",
        ("FITS" if plan["fits"] else "DOES NOT FIT") + (f", without {left}" if left else ""),
    ]
    for stage, kinds in plan["memory"].items():
        lines.append(f"  {stage}: {size(sum(kinds.values()))} of {size(plan['usable'])}")
        lines.append("    " + ", ".join(f"{kind} {size(used)}" for kind, used in kinds.items()))
    lines.append(f"\nThe products of a step take at least {plan['learning_seconds']:.3g} s")
    return "\n".join([*lines, *sampler_lines(plan["sampler"])])


def fleet_lines(plan: Plan) -> list[str]:
    """Demand on a fleet of servers; none if the embedded sampler makes the rollouts."""
    fleet = plan["fleet"]
    if "share" in plan.get("sampler", {}):
        return []
    demand = f"{fleet['tokens_per_second']:,.0f} generated tokens/s keep the learner busy"
    if not fleet["tokens_per_second"]:
        demand = "none, the rollouts are recorded ones; the learner is busy"
    busy = f"{fleet['learning']:.0%} of the time with steps, else publishing"
    return [f"Fleet: {demand}, {busy}"]


def mesh_text(mesh: Plan) -> str:
    return " x ".join(f"{axis} {count}" for axis, count in mesh.items() if count > 1) or "1"


def verdict(plan: Plan) -> str:
    """The first line of a report: fits or not, and the parts that are not planned."""
    if not plan["chip_fits"]:
        changes = " ".join(f"--config.{change}" for change in plan["remedies"])
        return f"DOES NOT FIT; it may with {changes}" if changes else "DOES NOT FIT"
    if not plan["fits"]:
        return "DOES NOT FIT THE HOST"
    left = "; ".join(plan["not_planned"])
    return f"FITS, but for what is not planned and needs HBM too: {left}" if left else "FITS"


def size(count: float) -> str:
    """Bytes in a readable unit."""
    units = {"GiB": 2**30, "MiB": 2**20, "KiB": 2**10}
    unit = next((name for name, value in units.items() if count >= value / 10), "B")
    return f"{count / units.get(unit, 1):.2f} {unit}"


# The dry run of oapl_jax.train, on this machine's devices


def dry_run(config: Config, workdir: epath.Path, *, restore_step: int | None) -> str:
    """Describes a run without starting it: steps, sizes, memory, files. Writes nothing.

    Raises:
      UserError: as the run would, for settings that fit neither devices nor the workdir.
    """
    with tempfile.TemporaryDirectory() as scratch:
        sizes, from_checkpoint = model_sizes(config, None, epath.Path(scratch))
    devices, host = jax.devices(), jax.process_index()
    meshes = sharding.open_meshes(config.mesh, config.rollout, devices, host=host)
    config.check_layout(mesh=meshes[0].shape, hosts=jax.process_count())
    changed = changed_settings(workdir, config.to_dict())
    config = config.derived(meshes[0].shape)
    run = programs_of(config, sizes, *meshes, from_checkpoint=from_checkpoint)
    directory = workdir / "checkpoints"
    saved = finished_steps(directory) if directory.exists() else []
    if restore_step is not None and restore_step not in saved:
        raise UserError(f"--restore_step={restore_step} is not in {workdir} (have: {saved})")
    first = restore_step if restore_step is not None else (saved or [0])[-1]
    return "\n".join(
        [
            *(f"changed since this run began: {change}" for change in changed),
            *("", "Steps", *_steps(config, first, resumes=bool(saved))),
            *("", "Sizes", *_sizes(run)),
            *("", "Memory", *_memory(run)),
            *("", "Would be written", *_files(config, workdir, run)),
        ]
    )


def _steps(config: Config, first: int, *, resumes: bool) -> list[str]:
    """Counts of a run from step `first` on."""
    lag, last = LagPolicy(**config.lag, seed=config.seed), config.num_steps
    done = range(first + 1, last + 1)
    due = lambda every: sum(step % every == 0 or step == last for step in done) if every else 0
    live = config.rollout.source != "dataset"
    published = sum(lag.publishes(step) for step in range(first, last)) if live else 1
    warm_up = config.warmup.num_steps if not resumes else 0
    groups = config.groups_per_step * (last - first)
    lags = f"{config.lag.mode} {config.lag.steps}"
    return [
        f"  {'resumes at' if resumes else 'begins at'} step {first}, ends after step {last}"
        + (f"; {warm_up} steps of the warm-up before" if warm_up else ""),
        f"  {groups} groups of {config.group_size} trained on, lag {lags}, {published} versions",
        f"  {due(config.evaluation.every)} evaluations, "
        f"{due(config.checkpoint.every) + (not resumes)} checkpoints",
    ]


def _sizes(run: RunPrograms) -> list[str]:
    batch, mesh = run.longest.tokens.shape, {k: v for k, v in run.mesh.shape.items() if v > 1}
    devices, hosts = run.mesh.devices, jax.process_count()
    shape = " x ".join(f"{axis} {count}" for axis, count in mesh.items()) or "1"
    return [
        f"  {hf.parameter_count(run.model.config):,} parameters of a {run.model.config.model_type}",
        f"  {run.sequences} sequences a step of at most {run.max_prompt_tokens} + "
        f"{run.rollout.max_response_tokens} tokens: at most {batch[0]} micro-batches of "
        f"{batch[1]} rows of {batch[2]} tokens",
        f"  {devices.size} devices ({devices.flat[0].device_kind}) of {hosts} hosts, mesh {shape}",
    ]


def _memory(run: RunPrograms) -> list[str]:
    """Bytes on a device, train step and decoding as compiled for it, and on a host."""
    host = host_memory(run, len(run.mesh.local_devices))
    line = lambda kinds: ", ".join(f"{kind} {size(used)}" for kind, used in kinds.items())
    limits = run.mesh.devices.flat[0].memory_stats() or {}
    have = f" of {size(limits['bytes_limit'])}" if "bytes_limit" in limits else ""

    def on_device(program: Program, name: str) -> str:
        figures = program.trace().lower().compile().memory_analysis()
        kinds = {**program.hbm, f"temporaries of {name}": figures.temp_size_in_bytes}
        return f"  a device: {size(sum(kinds.values()))}{have}: {line(kinds)}"

    return [
        on_device(run.gradient_step(), "the train step"),
        *(on_device(program, program.name) for program in run.sampling()[:1]),
        f"  a host, beside that: {size(sum(host.values()))}: {line(host)}",
        *(f"  not estimated: {part}" for part in run.not_planned),
    ]


def _files(config: Config, workdir: epath.Path, run: RunPrograms) -> list[str]:
    count, tracking = hf.parameter_count(run.model.config), config.tracking
    state = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(run.state))
    trained = hf.parameter_count(run.model.config, run.model.lora)
    version = jnp.dtype(config.publish_dtype).itemsize * count
    if run.frozen:  # adapters are published in float32
        version = 4 * trained + version * config.model.lora.merged
    data, cache = os.path.abspath(config.data.data_dir), config.compile_cache
    written = {
        "config.json, lease.json, log.txt, result.json, learning.png": True,
        "model/": not config.model.path,
        "metrics.jsonl, ledger.jsonl": True,
        "tensorboard/": tracking.tensorboard,
        f"wandb/ ({tracking.wandb}, project {tracking.project})": tracking.wandb != "off",
        f"checkpoints/: the newest {config.checkpoint.keep}, {size(state)} each": True,
        "host_states/": True,
        f"versions/ of {size(version)} and weights/ of {size(4 * trained)} each": True,
        "rollouts/": config.rollout.kept_share > 0 and config.rollout.source != "dataset",
    }
    return [
        f"  in {workdir}:",
        *(f"    {name}" for name, there in written.items() if there),
        f"  {data}: the data sets, unless they are prepared",
        *([f"  {absolute(workdir / cache)}: compiled programs"] if cache else []),
    ]


if __name__ == "__main__":
    exit_with_code(main)
