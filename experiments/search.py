"""Search beside grids: Optuna proposes the points of a sweep (extra `search`).

    best = add.search(
        lambda values: [point("arithmetic:chain_sum", {**values, "seed": s}) for s in (100, 101)],
        {"optim.learning_rate": Range(1e-4, 1e-2, log=True), "objective.beta2": (0.05, 0.2, 0.5)},
        trials=20,
    )

The trials are a function of the results alone: a batch is proposed once all results of the earlier
batches are there, and the optimizer is told again in the same order at every start. So a search
that was interrupted goes on with the same trials, and manifest, launcher and table treat its points
as any others. The sampler is the multivariate TPE with the constant liar, for batches.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from experiments.measures import LEVELS, score
from experiments.sweep import Add, Line, Point, Values
from oapl_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Range:
    """Numbers from low to high; integers if both ends are."""

    low: float
    high: float
    log: bool = False

    def suggest(self, trial: Any, name: str) -> float:
        if isinstance(self.low, int) and isinstance(self.high, int):
            return trial.suggest_int(name, self.low, self.high, log=self.log)
        return float(f"{trial.suggest_float(name, self.low, self.high, log=self.log):.4g}")


def search(
    add: Add,
    make: Callable[[Values], Sequence[Point]],
    space: Values,
    *,
    trials: int,
    batch: int = 4,
    measure: str = "pass@1",
    maximize: bool = True,
    seed: int = 0,
) -> Values | None:
    """Adds the points of the trials that the results decide so far.

    Args:
      make: the points of a trial, such as two seeds; their mean is its value.
      space: a Range, or a sequence of choices, for each config key.
      trials: number of all trials; `batch` are proposed at a time.
      measure: see measures.score. A trial with a failed point has the worst value, infinite except
        for pass@k, where a failed point counts as 0.

    Returns:
      The values of the best trial once all have ended, of equals the first; None before.

    Raises a UserError if points that ended have no such measure.
    """
    try:
        import optuna
    except ImportError as error:
        raise UserError("add.search needs Optuna: pip install --editable '.[search]'") from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    sampler = optuna.samplers.TPESampler(
        seed=seed, n_startup_trials=2 * batch, multivariate=True, constant_liar=True
    )
    study = optuna.create_study(sampler=sampler, direction="maximize" if maximize else "minimize")
    tried: list[tuple[float, Values]] = []
    while len(tried) < trials:
        asked = []
        for _ in range(min(batch, trials - len(tried))):
            trial = study.ask()
            values = {
                name: of.suggest(trial, name)
                if isinstance(of, Range)
                else trial.suggest_categorical(name, list(of))
                for name, of in space.items()
            }
            points = make(values)
            add(*points)
            asked.append((trial, values, [add.results.line(point) for point in points]))
        if not all(line for *_, lines in asked for line in lines):
            return None
        for trial, values, lines in asked:
            value = value_of(
                [line for line in lines if line], measure, worst=-math.inf if maximize else math.inf
            )
            study.tell(trial, value)
            tried.append((value, values))
    best = max if maximize else min
    return best(tried, key=lambda pair: pair[0])[1]


def value_of(lines: Sequence[Line], measure: str, *, worst: float) -> float:
    """The mean of a trial's points."""
    failed = any(line["outcome"] != "ended" for line in lines)
    if failed and ("pass@" not in measure or measure in LEVELS):
        return worst
    value = float(np.mean([score(line, measure) for line in lines]))
    if math.isnan(value):
        raise UserError(f"add.search(measure={measure!r}) is no measure of these points")
    return value
