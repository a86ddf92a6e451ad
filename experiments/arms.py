"""The arms of a comparison: where rollouts come from, at which lag, and whose runs these are.

- live, lag L: the run samples its own; a window of L steps, so the lag is 0 to L - 1.
- offline: a set that the warmed-up policy sampled, one group for each of so many prompts, gone
  through twice in an order that follows from the seed. Nothing is ever synced: at step s the lag is
  s. All objectives see the same groups in the same order.
- replay, lag L: the rollouts of a recorded live run of the recorder at lag L, group by group in its
  order; it had the constants of the configuration, not tuned ones. All objectives see the same
  groups at the same steps. For the recorder itself they are its own: with the same constants its
  replay is its live run again. For any other they come from a policy that goes another way, so that
  L is the age of the data and not the distance to who sampled them: at L = 1 they are as fresh as
  can be, and off-policy all the same. This is learning from another's stream.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from experiments.runs import Run, run_of

Values = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Plan:
    """Attributes:
    config: what Run.config is.
    core: methods that have all arms before the others have any.
    rest: the others.
    lags: of the live arms and replays, in the order in which they are run; the first two for the
      replays of the rest.
    tuned_lags: those at which trials are made, rising.
    seeds: of the runs that are graded on the test split.
    trials: values tried for each method.
    recorder: of the replays.
    prompts: of the offline set.
    data: overrides of all runs.
    warmup: more of them, of the warm-up.
    common: more of them, of training.
    """

    config: str
    core: tuple[str, ...]
    rest: tuple[str, ...]
    lags: tuple[int, ...]
    tuned_lags: tuple[int, ...]
    seeds: tuple[int, ...]
    trials: int
    recorder: str
    prompts: int
    data: Values
    warmup: Values
    common: Values


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


def tuned(plan: Plan, arm: Arm) -> Arm:
    """The arm whose trials choose for this one: live, at the next larger tuned lag if there is one,
    else, as for the offline arm, at the largest."""
    larger = [lag for lag in plan.tuned_lags if lag >= arm.lag and arm.source != "offline"]
    return Arm("live", [*larger, plan.tuned_lags[-1]][0])


def arms(plan: Plan) -> list[tuple[Arm, tuple[str, ...]]]:
    """Arms and their methods, in the order in which they are run; the rest has replays at two
    lags."""
    sampled = [*(Arm("live", lag) for lag in plan.lags), Arm("offline", 0)]
    replays = [Arm(plan.recorder, lag) for lag in plan.lags]
    of_core = [(arm, plan.core) for arm in (*sampled, *replays)]
    return of_core + [(arm, plan.rest) for arm in (*sampled, *replays[:2]) if plan.rest]


def warm_up(plan: Plan, seed: int) -> Run:
    overrides = {**plan.data, **plan.warmup}
    return run_of(
        "warm_up", plan.config, objective="oapl", seed=seed, overrides=overrides, split="test"
    )


def stream(plan: Plan, arm: Arm, seed: int) -> Run | None:
    """Where the rollouts of an arm come from, unless each run samples its own."""
    if arm.source == "live":
        return None
    start = warm_up(plan, seed)
    if arm.source == "offline":
        return run_of(
            "generate",
            plan.config,
            objective="oapl",
            seed=seed,
            overrides=plan.data,
            split="validation",
            start=start,
            prompts=plan.prompts,
        )
    recording = {"lag.steps": arm.lag, "rollout.record": True, "evaluation.every": 0}
    return run_of(
        "train",
        plan.config,
        objective=arm.source,
        seed=seed,
        overrides={**plan.data, **plan.common, **recording},
        split="validation",
        start=start,
    )


def a_run(plan: Plan, arm: Arm, method: str, values: Values, seed: int, split: str) -> Run:
    """A trial (`split` "validation") or a run that is compared ("test").

    Args:
      method: an objective, and after a comma what is different about it.
      values: of the optimizer's learning rate and of the objective's constants, by their names in
        the configuration.
    """
    overrides = {
        **plan.data,
        **plan.common,
        **values,
        "lag.steps": arm.lag or plan.common["num_steps"],
        # A trial is graded at its end only.
        "evaluation.every": max(plan.common["num_steps"] // 8, 1) if split == "test" else 0,
    }
    return run_of(
        "train",
        plan.config,
        objective=method.partition(",")[0],
        seed=seed,
        overrides=overrides,
        split=split,
        start=warm_up(plan, seed),
        stream=stream(plan, arm, seed),
    )
