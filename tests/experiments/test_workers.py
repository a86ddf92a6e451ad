"""Processes that do the runs of a grid: they go on to the next run, break alone, and leave."""

import dataclasses
import multiprocessing
import os
import signal
import threading
import time

import pytest
from etils import epath

from experiments import workers
from experiments.arms import Arm, a_run, warm_up
from experiments.objectives import QUICK
from experiments.runs import OUTCOME

SHORT = dataclasses.replace(
    QUICK,
    data={"data.train_size": 40, "data.validation_size": 4, "data.test_size": 4},
    warmup={"warmup.num_steps": 2, "warmup.demonstrations": 20},
)
LONG = dataclasses.replace(
    SHORT, common={**SHORT.common, "num_steps": 10**5, "evaluation.every": 0}
)


def pids():
    return {process.pid for process in multiprocessing.active_children() if process.pid}


@pytest.fixture
def at_work(tmp_path):
    made = workers.Workers(epath.Path(tmp_path))
    yield made
    made.close()
    assert pids() == set()


def done(at_work, run, root):
    """Whether it left an outcome, and what was said."""
    said = at_work.do(run, threading.Event())
    return (run.workdir(epath.Path(root)) / OUTCOME).exists(), said


def test_a_process_goes_on_to_the_next_run_until_one_breaks_it(at_work, tmp_path):
    one, two, three = (warm_up(SHORT, seed) for seed in range(3))
    assert done(at_work, one, tmp_path)[0]
    first = pids()
    assert len(first) == 1
    assert done(at_work, two, tmp_path)[0]
    assert pids() == first
    broken = dataclasses.replace(one, overrides=(*one.overrides, ("mesh.fsdp", 64)))
    ended, said = done(at_work, broken, tmp_path)
    assert not ended
    assert "code 1; see log.txt" in said
    assert "UserError" in (broken.workdir(epath.Path(tmp_path)) / "log.txt").read_text()
    assert pids() == set()
    assert done(at_work, three, tmp_path)[0]
    log = (three.workdir(epath.Path(tmp_path)) / "log.txt").read_text()
    assert "warm up 2/2" in log


def test_a_process_keeps_no_more_than_so_many_runs(at_work, tmp_path, monkeypatch):
    monkeypatch.setattr(workers, "RUNS", 1)
    assert done(at_work, warm_up(SHORT, 0), tmp_path)[0]
    assert pids() == set()


@pytest.mark.parametrize("how", ["stopped", "killed"])
def test_a_run_that_is_stopped_leaves_and_one_that_is_killed_is_named(at_work, tmp_path, how):
    assert done(at_work, warm_up(LONG, 0), tmp_path)[0]
    run = a_run(LONG, Arm("live", 8), "oapl", {}, 0, "validation")
    stopping, said = threading.Event(), list[str]()
    thread = threading.Thread(target=lambda: said.append(at_work.do(run, stopping)))
    thread.start()
    metrics = run.workdir(epath.Path(tmp_path)) / "metrics.jsonl"
    end = time.monotonic() + 300
    while not (metrics.exists() and metrics.read_text()) and time.monotonic() < end:
        time.sleep(0.2)
    if how == "stopped":
        stopping.set()
    else:
        (pid,) = pids()
        os.kill(pid, signal.SIGKILL)
    thread.join()
    assert metrics.exists()
    assert not (metrics.parent / OUTCOME).exists()
    assert (
        said
        == {
            "stopped": ["it was stopped"],
            "killed": ["its process ended with code -9; see log.txt in its directory"],
        }[how]
    )
