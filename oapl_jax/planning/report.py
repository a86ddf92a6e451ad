"""A plan as a person reads it."""

from collections.abc import Sequence
from typing import Any

GIB = 2**30


def ranking(found: Sequence[tuple[Any, dict[str, Any]]]) -> str:
    """A line for each layout that fits, the fastest first."""
    lines = ["\nFits, the least time of a step first:"]
    for choice, plan in found:
        bound, used = plan["roofline"], max(sum(p["hbm"].values()) for p in plan["programs"])
        lines.append(
            f"  {bound['seconds']:8.3g} s ({bound['binds']})  {bound['mfu']:4.0%} MFU  "
            f"{size(used):>10}  {choice}"
        )
    return "\n".join(lines) + "\n"


def text(plan: dict[str, Any]) -> str:
    """The whole plan, a few lines a question."""
    mesh = " x ".join(f"{axis} {size}" for axis, size in plan["mesh"].items() if size > 1) or "1"
    batch = plan["batch"]
    lines = [
        f"{plan['topology']}: {plan['chips']} chips on {plan['hosts']} hosts, mesh {mesh}; "
        f"{plan['model']['parameters'] / 1e9:.3g} billion parameters; {batch['sequences']} "
        f"sequences of {batch['prompt_tokens']} + {batch['response_tokens']} tokens in "
        f"{batch['micro_batches']} micro-batches of {batch['rows']} rows; remat {plan['remat']}",
        "",
        *([f"Compiled with {plan['compiler_flags']}"] if plan["compiler_flags"] else []),
        verdict(plan),
        *_memory(plan),
    ]
    if "roofline" in plan:
        lines += ["", *_work(plan), "", *_collectives(plan), "", *_bound(plan), "", *_around(plan)]
    return "\n".join(lines)


def verdict(plan: dict[str, Any]) -> str:
    """Whether it fits, and what was left out of that."""
    if not plan["chip_fits"]:
        return "DOES NOT FIT"
    if not plan["fits"]:
        return "DOES NOT FIT THE HOST"
    left = "; ".join(plan["not_planned"])
    return f"FITS, but for what is not planned and needs HBM too: {left}" if left else "FITS"


def size(count: float) -> str:
    """Bytes in the unit in which they can be read."""
    units = {"GiB": GIB, "MiB": 2**20, "KiB": 2**10}
    unit = next((name for name, value in units.items() if count >= value / 10), "B")
    return f"{count / units.get(unit, 1):.2f} {unit}"


def _memory(plan: dict[str, Any]) -> list[str]:
    lines = []
    for program in plan["programs"]:
        lines.append(
            f"  {program['program']}: {'fits' if program['fits'] else 'does not fit'}, "
            f"{program['because']} a chip"
        )
        if program["hbm"]:
            kinds = [f"{kind} {size(used)}" for kind, used in program["hbm"].items()]
            lines.append("    " + ", ".join(kinds))
        if count := program["resharded by replication"]:
            lines.append(
                f"    WARNING: the compiler replicates {count} arrays on every chip to reshard them"
            )
    hbm, ram = plan["hbm"], plan["host_memory"]
    return [
        *lines,
        f"  restore: {size(plan['restore']['hbm'])} a chip, no program is compiled",
        f"  a chip: {size(hbm['available'])} for a program, says the compiler; "
        f"{size(hbm['published'])} of HBM, says {hbm['source']}",
        f"  a host: {ram['total'] / 1e9:.0f} GB of {ram['ram'] / 1e9:.0f} GB of RAM",
    ]


def _work(plan: dict[str, Any]) -> list[str]:
    flops = plan["flops"]
    return [
        f"FLOPs of a step: {flops['formula']:.3g} by formula, {flops['program']:.3g} in the "
        f"program, of which remat adds {flops['remat_share']:.0%}",
        f"HBM traffic of a step: {size(plan['hbm_traffic'])} a chip; between chip and host "
        f"{size(plan['host_traffic'])}",
    ]


def _collectives(plan: dict[str, Any]) -> list[str]:
    lines = ["Bytes that a chip receives in a step, by collective and mesh axis:"]
    for kind, row in sorted(plan["collectives"].items()):
        for axes, received in sorted(row.items()):
            speed = plan["ici_bandwidth"][axes] / 1e9
            lines.append(f"  {kind:<20}{axes:<16}{size(received):>12} at {speed:.0f} GB/s")
    return lines


def _bound(plan: dict[str, Any]) -> list[str]:
    bound = plan["roofline"]
    return [
        f"A step takes at least {bound['seconds']:.3g} s: compute {bound['compute']:.3g}, HBM "
        f"{bound['hbm']:.3g}, interconnect {bound['interconnect']:.3g}, link to the host "
        f"{bound['host']:.3g}; {bound['binds']} binds",
        f"At most {bound['tokens_per_second']:,.0f} tokens/s and {bound['mfu']:.0%} MFU",
    ]


def _around(plan: dict[str, Any]) -> list[str]:
    fleet = plan["fleet"]
    asked = f"{fleet['tokens_per_second']:,.0f} generated tokens/s keep the learner busy"
    if not fleet["tokens_per_second"]:
        asked = "none, the rollouts are recorded ones; the learner is busy"
    return [
        f"Publishing: {plan['publish_seconds']:.3g} s at {plan['storage'] / 1e9:g} GB/s a host",
        f"Fleet: {asked}, {fleet['learning']:.0%} of the time with steps, else publishing",
    ]
