"""Where robustness to lag and step size ends: OAPL and six others, live.

Claim under test: at a lag of 128 OAPL survives a learning rate at which the others collapse.
Command: python -m experiments.lag --jobs=2
Hardware: 2 CPU cores, 4 GB of memory.

Nothing that is chosen here is used elsewhere, so all runs are graded on the test split. Each
question is a table of cells, and each cell the same run for three seeds; a run that stands in two
tables is done once.

- learning rate x lag x beta2: at which rate does a method stop to learn, and then to keep what it
  knew? How far does its policy drift from pi_lag within a window (`drift`)? At lag 1, where each
  step publishes, for three methods.
- Adam's moments at a sync: are the large first steps of a window, or what the moments remember of
  the last one, to blame? Kept as they are; begun anew with each window; remembered over a thousand
  steps (b2 = 0.999).
- The scale of advantages: what V^ is (beta1 small: the maximum; large: the mean), whether groups of
  equal rewards pull to pi_lag, and how much the clip of the gradient's norm cuts, for Adam undoes
  any scale but there; for GRPO, advantages that are not divided by the standard deviation.
- Many syncs: four times as many steps, at a constant rate, or at one that falls to a tenth as in
  all other runs.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import inf

from experiments.arms import Arm, Plan, Values, a_run
from experiments.grid import Grid, by_seed, command
from experiments.objectives import FULL, QUICK
from experiments.runs import Run
from oapl_jax.errors import exit_with_code

METHODS: dict[str, tuple[str, Values]] = {
    "oapl, beta2 0.05": ("oapl", {"objective.beta2": 0.05}),
    "oapl, beta2 0.2": ("oapl", {"objective.beta2": 0.2}),
    "oapl, beta2 0.5": ("oapl", {"objective.beta2": 0.5}),
    "grpo": ("grpo", {}),
    "grpo_is": ("grpo_is", {}),
    "grpo_is, sequences": ("grpo_is", {"objective.correction": "sequence_truncate"}),
    # Token weights up to 5, as with grpo_is up to 2.
    "cispo": ("cispo", {}),
    "gspo": ("gspo", {}),
    "gspo, wide": ("gspo", {"objective.clip_low": 3e-2, "objective.clip_high": 4e-2}),
    "vespo": ("vespo", {}),
    # No correction at all: the likelihood of right answers, of groups with equal rewards too.
    "sft": ("sft", {"zero_variance_weight": 1.0}),
}
LAGS = (128, 8, 1)  # the largest first; what only the largest can show is asked there alone
THREE = ("oapl, beta2 0.2", "grpo", "grpo_is")
Cells = dict[str, dict[str, list[Run]]]  # by row and column


@dataclass(frozen=True)
class Table:
    """A question: its cells, what they are, and the steps of their runs.

    `lag` is that of a learning-rate table, and infinite for the others.
    """

    title: str
    lag: float
    rows: str  # what a row is
    cells: Cells
    num_steps: int


def tables(plan: Plan) -> Iterator[Table]:
    """In the order in which they are run."""
    quick = plan.common["num_steps"] < FULL.common["num_steps"]
    rates = (1e-3,) if quick else (3e-4, 1e-3, 3e-3, 1e-2)
    steps: int = plan.common["num_steps"]

    def cell(name: str, lag: int, rate: float, **changes) -> list[Run]:
        method, constants = METHODS[name]
        forget_every = changes.pop("forget_every", 0)
        values = {"optim.learning_rate": rate, **constants}
        values |= {key.replace("__", "."): value for key, value in changes.items()}
        runs = [a_run(plan, Arm("live", lag), method, values, s, "test") for s in plan.seeds[:3]]
        return [replace(run, forget_every=forget_every) for run in runs]

    for lag in [lag for lag in LAGS if lag in plan.lags]:
        names = THREE[:2] if quick else THREE if lag == 1 else tuple(METHODS)
        cells = {name: {f"{rate:g}": cell(name, lag, rate) for rate in rates} for name in names}
        yield Table(f"Lag {lag}", lag, "learning rate", cells, steps)
    if quick:
        anew = {"Adam anew": {f"lag {lag}": cell(THREE[0], lag, 1e-3, forget_every=lag)}}
        yield Table("Adam's moments at a sync", inf, "", anew, steps)
        return
    columns = {f"lag {LAGS[0]}, rate {rate:g}": (LAGS[0], rate) for rate in (1e-3, 3e-3)}
    cells = {}
    for name in (THREE[0], THREE[2]):
        for what, changes in (
            ("kept", lambda lag: {}),
            ("anew", lambda lag: dict(forget_every=lag)),
            ("b2 0.999", lambda lag: dict(optim__b2=0.999)),
        ):
            cells[f"{name}: {what}"] = {
                column: cell(name, lag, rate, **changes(lag))
                for column, (lag, rate) in columns.items()
            }
    yield Table("Adam's moments at a sync", inf, "", cells, steps)
    cells = {
        f"{name}: {what}": {
            column: cell(name, lag, rate, **c) for column, (lag, rate) in columns.items()
        }
        for name, what, c in (
            (THREE[0], "as it is", {}),
            (THREE[0], "beta1 0.25", dict(objective__beta1=0.25)),
            (THREE[0], "mean as baseline", dict(objective__beta1=1e6)),
            (THREE[0], "equal groups kept", dict(zero_variance_weight=1.0)),
            (THREE[0], "norm clipped at 0.03", dict(optim__max_grad_norm=0.03)),
            (THREE[0], "norm not clipped", dict(optim__max_grad_norm=1e9)),
            (THREE[2], "as it is", {}),
            (THREE[2], "not divided by std", dict(objective__estimator="dr_grpo")),
            (THREE[2], "norm clipped at 0.03", dict(optim__max_grad_norm=0.03)),
            ("sft", "as it is", {}),
            ("sft", "equal groups dropped", dict(zero_variance_weight=0.0)),
        )
    }
    yield Table("The scale of advantages", inf, "", cells, steps)
    of_rates = {
        f"lag {lag}, rate {rate:g}{', falling' if end < 1 else ''}": (lag, rate, end)
        for lag, rate, end in (
            *((8, 1e-3, 1.0), (8, 3e-3, 1.0), (128, 1e-3, 1.0), (128, 3e-3, 1.0)),
            (128, 3e-3, 0.1),  # to a tenth, as in all other runs
        )
    }
    cells = {
        name: {
            column: cell(name, lag, rate, num_steps=4 * steps, optim__final_fraction=end)
            for column, (lag, rate, end) in of_rates.items()
        }
        for name in (*THREE, "gspo, wide", "sft")
    }
    yield Table("Many syncs", inf, "", cells, 4 * steps)


def work(grid: Grid, quick: bool) -> None:
    for table in tables(QUICK if quick else FULL):
        cells = [cell for row in table.cells.values() for cell in row.values()]
        grid.run(by_seed(cells), what=table.title)


def main() -> None:
    from experiments import plot  # each run's process imports this module, and needs no pictures

    command(__doc__ or "", work, plot.render)


if __name__ == "__main__":
    exit_with_code(main)
