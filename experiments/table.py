"""The table of a sweep: means and intervals over seeds, paired differences, and the plot.

    python -m experiments.table experiments/betas.py --root=runs/sweeps [--to=docs/experiments]

Writes NAME.md, NAME.json and NAME.png, and prints the first. An experiment file may name its
columns (`MEASURES`; of benchmarks the `KS` of pass@k), the row that others are compared with, or
pairs of rows (`AGAINST`), and its curves (`CURVES`). Points that have not ended or are stale are
named below the table and are in no mean.

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
from experiments.measures import LEVELS, Curve, at_level, by_generations, by_step, score
from experiments.sweep import (
    FORMS,
    Add,
    Line,
    Point,
    Results,
    benchmark_results,
    load_experiment,
    rows_of,
)
from oapl_jax.errors import UserError, exit_with_code
from oapl_jax.files import write_atomically
from oapl_jax.tracking.progress import log

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

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
        return [bool(at_level(line, LEVELS[measure])) for line in self.lines]

    @property
    def seeds(self) -> set[int]:
        return {line["settings"]["seed"] for line in self.lines}

    def at(self, seeds: Sequence[int]) -> "Cell":
        """The runs of these seeds, in their order."""
        of = {line["settings"]["seed"]: line for line in self.lines}
        return Cell([of[seed] for seed in seeds], [])


def cell_of(results: Results, runs: Sequence[Point]) -> Cell | None:
    """Returns None unless there are runs and all have ended."""
    lines = [results.line(run) for run in runs]
    starts = [results.line(run.start) for run in runs if run.start]
    there = Cell([x for x in lines if x is not None], [x for x in starts if x is not None])
    return there if runs and len(there.lines) == len(there.starts) == len(runs) else None


def spread(values: Sequence[float]) -> Spread:
    """Mean and 95 % interval of Student's t (a bootstrap of three to five seeds is too narrow); the
    ends are nan for one value, and all is nan without any."""
    mean, n = float(np.mean(values)) if values else math.nan, len(values)
    if n < 2:
        return mean, math.nan, math.nan
    reach = float(stats.t.ppf(0.975, n - 1) * stats.sem(values))
    return mean, mean - reach, mean + reach


def difference(ours: Cell, theirs: Cell, measure: str) -> Spread:
    """Mean and interval of ours - theirs over the seeds that both have; nan without any.

    If one run of a seed did not reach a level, the difference is the least possible; if neither
    did, it is nan.
    """
    both = sorted(ours.seeds & theirs.seeds)
    ours, theirs = ours.at(both), theirs.at(both)
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


def whiskers(panel: Axes, points: Mapping[float, Spread], label: str = "", **style: Any) -> None:
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
KS = (1, 5, 10)  # of a benchmark's pass@k
CURVES = ("pass@1", "entropy")
SOURCES = ("code", "commit", "versions", "started", "ended", "restarts")  # of a manifest


@dataclasses.dataclass(frozen=True)
class Table:
    """Cells of an experiment whose points have ended, and the states of the others.

    Attributes:
      benchmarks: on which the points are graded; none, if on a split.
      pairs: of rows that are compared.
      cells: a line a seed, by row.
      states: number of points by state, by row; "ended" too.
      failed: points that failed, which count in the means as measures.score says.
      missing: points that are not in the means, with their state.
      sources: of the manifests: commits, dates and restarts.
    """

    name: str
    form: str
    benchmarks: tuple[str, ...]
    measures: tuple[str, ...]
    pairs: tuple[tuple[str, str], ...]
    cells: dict[str, Cell]
    states: dict[str, dict[str, int]]
    failed: list[str]
    missing: list[str]
    sources: list[dict[str, Any]]

    @property
    def differences(self) -> dict[str, dict[str, Spread]]:
        """By pair and measure; of pairs whose rows are both there."""
        return {
            f"{one} - {other}": {
                m: difference(self.cells[one], self.cells[other], m) for m in self.measures
            }
            for one, other in self.pairs
            if {one, other} <= self.cells.keys()
        }

    def markdown(self) -> str:
        """Means, differences, then everything that is not in them."""
        shown = [measure for measure in self.measures if self._measured(measure)]
        form = lambda measure: "{:.0f}" if measure == "generations" else "{:.3f}"
        rows = []
        for name, cell in self.cells.items():
            values = [bracketed(cell.spread(m), form(m)) for m in shown]
            rows.append([name, f"{len(cell.lines)}", *values])
        parts = [markdown([f"{self.name}, {self.form}", "seeds", *shown], rows)]
        rows = [
            [pair, *(bracketed(of[m], form(m), bold=True) for m in shown)]
            for pair, of in self.differences.items()
        ]
        if rows:
            parts.append(markdown(["difference, seed by seed", *shown], rows))
        for title, points in (
            ("Failed; counted as in experiments/measures.py", self.failed),
            ("Not in the means", self.missing),
        ):
            if points:
                parts.append(f"{title}:\n\n" + "\n".join(f"- {point}" for point in points))
        if self.sources:
            parts.append(provenance(self.sources))
        return "\n\n".join(parts) + "\n"

    def _measured(self, measure: str) -> bool:
        return any(not math.isnan(v) for cell in self.cells.values() for v in cell.of(measure))

    def json(self) -> dict[str, Any]:
        """The same as numbers; an end of an interval that is not known is null."""
        number = lambda value: None if math.isnan(value) else value
        numbers = lambda of: {m: [number(value) for value in of[m]] for m in self.measures}
        rows = {
            name: {
                "seeds": [line["settings"]["seed"] for line in cell.lines],
                "measures": numbers({m: cell.spread(m) for m in self.measures}),
            }
            for name, cell in self.cells.items()
        }
        return {
            "experiment": self.name,
            "form": self.form,
            "rows": rows,
            "differences": {pair: numbers(of) for pair, of in self.differences.items()},
            "states": self.states,
            "failed": self.failed,
            "missing": self.missing,
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
    rows = rows_of(add)
    cells, states, failed, missing, sources = {}, {}, [], [], []
    for name, points in rows.items():
        lines, starts = [], []
        for point in points:
            state, line = manifests.state(point, results), line_of(point, results, root)
            if line and state == "ended" and point.benchmarks and "benchmarks" not in line:
                state, line = "trained, not graded", None
            if line is not None:
                lines.append(line)
                starts += [first] if point.start and (first := results.line(point.start)) else []
            states.setdefault(name, {}).setdefault(state, 0)
            states[name][state] += 1
            named = f"{name}, seed {point.seed}: {state}"
            if line is not None and state == "failed":
                failed.append(f"{named} ({line['reason']})")
            elif state != "ended":
                missing.append(named)
            if manifest := manifests.read(point):
                sources.append({"key": point.key} | {k: manifest[k] for k in SOURCES})
        if lines:
            cells[name] = Cell(lines, starts)
    measures: tuple[str, ...] = getattr(module, "MEASURES", MEASURES)
    benchmarks = next((p.benchmarks for points in rows.values() for p in points), ())
    if benchmarks:
        ks = getattr(module, "KS", KS)
        others = [measure for measure in measures if not measure.startswith("pass@")]
        measures = (*(f"{name} pass@{k}" for name in benchmarks for k in ks), *others)
    against = getattr(module, "AGAINST", next(iter(rows), ""))
    if isinstance(against, str):
        against = [(row, against) for row in rows if row != against]
    name, pairs = Path(module.__file__).stem, tuple(against)
    return Table(name, form, benchmarks, measures, pairs, cells, states, failed, missing, sources)


def line_of(point: Point, results: Results, root: epath.Path) -> Line | None:
    """A point's line, with the generations of the runs that it started from, and with grades of
    benchmarks that came after its end."""
    line = results.line(point)
    if line is None:
        return None
    before, start = 0, point.start
    while start is not None:
        before += (results.line(start) or {}).get("generations", 0)
        start = start.start
    return {**line, "generations_before": before, **benchmark_results(point.workdir(root))}


Panel = tuple[str, str]  # "bars", "k", "steps" or "generations"; and a measure or a benchmark


def panels(table: Table, curves: Sequence[str]) -> list[Panel]:
    """The first measure by row, pass@k by k, and the curves, as far as they are measured."""
    lines = [line for cell in table.cells.values() for line in cell.lines]
    found = [("bars", table.measures[0])]
    for name in table.benchmarks or ("",):
        if len(ks_of(table, name)) > 2:
            found.append(("k", name))
    for kind in curves:
        names = table.benchmarks if kind.startswith("pass@") else ()
        found += [("steps", f"{name} {kind}".strip()) for name in names or ("",)]
    measured = lambda panel: panel[0] != "steps" or any(by_step(x, panel[1])[0] for x in lines)
    found = [panel for panel in found if measured(panel)]
    if "generations" in curves:
        found.append(("generations", table.measures[0]))
    return found


def ks_of(table: Table, benchmark: str) -> dict[int, str]:
    """The measures of pass@k by k, of a benchmark or of the split."""
    split = {measure: measure.rpartition(" ") for measure in table.measures}
    return {
        int(k.removeprefix("pass@")): measure
        for measure, (name, _, k) in split.items()
        if name == benchmark and k.startswith("pass@")
    }


def draw(table: Table, curves: Sequence[str]) -> Figure:
    """Draws the panels in rows of four; the first has the names of all colors."""
    drawn, graded = panels(table, curves), table.cells
    across = min(len(drawn), 4)
    down = math.ceil(len(drawn) / across)
    size = (5.5 * across, down * max(3.6, 0.3 * len(graded) + 1.2))
    figure, axes = plt.subplots(down, across, figsize=size, squeeze=False)
    for unused in axes.flat[len(drawn) :]:
        unused.remove()
    colors = plt.get_cmap("tab10" if len(graded) <= 10 else "tab20")
    for axis, (kind, of) in zip(axes.flat, drawn, strict=False):
        for i, cell in enumerate(graded.values()):
            color = colors(i)
            if kind == "bars":
                mean, low, high = cell.spread(of)
                ends = [mean if math.isnan(end) else end for end in (low, high)]
                axis.plot(ends, [i, i], color=color)
                axis.plot(mean, i, "o", color=color)
            elif kind == "k":
                whiskers(
                    axis, {k: cell.spread(m) for k, m in ks_of(table, of).items()}, color=color
                )
            elif kind == "steps":
                band(axis, [by_step(line, of) for line in cell.lines], color)
            else:
                generations = np.nan_to_num(cell.mean("generations"))
                whiskers(axis, {float(generations): cell.spread(of)}, color=color)
                band(axis, [by_generations(line) for line in cell.lines], color)
        label(axis, kind, of, list(graded), max(len(cell.seeds) for cell in graded.values()))
    return finish(figure)


def band(axis: Axes, curves: Sequence[Curve], color: Any) -> None:
    """Plots the mean of the runs that have a curve, and a band from the lowest to the highest."""
    curves = [curve for curve in curves if curve[0]]
    if curves:
        shortest = min(len(x) for x, _ in curves)
        x = np.mean([x[:shortest] for x, _ in curves], 0)
        y = np.array([y[:shortest] for _, y in curves])
        axis.plot(x, y.mean(0), marker=".", color=color)
        axis.fill_between(x, y.min(0), y.max(0), color=color, alpha=0.15)


def label(axis: Axes, kind: str, of: str, rows: Sequence[str], seeds: int) -> None:
    if kind == "bars":
        axis.set_yticks(range(len(rows)), list(rows))
        axis.invert_yaxis()
        axis.set_xlabel(f"{of}, mean and 95 % interval" if seeds > 1 else f"{of}, one seed")
        return
    if kind == "k":
        axis.set_xscale("log", base=2)
        axis.set(xlabel="k", ylabel=f"{of} pass@k".strip())
    elif kind == "steps":
        axis.set(xlabel="gradient step", ylabel=f"{of}; bands: the seeds" if seeds > 1 else of)
    else:
        axis.set(xlabel="training generations", ylabel=of)


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
    save(draw(table, getattr(module, "CURVES", CURVES)), to / f"{table.name}.png")
    log(f"{text}\n{to / table.name}.md, .json, .png")


if __name__ == "__main__":
    exit_with_code(main)
