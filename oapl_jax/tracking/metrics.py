"""Metrics of a run: metrics.jsonl always, TensorBoard if asked; what was not computed is absent."""

import json
import math
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath

from oapl_jax import multihost
from oapl_jax.structs import Group


class MetricsWriter:
    """Appends one JSON object a step, each on one line, flushed at once.

    Args:
      workdir: of the run; the file is workdir/metrics.jsonl, of host 1 metrics.host1.jsonl.
      start_step: a resumed run's; lines of later steps (and a line cut by a kill) are removed,
        since they are computed again: the file holds each step once.
      tensorboard: whether to write event files below workdir/tensorboard too.
    """

    def __init__(self, workdir: epath.Path, *, start_step: int, tensorboard: bool):
        self._path = workdir / multihost.per_host_path("metrics.jsonl")
        kept = [line for line in read_lines(self._path) if line["step"] <= start_step]
        aside = workdir / f"{self._path.name}.new"
        aside.write_text("".join(json.dumps(line) + "\n" for line in kept))
        aside.replace(self._path)
        self._file = self._path.open("a")
        self._events = None
        if tensorboard and not jax.process_index():
            from tensorboardX import SummaryWriter  # brings Google's cloud clients along

            self._events = SummaryWriter(
                os.fspath(workdir / "tensorboard"), purge_step=start_step + 1
            )

    def write(self, step: int, values: Mapping[str, Any]) -> dict[str, Any]:
        """Writes and returns what is finite; the mean of an empty set, say, is left out."""
        tables = {key: value for key, value in values.items() if isinstance(value, dict)}
        numbers = {key: float(values[key]) for key in values.keys() - tables.keys()}
        numbers = {key: numbers[key] for key in sorted(numbers) if math.isfinite(numbers[key])}
        line: dict[str, Any] = {"step": step, **numbers, **tables}
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()
        if self._events:
            for key, value in numbers.items():
                self._events.add_scalar(key, value, step)
        return line

    def close(self) -> None:
        self._file.close()
        if self._events:
            self._events.close()


def read_lines(path: epath.Path) -> list[dict[str, Any]]:
    """The whole lines of a metrics.jsonl; a last one that a kill has cut is left out."""
    if not path.exists():
        return []
    lines = path.read_text().split("\n")
    return [json.loads(line) for line in lines[:-1] if line]


class CompileClock:
    """Sums the seconds that this process spends compiling, and counts the programs."""

    def __init__(self):
        self.seconds, self.programs = 0.0, 0
        jax.monitoring.register_event_duration_secs_listener(self._listen)

    def _listen(self, event: str, duration_secs: float, **_: Any) -> None:
        if event.endswith("backend_compile_duration"):
            self.seconds += duration_secs
            self.programs += 1


def group_metrics(groups: Sequence[Group], step: int) -> dict[str, Any]:
    """What a gradient step trains on: rewards, lengths, and the measured lag.

    Args:
      groups: of the step.
      step: the learner's, before the update.
    """
    rollouts = [r for g in groups for r in g.rollouts]
    lags = Counter(step - r.policy_version for r in rollouts)
    return {
        "reward": np.mean([g.reward for g in groups]),
        "zero_variance": np.mean([g.zero_variance for g in groups]),
        "length": np.mean([len(r.tokens) for r in rollouts]),
        "truncated": np.mean([r.finish_reason == "length" for r in rollouts]),
        "lag/mean": sum(lag * count for lag, count in lags.items()) / len(rollouts),
        "lag/max": max(lags),
        "lag/histogram": {str(lag): lags[lag] for lag in sorted(lags)},
        "versions": len({g.policy_version for g in groups}),
    }
