"""Tables and pictures of docs/comparison.md, from the results of objectives.py and lag.py.

    python -m experiments.comparison --root=docs/comparison --to=docs     (published results)
    python -m experiments.comparison --root=runs/comparison --to=docs     (results of a launch)

A table replaces the text between its marks in comparison.md; all other text is written by hand. In
a directory without that page it becomes a list of tables.
"""

import argparse
import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import chain
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from etils import epath
from matplotlib.figure import Figure

from experiments import lag, objectives
from experiments.measures import LEVELS, score
from experiments.objectives import Arm, Plan, Values, warm_up
from experiments.sweep import RESULTS, Line, Point, Results, listed
from experiments.table import (
    Cell,
    bracketed,
    cell_of,
    difference,
    finish,
    markdown,
    save,
    verdict,
    whiskers,
)
from oapl_jax.errors import exit_with_code
from oapl_jax.tracking.progress import log

OURS = "oapl"
CLOSE = 0.05  # of pass@1: a learning rate that costs at most this much still learns well
SHORT = "to pass@1 0.5"
Chosen = Mapping[str, tuple[Values, Cell]]  # by method: the chosen values, and their runs
Rows = Mapping[str, Mapping[str, Cell]]  # a table of lag.py
COLORS: dict[str, str] = dict(
    zip(objectives.CORE, (*(f"C{i}" for i in range(7)), "black"), strict=True)
)
VERDICTS = {"more": "C2", "level": "0.5", "less": "C3"}  # colors of a method's difference to OAPL


def collect(results: Results, plan: Plan) -> dict[Arm, Chosen]:
    """Collects the methods of each arm whose runs have all ended, best pass@1 first."""
    found: dict[Arm, dict[str, tuple[Values, Cell]]] = {}
    for arm, names in objectives.arms(plan):
        for name in names:
            chosen = objectives.choose(results, plan, arm, name) or {}
            runs = objectives.compared(plan, arm, name, chosen) if chosen else []
            if cell := cell_of(results, runs):
                found.setdefault(arm, {})[name] = (chosen, cell)
    sources = ["live", "offline", plan.recorder]
    rank = lambda item: -item[1][1].mean("pass@1")
    order = sorted(found, key=lambda arm: (sources.index(arm.source), arm.lag))
    return {arm: dict(sorted(found[arm].items(), key=rank)) for arm in order}


def surfaces(results: Results, plan: Plan) -> list[tuple[lag.Table, Rows]]:
    """The tables of lag.py whose runs have all ended, small lags first."""
    ready = []
    for table in sorted(lag.tables(plan), key=lambda table: table.lag):
        rows = {
            name: {column: cell_of(results, runs) for column, runs in row.items()}
            for name, row in table.cells.items()
        }
        if all(cell for row in rows.values() for cell in row.values()):
            ready.append((table, rows))
    return ready


def lines_of(results: Results, plan: Plan) -> list[Line]:
    """Lines of this plan's runs in the order of the file, which may hold others."""
    runs: list[Point] = listed(lambda add: objectives.sweep_plan(add, plan), results, "cpu")
    runs += listed(lambda add: lag.sweep_plan(add, plan), results, "cpu")
    keys = {line["key"] for line in map(results.line, runs) if line}
    return [line for line in results.lines.values() if line["key"] in keys]


# Tables


def blocks(results: Results, plan: Plan) -> Iterator[tuple[str, str]]:
    """Names and texts of the generated parts of the page."""
    found, tables = collect(results, plan), surfaces(results, plan)
    names = [name for name in (*plan.core, *plan.rest) if any(name in of for of in found.values())]
    sampled = {arm: of for arm, of in found.items() if arm.kind != "replay"}
    replays = {arm: of for arm, of in found.items() if arm.kind == "replay"}
    yield "runs", counts(results, plan)
    yield "start", start(results, plan)
    yield "pass@1", overview(found, names)
    for measure in ("pass@1", "pass@8", "pass@64", "entropy", SHORT):
        yield f"{measure} minus oapl", differences(sampled, names, measure)
    yield "replays minus oapl", differences(replays, names, "pass@1")
    by_lag = {table.title: rows for table, rows in tables if math.isfinite(table.lag)}
    good, kept = limits(by_lag)
    yield "rates that learn well", good
    yield "rates that lose no run", kept
    yield "robustness", "\n\n".join(of_surface(*table) for table in tables)
    for table, rows in tables:
        if table.title == "Many syncs":
            yield "many syncs at step 256", at_step(rows, 256)
    largest = Arm("live", plan.tuned_lags[-1])
    yield "trials", trials(results, plan, largest, names)
    parts = (f"### {arm.name}\n\n{of_arm(plan, of)}" for arm, of in found.items())
    yield "arms", "\n\n".join(parts)


def counts(results: Results, plan: Plan) -> str:
    lines = lines_of(results, plan)
    ended = sum(line["outcome"] == "ended" for line in lines)
    hours = sum(line.get("core_seconds", 0.0) for line in lines) / 3600
    row = [
        f"{ended}",
        f"{len(lines) - ended}",
        f"{hours:.1f}",
        f"{len({x['code'] for x in lines})}",
    ]
    header = ["runs that ended", "runs that were not finite", "core hours", "states of the code"]
    return markdown(header, [row])


def start(results: Results, plan: Plan) -> str:
    """The policy after the warm-up, mean over seeds."""
    lines = [line for seed in plan.seeds if (line := results.line(warm_up(plan, seed)))]
    measures = ("pass@1", "pass@8", "pass@64", "entropy") if lines else ()
    return markdown(measures, [[f"{np.mean([x['test'][k] for x in lines]):.3f}" for k in measures]])


def overview(found: Mapping[Arm, Chosen], names: Iterable[str]) -> str:
    """Mean pass@1 by method and arm; + and - mark a difference to OAPL."""

    def entry(of: Chosen, name: str) -> str:
        if name not in of:
            return ""
        cell, sign = of[name][1], ""
        if name != OURS and OURS in of:
            against = difference(cell, of[OURS][1], "pass@1")
            sign = {"more": " +", "less": " -", "level": ""}[verdict(against)]
        return f"{cell.mean('pass@1'):.3f}{sign}" + (f" ({cell.lost} lost)" if cell.lost else "")

    rows = [[f"`{name}`", *(entry(of, name) for of in found.values())] for name in names]
    return markdown(["", *(arm.name for arm in found)], rows)


def differences(found: Mapping[Arm, Chosen], names: Iterable[str], measure: str) -> str:
    """Each method minus OAPL by arm, and how many are more, level, less and unknown."""
    form = "{:+.0f}" if measure in LEVELS else "{:+.3f}"
    rows, counted = [], {arm: list[str]() for arm in found}
    for name in [name for name in names if name != OURS]:
        row = [f"`{name}`"]
        for arm, of in found.items():
            both = name in of and OURS in of
            apart = difference(of[name][1], of[OURS][1], measure) if both else None
            row.append(bracketed(apart, form, bold=True) if apart else "")
            counted[arm] += [verdict(apart)] if apart else []
        rows.append(row)
    words = ("more", "level", "less", "unknown")
    total = [
        ", ".join(f"{of.count(word)} {word}" for word in words if word in of)
        for of in counted.values()
    ]
    return markdown([f"{measure}, minus oapl", *(a.name for a in found)], [*rows, ["all", *total]])


def of_arm(plan: Plan, methods: Chosen) -> str:
    """Everything that was measured of an arm."""
    rows = []
    for name, (chosen, cell) in methods.items():
        rate, n = chosen["optim.learning_rate"], len(cell.lines)
        tried = [values["optim.learning_rate"] for values in objectives.candidates(plan, name)]
        constants = {k.rpartition(".")[2]: v for k, v in chosen.items() if "rate" not in k}
        row = [f"`{name}`", f"{rate:g}{'!' if rate in (min(tried), max(tried)) else ''}"]
        row.append(", ".join(f"{k} {v}" for k, v in constants.items()))
        row += [bracketed(cell.spread(k)) for k in ("pass@1", "pass@8", "pass@64", "entropy")]
        row.append(bracketed(cell.spread("generations"), "{:.0f}"))
        for level in LEVELS:
            reached = f"{sum(cell.reached(level))}/{n}"
            row.append(f"{bracketed(cell.spread(level), '{:.0f}')} ({reached})")
        rows.append([*row, bracketed(cell.spread("drift"), "{:.2g}"), f"{cell.lost}/{n}"])
    measures = ("pass@1", "pass@8", "pass@64", "entropy", "generations", *LEVELS)
    return markdown(["", "rate", "constants", *measures, "drift", "lost"], rows)


def of_surface(table: lag.Table, rows: Rows) -> str:
    """Smallest and largest pass@1 of the seeds, lost runs, and drift."""

    def entry(cell: Cell) -> str:
        values, lost = cell.of("pass@1"), f" ({cell.lost} lost)" if cell.lost else ""
        drift = bracketed((cell.mean("drift"), math.nan, math.nan), "{:.2g}")
        return f"{min(values):.2f} to {max(values):.2f}{lost}; {drift}"

    header = f"### {table.title}, {table.num_steps} steps"
    return f"{header}\n\n{by_column(table.rows, rows, entry)}"


def at_step(rows: Rows, step: int) -> str:
    """Smallest and largest pass@1 of the seeds on the validation split, before the end."""

    def entry(cell: Cell) -> str:
        values = [p[2] for line in cell.lines for p in line["progress"] if p[0] == step]
        return f"{min(values):.2f} to {max(values):.2f}" if values else ""

    return by_column(f"at step {step}", rows, entry)


def trials(results: Results, plan: Plan, arm: Arm, names: Iterable[str]) -> str:
    """pass@1 of the trials by method and rate: both seeds, of the constants with the best mean."""
    found: dict[str, dict[str, list[float]]] = {f"`{name}`": {} for name in names}
    for name in names:
        for values in objectives.candidates(plan, name):
            runs = [objectives.trial(plan, arm, name, values, s) for s in plan.tuning_seeds]
            if all(lines := [results.line(run) for run in runs]):
                scores = [score(line, "pass@1") for line in lines if line]
                rate, row = f"{values['optim.learning_rate']:g}", found[f"`{name}`"]
                row[rate] = max(row.get(rate, scores), scores, key=sum)
    rates = sorted(set(chain(*found.values())), key=float)
    return by_column("", found, lambda of: f"{min(of):.2f}, {max(of):.2f}", rates)


def limits(by_lag: Mapping[str, Rows]) -> tuple[str, str]:
    """Tables by lag: the largest rate within CLOSE of the best, and the largest without losses."""

    def good(row: Mapping[str, Cell]) -> str:
        means = {rate: cell.mean("pass@1") for rate, cell in row.items()}
        return [rate for rate, mean in means.items() if mean >= max(means.values()) - CLOSE][-1]

    def kept(row: Mapping[str, Cell]) -> str:
        lost = [cell.lost for cell in row.values()]
        return ["none", *row][int(np.argmax([*map(bool, lost), True]))]

    names = list(dict.fromkeys(chain(*list(by_lag.values())[::-1])))  # of the largest lag first
    rows = {
        name: {lag: cells[name] for lag, cells in by_lag.items() if name in cells} for name in names
    }
    return by_column("", rows, good, by_lag), by_column("", rows, kept, by_lag)


def by_column(
    header: str,
    rows: Mapping[str, Mapping[str, Any]],
    entry: Callable[[Any], str],
    columns: Iterable[str] = (),
) -> str:
    """A table whose entries may be missing; columns in order of appearance unless given."""
    columns = list(columns) or list(dict.fromkeys(chain(*rows.values())))
    body = [
        [name, *(entry(row[column]) if column in row else "" for column in columns)]
        for name, row in rows.items()
    ]
    return markdown([header, *columns], body)


# Pictures


def pictures(results: Results, plan: Plan) -> Iterator[tuple[str, Figure]]:
    """File names and figures of everything that there are results for."""
    found = collect(results, plan)
    sampled = {arm: of for arm, of in found.items() if arm.kind != "replay"}
    replays = {arm: of for arm, of in found.items() if arm.kind == "replay"}
    by_lag = {t.title: rows for t, rows in surfaces(results, plan) if math.isfinite(t.lag)}
    old = [arm for arm in (Arm("live", max(plan.lags)), Arm("offline", 0)) if arm in sampled]
    if sampled:
        yield "methods", gaps(sampled)
        yield "lags", staleness(sampled)
        yield "generations", generations(sampled)
    if old:
        yield "pass_at_k", leads({arm: sampled[arm] for arm in old})
    if replays:
        yield "replays", gaps(replays)
    if by_lag:
        yield "rates", rates(by_lag)


def gaps(found: Mapping[Arm, Chosen]) -> Figure:
    """Each method's pass@1 minus OAPL's, a panel for each arm; best mean difference on top."""
    apart = {
        arm: {
            name: difference(cell, of[OURS][1], "pass@1")
            for name, (_, cell) in of.items()
            if name != OURS
        }
        for arm, of in found.items()
        if OURS in of
    }
    names = list(dict.fromkeys(chain(*apart.values())))
    mean = lambda name: np.mean([of[name][0] for of in apart.values() if name in of])
    names.sort(key=mean, reverse=True)
    size = 2.1 * len(apart) + 1.5, 0.26 * len(names) + 1.2
    figure, panels = plt.subplots(
        1, max(len(apart), 1), figsize=size, squeeze=False, sharex=True, sharey=True
    )
    for panel, (arm, of) in zip(panels[0], apart.items(), strict=False):
        for row, name in enumerate(names):
            if name in of:
                middle, *ends = of[name]
                color = VERDICTS[verdict(of[name])]
                panel.plot(ends, [row, row], color=color, linewidth=1.5)
                panel.plot(middle, row, color=color, marker="o", markersize=4)
        panel.axvline(0, color="C0")
        panel.set_title(arm.name, fontsize=10)
    panels[0][0].set_yticks(range(len(names)), names)
    panels[0][0].set_ylim(len(names) - 0.5, -0.5)
    figure.supxlabel("pass@1 minus that of oapl", fontsize=10)
    return finish(figure)


FAMILIES = {
    "clipped ratios": ("grpo", "dr_grpo", "maxrl", "gspo"),
    "truncated or damped weights": ("grpo_is", "vcpo", "cispo", "rloo", "vespo"),
    "likelihood and other regressions": ("sft", "asymre", "opmd_trinity", "opmd_kimi", "tba"),
}


def staleness(found: Mapping[Arm, Chosen]) -> Figure:
    """pass@1 by lag, a panel for each family of objectives, OAPL in all."""
    figure, panels = plt.subplots(1, len(FAMILIES), figsize=(14, 4.2), sharey=True)
    where = range(len(found))
    for panel, (family, names) in zip(panels, FAMILIES.items(), strict=True):
        for i, name in enumerate((OURS, *names)):
            means = [of[name][1].mean("pass@1") if name in of else np.nan for of in found.values()]
            style = dict(linewidth=3) if name == OURS else dict(linewidth=1.5)
            panel.plot(where, means, label=name, marker="o", color=f"C{i}", **style)
        panel.set_xticks(where, [str(arm.lag or "offline") for arm in found])
        panel.set(title=family, xlabel="lag L")
        panel.legend(fontsize=8, loc="lower left")
    panels[0].set_ylabel("pass@1, test split")
    return finish(figure)


def leads(found: Mapping[Arm, Chosen]) -> Figure:
    """OAPL's pass@k minus that of others by k, and entropy against pass@1."""
    names = ("sft", "vespo", "grpo_is", "grpo", "cispo", "mixed")
    figure, panels = plt.subplots(1, 2 * len(found), figsize=(7 * len(found), 4), squeeze=False)
    for (arm, of), panel, scatter in zip(
        found.items(), panels[0][::2], panels[0][1::2], strict=True
    ):
        cells = {name: of[name][1] for name in (OURS, *names) if name in of}
        for i, (name, cell) in enumerate(cells.items()):
            scatter.plot(cell.mean("pass@1"), cell.mean("entropy"), "o", color=f"C{i}")
            at = cell.mean("pass@1"), cell.mean("entropy")
            scatter.annotate(name, at, (5, 3), textcoords="offset points", color=f"C{i}")
            points = {
                k * 1.06 ** (i - 4): difference(cells[OURS], cell, f"pass@{k}") for k in (1, 8, 64)
            }
            if name != OURS:
                whiskers(panel, points, name, color=f"C{i}", linewidth=1.5)
        panel.axhline(0, color="C0", linewidth=2)
        panel.set_xscale("log", base=2)
        panel.set_xticks((1, 8, 64), ("1", "8", "64"))
        panel.set(title=f"{arm.name}: pass@k, oapl minus ...", xlabel="k")
        panel.legend(fontsize=8)
        scatter.set(title=f"{arm.name}: entropy", xlabel="pass@1", ylabel="nats a token")
        scatter.margins(x=0.3)
    return finish(figure)


def generations(found: Mapping[Arm, Chosen]) -> Figure:
    """pass@1 on the validation split by rollouts, a panel for each arm; ended runs alone."""
    size = 3.1 * len(found) + 1.7, 3.8
    figure, panels = plt.subplots(1, len(found), figsize=size, squeeze=False, sharey=True)
    for panel, (arm, of) in zip(panels[0], found.items(), strict=True):
        for name in (name for name in COLORS if name in of and of[name][1].ended):
            progress = np.array([line["progress"] for line in of[name][1].ended])
            made, reached = progress[0, :, 1] / 1000, progress[..., 2].mean(0)
            width = 3 if name == OURS else 1.3
            panel.plot(made, reached, label=name, color=COLORS[name], linewidth=width)
        for level in LEVELS.values():
            panel.axhline(level, color="0.5", linestyle="--", linewidth=1)
        panel.set(xlabel="thousands of rollouts", title=arm.name)
    panels[0][0].set_ylabel("pass@1, validation split")
    return finish(figure, panels[0][0])


def rates(by_lag: Mapping[str, Rows]) -> Figure:
    """pass@1 against the learning rate, a panel for each lag; bars are the range of the seeds."""
    names = ("oapl, beta2 0.2", "grpo", "grpo_is", "cispo", "vespo", "gspo, wide", "sft")
    size = 4 * len(by_lag) + 1.7, 4
    figure, panels = plt.subplots(1, len(by_lag), figsize=size, squeeze=False, sharey=True)
    for panel, (title, rows) in zip(panels[0], by_lag.items(), strict=True):
        for i, name in enumerate(names):
            row = rows.get(name, {})
            points = {
                column + 0.09 * (i - 3): (cell.mean("pass@1"), min(values), max(values))
                for column, cell in enumerate(row.values())
                for values in [cell.of("pass@1")]
            }
            color = COLORS[name.partition(",")[0]]
            whiskers(panel, points, name, color=color, linewidth=1)
        columns = list(next(iter(rows.values())))
        panel.set_xticks(range(len(columns)), columns)
        panel.set(xlabel="learning rate", title=title, ylim=(0, 1))
    panels[0][0].set_ylabel("pass@1, test split")
    return finish(figure, panels[0][-1])


# The page


def fill(text: str, parts: Mapping[str, str]) -> str:
    """Replaces the text between the marks of each part; appends parts without marks if there is no
    text at all."""
    if not text:
        return "".join(f"<!-- {n} -->\n\n{part}\n\n<!-- end -->\n\n" for n, part in parts.items())

    def part(match: re.Match[str]) -> str:
        name = match[1]
        return f"<!-- {name} -->\n\n{parts[name]}\n\n<!-- end -->" if name in parts else match[0]

    return re.sub(r"<!-- (.+?) -->\n.*?<!-- end -->", part, text, flags=re.DOTALL)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--root", default="runs/comparison", help="directory of results.jsonl")
    parser.add_argument("--to", default="docs", help="directory of comparison.md")
    parser.add_argument("--quick", action="store_true", help="results of the quick sweeps")
    given = parser.parse_args()
    root, to = epath.Path(given.root).resolve(), epath.Path(given.to).resolve()
    results = Results(root, any_defaults=True)
    plan = objectives.QUICK if given.quick else objectives.FULL
    for name, figure in pictures(results, plan):
        save(figure, to / "comparison" / f"{name}.png")
    lines = "".join(f"{json.dumps(line)}\n" for line in lines_of(results, plan))
    page = to / "comparison.md"
    (to / "comparison").mkdir(parents=True, exist_ok=True)
    page.write_text(fill(page.read_text() if page.exists() else "", dict(blocks(results, plan))))
    (to / "comparison" / RESULTS).write_text(lines)
    log(f"{page}")


if __name__ == "__main__":
    exit_with_code(main)
