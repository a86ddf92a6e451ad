"""Signals, and standard streams that go away."""

import signal
import subprocess
import sys
import time

import pytest

# A C call of many seconds, within which Python's own signal handlers don't run.
STOPPED = """
import hashlib
from oapl_jax.tracking.progress import StopRequest
stop = StopRequest()
stop.waits_for = "the current step"
print("ready", flush=True)
hashlib.pbkdf2_hmac("sha256", b"", b"", 10**9)
"""
# Prints until stdout and stderr are gone, and shows by its exit code that it went on.
OUTLIVES = """
import os, sys, time
from oapl_jax.tracking.progress import Progress, keep_running_without_terminal, log
keep_running_without_terminal()
progress = Progress("train", 2000, 0)
for step in range(1, 2001):
    progress.step(step, {"loss": 1.0})
    log("x" * 100)
    print("y" * 100, file=sys.stderr)
with open(sys.argv[1], "w") as file:
    assert file.fileno() > 2
    file.write("all steps")
"""


def start(code, *arguments, **streams):
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.Popen(command, **streams)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_is_acknowledged_at_once_and_the_second_ends(number):
    process = start(STOPPED, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stderr is not None
    try:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(number)
        said = process.stderr.readline() + process.stderr.readline()
        assert number.name in said
        assert "the current step" in said
        assert process.poll() is None
        process.send_signal(number)
        assert process.wait(timeout=60) == 128 + number
    finally:
        process.kill()
        process.communicate()


def test_nohup_keeps_its_meaning():
    command = ["nohup", sys.executable, "-c", STOPPED]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, stdin=subprocess.DEVNULL
    )
    assert process.stdout is not None
    try:
        assert process.stdout.readline() == "ready\n"
        for _ in range(2):
            process.send_signal(signal.SIGHUP)
            time.sleep(0.2)
        assert process.poll() is None
    finally:
        process.kill()
        process.communicate()


def test_libraries_log_to_a_file_and_the_package_to_the_terminal(tmp_path):
    code = """
import logging, sys, warnings
from oapl_jax.tracking.progress import log, log_libraries_to
log_libraries_to(sys.argv[1])
logging.getLogger("orbax").error("of a library")
logging.getLogger("oapl_jax.data").warning("of the package")
warnings.warn("a warning")
log("a line")
"""
    path = tmp_path / "run" / "log.txt"
    process = start(code, path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.communicate() == ("a line\n", "of the package\n")
    content = path.read_text()
    assert all(part in content for part in ("of a library", "of the package", "a warning"))


@pytest.mark.parametrize("ends", ["pipe", "full", "closed"])
def test_a_run_outlives_its_terminal(tmp_path, ends):
    done = tmp_path / "done"
    if ends == "pipe":
        process = start(OUTLIVES, done, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        for stream in (process.stdout, process.stderr):
            assert stream is not None
            stream.read(100)
            stream.close()
    elif ends == "full":
        with open("/dev/full", "wb") as full:
            process = start(OUTLIVES, done, stdout=full, stderr=full)
    else:
        command = ["sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh", sys.executable, "-c", OUTLIVES, done]
        process = subprocess.Popen(command)
    assert process.wait(timeout=60) == 0
    assert done.read_text() == "all steps"
