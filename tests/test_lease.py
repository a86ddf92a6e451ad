"""One training run at a time on a workdir."""

import dataclasses
import json
import signal
import subprocess
import sys
import threading
import time

import pytest
from etils import epath

from oapl_jax import lease
from oapl_jax.errors import RunError, UserError

OWNER = """
import sys, time
from etils import epath
from oapl_jax import lease
with lease.hold(epath.Path(sys.argv[1]), log=print, lost=print):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def owner(tmp_path):
    """Another process that holds the workdir."""
    command = [sys.executable, "-c", OWNER, str(tmp_path)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate()


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
        assert len(lines) == 1


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
