"""The table of a sweep: means and intervals over seeds, paired differences, and the plot.

    python -m experiments.table experiments/betas.py --root=runs/sweeps [--to=docs/experiments]

Writes NAME.md, NAME.json and NAME.png, and prints the first. An experiment file may name its rows
(`cells(add)`), its columns (`MEASURES`), and the row that others are compared with (`AGAINST`).
Points that have not ended, failed, or are stale are named below the table and are in no mean.

A seed is the unit of every interval. Runs of one seed share the initial policy, the order of the
prompts and, on a recorded stream, every group, so methods are compared by the differences of their
runs of the same seed.
"""

import argparse
import dataclasses
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from etils import epath
from scipy import stats

from experiments.manifest import Manifests, checkout
from experiments.sweep import (
    FORMS,
    Add,
    Line,
    Point,
    Results,
    benchmark_results,
    grouped,
    load_experiment,
)
from oapl_jax.errors import UserError, exit_with_code
from oapl_jax.files import write_atomically
from oapl_jax.tracking.progress import log

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

# Measures: generations until pass@1 on the validation split is this high.
LEVELS = {"to pass@1 0.5": 0.5, "to pass@1 0.8": 0.8}
Spread = tuple[float, float, float]  # mean, and the ends of its interval


@dataclasses.dataclass(frozen=True)
class Cell:
    """One setting with several seeds, all ended.

    Attributes:
      lines: one a seed, in the order of the seeds.
      starts: lines of the policies that the runs started from.
    """

    lines: list[Line]
    starts: list[Line]

    def of(self, measure: str) -> list[float]:
        return [score(line, measure) for line in self.lines]

    def mean(self, measure: str) -> float:
        return float(np.mean(self.of(measure)))

    def spread(self, measure: str) -> Spread:
        return spread(self.of(measure))

    @property
    def lost(self) -> int:
        """Number of runs that failed or ended with a lower pass@1 than they started with."""
        before = [score(start, "pass@1") for start in self.starts]
        return sum(end < start for end, start in zip(self.of("pass@1"), before, strict=True))

    @property
    def ended(self) -> list[Line]:
        return [line for line in self.lines if line["outcome"] == "ended"]

    def reached(self, measure: str) -> list[bool]:
        """True for each run that reached a level."""
        return [bool(_at_level(line, LEVELS[measure])) for line in self.lines]


def cell_of(results: Results, runs: Sequence[Point]) -> Cell | None:
    """Returns None unless there are runs and all have ended."""
    lines = [results.line(run) for run in runs]
    starts = [results.line(run.start) for run in runs if run.start]
    there = Cell([x for x in lines if x is not None], [x for x in starts if x is not None])
    return there if runs and len(there.lines) == len(there.starts) == len(runs) else None


def score(line: Line, measure: str) -> float:
    """A measure of a run or of its last policy.

    A failed run has a pass@k of 0, the generations and the drift of its steps, and nan otherwise.
    The generations to a level are counted up to the first evaluation that reaches it; a run that
    ends below it counts all of its own, a lower bound, and a run that fails below it has nan.
    """
    if measure in LEVELS:
        never = line["generations"] if line["outcome"] == "ended" else math.nan
        return float([*_at_level(line, LEVELS[measure]), never][0])
    if line["outcome"] != "ended":
        return 0.0 if measure.startswith("pass@") else float(line.get(measure, math.nan))
    benchmark, _, k = measure.rpartition(" ")
    if benchmark:  # of the last step that was graded
        graded = line.get("benchmarks", {})
        last = graded[max(graded, key=int)] if graded else {}
        return float(last.get(benchmark, {}).get(k, math.nan))
    of_policy = line.get(line["settings"]["split"], {})
    return float(of_policy.get(measure, line.get(measure, math.nan)))


def _at_level(line: Line, level: float) -> list[int]:
    """Generations at each evaluation that is at the level."""
    return [made for _, made, pass_at_1, _ in line.get("progress", []) if pass_at_1 >= level]


def spread(values: Sequence[float]) -> Spread:
    """Mean and 95 % interval of Student's t (a bootstrap of three to five seeds is too narrow); the
    ends are nan for one value."""
    mean, n = float(np.mean(values)), len(values)
    if n == 1:
        return mean, math.nan, math.nan
    reach = float(stats.t.ppf(0.975, n - 1) * stats.sem(values))
    return mean, mean - reach, mean + reach


def difference(ours: Cell, theirs: Cell, measure: str) -> Spread:
    """Mean and interval of ours - theirs, seed by seed.

    If one run of a seed did not reach a level, the difference is the least possible; if neither
    did, it is nan.
    """
    apart = np.subtract(ours.of(measure), theirs.of(measure))
    if measure in LEVELS:
        either = np.logical_or(ours.reached(measure), theirs.reached(measure))
        apart = np.where(either, apart, math.nan)
    return spread(apart.tolist())


def verdict(of: Spread) -> str:
    """ "more" or "less" if the interval of a difference excludes 0, else "level", or "unknown"."""
    mean, low, high = of
    if math.isnan(mean):
        return "unknown"
    return "more" if low > 0 else "less" if high < 0 else "level"


def bracketed(of: Spread, form: str = "{:.3f}", *, bold: bool = False) -> str:
    """Formats a mean and its interval; with `bold`, an interval that excludes 0 is bold."""
    if math.isnan(of[0]):
        return "unknown"
    mean, low, high = map(form.format, of)
    mark = "**" if bold and verdict(of) != "level" else ""
    certain = of[1] == of[2] or not math.isfinite(of[1])  # equal values, or one alone
    return f"{mark}{mean}{mark}" + ("" if certain else f" [{low}, {high}]")


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    rule = ["---", *("---:" for _ in header[1:])]
    return "\n".join(f"| {' | '.join(row)} |" for row in (header, rule, *rows))


def whiskers(panel: Axes, points: Mapping[float, Spread], label: str, **style: Any) -> None:
    """Plots means with their intervals at positions x."""
    if points:
        mean, low, high = np.array(list(points.values())).T
        bars = np.nan_to_num(np.maximum([mean - low, high - mean], 0))  # one seed has no interval
        panel.errorbar(list(points), mean, yerr=bars, label=label, marker=".", capsize=2, **style)


def finish(figure: Figure, named: Axes | None = None) -> Figure:
    """Adds grids, and beside the panels a legend of the names in `named`."""
    for panel in figure.axes:
        panel.grid(alpha=0.3)
    figure.set_layout_engine("constrained")
    if named:
        handles = named.get_legend_handles_labels()
        figure.legend(*handles, loc="outside right upper", fontsize=8)
    return figure


def save(figure: Figure, path: epath.Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        figure.savefig(file, format="png", dpi=110)
    plt.close(figure)


# The table of an experiment

MEASURES = ("pass@1", "pass@8", "entropy", "generations")
SOURCES = ("code", "commit", "versions", "started", "ended", "restarts")  # of a manifest


@dataclasses.dataclass(frozen=True)
class Table:
    """Cells of an experiment whose points have ended, and the states of the others.

    Attributes:
      cells: a line a seed, by row.
      states: number of points by state, by row; "ended" too.
      problems: rows and points that are not in the means, with their state.
      sources: of the manifests: commits, dates and restarts.
    """

    name: str
    form: str
    measures: tuple[str, ...]
    against: str
    cells: dict[str, Cell]
    states: dict[str, dict[str, int]]
    problems: list[str]
    sources: list[dict[str, Any]]

    def minus(self, name: str, measure: str) -> Spread | None:
        """Difference to the row `against`, over the seeds that both have."""
        if name == self.against or self.against not in self.cells or name not in self.cells:
            return None
        seeded = lambda cell: {line["settings"]["seed"]: line for line in cell.lines}
        ours, theirs = seeded(self.cells[name]), seeded(self.cells[self.against])
        both = sorted(ours.keys() & theirs.keys())
        apart = [score(ours[s], measure) - score(theirs[s], measure) for s in both]
        return spread(apart) if apart else None

    def markdown(self) -> str:
        """Means, differences, then everything that is not in them."""
        shown = [measure for measure in self.measures if self._measured(measure)]
        form = lambda measure: "{:.0f}" if measure == "generations" else "{:.3f}"
        rows = []
        for name, cell in self.cells.items():
            values = [bracketed(cell.spread(m), form(m)) for m in shown]
            rows.append([name, f"{len(cell.lines)}", *values])
        parts = [markdown([f"{self.name}, {self.form}", "seeds", *shown], rows)]
        rows = []
        for name in self.cells:
            apart = [self.minus(name, measure) for measure in shown]
            if any(apart):
                cells = zip(shown, apart, strict=True)
                rows.append(
                    [name, *(bracketed(a, form(m), bold=True) if a else "" for m, a in cells)]
                )
        if rows:
            parts.append(markdown([f"minus {self.against}, seed by seed", *shown], rows))
        if self.problems:
            parts.append("Not in the means:\n\n" + "\n".join(f"- {p}" for p in self.problems))
        if self.sources:
            parts.append(provenance(self.sources))
        return "\n\n".join(parts) + "\n"

    def _measured(self, measure: str) -> bool:
        return any(not math.isnan(v) for cell in self.cells.values() for v in cell.of(measure))

    def json(self) -> dict[str, Any]:
        """The same as numbers; an end of an interval that is not known is null."""
        number = lambda value: None if math.isnan(value) else value
        numbers = lambda values: [number(value) for value in values] if values else None
        rows = {}
        for name, cell in self.cells.items():
            of = {m: numbers(cell.spread(m)) for m in self.measures}
            minus = {m: numbers(self.minus(name, m)) for m in self.measures}
            seeds = [line["settings"]["seed"] for line in cell.lines]
            rows[name] = {"seeds": seeds, "measures": of, "minus": minus}
        return {
            "experiment": self.name,
            "form": self.form,
            "against": self.against,
            "rows": rows,
            "states": self.states,
            "problems": self.problems,
            "sources": self.sources,
        }


def provenance(sources: Sequence[Mapping[str, Any]]) -> str:
    """One sentence: commits, dates and restarts of the points."""
    commits = sorted({source["commit"][:12] for source in sources if source["commit"]})
    days = sorted({source["ended"][:10] for source in sources if source["ended"]})
    restarts = sum(source["restarts"] for source in sources)
    span = " to ".join(dict.fromkeys((days[0], days[-1]))) if days else "no date"
    return f"Commit {', '.join(commits) or 'unknown'}; {span}; {restarts} restarts."


def table_of(module: Any, root: epath.Path, form: str, *, keep_stale: bool) -> Table:
    """Reads the results of an experiment.

    `keep_stale` takes points of another configuration or code than today's as they are.
    """
    code = "" if keep_stale else checkout()["code"]
    results, manifests = Results(root, any_defaults=keep_stale, code=code), Manifests(root)
    add = Add(results, form)
    module.sweep(add)
    rows = module.cells(add) if hasattr(module, "cells") else grouped(add.points)
    cells, states, problems, sources = {}, {}, [], []
    for name, points in rows.items():
        lines, starts = [], []
        for point in points:
            state, line = manifests.state(point, results), results.line(point)
            states.setdefault(name, {}).setdefault(state, 0)
            states[name][state] += 1
            if line is not None:
                if point.benchmarks:  # graded after the training ended, perhaps
                    line = {**line, **benchmark_results(point.workdir(root))}
                    if "benchmarks" not in line:
                        state = "trained, not graded"
                lines.append(line)
                starts += [first] if point.start and (first := results.line(point.start)) else []
            if state != "ended":
                problems.append(f"{name}, seed {point.seed}: {state}{because(line)}")
            if manifest := manifests.read(point):
                sources.append({"key": point.key} | {k: manifest[k] for k in SOURCES})
        if lines:
            cells[name] = Cell(lines, starts)
    measures = getattr(module, "MEASURES", MEASURES)
    if benchmarks := next((p.benchmarks for points in rows.values() for p in points), ()):
        measures = tuple(f"{name} pass@{k}" for name in benchmarks for k in (1, 5, 10))
    against = getattr(module, "AGAINST", next(iter(rows), ""))
    name = Path(module.__file__).stem
    return Table(name, form, measures, against, cells, states, problems, sources)


def because(line: Line | None) -> str:
    """The reason of a failed point, which counts in the means as table.score says."""
    return f" ({line['reason']}; counted as in experiments/table.py)" if line else ""


def draw(table: Table, curves: Sequence[str]) -> Figure:
    """The first measure by row, pass@k by k, and the curves over the steps, as far as measured."""
    graded = {name: cell.lines for name, cell in table.cells.items() if cell.lines}
    ks = [m for m in table.measures if m.startswith("pass@")]
    moving = {
        name: [line for line in lines if line.get("progress")] for name, lines in graded.items()
    }
    moving = {name: lines for name, lines in moving.items() if lines}
    panels = ["bars", *(["k"] if len(ks) > 2 else []), *(curves if moving else ())]
    size = (5.5 * len(panels), max(3.6, 0.3 * len(graded) + 1.2))
    figure, axes = plt.subplots(1, len(panels), figsize=size, squeeze=False)
    for panel, kind in zip(axes[0], panels, strict=True):
        for i, name in enumerate(graded):
            color = f"C{i % 10}"
            if kind == "bars":
                mean, low, high = table.cells[name].spread(table.measures[0])
                ends = [mean if math.isnan(end) else end for end in (low, high)]
                panel.plot(ends, [i, i], color=color)
                panel.plot(mean, i, "o", color=color)
            elif kind == "k":
                points = {int(m.partition("@")[2]): table.cells[name].spread(m) for m in ks}
                whiskers(panel, points, name, color=color)
            elif name in moving:
                x, values = curve_of(moving[name], kind)
                panel.plot(x, values.mean(0), color=color, label=name, marker=".")
                panel.fill_between(x, values.min(0), values.max(0), color=color, alpha=0.15)
        if kind == "bars":
            panel.set_yticks(range(len(graded)), list(graded))
            panel.invert_yaxis()
            panel.set_xlabel(f"{table.measures[0]}, mean and 95 % interval")
        elif kind == "k":
            panel.set_xscale("log", base=2)
            panel.set(xlabel="k", ylabel="pass@k")
        else:
            panel.set(xlabel="gradient step", ylabel=f"{kind}, validation split; bands: the seeds")
        if kind != "bars":
            panel.legend(fontsize=8)
    return finish(figure)


def curve_of(lines: Sequence[Line], kind: str) -> tuple[list[int], np.ndarray]:
    """Steps, and the values of each run at them."""
    column = {"pass@1": 2, "entropy": 3}
    shortest = min(len(line["progress"]) for line in lines)
    steps = [p[0] for p in lines[0]["progress"][:shortest]]
    if kind in column:
        return steps, np.array([[p[column[kind]] for p in x["progress"][:shortest]] for x in lines])
    return steps, np.array([line["validation"][kind][:shortest] for line in lines])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("experiment", help="a file with sweep(add)")
    parser.add_argument("--root", default="runs/sweeps", help="of results.jsonl and manifests/")
    parser.add_argument("--form", choices=FORMS, default="cpu", help="as of the launch")
    parser.add_argument("--to", help="directory of the files; tables/ below the root")
    parser.add_argument(
        "--stale", choices=("show", "keep"), default="show", help="keep: take them as they are"
    )
    given = parser.parse_args()
    root = epath.Path(given.root).resolve()
    module = load_experiment(given.experiment)
    table = table_of(module, root, given.form, keep_stale=given.stale == "keep")
    to = epath.Path(given.to).resolve() if given.to else root / "tables"
    text = table.markdown()
    if not table.cells:
        raise UserError(f"--root={root} has no result of {given.experiment}: {table.states}")
    to.mkdir(parents=True, exist_ok=True)
    write_atomically(to / f"{table.name}.md", [text.encode()])
    content = json.dumps(table.json(), indent=1)
    write_atomically(to / f"{table.name}.json", [f"{content}\n".encode()])
    save(draw(table, getattr(module, "CURVES", ("pass@1", "entropy"))), to / f"{table.name}.png")
    log(f"{text}\n{to / table.name}.md, .json, .png")


if __name__ == "__main__":
    exit_with_code(main)
