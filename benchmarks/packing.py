"""How full are rows? Packing of recorded lengths into the micro-batches of a step.

    python benchmarks/packing.py [--lengths=benchmarks/lengths_smollm2.json]
    python benchmarks/packing.py --record=DIRECTORY --lengths=FILE

The file holds {"prompt": [...], "response": [...]}: tokens of rollouts, in the order in which they
were sampled; `--record` writes it from a recorded set (docs/rollouts.md). The file that is there
has 8 answers of SmolLM2-135M-Instruct to each of 32 word problems (oapl_jax.data.samples
--rows=64), made by oapl_jax.record with configs/smollm2.py at a temperature of 1 and at
most 640 tokens.

Rows are as long as the longest sequence. For each number of sequences in a step, and of rows in a
micro-batch (one a chip, say): the share of the places computed that hold a token, over all steps
and in the worst one.
"""

import argparse
import json
import pathlib

import numpy as np
from etils import epath
from results import keep, show

from oapl_jax.learner.packing import fill
from oapl_jax.rollout.dataset import Dataset

FILE = pathlib.Path(__file__).parent / "lengths_smollm2.json"
STEPS, ROWS = (64, 256), (1, 4, 16)


def record(directory: str) -> dict[str, list[int]]:
    groups = list(Dataset(epath.Path(directory).resolve()))
    return {
        "prompt": [len(group.prompt.tokens) for group in groups for _ in group.rollouts],
        "response": [len(rollout.tokens) for group in groups for rollout in group.rollouts],
    }


def shares(lengths: np.ndarray, sequences: int, rows: int) -> list[float]:
    """Of each whole step: tokens over the places of the micro-batches that are filled."""
    found = []
    for start in range(0, len(lengths) - sequences + 1, sequences):
        step = lengths[start : start + sequences]
        filled = fill(step.tolist(), row_length=int(lengths.max()), rows=rows)
        found.append(float(step.sum()) / (len(filled) * rows * int(lengths.max())))
    return found


def table(lengths: np.ndarray) -> list[dict[str, float]]:
    lines = []
    for sequences in STEPS:
        for rows in ROWS:
            found = shares(lengths, sequences, rows)
            lines.append(
                {
                    "sequences a step": sequences,
                    "rows a micro-batch": rows,
                    "full": round(float(np.mean(found)), 3),
                    "in the worst step": round(min(found), 3),
                }
            )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lengths", type=pathlib.Path, default=FILE)
    parser.add_argument("--record", help="directory of a recorded set, to be written there first")
    given = parser.parse_args()
    if given.record:
        given.lengths.write_text(json.dumps(record(given.record)) + "\n")
    kept = json.loads(given.lengths.read_text())
    responses = np.array(kept["response"])
    lengths = responses + np.array(kept["prompt"])
    at = (50, 90, 99, 100)
    said = ", ".join(f"{q} %: {np.percentile(responses, q):.0f}" for q in at)
    print(f"{len(lengths)} sequences; tokens of a response at {said}\n")
    lines = table(lengths)
    show(lines)
    keep(lines)


if __name__ == "__main__":
    main()
