"""The main loop of a judge process: a supervisor that forks, limits and kills its worker.

The supervisor has imported everything and passes requests on unread. It replaces the worker when an
answer is late or after so many. It has one thread, so a fork is safe and takes milliseconds.
"""

import json
import os
import re
import resource
import signal
import sys
import time
from collections.abc import Callable

from oapl_jax.rewards.worker_process import Ended, ForkedWorker, Late, frame, read_frame

GRACE = 5.0  # seconds past the deadline until SIGALRM ends an orphaned worker
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
    judge: Callable, *, generated: re.Pattern, seconds: float, recycle_after: int, memory_bytes: int
) -> None:
    """Answers the frames of standard input until it ends, after an empty frame when it is ready.

    Each frame is a JSON value, and so is the reply: {"reply": judge(value)}, {"failed": "timeout"}
    or {"failed": "crash", "detail": why}.

    Args:
      judge: JSON value -> JSON value.
      generated: the only texts that the judge's libraries may turn into code.
      seconds, recycle_after: deadline of a request; requests before a worker is replaced.
      memory_bytes: address space of a worker.
    """

    def serve(requests: int, replies: int) -> None:
        _confine(generated, memory_bytes)
        _answer(judge, requests, replies, seconds)

    fork = lambda: ForkedWorker(serve, hangup=sys.stdin.fileno())
    worker, answered = fork(), 0
    try:
        _write(sys.stdout.fileno(), b"")
        while (request := read_frame(sys.stdin.buffer)) is not None:
            deadline, answered = time.monotonic() + seconds, answered + 1
            over = answered == recycle_after
            try:
                worker.send(request, deadline)
                reply = worker.receive(deadline)
            except Late:
                over, reply = True, b'{"failed": "timeout"}'
            except Ended:
                detail = f"the worker ended with {worker.kill()}"
                over, reply = True, json.dumps({"failed": "crash", "detail": detail}).encode()
            if over:
                worker.kill()
            _write(sys.stdout.fileno(), reply)
            if over:
                worker, answered = fork(), 0
    finally:
        worker.kill()


def _confine(generated: re.Pattern[str], memory_bytes: int) -> None:
    """Irreversibly drops this process's streams, and limits its memory and its audit events."""
    nothing = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(nothing, descriptor)
    limits = {resource.RLIMIT_AS: memory_bytes, resource.RLIMIT_CORE: 0, resource.RLIMIT_FSIZE: 0}
    for limit, value in limits.items():
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


def _answer(judge: Callable, request: int, reply: int, seconds: float) -> None:
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    with open(request, "rb") as requests:
        while (content := read_frame(requests)) is not None:
            # If the supervisor itself was killed, this ends the worker.
            signal.setitimer(signal.ITIMER_REAL, seconds + GRACE)
            try:
                answer = {"reply": judge(json.loads(content))}
            except MemoryError:
                answer = {"failed": "crash", "detail": "out of memory"}
            except (Refused, Exception) as error:
                name = "" if isinstance(error, Refused) else f"{type(error).__name__}: "
                answer = {"failed": "crash", "detail": f"{name}{error}"[:200]}
            _write(reply, json.dumps(answer).encode())
            signal.setitimer(signal.ITIMER_REAL, 0)


def _write(descriptor: int, content: bytes) -> None:
    os.write(descriptor, frame(content))  # to a pipe that blocks
