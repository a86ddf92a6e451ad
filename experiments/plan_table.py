"""The table in docs/plan.md: models, TPU slices, and the speed of training at most.

    python -m experiments.plan_table [--only hosts [--hosts h200]] [--models qwen3-8b] [--jobs=1]

Claim: Qwen3-4B at 16k tokens and R1-Distill-Qwen-14B at 32k train on slices of 16 to 256 chips, and
every model from 0.6B to 32B at 16k on some slice; GSM8K with the embedded sampler on one host takes
models of up to 8B. docs/plan.md says on which, and on which not.
Hardware: CPU cores, of which a line keeps two busy; about three minutes of processor time for one
that fits (170 s for Qwen3-4B on v5e:8x8), 3 GB of memory. Measured: nothing; every
number is the compiler's or follows from published ones.

Each line is kept in docs/plan_table.json with a digest of the code, the settings and the compiler
that it was made by: an interrupted command goes on. The page has lines of other code until the
command has made them again.
"""

import argparse
import dataclasses
import functools
import hashlib
import itertools
import json
import multiprocessing
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
from etils import epath
from ml_collections import ConfigDict

from configs import code_contests, competition_math, gsm8k
from oapl_jax.config import Config
from oapl_jax.errors import UserError, exit_with_code
from oapl_jax.model.published import published
from oapl_jax.plan import count_run, mesh_text, plan_run, with_layout
from oapl_jax.planning.hardware import GPUS, SLICES, open_slice
from oapl_jax.planning.layouts import SIZES, Layout, plan_digest
from oapl_jax.tracking.progress import log
from oapl_jax.weights.publisher import config_hash

ROOT = Path(__file__).parent.parent
TABLE, PAGE = epath.Path(ROOT / "docs/plan_table.json"), ROOT / "docs/plan.md"
RUNS = {
    "competition_math": (competition_math.get_config, "qwen3-4b-thinking-2507"),
    "code_contests": (code_contests.get_config, "r1-distill-qwen-14b"),
}
SMALLEST = "smallest"  # the maths run with other models
# Llama 3 8B ends at 8,192 tokens; 3.1 has the same sizes and a longer context.
MODELS = (
    *("qwen3-0.6b", "qwen3-1.7b", "qwen3-4b", "qwen3-8b", "qwen3-14b", "qwen3-32b"),
    "llama-3.1-8b",
)
# GSM8K with the embedded sampler, all weights and adapters, on one host.
HOSTS = ("v5e:2x4", "v6e:2x4", "h200")
HOST_RUNS = {"gsm8k": "all weights", "gsm8k:lora": "adapters"}
HOST_MODELS = ("qwen3-0.6b", "qwen3-1.7b", "qwen3-4b", "qwen3-8b", "llama-3.1-8b")
ONE_HOST = "hosts"
Line = dict[str, Any]
Key = tuple[str, str, str]  # run, model, topology


def settings_of(run: str) -> ConfigDict:
    if run in HOST_RUNS:
        return gsm8k.get_config(run.partition(":")[2] or None)
    return RUNS[run][0]()


def host_line(run: str, model: str, topology: str) -> Line:
    """Plans GSM8K on one host, with the settings of the sampler that a refusal proposes."""
    try:
        return planned_host(run, model, topology)
    except UserError as error:  # of sizes that fit no devices; other lines are made all the same
        log(f"refused: {error}")
        return {"fits": False, "because": f"refused: {error}"}


def planned_host(run: str, model: str, topology: str) -> Line:
    jax.config.update("jax_platforms", "cpu")  # in a process of its own; else jax looks for a TPU
    settings, sizes, proposed = settings_of(run), published(model), {}
    if topology in GPUS:
        config = Config.from_dict(settings.to_dict())
        plan = count_run(config, sizes, topology, from_checkpoint=True)
        used = max(sum(kinds.values()) for kinds in plan["memory"].values())
        figures = dict(used=used, room=plan["usable"], learning=plan["learning_seconds"])
        return {"fits": plan["fits"], **figures, "sampler": plan["sampler"], "replicated": 0}
    where = open_slice(topology)
    while True:
        log(f"{run}, {model}, {topology}: {proposed}")
        settings.update_from_flattened_dict(proposed)
        config = Config.from_dict(settings.to_dict())
        plan = plan_run(config, sizes, where, from_checkpoint=True, storage=1e9)
        changes = (change.split("=") for change in plan["remedies"])
        more = {name: int(value) for name, value in changes}
        if plan["fits"] or not more.keys() - proposed.keys():
            break
        proposed |= more
    worst = max(plan["programs"], key=lambda p: (not p["fits"], sum(p["hbm"].values())))
    return {
        "fits": plan["fits"],
        "because": f"{worst['program']}: {worst['because']}",
        "used": sum(worst["hbm"].values()),
        "room": plan["hbm"]["available"],
        "learning": plan.get("roofline", {}).get("seconds"),
        "sampler": plan.get("sampler"),
        "compile_seconds": sum(p["compile_seconds"] for p in plan["programs"]),
        "replicated": sum(p["resharded by replication"] for p in plan["programs"]),
    }


def line(run: str, model: str, topology: str) -> Line:
    """Plans the first layout that fits; if none does, the last that splits no row, because layouts
    that split rows shard the state over fewer chips."""
    if run in HOST_RUNS:
        return host_line(run, model, topology)
    jax.config.update("jax_platforms", "cpu")  # in a process of its own; else jax looks for a TPU
    config = Config.from_dict(settings_of(run).to_dict())
    sizes, where, said = published(model), open_slice(topology), ""
    if where.hosts > config.groups_per_step:  # each host samples at least one group of a step
        config = dataclasses.replace(config, groups_per_step=where.hosts)
        said = f", {where.hosts} groups a step"
    sequences = config.group_size * config.groups_per_step
    nearest: Line = {"fits": False, "because": "no layout divides the model over the chips"}
    for choice in layouts(sequences, sizes.hidden_size, len(where.devices)):
        log(f"{run}, {model}, {topology}: {choice}")
        try:
            chosen = with_layout(config, choice)
            plan = plan_run(chosen, sizes, where, from_checkpoint=True, storage=1e9)
        except UserError as error:  # of a layout; a program that can't be read ends the command
            log(f"refused: {error}")
            if "layout" not in nearest:
                nearest = {"fits": False, "because": f"refused: {error}"}
            continue
        worst = max(plan["programs"], key=lambda p: (not p["fits"], sum(p["hbm"].values())))
        result = {
            "fits": plan["fits"],
            "because": f"{worst['program']}: {worst['because']}",
            "layout": f"{choice}{said}",
            "compile_seconds": sum(p["compile_seconds"] for p in plan["programs"]),
            "replicated": sum(p["resharded by replication"] for p in plan["programs"]),
        }
        if plan["fits"]:
            kept = ("roofline", "flops", "collectives", "host_memory", "publish_seconds", "fleet")
            return {**result, "hbm": worst["hbm"], **{name: plan[name] for name in kept}}
        if "layout" not in nearest or choice.mesh["context"] == 1:
            nearest = result
    return nearest


def layouts(sequences: int, hidden_size: int, chips: int) -> Iterator[Layout]:
    """Layouts in the order of the trials: rows over all chips, as few as possible at a time; rows
    split over more and more chips; then the same with activations offloaded to the hosts."""
    splits = [context for context in SIZES if context <= chips]
    for remat, context in itertools.product(("full", "offload"), splits):
        fsdp = chips // context
        data = 1
        while fsdp > 1 and (hidden_size % fsdp or sequences % (data * fsdp)):
            data, fsdp = 2 * data, fsdp // 2
        micro_batches = max(sequences // (data * fsdp), 1)
        yield Layout(dict(data=data, fsdp=fsdp, context=context, tensor=1), remat, micro_batches)


def digest_of(run: str, model: str) -> str:
    """The inputs of a kept line: this code, these settings, these sizes."""
    made_of = (plan_digest(), config_hash(settings_of(run).to_dict()), published(model))
    return hashlib.sha256(repr(made_of).encode()).hexdigest()[:12]


def chains(
    names: Sequence[str], models: Sequence[str], hosts: Sequence[str] = HOSTS
) -> Iterator[list[Key]]:
    """Lines to make, those of a chain one after the other until one fits."""
    if ONE_HOST in names:
        of_hosts = (model for model in HOST_MODELS if model in models)
        for key in itertools.product(HOST_RUNS, of_hosts, hosts):
            yield [key]
    for chips in (64, 256, 16, 128, 32):
        for generation, slices in SLICES.items():
            for run in names:
                if run in RUNS:
                    yield [(run, RUNS[run][1], f"{generation}:{slices[chips]}")]
    if SMALLEST in names:
        for model in models:
            for generation, slices in SLICES.items():
                yield [("competition_math", model, f"{generation}:{s}") for s in slices.values()]


class Table:
    """The kept lines, written with the page whenever one is made."""

    def __init__(self, kept: dict[str, Line], make: Callable[[str, str, str], Line]):
        self._digest = functools.cache(digest_of)
        self.lines = dict(kept)
        self._make, self._writing = make, threading.Lock()

    def follow(self, chain: Sequence[Key]) -> None:
        """Makes the lines of a chain that are missing or of other code, up to the first fit."""
        for run, model, topology in chain:
            key, digest = f"{run} {model} {topology}", self._digest(run, model)
            if key not in self.lines or self.lines[key]["code"] != digest:
                made = {**self._make(run, model, topology), "code": digest}
                with self._writing:
                    self.lines[key] = made
                    TABLE.write_text(json.dumps(self.lines, indent=1, sort_keys=True) + "\n")
                    write_page(self.lines)
            if self.lines[key]["fits"]:
                break


def fill(names: Sequence[str], models: Sequence[str], hosts: Sequence[str], jobs: int) -> None:
    """Makes the lines that are missing, each in a process of its own, `jobs` at a time."""
    fresh = multiprocessing.get_context("spawn")
    with (
        ProcessPoolExecutor(jobs, mp_context=fresh, max_tasks_per_child=1) as processes,
        ThreadPoolExecutor(jobs) as threads,
    ):
        kept = json.loads(TABLE.read_text()) if TABLE.exists() else {}
        table = Table(kept, lambda *key: processes.submit(line, *key).result())
        for _ in threads.map(table.follow, chains(names, models, hosts)):
            pass  # raises what a line raised


def write_page(lines: dict[str, Line]) -> None:
    """Puts the tables between the page's marks."""
    page = PAGE.read_text()
    for mark, body in (("hosts", hosts_table(lines)), ("tables", tables(lines))):
        before, opens, rest = page.partition(f"<!-- {mark} -->\n")
        if opens:
            page = f"{before}{opens}{body}\n{''.join(rest.partition('<!-- end -->')[1:])}"
    PAGE.write_text(page)


def tables(lines: dict[str, Line]) -> str:
    blocks = []
    for run, (get_config, model) in RUNS.items():
        config = get_config()
        length = f"{config.data.max_prompt_tokens} + {config.rollout.max_response_tokens}"
        groups = f"{config.groups_per_step} groups of {config.group_size} sequences of {length}"
        head = f"`configs/{run}.py`, {model}, {groups} tokens a step"
        rows = []
        for generation, slices in SLICES.items():
            for shape in slices.values():
                made = lines.get(f"{run} {model} {generation}:{shape}")
                rows += [] if made is None else [row(f"{generation}:{shape}", made)]
        blocks.append(f"{head}:\n\n{HEAD}\n" + "\n".join(rows) + "\n")
    rows = [f"| {model} | " + " | ".join(smallest(lines, model)) + " |" for model in MODELS]
    head = "| model | " + " | ".join(SLICES) + " |\n|---|" + "---|" * len(SLICES)
    blocks.append(
        f"The smallest slice, of those of 1 to 256 chips, that trains at 16k:\n\n{head}\n"
        + "\n".join(rows)
        + "\n"
    )
    return "\n".join(blocks)


def hosts_table(lines: dict[str, Line]) -> str:
    """What of each model fits which host, and the figures of each line that fits."""
    head = "| model | " + " | ".join(HOSTS) + " |\n|---|" + "---|" * len(HOSTS)
    fits = [
        f"| {model} | " + " | ".join(fitting(lines, model, host) for host in HOSTS) + " |"
        for model in HOST_MODELS
    ]
    rows = [
        host_row(model, run, host, made)
        for model, run, host in itertools.product(HOST_MODELS, HOST_RUNS, HOSTS)
        if (made := lines.get(f"{run} {model} {host}"))
    ]
    return (
        f"`configs/gsm8k.py` on one host; what may be trained:\n\n{head}\n"
        + "\n".join(fits)
        + f"\n\nThe figures:\n\n{HOST_HEAD}\n"
        + "\n".join(rows)
        + "\n"
    )


def fitting(lines: dict[str, Line], model: str, host: str) -> str:
    made = {run: lines.get(f"{run} {model} {host}") for run in HOST_RUNS}
    if not any(made.values()):
        return "not tried"
    fits = [HOST_RUNS[run] for run, found in made.items() if found and found["fits"]]
    untried = [f"{HOST_RUNS[run]} not tried" for run, found in made.items() if not found]
    return ", ".join([*fits, *untried]) or "nothing"


HOST_HEAD = """\
| model | trained | host | memory a chip | sampler's weights | slots, most that fit | \
learner's step, s | generated tokens/s at most | sampling, of a step |
|---|---|---|---|---|---|---|---|---|"""


def host_row(model: str, run: str, host: str, made: Line) -> str:
    names = f"| {model} | {HOST_RUNS[run]} | {host}"
    if not made["fits"] and "because" in made:
        return f"{names} | does not fit: {made['because']} | | | | | |"
    memory = f"{made['used'] / 2**30:.1f} of {made['room'] / 2**30:.1f} GiB"
    if not made["fits"]:
        return f"{names} | does not fit: {memory} | | | | | |"
    sampler = made["sampler"]
    parts = {axis: count for axis, count in sampler["mesh"].items() if axis != "data"}
    split = mesh_text(parts) if max(parts.values()) > 1 else "whole"
    return (
        f"{names} | {memory} | {split} | {sampler['slots']}, {sampler['slots_that_fit']:,} | "
        f"{made['learning']:.2f} | {sampler['tokens_per_second']:,.0f} | {sampler['share']:.0%} |"
    )


HEAD = """\
| slice | layout | HBM a chip | compute, HBM, ICI, host link: s a step | tokens/s at most | \
MFU at most | fleet, generated tokens/s |
|---|---|---|---|---|---|---|"""


def row(topology: str, made: Line) -> str:
    if not made["fits"]:
        layout = made.get("layout", "no layout")
        return f"| {topology} | does not fit: {layout} | {made['because']} | | | | |"
    bound, layout = made["roofline"], made["layout"]
    if made["replicated"]:
        layout += f", {made['replicated']} arrays resharded by replication"
    asked = made["fleet"]["tokens_per_second"]
    terms = ", ".join(f"{bound[t]:.3g}" for t in ("compute", "hbm", "interconnect", "host"))
    return (
        f"| {topology} | {layout} | {made['because'].partition(': ')[2]} | {terms} | "
        f"{bound['tokens_per_second']:,.0f} | {bound['mfu']:.0%} | "
        f"{f'{asked:,.0f}' if asked else 'none, it is recorded'} |"
    )


def smallest(lines: dict[str, Line], model: str) -> Iterator[str]:
    """Yields, for each TPU generation, the smallest slice that fits, or else the slices that do
    not; and the slices not tried."""
    for generation, slices in SLICES.items():
        refused, untried = [], False
        for shape in slices.values():
            topology = f"{generation}:{shape}"
            made = lines.get(f"competition_math {model} {topology}")
            if made is None:
                untried = True
            elif made["fits"]:
                yield topology + " (smaller ones not all tried)" * untried
                break
            else:
                refused.append(topology)
        else:
            larger = " (others not tried)" if untried else ""
            yield f"not {', '.join(refused)}{larger}" if refused else "not tried"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parts = [ONE_HOST, *RUNS, SMALLEST]
    parser.add_argument("--only", nargs="*", default=parts, choices=parts)
    parser.add_argument("--models", nargs="*", default=MODELS, choices=MODELS)
    parser.add_argument("--hosts", nargs="*", default=HOSTS, choices=HOSTS)
    parser.add_argument("--jobs", type=int, default=1, help="lines at a time, two cores each")
    arguments = parser.parse_args()
    fill(arguments.only, arguments.models, arguments.hosts, arguments.jobs)


if __name__ == "__main__":
    exit_with_code(main)
