"""Runs a sweep on this machine: some runs at a time, resumable, stopped by Ctrl-C or SIGTERM.

    python -m experiments.launch objectives --root=runs/comparison --jobs=2 [--quick]

An experiment is a module whose `sweep(add, results, quick)` adds runs. The root directory holds
results.jsonl (one line for each finished run), runs/ (unfinished runs, and those that others start
from), and the compile cache and data that all runs share. The same command resumes after any
interruption. On another machine results.jsonl is enough: runs that others start from are executed
again and must give the same result.
"""

import argparse
import contextlib
import importlib
import json
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import Connection
from pathlib import Path

import jax
from etils import epath

import oapl_jax
from experiments.execute import OUTCOME, execute
from experiments.run import RESULTS, Line, Results, Run, Sweep, listed
from oapl_jax.errors import RunError, UserError, exit_with_code
from oapl_jax.files import JsonLines, code_digest
from oapl_jax.tracking.progress import StopRequest, log

RUN_DEADLINE = 3600.0  # seconds in which one of the active runs must end; most take a minute
SAVE_DEADLINE = 120.0  # seconds for a worker to save and exit after a stop
CLEAR_EVERY = 20  # runs of a worker between two clearings of its compiled programs


class Launcher:
    """Executes the missing runs of a sweep in worker processes.

    A worker is forked from a server that has imported everything, so that a later edit of the code
    affects no active sweep. It executes run after run and keeps the traced programs between them.

    Attributes:
      broken: reasons of runs that raised, for a fault that is not their policy's. They have no
        line, and the next command tries them again.
    """

    def __init__(self, root: epath.Path, *, jobs: int):
        self.broken: dict[Run, str] = {}
        self._root, self._jobs = root, jobs
        self._file = JsonLines(root / RESULTS, exclusive=True)
        self._results = Results(root)
        self._running: dict[Future[float], Run] = {}
        here = map(Path(__file__).with_name, ("run.py", "execute.py"))
        package = sorted(Path(oapl_jax.__file__).parent.rglob("*.py"))
        self._code = code_digest([*package, *here])[:12]

    def run(self, sweep: Sweep, quick: bool) -> None:
        """Returns when nothing is left to do.

        Raises:
          RunError: if a worker dies or hangs, or a run that is repeated for others gives another
            result than before.
          KeyboardInterrupt: after the workers have saved.
        """
        for run in listed(sweep, self._results, quick):  # left by a stop between append and rmtree
            if self._results.line(run) and not run.kept:
                run.workdir(self._root).rmtree(missing_ok=True)
        processes = multiprocessing.get_context("forkserver")
        processes.set_forkserver_preload(["experiments.execute", "configs.arithmetic"])
        reader, writer = processes.Pipe(duplex=False)  # EOF, also by a crash, stops the workers
        pool = ProcessPoolExecutor(self._jobs, processes, open_worker, (reader,))
        try:
            while True:
                for run in self._ready(sweep, quick):
                    self._running[pool.submit(work, run, self._root)] = run
                    if len(self._running) == self._jobs:
                        break
                if not self._running:
                    return
                done, _ = wait(self._running, RUN_DEADLINE, FIRST_COMPLETED)
                if not done:
                    names = ", ".join(run.key for run in self._running.values())
                    raise RunError(f"no run ended within {RUN_DEADLINE:.0f} s of {names}")
                for future in done:
                    self._end(self._running.pop(future), future)
        finally:
            writer.close()
            pool.shutdown(wait=False, cancel_futures=True)
            for worker in multiprocessing.active_children():
                worker.join(SAVE_DEADLINE)
                worker.kill()

    def _ready(self, sweep: Sweep, quick: bool) -> Iterator[Run]:
        """Missing runs that can start now, or the run that they wait for."""
        for run in listed(sweep, self._results, quick):
            if self._results.line(run) is None:
                first = self._first(run)
                if first not in self._running.values() and first not in self.broken:
                    yield first

    def _first(self, run: Run) -> Run:
        for other in run.needs:
            if not (other.workdir(self._root) / OUTCOME).exists():
                return self._first(other)
        return run

    def _end(self, run: Run, future: Future[float]) -> None:
        """Moves the result of a run into the results file."""
        workdir, error = run.workdir(self._root), future.exception()
        if isinstance(error, BrokenProcessPool):
            raise RunError(
                f"a worker process died (out of memory?); see log.txt in {workdir}; the same "
                "command resumes"
            ) from error
        line: Line = {"outcome": "broken", "reason": f"{error!r}; see {workdir / 'log.txt'}"}
        if error is None:
            line = json.loads((workdir / OUTCOME).read_text())
            line |= {"seconds": round(future.result(), 1), "code": self._code}
        known = self._results.line(run)
        if known is not None and found(known) != found(line):
            if error is None:
                workdir.rmtree()
            raise RunError(
                f"run {run.key}, repeated because its directory is not below {self._root}, gave "
                f"another result than in results.jsonl ({line.get('reason', 'another machine?')}); "
                "runs that start from it can't be compared with the old ones: give another --root"
            )
        if error is not None or (run.kept and line["outcome"] != "ended"):
            self.broken[run] = line["reason"]
        elif known is None:
            line = {"key": run.key, "settings": run.settings, **line}
            self._file.append(line)
            self._file.sync()
            self._results.take(line)
        if error is None and not (run.kept and line["outcome"] == "ended"):
            workdir.rmtree()
        log(f"{len(self._results.lines)} runs ended; {describe(run, line)}")


def found(line: Mapping) -> str:
    """The result of a run without its cost."""
    ignored = ("key", "settings", "seconds", "core_seconds", "code")
    return json.dumps({k: v for k, v in line.items() if k not in ignored}, sort_keys=True)


def describe(run: Run, line: Line) -> str:
    name = f"{run.kind} {run.objective} seed {run.seed}"
    if line["outcome"] != "ended":
        return f"{name} {line['outcome']}: {line['reason']}"
    graded = f": {run.split} pass@1 {line[run.split]['pass@1']:.3f}" if run.split in line else ""
    return f"{name}{graded} ({line['seconds']:.0f} s)"


# In a worker process.


class Worker:
    """State of a worker process, made by `open_worker`."""

    stop: StopRequest
    busy = threading.Lock()
    runs = 0


def open_worker(pipe: Connection) -> None:
    Worker.stop = StopRequest()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all; the launcher says when
    threading.Thread(target=exit_with_launcher, args=(pipe,), daemon=True).start()


def exit_with_launcher(pipe: Connection) -> None:
    """Stops the active run when the launcher closes the pipe or dies; then exits with it."""
    with contextlib.suppress(EOFError, OSError):
        pipe.recv()
    os.kill(os.getpid(), signal.SIGTERM)  # noted by the StopRequest: the run saves
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    with Worker.busy:
        os._exit(0)


def work(run: Run, root: epath.Path) -> float:
    """Executes a run and returns its seconds."""
    started = time.monotonic()
    with Worker.busy:
        Worker.runs += 1
        if Worker.runs % CLEAR_EVERY == 0:
            jax.clear_caches()
        execute(run, root, Worker.stop)
    return time.monotonic() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("experiment", help="a module of experiments/ with a sweep: objectives, lag")
    parser.add_argument("--root", default="runs/comparison", help="of results and unfinished runs")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, one core each")
    parser.add_argument("--quick", action="store_true", help="a sweep of minutes, as a test")
    given = parser.parse_args()
    if given.jobs < 1:
        raise UserError(f"--jobs={given.jobs} runs nothing; give at least 1")
    sweep = importlib.import_module(f"experiments.{given.experiment}").sweep
    root = epath.Path(given.root).resolve()
    os.environ["JAX_COMPILATION_CACHE_DIR"] = os.fspath(root / "cache")
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    # Two runs of one thread each do more than one run of two threads.
    flags = os.environ.get("XLA_FLAGS", "")
    os.environ["XLA_FLAGS"] = f"{flags} --xla_cpu_multi_thread_eigen=false".strip()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        launcher = Launcher(root, jobs=given.jobs)
        launcher.run(sweep, given.quick)
    except KeyboardInterrupt:
        log("stopped; the same command resumes")
        raise SystemExit(130) from None
    if launcher.broken:
        reason = next(iter(launcher.broken.values()))
        raise RunError(
            f"{len(launcher.broken)} runs broke, the first with {reason}; the same command tries "
            "them again"
        )


if __name__ == "__main__":
    exit_with_code(main)
