"""Points of the figures' CPU forms: sums of four digits, from the warmed-up policy of a seed.

The settings are those of the comparison (experiments/objectives.py) with smaller splits, and a
learning rate that its trials chose for OAPL, GRPO and GRPO + IS alike.
"""

from typing import Any

from experiments.objectives import COMMON, FULL, QUICK
from experiments.sweep import Add, Point, Values, point

CONFIG = FULL.config
DATA: Values = {"data.validation_size": 128, "data.test_size": 128}
RATE: Values = {"optim.learning_rate": 1e-3}
LAG = 32  # eight windows in a run of 256 steps
OAPL: Values = {"objective": "oapl"}
# Weights of whole sequences, which the trials of the comparison chose at lag 128; at the paper's
# scale the baseline has those of tokens, the default.
IS_SEQUENCES: Values = {
    "objective": "grpo_is",
    "objective.policy_gradient.correction": "sequence_truncate",
}


def settings(add: Add) -> tuple[Values, Values, Values]:
    """Overrides of the data, the warm-up and the training, by the sweep's form."""
    if add.form == "quick":
        return QUICK.data, QUICK.warmup, {**QUICK.common, "lag.steps": 8, "evaluation.every": 0}
    return DATA, {}, {**COMMON, "lag.steps": LAG, "evaluation.every": 0}


def base(add: Add, seed: int, **fields: Any) -> Point:
    data, warmup, _ = settings(add)
    return point(
        CONFIG, {"objective": "oapl", "seed": seed, **data, **warmup}, kind="warm_up", **fields
    )


def run(add: Add, values: Values, **fields: Any) -> Point:
    """A training run; `values` has the objective and the seed."""
    data, _, common = settings(add)
    start = fields.pop("start", None) or base(add, values["seed"])
    return point(CONFIG, {**data, **common, **RATE, **values}, start=start, **fields)
