"""A part of the soak test: a process that is started again whenever it ends."""

import pathlib
import re
import time
from collections import Counter
from collections.abc import Callable

from server_processes import Process

STOP_DEADLINE = 300.0  # seconds for a part to save and end; more than the deadline of a save


class Part:
    """A process that is to run all the time.

    Args:
      name: of the part and of its logs, LOGS/NAME.1.log and so on, one a start.
      start: starts the process with this log.
      ends: exit code -> pattern of its last line, for each end that is no fault.
      pause: seconds between an end and the next start.
      ours: whether a traceback in the log is a fault of this package.
      on_end: called after an end of its own.
    """

    def __init__(
        self,
        name: str,
        logs: pathlib.Path,
        start: Callable[[pathlib.Path], Process],
        ends: dict[int, str],
        *,
        pause: float = 1.0,
        ours: bool = True,
        on_end: Callable[[int], None] = lambda code: None,
    ):
        self.name, self.starts = name, 0
        self.process: Process | None = None
        self.ended: Counter[str] = Counter()  # how it ended -> how often
        self.faults: list[str] = []  # ends that should not be
        self._logs, self._start, self.ends = logs, start, ends
        self._ours, self._on_end = ours, on_end
        self._pause, self._next_start = pause, 0.0

    def keep(self) -> None:
        """Starts the process unless it runs, or has just ended."""
        if self.process is not None:
            if self.process.code is None:
                return
            self._note_end()
            self._next_start = time.monotonic() + self._pause
        if time.monotonic() < self._next_start:
            return
        self.starts += 1
        self.process = self._start(self._logs / f"{self.name}.{self.starts}.log")

    def kill(self) -> None:
        """SIGKILL; the next `keep` starts the process again."""
        if self.process is not None:
            self.process.kill()

    def stop(self, number: int) -> None:
        """Ends the process by a signal, and waits for it."""
        if self.process is not None and self.process.code is None:
            self.process.interrupt(number)
            self.process.wait_exit(STOP_DEADLINE)
        self._note_end()

    def _note_end(self) -> None:
        if self.process is None:
            return
        process, code, self.process = self.process, self.process.code, None
        process.kill()  # whatever it has left in its group
        text = process.log.read_text(errors="replace")
        last = ([line for line in text.splitlines() if line.strip()] or [""])[-1]
        if self._ours and "Traceback" in text:
            self.faults.append(f"{process.log.name}: a traceback")
        if code is not None and code < 0:
            self.ended["killed"] += 1
        elif code in self.ends and re.search(self.ends[code], last):
            self.ended[f"code {code}"] += 1
            self._on_end(code)
        else:
            self.faults.append(f"{process.log.name}: code {code}: {last[:300]}")
