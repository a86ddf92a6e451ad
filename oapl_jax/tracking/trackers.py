"""Trackers: metrics.jsonl always, TensorBoard and Weights & Biases as `tracking` says."""

import importlib.util
import os
import time
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import jax
from etils import epath

from oapl_jax import multihost
from oapl_jax.config import TrackingConfig
from oapl_jax.errors import UserError
from oapl_jax.files import JsonLines, naming, write_atomically

WANDB_DEADLINE = 60.0  # seconds to open or to finish a run of Weights & Biases
FILE = "metrics.jsonl"


class Tracker(Protocol):
    """A place that gets the metrics of each step; may raise, which ends no run."""

    def write(self, step: int, line: Mapping[str, Any]) -> None:
        """Writes finite numbers, and tables (name -> number), of a step."""
        ...

    def close(self) -> None: ...


class JsonLinesTracker:
    """Appends one JSON object a step to workdir/metrics.jsonl, on host 1 to metrics.host1.jsonl.

    Lines after the `start_step` of a resumed run are removed, since those steps are computed again:
    the file holds each step once.
    """

    def __init__(self, workdir: epath.Path, *, start_step: int):
        path = workdir / multihost.per_host_path(FILE)
        self._lines, kept = JsonLines(path, exclusive=False), 0
        with path.open("rb") as file:
            for text, line in zip(file, self._lines, strict=False):
                if line["step"] > start_step:
                    break
                kept += len(text)
        self._lines.truncate(kept)

    def write(self, step: int, line: Mapping[str, Any]) -> None:
        self._lines.append({"step": step, **line})

    def close(self) -> None:
        self._lines.close()


class TensorBoard:
    """Event file of TensorBoard, written at once: SummaryWriter's thread dies of a full disk, after
    which its caller waits forever. A viewer drops the steps from `purge_step` on, which a resumed
    run computes again."""

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

    def write(self, step: int, line: Mapping[str, Any]) -> None:
        for key, value in numbers(line).items():
            self._append(step=step, summary=self._scalar(key, value))
        with naming(self._directory):
            self._file.flush()

    def close(self) -> None:
        with naming(self._directory):
            self._file.close()

    def _append(self, **fields: Any) -> None:
        with naming(self._directory):
            self._file.write_event(self._event(wall_time=time.time(), **fields))


class WeightsAndBiases:
    """A run of Weights & Biases, with its id in the workdir: a resumed run continues it.

    Neither the terminal's output nor the repository's address is sent.
    """

    def __init__(self, workdir: epath.Path, *, mode: Any, project: str, config: Mapping[str, Any]):
        import wandb  # an extra

        path = workdir / "wandb" / "run_id"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, [os.urandom(4).hex().encode()])
        self._run = wandb.init(
            id=path.read_text(),
            resume="allow",
            mode=mode,
            project=project,
            name=workdir.name,
            dir=os.fspath(workdir),
            config=dict(config),
            settings=wandb.Settings(
                console="off",
                disable_git=True,
                save_code=False,
                silent=True,
                init_timeout=WANDB_DEADLINE,
                finish_timeout=WANDB_DEADLINE,
            ),
        )

    def write(self, step: int, line: Mapping[str, Any]) -> None:
        self._run.log(numbers(line), step=step)

    def close(self) -> None:
        self._run.finish()


def numbers(line: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a line, without its tables."""
    return {key: value for key, value in line.items() if not isinstance(value, Mapping)}


def check_trackers(section: TrackingConfig) -> None:
    """Raises a UserError if a tracker needs a package that is not installed."""
    if section.wandb != "off" and importlib.util.find_spec("wandb") is None:
        raise UserError(
            f"tracking.wandb={section.wandb} needs the package wandb; install it with pip install "
            "--editable '.[wandb]', or set tracking.wandb=off"
        )


def trackers(
    section: TrackingConfig, workdir: epath.Path, *, start_step: int, config: Mapping[str, Any]
) -> dict[str, Callable[[], Tracker]]:
    """Name -> constructor of each tracker of this host; host 0 alone has others than a file.

    Args:
      section: `tracking` of the configuration.
      workdir: of the run.
      start_step: step at which the run starts or resumes.
      config: the run's configuration, which Weights & Biases shows.
    """
    chosen: dict[str, Callable[[], Tracker]] = {
        FILE: lambda: JsonLinesTracker(workdir, start_step=start_step)
    }
    if jax.process_index():
        return chosen
    if section.tensorboard:
        directory = workdir / "tensorboard"
        chosen["TensorBoard"] = lambda: TensorBoard(directory, purge_step=start_step + 1)
    if section.wandb != "off":
        chosen["Weights & Biases"] = lambda: WeightsAndBiases(
            workdir, mode=section.wandb, project=section.project, config=config
        )
    return chosen
