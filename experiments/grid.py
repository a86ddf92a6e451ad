"""Many runs: those that are missing, a few at a time, each in a process beside this one.

Below the root of a grid lie `results.jsonl`, a line for each finished run, which only grows;
`runs/`, with what unfinished runs go on from and what others need; and compile cache and data set,
which all share. The same command, interrupted in whatever way, goes on; when all is there it does
nothing. On another machine it goes on from the results file alone: what others need is done again,
and must come out as before.
"""

import argparse
import contextlib
import dataclasses
import fcntl
import hashlib
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from etils import epath

import oapl_jax
from experiments.runs import OUTCOME, Run
from experiments.workers import Workers
from oapl_jax.errors import RunError, UserError
from oapl_jax.tracking.progress import say

PACKAGE, HERE = Path(oapl_jax.__file__).parent, Path(__file__).parent
RESULTS = "results.jsonl"  # below the root
Line = dict[str, Any]


class Grid:
    """Attributes:
    root: its directory.
    jobs: runs at a time. Each computes in one thread, where two runs side by side do more than
      one in two threads.
    lines: of the results file, by key; of several for a run, the last.
    """

    def __init__(self, root: epath.Path, *, jobs: int):
        self.root, self.jobs = root, jobs
        self.lines: dict[str, Line] = {line["key"]: line for line in read(root)}
        self._code = code()
        self._append = threading.Lock()
        self._stopping = threading.Event()
        self._workers = Workers(root)

    def close(self) -> None:
        """Ends the processes; none may be at work."""
        self._workers.close()

    def line(self, run: Run) -> Line | None:
        """What is known of a run; None if it has not come to an end.

        A run that broke, by no fault of its policy, counts as one that is still to be done.
        """
        line = self.lines.get(run.key)
        return None if line is None or line["outcome"] == "broken" else line

    def _to_do(self, run: Run) -> bool:
        """A run that others need is done again where its directory is not, as on another machine
        that has the results file alone."""
        gone = run.needed and not (run.workdir(self.root) / OUTCOME).exists()
        return gone or self.line(run) is None

    def run(self, runs: Iterable[Run], *, what: str) -> None:
        """Does what is missing of the runs, and before them of those that they need.

        Raises:
          RunError: if one that others need came to nothing, or, done again, to something else.
          KeyboardInterrupt: after all processes have saved and left.
        """
        runs = list(dict.fromkeys(runs))
        missing = [run for run in runs if self._to_do(run)]
        needed = [other for run in missing for other in (run.start, run.stream) if other]
        if not missing:
            return
        if needed:
            self.run(needed, what=f"{what}: what its runs start from")
            for run in needed:
                line = self.lines[run.key]
                if line["outcome"] != "ended":
                    raise RunError(
                        f"run {run.key}, which others need, {line['outcome']} ({line['reason']}); "
                        f"see log.txt in {run.workdir(self.root)}"
                    )
        say(f"{what}: {len(missing)} of {len(runs)} runs to do")
        started, done = time.monotonic(), 0
        with ThreadPoolExecutor(self.jobs, thread_name_prefix="run") as pool:
            try:
                for line in pool.map(self._one, missing):
                    done += 1
                    left = (time.monotonic() - started) * (len(missing) - done) / done
                    say(f"  {done}/{len(missing)} {describe(line)}; {left / 60:.0f} min left here")
            except BaseException:
                self._stopping.set()
                pool.shutdown(wait=True, cancel_futures=True)
                raise

    def _one(self, run: Run) -> Line:
        """Does one run; what it left is taken up if the command was killed before it could be."""
        workdir, started = run.workdir(self.root), time.monotonic()
        reason = "" if (workdir / OUTCOME).exists() else self._do(run)
        line: Line = {"key": run.key, "settings": run.settings}
        if (workdir / OUTCOME).exists():
            line |= json.loads((workdir / OUTCOME).read_text())
        elif self._stopping.is_set():
            raise KeyboardInterrupt
        else:
            line |= {"outcome": "broken", "reason": reason}
        line |= {"seconds": round(time.monotonic() - started, 1), "code": self._code}
        known = self.line(run)
        if known is not None and line["outcome"] == "broken":
            raise RunError(f"run {run.key}, done again for others, broke: {line['reason']}")
        if known is not None and found(known) != found(line):
            workdir.rmtree()
            raise RunError(
                f"run {run.key}, done again since its directory was not below {self.root}, found "
                "something else than results.jsonl says (another machine, or other code?); what "
                "starts from it can't stand beside what did before: give another --root"
            )
        if known is None:
            with self._append:
                append(self.root, line)
                self.lines[run.key] = line
        if line["outcome"] != "broken" and not run.needed:
            workdir.rmtree()
        return line

    def _do(self, run: Run) -> str:
        """Returns what went wrong if the process leaves no outcome."""
        return "stopped" if self._stopping.is_set() else self._workers.do(run, self._stopping)


def by_seed(runs: Iterable[Sequence[Run]]) -> list[Run]:
    """Runs of all seeds, of each in turn: so runs of one program, compiled once and kept for all,
    are not side by side."""
    return [run for of_seed in zip(*runs, strict=True) for run in of_seed]


def code() -> str:
    """A digest of what runs compute with."""
    digest = hashlib.sha256()
    for path in (*sorted(PACKAGE.rglob("*.py")), HERE / "runs.py", HERE / "forgetful.py"):
        digest.update(path.relative_to(PACKAGE.parent).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def found(line: Line) -> str:
    """What a run found, without what it took to find it."""
    kept = {k: v for k, v in line.items() if k not in ("seconds", "core_seconds", "code")}
    return json.dumps(kept, sort_keys=True)


def describe(line: Line) -> str:
    """A few words on a finished run, for who watches."""
    settings, seconds = line["settings"], f"{line['seconds']:.0f} s"
    if line["outcome"] != "ended":
        reason = line["reason"].partition("\n")[0]
        return f"{settings['objective']} {line['outcome']}: {reason} ({seconds})"
    if settings["split"] not in line:
        return f"{settings['kind']} ({seconds})"
    graded = line[settings["split"]]["pass@1"]
    return (
        f"{settings['kind']} {settings['objective']} seed {settings['seed']}: "
        f"{settings['split']} pass@1 {graded:.3f} ({seconds})"
    )


def read(root: epath.Path) -> list[Line]:
    """The whole lines of the results file."""
    path = root / RESULTS
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text.split("\n")[:-1]]


def as_line(line: Line) -> str:
    return json.dumps(line) + "\n"


def append(root: epath.Path, line: Line) -> None:
    with (root / RESULTS).open("a") as file:
        file.write(as_line(line))
        file.flush()
        os.fsync(file.fileno())


@contextlib.contextmanager
def open_grid(root: epath.Path, *, jobs: int) -> Iterator[Grid]:
    """A grid that this process alone may add to; at its end, an error if runs broke.

    Raises:
      UserError: if another process has it, or for less than one job.
      RunError: at the end, for runs that broke.
    """
    if jobs < 1:
        raise UserError(f"--jobs={jobs} does nothing; give at least 1")
    root.mkdir(parents=True, exist_ok=True)
    os.environ["JAX_COMPILATION_CACHE_DIR"] = os.fspath(root / "cache")
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    flags = os.environ.get("XLA_FLAGS", "")
    os.environ["XLA_FLAGS"] = f"{flags} --xla_cpu_multi_thread_eigen=false".strip()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with (root / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise UserError(
                f"another process works on {root}; wait for it, or give another --root"
            ) from error
        cut_off(root / RESULTS)
        with contextlib.closing(Grid(root, jobs=jobs)) as grid:
            yield grid
    broken = [line for line in grid.lines.values() if line["outcome"] == "broken"]
    if broken:
        raise RunError(
            f"{len(broken)} runs broke, the first one since {broken[0]['reason']}; the same "
            "command tries them again"
        )


def cut_off(path: epath.Path) -> None:
    """Removes a last line that a kill has cut, so that the next one does not go on in it."""
    if path.exists():
        os.truncate(path, path.read_bytes().rfind(b"\n") + 1)


@dataclasses.dataclass(frozen=True)
class Arguments:
    root: epath.Path
    jobs: int
    quick: bool
    to: epath.Path


def read_arguments(description: str) -> Arguments:
    """Of the commands that share a grid; the first line of the description is shown by --help."""
    parser = argparse.ArgumentParser(description=description.partition("\n")[0])
    parser.add_argument("--root", default="runs/comparison", help="of results and unfinished runs")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, one core each")
    parser.add_argument("--quick", action="store_true", help="minutes, to see that all of it works")
    parser.add_argument("--to", help="where comparison.md goes; docs, or if quick the root")
    given = parser.parse_args()
    to = given.to or (given.root if given.quick else "docs")
    absolute = lambda path: epath.Path(path).resolve()
    if absolute(to) / "comparison" == absolute(given.root):
        parser.error(f"--to={to} would put its pictures and lines into --root; name another")
    return Arguments(absolute(given.root), given.jobs, given.quick, absolute(to))


def command(
    description: str,
    work: Callable[[Grid, bool], None],
    render: Callable[[Grid, epath.Path, bool], None],
) -> None:
    """Does runs; once stopped, the same command goes on.

    Args:
      description: see `read_arguments`.
      work: does the runs of a grid, of the quick form if its second argument holds.
      render: writes what is known into a directory, at the end and also if `work` was stopped.
    """
    given = read_arguments(description)
    try:
        with open_grid(given.root, jobs=given.jobs) as grid:
            try:
                work(grid, given.quick)
            finally:
                render(grid, given.to, given.quick)
    except KeyboardInterrupt:
        say("stopped; the same command goes on")
        sys.exit(130)
