"""Progress of a run on the terminal, and stop requests by signals."""

import contextlib
import io
import logging
import os
import signal
import sys
import threading
from collections.abc import Mapping
from typing import Any

import tqdm
from etils import epath

SHOWN = {
    "reward": "reward",
    "eval/pass@1": "pass@1",
    "loss": "loss",
    "lag/mean": "lag",
    "entropy": "entropy",
}


class Progress:
    """Progress bar on a terminal; elsewhere a plain line at every twentieth of the steps."""

    def __init__(self, what: str, num_steps: int, start: int):
        self._what, self._num_steps = what, num_steps
        self._every = max(num_steps // 20, 1)
        self._bar = None
        if sys.stderr.isatty():
            self._bar = tqdm.tqdm(total=num_steps, initial=start, desc=what, file=sys.stderr)

    def step(self, step: int, line: Mapping[str, Any]) -> None:
        values = {name: f"{line[key]:.3f}" for key, name in SHOWN.items() if key in line}
        if self._bar is not None:
            self._bar.set_postfix(values, refresh=False)
            self._bar.update(step - self._bar.n)
        elif step % self._every == 0 or step == self._num_steps:
            shown = "  ".join(f"{name} {value}" for name, value in values.items())
            print(f"{self._what} {step}/{self._num_steps}  {shown}", flush=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


def log(text: str) -> None:
    """Prints a line without breaking the bar."""
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


def log_libraries_to(path: epath.PathLike) -> None:
    """Sends log records and warnings of libraries to a file: Orbax's on a full disk are hundreds of
    lines. The terminal keeps those of this package."""
    os.makedirs(os.path.dirname(path), exist_ok=True)
    handler = logging.FileHandler(path, delay=True)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logging.basicConfig(handlers=[handler], force=True)  # some library has added its own
    logging.getLogger("oapl_jax").addHandler(logging.StreamHandler())
    logging.captureWarnings(True)
    logging.raiseExceptions = False  # the log's own disk may be full
    sys.unraisablehook = lambda args: logging.getLogger("unraisable").error(
        "ignored in %r", args.object, exc_info=args.exc_value
    )


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
