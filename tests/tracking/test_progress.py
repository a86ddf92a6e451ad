"""Lines of progress, signals, and standard streams that go away."""

import contextlib
import fcntl
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import termios
import time

import pytest
from bucket import emulated

from oapl_jax.files import read_log
from oapl_jax.tracking.progress import command_again

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
    # With default signals: a command in the background or of nohup ignores some.
    command = ["env", "--default-signal", sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.Popen(command, **streams)


# Five steps, of which the second has an evaluation.
STEPS = """
import time
from oapl_jax.tracking.progress import Progress
progress = Progress("train", 5, 0)
for step in range(1, 6):
    line = {"reward": step / 10, "lag/mean": 3.0, "learner/tokens_per_second": 12345.6, "loss": 9.0}
    progress.step(step, line | ({"eval/pass@1": 0.5} if step == 2 else {}))
    time.sleep(0.3)
progress.close()
"""
VALUES = r"train 4/5  reward 0\.400  pass@1 0\.500  lag 3\.0  12,346 tokens/s  00:0\d left"


def test_redirected_there_are_plain_lines():
    process = start(STEPS, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    out, err = process.communicate(timeout=60)
    lines = out.splitlines()
    assert err == ""
    assert [line.split()[1] for line in lines] == [f"{step}/5" for step in range(1, 6)]
    assert re.fullmatch(VALUES, lines[3])
    assert "pass@1" not in lines[0]
    assert all("left" not in lines[i] for i in (0, 4))


def test_on_a_terminal_there_is_one_live_line():
    reader, writer = pty.openpty()
    fcntl.ioctl(writer, termios.TIOCSWINSZ, struct.pack("HHHH", 20, 90, 0, 0))
    process = start(STEPS, stdout=writer, stderr=writer)
    os.close(writer)
    said = b""
    with contextlib.suppress(OSError):  # the end of a terminal
        while part := os.read(reader, 4096):
            said += part
    os.close(reader)
    assert process.wait(timeout=60) == 0
    shown = said.decode().replace("\r\n", "\n")
    assert shown.count("\n") == 1  # at the end
    frames = [frame for frame in shown.strip().split("\r") if frame.strip()]
    assert len(frames) >= 5
    assert any(re.match(VALUES, frame) for frame in frames)
    assert all(len(frame) <= 90 for frame in frames)


def test_the_command_that_goes_on_is_the_command_without_the_step_to_go_back_to(monkeypatch):
    command = [
        "/usr/bin/python",
        "-m",
        "oapl_jax.train",
        "--workdir=runs/my run",
        "--restore_step=3",
    ]
    monkeypatch.setattr(sys, "orig_argv", [*command, "--config=c.py", "--restore_step", "4"])
    expected = "python -m oapl_jax.train '--workdir=runs/my run' --config=c.py"
    assert command_again() == expected


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
from oapl_jax.tracking.progress import log, queue_library_logs, write_library_logs
queued = queue_library_logs()
logging.getLogger("orbax").error("of a library, %s", "before")
with write_library_logs(queued, sys.argv[1]):
    try:
        1 / 0
    except ArithmeticError:
        logging.getLogger("orbax").exception("of a library, after")
    logging.getLogger("oapl_jax.data").warning("of the package")
    warnings.warn("a warning")
    log("a line")
"""
    path = tmp_path / "run" / "log.txt"
    process = start(code, path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.communicate() == ("a line\n", "of the package\n")
    lines = ["library, before", "library, after", "ZeroDivision", "of the package", "a warning"]
    content = path.read_text()
    assert sorted(lines, key=content.index) == lines


def test_a_client_of_a_store_that_logs_meanwhile_is_not_waited_for():
    """gcsfs warns from the thread that carries out the log's own requests."""
    code = """
import logging, sys, threading
import fsspec.asyn
from oapl_jax import files
from oapl_jax.tracking.progress import queue_library_logs, write_library_logs

files.SEGMENT_BYTES = 64
loop, said = fsspec.asyn.get_loop(), threading.Event()

def warn(left):
    logging.getLogger("gcsfs").warning("a warning")
    loop.call_later(0.001, warn, left - 1) if left else said.set()

with write_library_logs(queue_library_logs(), sys.argv[1]):
    loop.call_soon_threadsafe(warn, 100)
    for _ in range(20):
        logging.getLogger("orbax").error("an error")
    said.wait()
"""
    with emulated("said") as bucket:
        path = bucket / "log.txt"
        assert start(code, path).wait(timeout=60) == 0
        content = b"".join(read_log(path))
    assert content.count(b"a warning") == 101
    assert content.count(b"an error") == 20


def test_a_command_without_stdout_ends_well():
    code = """
from oapl_jax.errors import exit_with_code
from oapl_jax.tracking.progress import log
exit_with_code(lambda: log("a line"))
"""
    command = ["sh", "-c", 'exec "$@" >&-', "sh", sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")


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
