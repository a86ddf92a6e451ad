"""A worker process behind two pipes: frames with deadlines, and a hard kill.

The judge of mathematical answers and the sandbox of programs are made of these. The judge's own
processes import this module, so it needs the standard library only. A frame is the length of its
content (4 bytes, big-endian) and the content. Deadlines are times of the monotonic clock.
"""

import abc
import os
import select
import signal
import struct
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from typing import BinaryIO

MAX_FRAME_BYTES = 1 << 16  # of a reply; a worker is not trusted


class Late(Exception):
    """A deadline passed; the worker can only be killed."""


class Ended(Exception):
    """The worker closed its pipe, or sent no frame."""


def frame(content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + content


def read_frame(file: BinaryIO) -> bytes | None:
    """Reads the next frame, without a deadline; None at the end of the file."""
    header = file.read(4)
    return file.read(struct.unpack(">I", header)[0]) if len(header) == 4 else None


class WorkerProcess(abc.ABC):
    """A child process that reads requests from one pipe and writes replies to another.

    Methods raise Late at their deadline, and Ended if the worker reads or writes no more. The
    hang-up of the pipe `hangup`, noticed while waiting for the worker, ends this process.
    """

    def __init__(self, requests: int, replies: int, hangup: int | None = None):
        self._requests, self._replies, self._hangup = requests, replies, hangup
        self._exit_code: int | None = None
        os.set_blocking(requests, False)

    def send(self, content: bytes, deadline: float) -> None:
        left = memoryview(frame(content))
        while left:
            self._wait(self._requests, select.POLLOUT, deadline)
            try:
                left = left[os.write(self._requests, left) :]
            except BrokenPipeError as error:
                raise Ended from error

    def receive(self, deadline: float) -> bytes:
        """Reads a frame of at most MAX_FRAME_BYTES."""
        (size,) = struct.unpack(">I", self.read(4, deadline))
        if size > MAX_FRAME_BYTES:
            raise Ended
        return self.read(size, deadline)

    def read(self, size: int, deadline: float) -> bytes:
        """Reads exactly `size` bytes."""
        parts = []
        while size:
            self._wait(self._replies, select.POLLIN, deadline)
            part = os.read(self._replies, min(size, 1 << 20))
            if not part:
                raise Ended
            parts.append(part)
            size -= len(part)
        return b"".join(parts)

    def kill(self) -> int:
        """Ends the worker by SIGKILL and waits for it; its exit code, negative for a signal."""
        if self._exit_code is None:  # not yet waited for: the process id is still its own
            self._exit_code = self._kill()
        return self._exit_code

    @abc.abstractmethod
    def _kill(self) -> int:
        """Ends the worker, which has not been waited for; its exit code."""

    def _wait(self, descriptor: int, event: int, deadline: float) -> None:
        poll = select.poll()
        poll.register(descriptor, event)
        if self._hangup is not None:
            poll.register(self._hangup, 0)
        ready = dict(poll.poll(max(0.0, deadline - time.monotonic()) * 1000))
        if self._hangup in ready:
            raise SystemExit
        if not ready:
            raise Late


class SpawnedWorker(WorkerProcess):
    """A worker that runs a command in a session of its own, which is killed as a whole; `env` is
    all of its environment."""

    def __init__(
        self,
        command: Sequence[str],
        env: Mapping[str, str],
        stderr: int | None = None,
        cwd: str = "/",
    ):
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=stderr,
            bufsize=0,
            env=env,
            cwd=cwd,
            start_new_session=True,
        )
        assert self.process.stdin
        assert self.process.stdout
        super().__init__(self.process.stdin.fileno(), self.process.stdout.fileno())

    def _kill(self) -> int:
        if self.process.returncode is None:
            os.killpg(self.process.pid, signal.SIGKILL)
        code = self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout, self.process.stderr):
            if pipe:
                pipe.close()
        return code


class ForkedWorker(WorkerProcess):
    """A fork of this process, which must have a single thread: it calls `serve` with its ends of
    the pipes of requests and replies, and exits."""

    def __init__(self, serve: Callable[[int, int], None], hangup: int):
        in_worker, requests = os.pipe()
        replies, from_worker = os.pipe()
        self._pid = os.fork()
        if not self._pid:
            code = 1
            try:
                os.close(requests)
                os.close(replies)
                serve(in_worker, from_worker)
                code = 0
            finally:
                os._exit(code)
        os.close(in_worker)
        os.close(from_worker)
        super().__init__(requests, replies, hangup)

    def _kill(self) -> int:
        os.kill(self._pid, signal.SIGKILL)
        code = os.waitstatus_to_exitcode(os.waitpid(self._pid, 0)[1])
        os.close(self._requests)
        os.close(self._replies)
        return code
