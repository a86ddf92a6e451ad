"""One configuration on one slice: everything that a plan says, as a dictionary for JSON."""

import os
import time
from collections.abc import Callable
from typing import Any

from oapl_jax.build import Config
from oapl_jax.check import check_layout
from oapl_jax.model.config import ModelConfig
from oapl_jax.planning import collectives, flops, host, memory, programs, roofline, traffic
from oapl_jax.planning.topology import Slice, axis_bandwidth, hbm_available, make_mesh


def estimate(
    config: Config,
    model_config: ModelConfig,
    where: Slice,
    *,
    from_checkpoint: bool,
    storage: float,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Compiles a run's programs and reads them; the others are left if the first does not fit.

    Args:
      config: of the run.
      model_config: of its model.
      where: the slice.
      from_checkpoint: whether the run starts from weights in files.
      storage: bytes/s between a host and the storage of versions.
      say: called with a line for each program.

    Raises:
      UserError: if the run would refuse the configuration on the slice.
      RunError: if a program does not compile, for other reasons than memory.
    """
    mesh = make_mesh(where, config.mesh)
    check_layout(config, mesh=mesh.shape, hosts=where.hosts)
    plan = programs.Learner(config, model_config, mesh, from_checkpoint)
    available = hbm_available(where)
    verdicts, times = judged(plan, where, available, say)
    asked = host.host_memory(plan, where.chips_per_host)
    asked["offloaded"] = float(where.chips_per_host * max(v["offloaded"] for v in verdicts))
    held = {**asked, "total": sum(asked.values()), "ram": where.host_ram}
    chip_fits = all(verdict["fits"] for verdict in verdicts)
    return {
        "topology": where.name,
        "compiler_flags": os.environ.get("LIBTPU_INIT_ARGS", ""),
        "chips": len(where.devices),
        "hosts": where.hosts,
        "mesh": dict(mesh.shape),
        "model": {"type": model_config.model_type, "parameters": host.parameters(model_config)},
        "batch": {
            "micro_batches": config.learner.micro_batches,
            "rows": plan.longest.tokens.shape[1],
            "row_length": config.learner.row_length,
            "sequences": config.group_size * config.groups_per_step,
            "prompt_tokens": config.data.max_prompt_tokens,
            "response_tokens": config.rollout.max_response_tokens,
        },
        "remat": config.model.remat,
        "fits": chip_fits and held["total"] <= held["ram"],
        "chip_fits": chip_fits,
        "hbm": {
            "available": available,
            "published": where.chip.hbm_bytes,
            "source": where.chip.source,
        },
        "programs": verdicts,
        "restore": {"hbm": programs.per_chip(plan.state)},
        "host_memory": held,
        "not_planned": programs.not_planned(config),
        **times,
        **(around(plan, where, times["roofline"]["seconds"], storage) if times else {}),
    }


def judged(
    plan: programs.Learner, where: Slice, available: int, say: Callable[[str], None]
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """What is said of each program, and the times of the train step if it fits."""
    verdicts, times = [], {}
    for program in plan.programs():
        started, traced = time.monotonic(), None
        verdict = memory.too_large(program, available)
        if verdict is None:
            traced = program.trace()
            verdict = memory.judge(program, traced, available)
        seconds = time.monotonic() - started
        say(f"{where.name}, {program.name}: {verdict.because} ({seconds:.0f} s)")
        verdicts.append(
            {
                "program": program.name,
                "fits": verdict.fits,
                "because": verdict.because,
                "hbm": dict(verdict.hbm),
                "donated": dict(verdict.donated),
                "offloaded": verdict.offloaded,
                "resharded by replication": verdict.replicated,
                "compile_seconds": round(seconds, 1),
            }
        )
        if program.name == "train step":
            if not verdict.fits:
                break
            times = step_times(plan, where, traced, verdict.text)
    return verdicts, times


def step_times(plan: programs.Learner, where: Slice, traced: Any, text: Any) -> dict[str, Any]:
    """FLOPs, traffic and the roofline of the train step."""
    config = plan.config
    sequences = config.group_size * config.groups_per_step
    prompt, response = config.data.max_prompt_tokens, config.rollout.max_response_tokens
    table = collectives.by_kind_and_axis(collectives.collectives(text, plan.mesh))
    received: dict[str, float] = {}
    for row in table.values():
        for axes, size in row.items():
            received[axes] = received.get(axes, 0.0) + size
    bandwidth = {axes: axis_bandwidth(where, plan.mesh, axes.split("+")) for axes in received}
    work = flops.traced_work(traced)
    needed = flops.step_flops(plan.model_config, sequences, prompt, response)
    moved, offloaded = traffic.hbm_bytes(text), traffic.host_bytes(text)
    bound = roofline.roofline(
        where.chip,
        len(where.devices),
        program_flops=work.total,
        model_flops=needed,
        hbm_bytes=moved,
        host_bytes=offloaded,
        received=received,
        bandwidth=bandwidth,
        tokens=sequences * (prompt + response),
    )
    return {
        "flops": {
            "formula": needed,
            "program": work.total,
            "remat": work.remat,
            "remat_share": work.remat / work.total,
        },
        "hbm_traffic": moved,
        "host_traffic": offloaded,
        "collectives": table,
        "ici_bandwidth": bandwidth,
        "roofline": vars(bound),
    }


def around(plan: programs.Learner, where: Slice, seconds: float, storage: float) -> dict[str, Any]:
    """Publication and fleet at one step every `seconds`."""
    config = plan.config
    size = {"float32": 4, "bfloat16": 2}[config.publish_dtype]
    count = host.parameters(plan.model_config)
    publish = host.publish_seconds(count, size, where.hosts, storage)
    return {
        "publish_seconds": publish,
        "storage": storage,
        "fleet": vars(host.fleet(config, seconds, publish)),
    }
