"""Measures of one run: pass@k of its last policy, generations, and values over its steps."""

import math
from collections.abc import Sequence

from experiments.sweep import Line

STRIDE = 8  # gradient steps between two points of a line's "curve"
# Measures: generations until pass@1 on the validation split is this high.
LEVELS = {"to pass@1 0.5": 0.5, "to pass@1 0.8": 0.8}
Curve = tuple[Sequence[float], Sequence[float]]  # x, y


def score(line: Line, measure: str) -> float:
    """A measure of a run or of its last policy; nan if it was not measured.

    A failed run has a pass@k of 0, the generations and the drift of its steps, and nan otherwise.
    "generations" includes those of the runs that it started from. The generations to a level are
    counted up to the first evaluation that reaches it; a run that ends below it counts all of its
    own, a lower bound, and a run that fails below it has nan. A measure of a benchmark, such as
    "aime25 pass@1", is that of the last step that was graded.
    """
    if measure in LEVELS:
        never = line["generations"] if line["outcome"] == "ended" else math.nan
        return float([*at_level(line, LEVELS[measure]), never][0])
    if measure == "generations":
        return float(line.get(measure, math.nan)) + line.get("generations_before", 0)
    if line["outcome"] != "ended":
        return 0.0 if "pass@" in measure else float(line.get(measure, math.nan))
    if measure.rpartition(" ")[0]:
        return [math.nan, *by_step(line, measure)[1]][-1]
    of_policy = line.get(line["settings"]["split"], {})
    return float(of_policy.get(measure, line.get(measure, math.nan)))


def at_level(line: Line, level: float) -> list[int]:
    """Generations at each evaluation that is at the level."""
    return [made for _, made, pass_at_1, _ in line.get("progress", []) if pass_at_1 >= level]


def by_step(line: Line, measure: str) -> Curve:
    """Values over the gradient steps: of graded checkpoints, of validations, or of training."""
    benchmark, _, k = measure.rpartition(" ")
    if benchmark:
        graded = {
            int(step): of.get(benchmark, {}) for step, of in line.get("benchmarks", {}).items()
        }
        found = [(step, of[k]) for step, of in sorted(graded.items()) if k in of]
    elif progress := line.get("progress"):
        validated = {"pass@1": [p[2] for p in progress], "entropy": [p[3] for p in progress]}
        values = (validated | line.get("validation", {})).get(measure, [])
        found = [(p[0], value) for p, value in zip(progress, values, strict=False)]
    else:
        values = line.get("curve", {}).get(measure, [])
        found = [(STRIDE * i, v) for i, v in enumerate(values, 1) if v is not None]
    return [x for x, _ in found], [y for _, y in found]


def by_generations(line: Line) -> Curve:
    """pass@1 of each validation over the generations until then."""
    progress, before = line.get("progress", []), line.get("generations_before", 0)
    return [before + p[1] for p in progress], [p[2] for p in progress]
