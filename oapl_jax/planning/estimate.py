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

from oapl_jax.model import hf
from oapl_jax.planning import programs
from oapl_jax.planning.hardware import Chip, Slice, axis_bandwidth
from oapl_jax.planning.hlo import Module, collective_bytes, traffic
from oapl_jax.planning.programs import (
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
    ram = host_memory(run, where.chips_per_host)
    ram["offloaded"] = float(where.chips_per_host * max(p["offloaded"] for p in compiled))
    ram |= {"total": sum(ram.values()), "ram": where.host_ram}
    chip_fits = all(program["fits"] for program in compiled)
    count = hf.parameter_count(run.model.config)
    if times:
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
    """Memory of each program, and times of the train step if it fits."""
    results, times = [], {}
    for program in run.programs():
        started = time.monotonic()
        result = compile_program(program, available)
        seconds = time.monotonic() - started
        log(f"{where.name}, {program.name}: {result.because} ({seconds:.0f} s)")
        figures = {name: getattr(result, name) for name in FIGURES}
        figures |= {"resharded by replication": result.replicated}
        figures |= {"compile_seconds": round(seconds, 1)}
        results.append({"program": program.name, **figures})
        if program.name == "train step":
            if not result.fits or result.module is None:
                break
            times = step_times(run, where, result.traced, result.module)
    return results, times


def step_times(run: RunPrograms, where: Slice, traced: Any, module: Module) -> dict[str, Any]:
    """FLOPs, traffic and roofline of the train step."""
    collectives = collective_bytes(module, run.mesh.shape)
    rows = collectives.values()
    received = {axes: sum(row.get(axes, 0.0) for row in rows) for row in rows for axes in row}
    bandwidth = {axes: axis_bandwidth(where, run.mesh, axes.split("+")) for axes in received}
    flops, (hbm_bytes, host_bytes) = programs.program_flops(traced), traffic(module)
    lengths = run.max_prompt_tokens, run.rollout.max_response_tokens
    frozen = bool(run.frozen)
    formula = programs.step_flops(run.model.config, run.sequences, *lengths, frozen=frozen)
    bound = roofline(
        where.chip,
        len(where.devices),
        flops=flops["program"],
        model_flops=formula,
        hbm_bytes=hbm_bytes,
        host_bytes=host_bytes,
        received=received,
        bandwidth=bandwidth,
        tokens=run.sequences * sum(lengths),
    )
    return {
        "flops": {"formula": formula, **flops, "remat_share": flops["remat"] / flops["program"]},
        "hbm_traffic": hbm_bytes,
        "host_traffic": host_bytes,
        "collectives": collectives,
        "ici_bandwidth": bandwidth,
        "roofline": bound,
    }


def roofline(
    chip: Chip,
    chips: int,
    *,
    flops: float,
    model_flops: float,
    hbm_bytes: float,
    host_bytes: float,
    received: Mapping[str, float],
    bandwidth: Mapping[str, float],
    tokens: int,
) -> dict[str, Any]:
    """Least seconds of a gradient step by term, with tokens/s and MFU at the longest of them.

    FLOPs are of all chips: of the program with remat, and by formula for the MFU. Bytes are of one
    chip, `received` by mesh axes, one set of axes after the other. Tokens include prompts.
    """
    terms = {
        "compute": flops / chips / chip.flops,
        "hbm": hbm_bytes / chip.hbm_bandwidth,
        "interconnect": sum(size / bandwidth[axes] for axes, size in received.items()),
        "host": host_bytes / chip.host_bandwidth,
    }
    seconds = max(terms.values())
    return {
        **terms,
        "seconds": seconds,
        "binds": max(terms, key=lambda term: terms[term]),
        "tokens_per_second": tokens / seconds,
        "mfu": model_flops / (seconds * chips * chip.flops),
    }


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
    recorded = run.rollout.recorded_groups(run.groups_per_step)
    uses = buffer.max_reuse if buffer.mode == "replay" else 1
    groups = (run.groups_per_step - recorded) / uses
    generated = groups * run.group_size * run.rollout.max_response_tokens
    steps = run.lag.steps if window else 1
    cycle = steps * step_seconds + publish
    cleared = window and buffer.mode == "clear_on_sync"
    return {
        "tokens_per_second": steps * generated / (steps * step_seconds if cleared else cycle),
        "learning": steps * step_seconds / cycle,
    }
