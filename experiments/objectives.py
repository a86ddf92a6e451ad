"""Every objective at equal lag, sampled live and on the same recorded rollouts.

Claim: none beforehand; docs/comparison.md has the rules by which the figures are read.
Command: python -m experiments.objectives --jobs=2
Hardware: 2 CPU cores, 4 GB of memory.

Each objective gets the same number of trials: learning rates times values of its own constants,
with two seeds of their own, graded on the validation split. The best one trains once more for each
of five other seeds. The test split grades these runs and the warmed-up policies that all start
from, and nothing is chosen by what it says. Trials are made live, at a lag of 8 and at one of 128;
every other arm takes the choice of one of these (arms.tuned).
"""

import dataclasses
import itertools
from collections.abc import Sequence

from configs.objectives import FROM_EQUAL_REWARDS
from experiments.arms import Arm, Plan, Values, a_run, arms, tuned
from experiments.findings import score
from experiments.grid import Grid, by_seed, command
from experiments.runs import Run
from oapl_jax.errors import exit_with_code

# The constants that are tried, of configs/objectives.py. A value without a source is a
# proposal: what suits answers of ten tokens in the place of thousands.
METHODS: dict[str, tuple[Values, ...]] = {
    # The default job's beta2, and a weaker anchor.
    "oapl": ({"beta2": 0.2}, {"beta2": 0.05}),
    # arXiv 2402.03300; clip-higher of arXiv 2503.14476.
    "grpo": ({"clip_high": 0.2}, {"clip_high": 0.28}),
    # Weights of tokens or of whole sequences: arXiv 2602.19362 does not say which it compares with.
    # A cap within those of published recipes, 1.5 to 5.
    "grpo_is": ({"correction": "token_truncate"}, {"correction": "sequence_truncate"}),
    # arXiv 2507.18071; and a hundred times wider, for a mean over a hundredth of the tokens.
    "gspo": (
        {"clip_low": 3e-4, "clip_high": 4e-4},
        {"clip_low": 3e-2, "clip_high": 4e-2},
    ),
    # arXiv 2510.13786; and a looser cap. At 2 it would be grpo_is with the weights of tokens.
    "cispo": ({"correction_cap": 5.0}, {"correction_cap": 8.0}),
    # The authors' code; and a kernel that is W exp(1 - W) on both sides.
    "vespo": (
        {},
        {
            "vespo_power_good": 1.0,
            "vespo_decay_good": 1.0,
            "vespo_power_bad": 1.0,
            "vespo_decay_bad": 1.0,
        },
    ),
    # As algorithm 1 of its paper reads: groups with equal rewards are pulled to pi_lag.
    "oapl, all groups": ({"beta2": 0.2}, {"beta2": 0.05}),
    # beta2 as for oapl; per root of the length, a root of the length more.
    "oapl_length": ({"beta2": 0.6}, {"beta2": 0.15}),
    "a_star_po": ({"beta2": 0.2}, {"beta2": 0.05}),
    "tba": ({"beta2": 0.2}, {"beta2": 0.05}),
    "opmd_kimi": ({"beta2": 0.2}, {"beta2": 0.05}),
    # tau only scales the loss, which Adam undoes.
    "opmd_trinity": ({},),
    # Below zero, as arXiv 2506.20520 recommends: the default of Trinity-RFT; and three times that.
    "asymre": ({"asymre_shift": -0.1}, {"asymre_shift": -0.3}),
    # arXiv 2503.20783 (clipped as GRPO); clip-higher.
    "dr_grpo": ({"clip_high": 0.2}, {"clip_high": 0.28}),
    # Caps of published recipes, as above.
    "rloo": ({"correction_cap": 2.0}, {"correction_cap": 5.0}),
    # arXiv 2602.17616; and a tighter cap.
    "vcpo": ({"correction_cap": 8.0}, {"correction_cap": 2.0}),
    # arXiv 2602.02710 (its clip, never active there); clip-higher.
    "maxrl": ({"clip_high": 0.2}, {"clip_high": 0.28}),
    # arXiv 2504.05118; and five times as much likelihood.
    "mixed": ({"likelihood_weight": 0.1}, {"likelihood_weight": 0.5}),
    "sft": ({},),
}
# The first to be compared, in the tables of differences and in color.
CORE = ("oapl", "oapl, all groups", "grpo", "grpo_is", "gspo", "cispo", "vespo", "sft")
# The same range for all: who has fewer constants gets more rates within it.
RATES = {1: (3e-4, 5e-4, 8e-4, 1.2e-3, 1.9e-3, 3e-3), 2: (3e-4, 1e-3, 3e-3)}
TUNING_SEEDS = (100, 101)
ALL_GROUPS = (
    "oapl, all groups",
    *FROM_EQUAL_REWARDS,
)  # these learn from groups with equal rewards too


COMMON = {
    "num_steps": 256,
    "groups_per_step": 8,
    "rollout.prompts_per_call": 8,
    # Groups with equal rewards weigh nothing, but no others are sampled in their place as the
    # default job does: each step costs the same number of rollouts, for every method.
    "buffer.zero_variance": "weight",
    "zero_variance_weight": 0.0,
    # A policy that has lost all is graded as any other.
    "rollout.unpaid_groups": 0,
    "checkpoint.every": 128,
    "checkpoint.keep": 1,
    "evaluation.n": 4,  # of the curves; how a run's last policy is graded: runs.GRADES
    "evaluation.ks": (1,),
}
FULL = Plan(
    config="arithmetic:chain_sum",
    core=CORE,
    rest=tuple(name for name in METHODS if name not in CORE),
    lags=(128, 8, 32, 1),
    tuned_lags=(8, 128),
    seeds=(0, 1, 2, 3, 4),
    trials=6,
    recorder="oapl",
    prompts=1024,
    data={"data.validation_size": 256, "data.test_size": 256},
    warmup={},
    common=COMMON,
)
QUICK = dataclasses.replace(
    FULL,
    core=("oapl", "grpo"),
    rest=(),
    lags=(8,),
    tuned_lags=(8,),
    seeds=(0,),
    trials=1,
    prompts=64,
    data={"data.train_size": 1000, "data.validation_size": 16, "data.test_size": 16},
    warmup={"warmup.num_steps": 150, "warmup.demonstrations": 1000},
    common={**COMMON, "num_steps": 16, "checkpoint.every": 4},
)


def candidates(plan: Plan, method: str) -> list[Values]:
    """What is tried for a method."""
    constants = METHODS[method]
    always: Values = {"zero_variance_weight": 1.0} if method in ALL_GROUPS else {}
    tried: list[Values] = [
        {"optim.learning_rate": rate, **{f"objective.{k}": v for k, v in chosen.items()}, **always}
        for chosen, rate in itertools.product(constants, RATES[len(constants)])
    ]
    return tried[: plan.trials]


def trials(plan: Plan, arm: Arm, method: str, values: Values) -> list[Run]:
    """The runs, one a tuning seed, that say what values are worth for an arm."""
    where = tuned(plan, arm)
    return [a_run(plan, where, method, values, seed, "validation") for seed in TUNING_SEEDS]


def choose(grid: Grid, plan: Plan, arm: Arm, method: str) -> Values | None:
    """Of all tried the one with the best mean pass@1 on the validation split, of equals the first.

    A failed trial counts as 0. None until all have come to an end.
    """
    tried = candidates(plan, method)
    lines = [[grid.line(run) for run in trials(plan, arm, method, values)] for values in tried]
    if any(line is None for of_one in lines for line in of_one):
        return None
    scores = [sum(score(line, "pass@1") for line in of_one if line) for of_one in lines]
    return tried[scores.index(max(scores))]


def compared(plan: Plan, arm: Arm, method: str, values: Values) -> list[Run]:
    """The runs of a method that are graded on the test split."""
    return [a_run(plan, arm, method, values, seed, "test") for seed in plan.seeds]


def run_arm(grid: Grid, plan: Plan, arm: Arm, methods: Sequence[str]) -> None:
    """Trials, then the runs of what they choose."""
    tries = [
        trials(plan, arm, method, values)
        for method in methods
        for values in candidates(plan, method)
    ]
    grid.run(by_seed(tries), what=f"{tuned(plan, arm).name}: trials")
    chosen = {method: choose(grid, plan, arm, method) for method in methods}
    runs = [compared(plan, arm, method, values) for method, values in chosen.items() if values]
    grid.run(by_seed(runs), what=f"{arm.name}: {', '.join(methods)}")


def work(grid: Grid, quick: bool) -> None:
    plan = QUICK if quick else FULL
    for arm, methods in arms(plan):
        run_arm(grid, plan, arm, methods)


def main() -> None:
    from experiments import plot  # each run's process imports this module, and needs no pictures

    command(__doc__ or "", work, plot.render)


if __name__ == "__main__":
    exit_with_code(main)
