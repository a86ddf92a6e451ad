"""Points on Cloud TPUs, by the scripts of tpu_setup/: queued resources, or a GKE cluster with XPK.

`tpu_setup/watch.sh` requests a slice, installs, trains, and after a preemption makes a new request,
on which the run resumes from its checkpoint. `tpu_setup/gke/watch.sh` creates one workload for a
point, which Kueue queues until the cluster has room, and creates it again when its restarts are
used up. Both retry calls that fail, up to a deadline. Only training needs a slice: a point that
has to be recorded, published or graded first is left to the commands that `--to=print` shows.
"""

import math
import os
import queue
import re
import signal
import subprocess
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from etils import epath

from experiments.sweep import Point, shell
from oapl_jax.errors import RunError, UserError
from oapl_jax.tracking.progress import log

SCRIPTS = Path(__file__).parent.parent / "tpu_setup"
WORKLOADS = 1000  # at once; Kueue has the queue
LONGEST_PREFIX = 40 - 17  # a workload's name has 40 characters, of which a key takes 17
WHERE = ("--project", "--zone")  # flags that every script takes


class Slices:
    """A slice for each of `at_once` points; a slice goes on to the next point."""

    deadline = math.inf  # a request may wait for days; the script has its own deadlines

    def __init__(
        self, root: epath.Path, flags: Sequence[str], *, at_once: int, scripts: Path = SCRIPTS
    ):
        self.at_once, self._root, self._flags, self._scripts = at_once, root, list(flags), scripts
        check_flags(flags, WHERE, "watch.sh")
        prefix = value_of(flags, "--name") or "sweep"
        self._flags = [flag for flag in flags if not flag.startswith("--name=")]
        self._names = [f"{prefix}-{i}" for i in range(at_once)]
        self._free: queue.SimpleQueue[str] = queue.SimpleQueue()
        for name in self._names:
            self._free.put(name)
        self._used: set[str] = set()
        self._threads = Watchers(at_once)

    def command(self, point: Point, name: str = "") -> list[str]:
        config, workdir, *overrides = train_flags(point, self._root)
        train = [os.fspath(self._scripts / "train.sh"), config, workdir, "--", *overrides]
        name = f"--name={name or self._names[0]}"
        return [os.fspath(self._scripts / "watch.sh"), *self._flags, name, "--", *train]

    def submit(self, point: Point) -> Future[float]:
        def watch() -> float:
            name = self._free.get()
            self._used.add(name)
            try:
                return self._threads.watch(self.command(point, name), point.key)
            finally:
                self._free.put(name)

        return self._threads.submit(watch)

    def ready(self, point: Point) -> bool:
        return left(point, self._root)

    def close(self) -> None:
        self._threads.close()

    def delete(self) -> None:
        """Deletes the slices, which ends their billing."""
        where = [flag for flag in self._flags if flag.partition("=")[0] in WHERE]
        for name in sorted(self._used):
            command = [os.fspath(self._scripts / "delete.sh"), *where, f"--name={name}"]
            if subprocess.run(command, check=False).returncode:
                raise RunError(f"slice {name} may still be billed; run: {shell(command)}")


class Cluster:
    """A workload for each point, all at once, on a cluster whose Kueue queues them."""

    at_once, deadline = WORKLOADS, math.inf

    def __init__(self, root: epath.Path, flags: Sequence[str], *, scripts: Path = SCRIPTS):
        check_flags(flags, (*WHERE, "--cluster", "--topology"), "gke/watch.sh")
        self._root, self._scripts = root, scripts
        self._prefix = value_of(flags, "--workload") or "sweep"
        if len(self._prefix) > LONGEST_PREFIX:
            raise UserError(f"--workload={self._prefix} is longer than {LONGEST_PREFIX} characters")
        self._flags = [flag for flag in flags if not flag.startswith("--workload=")]
        self._threads = Watchers(WORKLOADS)

    def command(self, point: Point) -> list[str]:
        config, workdir, *overrides = train_flags(point, self._root)
        workload = f"--workload={self._prefix}-{point.key}"
        words = [*self._flags, workload, config, workdir, "--", *overrides]
        return [os.fspath(self._scripts / "gke/watch.sh"), *words]

    def submit(self, point: Point) -> Future[float]:
        return self._threads.submit(lambda: self._threads.watch(self.command(point), point.key))

    def ready(self, point: Point) -> bool:
        return left(point, self._root)

    def close(self) -> None:
        self._threads.close()

    def delete(self) -> None:
        """The cluster stays: it is not the sweep's."""


class Watchers:
    """Threads that each wait for a script; `close` ends the scripts, and the runs go on."""

    def __init__(self, at_once: int):
        self._pool = ThreadPoolExecutor(at_once)
        self._active: set[subprocess.Popen[bytes]] = set()

    def submit(self, watch) -> Future[float]:
        return self._pool.submit(watch)

    def watch(self, command: Sequence[str], name: str) -> float:
        """Runs a script to its end, in a process group of its own; returns its seconds.

        Its messages are logged behind the name. Raises a RunError with the last one unless it ends
        with code 0.
        """
        started = time.monotonic()
        process = subprocess.Popen(command, stderr=subprocess.PIPE, start_new_session=True)
        self._active.add(process)
        last = ""
        assert process.stderr is not None
        for line in process.stderr:
            last = line.decode(errors="replace").strip() or last
            log(f"{name}: {last}")
        code = process.wait()
        self._active.discard(process)
        if code:
            raise RunError(f"{Path(command[0]).name} ended with code {code}: {last}")
        return time.monotonic() - started

    def close(self) -> None:
        for process in list(self._active):
            os.killpg(process.pid, signal.SIGTERM)  # its sleep too
        self._pool.shutdown(wait=True, cancel_futures=True)


def train_flags(point: Point, root: epath.Path) -> list[str]:
    """--config, --workdir and overrides; raises a UserError for a point that trains nothing."""
    if point.kind != "train":
        commands = "; ".join(shell(command) for command in point.commands(root))
        raise UserError(f"{point.name} needs no slice; run it first: {commands}")
    return point.flags(root)


def left(point: Point, root: epath.Path) -> bool:
    """True if a point has left the weights or rollouts from which others start."""
    return point.weights(root).exists() or (point.workdir(root) / "rollouts").exists()


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
