"""One process tree that can do nothing but compute: where programs of a policy run.

Two ways to build it, with the same walls:

    bubblewrap   the program `bwrap` of the package of that name
    namespaces   the same by the kernel's calls (`isolation.py`)

Mount, pid, network, IPC, UTS and cgroup namespaces of its own, in a user namespace or, if root
starts it, as a user that nobody else is; no capability, no new privileges; a file system of this
Python and the system's libraries, read-only, and a temporary folder in memory; no /proc; no
environment; no descriptor but pipes; limits of memory, CPU, files, threads; a syscall filter
without processes and sockets. The third way, `none`, has the limits and the filter only.

A sandbox is open for one program. Each of its tests runs in a process of its own, forked from one
that has never run the program (`sandbox_main.py`).
"""

import contextlib
import dataclasses
import json
import os
import platform
import select
import shutil
import signal
import struct
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

from oapl_jax.rewards.code.isolation import MACHINES
from oapl_jax.rewards.code.launch import Limits, NoSandbox, command, visible_paths

WAYS = ("bubblewrap", "namespaces")
END_SECONDS = 30.0  # that a killed sandbox may take to be gone

# Each line that it prints is a hole.
PROBE = """
import ctypes, os, socket, threading
visible, threads = input().split(), int(input())
if os.path.exists("/proc") or not set(os.listdir("/")) <= set(visible):
    print("the file system is visible")
if os.access("/", os.W_OK):
    print("the file system is writable")
if 0 in os.getresuid() + os.getresgid():
    print("it runs as root")
held = (ctypes.c_uint32 * 6)()
ctypes.CDLL(None).capget((ctypes.c_uint32 * 2)(0x20080522, 0), held)
if any(held):
    print("it has capabilities")
for name, attempt in (
    ("fork", os.fork),
    ("socket", socket.socket),
    ("exec", lambda: os.execv("/", ["x"])),
):
    try:
        attempt()
        print("no wall at", name)
    except OSError as error:
        if error.errno != 1:
            print("no wall at", name, "but", error)
go = threading.Event()
try:
    for _ in range(threads):
        threading.Thread(target=go.wait, daemon=True).start()
    print("threads are not limited")
except RuntimeError:
    pass
go.set()
"""


class Ended(Exception):
    """The program took its sandbox with it."""


class OutOfTime(Exception):
    """A test's seconds are over."""


class Sandbox:
    """A sandbox for one program; leave the `with` block and everything in it is killed.

    Args:
      way: "bubblewrap", "namespaces" or "none".
      limits: of each test.
      packages: names of installed packages that programs may import besides the standard library.
      start_seconds: deadline for the walls to stand.

    Raises:
      NoSandbox: if they do not, with the reason; no program was read yet.
    """

    def __init__(
        self, way: str, limits: Limits, *, packages: tuple[str, ...], start_seconds: float
    ):
        self._limits = limits
        # Only the way without walls leaves files outside; they are removed with it.
        self._folder = tempfile.mkdtemp() if way == "none" else None
        self._first: int | None = None  # a descriptor of the first process inside, to kill it by
        try:
            self._process = subprocess.Popen(
                command(way, limits, packages, self._folder or "/tmp"),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                env={},
                cwd="/",
                start_new_session=True,
            )
        except OSError as error:
            self._remove_folder()
            raise NoSandbox(str(error)) from error
        assert self._process.stdin
        assert self._process.stdout
        assert self._process.stderr
        self._in, self._out = self._process.stdin.fileno(), self._process.stdout.fileno()
        os.set_blocking(self._in, False)
        try:
            self._read(1, time.monotonic() + start_seconds)
        except OutOfTime as failure:
            self.close()
            raise NoSandbox(f"not up within {start_seconds} s (start_seconds)") from failure
        except Ended as failure:
            said = self._process.stderr.read().decode(errors="replace").strip()
            self.close()
            raise NoSandbox(said.split("\n")[-1] or "it ended without a word") from failure
        if way != "none":
            pid = self._process.pid
            try:
                child = Path(f"/proc/{pid}/task/{pid}/children").read_text()
                self._first = os.pidfd_open(int(child))
            except (OSError, ValueError) as failure:
                self.close()
                raise NoSandbox(f"its first process can't be found: {failure}") from failure

    def load(self, *, kind: str, name: str, code: str) -> None:
        """Takes the program in: `kind` and `name` as in `programs.Problem`."""
        program = {"kind": kind, "name": name, "code": code}
        self._write(json.dumps(program).encode(), time.monotonic() + self._limits.seconds_per_test)

    def run(self, text: str) -> tuple[int, bytes]:
        """Runs one test.

        Returns:
          Its exit code, negative for a signal, and what it wrote, at most `output_bytes`.

        Raises:
          OutOfTime: after `seconds_per_test`; the sandbox can only be closed then.
          Ended: if nothing answers any more; as above.
        """
        deadline = time.monotonic() + self._limits.seconds_per_test
        self._write(text.encode(errors="surrogatepass"), deadline)
        code, size = struct.unpack(">iI", self._read(8, deadline))
        if size > self._limits.output_bytes:
            raise Ended
        return code, self._read(size, deadline)

    def close(self) -> None:
        """Kills whatever runs, and returns when it is gone.

        Raises:
          NoSandbox: if it is not after END_SECONDS.
        """
        try:
            if self._first is not None:  # of its pid namespace: it takes all others along
                with contextlib.suppress(ProcessLookupError):
                    signal.pidfd_send_signal(self._first, signal.SIGKILL)
                if not self._comes(self._first, select.POLLIN, time.monotonic() + END_SECONDS):
                    raise NoSandbox(f"it did not end within {END_SECONDS} s of SIGKILL")
                self._process.wait(END_SECONDS)  # what started the first process ends after it
        except subprocess.TimeoutExpired as failure:
            raise NoSandbox(f"{failure.cmd[0]} did not end with its sandbox") from failure
        finally:
            if self._first is not None:
                os.close(self._first)
            if self._process.poll() is None:
                os.killpg(self._process.pid, signal.SIGKILL)
                self._process.wait(END_SECONDS)
            for pipe in (self._process.stdin, self._process.stdout, self._process.stderr):
                assert pipe
                pipe.close()
            self._remove_folder()

    def __enter__(self) -> "Sandbox":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _remove_folder(self) -> None:
        if self._folder:
            shutil.rmtree(self._folder, ignore_errors=True)

    def _write(self, content: bytes, deadline: float) -> None:
        left = memoryview(struct.pack(">I", len(content)) + content)
        while left:
            self._wait(self._in, select.POLLOUT, deadline)
            try:
                left = left[os.write(self._in, left) :]
            except BrokenPipeError as error:
                raise Ended from error

    def _read(self, size: int, deadline: float) -> bytes:
        parts = []
        while size:
            self._wait(self._out, select.POLLIN, deadline)
            part = os.read(self._out, min(size, 1 << 20))
            if not part:
                raise Ended
            parts.append(part)
            size -= len(part)
        return b"".join(parts)

    def _wait(self, descriptor: int, event: int, deadline: float) -> None:
        if not self._comes(descriptor, event, deadline):
            raise OutOfTime

    @staticmethod
    def _comes(descriptor: int, event: int, deadline: float) -> bool:
        waiting = select.poll()
        waiting.register(descriptor, event)
        return bool(waiting.poll(max(0.0, deadline - time.monotonic()) * 1000))


def hole(way: str, limits: Limits, *, packages: tuple[str, ...], start_seconds: float) -> str:
    """Runs a program that tries the walls of `way`: why it can't be used here, or "" if it can."""
    if platform.machine() not in MACHINES:
        return f"no syscall filter for {platform.machine()}"
    # A busy machine is no hole: the trial has as long as a sandbox has to come up.
    patient = max(limits.seconds_per_test, start_seconds)
    limits = dataclasses.replace(limits, seconds_per_test=patient)
    try:
        roots = {path.split("/")[1] for path in visible_paths(packages)} | {"tmp", "dev", "inside"}
        with Sandbox(way, limits, packages=packages, start_seconds=start_seconds) as sandbox:
            sandbox.load(kind="stdin", name="", code=PROBE)
            code, said = sandbox.run(f"{' '.join(roots)}\n{limits.processes + 1}\n")
    except NoSandbox as reason:
        return str(reason)
    except (Ended, OutOfTime) as failure:
        return f"a trial program did not end as it should ({type(failure).__name__})"
    if code:
        return f"a trial program ended with code {code}; are memory_bytes and processes too small?"
    return said.decode().strip().replace("\n", ", ")


def available(limits: Limits, *, packages: tuple[str, ...], start_seconds: float) -> list[str]:
    """The ways whose walls hold on this machine, the best first."""
    settings: dict[str, Any] = dict(packages=packages, start_seconds=start_seconds)
    return [way for way in WAYS if not hole(way, limits, **settings)]
