"""The ground of the soak test, in namespaces of its own: disk, network, clock, processes."""

import json
import pathlib
import subprocess
import sys

import pytest

SCRIPT = '''
import json, os, pathlib, socket, subprocess, sys, time
import places

places.enter_namespaces()
directory = pathlib.Path(sys.argv[1])
found = {}

disk = places.Disk(directory / "disk")
def writes():
    try:
        (disk.path / "file").write_bytes(bytes(1 << 20))
        return True
    except OSError:
        return False
found["disk"] = [writes()]
for change in (disk.fill, disk.free):
    (disk.path / "file").unlink()
    change()
    found["disk"].append(writes())

network = places.Network(1)
listen = "import socket; s = socket.create_server((%r, 80)); s.accept(); input()" % network.address
server = subprocess.Popen(network.command(sys.executable, "-c", listen), stdin=subprocess.PIPE)
def connects():
    try:
        socket.create_connection((network.address, 80), timeout=1).close()
        return True
    except OSError:
        return False
while not connects():
    assert server.poll() is None
network.cut()
found["network"] = [connects()]
network.mend()  # the machine's hardware address may have to be asked for again
found["network"].append(any(connects() for _ in range(20)))

clock = places.Clock(directory)
code = """
import ctypes, platform
from time import monotonic, time

before = time()
print(flush=True)
input()
print(time() - before, monotonic())
libc, condition, mutex = ctypes.CDLL(None), ctypes.create_string_buffer(64), bytes(64)
futex = {"x86_64": 202, "aarch64": 98}[platform.machine()]
waits = {  # of pthreads and, bitset and private, of Abseil
    "condition": lambda until: libc.pthread_cond_timedwait(condition, mutex, until),
    "futex": lambda until: libc.syscall(futex, bytes(4), 9 | 128 | 256, 0, until, None, -1),
}
libc.pthread_mutex_lock(mutex)
for wait in waits.values():
    started, until = monotonic(), (ctypes.c_long * 2)(int(time()) + 2)
    wait(until)
    print(monotonic() - started)
"""
environment = {**os.environ, **clock.environment}
pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
reader = subprocess.Popen([sys.executable, "-c", code], env=environment, **pipes)
reader.stdout.readline()  # it has read the clock
clock.set(-86400)
jump, monotonic, *waited = map(float, reader.communicate("\\n")[0].split())
found["clock"] = [jump, monotonic - time.monotonic()]
found["waits"] = waited

found["processes"] = [list(places.running()) == [server.pid]]
server.kill()
server.wait()
found["processes"].append(not places.running())
print(json.dumps(found))
'''


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    directory = tmp_path_factory.mktemp("ground")
    (directory / "script.py").write_text(SCRIPT)
    done = subprocess.run(
        [sys.executable, directory / "script.py", directory],
        env={"PATH": "/usr/sbin:/usr/bin:/bin", "PYTHONPATH": str(pathlib.Path(__file__).parent)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_a_disk_is_full_until_it_is_freed(found):
    assert found["disk"] == [True, False, True]


def test_a_machine_is_unreachable_until_its_cable_is_mended(found):
    assert found["network"] == [False, True]


def test_the_wall_clock_jumps_in_a_running_process_and_the_monotonic_one_does_not(found):
    jump, monotonic = found["clock"]
    assert jump == pytest.approx(-86400, abs=10)
    assert abs(monotonic) < 10


def test_waits_for_a_time_of_the_clock_that_jumped_end_at_that_time(found):
    assert [1 <= seconds < 10 for seconds in found["waits"]] == [True, True]


def test_processes_of_the_namespace_are_found(found):
    assert found["processes"] == [True, True]
