"""pass@k against training step, of the runs of the first figure.

Claim: OAPL's pass@k rises with the steps for every k, above that of GRPO with importance sampling.
Command: python -m experiments.launch --experiment=experiments/steps.py --to=local
Hardware: 2 CPU cores, 4 GB of memory.
Scale: `--to=queued` or `--to=xpk`: 2 points, v5e:8x8, a fleet of 202,423 generated tokens/s: at
    least 11.7 h, $899; the price's source is in experiments/paper.py.
Hours: 0.1 of a core.
Expected: OAPL above GRPO + IS at the same step on all four contests (arXiv 2602.19362).
Measured: at step 256 pass@1 is .771 for OAPL and .659 for GRPO + IS, of three seeds; the difference
    of a seed is .112 [-.489, .712] (commit 03d5d01, 2026-11-30); docs/experiments/steps.md

At paper scale these are the runs of experiments/objectives.py, whose checkpoints are graded every
100 steps, and the baseline has weights of tokens. The CPU form validates every 32 steps with 16
responses to a problem. Its baseline has weights of whole sequences, which the trials of the
comparison chose at lag 128.
"""

from experiments import paper, small
from experiments.sweep import Add, Point, Values

CURVES = ("pass@1", "pass@4", "pass@16", "pass@5", "pass@10")  # those that are measured
AGAINST = (("oapl", "grpo_is"), ("oapl", "grpo_is, sequences"))


def sweep(add: Add) -> None:
    if add.form == "paper":
        add(*paper.runs({"objective": ("oapl", "grpo_is")}, at_steps=paper.STEPS))
        return
    for seed in add.seeds(1 if add.form == "quick" else 3):
        for name, run in trained(add, seed).items():
            add(run, row=name)


def trained(add: Add, seed: Values) -> dict[str, Point]:
    """The runs of a seed, validated at eight steps."""
    quick = add.form == "quick"
    validated = {
        "evaluation.every": 8 if quick else 32,
        "evaluation.n": 4 if quick else 16,
        "evaluation.ks": (1, 4) if quick else (1, 4, 16),
    }
    methods = {"oapl": small.OAPL, "grpo_is, sequences": small.IS_SEQUENCES}
    return {
        name: small.run(add, {**values, **validated, **seed}) for name, values in methods.items()
    }
