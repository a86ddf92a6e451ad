"""Kept groups: an even share of the sampled groups, for people to look at, with notes.

`WORKDIR/rollouts` is a recorded dataset (dataset.py). `notes.jsonl` in it has two lines about a
group, which `stream_index` names; the last line of a kind counts:

    grades       when it is rewarded: [final answer, verdict, reason] of each response
    step         when a gradient step uses it: the learner's step before the update, and
    reward       of each response
    log_ratio    of each response to the objective's anchor, nats
    target       of the log-ratio, A / beta2 for OAPL; absent where the objective has none
    gap          of each token: the learner's log-prob less the sampler's, float16, the responses
                 end to end, in base64
"""

import base64
import math
import threading
from collections import defaultdict
from collections.abc import Container, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from oapl_jax.files import JsonLines, read_json_lines
from oapl_jax.rewards.grader import Grade
from oapl_jax.structs import Group, Prompt

NOTES = "notes.jsonl"
CHARACTERS = 2000  # of a final answer or a reason


def keeps(stream_index: int, share: float, *, hosts: int) -> bool:
    """True for an even `share` of the prompts of host 0, the first one included."""
    position, host = divmod(stream_index, hosts)
    live = host == 0 and stream_index >= 0  # recorded groups have negative indices
    return live and math.ceil((position + 1) * share) > math.ceil(position * share)


class KeptNotes:
    """Appends the notes; thread-safe.

    Args:
      directory: of the dataset.
      share, hosts: see `keeps`.
    """

    def __init__(self, directory: epath.Path, *, share: float, hosts: int):
        self._lines, self._lock = JsonLines(directory / NOTES, exclusive=False), threading.Lock()
        self._share, self._hosts = share, hosts

    def keeps(self, prompt: Prompt) -> bool:
        return keeps(prompt.stream_index, self._share, hosts=self._hosts)

    def graded(self, prompt: Prompt, grades: Sequence[Grade]) -> None:
        """Notes final answers and verdicts of a group that is kept."""
        texts = [[text[:CHARACTERS] for text in grade[1:]] for grade in grades]
        self._append(prompt, grades=texts)

    def trained(
        self, groups: Sequence[Group], step: int, responses: Mapping[str, np.ndarray]
    ) -> None:
        """Notes what a gradient step computed of its groups that are kept.

        Args:
          groups: of the step.
          responses: of all their responses in order, as `train_step.make_train_step` gives them
            with `return_logp`.
        """
        start = 0
        for group in groups:
            rows, start = range(start, start + len(group.rollouts)), start + len(group.rollouts)
            if not self.keeps(group.prompt):
                continue
            of_group = slice(rows.start, rows.stop)
            values = {
                name: [round(float(x), 4) for x in responses[name][of_group]]
                for name in ("log_ratio", "target")
                if name in responses and np.all(np.isfinite(responses[name][of_group]))
            }
            gaps = [
                responses["logp"][row, : len(rollout.tokens)] - rollout.behavior_logp
                for row, rollout in zip(rows, group.rollouts, strict=True)
            ]
            gap = np.concatenate(gaps).astype(np.float16).tobytes()
            values |= {"reward": np.asarray(group.reward, np.float64).tolist()}
            self._append(group.prompt, step=step, **values, gap=base64.b64encode(gap).decode())

    def sync(self) -> None:
        """Brings the notes to the disk or bucket, for a checkpoint."""
        with self._lock:
            self._lines.sync()

    def close(self) -> None:
        self._lines.close()

    def _append(self, prompt: Prompt, **values: Any) -> None:
        with self._lock:
            self._lines.append({"stream_index": prompt.stream_index, **values})


def read_notes(directory: epath.Path, wanted: Container[int]) -> dict[int, dict[str, Any]]:
    """Stream index -> the notes of a group, as read, for those `wanted` that have any."""
    notes: dict[int, dict[str, Any]] = defaultdict(dict)
    for line in _lines(directory):
        if line["stream_index"] in wanted:
            notes[line["stream_index"]] |= line
    return dict(notes)


def fitted_points(directory: epath.Path) -> np.ndarray:
    """float[n, 3] of all noted responses: log-ratio, its target, and 1 for a reward above 0."""
    columns = ("log_ratio", "target", "reward")
    newest = {
        line["stream_index"]: np.array([line[name] for name in columns]).T
        for line in _lines(directory)
        if "target" in line
    }
    points = np.concatenate([np.empty((0, 3)), *newest.values()])
    return np.column_stack([points[:, :2], points[:, 2] > 0])


def token_gaps(note: Mapping[str, Any]) -> np.ndarray | None:
    """float32[sum of lengths], the log-prob gaps of a group; None before it is trained on."""
    if "gap" not in note:
        return None
    return np.frombuffer(base64.b64decode(note["gap"]), np.float16).astype(np.float32)


def _lines(directory: epath.Path) -> Iterator[dict[str, Any]]:
    path = directory / NOTES
    return read_json_lines(path) if path.exists() else iter(())
