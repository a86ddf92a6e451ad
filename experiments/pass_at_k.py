"""pass@k for k of 1 to 256: base model, GRPO with importance sampling, OAPL.

Claim: OAPL's gain over GRPO + IS grows with k.
Command: python -m experiments.launch --experiment=experiments/pass_at_k.py --to=local
Hardware: 2 CPU cores, 4 GB of memory.
Scale: `--to=queued` or `--to=xpk`: 3 points, v5e:8x8, a fleet of 202,423 generated tokens/s: at
    least 11.7 h, $899; the price's source is in experiments/paper.py.
Hours: 0.05 of a core, beside the runs of steps.py.
Expected: the gap grows with k, up to 256 (arXiv 2602.19362).
Measured: OAPL minus GRPO + IS, seed by seed, is .11 at k = 1, .15 at 4, .11 at 16, .07 at 64 and
    .03 at 256, where the base model is at 1; all intervals include 0: no growth with k (commit
    03d5d01, 2026-11-30); docs/experiments/pass_at_k.md

The policies are those of experiments/steps.py: its workdirs are used, and nothing trains again.
"""

import dataclasses

from experiments import paper, small, steps
from experiments.sweep import Add

MEASURES = ("pass@1", "pass@4", "pass@16", "pass@64", "pass@256")
KS = (1, 4, 16, 64, 256)
SAMPLES = 256
AGAINST = steps.AGAINST
CURVES = ()


def sweep(add: Add) -> None:
    if add.form == "paper":
        trained = paper.runs({"objective": ("oapl", "grpo_is")}, samples=SAMPLES)
        add(paper.base(SAMPLES), row="base")
        for run in trained:
            add(run, row=run.objective)
        return
    quick = add.form == "quick"
    for seed in add.seeds(1 if quick else 3):
        runs = {"base": small.base(add, seed["seed"]), **steps.trained(add, seed)}
        for name, run in runs.items():
            add(dataclasses.replace(run, samples=16 if quick else SAMPLES), row=name)
