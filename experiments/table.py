"""Statistics over seeds, paired differences, Markdown tables and plot helpers.

A seed is the unit of every interval. Runs of one seed share the initial policy, the order of the
prompts and, on a recorded stream, every group, so methods are compared by the differences of their
runs of the same seed.
"""

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from etils import epath
from scipy import stats

from experiments.sweep import Line, Point, Results

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
    of_policy = line[line["settings"]["split"]]
    return float(of_policy[measure] if measure in of_policy else line[measure])


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
