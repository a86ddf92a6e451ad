"""Progress of a run on the terminal, and stop requests by signals."""

import contextlib
import io
import logging
import os
import queue
import re
import shlex
import signal
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from logging.handlers import QueueHandler, QueueListener
from typing import Any

import tqdm
from etils import epath

from oapl_jax.files import open_log

# Metric -> its form in a line.
SHOWN = {
    "reward": "reward {:.3f}",
    "eval/pass@1": "pass@1 {:.3f}",
    "lag/mean": "lag {:.1f}",
    "learner/tokens_per_second": "{:,.0f} tokens/s",
}


class Progress:
    """One live line on a terminal; elsewhere a plain line at every twentieth of the steps.

    A line has the step, the latest value of each metric of `shown`, and the time left at the pace
    of this process, without its first step, which compiles.
    """

    def __init__(
        self, what: str, num_steps: int, start: int, shown: Mapping[str, str] | None = None
    ):
        self._what, self._num_steps, self._shown = what, num_steps, shown or SHOWN
        self._every = max(num_steps // 20, 1)
        self._latest: dict[str, str] = {}
        self._first: tuple[int, float] | None = None  # step, and the time when it was done
        self._bar = None
        if sys.stderr.isatty():
            self._bar = tqdm.tqdm(
                total=num_steps,
                initial=start,
                desc=f"{what} {start}/{num_steps}",
                bar_format="{desc} {bar}",  # a bar of the remaining width; cut to one line
                dynamic_ncols=True,
                file=sys.stderr,
            )

    def step(self, step: int, line: Mapping[str, Any]) -> None:
        new = {key: form.format(line[key]) for key, form in self._shown.items() if key in line}
        self._latest |= new
        values = [self._latest[key] for key in self._shown if key in self._latest]
        text = "  ".join([f"{self._what} {step}/{self._num_steps}", *values, *self._left(step)])
        if self._bar is not None:
            self._bar.set_description_str(text, refresh=False)
            self._bar.update(step - self._bar.n)
        elif step % self._every == 0 or step == self._num_steps:
            print(text, flush=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()

    def _left(self, step: int) -> list[str]:
        """The time left, once there is a pace."""
        now = time.monotonic()
        if self._first is None:
            self._first = step, now
        first, started = self._first
        if step == first or step == self._num_steps:
            return []
        seconds = (now - started) / (step - first) * (self._num_steps - step)
        return [f"{tqdm.tqdm.format_interval(seconds)} left"]


def command_again() -> str:
    """The command line of this process, which resumes its run; without `--restore_step`, that
    would go back again."""
    text = shlex.join([os.path.basename(sys.orig_argv[0]), *sys.orig_argv[1:]])
    return re.sub(r" --?restore_step(=| )\S+", "", text)


def log(text: str) -> None:
    """Prints a line without breaking the bar; does nothing if stdout was closed at the start."""
    if sys.stdout:
        tqdm.tqdm.write(text, file=sys.stdout)
        sys.stdout.flush()


class StopRequest:
    """Records SIGTERM, SIGINT and SIGHUP, so that the loop saves and exits.

    A thread acknowledges the first signal at once, even within a compiled step, and ends the
    process at the second one. Under nohup, SIGHUP stays ignored.

    Attributes:
      requested: name of the signal; "" before one.
      waits_for: end of the sentence that acknowledges it, kept up to date by the run.
    """

    def __init__(self):
        self.requested, self.waits_for = "", "the start"
        reader, writer = os.pipe()
        os.set_blocking(writer, False)
        signal.set_wakeup_fd(writer, warn_on_full_buffer=False)  # written within a C call too
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, lambda *_: None)
        threading.Thread(target=self._listen, args=(reader,), daemon=True, name="signals").start()

    def _listen(self, reader: int) -> None:
        while True:
            (number,) = os.read(reader, 1)
            if number not in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
                continue
            name = signal.Signals(number).name
            if self.requested:
                tell(f"second signal ({name}): ended at once")
                os._exit(128 + number)
            self.requested = name
            tell(f"{name}: stops after {self.waits_for}; a second one ends the run at once")


def tell(text: str) -> None:
    """Writes a line to stderr past Python's buffers, which the main thread may hold."""
    with contextlib.suppress(OSError):
        os.write(2, f"\n{text}\n".encode())


class _LogHandler(logging.Handler):
    """Appends records to a log of files.py, opened at the first one.

    A single thread may log to it: while it writes to a bucket, the client's own threads log too.
    """

    def __init__(self, path: epath.Path):
        super().__init__()
        self._path, self._log = path, None

    def emit(self, record: logging.LogRecord) -> None:
        try:
            self._log = self._log or open_log(self._path)
            self._log.append(self.format(record).encode(errors="replace") + b"\n")
        except Exception:
            self.handleError(record)

    def close(self) -> None:
        with contextlib.suppress(Exception):  # the process ends
            if self._log:
                self._log.close()
        super().close()


def queue_library_logs() -> QueueHandler:
    """Queues log records and warnings of libraries: Orbax's on a full disk are hundreds of lines.
    The terminal keeps those of this package."""
    handler = QueueHandler(queue.SimpleQueue())
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logging.basicConfig(handlers=[handler], force=True)  # some library has added its own
    logging.getLogger("oapl_jax").addHandler(logging.StreamHandler())
    logging.captureWarnings(True)
    logging.raiseExceptions = False  # the log's own disk may be full
    sys.unraisablehook = lambda args: logging.getLogger("unraisable").error(
        "ignored in %r", args.object, exc_info=args.exc_value
    )
    return handler


@contextlib.contextmanager
def write_library_logs(queued: QueueHandler, path: epath.PathLike) -> Iterator[None]:
    """Writes what is queued to a log, from a thread, until the end of the body."""
    handler = _LogHandler(epath.Path(path))
    listener = QueueListener(queued.queue, handler)
    listener.start()
    try:
        yield
    finally:
        listener.stop()
        handler.close()


class _Terminal(io.FileIO):
    """A standard stream whose writes succeed after its reader has gone or its disk is full."""

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except OSError:
            with open(os.devnull, "wb") as null:
                os.dup2(null.fileno(), self.fileno())
            return len(data)


def keep_running_without_terminal() -> None:
    """Replaces stdout and stderr, so that a run survives its terminal, pipe or log file."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free: this one
        if number:
            raw = io.BufferedWriter(_Terminal(number, "wb", closefd=False))
            stream = io.TextIOWrapper(raw, line_buffering=True, errors="backslashreplace")
            setattr(sys, name, stream)
