"""The limits of robustness to lag and learning rate: OAPL and six other objectives, live.

Claim: at a lag of 128 OAPL survives a learning rate at which the others collapse.
Command: python -m experiments.launch --experiment=experiments/lag.py --to=local \
        --root=runs/comparison --clean
    python -m experiments.comparison --root=runs/comparison --to=docs
Hardware: 2 CPU cores, 4 GB of memory.
Scale: `--to=queued` or `--to=xpk`: 6 points, v5e:8x8, a fleet of 202,423 generated tokens/s: at
    least 35.1 h, $2,696; the price's source is in experiments/paper.py.
Hours: 2.6 of a core, for 420 runs beside those of objectives.py.
Expected: arXiv 2602.19362 has OAPL stable at lags where GRPO with importance sampling is not.
Measured: docs/comparison.md (commit a0610e5, 2026-11-23). At three times the usual rate OAPL loses
    no run of three at lag 128, and nor do GSPO and the likelihood of right answers; at lag 8 all
    lose runs.

Nothing that is chosen here is used elsewhere, so all runs are graded on the test split. A table has
three seeds in each cell; a run that stands in two tables is executed once.

- Learning rate x lag x beta2: at which rate does a method stop to learn, and then to keep what it
  knew? How far does its policy drift from pi_lag within a window? Lag 1, where each step publishes,
  has three methods.
- Adam's moments at a sync: kept; reset with each window; remembered longer (b2 = 0.999).
- Scale of the advantages: beta1 of V^ (small: the maximum; large: the mean), equal groups, and the
  clip of the gradient's norm, the only place where Adam does not undo a scale; for GRPO, advantages
  that are not divided by the standard deviation.
- Many syncs: four times as many steps, at a constant rate, or at one that falls to a tenth as in
  all other runs.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import inf

from experiments import paper
from experiments.objectives import FULL, QUICK, Arm, Plan, Values, train
from experiments.sweep import Add, Point

METHODS: dict[str, tuple[str, Values]] = {
    "oapl, beta2 0.05": ("oapl", {"objective.beta2": 0.05}),
    "oapl, beta2 0.2": ("oapl", {"objective.beta2": 0.2}),
    "oapl, beta2 0.5": ("oapl", {"objective.beta2": 0.5}),
    "grpo": ("grpo", {}),
    "grpo_is": ("grpo_is", {}),
    "grpo_is, sequences": (
        "grpo_is",
        {"objective.policy_gradient.correction": "sequence_truncate"},
    ),
    # Token weights up to 5, as with grpo_is up to 2.
    "cispo": ("cispo", {}),
    "gspo": ("gspo", {}),
    "gspo, wide": ("gspo", {"objective.gspo.clip_low": 3e-2, "objective.gspo.clip_high": 4e-2}),
    "vespo": ("vespo", {}),
    # The likelihood of right answers, of groups with equal rewards too; no correction.
    "sft": ("sft", {"buffer.zero_variance_weight": 1.0}),
}
LAGS = (128, 8, 1)  # in the order of execution
THREE = ("oapl, beta2 0.2", "grpo", "grpo_is")
AGAINST = [
    *(
        (f"oapl, beta2 0.2, lag {lag}", f"{other}, lag {lag}")
        for lag in LAGS
        for other in THREE[1:]
    ),
    *((f"oapl, steps {lag}", "grpo_is, steps 1") for lag in (1, 10, 50, 100, 400)),  # at its scale
]


@dataclass(frozen=True)
class Table:
    """Runs by row and column; `lag` is infinite unless the columns are learning rates."""

    title: str
    lag: float
    rows: str  # header of the first column
    cells: dict[str, dict[str, list[Point]]]  # by row and column
    num_steps: int


def tables(plan: Plan) -> Iterator[Table]:
    """Yields the tables of the sweep, in the order of execution."""
    quick = plan.common["num_steps"] < FULL.common["num_steps"]
    rates = (1e-3,) if quick else (3e-4, 1e-3, 3e-3, 1e-2)
    steps: int = plan.common["num_steps"]

    def cell(name: str, lag: int, rate: float, **changes) -> list[Point]:
        method, constants = METHODS[name]
        forget_every = changes.pop("forget_every", 0)
        values = {"optim.learning_rate": rate, **constants}
        values |= {key.replace("__", "."): value for key, value in changes.items()}
        runs = [train(plan, Arm("live", lag), method, values, s, "test") for s in plan.seeds[:3]]
        return [replace(run, forget_every=forget_every) for run in runs]

    for lag in [lag for lag in LAGS if lag in plan.lags]:
        names = THREE[:2] if quick else THREE if lag == 1 else tuple(METHODS)
        cells = {name: {f"{rate:g}": cell(name, lag, rate) for rate in rates} for name in names}
        yield Table(f"Lag {lag}", lag, "learning rate", cells, steps)
    if quick:
        cells = {"Adam reset": {f"lag {lag}": cell(THREE[0], lag, 1e-3, forget_every=lag)}}
        yield Table("Adam's moments at a sync", inf, "", cells, steps)
        return
    columns = {f"lag {LAGS[0]}, rate {rate:g}": (LAGS[0], rate) for rate in (1e-3, 3e-3)}
    cells = {}
    for name in (THREE[0], THREE[2]):
        for what, changes in (
            ("kept", lambda lag: {}),
            ("reset", lambda lag: dict(forget_every=lag)),
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
            (THREE[0], "default", {}),
            (THREE[0], "beta1 0.25", dict(objective__beta1=0.25)),
            (THREE[0], "mean as baseline", dict(objective__beta1=1e6)),
            (THREE[0], "equal groups kept", dict(buffer__zero_variance_weight=1.0)),
            (THREE[0], "norm clipped at 0.03", dict(optim__max_grad_norm=0.03)),
            (THREE[0], "norm not clipped", dict(optim__max_grad_norm=1e9)),
            (THREE[2], "default", {}),
            (THREE[2], "not divided by std", dict(objective__policy_gradient__estimator="dr_grpo")),
            (THREE[2], "norm clipped at 0.03", dict(optim__max_grad_norm=0.03)),
            ("sft", "default", {}),
            ("sft", "equal groups dropped", dict(buffer__zero_variance_weight=0.0)),
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


def sweep_plan(add: Add, plan: Plan) -> None:
    """Adds table by table; seeds are the outer loop, as in objectives.sweep_plan."""
    for table in tables(plan):
        cells = [cell for row in table.cells.values() for cell in row.values()]
        for runs in zip(*cells, strict=True):
            add(*runs)


def sweep(add: Add) -> None:
    """Rows: three methods at the middle learning rate, by lag."""
    if add.form == "paper":
        add(*paper.runs({"objective": ("oapl",), "lag.steps": (1, 10, 50, 100, 400)}))
        add(*paper.runs({"objective": ("grpo_is",)}))
        return
    plan = QUICK if add.form == "quick" else FULL
    sweep_plan(add, plan)
    for table in tables(plan):
        for name in THREE if table.lag < inf else ():
            if name in table.cells:
                add(*table.cells[name]["0.001"], row=f"{name}, lag {table.lag}")
