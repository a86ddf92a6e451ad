"""Worker processes on this machine that execute points, some at a time.

A worker is forked from a server that has imported everything, so that a later edit of the code
affects no active sweep. It executes point after point and keeps the traced programs between them.
"""

import contextlib
import multiprocessing
import os
import signal
import threading
import time
from concurrent.futures import Future, ProcessPoolExecutor
from multiprocessing.connection import Connection

import jax
from etils import epath

from experiments.execute import execute
from experiments.sweep import Point
from oapl_jax.tracking.progress import StopRequest

SAVE_DEADLINE = 120.0  # seconds for a worker to save and exit after a stop
STEP_DEADLINE = 3600.0  # seconds in which one of the active points must make a step
CLEAR_EVERY = 20  # points of a worker between two clearings of its compiled programs


class Workers:
    """Executes points in `jobs` processes; `close` stops them after they have saved."""

    deadline, billed = STEP_DEADLINE, ""

    def __init__(self, root: epath.Path, *, jobs: int):
        os.environ["JAX_COMPILATION_CACHE_DIR"] = os.fspath(root / "cache")
        os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
        # Two points of one thread each do more than one point of two threads.
        flags = os.environ.get("XLA_FLAGS", "")
        if "multi_thread_eigen" not in flags:
            os.environ["XLA_FLAGS"] = f"{flags} --xla_cpu_multi_thread_eigen=false".strip()
        self.at_once, self._root = jobs, root
        processes = multiprocessing.get_context("forkserver")
        processes.set_forkserver_preload(["experiments.execute", "configs.arithmetic"])
        reader, self._writer = processes.Pipe(duplex=False)  # EOF, also by a crash, stops them
        self._pool = ProcessPoolExecutor(jobs, processes, open_worker, (reader,))

    def submit(self, point: Point, *, again: bool) -> Future[float]:
        return self._pool.submit(work, point, self._root)  # a worker's lock ends earlier tries

    def holds(self, point: Point) -> bool:
        return False

    def delete(self) -> None:
        """Nothing is rented."""

    def close(self) -> None:
        self._writer.close()
        self._pool.shutdown(wait=False, cancel_futures=True)
        for worker in multiprocessing.active_children():
            worker.join(SAVE_DEADLINE)
            worker.kill()


# In a worker process.


class Worker:
    """State of a worker process, made by `open_worker`."""

    stop: StopRequest
    busy = threading.Lock()
    points = 0


def open_worker(pipe: Connection) -> None:
    Worker.stop = StopRequest()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all; the launcher says when
    threading.Thread(target=exit_with_launcher, args=(pipe,), daemon=True).start()


def exit_with_launcher(pipe: Connection) -> None:
    """Stops the active point when the launcher closes the pipe or dies; then exits with it."""
    with contextlib.suppress(EOFError, OSError):
        pipe.recv()
    if not Worker.stop.requested:  # a signal to the whole group has reached this process already
        os.kill(os.getpid(), signal.SIGTERM)  # noted by the StopRequest: the run saves
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    with Worker.busy:
        os._exit(0)


def work(point: Point, root: epath.Path) -> float:
    """Executes a point and returns its seconds."""
    started = time.monotonic()
    with Worker.busy:
        Worker.points += 1
        if Worker.points % CLEAR_EVERY == 0:
            jax.clear_caches()
        execute(point, root, Worker.stop)
    return time.monotonic() - started
