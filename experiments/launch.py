"""Launches the missing points of a sweep: on this machine, on TPU slices, or on a cluster.

    python -m experiments.launch --experiment=experiments/lag.py --to=print
    python -m experiments.launch --experiment=experiments/lag.py --to=local --jobs=2
    python -m experiments.launch --experiment=experiments/lag.py --to=queued --slices=4 \\
        --root=/mnt/oapl/sweeps -- --project=P --zone=us-east5-a --topology=v5e:8x8 --spot \\
        --share=10.1.2.3:/oapl
    python -m experiments.launch --experiment=experiments/lag.py --to=xpk --root=/mnt/oapl/sweeps \\
        -- --project=P --zone=us-east5-a --cluster=sweep --topology=v5e:8x8

An experiment is a file with `sweep(add)`, see experiments/sweep.py. The root directory holds
results.jsonl (one line for each finished point), manifests/ (one file for each point), runs/ (the
workdirs), and the compile cache and data that all points share. Ctrl-C saves; the same command does
what is missing. For `queued` and `xpk` the root is on the share, which this machine mounts too; it
publishes, records and grades what the slices have trained. The words after `--` are flags of
tpu_setup/watch.sh and tpu_setup/gke/watch.sh.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from concurrent.futures.process import BrokenProcessPool
from typing import Any, Protocol

import tqdm
from etils import epath

from experiments import paper
from experiments.manifest import Manifests, checkout
from experiments.sweep import (
    FORMS,
    RESULTS,
    Line,
    Point,
    Results,
    Sweep,
    load_experiment,
    named,
    shell,
)
from oapl_jax.errors import RunError, UserError, exit_with_code, one_line
from oapl_jax.files import JsonLines, is_local
from oapl_jax.tracking.progress import log

TARGETS = ("print", "local", "queued", "xpk")
LOOK = 2.0  # seconds between two looks at the progress of the points
TAIL = 1 << 16  # bytes at the end of a metrics.jsonl that hold its last line


class Backend(Protocol):
    """Executes points elsewhere than in the launcher's thread, `at_once` at a time."""

    at_once: int
    deadline: float  # seconds in which one of the active points must make a step

    def submit(self, point: Point, *, again: bool) -> Future[float]:
        """Executes a point; `again`: nothing that an earlier try started may go on."""
        ...

    def holds(self, point: Point) -> bool:
        """True if an earlier launch left the point running; it then goes first."""
        ...

    def close(self) -> None: ...

    def delete(self) -> None:
        """Ends the billing of what the sweep rented."""
        ...


class Launcher:
    """Executes the missing points of a sweep with a backend, and moves their results into one file.

    Attributes:
      broken: reasons of points that raised, for a fault that is not their policy's. They have no
        line, and the next command tries them again.
      stale: points of another configuration or code, with what changed. `stale_points` says
        whether they are left alone ("show"), executed again ("redo") or taken as they are ("keep").
    """

    def __init__(self, root: epath.Path, *, stale_points: str = "show", clean: bool = False):
        self.broken: dict[Point, str] = {}
        self.stale: dict[Point, str] = {}
        self._root, self._choice, self._cleans = root, stale_points, clean
        self._file = JsonLines(root / RESULTS, exclusive=True)
        keep = stale_points == "keep"
        self._code = checkout()["code"]
        self._results = Results(root, any_defaults=keep, code="" if keep else self._code)
        self._manifests = Manifests(root)
        self._running: dict[Future[float], Point] = {}
        self._names: Mapping[Point, str] = {}

    def run(self, sweep: Sweep, form: str, backend: Backend) -> None:
        """Returns when nothing is left to do; a launcher runs once.

        Raises:
          RunError: if a worker dies or hangs, or a point that is repeated for others gives another
            result than before.
          KeyboardInterrupt: after the points have saved.
        """
        for point in named(sweep, self._results, form):  # left by a stop before the rmtree
            if self._results.line(point) and not point.kept:
                self._clean(point)
        display = Display(self._root)
        try:
            while True:
                points = self._names = named(sweep, self._results, form)
                for point in self._ready(sorted(points, key=lambda p: not backend.holds(p))):
                    fresh = bool(self._changed(point))
                    again = fresh or self._manifests.outcome(point) in ("broken", "ended")
                    self._manifests.begin(point, fresh=fresh)
                    self._running[backend.submit(point, again=again)] = point
                    if len(self._running) == backend.at_once:
                        break
                if not self._running:
                    return
                for future in self._wait(display, points, backend.deadline):
                    self._end(self._running.pop(future), future)
        finally:
            display.close()
            backend.close()
            self._file.close()

    def _ready(self, points: Sequence[Point]) -> Iterator[Point]:
        """Missing points that can start now, or the points that they wait for."""
        busy = lambda point: point.trained in [p.trained for p in self._running.values()]
        active = lambda point: busy(point) or point in self.broken
        for point in points:
            if self._results.line(point) is None and not active(point):
                first = self._first(point)
                if not active(first) and not self._is_stale(first):
                    yield first

    def _first(self, point: Point) -> Point:
        """The point, or one that it needs and whose workdir is not below this root."""
        for other in point.needs:
            if not other.outcome(self._root).exists() or self._results.stale(other):
                return self._first(other)
        return point

    def _is_stale(self, point: Point) -> bool:
        """Notes a stale point that is left alone; False if it may run."""
        changed = self._changed(point)
        if changed:
            self.stale[point] = changed
        return bool(changed) and self._choice == "show"

    def _changed(self, point: Point) -> str:
        """What makes a point stale; "" if nothing does, or stale points are kept."""
        if self._choice == "keep":
            return ""
        state = self._manifests.state(point, self._results)
        return state.removeprefix("stale: ") if state.startswith("stale") else ""

    def _wait(
        self, display: "Display", points: Collection[Point], deadline: float
    ) -> set[Future[float]]:
        """Waits until a point ends; shows the progress of all meanwhile."""
        since = time.monotonic()
        while True:
            ended = sum(self._results.line(point) is not None for point in points)
            running = {point: self._name(point) for point in self._running.values()}
            display.show(running, ended, len(points))
            done, _ = wait(self._running, LOOK, FIRST_COMPLETED)
            if done:
                return done
            if display.moved:
                since = time.monotonic()
            if time.monotonic() - since > deadline:
                names = ", ".join(f"{self._name(p)} ({p.key})" for p in self._running.values())
                raise RunError(f"no step within {deadline:.0f} s of {names}")

    def _name(self, point: Point) -> str:
        return self._names.get(point, point.name)

    def _end(self, point: Point, future: Future[float]) -> None:
        """Moves the result of a point into the results file."""
        workdir, error = point.workdir(self._root), future.exception()
        if isinstance(error, BrokenProcessPool):
            raise RunError(
                f"a worker process died (out of memory?); see log.txt in {workdir}; the same "
                "command resumes"
            ) from error
        line: Line = {"outcome": "broken", "reason": f"{error!r}; see {workdir / 'log.txt'}"}
        if isinstance(error, RunError | UserError):
            line["reason"] = one_line(error)
        measured: dict[str, Any] = {}
        if error is None:
            line = self._outcome(point)
            measured = {name: line.pop(name) for name in ("data", "lags") if name in line}
            line |= {"seconds": round(future.result(), 1), "code": self._code}
        known = self._results.line(point)
        if known is not None and found(known) != found(line):
            if error is None:
                workdir.rmtree()
            raise RunError(
                f"point {point.key}, repeated because its directory is not below {self._root}, "
                "gave another result than in results.jsonl "
                f"({line.get('reason', 'another machine?')}); "
                "points that start from it can't be compared with the old ones: give another --root"
            )
        if line["outcome"] == "broken" or (point.kept and line["outcome"] != "ended"):
            self.broken[point] = line["reason"]
        elif known is None:
            line = {"key": point.key, "settings": point.settings, **line}
            self._file.append(line)
            self._file.sync()
            self._results.take(line)
        reason = {"reason": line["reason"]} if "reason" in line else {}
        self._manifests.end(point, line["outcome"], **measured, **reason)
        if error is None and not (point.kept and line["outcome"] == "ended"):
            self._clean(point)
        log(f"{len(self._results.lines)} points ended; {describe(self._name(point), point, line)}")

    def _outcome(self, point: Point) -> Line:
        path = point.outcome(self._root)
        if not path.exists():
            return {"outcome": "broken", "reason": f"no result in {path.parent}"}
        return json.loads(path.read_text())

    def _clean(self, point: Point) -> None:
        """Removes a workdir that no other point reads."""
        if self._cleans:
            point.workdir(self._root).rmtree(missing_ok=True)


class Display:
    """One line for all points on a terminal; elsewhere nothing but the lines of ended points.

    Attributes:
      moved: True if a step ended between the last two looks.
    """

    def __init__(self, root: epath.Path):
        self.moved = True
        self._root, self._bar, self._last = root, None, ""
        if sys.stderr.isatty():
            self._bar = tqdm.tqdm(desc="points", file=sys.stderr, dynamic_ncols=True)

    def show(self, running: Mapping[Point, str], ended: int, total: int) -> None:
        steps = [f"{name} {step_of(point, self._root)}" for point, name in running.items()]
        text = ", ".join(steps[:4]) + (f" and {len(steps) - 4} more" if len(steps) > 4 else "")
        self.moved, self._last = text != self._last, text
        if self._bar is not None:
            self._bar.total = total
            self._bar.set_postfix_str(text, refresh=False)
            self._bar.update(ended - self._bar.n)
            self._bar.refresh()

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


def step_of(point: Point, root: epath.Path) -> str:
    """The last step in a point's metrics, of all its steps."""
    path = point.workdir(root) / "metrics.jsonl"
    if not path.exists():
        return "starts"
    with open(path, "rb") as file:
        file.seek(max(os.path.getsize(path) - TAIL, 0))
        lines = file.read().splitlines(keepends=True)
    whole = [line for line in lines[-2:] if line.endswith(b"\n")]
    return f"{json.loads(whole[-1])['step']}/{point.resolve(root).num_steps}" if whole else "starts"


def found(line: Mapping) -> str:
    """The result of a point without its cost."""
    ignored = ("key", "settings", "seconds", "core_seconds", "code", "data", "lags")
    return json.dumps({k: v for k, v in line.items() if k not in ignored}, sort_keys=True)


def describe(name: str, point: Point, line: Line) -> str:
    if line["outcome"] != "ended":
        return f"{name} {line['outcome']}: {line['reason']}"
    graded = line.get(point.split, {})
    shown = f": {point.split} pass@1 {graded['pass@1']:.3f}" if "pass@1" in graded else ""
    return f"{name}{shown} ({line['seconds']:.0f} s)"


def print_points(points: Mapping[Point, str], root: epath.Path, results: Results) -> None:
    """Prints the state of each point and the commands that execute it."""
    manifests = Manifests(root)
    for number, (point, name) in enumerate(points.items(), 1):
        print(f"# {number} of {len(points)}: {name}: {manifests.state(point, results)}")
        if point.forget_every:
            print(f"# forget_every={point.forget_every} is no setting: --to=local alone has it")
        for command in point.commands(root):
            print(shell(command.words))


def dry_run(points: Mapping[Point, str], root: epath.Path, backend: Any) -> None:
    """Prints the commands of each point, and those that a script of tpu_setup/ would run."""
    for number, (point, name) in enumerate(points.items(), 1):
        print(f"# {number} of {len(points)}: {name}")
        for command in point.commands(root):
            if command.name != "train":
                print(f"# on this machine\n{shell(command.words)}")
                continue
            script, *flags = backend.script(point, command.flags)
            print(f"# {shell([script, *flags])}", flush=True)
            done = subprocess.run([script, "--dry-run", *flags], check=False)
            if done.returncode:
                raise UserError(f"{script} refuses these flags; see its message above")


def main() -> None:
    words = sys.argv[1:]
    own, cloud = words, []
    if "--" in words:
        own, cloud = words[: words.index("--")], words[words.index("--") + 1 :]
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--experiment", required=True, help="a file with sweep(add)")
    parser.add_argument("--to", choices=TARGETS, default="print", help="where the points run")
    parser.add_argument("--form", choices=FORMS, help="its own scale, two CPU cores, or minutes")
    parser.add_argument("--root", default="runs/sweeps", help="of results, manifests and workdirs")
    parser.add_argument("--jobs", type=int, default=2, help="local: points at a time, a core each")
    parser.add_argument("--slices", type=int, default=1, help="queued: slices at a time")
    parser.add_argument(
        "--stale",
        choices=("show", "redo", "keep"),
        default="show",
        help="points of other code or configuration: leave them, run them again, take them",
    )
    parser.add_argument("--clean", action="store_true", help="remove workdirs of ended points")
    parser.add_argument("--dry-run", action="store_true", help="print the commands, do nothing")
    paper.add_flags(parser)
    given = parser.parse_args(own)
    for name in ("jobs", "slices"):
        if getattr(given, name) < 1:
            raise UserError(f"--{name}={getattr(given, name)} runs nothing; give at least 1")
    if cloud and given.to not in ("queued", "xpk"):
        raise UserError(f"words after -- are for --to=queued and --to=xpk, not --to={given.to}")
    sweep = load_experiment(given.experiment).sweep
    form = given.form or ("cpu" if given.to == "local" else "paper")
    root = epath.Path(given.root)
    if not is_local(root):
        raise UserError(
            f"--root={given.root} is in a bucket, where a launcher can't lock its results; name a "
            "directory on a disk or a share"
        )
    if given.to in ("queued", "xpk") and not root.is_absolute():
        raise UserError(f"--root={given.root} is not absolute; name a directory on the share")
    root = root.resolve()
    results = Results(root, code=checkout()["code"])
    points = named(sweep, results, form)
    if not points:
        raise UserError(f"--experiment={given.experiment} has no points with --form={form}")
    if given.to == "print" or (given.to == "local" and given.dry_run):
        print_points(points, root, results)
        for cost in paper.costs(points, given.topology, given.price) if form == "paper" else ():
            print(f"# training alone: {cost}")
        return
    backend = open_backend(given, root, cloud)
    if given.dry_run:
        dry_run(points, root, backend)
        return
    launch(sweep, form, root, backend, stale_points=given.stale, clean=given.clean)


def open_backend(given: argparse.Namespace, root: epath.Path, flags: Sequence[str]) -> Any:
    from experiments import cloud, local

    if given.to == "local":
        return local.Workers(root, jobs=given.jobs)
    flags = cloud.at_this_commit(flags, dry_run=given.dry_run)
    if given.to == "queued":
        return cloud.Slices(root, flags, slices=given.slices)
    return cloud.Cluster(root, flags)


def launch(
    sweep: Sweep, form: str, root: epath.Path, backend: Any, *, stale_points: str, clean: bool
) -> None:
    """Runs a sweep to its end, or until Ctrl-C or SIGTERM.

    Raises:
      RunError: if points broke, or are stale and were left alone, or slices were not deleted.
    """
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    launcher = Launcher(root, stale_points=stale_points, clean=clean)
    try:
        launcher.run(sweep, form, backend)
    except KeyboardInterrupt:
        billed = f"; {backend.billed} keep running and are billed" if backend.billed else ""
        log(f"stopped; the same command goes on{billed}")
        raise SystemExit(130) from None
    except Exception:
        backend.delete()
        raise
    problems = []
    if launcher.broken:
        reason = next(iter(launcher.broken.values()))
        problems.append(
            f"{len(launcher.broken)} points broke, the first with {reason}; the same command tries "
            "them again"
        )
    if launcher.stale and stale_points == "show":
        problems.append(
            f"{len(launcher.stale)} points are stale, the first because its "
            f"{next(iter(launcher.stale.values()))} changed; --stale=redo runs them again, "
            "--stale=keep takes them as they are"
        )
    try:
        backend.delete()
    except RunError as error:
        problems.append(str(error))
    if problems:
        raise RunError("; ".join(problems))


if __name__ == "__main__":
    exit_with_code(main)
