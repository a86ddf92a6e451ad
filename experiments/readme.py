"""Writes the table of figures in experiments/README.md: figure, command, expected, measured.

    python -m experiments.readme [--results=docs/experiments]

Claims and expected numbers are those of the files' cards; costs are those of `oapl_jax.plan`;
measured numbers are those of the tables that `python -m experiments.table` wrote.
"""

import argparse
import ast
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from etils import epath

from experiments import paper
from experiments.comparison import fill
from experiments.sweep import Results, listed, load_experiment
from experiments.table import bracketed, markdown
from oapl_jax.errors import exit_with_code
from oapl_jax.tracking.progress import log

HERE = Path(__file__).parent
FIGURES = ("objectives", "steps", "lag", "pass_at_k", "code_rounds", "betas", "ablations")
LAUNCH = "python -m experiments.launch --experiment=experiments/{}.py"
SHOWN = 4  # rows of a result in the table; NAME.md has all


def card(name: str) -> dict[str, str]:
    """The fields of a file's docstring by name, and its first line under "title"."""
    text = ast.get_docstring(ast.parse((HERE / f"{name}.py").read_text())) or ""
    head, *fields = re.split(
        r"^(Claim|Command|Hardware|Scale|Hours|Expected|Measured):", text, flags=re.M
    )
    body = lambda value: " ".join(value.partition("\n\n")[0].split())
    found = dict(zip(fields[::2], map(body, fields[1::2]), strict=True))
    return {"title": head.strip().partition("\n")[0], **found}


def measured(name: str, results: Path) -> str:
    """The first rows of a result; the file has all."""
    path = results / f"{name}.json"
    if not path.exists():
        return "not run"
    found = json.loads(path.read_text())
    rows = list(found["rows"].items())
    shown = [f"{row} {number(values['measures'])}" for row, values in rows[:SHOWN]]
    more = f"; {len(rows) - SHOWN} more rows" if len(rows) > SHOWN else ""
    missing = f"; {len(found['missing'])} points missing" if found["missing"] else ""
    apart = [f"; {pair}: {number(of)}" for pair, of in found["differences"].items()][:1]
    link = f"[table](../docs/experiments/{name}.md)"
    return f"pass@1 {'; '.join(shown)}{more}{''.join(apart)}{missing} ({link})"


def number(measures: Mapping[str, Any]) -> str:
    first = next(iter(measures.values())) or [float("nan")] * 3
    mean, low, high = (float("nan") if value is None else value for value in first)
    return bracketed((mean, low, high))


def table(results: Path, topology: str, price: float | None) -> str:
    rows = []
    for name in FIGURES:
        of, sweep = card(name), load_experiment(str(HERE / f"{name}.py")).sweep
        points = listed(sweep, Results(epath.Path("/nowhere")), "paper")
        rows.append(
            [
                f"`{name}.py`: {of['title']}",
                f"`{LAUNCH.format(name)}`",
                "; ".join(map(str, paper.costs(points, topology, price))),
                of["Expected"],
                measured(name, results),
            ]
        )
    head = ("figure", "command", "at paper scale", "expected", "measured, on two CPU cores")
    price_of = f"${price:.2f} a chip-hour, as given" if price else paper.PRICE_SOURCE
    return (
        f"{markdown(head, rows)}\n\n`--to=print` shows the exact commands, `--to=queued` and "
        "`--to=xpk` run them at the paper's scale, `--to=local` runs the form for two CPU cores. "
        f"Hours and dollars are lower bounds; prices: {price_of}. Intervals are Student's t over "
        "the seeds: those of three are wide, and may pass 0 and 1."
    )


def plots(results: Path) -> str:
    there = [name for name in FIGURES if (results / f"{name}.png").exists()]
    colors = "The first panel names the colors of all."
    return "\n\n".join([colors, *(f"![{name}](../docs/experiments/{name}.png)" for name in there)])


def parts(results: Path, topology: str, price: float | None) -> dict[str, str]:
    """Texts of the page's marks."""
    return {"figures": table(results, topology, price), "plots": plots(results)}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--results", type=Path, default=HERE.parent / "docs/experiments")
    parser.add_argument("--to", type=Path, default=HERE / "README.md")
    paper.add_flags(parser)
    given = parser.parse_args()
    found = parts(given.results, given.topology, given.price)
    given.to.write_text(fill(given.to.read_text(), found))
    log(f"{given.to}")


if __name__ == "__main__":
    exit_with_code(main)
