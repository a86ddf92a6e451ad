"""Ablations that arXiv 2602.19362 lacks, one setting at a time, from the same initial policies.

Claim: none in advance. Denominator of the sampler or of the learner; buffer cleared or kept at a
    sync; groups with equal rewards dropped or kept; group size at equal numbers of responses; and
    AReaL's table of staleness with OAPL in it.
Command: python -m experiments.launch --experiment=experiments/ablations.py --to=local
Hardware: 2 CPU cores, 4 GB of memory. At paper scale a v6e:8x8 slice and a fleet of servers.
Hours: 0.15 of a core.
Expected: no published number of ours. AReaL's table (AIME24): naive PPO 42.0 at lag 0 and 23.3 at
    lag 4; decoupled PPO 42.2 at lag 4, 38.7 at 16.
Measured: not run; the CPU form has 40 points.

The same recorded rollouts under every objective at equal lag, and objectives by lag with five
seeds, are the replays and the live arms of docs/comparison.md.
"""

from typing import Any

from experiments import paper, small
from experiments.sweep import Add, Cells, Values

MEASURES = ("pass@1", "pass@8", "entropy", "drift")
AGAINST = "oapl"
VARIANTS: dict[str, Values] = {
    "oapl": {},
    "denominator of the learner": {"objective.denominator": "learner"},
    "buffer kept at a sync": {"buffer.mode": "keep_with_anchor", "buffer.max_age": 64},
    "equal groups kept": {"buffer.zero_variance": "keep"},
    "equal groups dropped": {"buffer.zero_variance": "drop"},
}
LAGS = (1, 4, 16, 64)  # AReaL's are 0, 1, 2, 4, 8 and 16


def sweep(add: Add) -> None:
    for points in cells(add).values():
        add(*points)


def cells(add: Add) -> Cells:
    if add.form == "paper":
        for values in VARIANTS.values():
            add(*paper.runs([{"objective": "oapl", **values}]))
        sizes = {"group_size": (4, 16), "groups_per_step": (64, 16)}  # 256 responses a step
        add(*paper.runs({"objective": ("oapl",)}, add.zip(sizes)))
        methods = [{"objective": name} for name in ("grpo", "grpo_is", "oapl")]
        window = {"lag.mode": ("window",), "buffer.mode": ("clear_on_sync",)}
        add(*paper.runs(methods, window, {"lag.steps": LAGS}))
        return paper.cells(add)
    quick = add.form == "quick"
    variants: dict[str, Any] = dict(VARIANTS)
    for group, groups in ((4, 16), (16, 4)):
        changes = {"group_size": group, "groups_per_step": groups, "rollout.prompts_per_call": 4}
        variants[f"groups of {group}"] = changes
    for lag in LAGS:
        for name, of in (("naive", {"objective": "grpo"}), ("decoupled", small.IS), ("oapl", {})):
            variants[f"{name}, lag {lag}"] = {**of, "lag.steps": lag}
    if quick:
        variants = {name: VARIANTS[name] for name in list(VARIANTS)[:3]}
    seeds = add.seeds(1 if quick else 2)
    return {
        name: [small.run(add, {**small.OAPL, **values, **seed}) for seed in seeds]
        for name, values in variants.items()
    }
