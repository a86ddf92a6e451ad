"""Processes that do runs, one after the other, so that each finds what those before it traced.

A process is a fork of one that has imported everything and computed nothing: a change of the code
reaches the next command, and no run in its midst.
"""

import contextlib
import multiprocessing
import os
import signal
import threading
import time
from typing import Any

from etils import epath

from experiments.runs import Run, do

DEADLINE = 3600.0  # seconds for one run, an order of magnitude more than one takes
PATIENCE = 120.0  # seconds for a run to save and leave when it is told to
RUNS = 20  # of a process, which keeps the programs of all of them in memory


class Workers:
    """As many processes as threads ask for at a time."""

    def __init__(self, root: epath.Path):
        self._root, self._idle = root, list[Worker]()
        self._processes = multiprocessing.get_context("forkserver")
        self._processes.set_forkserver_preload(
            ["experiments.arms", "experiments.findings", "configs.arithmetic"]
        )

    def do(self, run: Run, stopping: threading.Event) -> str:
        """Does a run, or begins it and lets it save and leave once `stopping` is set.

        Returns what went wrong, if it leaves no outcome.
        """
        try:
            worker = self._idle.pop()  # one step, for several threads
        except IndexError:
            worker = Worker(self._processes, self._root)
        said = worker.do(run, stopping)
        if worker.left > 0:
            self._idle.append(worker)
        else:
            worker.close()
        return said

    def close(self) -> None:
        """Of threads, none may be in `do`."""
        while self._idle:
            self._idle.pop().close()


class Worker:
    """One process; `left` is how many runs it may still do, 0 once it is gone."""

    def __init__(self, processes: Any, root: epath.Path):
        self.left = RUNS
        self._pipe, theirs = processes.Pipe()
        self._process = processes.Process(target=work, args=(theirs, root))
        self._process.start()
        theirs.close()  # so that it is closed when the process is gone

    def do(self, run: Run, stopping: threading.Event) -> str:
        self.left -= 1
        end, told = time.monotonic() + DEADLINE, False
        with contextlib.suppress(EOFError, OSError):  # the other end is closed
            self._pipe.send(run)
            while not self._pipe.poll(0.5):
                if stopping.is_set() and not told:
                    self._process.terminate()
                    end, told = time.monotonic() + PATIENCE, True
                if time.monotonic() > end:
                    self.left = 0
                    self._process.kill()
                    return "it was killed, since it took too long to " + (
                        "leave" if told else "end"
                    )
            self._pipe.recv()
            return "it was stopped"
        self.left = 0
        self._process.join(PATIENCE)
        return f"its process ended with code {self._process.exitcode}; see log.txt in its directory"

    def close(self) -> None:
        self._pipe.close()
        self._process.join(PATIENCE)
        self._process.kill()
        self._process.join()


def work(runs: Any, root: epath.Path) -> None:
    """Does the runs that come through a pipe, until its other end is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of the whole group; the grid says when to stop
    _leave_with_parent()
    with contextlib.suppress(EOFError):
        while True:
            run = runs.recv()
            do(run, root)
            with contextlib.suppress(BrokenPipeError):  # nobody waits any more
                runs.send(None)


def _leave_with_parent() -> None:
    """Asks this process to stop when the grid's is gone, however it went."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow() -> None:
        parent.join()
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=follow, daemon=True).start()
