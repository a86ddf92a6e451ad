"""Metrics of a run: written to all trackers, without values that are not finite."""

import json
import math
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import jax
import numpy as np
from etils import epath

from oapl_jax.errors import one_line
from oapl_jax.files import read_json_lines, read_log, whole_lines
from oapl_jax.structs import Group
from oapl_jax.tracking.progress import log
from oapl_jax.tracking.trackers import FILE, Tracker

X = TypeVar("X")


class MetricsWriter:
    """Writes the metrics of each step to all trackers.

    An error of a tracker ends no run: it is counted as `tracking/failed`, and a line names the
    first one of each tracker. A tracker that does not open gets nothing; others are tried again at
    each step. Only metrics.jsonl must open, since a run resumes from it.

    Args:
      trackers: name -> constructor, as of `trackers.trackers`.
    """

    def __init__(self, trackers: Mapping[str, Callable[[], Tracker]]):
        self.failed: Counter[str] = Counter()  # writes, by the tracker's name
        self._trackers: dict[str, Tracker | None] = {}
        for name, make in trackers.items():
            self._trackers[name] = make() if name == FILE else self._guarded(name, make)

    def write(self, step: int, values: Mapping[str, Any]) -> dict[str, Any]:
        """Writes and returns the finite values; drops others, such as the mean of an empty set."""
        tables = {key: value for key, value in values.items() if isinstance(value, dict)}
        numbers = {key: float(values[key]) for key in values.keys() - tables.keys()}
        if failed := self.failed.total():
            numbers["tracking/failed"] = float(failed)
        numbers = {key: numbers[key] for key in sorted(numbers) if math.isfinite(numbers[key])}
        line = {**numbers, **tables}
        for name, tracker in self._trackers.items():
            if tracker is None:
                self.failed[name] += 1
            else:
                self._guarded(name, lambda tracker=tracker: tracker.write(step, line))
        return {"step": step, **line}

    def sync(self) -> None:
        """Brings everything written to the disk or bucket, for a checkpoint.

        Raises a RunError or an OSError for metrics.jsonl alone.
        """
        for name, tracker in self._trackers.items():
            if tracker is not None:
                tracker.sync() if name == FILE else self._guarded(name, tracker.sync)

    def close(self) -> None:
        for name, tracker in self._trackers.items():
            if tracker is not None:
                self._guarded(name, tracker.close)
        for name, count in self.failed.items():
            log(f"{name}: {count} writes failed")

    def _guarded(self, name: str, call: Callable[[], X]) -> X | None:
        """Calls a tracker, and counts an error; the first one is logged."""
        try:
            return call()
        except Exception as error:
            if not self.failed[name]:
                log(f"{name} failed, and the run goes on without it: {one_line(error)}")
            self.failed[name] += 1
            return None


def read_lines(path: epath.Path) -> list[dict[str, Any]]:
    """The complete lines of a metrics.jsonl; none if there is no file."""
    return list(read_json_lines(path)) if path.exists() else []


def read_last_lines(path: epath.Path, size: int = 1 << 20) -> list[dict[str, Any]]:
    """The complete lines within about the last `size` bytes of a metrics.jsonl; none without it."""
    parts = read_log(path, last=size) if path.exists() else ()
    return [json.loads(line) for line in whole_lines(parts)]


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
    """Metrics of a gradient step's groups: rewards, lengths, and the lag behind `step`, the
    learner's before the update."""
    rollouts = [r for g in groups for r in g.rollouts]
    lags = Counter(step - r.policy_version for r in rollouts)
    return {
        "reward": np.mean([g.reward for g in groups]),
        "zero_variance": np.mean([g.zero_variance for g in groups]),
        "length": np.mean([len(r.tokens) for r in rollouts]),
        "truncated": np.mean([r.finish_reason == "length" for r in rollouts]),
        "right_and_stopped": sum(g.right_and_stopped for g in groups) / len(rollouts),
        "lag/mean": sum(lag * count for lag, count in lags.items()) / len(rollouts),
        "lag/max": max(lags),
        "lag/histogram": {str(lag): lags[lag] for lag in sorted(lags)},
        "versions": len({g.policy_version for g in groups}),
    }


def residuals_by_lag(groups: Sequence[Group], step: int, residual: np.ndarray) -> dict[str, Any]:
    """Mean and root mean square of float[S] residuals, by the lag of their responses."""
    lags = np.array([step - r.policy_version for g in groups for r in g.rollouts])
    of = {str(lag): residual[lags == lag].astype(np.float64) for lag in np.unique(lags)}
    of = {lag: values for lag, values in of.items() if np.all(np.isfinite(values))}
    return {
        "residual/by_lag": {lag: float(np.mean(values)) for lag, values in of.items()},
        "residual/rms_by_lag": {
            lag: float(np.sqrt(np.mean(values**2))) for lag, values in of.items()
        },
    }


class StepClock:
    """Seconds of a step's parts: each call adds the time since the call before to a part."""

    def __init__(self):
        self._seconds = defaultdict[str, float](float)
        self._last = time.monotonic()

    def __call__(self, part: str) -> None:
        now = time.monotonic()
        self._seconds[part] += now - self._last
        self._last = now

    def take(self) -> dict[str, float]:
        """The seconds since the last call as metrics "seconds/PART"."""
        taken, self._seconds = self._seconds, defaultdict(float)
        return {f"seconds/{part}": seconds for part, seconds in taken.items()}
