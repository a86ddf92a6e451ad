"""Trackers: metrics.jsonl always, TensorBoard and Weights & Biases as `tracking` says."""

import importlib.util
import os
import platform
import shutil
import struct
import tempfile
import time
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import jax
from etils import epath

from oapl_jax import multihost
from oapl_jax.config import TrackingConfig
from oapl_jax.errors import UserError
from oapl_jax.files import (
    GrowingFile,
    JsonLines,
    Segments,
    is_local,
    read_log,
    whole_lines,
    write_atomically,
)
from oapl_jax.tracking.progress import log

WANDB_DEADLINE = 60.0  # seconds to open or to finish a run of Weights & Biases
FILE = "metrics.jsonl"


class Tracker(Protocol):
    """A place that gets the metrics of each step; may raise, which ends no run."""

    def write(self, step: int, line: Mapping[str, Any]) -> None:
        """Writes finite numbers, and tables (name -> number), of a step."""
        ...

    def sync(self) -> None:
        """Brings everything written to its place, before a checkpoint that knows of it."""
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
        for text, line in zip(whole_lines(read_log(path)), self._lines, strict=True):
            if line["step"] > start_step:
                break
            kept += len(text)
        self._lines.truncate(kept)

    def write(self, step: int, line: Mapping[str, Any]) -> None:
        self._lines.append({"step": step, **line})

    def sync(self) -> None:
        self._lines.sync()

    def close(self) -> None:
        self._lines.close()


class TensorBoard:
    """Event file of TensorBoard, in a bucket numbered files that TensorBoard reads one after the
    other. It is written at once: SummaryWriter's thread dies of a full disk, after which its caller
    waits forever. A viewer drops the steps from `purge_step` on, which a resumed run computes
    again."""

    def __init__(self, directory: epath.Path, *, purge_step: int):
        # Here, since it imports Google's cloud clients.
        from tensorboardX.proto import event_pb2
        from tensorboardX.record_writer import masked_crc32c
        from tensorboardX.summary import scalar

        self._event, self._scalar, self._checksum = event_pb2.Event, scalar, masked_crc32c  # pyright: ignore[reportAttributeAccessIssue]
        directory.mkdir(parents=True, exist_ok=True)
        name = f"events.out.tfevents.{time.time_ns() // 1000}.{platform.node()}"
        if is_local(directory):
            self._log: GrowingFile | Segments = GrowingFile(directory / name)
        else:
            self._log = Segments(directory, prefix=f"{name}.")
        self._append(file_version="brain.Event:2")
        start = event_pb2.SessionLog(status="START")  # pyright: ignore[reportAttributeAccessIssue]
        self._append(step=purge_step, session_log=start)

    def write(self, step: int, line: Mapping[str, Any]) -> None:
        for key, value in numbers(line).items():
            self._append(step=step, summary=self._scalar(key, value))

    def sync(self) -> None:
        self._log.sync()

    def close(self) -> None:
        self._log.close()

    def _append(self, **fields: Any) -> None:
        """Writes an event as a record of TFRecord: length, its checksum, event, its checksum."""
        event = self._event(wall_time=time.time(), **fields).SerializeToString()
        length = struct.pack("<Q", len(event))
        sums = [struct.pack("<I", self._checksum(part)) for part in (length, event)]
        self._log.append(length + sums[0] + event + sums[1])


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
        directory = os.fspath(workdir) if is_local(workdir) else tempfile.mkdtemp(prefix="wandb-")
        self._scratch = "" if is_local(workdir) or mode == "offline" else directory
        if mode == "offline" and not is_local(workdir):
            log(f"Weights & Biases: the files for wandb sync are in {directory}")
        self._run = wandb.init(
            id=path.read_text(),
            resume="allow",
            mode=mode,
            project=project,
            name=workdir.name,
            dir=directory,
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

    def sync(self) -> None:
        pass  # its own process uploads

    def close(self) -> None:
        self._run.finish()
        if self._scratch:
            shutil.rmtree(self._scratch, ignore_errors=True)


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
