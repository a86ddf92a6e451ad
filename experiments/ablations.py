"""Ablations that arXiv 2602.19362 lacks, one setting at a time, from the same initial policies.

Claim: none in advance. Denominator of the sampler or of the learner; buffer cleared or kept at a
    sync; groups with equal rewards dropped or kept; group size at equal numbers of responses; and
    AReaL's table of staleness with OAPL in it.
Command: python -m experiments.launch --experiment=experiments/ablations.py --to=local
Hardware: 2 CPU cores, 4 GB of memory.
Scale: `--to=queued` or `--to=xpk`: 18 points, v5e:8x8, a fleet of 202,423 generated tokens/s: at
    least 105.3 h, $8,088; the price's source is in experiments/paper.py.
Hours: 0.1 of a core.
Expected: no published number of ours. AReaL's table (AIME24): naive PPO 42.0 at lag 0 and 23.3 at
    lag 4; decoupled PPO 42.2 at lag 4, 38.7 at 16.
Measured: one seed (commit 0f31955, 2026-11-30): pass@1 .819, and the same with the learner's
    denominator; a kept buffer has the same bits, because without overlap nothing is left at a sync;
    equal groups kept .833, dropped .866; groups of 4 .848, of 16 .758;
    docs/experiments/ablations.md

Runs of the comparison are not repeated: the CPU form of AReaL's table is docs/experiments/lag.md
(naive is grpo, decoupled is grpo_is; lags 1, 8 and 128), and the same recorded rollouts under every
objective at equal lag are the replays of docs/comparison.md.
"""

from experiments import paper, small
from experiments.sweep import Add, Values

MEASURES = ("pass@1", "pass@8", "entropy", "drift")
VARIANTS: dict[str, Values] = {
    "oapl": {},
    "denominator of the learner": {"objective.denominator": "learner"},
    "buffer kept at a sync": {"buffer.mode": "keep_with_anchor", "buffer.max_age": 64},
    "equal groups kept": {"buffer.zero_variance": "keep"},
    "equal groups dropped": {"buffer.zero_variance": "drop"},
}
LAGS = (1, 4, 16, 64)  # AReaL's are 0, 1, 2, 4, 8 and 16
OTHERS = [row for row in (*VARIANTS, "groups of 4", "groups of 16") if row != "oapl"]
AGAINST = [(row, "oapl") for row in OTHERS]
AGAINST += [
    (f"{row}, lag {at}", f"decoupled, lag {at}") for at in LAGS for row in ("naive", "oapl")
]


def sweep(add: Add) -> None:
    if add.form == "paper":
        for name, values in (variants(responses=256) | staleness()).items():
            add(*paper.runs([{**small.OAPL, **values}]), row=name)
        return
    rows = variants(responses=64, **{"rollout.prompts_per_call": 4})
    for name in list(rows)[: 3 if add.form == "quick" else None]:
        add(small.run(add, {**small.OAPL, **rows[name], "seed": 0}), row=name)


def variants(*, responses: int, **of_groups: int) -> dict[str, Values]:
    """Overrides by row; `responses` of a step, and overrides for another size of groups."""
    found: dict[str, Values] = dict(VARIANTS)
    for size in (4, 16):
        sizes = {"group_size": size, "groups_per_step": responses // size}
        found[f"groups of {size}"] = {**sizes, **of_groups}
    return found


def staleness() -> dict[str, Values]:
    """AReaL's table: naive and decoupled policy gradients, and OAPL, by lag."""
    window = {"lag.mode": "window", "buffer.mode": "clear_on_sync"}
    methods = {"naive": "grpo", "decoupled": "grpo_is", "oapl": "oapl"}
    return {
        f"{name}, lag {lag}": {"objective": method, **window, "lag.steps": lag}
        for lag in LAGS
        for name, method in methods.items()
    }
