"""Hosts: their exchanges and their ends, with real processes on one machine."""

import itertools
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from oapl_jax import multihost
from oapl_jax.errors import HostLost, UserError

ROOT = Path(__file__).parent.parent
TALK = """
import os, pathlib, sys, tempfile, time
import jax
from jax.experimental import multihost_utils
from oapl_jax import multihost
from oapl_jax.errors import exit_with_code
from oapl_jax.tracking.metrics import CompileClock

host, coordinator, part = int(sys.argv[1]), sys.argv[2], sys.argv[3]
multihost.SILENCE, multihost.COORDINATOR_DEADLINE, multihost.LAST_MESSAGES = 6.0, 1.0, 4.0
multihost.JOIN_DEADLINE = 3 if part == "alone" else 60

def exchange():
    clock, programs = CompileClock(), []
    header, block = multihost.HEADER, multihost.BLOCK
    for count in (0, 1, header, header + 1, header + block, 10**6, 3 * 10**6):
        sizes = (count // 2, count)  # whoever says less is done first
        said = multihost.allgather_bytes(bytes([65 + host]) * sizes[host], "letters", deadline=30.0)
        assert said == [bytes([65 + i]) * size for i, size in enumerate(sizes)], count
        programs.append(clock.programs)
    assert programs == [1, 1, 1, 2, 2, 2, 2], programs  # of what goes first, and of a block
    assert multihost.allgather_set({host, 7}, "numbers", deadline=30.0) == {0, 1, 7}
    file = pathlib.Path(tempfile.gettempdir(), f"written by host 0 of {coordinator}")
    with multihost.host0_first("a file", deadline=30.0):
        assert file.exists() == bool(host)
        file.touch()
    multihost.barrier("the file", deadline=30.0)
    file.unlink(missing_ok=True)
    assert multihost.per_host_path("a.jsonl") == ("a.jsonl", "a.host1.jsonl")[host]

def main():
    multihost.initialize(pod=False, coordinator=coordinator, hosts=2, host=host)
    assert (jax.device_count(), jax.local_device_count()) == (8, 4)
    multihost.barrier("start", deadline=30.0)
    print("started", flush=True)
    if part == "exchanges":
        exchange()
    if part == "fails" and host == 1:
        raise ValueError("a mistake of the program")
    if part == "comes late" and host == 1:
        time.sleep(600)
    if part.startswith("waits"):
        time.sleep(600)
    if part == "hangs":
        with multihost.collective_section("an earlier step", deadline=30.0):
            pass
        if host == 1:
            time.sleep(600)
        with multihost.collective_section("gradient step 3", deadline=4.0):
            multihost_utils.process_allgather(0)
    multihost.barrier("end", deadline=4.0)

def ending():
    with multihost.abort_on_peer_failure():
        main()

exit_with_code(ending)
"""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


PARTS = (
    *("exchanges", "comes late", "hangs", "fails", "alone"),
    *("waits, 0 stops", "waits, 1 stops", "waits, 0 is killed", "waits, 1 aborts"),
)


@pytest.fixture(scope="module")
def talks() -> Iterator[dict[str, list[subprocess.Popen]]]:
    """Two processes for each part, all at once: most of their time they wait."""
    talks = {part: start(part) for part in PARTS}
    yield talks
    for process in itertools.chain(*talks.values()):
        process.kill()
        process.communicate()


def start(part: str) -> list[subprocess.Popen]:
    environment = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=4"}
    coordinator = f"127.0.0.1:{free_port()}"
    return [
        subprocess.Popen(
            [sys.executable, "-c", TALK, str(host), coordinator, part],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for host in ((1,) if part == "alone" else (0, 1))
    ]


def started(processes: list[subprocess.Popen]) -> list[subprocess.Popen]:
    for process in processes:
        line = process.stdout.readline() if process.stdout else ""
        assert line == "started\n", process.communicate()
    return processes


def assert_lost(process: subprocess.Popen, named: str) -> None:
    """The process exits by itself with code 4 and one error that matches `named`."""
    _, err = process.communicate(timeout=120)
    assert process.returncode == 4, err
    (said,) = [line for line in err.splitlines() if line.startswith("error: ")]
    assert re.search(named, said), err


def test_hosts_exchange_bytes_with_two_programs(talks):
    for process in talks["exchanges"]:
        _, err = process.communicate(timeout=120)
        assert process.returncode == 0, err


def test_a_host_that_comes_late_is_named(talks):
    first, second = talks["comes late"]
    waited = r"rollout\.deadline.* end: host 1"
    assert_lost(first, waited)
    assert_lost(second, f"host 0 .*{waited}")


def test_a_host_that_hangs_before_a_step_is_named_by_the_waiting_host(talks):
    first, second = talks["hangs"]
    waited = r"rollout\.deadline.* gradient step 3: host 1"
    assert_lost(first, waited)
    assert_lost(second, f"host 0 .*{waited}")


@pytest.mark.parametrize("lost", [0, 1])
def test_a_host_that_is_stopped_is_named(talks, lost):
    processes = started(talks[f"waits, {lost} stops"])
    processes[lost].send_signal(signal.SIGSTOP)
    assert_lost(processes[1 - lost], f"^error: host {lost}")


def test_a_host_0_that_is_killed_is_named(talks):
    first, second = started(talks["waits, 0 is killed"])
    first.kill()
    assert_lost(second, "^error: host 0")


def test_a_host_that_aborts_for_a_reason_of_its_own_does_so_and_is_named(talks):
    first, second = started(talks["waits, 1 aborts"])
    second.send_signal(signal.SIGABRT)
    assert_lost(first, "^error: host 1")
    _, err = second.communicate(timeout=120)
    assert second.returncode == -signal.SIGABRT
    assert "error: " not in err


def test_a_host_that_fails_ends_the_others_with_its_own_error_where_it_is(talks):
    first, second = talks["fails"]
    assert_lost(first, "^error: host 1 .*a mistake of the program")
    _, err = second.communicate(timeout=120)
    assert second.returncode == 1
    assert "ValueError: a mistake of the program" in err


def test_hosts_that_do_not_find_each_other_say_so(talks):
    (alone,) = talks["alone"]
    _, err = alone.communicate(timeout=120)
    assert alone.returncode == 4, err
    assert "error: the hosts " in err


def test_one_host_alone():
    multihost.initialize(pod=False, coordinator="", hosts=1, host=0)
    multihost.barrier("alone", deadline=0.1)
    assert multihost.allgather_bytes(b"mine", "bytes", deadline=0.1) == [b"mine"]
    assert multihost.allgather_set({3, 4}, "numbers", deadline=0.1) == {3, 4}


def test_what_another_host_writes_is_waited_for_until_the_deadline():
    looks = iter([False, False, True])
    multihost.wait_until(lambda: next(looks), "a marker", deadline=30.0)
    assert not list(looks)
    with pytest.raises(HostLost, match="a marker"):
        multihost.wait_until(lambda: False, "a marker", deadline=0.0)


@pytest.mark.parametrize(
    ("flags", "why"),
    [
        (dict(pod=True, coordinator="a:1", hosts=2, host=0), "--coordinator"),
        (dict(pod=True, coordinator="", hosts=2, host=0), "--hosts"),
        (dict(pod=False, coordinator="a:1", hosts=2, host=2), "--host=2"),
        (dict(pod=False, coordinator="", hosts=2, host=0), "--coordinator"),
        (dict(pod=False, coordinator="", hosts=1, host=1), "--coordinator"),
        (dict(pod=False, coordinator="10.0.0.1", hosts=2, host=1), "--coordinator=10.0.0.1"),
        (dict(pod=False, coordinator="a:²", hosts=2, host=1), "--coordinator=a:²"),
        (dict(pod=False, coordinator=":1234", hosts=2, host=1), "--coordinator=:1234"),
        (dict(pod=False, coordinator="a:99999", hosts=2, host=1), "--coordinator=a:99999"),
    ],
)
def test_flags_that_do_not_go_together(flags, why):
    with pytest.raises(UserError, match=why):
        multihost.initialize(**flags)


def test_a_port_in_use_is_named():
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(UserError, match=f"port {port}"):
            multihost.initialize(pod=False, coordinator=f"127.0.0.1:{port}", hosts=2, host=0)


def test_turns_come_in_the_order_in_which_they_are_asked_for():
    """With a lock, a thread that takes it again and again could starve the others."""
    turns, order, threads = multihost.Turns(), [], []

    def take(name):
        with turns, turns:
            order.append(name)

    with turns:
        for waiting, name in enumerate("abc"):
            threads.append(threading.Thread(target=take, args=name))
            threads[-1].start()
            while turns.waiting == waiting:
                time.sleep(0.001)
        assert order == []
    with turns:  # asked for last
        order.append("d")
    for thread in threads:
        thread.join()
    assert order == ["a", "b", "c", "d"]


def test_a_collective_section_has_the_turn_of_the_devices():
    taken = threading.Event()

    def sample():
        with multihost.turns:
            taken.set()

    with multihost.collective_section("gradient step 1", deadline=30.0):
        thread = threading.Thread(target=sample)
        thread.start()
        assert not taken.wait(0.1)
    thread.join()
    assert taken.is_set()
