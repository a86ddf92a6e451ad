"""Points on Cloud TPUs, by the scripts of tpu_setup/: queued resources, or a GKE cluster with XPK.

`tpu_setup/watch.sh` requests a slice, installs, trains, and after a preemption makes a new request,
on which the run resumes from its checkpoint. `tpu_setup/gke/watch.sh` creates one workload for a
point, which Kueue queues until the cluster has room, and creates it again when its restarts are
used up. Both retry calls that fail, up to a deadline. Only training needs a slice: the launcher's
machine publishes, records and grades, one point at a time, by the commands that `--to=print` shows.
"""

import contextlib
import json
import math
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any

from etils import epath

from experiments.execute import collect
from experiments.manifest import checkout
from experiments.sweep import Command, Point, shell
from oapl_jax.errors import RunError, UserError
from oapl_jax.files import write_atomically
from oapl_jax.tracking.progress import log

SCRIPTS = Path(__file__).parent.parent / "tpu_setup"
RENTED = "slices.json"  # names of slices that exist, with the key of the point that each trains
WORKLOADS = 1000  # at once; Kueue has the queue
LONGEST_PREFIX = 40 - 17  # a workload's name has 40 characters, of which a key takes 17
WHERE = ("--project", "--zone")  # flags that every script takes
SHARE_SECONDS = 90.0  # until a file of another machine is seen on the share
REFUSED = 2  # exit code of a script that started no job, or whose job has ended


class Cloud:
    """Executes points; `train` is a script's, which a subclass knows, and all else is done here."""

    deadline = math.inf  # a request may wait for days; the scripts have their own deadlines

    def __init__(self, root: epath.Path, flags: Sequence[str], *, at_once: int, scripts: Path):
        self.at_once, self._root, self._flags, self._scripts = at_once, root, list(flags), scripts
        self._pool = ThreadPoolExecutor(at_once)
        self._active: set[subprocess.Popen[bytes]] = set()
        self._closed = False
        self._changed = threading.Condition()  # of all that the threads share
        self._here = threading.Lock()

    def script(self, point: Point, flags: Sequence[str]) -> list[str]:
        """The script that trains a point and waits for its end; `flags` are oapl_jax.train's."""
        raise NotImplementedError

    def holds(self, point: Point) -> bool:
        """True if an earlier launch left a slice that trains the point."""
        return False

    def submit(self, point: Point, *, again: bool) -> Future[float]:
        return self._pool.submit(self._execute, point, again)

    def close(self) -> None:
        """Ends the scripts; what they started goes on."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
            for process in self._active:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGTERM)  # its sleep too
        self._pool.shutdown(wait=True, cancel_futures=True)

    def delete(self) -> None:
        """Ends the billing of what the sweep rented."""

    @property
    def billed(self) -> str:
        """Names of what stays rented when the launcher stops."""
        return ""

    def _execute(self, point: Point, again: bool) -> float:
        started, graded = time.monotonic(), {}
        if point.forget_every:
            raise UserError(f"forget_every={point.forget_every} is no setting; use --to=local")
        workdir = point.workdir(self._root)
        workdir.mkdir(parents=True, exist_ok=True)
        for command in point.commands(self._root):
            if command.made is not None and command.made.exists():
                self._release(point)  # it may have trained to its end after a Ctrl-C
                continue
            if command.name == "train":
                self._train(point, command.flags, again)
            else:
                graded = self._run_here(point, command)
            if command.made is not None and not appears(command.made):
                raise RunError(f"oapl_jax.{command.name} ended without {command.made}")
        outcome = json.dumps(collect(point, self._root, graded))
        write_atomically(point.outcome(self._root), [outcome.encode()])
        return time.monotonic() - started

    def _train(self, point: Point, flags: Sequence[str], again: bool) -> None:
        raise NotImplementedError

    def _release(self, point: Point) -> None:
        """Frees what a point holds that has been trained."""

    def _run_here(self, point: Point, command: Command) -> dict[str, Any]:
        """Returns the grades of the split that oapl_jax.evaluate prints as its last line."""
        path = point.workdir(self._root) / f"{command.name}.txt"
        with self._here, path.open("wb") as output:
            self._check(*self._run([sys.executable, *command.words[1:]], point, output))
        split = command.name == "evaluate" and not point.benchmarks
        return json.loads(path.read_text().splitlines()[-1]) if split else {}

    def _run(
        self, command: Sequence[str], point: Point, output: IO[bytes] | None = None
    ) -> tuple[Sequence[str], int, str]:
        """Runs a command in a process group of its own; logs its messages behind the point's key.

        Returns it, its exit code and its last message.
        """
        with self._changed:
            if self._closed:
                raise RunError("the launcher stops")
            process = subprocess.Popen(
                command, stdout=output, stderr=subprocess.PIPE, start_new_session=True
            )
            self._active.add(process)
        last = ""
        assert process.stderr is not None
        for line in process.stderr:
            last = line.decode(errors="replace").strip() or last
            log(f"{point.key}: {last}")
        code = process.wait()
        with self._changed:
            self._active.discard(process)
        return command, code, last

    @staticmethod
    def _check(command: Sequence[str], code: int, last: str) -> None:
        if code:
            raise RunError(f"{shell(command)} ended with code {code}: {last}")


class Slices(Cloud):
    """A slice for each of `slices` points; a slice goes on to the next point.

    ROOT/slices.json has the slices that exist: after Ctrl-C a point finds its slice again, and
    `delete` deletes those of earlier launches too. A slice that still trains a point that is gone
    from the sweep, or is to be trained anew, is deleted before another takes its name.
    """

    def __init__(
        self, root: epath.Path, flags: Sequence[str], *, slices: int, scripts: Path = SCRIPTS
    ):
        check_flags(flags, WHERE, "watch.sh")
        prefix = value_of(flags, "--name") or "sweep"
        flags = [flag for flag in flags if not flag.startswith("--name=")]
        path = root / RENTED
        self._rented: dict[str, str] = json.loads(path.read_text()) if path.exists() else {}
        training = [name for name, key in self._rented.items() if key]
        names = dict.fromkeys([*training, *(f"{prefix}-{i}" for i in range(slices))])
        self._names = list(names)[: max(slices, len(training))]
        self._busy: set[str] = set()
        # One point more is graded or waits, so that no slice does.
        super().__init__(root, flags, at_once=len(self._names) + 1, scripts=scripts)

    def script(self, point: Point, flags: Sequence[str], name: str = "") -> list[str]:
        config, workdir, *overrides = flags
        train = [os.fspath(self._scripts / "train.sh"), config, workdir, "--", *overrides]
        name = f"--name={name or self._names[0]}"
        return [os.fspath(self._scripts / "watch.sh"), *self._flags, name, "--", *train]

    def holds(self, point: Point) -> bool:
        return point.trained.key in self._rented.values()

    def submit(self, point: Point, *, again: bool) -> Future[float]:
        with self._changed:
            self._busy |= {name for name in self._names if self._trains(name, point)}
        return super().submit(point, again=again)

    def _trains(self, name: str, point: Point) -> bool:
        return self._rented.get(name) == point.trained.key

    def _train(self, point: Point, flags: Sequence[str], again: bool) -> None:
        name = self._take(point)
        if self._rented.get(name) and (again or not self._trains(name, point)):
            self._run(self._deletion(name), point)  # if it fails, so will the start of the job
        self._note(name, point.trained.key)
        command, code, last = self._run(self.script(point, flags, name), point)
        if not self._closed:
            self._release(point, "" if code in (0, REFUSED) else "failed")
        self._check(command, code, last)

    def _take(self, point: Point) -> str:
        """The slice that trains the point already, or waits for one without a job, or any other."""
        with self._changed:
            mine = [name for name in self._names if self._trains(name, point)]
            while not mine and self._busy >= set(self._names):
                if self._closed:
                    raise RunError("the launcher stops")
                self._changed.wait()
            free = [name for name in self._names if name not in self._busy]
            name = [*mine, *sorted(free, key=lambda name: bool(self._rented.get(name)))][0]
            self._busy.add(name)
            return name

    def _release(self, point: Point, key: str = "") -> None:
        """Frees the point's slice for another; a key that is no point's has it deleted before."""
        for name in [name for name in self._names if self._trains(name, point)]:
            self._note(name, key)
            with self._changed:
                self._busy.discard(name)
                self._changed.notify_all()

    def _note(self, name: str, key: str | None) -> None:
        """Notes the point of a slice; None: the slice is gone."""
        with self._changed:
            self._rented |= {name: key or ""}
            if key is None:
                del self._rented[name]
            write_atomically(self._root / RENTED, [json.dumps(self._rented).encode()])

    def _deletion(self, name: str) -> list[str]:
        where = [flag for flag in self._flags if flag.partition("=")[0] in WHERE]
        return [os.fspath(self._scripts / "delete.sh"), *where, f"--name={name}"]

    @property
    def billed(self) -> str:
        return ", ".join(sorted(self._rented))

    def delete(self) -> None:
        """Deletes the slices; raises a RunError that names those that it could not delete."""
        for name in sorted(self._rented):
            if not subprocess.run(self._deletion(name), check=False).returncode:
                self._note(name, None)
        if self._rented:
            left = "; ".join(shell(self._deletion(name)) for name in sorted(self._rented))
            raise RunError(f"slices may still be billed; run: {left}")


class Cluster(Cloud):
    """A workload for each point, all at once, on a cluster whose Kueue queues them.

    The cluster is not the sweep's, and stays.
    """

    def __init__(self, root: epath.Path, flags: Sequence[str], *, scripts: Path = SCRIPTS):
        check_flags(flags, (*WHERE, "--cluster", "--topology"), "gke/watch.sh")
        self._prefix = value_of(flags, "--workload") or "sweep"
        if len(self._prefix) > LONGEST_PREFIX:
            raise UserError(f"--workload={self._prefix} is longer than {LONGEST_PREFIX} characters")
        flags = [flag for flag in flags if not flag.startswith("--workload=")]
        super().__init__(root, flags, at_once=WORKLOADS, scripts=scripts)

    def script(self, point: Point, flags: Sequence[str]) -> list[str]:
        config, workdir, *overrides = flags
        words = [*self._flags, self._workload(point), config, workdir, "--", *overrides]
        return [os.fspath(self._scripts / "gke/watch.sh"), *words]

    def _workload(self, point: Point) -> str:
        return f"--workload={self._prefix}-{point.trained.key}"

    def _train(self, point: Point, flags: Sequence[str], again: bool) -> None:
        if again:  # a workload of that name has ended, or trains with other code
            where = (*WHERE, "--cluster")
            flags_of = [flag for flag in self._flags if flag.partition("=")[0] in where]
            script = os.fspath(self._scripts / "gke/delete_workload.sh")
            self._run([script, *flags_of, self._workload(point)], point)
        self._check(*self._run(self.script(point, flags), point))


def appears(path: epath.Path) -> bool:
    """True if a file is there, or soon: a network file system shows others' files late."""
    deadline = time.monotonic() + SHARE_SECONDS
    while not path.exists():
        if time.monotonic() > deadline:
            return False
        time.sleep(1)
    return True


def at_this_commit(flags: Sequence[str], *, dry_run: bool) -> list[str]:
    """Adds --commit, so that all points have the code of their manifests.

    Raises a UserError for a checkout with uncommitted changes, or another --commit.
    """
    now = checkout()
    if value_of(flags, "--commit") not in ("", "HEAD", now["commit"]):
        raise UserError("--commit is not this checkout's, which manifests name; check that one out")
    if now["uncommitted"] and not dry_run:
        raise UserError(
            "--to=queued and --to=xpk install a commit, and this checkout has uncommitted changes; "
            "commit them, or stash them"
        )
    flags = [flag for flag in flags if not flag.startswith("--commit=")]
    return [*flags, *([f"--commit={now['commit']}"] if now["commit"] else [])]


def check_flags(flags: Sequence[str], needed: Sequence[str], script: str) -> None:
    """Raises a UserError for a word that is no flag, or a missing flag of the script."""
    for flag in flags:
        if not re.fullmatch(r"--[a-z-]+(=.*)?", flag):
            raise UserError(f"{flag} after -- is no flag of tpu_setup/{script}; write --name=value")
    for name in needed:
        if not value_of(flags, name):
            raise UserError(f"{name} is missing after --; see tpu_setup/{script} --help")


def value_of(flags: Sequence[str], name: str) -> str:
    return next((flag.partition("=")[2] for flag in flags if flag.startswith(f"{name}=")), "")
