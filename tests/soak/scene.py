"""All parts of the soak test, and the ground that they stand on.

A trainer on a fleet of two servers behind a router; an evaluation of its checkpoints; and a run
with the embedded sampler that begins again whenever it has ended. All runs are on the small disk
and under the clock that jumps, and each server is on a machine of its own.
"""

import functools
import json
import pathlib
import random
import shutil
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

from etils import epath
from levels import Levels
from parts import Part
from places import Clock, Disk, Network
from server_processes import Process, sglang_program
from small_runs import QUICK_COMPILATION, metrics, timeless

from oapl_jax.files import checksum
from oapl_jax.weights.publisher import MANIFEST, published_versions, version_path

PORT, ROUTER_PORT = 30000, 31000  # servers listen on the network of their machine alone
DEADLINE = 900.0  # seconds of each wait: a start, the return of all servers, a gradient step
TICK = 0.5  # seconds between two looks at the parts
# Ends of our commands, see Part.
FULL = "(No space left on device|Not enough disk space).*free space"
LATE = "has not ended within .*rollout.deadline"
OURS = {0: ".", 1: FULL, 3: "no server (was|is) ready"}
GONE = {2: "no checkpoint step|no finished Orbax step|deleted meanwhile"}  # of an evaluation


class Scene:
    """Parts are attributes; `watch` and `wait` keep them running.

    Args:
      directory: of the disk, of logs and of copies of versions; must not exist.
      seed: of the faults.
    """

    def __init__(self, directory: pathlib.Path, seed: int):
        directory.mkdir(parents=True)
        self.logs, self.copies = directory / "logs", directory / "versions"
        self.logs.mkdir()
        self.copies.mkdir()
        self.disk, self.clock = Disk(directory / "disk"), Clock(directory)
        self.machines = [Network(number) for number in (1, 2)]
        self.workdir, self.alone, self.unbroken, self.evaluations = (
            self.disk.path / name for name in ("fleet", "alone", "unbroken", "evaluations")
        )
        self.random, self.levels = random.Random(seed), Levels()
        self.counts: Counter[str] = Counter()
        self.wrong: list[str] = []  # what should not have happened, beside the parts' ends
        self.copied: dict[int, int] = {}  # version -> inode of its directory that was copied
        self._evaluated = ""  # checkpoint step
        self._best, self._progress = -1, time.monotonic()

        part = lambda name, start, **more: Part(name, self.logs, start, **more)
        second = {2: "is in use by"}  # that began while the first was down
        self.trainer = part("trainer", self.start_trainer, ends=OURS | second)
        self.round = part("round", self._start_round, ends=OURS.copy(), on_end=self._end_round)
        evaluate = dict(ends=OURS | GONE, pause=15.0, on_end=self._end_evaluation)
        self.evaluation = part("evaluation", self._start_evaluation, **evaluate)
        self.router = part("router", self._start_router, ends={}, ours=False)
        starts = (functools.partial(self._start_server, i) for i in (0, 1))
        self.servers = [part(f"server{i}", s, ends={}, ours=False) for i, s in enumerate(starts)]

    @property
    def parts(self) -> list[Part]:
        return [self.trainer, *self.servers, self.router, self.evaluation, self.round]

    def start(self) -> None:
        """Ends the unbroken run, then starts servers, router and trainer.

        Returns when both servers sample for the trainer.
        """
        unbroken = self._train("alone", self.unbroken, self.logs / "unbroken.log")
        if code := unbroken.wait_exit(DEADLINE):
            raise RuntimeError(f"the unbroken run ended with code {code}; see {unbroken.log}")
        fleet = [*self.servers, self.router]
        for part in fleet:
            part.keep()
        for part in self.servers:
            part.process.wait_ready(deadline=DEADLINE)
        self._progress = time.monotonic()
        self.wait(self.all_ready, "the trainer", [self.trainer, *fleet])

    def watch(self, seconds: float) -> None:
        """Keeps all parts running for so long."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            self._tick(self.parts)

    def wait(
        self, condition: Callable[[], bool], what: str, parts: Iterable[Part] | None = None
    ) -> None:
        """Keeps the parts running until a condition holds; TimeoutError after DEADLINE."""
        until = time.monotonic() + DEADLINE
        while not condition():
            if time.monotonic() > until:
                raise TimeoutError(f"{what}: not within {DEADLINE:.0f} s; see {self.logs}")
            self._tick(self.parts if parts is None else parts)

    def all_ready(self) -> bool:
        """True if both servers were ready at the trainer's last gradient step."""
        return self.last_step().get("fleet/ready") == len(self.servers)

    def trainer_holds_workdir(self) -> bool:
        """True if the lease names the trainer's process."""
        process, lease = self.trainer.process, self.workdir / "lease.json"
        text = lease.read_text() if lease.exists() else ""  # also cut by a full disk
        return process is not None and f'"pid": {process.group},' in text

    def wait_for_step(self) -> None:
        """Returns after the trainer's next gradient step, wherever it resumes."""
        self._wait_for_rise(lambda: self.last_step().get("step", -1), "a gradient step")

    def wait_for_saves(self) -> None:
        """Returns after the trainer's next version and checkpoint, wherever it resumes."""
        self._wait_for_rise(lambda: max(self.versions(), default=-1), "a version")
        self._wait_for_rise(lambda: max(self.checkpoints(self.workdir), default=-1), "a checkpoint")

    def _wait_for_rise(self, read: Callable[[], int], what: str) -> None:
        lowest = 1 << 31

        def risen() -> bool:
            nonlocal lowest
            now = read()
            lowest = min(lowest, now)
            return now > lowest

        self.wait(risen, what)

    def permit_late_ends(self) -> None:
        """From now on a run may end by the deadline of a save or a read."""
        for part in self.trainer, self.round, self.evaluation:
            part.ends[1] = f"{FULL}|{LATE}"

    def checkpoints(self, workdir: pathlib.Path) -> list[int]:
        """Finished steps of a run."""
        path = workdir / "checkpoints"
        return [int(step.name) for step in path.glob("*") if step.name.isdigit()]

    def last_step(self) -> dict[str, Any]:
        """Metrics of the trainer's last gradient step; {} before the first."""
        path = self.workdir / "metrics.jsonl"
        tail = path.read_bytes()[-(1 << 15) :].splitlines(keepends=True) if path.exists() else []
        whole = [line for line in tail[1:] or tail if line.endswith(b"\n")]
        return json.loads(whole[-1]) if whole else {}

    def stop(self) -> None:
        """Stops everything, the servers last."""
        for part in (self.trainer, self.round, self.evaluation):
            part.stop(signal.SIGTERM)
        for part in (self.router, *self.servers):
            part.kill()

    def save(self) -> None:
        """Copies what explains a failure from the disk, which ends with this process."""
        for run in (self.workdir, self.alone):
            if run.exists():
                heavy = shutil.ignore_patterns(
                    "checkpoints", "weights", "rollouts", "*.safetensors"
                )
                shutil.copytree(run, self.logs.parent / run.name, ignore=heavy)

    def _tick(self, parts: Iterable[Part]) -> None:
        for part in parts:
            part.keep()
        self._copy_versions()
        self.levels.sample(parts)
        step, now = self.last_step().get("step", -1), time.monotonic()
        if step > self._best:
            self._best, self._progress = step, now
        elif now > self._progress + DEADLINE:
            raise TimeoutError(f"no step after {step} in {DEADLINE:.0f} s; see {self.logs}")
        time.sleep(TICK)

    # Versions

    def versions(self) -> list[int]:
        return published_versions(epath.Path(self.workdir / "versions"))

    def version_path(self, version: int) -> pathlib.Path:
        return pathlib.Path(version_path(epath.Path(self.workdir / "versions"), version))

    def _copy_versions(self) -> None:
        """Copies new versions to VERSION-CHECKSUM: a run that goes back publishes others."""
        for version in self.versions():
            source = self.version_path(version)
            try:
                inode = source.stat().st_ino
                if self.copied.get(version) == inode:
                    continue
                digest = checksum(epath.Path(source / MANIFEST))
                target = self.copies / f"{version}-{digest}"
                if not target.exists():
                    shutil.copytree(source, self.copies / "partial")
                    (self.copies / "partial").rename(target)
                self.copied[version] = inode
            except (FileNotFoundError, shutil.Error):  # deleted meanwhile
                shutil.rmtree(self.copies / "partial", ignore_errors=True)

    # Starts and ends

    def start_trainer(self, log: pathlib.Path) -> Process:
        return self._train("fleet", self.workdir, log)

    def _start_round(self, log: pathlib.Path) -> Process:
        return self._train("alone", self.alone, log)

    def _train(self, run: str, workdir: pathlib.Path, log: pathlib.Path) -> Process:
        return self._ours(log, "train", run, workdir)

    def _end_round(self, code: int) -> None:
        """Compares a finished run with the unbroken one, and removes it."""
        if code or not (self.alone / "result.json").exists():
            return
        runs = self.alone, self.unbroken
        mine, theirs = ([timeless(line) for line in metrics(run)] for run in runs)
        differing = [a["step"] for a, b in zip(mine, theirs, strict=False) if a != b]
        after = [json.loads((run / "result.json").read_text())["after"] for run in runs]
        if differing or len(mine) != len(theirs) or after[0] != after[1]:
            self.wrong.append(
                f"a round of {len(mine)} steps differs at {differing[:5] or 'its end'}"
            )
        ledger = (self.alone / "ledger.jsonl").read_text()
        self.counts["rounds"] += 1
        self.counts["resumes in rounds"] += ledger.count('"event":"resume"')
        shutil.rmtree(self.alone)

    def _start_evaluation(self, log: pathlib.Path) -> Process:
        """Of the newest step, until it has ended: killed, it resumes."""
        if not self._evaluated:
            self._evaluated = str(max(self.checkpoints(self.workdir)))
        what = [f"--step={self._evaluated}", "--benchmark=problems", f"--to={self.evaluations}"]
        return self._ours(log, "evaluate", "fleet", self.workdir, *what)

    def _end_evaluation(self, code: int) -> None:
        if code == 1:
            return
        self.counts["evaluations"] += code == 0
        self._evaluated = ""
        shutil.rmtree(self.evaluations, ignore_errors=True)

    def _ours(
        self, log: pathlib.Path, module: str, run: str, workdir: pathlib.Path, *more: str
    ) -> Process:
        settings = {"data.data_dir": self.disk.path / "data"}
        if run == "fleet":
            settings["fleet.router"] = f"http://127.0.0.1:{ROUTER_PORT}"
        if module == "evaluate":
            settings["rollout.sampler"] = "local"  # the servers have the trainer's versions
        elif run == "fleet":
            settings["rollout.sampler"] = "fleet"
        command = [sys.executable, "-m", f"oapl_jax.{module}", f"--workdir={workdir}"]
        command += [f"--config=tests/soak/config.py:{run}", *more]
        command += [f"--config.{name}={value}" for name, value in settings.items()]
        environment = {**QUICK_COMPILATION, "JAX_PLATFORMS": "cpu", **self.clock.environment}
        return Process(log.stem, command, 0, log, environment=environment)

    def _start_server(self, index: int, log: pathlib.Path) -> Process:
        machine = self.machines[index]
        model = max((self.unbroken / "versions").iterdir())  # before the trainer's
        command = [*sglang_program("serve.py"), f"--model-path={model}", "--skip-tokenizer-init"]
        command += [f"--host={machine.address}", f"--port={PORT}", "--served-model-name=policy"]
        return Process(log.stem, machine.command(*command), PORT, log, host=machine.address)

    def _start_router(self, log: pathlib.Path) -> Process:
        command = [*sglang_program("route.py"), "--host=127.0.0.1", f"--port={ROUTER_PORT}"]
        command += [f"--prometheus-port={ROUTER_PORT + 1}", "--policy=round_robin", "--worker-urls"]
        command += [f"http://{machine.address}:{PORT}" for machine in self.machines]
        return Process(log.stem, command, ROUTER_PORT, log)
