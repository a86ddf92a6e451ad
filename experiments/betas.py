"""The grid of beta1 and beta2, and the optimal value V^ against the mean of the group as baseline.

Claim: OAPL needs no fine tuning of beta1 and beta2, and V^ is at least as good as the mean.
Command: python -m experiments.launch --experiment=experiments/betas.py --to=local
Hardware: 2 CPU cores, 4 GB of memory.
Scale: `--to=queued` or `--to=xpk`: 12 points, v5e:8x8, a fleet of 202,423 generated tokens/s: at
    least 70.2 h, $5,392; the price's source is in experiments/paper.py.
Hours: 0.1 of a core.
Expected: beta1 = 1 and beta2 = 1e-3 for maths and code (arXiv 2602.19362); the grid is ours.
Measured: one seed (commit 0f31955, 2026-11-30): beta2 decides, and 0.2 is best for every beta1,
    with pass@1 .819 to .864; 2.0 has .435 to .475, and 0.02 has .079 to .798, rising with beta1. V^
    at beta1 1 is below the mean by .285, .045 and .020 at beta2 0.02, 0.2 and 2;
    docs/experiments/betas.md

A beta1 of 1e6 is the mean of the rewards. The anchor of an answer of ten tokens has to be stronger
than that of thousands: the CPU form has 0.02, 0.2 and 2 for beta2 where the paper's scale has 1e-4,
1e-3 and 1e-2.
"""

from experiments import paper, small
from experiments.sweep import Add

MEAN = 1e6
BETA1 = (0.5, 1.0, 2.0, MEAN)
BETA2 = {"paper": (1e-4, 1e-3, 1e-2), "cpu": (0.02, 0.2, 2.0), "quick": (0.2,)}
MEASURES = ("pass@1", "pass@8", "entropy", "drift")


def name(beta1: float, beta2: float) -> str:
    return f"beta1 {'mean' if beta1 == MEAN else beta1}, beta2 {beta2}"


# V^ against the mean, and the whole grid against the middle of it.
AGAINST = [(name(1.0, beta2), name(MEAN, beta2)) for of in BETA2.values() for beta2 in of]
AGAINST = list(dict.fromkeys(AGAINST)) + [
    (name(beta1, beta2), name(1.0, BETA2[form][1]))
    for form in ("paper", "cpu")
    for beta1 in BETA1
    for beta2 in BETA2[form]
    if (beta1, beta2) != (1.0, BETA2[form][1])
]


def sweep(add: Add) -> None:
    quick = add.form == "quick"
    beta1 = (1.0, MEAN) if quick else BETA1
    grid = {"objective.beta1": beta1, "objective.beta2": BETA2[add.form]}
    for values in add.product(grid):
        row = name(values["objective.beta1"], values["objective.beta2"])
        settings = {**small.OAPL, **values}
        if add.form == "paper":
            add(*paper.runs([settings]), row=row)
        else:
            add(small.run(add, {**settings, "seed": 0}), row=row)
