r"""Verifies mathematical answers: compares a response's final answer with the reference.

Responses are untrusted input: the answer is extracted in linear time, plain numbers are compared
here, and all else goes to judge processes, spawned without this process's modules or environment.
Each imports the judge once and forks the worker that answers (judge/supervisor.py). A deadline
kills the worker only, so a hostile answer costs its deadline and no new imports. A late answer gets
reward 0 but counts as "timeout", not as wrong.
"""

import functools
import json
import os
import queue
import sys
import threading
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal, NamedTuple

from oapl_jax.config import MathRewardConfig
from oapl_jax.errors import RunError
from oapl_jax.rewards.math.extraction import MAX_ANSWER, canonical, final_answer, tidy
from oapl_jax.rewards.math.judge.text_answers import agree, number
from oapl_jax.rewards.worker_process import Ended, Late, SpawnedWorker

START_SECONDS = 120.0  # for the imports of a process, on a busy machine
GRACE_SECONDS = 30.0  # beyond the deadline that the process itself keeps
PATIENCE_SECONDS = 3600.0  # for a free process
MAX_REQUEST_BYTES = 1 << 15
JUDGE = ("-m", "oapl_jax.rewards.math.judge")


class MathVerdict(NamedTuple):
    """The outcome of an answer, and its reason for people and logs. "wrong" is also a missing or
    unreadable answer; at an "error" the reference can't be read, or the judge lacked memory."""

    outcome: Literal["right", "wrong", "timeout", "error"]
    reason: str

    @property
    def reward(self) -> float:
        return float(self.outcome == "right")


class MathVerifier:
    """Judges answers in a pool of processes; every method is thread-safe."""

    def __init__(self, config: MathRewardConfig):
        self.extract = functools.partial(final_answer, thinking_opened=config.thinking_opened)
        self._pool = JudgePool(config)
        self._threads = ThreadPoolExecutor(config.processes, "answers")
        self._counts: Counter[str] = Counter()
        self._lock = threading.Lock()

    def verify(self, response: str, answer: str) -> MathVerdict:
        return self.verify_many([(response, answer)])[0]

    def verify_many(self, pairs: Sequence[tuple[str, str]]) -> list[MathVerdict]:
        """Judges pairs of response and reference answer, equal ones once."""
        extracted = [(self.extract(response), tidy(answer)) for response, answer in pairs]
        verdicts = {pair: compare_plain(*pair) for pair in extracted}
        left = [(a, r) for (a, r), verdict in verdicts.items() if a is not None and not verdict]
        each = map if len(left) < 2 else self._threads.map
        verdicts |= dict(zip(left, each(self._ask_judge, left), strict=True))
        found = [verdict for pair in extracted if (verdict := verdicts[pair])]
        with self._lock:
            self._counts.update(verdict.outcome for verdict in found)
        return found

    def final_answer(self, response: str) -> str:
        """A response's final answer for a vote: equal strings are equal answers; "" is none."""
        return canonical(self.extract(response) or "")

    def counts(self) -> dict[str, int]:
        with self._lock:
            return dict(self._counts)

    def close(self) -> None:
        self._threads.shutdown()
        self._pool.close()

    def _ask_judge(self, pair: tuple[str, str]) -> MathVerdict:
        reply = self._pool.ask(pair)
        if "reply" in reply:
            return MathVerdict(*reply["reply"])
        if reply["failed"] == "timeout":
            return MathVerdict("timeout", "the deadline passed")
        return MathVerdict("error", reply["detail"])


def compare_plain(answer: str | None, reference: str) -> MathVerdict | None:
    """Compares missing, equal and plainly numeric answers; None if the judge has to decide."""
    if answer is None:
        return MathVerdict("wrong", f"no final answer of at most {MAX_ANSWER} characters")
    if len(reference) > MAX_ANSWER:
        return MathVerdict("error", f"the reference is longer than {MAX_ANSWER} characters")
    if answer == reference:
        return MathVerdict("right", "the same text")
    a, r = number(answer), number(reference)
    if a is None or r is None:
        return None
    if agree(a, r, decimal="." in answer + reference):
        return MathVerdict("right", "the same number")
    return MathVerdict("wrong", f"differs from {reference}")


class JudgePool:
    """Processes that answer one request each at a time; every method is thread-safe. `program`
    is the arguments of Python that name a program which calls `supervise`."""

    def __init__(self, config: MathRewardConfig, program: Sequence[str] = JUDGE):
        # -s -P -B: no user site, no current directory, no bytecode is written.
        self._command = [sys.executable, "-s", "-P", "-B", *program]
        self._command += map(str, (config.seconds, config.recycle_after, config.memory_bytes))
        self._deadline = config.seconds + GRACE_SECONDS
        self._processes = config.processes
        self._closed = False
        self._free: queue.SimpleQueue[_JudgeProcess] = queue.SimpleQueue()
        for _ in range(config.processes):
            self._free.put(_JudgeProcess(self._command))

    def ask(self, request: Any) -> dict[str, Any]:
        """Sends a request, a JSON value, to a free process; the reply is as of `supervise`.

        RunError if no process starts or gets free, or the pool is closed; ValueError if the request
        is too large.
        """
        content = json.dumps(request).encode()
        if len(content) > MAX_REQUEST_BYTES:
            raise ValueError(f"a request of {len(content)} bytes exceeds {MAX_REQUEST_BYTES}")
        process = self._next()
        try:
            if self._closed:
                raise RunError("the pool of judge processes is closed")
            return json.loads(process.ask(content, self._deadline))
        except (Ended, Late):  # the supervisor itself is gone or hangs
            process.kill()
            process = _JudgeProcess(self._command)
            return {"failed": "crash", "detail": "the process ended"}
        finally:
            self._free.put(process)

    def close(self) -> None:
        """Ends all processes after the requests that they have."""
        self._closed = True
        for process in [self._next() for _ in range(self._processes)]:
            process.kill()
            self._free.put(process)  # a thread that still waits gets a RunError

    def _next(self) -> "_JudgeProcess":
        try:
            return self._free.get(timeout=PATIENCE_SECONDS)
        except queue.Empty:
            raise RunError(f"no judge process got free within {PATIENCE_SECONDS:.0f} s") from None


class _JudgeProcess(SpawnedWorker):
    """A supervisor with its forked worker, in one session."""

    def __init__(self, command: Sequence[str]):
        # No secrets, no accelerator and no Python settings of this process.
        env = {"JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": "", "LANG": "C.UTF-8"}
        env["PYTHONPATH"] = str(Path(__file__).parents[3])
        if libraries := os.environ.get("LD_LIBRARY_PATH"):  # of the Python that runs it
            env["LD_LIBRARY_PATH"] = libraries
        super().__init__(command, env)
        self._ready = False

    def ask(self, content: bytes, seconds: float) -> bytes:
        if not self._ready:
            try:
                self.receive(time.monotonic() + START_SECONDS)
            except (Ended, Late):
                raise RunError("a judge process did not start; see standard error") from None
            self._ready = True
        deadline = time.monotonic() + seconds
        self.send(content, deadline)
        return self.receive(deadline)
