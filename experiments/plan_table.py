"""Which TPU slice trains what, and how fast at most: the table in docs/plan.md.

    python experiments/plan_table.py [--only=competition_math] [--models=qwen3-8b]

Claim: Qwen3-4B at 16k tokens and R1-Distill-Qwen-14B at 32k train on slices of 16 to 256 chips, and
every model from 0.6B to 32B at 16k on some slice; docs/plan.md says on which, and on which not.
Hardware: two CPU cores, about three minutes for each line that fits. Measured: nothing; every
number is the compiler's or follows from published ones.

Each line is kept in docs/plan_table.json with a digest of the code that it was compiled from: an
interrupted command goes on, and lines of other code are made again.
"""

import argparse
import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
from etils import epath

from configs import code_contests, competition_math
from oapl_jax.errors import UserError, exit_with_code
from oapl_jax.models.published import published
from oapl_jax.plan.chips import SLICES
from oapl_jax.plan.choices import applied, layouts
from oapl_jax.plan.estimate import estimate
from oapl_jax.plan.topology import open_slice
from oapl_jax.report.progress import say

ROOT = Path(__file__).parent.parent
TABLE, PAGE = epath.Path(ROOT / "docs/plan_table.json"), ROOT / "docs/plan.md"
RUNS = {
    "competition_math": (competition_math.get_config, "qwen3-4b-thinking-2507"),
    "code_contests": (code_contests.get_config, "r1-distill-qwen-14b"),
}
SMALLEST = "smallest"  # the maths run with other models
MODELS = (
    *("qwen3-0.6b", "qwen3-1.7b", "qwen3-4b", "qwen3-8b", "qwen3-14b", "qwen3-32b"),
    *("llama-3.1-8b", "r1-distill-qwen-14b"),
)
SHAPING = (
    *("batching", "learner", "optim", "probe", "sharding", "structs"),
    *("models/attention", "models/blocked", "models/config", "models/rope", "models/splash"),
    *("models/steps", "models/transformer", "models/vocabulary"),
)
Line = dict[str, Any]


def line(run: str, model: str, topology: str) -> Line:
    """The first layout that fits, or the refusal of the last."""
    config, sizes, where = RUNS[run][0](), published(model), open_slice(topology)
    said = ""
    if where.hosts > config.groups_per_step:  # each host samples one of a step at the least
        config.groups_per_step = where.hosts
        said = f", {where.hosts} groups a step"
    sequences = config.group_size * config.groups_per_step
    result: Line = {"fits": False, "because": "no layout divides the model over the chips"}
    for choice in layouts(sequences, sizes.hidden_size, len(where.devices)):
        say(f"{run}, {model}, {topology}: {choice}")
        try:
            plan = estimate(
                applied(config, choice),
                sizes,
                where,
                from_checkpoint=True,
                storage=1e9,
                say=say,
            )
        except UserError as error:
            result = {"fits": False, "because": str(error)}
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
    return result


def code() -> str:
    """A digest of what shapes the compiled programs."""
    package, digest = ROOT / "oapl_jax", hashlib.sha256(jax.__version__.encode())
    for name in SHAPING:
        digest.update((package / f"{name}.py").read_bytes())
    return digest.hexdigest()[:12]


def fill(lines: dict[str, Line], names: Sequence[str], models: Sequence[str]) -> None:
    """Makes the lines that are missing, and writes table and page after each."""
    digest = code()

    def made(run: str, model: str, topology: str) -> Line:
        key = f"{run} {model} {topology}"
        if lines.get(key, {}).get("code") != digest:
            lines[key] = {**line(run, model, topology), "code": digest}
            TABLE.write_text(json.dumps(lines, indent=1, sort_keys=True) + "\n")
            write_page(lines)
        return lines[key]

    for chips in (64, 256, 16, 128, 32):
        for generation, slices in SLICES.items():
            for run in names:
                if run in RUNS:
                    made(run, RUNS[run][1], f"{generation}:{slices[chips]}")
    if SMALLEST in names:
        for model in models:
            for generation, slices in SLICES.items():
                shapes = (f"{generation}:{shape}" for shape in slices.values())
                next((t for t in shapes if made("competition_math", model, t)["fits"]), None)


def write_page(lines: dict[str, Line]) -> None:
    """Puts the tables between the page's marks."""
    before, _, rest = PAGE.read_text().partition("<!-- tables -->\n")
    _, _, after = rest.partition("<!-- end -->\n")
    PAGE.write_text(f"{before}<!-- tables -->\n{tables(lines)}\n<!-- end -->\n{after}")


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
    blocks.append(f"The smallest slice that trains at 16k:\n\n{head}\n" + "\n".join(rows) + "\n")
    return "\n".join(blocks)


HEAD = """\
| slice | layout | HBM a chip | compute, HBM, ICI: s a step | tokens/s at most | MFU at most | \
fleet, generated tokens/s |
|---|---|---|---|---|---|---|"""


def row(topology: str, made: Line) -> str:
    if not made["fits"]:
        return f"| {topology} | does not fit | {made['because']} | | | | |"
    bound, layout = made["roofline"], made["layout"]
    if made["replicated"]:
        layout += f", {made['replicated']} arrays resharded by replication"
    terms = ", ".join(f"{bound[term]:.3g}" for term in ("compute", "hbm", "interconnect"))
    return (
        f"| {topology} | {layout} | {made['because'].partition(': ')[2]} | {terms} | "
        f"{bound['tokens_per_second']:,.0f} | {bound['mfu']:.0%} | "
        f"{made['fleet']['tokens_per_second']:,.0f} |"
    )


def smallest(lines: dict[str, Line], model: str) -> Iterator[str]:
    for generation, slices in SLICES.items():
        tried = [
            (f"{generation}:{shape}", lines.get(f"competition_math {model} {generation}:{shape}"))
            for shape in slices.values()
        ]
        known = [(topology, made) for topology, made in tried if made is not None]
        fits = next((topology for topology, made in known if made["fits"]), None)
        refused = [topology for topology, made in known if not made["fits"]]
        yield fits or (f"not {', '.join(refused)}" if refused else "not tried")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="*", default=[*RUNS, SMALLEST], choices=[*RUNS, SMALLEST])
    parser.add_argument("--models", nargs="*", default=MODELS, choices=MODELS)
    arguments = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    lines = json.loads(TABLE.read_text()) if TABLE.exists() else {}
    fill(lines, arguments.only, arguments.models)


if __name__ == "__main__":
    exit_with_code(main)
