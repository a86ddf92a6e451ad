"""The grid of beta1 and beta2, and the optimal value V^ against the mean of the group as baseline.

Claim: OAPL needs no fine tuning of beta1 and beta2, and V^ is at least as good as the mean.
Command: python -m experiments.launch --experiment=experiments/betas.py --to=local
Hardware: 2 CPU cores, 4 GB of memory. At paper scale a v6e:8x8 slice and a fleet of servers.
Hours: 0.15 of a core.
Expected: beta1 = 1 and beta2 = 1e-3 for maths and code (arXiv 2602.19362); the grid is ours.
Measured: not run to its end; the CPU form has 26 points.

A beta1 of 1e6 is the mean of the rewards. The anchor of an answer of ten tokens has to be stronger
than that of thousands: the CPU form has 0.02, 0.2 and 2 for beta2 where the paper's scale has 1e-4,
1e-3 and 1e-2.
"""

from experiments import paper, small
from experiments.sweep import Add

MEAN = 1e6
BETA1 = (0.5, 1.0, 2.0, MEAN)
MEASURES = ("pass@1", "pass@8", "entropy", "drift")
AGAINST = "beta1 1.0, beta2 0.2"


def sweep(add: Add) -> None:
    if add.form == "paper":
        grid = {"objective.beta1": BETA1, "objective.beta2": (1e-4, 1e-3, 1e-2)}
        add(*paper.runs({"objective": ("oapl",)}, grid))
        return
    beta1, beta2, seeds = BETA1, (0.02, 0.2, 2.0), 2
    if add.form == "quick":
        beta1, beta2, seeds = (1.0, MEAN), (0.2,), 1
    grid = {"objective.beta1": beta1, "objective.beta2": beta2}
    for seed in add.seeds(seeds):
        for values in add.product(grid):
            one, two = values["objective.beta1"], values["objective.beta2"]
            run = small.run(add, {**small.OAPL, **values, **seed})
            add(run, row=f"beta1 {'mean' if one == MEAN else one}, beta2 {two}")
