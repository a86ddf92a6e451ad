"""Every objective at equal lag, sampled live and on the same recorded rollouts.

Claim: none in advance; docs/comparison.md states the rules by which the numbers are read.
Command: python -m experiments.launch --experiment=experiments/objectives.py --to=local \
        --root=runs/comparison --clean
    python -m experiments.comparison --root=runs/comparison --to=docs
Hardware: 2 CPU cores, 4 GB of memory.
Scale: `--to=queued` or `--to=xpk`: 3 points, v5e:8x8, a fleet of 202,423 generated tokens/s: at
    least 11.7 h, $899; the price's source is in experiments/paper.py.
Hours: 5 of a core, for 1,233 runs.
Expected: arXiv 2602.19362 finds OAPL above GRPO with importance sampling, on long answers.
Measured: docs/comparison.md (commit a0610e5, 2026-11-23); at lag 128 and offline OAPL is above GRPO
    and below truncated importance weights of sequences, VESPO and the likelihood of right answers.

Each objective gets the same number of trials: learning rates times values of its own constants,
two seeds each, graded on the validation split. The best trial then trains with five other seeds,
graded on the test split. Trials are live, at lags 8 and 128; every arm takes the choice of one of
these (`tuned`). An arm is a source of rollouts:

- live, lag L: sampled by the run itself, in windows of L steps, so that the lag is 0 to L - 1;
- offline: a set that the warmed-up policy sampled, one group for each of so many prompts, passed
  over twice in an order that follows from the seed. No sync: at step s the lag is s. All objectives
  see the same groups in the same order;
- replay, lag L: the rollouts of a recorded live run of the recorder at lag L, in its order. All
  objectives see the same groups at the same steps. The recorder used the constants of the config,
  not tuned ones: if it is tuned to these, its replay is its live run. For others the data are
  off-policy at any L.
"""

import dataclasses
import itertools
from collections.abc import Mapping
from typing import Any

from configs.objectives import FROM_EQUAL_REWARDS
from experiments import paper
from experiments.measures import score
from experiments.sweep import Add, Point, Results, point

Values = Mapping[str, Any]


# Constants that are tried, of configs/objectives.py. A value without a source is our choice for
# answers of ten tokens instead of thousands.
METHODS: dict[str, tuple[Values, ...]] = {
    # The default run's beta2, and a weaker anchor.
    "oapl": ({"beta2": 0.2}, {"beta2": 0.05}),
    # arXiv 2402.03300; clip-higher of arXiv 2503.14476.
    "grpo": ({"policy_gradient.clip_high": 0.2}, {"policy_gradient.clip_high": 0.28}),
    # Weights of tokens or of whole sequences: arXiv 2602.19362 does not say which it compares with.
    # A cap within those of published recipes, 1.5 to 5.
    "grpo_is": (
        {"policy_gradient.correction": "token_truncate"},
        {"policy_gradient.correction": "sequence_truncate"},
    ),
    # arXiv 2507.18071; and a hundred times wider, for a mean over a hundredth of the tokens.
    "gspo": (
        {"gspo.clip_low": 3e-4, "gspo.clip_high": 4e-4},
        {"gspo.clip_low": 3e-2, "gspo.clip_high": 4e-2},
    ),
    # arXiv 2510.13786; and a looser cap. At 2 it would be grpo_is with the weights of tokens.
    "cispo": ({"cispo.cap": 5.0}, {"cispo.cap": 8.0}),
    # The authors' code; and a kernel that is W exp(1 - W) on both sides.
    "vespo": (
        {},
        {
            "vespo.power_good": 1.0,
            "vespo.decay_good": 1.0,
            "vespo.power_bad": 1.0,
            "vespo.decay_bad": 1.0,
        },
    ),
    # As algorithm 1 of its paper reads: groups with equal rewards are pulled to pi_lag.
    "oapl, all groups": ({"beta2": 0.2}, {"beta2": 0.05}),
    # beta2 as for oapl; per root of the length, a root of the length more.
    "oapl_length": ({"beta2": 0.6}, {"beta2": 0.15}),
    "a_star_po": ({"a_star_po.beta2": 0.2}, {"a_star_po.beta2": 0.05}),
    "tba": ({"tba.beta": 0.2}, {"tba.beta": 0.05}),
    "opmd_kimi": ({"opmd_kimi.tau": 0.2}, {"opmd_kimi.tau": 0.05}),
    # tau only scales the loss, which Adam undoes.
    "opmd_trinity": ({},),
    # Below zero, as arXiv 2506.20520 recommends: the default of Trinity-RFT; and three times that.
    "asymre": ({"asymre.delta_v": -0.1}, {"asymre.delta_v": -0.3}),
    # arXiv 2503.20783 (clipped as GRPO); clip-higher.
    "dr_grpo": ({"policy_gradient.clip_high": 0.2}, {"policy_gradient.clip_high": 0.28}),
    # Caps of published recipes, as above.
    "rloo": ({"policy_gradient.correction_cap": 2.0}, {"policy_gradient.correction_cap": 5.0}),
    # arXiv 2602.17616; and a tighter cap.
    "vcpo": ({"policy_gradient.correction_cap": 8.0}, {"policy_gradient.correction_cap": 2.0}),
    # arXiv 2602.02710 (its clip, never active there); clip-higher.
    "maxrl": ({"policy_gradient.clip_high": 0.2}, {"policy_gradient.clip_high": 0.28}),
    # arXiv 2504.05118; and five times as much likelihood.
    "mixed": ({"mixed.likelihood_weight": 0.1}, {"mixed.likelihood_weight": 0.5}),
    "sft": ({},),
}
# Compared first, in color.
CORE = ("oapl", "oapl, all groups", "grpo", "grpo_is", "gspo", "cispo", "vespo", "sft")
# The same range for all; a method with fewer constants gets more rates within it.
RATES = {1: (3e-4, 5e-4, 8e-4, 1.2e-3, 1.9e-3, 3e-3), 2: (3e-4, 1e-3, 3e-3)}
# These learn from groups with equal rewards too.
ALL_GROUPS = ("oapl, all groups", *FROM_EQUAL_REWARDS)


@dataclasses.dataclass(frozen=True)
class Plan:
    """The size of a comparison; values are overrides of the config."""

    config: str  # see Point.config
    core: tuple[str, ...]  # methods that are run in all arms before the others
    rest: tuple[str, ...]  # the other methods; they have the first two replays
    lags: tuple[int, ...]  # of live arms and replays, in the order of execution
    tuned_lags: tuple[int, ...]  # of the trials, rising
    tuning_seeds: tuple[int, ...]  # of the trials
    seeds: tuple[int, ...]  # of the runs that are graded on the test split
    trials: int  # number for each method
    recorder: str  # objective of the recorded live runs
    prompts: int  # size of the offline set
    data: Values  # of all runs
    warmup: Values  # of the warm-up
    common: Values  # of training


COMMON = {
    "num_steps": 256,
    "groups_per_step": 8,
    "rollout.prompts_per_call": 8,
    # Groups with equal rewards weigh nothing and are not replaced, unlike in the default run, so
    # that a step costs every method the same number of rollouts.
    "buffer.zero_variance": "weight",
    "buffer.zero_variance_weight": 0.0,
    # A policy that never answers right is graded like any other.
    "rollout.max_zero_reward_groups": 0,
    "checkpoint.every": 128,
    "checkpoint.keep": 1,
    "evaluation.n": 4,  # of the curves; the last policy: execute.GRADES
    "evaluation.ks": (1,),
}
FULL = Plan(
    config="arithmetic:chain_sum",
    core=CORE,
    rest=tuple(name for name in METHODS if name not in CORE),
    lags=(128, 8, 32, 1),
    tuned_lags=(8, 128),
    tuning_seeds=(100, 101),
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
    tuning_seeds=(0,),  # of the one warm-up
    seeds=(0,),
    trials=1,
    prompts=64,
    data={"data.train_size": 1000, "data.validation_size": 16, "data.test_size": 16},
    warmup={"warmup.num_steps": 150, "warmup.demonstrations": 1000},
    common={**COMMON, "num_steps": 16, "checkpoint.every": 4},
)


AGAINST = [(f"oapl, lag {lag}", f"grpo_is, lag {lag}") for lag in sorted(FULL.lags)]
AGAINST += [("oapl", "grpo_is"), ("oapl", "base"), ("grpo_is", "base")]  # at the paper's scale


@dataclasses.dataclass(frozen=True)
class Arm:
    """`source`: "live", "offline", or the recorder of a replay; `lag`: 0 for offline."""

    source: str
    lag: int

    @property
    def kind(self) -> str:
        return self.source if self.source in ("live", "offline") else "replay"

    @property
    def name(self) -> str:
        names = {"live": f"live, lag {self.lag}", "offline": "offline"}
        return names.get(self.source) or f"replay of {self.source}, lag {self.lag}"


def arms(plan: Plan) -> list[tuple[Arm, tuple[str, ...]]]:
    """Arms and their methods, in the order of execution."""
    sampled = [*(Arm("live", lag) for lag in plan.lags), Arm("offline", 0)]
    replays = [Arm(plan.recorder, lag) for lag in plan.lags]
    of_core = [(arm, plan.core) for arm in (*sampled, *replays)]
    return of_core + [(arm, plan.rest) for arm in (*sampled, *replays[:2]) if plan.rest]


def tuned(plan: Plan, arm: Arm) -> Arm:
    """Returns the live arm whose trials tune this arm: at the next larger tuned lag, or at the
    largest one for longer lags and for the offline arm."""
    larger = [lag for lag in plan.tuned_lags if lag >= arm.lag and arm.source != "offline"]
    return Arm("live", [*larger, plan.tuned_lags[-1]][0])


def warm_up(plan: Plan, seed: int) -> Point:
    values = {"objective": "oapl", "seed": seed, **plan.data, **plan.warmup}
    return point(plan.config, values, kind="warm_up")


def stream(plan: Plan, arm: Arm, seed: int) -> Point | None:
    """The run that records the rollouts of an arm; None for a live arm."""
    if arm.source == "live":
        return None
    shared: Any = dict(seed=seed, split="validation", start=warm_up(plan, seed))
    if arm.source == "offline":
        values = {"objective": "oapl", **plan.data}
        return point(plan.config, values, kind="generate", prompts=plan.prompts, **shared)
    recording = {"lag.steps": arm.lag, "rollout.record": True, "evaluation.every": 0}
    values = {"objective": arm.source, **plan.data, **plan.common, **recording}
    return point(plan.config, values, **shared)


def train(plan: Plan, arm: Arm, method: str, values: Values, seed: int, split: str) -> Point:
    """A trial (`split` "validation") or a compared run ("test").

    Args:
      method: an objective, and after a comma its variant.
      values: overrides: learning rate and constants of the objective.
    """
    num_steps = plan.common["num_steps"]
    overrides = {
        "objective": method.partition(",")[0],
        "seed": seed,
        **plan.data,
        **plan.common,
        **values,
        "lag.steps": arm.lag or num_steps,
        "evaluation.every": max(num_steps // 8, 1) if split == "test" else 0,
    }
    start, recorded = warm_up(plan, seed), stream(plan, arm, seed)
    return point(plan.config, overrides, split=split, start=start, stream=recorded)


def candidates(plan: Plan, method: str) -> list[Values]:
    """Overrides that are tried for a method."""
    constants = METHODS[method]
    always: Values = {"buffer.zero_variance_weight": 1.0} if method in ALL_GROUPS else {}
    tried: list[Values] = [
        {"optim.learning_rate": rate, **{f"objective.{k}": v for k, v in chosen.items()}, **always}
        for chosen, rate in itertools.product(constants, RATES[len(constants)])
    ]
    return tried[: plan.trials]


def trial(plan: Plan, arm: Arm, method: str, values: Values, seed: int) -> Point:
    return train(plan, tuned(plan, arm), method, values, seed, "validation")


def choose(results: Results, plan: Plan, arm: Arm, method: str) -> Values | None:
    """The trial with the best mean pass@1 on the validation split, of equals the first.

    A failed trial counts as 0. None until all trials have ended.
    """
    tried = candidates(plan, method)
    lines = [
        [results.line(trial(plan, arm, method, values, seed)) for seed in plan.tuning_seeds]
        for values in tried
    ]
    if any(line is None for of_one in lines for line in of_one):
        return None
    scores = [sum(score(line, "pass@1") for line in of_one if line) for of_one in lines]
    return tried[scores.index(max(scores))]


def compared(plan: Plan, arm: Arm, method: str, values: Values) -> list[Point]:
    """The runs of a method that are graded on the test split."""
    return [train(plan, arm, method, values, seed, "test") for seed in plan.seeds]


def sweep_plan(add: Add, plan: Plan) -> None:
    """Adds arm by arm the trials, then the runs of the choices. Seeds are the outer loop, so that
    two workers do not compile the same program at the same time."""
    for arm, methods in arms(plan):
        for seed in plan.tuning_seeds:
            for method in methods:
                for values in candidates(plan, method):
                    add(trial(plan, arm, method, values, seed))
        chosen = {method: choose(add.results, plan, arm, method) for method in methods}
        for runs in zip(*(compared(plan, arm, m, v) for m, v in chosen.items() if v), strict=True):
            add(*runs)


def sweep(add: Add) -> None:
    """Rows: the policies of the paper's first figure, of their best trial."""
    if add.form == "paper":
        add(paper.base(), row="base")
        for run in paper.runs({"objective": ("oapl", "grpo_is")}):
            add(run, row=run.objective)
        return
    plan = QUICK if add.form == "quick" else FULL
    sweep_plan(add, plan)
    for lag in sorted(plan.lags):
        for method in ("oapl", "grpo_is"):
            arm = Arm("live", lag)
            if method in METHODS and (chosen := choose(add.results, plan, arm, method)):
                if "base" not in add.rows:
                    add(*(warm_up(plan, seed) for seed in plan.seeds), row="base")
                add(*compared(plan, arm, method, chosen), row=f"{method}, lag {lag}")
