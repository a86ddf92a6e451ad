"""The whole loop on several hosts: real processes on one machine, four devices each."""

import json
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from bucket import emulated
from small_runs import Runs, metrics

from oapl_jax.tracking.metrics import read_lines

# Where all rewards are equal gradients are rounding noise, and a small eps would make steps of it.
SETTINGS = {"mesh.data": 2, "mesh.fsdp": 4, "learner.rows_multiple": 8, "optim.eps": 1e-3}
PER_STEP = 4  # groups, so that what each host samples at a time is its part of a step
DEADLINE = 240.0  # seconds for a whole run of all hosts
# A host that is less patient with the others, and may hang before a step.
IMPATIENT = """
import time
from oapl_jax import multihost, train
from oapl_jax.errors import exit_with_code

def build_batch(run, groups, step, whole=train.build_batch):
    if step == {hangs_at}:
        time.sleep(600)
    return whole(run, groups, step)

def section(name, *, deadline, whole=multihost.collective_section):
    return whole(name, deadline=5.0 if name == "gradient step 10" else deadline)

multihost.SILENCE, multihost.LAST_MESSAGES = 16.0, 8.0
train.build_batch, multihost.collective_section = build_batch, section
exit_with_code(train.main)
"""


class Pod:
    """The processes of a run.

    Args:
      hosts: how many.
      hangs_at: of hosts that have less patience with each other, the step at which one hangs.
    """

    def __init__(self, runs: Runs, hosts: int, hangs_at: dict[int, int] | None = None):
        self._runs, self._hosts, self._hangs_at = runs, hosts, hangs_at

    def start(self, workdir: Path, **settings) -> list[subprocess.Popen]:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        settings = {**SETTINGS, "rollout.prompts_per_call": PER_STEP // self._hosts, **settings}
        command = self._runs.command(workdir, **settings)
        flags = [f"--hosts={self._hosts}", f"--coordinator=127.0.0.1:{port}"]
        return [
            self._runs.start(
                [*self._program(host, command), *flags, f"--host={host}"], devices=8 // self._hosts
            )
            for host in range(self._hosts)
        ]

    def _program(self, host: int, command: list[str]) -> list[str]:
        if self._hangs_at is None:
            return command
        python, _, _, *flags = command  # python -m oapl_jax.train
        return [python, "-c", IMPATIENT.format(hangs_at=self._hangs_at.get(host, -1)), *flags]

    def run(self, workdir: Path, **settings) -> list[str]:
        processes = self.start(workdir, **settings)
        try:
            outputs = [process.communicate(timeout=DEADLINE)[0] for process in processes]
        finally:
            for process in processes:
                process.kill()
        for process, output in zip(processes, outputs, strict=True):
            assert process.returncode == 0, output
        return outputs


@pytest.fixture(scope="module")
def alone(runs, tmp_path_factory):
    """The run of one process with all eight devices."""
    workdir = tmp_path_factory.mktemp("alone")
    runs.run(workdir, devices=8, **SETTINGS, **{"rollout.prompts_per_call": PER_STEP})
    return workdir


@pytest.fixture(scope="module")
def together(runs, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("together")
    Pod(runs, 2).run(workdir)
    return workdir


LOGS = (("metrics", ".jsonl"), ("ledger", ".jsonl"))
SAME = ("loss", "reward", "entropy", "kl", "grad_norm", "lag/max", "eval/pass@1")


def assert_same_losses(found: list[dict], expected: list[dict]) -> None:
    assert [line["step"] for line in found] == [line["step"] for line in expected]
    for mine, theirs in zip(found, expected, strict=True):
        for key in SAME:
            assert mine.get(key) == pytest.approx(theirs.get(key), abs=2e-4), (mine["step"], key)


def test_two_hosts_match_one_host(alone, together):
    assert_same_losses(metrics(together), metrics(alone))
    results = [json.loads((w / "result.json").read_text()) for w in (alone, together)]
    assert results[0]["after"]["pass@1"] == pytest.approx(results[1]["after"]["pass@1"], abs=0.02)


def test_hosts_compile_nothing_after_the_first_evaluation(together):
    for name in ("metrics.jsonl", "metrics.host1.jsonl"):
        lines = [json.loads(line) for line in (together / name).read_text().splitlines()]
        compiled = [line["compile/programs"] for line in lines]
        # As for one host: the last batch of the validation split, after step 5, has a new size.
        assert compiled == [compiled[0]] * 5 + [compiled[5]] * 7, name


def wait_for_step(workdir: Path, step: int, processes: list[subprocess.Popen]) -> None:
    give_up = time.monotonic() + DEADLINE
    while not (workdir / "metrics.jsonl").exists() or len(metrics(workdir)) < step:
        assert time.monotonic() < give_up, f"no step {step}"
        for process in processes:
            assert process.poll() is None, process.communicate()[0]
        time.sleep(0.05)


def assert_lost(process: subprocess.Popen, named: str) -> None:
    output, _ = process.communicate(timeout=DEADLINE)
    assert process.returncode == 4, output
    (said,) = [line for line in output.splitlines() if line.startswith("error: ")]
    assert re.search(named, said), output


def test_a_host_that_is_lost_is_named_and_the_run_goes_on(runs, together, tmp_path):
    """Host 0, which is the coordinator too; test_multihost.py loses the other one."""
    workdir = tmp_path / "run"
    processes = Pod(runs, 2, hangs_at={}).start(workdir)
    try:
        wait_for_step(workdir, 4, processes)
        processes[0].kill()
        assert_lost(processes[1], "^error: host (0|1 lost another)")
    finally:
        processes[1].kill()
    processes = Pod(runs, 2, hangs_at={1: 9}).start(workdir)
    hang = r"rollout\.deadline.* gradient step 10: host 1"
    try:
        for process in processes:
            assert_lost(process, hang)
    finally:
        for process in processes:
            process.kill()
    pod = Pod(runs, 2)
    pod.run(workdir)
    assert_same_losses(metrics(workdir), metrics(together))
    for host in (0, 1):
        assert balance(runs, workdir, host)["trained"] == 12 * PER_STEP * 4 // 2


def balance(runs: Runs, workdir: Path, host: int) -> dict[str, int]:
    command = [sys.executable, "-m", "oapl_jax.report", str(workdir), f"--host={host}"]
    output, _ = (process := runs.start([*command, "--json"])).communicate(timeout=60)
    assert process.returncode == 0, output
    return json.loads(output)["balance"]


def test_a_stop_of_one_host_stops_all_and_one_process_goes_on(runs, together, tmp_path):
    workdir = tmp_path / "run"
    processes = Pod(runs, 2).start(workdir)
    try:
        wait_for_step(workdir, 4, processes)
        processes[1].send_signal(signal.SIGTERM)
        outputs = [process.communicate(timeout=60)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, output in zip(processes, outputs, strict=True):
        assert process.returncode == 0, output
        assert "stopped by SIGTERM" in output
    before = metrics(workdir)
    Pod(runs, 1).run(workdir)
    lines = metrics(workdir)
    assert [line["step"] for line in lines] == list(range(1, 13))
    assert_same_losses(lines[: len(before)], metrics(together)[: len(before)])
    of_host = [balance(runs, workdir, host) for host in (0, 1)]
    assert sum(states["trained"] for states in of_host) == 12 * PER_STEP * 4
    assert of_host[1]["held"] == of_host[1]["in flight"] == 0


def test_two_hosts_share_a_workdir_in_a_bucket(runs, together):
    with emulated("pods") as bucket:
        workdir = bucket / "run"
        Pod(runs, 2).run(workdir)
        assert_same_losses(read_lines(workdir / "metrics.jsonl"), metrics(together))
        names = [f"{name}{host}{end}" for name, end in LOGS for host in ("", ".host1")]
        assert all((workdir / name).is_dir() for name in names)
        for host in (0, 1):
            assert balance(runs, workdir, host)["trained"] == 12 * PER_STEP * 4 // 2


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"groups_per_step": 5}, "groups_per_step=5"),
        ({"rollout.record": True}, "rollout.record=True"),
        ({"curriculum.name": "learnability"}, "curriculum.name='learnability'"),
    ],
)
def test_settings_that_need_one_host_are_rejected(runs, tmp_path, settings, why):
    processes = Pod(runs, 2).start(tmp_path / "run", **settings)
    outputs = [process.communicate(timeout=DEADLINE)[0] for process in processes]
    for process, output in zip(processes, outputs, strict=True):
        assert process.returncode == 2, output
        assert f"error: {why}" in output
