"""One training run at a time on a workdir."""

import contextlib
import dataclasses
import errno
import json
import os
import signal
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import pytest
from etils import epath
from small_runs import opened, small_arithmetic, typed

from oapl_jax import train
from oapl_jax.config import save_config
from oapl_jax.errors import RunError, UserError
from oapl_jax.weights import lease

OWNER = """
import os, sys, time
from etils import epath
from oapl_jax.weights import lease
with lease.hold(epath.Path(sys.argv[1]), log=print, lost=lambda error: os._exit(1)):
    print("held", flush=True)
    time.sleep(600)
"""


@contextlib.contextmanager
def owning(workdir, *, wait=True):
    """Another process that holds the workdir, and is killed at the end."""
    command = [sys.executable, "-c", OWNER, str(workdir)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        assert not wait or process.stdout.readline() == "held\n"
        yield process
    finally:
        process.kill()
        process.communicate()


@pytest.fixture
def owner(tmp_path):
    with owning(tmp_path) as process:
        yield process


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(lease, "RENEW", 0.1)
    monkeypatch.setattr(lease, "EXPIRE", 0.5)


def hold(workdir, lines=None, lost=None):
    append = lambda taker: (taker if taker is not None else []).append
    return lease.hold(epath.Path(workdir), log=append(lines), lost=append(lost))


def test_a_workdir_in_use_is_refused_and_named(owner, tmp_path):
    with pytest.raises(UserError, match=f"--workdir={tmp_path} .* process {owner.pid}"):
        hold(tmp_path).__enter__()
    assert owner.poll() is None
    assert json.loads((tmp_path / lease.FILE).read_text())["pid"] == owner.pid


def test_a_run_does_not_begin_beside_another(owner, tmp_path):
    config = typed(small_arithmetic({}))
    with pytest.raises(UserError, match=f"process {owner.pid}"):
        train.run(config, epath.Path(tmp_path), SimpleNamespace(requested=""))
    assert [path.name for path in tmp_path.iterdir()] == [lease.FILE]


def test_the_lease_of_a_killed_process_is_taken_over_with_a_line(owner, tmp_path):
    owner.send_signal(signal.SIGKILL)
    owner.wait()
    lines = []
    with hold(tmp_path, lines):
        pass
    (line,) = lines
    assert str(owner.pid) in line
    with hold(tmp_path, lines):  # released: nothing to take over
        pass
    assert len(lines) == 1
    assert not (tmp_path / lease.FILE).exists()


def test_the_lease_of_a_killed_process_that_nobody_waits_for_is_taken_over(owner, tmp_path):
    owner.send_signal(signal.SIGKILL)
    os.waitid(os.P_PID, owner.pid, os.WEXITED | os.WNOWAIT)  # it has ended, and stays a zombie
    lines = []
    with hold(tmp_path, lines):
        pass
    assert str(owner.pid) in lines[0]


def test_a_full_disk_at_a_takeover_names_the_lease(owner, tmp_path, monkeypatch):
    owner.send_signal(signal.SIGKILL)
    owner.wait()

    def write_text(path, text):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(type(epath.Path(tmp_path)), "write_text", write_text)
    with pytest.raises(OSError, match="No space left") as caught:
        hold(tmp_path).__enter__()
    assert caught.value.filename == str(tmp_path / lease.FILE)


def foreign(tmp_path, **changes):
    """Writes the lease of a process on another machine, whose clock is an hour ahead."""
    now = time.time() + 3600
    of = dict(owner="x", host="tpu-7", machine="other", pid=1, started="1", since=now, renewed=now)
    (tmp_path / lease.FILE).write_text(json.dumps(of | changes))


def test_a_lease_of_another_machine_counts_while_it_is_renewed(quick, tmp_path):
    ended = threading.Event()

    def renew():
        count = 0
        while not ended.wait(0.05):
            count += 1
            foreign(tmp_path, renewed=float(count))

    foreign(tmp_path)
    thread = threading.Thread(target=renew)
    thread.start()
    try:
        with pytest.raises(UserError, match="tpu-7"):
            hold(tmp_path).__enter__()
    finally:
        ended.set()
        thread.join()
    lines = []
    with hold(tmp_path, lines):
        assert "tpu-7" in lines[-1]


def test_a_lease_that_can_not_be_read_is_taken_over_with_a_line(quick, tmp_path):
    """As of a machine whose disk was full when it crashed."""
    (tmp_path / lease.FILE).touch()
    lines = []
    with hold(tmp_path, lines):
        assert lines
        assert json.loads((tmp_path / lease.FILE).read_text())["host"]


def test_the_run_with_the_lease_alone_replaces_a_model(tmp_path):
    """Of a workdir without config.json, whose model may be that of a refused run."""
    small, wide = (small_arithmetic({"model.architecture.hidden_size": n}) for n in (32, 64))
    assert opened(small, tmp_path).policy.config.hidden_size == 32
    assert opened(wide, tmp_path).policy.config.hidden_size == 32  # as of an evaluation beside it
    run = opened(wide, tmp_path)
    run.leased = True
    assert run.policy.config.hidden_size == 64
    save_config(epath.Path(tmp_path), run.config.to_dict())
    run = opened(small, tmp_path)
    run.leased = True
    assert run.policy.config.hidden_size == 64


@pytest.mark.parametrize("stale", [False, True])
def test_of_processes_that_start_at_once_one_goes_on(tmp_path, stale):
    """Also where they find the lease of a process that has ended."""
    if stale:
        with owning(tmp_path):
            pass
    with contextlib.ExitStack() as stack:
        processes = [stack.enter_context(owning(tmp_path, wait=False)) for _ in range(4)]
        give_up = time.monotonic() + 60
        alive = lambda: [process for process in processes if process.poll() is None]
        while len(alive()) > 1 and time.monotonic() < give_up:
            time.sleep(0.1)
        (one,) = alive()
        assert json.loads((tmp_path / lease.FILE).read_text())["pid"] == one.pid


def test_a_successor_that_was_killed_has_a_successor(tmp_path):
    """A takeover is a lease of its own, on the succession of one owner."""
    with owning(tmp_path):
        content = (tmp_path / lease.FILE).read_text()
    (tmp_path / f"{lease.FILE}.{json.loads(content)['owner']}").write_text(content)
    with hold(tmp_path):
        assert [path.name for path in tmp_path.iterdir()] == [lease.FILE]
    assert not list(tmp_path.iterdir())


def test_a_lease_that_is_released_meanwhile_is_free(quick, tmp_path):
    foreign(tmp_path)
    timer = threading.Timer(0.2, (tmp_path / lease.FILE).unlink)
    timer.start()
    lines = []
    with hold(tmp_path, lines):
        timer.join()
        assert json.loads((tmp_path / lease.FILE).read_text())["host"] != "tpu-7"
    assert len(lines) == 1  # that it waited; none was taken over


def test_a_process_whose_lease_was_taken_over_is_told(quick, tmp_path):
    lost = []
    with hold(tmp_path, lost=lost):
        foreign(tmp_path)
        give_up = time.monotonic() + 10
        while not lost and time.monotonic() < give_up:
            time.sleep(0.02)
        (error,) = lost
        assert isinstance(error, RunError)
    assert (tmp_path / lease.FILE).exists()  # the other's


def test_an_owner_renews_its_lease(quick, tmp_path):
    with hold(tmp_path):
        first = (tmp_path / lease.FILE).read_text()
        time.sleep(0.5)
        later = (tmp_path / lease.FILE).read_text()
    assert json.loads(first).keys() == {f.name for f in dataclasses.fields(lease.Lease)}
    assert json.loads(first)["renewed"] < json.loads(later)["renewed"]
