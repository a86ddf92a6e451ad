"""The tables of docs/comparison.md."""

import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain

import numpy as np

from experiments import lag, objectives
from experiments.arms import Arm, Plan, Values, arms
from experiments.findings import LEVELS, Cell, Spread, cell_of, difference, verdict
from experiments.grid import Grid, Line

OURS = "oapl"
CLOSE = 0.05  # of pass@1: a learning rate that costs no more than this is still a good one
Arms = Mapping[Arm, Mapping[str, tuple[Values, Cell]]]  # what was chosen, and how it ended


def collect(grid: Grid, plan: Plan) -> Arms:
    """For each arm the methods whose runs are all done, best pass@1 first.

    Live arms first, by their lag, and then the offline one; arms without a method are left out.
    """
    found: dict[Arm, dict[str, tuple[Values, Cell]]] = {}
    for arm, names in arms(plan):
        for name in names:
            chosen = objectives.choose(grid, plan, arm, name)
            cell = cell_of(grid, objectives.compared(plan, arm, name, chosen)) if chosen else None
            if chosen and cell:
                found.setdefault(arm, {})[name] = (chosen, cell)
    rank = lambda item: -item[1][1].mean("pass@1")
    sources = ["live", "offline", plan.recorder]
    order = sorted(found, key=lambda arm: (sources.index(arm.source), arm.lag))
    return {arm: dict(sorted(found[arm].items(), key=rank)) for arm in order}


def behind(grid: Grid, plan: Plan) -> list[Line]:
    """The lines of this plan's runs, in the order of the file: another's may lie beside them."""
    runs = [
        run
        for table in lag.tables(plan)
        for row in table.cells.values()
        for run in chain(*row.values())
    ]
    for arm, names in arms(plan):
        for name in names:
            for values in objectives.candidates(plan, name):
                runs += objectives.trials(plan, arm, name, values)
            chosen = objectives.choose(grid, plan, arm, name)
            runs += objectives.compared(plan, arm, name, chosen) if chosen else []
    needed = [other for run in runs for other in (run.start, run.stream) if other]
    keys = {run.key for run in (*runs, *needed)}
    return [line for line in grid.lines.values() if line["key"] in keys]


def overview(found: Arms, names: Iterable[str]) -> str:
    """Mean pass@1 by method and arm, with the verdict against OAPL."""

    def entry(methods: Mapping[str, tuple[Values, Cell]], name: str) -> str:
        if name not in methods:
            return ""
        cell, sign = methods[name][1], ""
        if name != OURS and OURS in methods:
            against = difference(cell, methods[OURS][1], "pass@1")
            sign = {"more": " +", "less": " -", "level": ""}[verdict(against)]
        lost = f" ({cell.lost} lost)" if cell.lost else ""
        return f"{cell.mean('pass@1'):.3f}{sign}{lost}"

    rows = [[f"`{name}`", *(entry(methods, name) for methods in found.values())] for name in names]
    return markdown(["", *(arm.name for arm in found)], [row for row in rows if any(row[1:])])


def differences(found: Arms, measure: str, core: Iterable[str]) -> tuple[str, dict[str, list[str]]]:
    """OAPL minus each of the core by arm, and the verdicts on all methods by arms of one kind:
    live, offline or replay."""
    others = [name for name in core if name != OURS]
    form = "{:+.0f}" if measure in LEVELS else "{:+.3f}"
    rows, verdicts = [], dict[str, list[str]]()
    for arm, methods in found.items():
        if OURS not in methods:
            continue
        ours = methods[OURS][1]
        apart = {
            name: difference(ours, cell, measure)
            for name, (_, cell) in methods.items()
            if name != OURS
        }
        verdicts.setdefault(arm.kind, []).extend(map(verdict, apart.values()))
        shown = [bracketed(apart[n], form, bold=True) if n in apart else "" for n in others]
        rows.append([arm.name, *shown])
    return markdown(["OAPL minus", *(f"`{name}`" for name in others)], rows), verdicts


def of_arm(plan: Plan, methods: Mapping[str, tuple[Values, Cell]]) -> str:
    """All that was measured of an arm."""
    rows = []
    for name, (chosen, cell) in methods.items():
        rate = chosen["optim.learning_rate"]
        tried = [values["optim.learning_rate"] for values in objectives.candidates(plan, name)]
        constants = {k.removeprefix("objective."): v for k, v in chosen.items()}
        del constants["optim.learning_rate"]
        rows.append(
            [
                f"`{name}`",
                f"{rate:g}{'!' if rate in (min(tried), max(tried)) else ''}",
                ", ".join(f"{k} {v}" for k, v in constants.items()),
                *(bracketed(cell.spread(k)) for k in ("pass@1", "pass@8", "pass@64", "entropy")),
                bracketed(cell.spread("generations"), "{:.0f}"),
                *(
                    f"{bracketed(cell.spread(level), '{:.0f}')} "
                    f"({sum(cell.reached(level))}/{len(cell.lines)})"
                    for level in LEVELS
                ),
                bracketed(cell.spread("drift"), "{:.2g}"),
                f"{cell.lost}/{len(cell.lines)}",
            ]
        )
    measures = ("pass@1", "pass@8", "pass@64", "entropy", "generations")
    header = ["", "rate", "constants", *measures, *LEVELS, "drift", "lost"]
    return markdown(header, rows)


def surfaces(grid: Grid, plan: Plan) -> dict[str, tuple[lag.Table, dict[str, dict[str, Cell]]]]:
    """By title the tables of experiments/lag.py whose runs are all done, small lags first."""
    ready = {}
    for table in sorted(lag.tables(plan), key=lambda table: table.lag):
        cells = {
            name: {column: cell_of(grid, runs) for column, runs in row.items()}
            for name, row in table.cells.items()
        }
        if all(cell for row in cells.values() for cell in row.values()):
            ready[table.title] = (table, cells)
    return ready


def of_surface(table: lag.Table, cells: Mapping[str, Mapping[str, Cell]]) -> str:
    """Smallest and largest pass@1 of the seeds, lost runs, and drift."""

    def entry(cell: Cell) -> str:
        values, lost = cell.of("pass@1"), f" ({cell.lost} lost)" if cell.lost else ""
        drift = bracketed((cell.mean("drift"), math.nan, math.nan), "{:.2g}")
        return f"{min(values):.2f} to {max(values):.2f}{lost}; {drift}"

    columns = list(next(iter(cells.values())))
    rows = [[name, *(entry(row[column]) for column in columns)] for name, row in cells.items()]
    return markdown([table.rows, *columns], rows)


def limits(by_lag: Mapping[str, Mapping[str, Mapping[str, Cell]]]) -> tuple[str, str]:
    """For each method and lag the largest rate that is still good, and that loses no run; nothing
    where a method was not asked."""

    def good(row: Mapping[str, Cell]) -> str:
        means = {rate: cell.mean("pass@1") for rate, cell in row.items()}
        return [rate for rate, mean in means.items() if mean >= max(means.values()) - CLOSE][-1]

    def kept(row: Mapping[str, Cell]) -> str:
        lost = [cell.lost for cell in row.values()]
        return ["none", *row][int(np.argmax([*map(bool, lost), True]))]

    entry = lambda cells, name, ends: ends(cells[name]) if name in cells else ""
    tables = [
        markdown(
            ["", *by_lag],
            [
                [name, *(entry(cells, name, ends) for cells in by_lag.values())]
                for name in names_of(by_lag)
            ],
        )
        for ends in (good, kept)
    ]
    return tables[0], tables[1]


def names_of(by_lag: Mapping[str, Mapping[str, Mapping[str, Cell]]]) -> list[str]:
    """All rows, once each, those of the largest lag first: not all lags have all."""
    return list(dict.fromkeys(chain(*list(by_lag.values())[::-1])))


def bracketed(of: Spread, form: str = "{:.3f}", *, bold: bool = False) -> str:
    """A mean and its interval; bold, if asked, where it does not hold 0; or "unknown"."""
    if math.isnan(of[0]):
        return "unknown"
    mean, low, high = map(form.format, of)
    mark = "**" if bold and verdict(of) != "level" else ""
    certain = of[1] == of[2] or not math.isfinite(of[1])  # all values equal, or one alone
    return f"{mark}{mean}{mark}" + ("" if certain else f" [{low}, {high}]")


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    rule = ["---", *("---:" for _ in header[1:])]
    return "\n".join(f"| {' | '.join(row)} |" for row in (header, rule, *rows))
