"""A pool of processes that judge text from outside: spawned, limited, killed when late.

Each process is a program of its own (no fork of this process, no module of it), sees no
accelerator, and forks the worker that does the work (judge/supervisor.py). The worker is what a
deadline kills, so a hostile request costs its deadline and no new imports.
"""

import json
import os
import queue
import select
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from oapl_jax.errors import RunError, UserError

START_SECONDS = 120.0  # for the imports of a process, on a busy machine
GRACE_SECONDS = 30.0  # beyond the deadline that the process itself keeps
PATIENCE_SECONDS = 3600.0  # for a free process
MAX_REQUEST_BYTES = 1 << 15  # fits into a pipe at once


class Pool:
    """Processes that answer one request each at a time; every method is thread-safe.

    Args:
      program: folder or file that `python -I` runs; it calls `supervise` of judge/supervisor.py
        with the numbers that are its arguments.
      processes: how many.
      seconds: deadline of a request.
      recycle_after: requests after which a worker is replaced.
      memory_bytes: address space of a worker.

    Raises:
      UserError: for a number that is not above 0.
    """

    def __init__(
        self,
        program: Path,
        *,
        processes: int,
        seconds: float,
        recycle_after: int,
        memory_bytes: int,
    ):
        if min(processes, seconds, recycle_after, memory_bytes) <= 0:
            raise UserError(
                f"a pool of processes needs processes={processes}, seconds={seconds}, "
                f"recycle_after={recycle_after} and memory_bytes={memory_bytes} above 0"
            )
        self._command = [sys.executable, "-I", "-B", str(program)]
        self._command += [str(seconds), str(recycle_after), str(memory_bytes)]
        self._deadline = seconds + GRACE_SECONDS
        self._processes = processes
        self._closed = False
        self._free: queue.SimpleQueue[_Process] = queue.SimpleQueue()
        for _ in range(processes):
            self._free.put(_Process(self._command))

    def ask(self, request: Any) -> dict[str, Any]:
        """Judges one request, which is a JSON value.

        Returns:
          {"reply": value}, {"failed": "timeout"} or {"failed": "crash", "detail": why}.

        Raises:
          RunError: if no process starts or gets free, or the pool is closed.
          ValueError: if the request is too large.
        """
        line = json.dumps(request).encode() + b"\n"
        if len(line) > MAX_REQUEST_BYTES:
            raise ValueError(f"a request of {len(line)} bytes exceeds {MAX_REQUEST_BYTES}")
        process = self._next()
        try:
            if self._closed:
                raise RunError("the pool of processes is closed")
            reply = process.ask(line, self._deadline)
            if reply is None:  # the supervisor itself is gone or hangs
                process.kill()
                process = _Process(self._command)
                return {"failed": "crash", "detail": "the process ended"}
            return reply
        finally:
            self._free.put(process)

    def close(self) -> None:
        """Ends all processes, after the requests that they have; nothing is left behind."""
        self._closed = True
        for process in [self._next() for _ in range(self._processes)]:
            process.kill()
            self._free.put(process)  # whoever still waits gets a RunError

    def _next(self) -> "_Process":
        try:
            return self._free.get(timeout=PATIENCE_SECONDS)
        except queue.Empty:
            raise RunError(f"no process got free within {PATIENCE_SECONDS:.0f} s") from None

    def __enter__(self) -> "Pool":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _Process:
    """A supervisor with its worker: one session, so that one signal ends both."""

    def __init__(self, command: list[str]):
        # Nothing of this process's environment: no secrets, no accelerator, no Python settings.
        self._command = command
        environment = {"JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": "", "LANG": "C.UTF-8"}
        if libraries := os.environ.get("LD_LIBRARY_PATH"):  # of the Python that runs it
            environment["LD_LIBRARY_PATH"] = libraries
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
            env=environment,
            cwd="/",
            start_new_session=True,
        )
        self._ready = False
        self._buffer = b""

    def ask(self, line: bytes, seconds: float) -> dict[str, Any] | None:
        """The reply to one line; None if the process ended or is late.

        Raises:
          RunError: if the process does not start.
        """
        assert self._process.stdin
        if not self._ready:
            if self._line(START_SECONDS) is None:
                raise RunError(
                    f"the process {' '.join(self._command)} did not start; its errors are on "
                    "standard error"
                )
            self._ready = True
        try:
            self._process.stdin.write(line)
        except BrokenPipeError:
            return None
        reply = self._line(seconds)
        return None if reply is None else json.loads(reply)

    def kill(self) -> None:
        assert self._process.stdin
        assert self._process.stdout
        if self._process.returncode is None:  # not yet waited for: the id is still its own
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._process.stdin.close()
            self._process.stdout.close()

    def _line(self, seconds: float) -> bytes | None:
        assert self._process.stdout
        end = time.monotonic() + seconds
        poll = select.poll()
        poll.register(self._process.stdout, select.POLLIN)
        while b"\n" not in self._buffer:
            if not poll.poll(max(0.0, end - time.monotonic()) * 1000):
                return None
            if not (read := self._process.stdout.read(1 << 16)):
                return None
            self._buffer += read
        line, self._buffer = self._buffer.split(b"\n", 1)
        return line
