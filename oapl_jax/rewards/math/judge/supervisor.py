"""One process that answers, and one that kills it: what a pool's process does.

The supervisor imports everything once, forks a worker, passes it one line at a time, and kills it
when an answer takes too long or after so many answers. It has one thread, so a fork is safe and a
new worker costs milliseconds. It never looks into what it passes on.
"""

import contextlib
import json
import os
import re
import resource
import select
import signal
import sys
from collections.abc import Callable
from typing import Any

GRACE = 5.0  # seconds after which a worker that nobody killed ends itself
# Audit events that no honest answer causes; reading a module that is imported late causes others.
REFUSED_EVENTS = re.compile(
    r"(?:subprocess|socket|shutil|ctypes|pty|webbrowser|urllib|tempfile)\..*|os\.(?:system|exec|spawn|"
    r"posix_spawn|fork|forkpty|kill|killpg|remove|rename|rmdir|mkdir|link|symlink|truncate|chmod|"
    r"chown|chflags|lockf|putenv|unsetenv|setxattr|removexattr|utime|startfile)"
)


class Refused(BaseException):
    """The judge was about to run text or to touch the machine; not an Exception, so that no
    library swallows it."""


def supervise(
    judge: Callable[[Any], Any],
    *,
    generated: re.Pattern[str],
    seconds: float,
    recycle_after: int,
    memory_bytes: int,
) -> None:
    """Answers the lines of standard input until it ends.

    Each line is a JSON value and gets one line: {"reply": judge(value)}, or {"failed": "timeout"},
    or {"failed": "crash", "detail": why}.

    Args:
      judge: JSON value -> JSON value.
      generated: the only texts that the judge's libraries may turn into code.
      seconds: deadline of a line.
      recycle_after: lines after which a worker is replaced.
      memory_bytes: address space of a worker.
    """
    fork = lambda: Worker(judge, generated, seconds, memory_bytes)
    worker, answered = fork(), 0
    requests, replies = sys.stdin.buffer, sys.stdout.buffer
    try:
        replies.write(b'{"ready": true}\n')
        replies.flush()
        while line := requests.readline():
            reply = worker.ask(line, requests.fileno(), seconds)
            answered += 1
            over = reply is None or answered == recycle_after
            if over:
                worker.kill()
            if reply is None:
                reply = worker.failure()
            replies.write(reply)
            replies.flush()
            if over:
                worker, answered = fork(), 0
    finally:
        worker.kill()


class Worker:
    """A forked process that runs the judge on each line it gets."""

    def __init__(
        self,
        judge: Callable[[Any], Any],
        generated: re.Pattern[str],
        seconds: float,
        memory_bytes: int,
    ):
        request_read, self._requests = os.pipe()
        self._replies, reply_write = os.pipe()
        self._status: int | None = None
        self._late = False
        self._pid = os.fork()
        if not self._pid:
            code = 1
            try:
                os.close(self._requests)
                os.close(self._replies)
                _confine(generated, memory_bytes)
                _serve(judge, request_read, reply_write, seconds)
                code = 0
            finally:
                os._exit(code)
        os.close(request_read)
        os.close(reply_write)

    def ask(self, line: bytes, parent: int, seconds: float) -> bytes | None:
        """The worker's line; None if it was late or ended."""
        with contextlib.suppress(BrokenPipeError):
            os.write(self._requests, line)  # within the pipe's 64 KB: never blocks
        poll = select.poll()
        poll.register(self._replies, select.POLLIN)
        poll.register(parent, select.POLLIN)  # nothing comes while it waits: readable is closed
        ready = dict(poll.poll(seconds * 1000))
        if parent in ready:
            raise SystemExit
        if not ready:
            self._late = True
            return None
        reply = os.read(self._replies, 1 << 16)
        return reply if reply.endswith(b"\n") else None

    def kill(self) -> None:
        """Ends the worker, whatever it does, and waits until it is gone."""
        if self._status is None:
            os.kill(self._pid, signal.SIGKILL)  # not yet waited for: the id is still its own
            self._status = os.waitpid(self._pid, 0)[1]
            os.close(self._requests)
            os.close(self._replies)

    def failure(self) -> bytes:
        if self._late:
            return b'{"failed": "timeout"}\n'
        detail = f"the worker ended with {os.waitstatus_to_exitcode(self._status or 0)}"
        return json.dumps({"failed": "crash", "detail": detail}).encode() + b"\n"


def _confine(generated: re.Pattern[str], memory_bytes: int) -> None:
    """Takes from this process what no judge needs; there is no way back."""
    nothing = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(nothing, descriptor)
    for limit, value in (
        (resource.RLIMIT_AS, memory_bytes),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_FSIZE, 0),
    ):
        resource.setrlimit(limit, (value, value))

    def refuse(event: str, details: tuple) -> None:
        if event == "compile":
            source, name = details
            text = source.decode() if isinstance(source, bytes) else str(source)
            bad = str(name).startswith("<") and not generated.fullmatch(text)
        elif event == "open":
            bad = details[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        else:
            bad = REFUSED_EVENTS.fullmatch(event)
        if bad:
            raise Refused(f"refused: {event} {str(details[:1])[:80]}")

    sys.addaudithook(refuse)


def _serve(judge: Callable[[Any], Any], request: int, reply: int, seconds: float) -> None:
    """Runs the judge on each line of `request` until it ends."""
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    with open(request, "rb") as requests:
        while line := requests.readline():
            # If the supervisor itself was killed, this ends the worker.
            signal.setitimer(signal.ITIMER_REAL, seconds + GRACE)
            try:
                answer = {"reply": judge(json.loads(line))}
            except MemoryError:
                answer = {"failed": "crash", "detail": "out of memory"}
            except Refused as refused:
                answer = {"failed": "crash", "detail": str(refused)}
            except Exception as error:
                answer = {"failed": "crash", "detail": f"{type(error).__name__}: {error}"[:200]}
            os.write(reply, json.dumps(answer).encode() + b"\n")
            signal.setitimer(signal.ITIMER_REAL, 0)
