"""Row utilization: packs recorded lengths into the micro-batches of a step.

    python benchmarks/packing.py [--lengths=benchmarks/lengths_smollm2.json]
    python benchmarks/packing.py --record=DIRECTORY --lengths=FILE

The lengths file holds {"prompt": [...], "response": [...]}: tokens of rollouts in the order in
which they were sampled; `--record` writes it from a recorded dataset (docs/rollouts.md). The file
in this directory has 8 answers of SmolLM2-135M-Instruct to each of 32 word problems
(oapl_jax.data.samples --rows=64), made by oapl_jax.record in the form of GSM8K at a temperature of
1 and at most 640 tokens.

Rows are as long as the longest sequence. For each number of sequences in a step and of rows in a
micro-batch (such as one a chip), the table has the fraction of computed tokens that are no padding:
the mean over all steps, and the worst step.
"""

import argparse
import json
import pathlib
from typing import Any

import numpy as np
from etils import epath
from results import keep, show

from oapl_jax.learner.packing import fill
from oapl_jax.rollout.dataset import Dataset

FILE = pathlib.Path(__file__).parent / "lengths_smollm2.json"
STEPS, ROWS = (64, 256), (1, 4, 16)


def recorded_lengths(directory: str) -> dict[str, list[int]]:
    groups = list(Dataset(epath.Path(directory).resolve()))
    return {
        "prompt": [len(group.prompt.tokens) for group in groups for _ in group.rollouts],
        "response": [len(rollout.tokens) for group in groups for rollout in group.rollouts],
    }


def utilization(lengths: np.ndarray, sequences: int, rows: int) -> list[float]:
    """Fraction of non-padding tokens in the micro-batches of each full step."""
    row_length = int(lengths.max())
    steps = [lengths[i : i + sequences] for i in range(0, len(lengths), sequences)]
    return [
        float(step.sum())
        / (len(fill(step.tolist(), row_length=row_length, rows=rows)) * rows * row_length)
        for step in steps
        if len(step) == sequences
    ]


def table(lengths: np.ndarray) -> list[dict[str, Any]]:
    lines = []
    for sequences in STEPS:
        for rows in ROWS:
            used = utilization(lengths, sequences, rows)
            lines.append(
                {
                    "sequences a step": sequences,
                    "rows a micro-batch": rows,
                    "utilization": round(float(np.mean(used)), 3),
                    "in the worst step": round(min(used), 3),
                }
            )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lengths", type=pathlib.Path, default=FILE)
    parser.add_argument("--record", help="recorded dataset, from which the file is written first")
    arguments = parser.parse_args()
    if arguments.record:
        arguments.lengths.write_text(json.dumps(recorded_lengths(arguments.record)) + "\n")
    saved = json.loads(arguments.lengths.read_text())
    responses = np.array(saved["response"])
    lengths = responses + np.array(saved["prompt"])
    quantiles = ", ".join(f"{q} %: {np.percentile(responses, q):.0f}" for q in (50, 90, 99, 100))
    print(f"{len(lengths)} sequences; tokens of a response at {quantiles}\n")
    lines = table(lengths)
    show(lines)
    keep(lines)


if __name__ == "__main__":
    main()
