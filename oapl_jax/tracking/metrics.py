"""Metrics of a run: metrics.jsonl, and TensorBoard if enabled; drops non-finite values."""

import math
import os
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath

from oapl_jax import multihost
from oapl_jax.files import JsonLines, naming, read_json_lines
from oapl_jax.structs import Group


class MetricsWriter:
    """Appends one JSON object a step to workdir/metrics.jsonl, on host 1 to metrics.host1.jsonl.

    Lines after the `start_step` of a resumed run are removed, since those steps are computed again:
    the file holds each step once. With `tensorboard`, workdir/tensorboard gets event files.
    """

    def __init__(self, workdir: epath.Path, *, start_step: int, tensorboard: bool):
        path = workdir / multihost.per_host_path("metrics.jsonl")
        self._lines, kept = JsonLines(path, exclusive=False), 0
        with path.open("rb") as file:
            for text, line in zip(file, self._lines, strict=False):
                if line["step"] > start_step:
                    break
                kept += len(text)
        self._lines.truncate(kept)
        self._events = None
        if tensorboard and not jax.process_index():
            self._events = _Events(workdir / "tensorboard", purge_step=start_step + 1)

    def write(self, step: int, values: Mapping[str, Any]) -> dict[str, Any]:
        """Writes and returns the finite values; drops others, such as the mean of an empty set."""
        tables = {key: value for key, value in values.items() if isinstance(value, dict)}
        numbers = {key: float(values[key]) for key in values.keys() - tables.keys()}
        numbers = {key: numbers[key] for key in sorted(numbers) if math.isfinite(numbers[key])}
        line: dict[str, Any] = {"step": step, **numbers, **tables}
        self._lines.append(line)
        if self._events:
            self._events.write(step, numbers)
        return line

    def close(self) -> None:
        self._lines.close()
        if self._events:
            self._events.close()


class _Events:
    """Event file of TensorBoard, written at once: SummaryWriter's thread dies of a full disk, after
    which its caller waits forever."""

    def __init__(self, directory: epath.Path, *, purge_step: int):
        # Here, since it imports Google's cloud clients.
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto import event_pb2
        from tensorboardX.summary import scalar

        self._directory, self._event, self._scalar = directory, event_pb2.Event, scalar  # pyright: ignore[reportAttributeAccessIssue]
        directory.mkdir(parents=True, exist_ok=True)
        self._file = EventsWriter(os.fspath(directory / "events"))
        start = event_pb2.SessionLog(status="START")  # pyright: ignore[reportAttributeAccessIssue]
        self._append(step=purge_step, session_log=start)

    def write(self, step: int, numbers: Mapping[str, float]) -> None:
        for key, value in numbers.items():
            self._append(step=step, summary=self._scalar(key, value))
        with naming(self._directory):
            self._file.flush()

    def close(self) -> None:
        with naming(self._directory):
            self._file.close()

    def _append(self, **fields: Any) -> None:
        with naming(self._directory):
            self._file.write_event(self._event(wall_time=time.time(), **fields))


def read_lines(path: epath.Path) -> list[dict[str, Any]]:
    """The complete lines of a metrics.jsonl; none if there is no file."""
    return list(read_json_lines(path)) if path.exists() else []


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
        "right_and_stopped": np.mean(
            [
                reward >= 1 and r.finish_reason == "stop"
                for g in groups
                for reward, r in zip(g.reward, g.rollouts, strict=True)
            ]
        ),
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
        self._seconds: Counter[str] = Counter()
        self._last = time.monotonic()

    def __call__(self, part: str) -> None:
        now = time.monotonic()
        self._seconds[part] += now - self._last
        self._last = now

    def take(self) -> dict[str, float]:
        """The seconds since the last call as metrics "seconds/PART"."""
        taken, self._seconds = self._seconds, Counter()
        return {f"seconds/{part}": seconds for part, seconds in taken.items()}
