"""Numbers from the lines of finished runs: means over seeds, intervals, differences.

A seed is the unit: runs of one seed share the warmed-up policy that they start from, the order of
the prompts and, on a recorded stream, every group, so that two methods are compared by the
differences of their runs of the same seed.
"""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
from scipy import stats

from experiments.grid import Grid, Line
from experiments.runs import Run

# Measures: the generations up to these levels of pass@1 on the validation split.
LEVELS = {"to pass@1 0.5": 0.5, "to pass@1 0.8": 0.8}
Spread = tuple[float, float, float]  # mean, and the ends of its interval


@dataclasses.dataclass(frozen=True)
class Cell:
    """The same run for several seeds, all come to an end.

    Attributes:
      lines: one a seed, in the order of the seeds.
      starts: of the policies that they started from.
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
        """Runs that failed or ended with a lower pass@1 on the test split than they began with."""
        began = [score(start, "pass@1") for start in self.starts]
        return sum(end < start for end, start in zip(self.of("pass@1"), began, strict=True))

    def reached(self, measure: str) -> list[bool]:
        """Of each run, whether it reached a level."""
        return [bool(_at_level(line, LEVELS[measure])) for line in self.lines]


def cell_of(grid: Grid, runs: Sequence[Run]) -> Cell | None:
    """None unless there are runs and all have come to an end."""
    lines = [grid.line(run) for run in runs]
    starts = [grid.line(run.start) for run in runs if run.start]
    there = Cell([x for x in lines if x is not None], [x for x in starts if x is not None])
    whole = runs and len(there.lines) == len(there.starts) == len(runs)
    return there if whole else None


def score(line: Line, measure: str) -> float:
    """A measure of a run's last policy on the run's split, or of the run.

    A run that failed has a pass@k of 0, the generations and the drift of its steps, and not a
    number for the rest. To a level are the generations up to the first evaluation at which it was
    reached; one that ends without it counts all of its own, which is the least that it would need,
    and of one that fails without it they are not a number.
    """
    if measure in LEVELS:
        never = line["generations"] if line["outcome"] == "ended" else math.nan
        return float([*_at_level(line, LEVELS[measure]), never][0])
    if line["outcome"] != "ended":
        return 0.0 if measure.startswith("pass@") else float(line.get(measure, math.nan))
    of_policy = line[line["settings"]["split"]]
    return float(of_policy[measure] if measure in of_policy else line[measure])


def _at_level(line: Line, level: float) -> list[int]:
    """Generations at each evaluation that found the level reached."""
    points = line.get("progress", [])
    return [made for _, made, pass_at_1, _ in points if pass_at_1 >= level]


def spread(values: Sequence[float]) -> Spread:
    """Mean and 95 % interval of Student's t; one value has no interval, and not-a-number for its
    ends."""
    mean, n = float(np.mean(values)), len(values)
    if n == 1:
        return mean, float("nan"), float("nan")
    reach = float(stats.t.ppf(0.975, n - 1) * np.std(values, ddof=1) / np.sqrt(n))
    return mean, mean - reach, mean + reach


def difference(ours: Cell, theirs: Cell, measure: str) -> Spread:
    """Mean and interval of ours - theirs, seed by seed.

    Where a run did not reach a level the difference is the least that it can be; where neither run
    of a seed did, nothing is known.
    """
    apart = np.subtract(ours.of(measure), theirs.of(measure))
    if measure in LEVELS:
        either = np.logical_or(ours.reached(measure), theirs.reached(measure))
        apart = np.where(either, apart, math.nan)
    return spread(apart.tolist())


def verdict(of: Spread) -> str:
    """What the interval of a difference says: "more", "less", "level" if 0 is not outside, and
    "unknown" where a run failed before it had the measure, or no run of a seed reached a level."""
    mean, low, high = of
    if math.isnan(mean):
        return "unknown"
    return "more" if low > 0 else "less" if high < 0 else "level"
