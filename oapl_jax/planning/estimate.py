"""Estimate of one run on one slice: memory, roofline, hosts and fleet, as a dictionary for JSON.

The roofline is the longest of four times: FLOPs, HBM traffic, collectives, and traffic with the
host, each over its published rate. No step can be faster; a real one is slower.
"""

import math
import os
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from oapl_jax.model import hf
from oapl_jax.planning import programs
from oapl_jax.planning.hardware import Chip, Slice, axis_bandwidth
from oapl_jax.planning.hlo import Module, collective_bytes, traffic
from oapl_jax.planning.programs import (
    CACHE,
    GROWING,
    SAMPLER,
    VERSIONS,
    Compilation,
    Program,
    RunPrograms,
    available_hbm,
    compile_program,
    per_chip,
)

PUBLISHER_BYTES = 1e9  # beside two of the largest tensor; docs/serving.md
FIGURES = ("fits", "because", "hbm", "donated", "offloaded")  # of a Compilation, in a plan


def estimate(
    run: RunPrograms, where: Slice, *, storage: float, log: Callable[[str], None]
) -> dict[str, Any]:
    """Compiles the programs of a run and reads them; if the train step does not fit, only that.

    `storage` is the bytes/s between a host and the storage of versions; `log` is called with a line
    for each program. Raises a RunError if a program does not compile for another reason than
    memory, or the compiler's output has a form that is not known.
    """
    available = available_hbm(where)
    compiled, times = compile_all(run, where, available, log)
    learners = where.chips_per_host - run.rollout.devices
    ram = host_memory(run, learners)
    ram["offloaded"] = float(learners * max(p["offloaded"] for p in compiled))
    ram |= {"total": sum(ram.values()), "ram": where.host_ram}
    chip_fits = all(program["fits"] for program in compiled)
    count = hf.parameter_count(run.model.config)
    if "roofline" in times:
        dtype_bytes = jnp.dtype(run.publish_dtype).itemsize
        published = hf.parameter_count(run.model.config, run.model.lora)
        publish = publish_seconds(published, dtype_bytes, where.hosts, storage)
        demand = fleet_demand(run, times["roofline"]["seconds"], publish)
        times |= {"publish_seconds": publish, "storage": storage, "fleet": demand}
    return {
        "topology": where.name,
        "compiler_flags": os.environ.get("LIBTPU_INIT_ARGS", ""),
        "chips": len(where.devices),
        "hosts": where.hosts,
        "mesh": dict(run.mesh.shape),
        "model": {"type": run.model.config.model_type, "parameters": count},
        "batch": {
            "micro_batches": run.learner.micro_batches,
            "rows": run.longest.tokens.shape[1],
            "row_length": run.learner.row_length,
            "sequences": run.sequences,
            "prompt_tokens": run.max_prompt_tokens,
            "response_tokens": run.rollout.max_response_tokens,
        },
        "remat": run.model.remat,
        "fits": chip_fits and ram["total"] <= ram["ram"],
        "chip_fits": chip_fits,
        "hbm": {"available": available, "published": where.chip.hbm_bytes},
        "programs": compiled,
        "restore": {"hbm": per_chip(run.state)},
        "host_memory": ram,
        "not_planned": list(run.not_planned),
        **times,
    }


def compile_all(
    run: RunPrograms, where: Slice, available: int, log: Callable[[str], None]
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Memory of each program; times and remedies as far as the programs fit."""
    compiled: dict[str, Compilation] = {}
    results = []

    def add(program: Program) -> Compilation:
        started = time.monotonic()
        result = compiled[program.name] = compile_program(program, available)
        seconds = time.monotonic() - started
        log(f"{where.name}, {program.name}: {result.because} ({seconds:.0f} s)")
        figures = {name: getattr(result, name) for name in FIGURES}
        figures |= {"resharded by replication": result.replicated}
        figures |= {"compile_seconds": round(seconds, 1)}
        results.append({"program": program.name, **figures})
        return result

    first, *others = run.programs()
    step, times, slots = add(first), {}, 0
    if step.fits and step.module is not None:
        times = step_times(run, where, step.traced, step.module)
        for program in (*others, *run.sampling()):
            add(program)
        if run.sampling():
            slots = slots_that_fit(run, available, compiled, log)
            times["sampler"] = sampler_plan(run, where, compiled, slots)
    return results, times | {"remedies": remedies(run, available, compiled, slots)}


Work = dict[str, Any]  # of a program: arguments of `least_seconds`


def measure(where: Slice, mesh: Mesh, traced: Any, module: Module) -> tuple[dict[str, Any], Work]:
    """FLOPs, traffic and collectives of a program, for the plan and for its bounds."""
    collectives = collective_bytes(module, mesh.shape)
    rows = collectives.values()
    received = {axes: sum(row.get(axes, 0.0) for row in rows) for row in rows for axes in row}
    bandwidth = {axes: axis_bandwidth(where, mesh, axes.split("+")) for axes in received}
    flops, (hbm_bytes, host_bytes) = programs.program_flops(traced), traffic(module)
    figures = {
        "flops": flops,
        "hbm_traffic": hbm_bytes,
        "host_traffic": host_bytes,
        "collectives": collectives,
        "ici_bandwidth": bandwidth,
    }
    sizes = dict(flops=flops["program"], hbm_bytes=hbm_bytes, host_bytes=host_bytes)
    return figures, dict(**sizes, received=received, bandwidth=bandwidth)


def step_times(run: RunPrograms, where: Slice, traced: Any, module: Module) -> dict[str, Any]:
    """FLOPs, traffic and roofline of the train step."""
    figures, work = measure(where, run.mesh, traced, module)
    lengths = run.max_prompt_tokens, run.rollout.max_response_tokens
    frozen = bool(run.frozen)
    formula = programs.step_flops(run.model.config, run.sequences, *lengths, frozen=frozen)
    tokens, flops = run.sequences * sum(lengths), figures["flops"]
    share = flops["remat"] / flops["program"]
    return {
        **figures,
        "flops": {"formula": formula, **flops, "remat_share": share},
        "roofline": roofline(where.chip, run.mesh.size, model_flops=formula, tokens=tokens, **work),
    }


def least_seconds(
    chip: Chip,
    chips: int,
    *,
    flops: float,
    hbm_bytes: float,
    host_bytes: float,
    received: Mapping[str, float],
    bandwidth: Mapping[str, float],
) -> dict[str, Any]:
    """Least seconds of a program by term, and the longest of them, which binds.

    FLOPs are of all chips, with remat. Bytes are of one chip, `received` by mesh axes, one set of
    axes after the other.
    """
    terms = {
        "compute": flops / chips / chip.flops,
        "hbm": hbm_bytes / chip.hbm_bandwidth,
        "interconnect": sum(size / bandwidth[axes] for axes, size in received.items()),
        "host": host_bytes / chip.host_bandwidth,
    }
    binds = max(terms, key=lambda term: terms[term])
    return {**terms, "seconds": terms[binds], "binds": binds}


def roofline(
    chip: Chip, chips: int, *, model_flops: float, tokens: int, **work: Any
) -> dict[str, Any]:
    """Least seconds of a gradient step by term, with tokens/s and MFU at the longest of them.

    FLOPs by formula are for the MFU; `work` is that of `least_seconds`. Tokens include prompts.
    """
    bound = least_seconds(chip, chips, **work)
    return {
        **bound,
        "tokens_per_second": tokens / bound["seconds"],
        "mfu": model_flops / (bound["seconds"] * chips * chip.flops),
    }


# The embedded sampler


def sampler_plan(
    run: RunPrograms, where: Slice, compiled: Mapping[str, Compilation], slots_that_fit: int
) -> dict[str, Any]:
    """Slots of the embedded sampler; if all programs fit, its bounds and tokens/s."""
    sampler = run.sampler
    plan = {
        "mesh": dict(sampler.mesh.shape),
        "slots": sampler.slots,
        "places": sampler.places,
        "slots_that_fit": slots_that_fit,
    }
    if not all(result.fits for result in compiled.values()):
        return plan

    def bound(name: str, mesh: Mesh) -> dict[str, Any]:
        program = compiled[name]
        assert program.module is not None
        work = measure(where, mesh, program.traced, program.module)[1]
        return least_seconds(where.chip, mesh.size, **work)

    learner = [name for name in ("train step", "recomputed log-probs") if name in compiled]
    learning = sum(bound(name, run.mesh)["seconds"] for name in learner)
    bounds = {program.name: bound(program.name, sampler.mesh) for program in run.sampling()}
    return plan | {"bounds": bounds} | sampler_times(run, where.hosts, bounds, learning)


def sampler_times(
    run: RunPrograms, hosts: int, bounds: Mapping[str, Mapping[str, Any]], learning: float
) -> dict[str, Any]:
    """Generated tokens/s at most, the least seconds of a step's rollouts, and their share of it.

    Every response has its greatest length. `bounds` are those of the sampler's programs, `learning`
    the learner's seconds of a step. On shared devices the two take turns.
    """
    sampler, length = run.sampler, run.rollout.max_response_tokens
    token = bounds["decoding"]["seconds"] / sampler.steps
    begin = bounds["prefill"]["seconds"] + bounds["placement"]["seconds"]

    def seconds(sequences: int) -> float:
        prefills = math.ceil(sequences / run.group_size / sampler.prompts)
        return prefills * begin + math.ceil(sequences / sampler.slots) * length * token

    full = hosts * sampler.slots * length / seconds(sampler.slots)
    times = {"seconds_per_token": token, "tokens_per_second": full}
    if not run.samples:
        return times
    sampling = seconds(math.ceil(new_groups(run) * run.group_size / hosts))
    step = max(sampling, learning) if run.rollout.devices else sampling + learning
    return {**times, "seconds": sampling, "step_seconds": step, "share": sampling / step}


MOST = 16  # times the slots of the configuration, at which the search for more ends
TRIES = 4  # numbers of slots that are compiled


def slots_that_fit(
    run: RunPrograms,
    available: int,
    compiled: Mapping[str, Compilation],
    log: Callable[[str], None],
) -> int:
    """The largest number of slots that was compiled and fits; 0 if none does.

    It begins with the number at which cache and temporaries, in proportion, fill a chip. Larger
    ones may fit too.
    """
    sampler, (decoding, *_) = run.sampler, run.sampling()
    names = {program.name for program in run.sampling()}
    asked = sampler.slots if all(compiled[name].fits for name in names) else 0
    fixed = sum(size for kind, size in decoding.hbm.items() if kind not in GROWING)
    used = sum((compiled["decoding"].hbm or decoding.hbm).values()) - fixed
    share = (available - fixed) / used
    if CACHE in run.kept:  # the learner's programs must fit beside it
        most = max(sum(c.hbm.values()) for name, c in compiled.items() if name not in names)
        share = min(share, 1 + (available - most) / run.kept[CACHE])
    slots = int(min(share, MOST) * sampler.slots)
    for _ in range(TRIES):
        slots -= slots % sampler.mesh.size
        if slots <= asked:
            break
        found = [compile_program(p, available) for p in run.with_slots(slots).sampling()[:2]]
        fits = all(result.fits for result in found)
        log(f"{slots} slots: {found[0].because}")
        if fits:
            return slots
        slots = slots * 3 // 4
    return asked


def remedies(
    run: RunPrograms, available: int, compiled: Mapping[str, Compilation], slots_that_fit: int
) -> list[str]:
    """Settings of the embedded sampler with which the programs that do not fit may fit."""
    failed = [result.hbm for result in compiled.values() if not result.fits]
    if 0 < slots_that_fit < run.sampler.slots:
        return [f"rollout.max_sequences={slots_that_fit}"]
    known = [hbm for hbm in failed if SAMPLER in hbm]
    if not known:
        return []
    worst, chips = max(known, key=lambda hbm: sum(hbm.values())), run.sampler.mesh.size
    over, cache = sum(worst.values()) - available, worst.get(CACHE, 0)
    if over < cache and (slots := int(run.sampler.slots * (1 - over / cache)) // chips * chips):
        return [f"rollout.max_sequences={slots}"]
    copies = sum(kind in worst for kind in VERSIONS)
    sizes = run.sampler.smaller_mesh(worst[SAMPLER] - -(-over // copies))
    return [f"rollout.mesh.{axis}={size}" for axis, size in (sizes or {}).items()]


def host_memory(run: RunPrograms, chips_per_host: int) -> dict[str, float]:
    """Peak bytes on one host by kind: checkpoint and version are written at once, buffer full."""
    responses = run.group_size * run.rollout.max_response_tokens
    group = 8 * responses + 4 * run.max_prompt_tokens
    largest = max(math.prod(tensor.shape) for tensor in hf.tensors_of(run.model.config))
    return {
        "copy of the state for a checkpoint": float(chips_per_host * per_chip(run.state)),
        "copy of the weights to publish": float(chips_per_host * per_chip(run.state.params)),
        "publisher": 2 * 4 * largest + PUBLISHER_BYTES,
        "buffer": float(run.buffer.capacity * group),
        "batch": 2.0 * sum(leaf.nbytes for leaf in jax.tree.leaves(run.longest)),
    }


def publish_seconds(count: int, dtype_bytes: int, hosts: int, storage: float) -> float:
    """Seconds from the learner's `count` parameters to a committed version.

    All hosts write float32 weights; then one reads them and, meanwhile, writes the version with
    `dtype_bytes` for each number. A host reads or writes `storage` bytes/s.
    """
    return 4 * count / (hosts * storage) + max(4, dtype_bytes) * count / storage


def fleet_demand(run: RunPrograms, step_seconds: float, publish: float) -> dict[str, float]:
    """Generated tokens/s that keep the learner from waiting, and its share of time in steps.

    Every response has its greatest length, and every group is used as often as the buffer allows;
    recorded groups need no tokens. If a publication clears the buffer, samplers wait for it.
    """
    window, buffer = run.lag.mode == "window", run.buffer
    generated = new_groups(run) * run.group_size * run.rollout.max_response_tokens
    steps = run.lag.steps if window else 1
    cycle = steps * step_seconds + publish
    cleared = window and buffer.mode == "clear_on_sync"
    return {
        "tokens_per_second": steps * generated / (steps * step_seconds if cleared else cycle),
        "learning": steps * step_seconds / cycle,
    }


def new_groups(run: RunPrograms) -> float:
    """Groups that are sampled for a step, if each is used as often as the buffer allows."""
    recorded = run.rollout.recorded_groups(run.groups_per_step)
    uses = run.buffer.max_reuse if run.buffer.mode == "replay" else 1
    return (run.groups_per_step - recorded) / uses
