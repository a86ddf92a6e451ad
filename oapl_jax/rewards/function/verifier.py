"""Rewards by a user's Python function: record and response text in, a number or named parts out.

    def reward(record, response):
        return float(response.strip() == record["answer"])

`config.rewards.function` names it, "my_module:reward". Its calls run in a pool of processes, each
of which imports the module once; a call that passes its deadline costs its process. A function
with the attribute `cheap = True` is called in this process, without a deadline. A call that fails
gets reward 0 and is counted apart from wrong responses.
"""

import difflib
import inspect
import json
import logging
import math
import os
import queue
import sys
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from oapl_jax.config import FunctionPoolConfig, nearest
from oapl_jax.errors import RunError, UserError, one_line
from oapl_jax.rewards.function.worker import call, failure, import_module
from oapl_jax.rewards.worker_process import Ended, Late, SpawnedWorker
from oapl_jax.structs import Prompt

log = logging.getLogger(__name__)
tracebacks = logging.getLogger("reward_function")  # outside the package: not for the terminal

START_SECONDS = 300.0  # for the imports of a process, on a busy machine
PATIENCE_SECONDS = 3600.0  # for a free process
SHOWN_KINDS = 20  # of errors; more are only counted
TIMEOUT, ENDED = "timeout", "ProcessEnded"
# Errors after which a process is replaced; one that lacked memory would fail the next calls too.
FATAL = (TIMEOUT, ENDED, "MemoryError")


class FunctionVerdict(NamedTuple):
    """The outcome of a call: right is a reward of at least 1; at an error or a timeout it is 0."""

    outcome: Literal["right", "wrong", "error", "timeout"]
    reward: float
    parts: Mapping[str, float]  # as named by the function; none for a single number
    reason: str


def find_function(name: str) -> Callable[[dict[str, Any], str], Any]:
    """Imports the function that `rewards.function` names, from the working directory first.

    Raises:
      UserError: for a module that can't be imported, a name that it lacks, or a function that does
        not take a record and a response.
    """
    module, _, attribute = name.partition(":")
    setting = f"rewards.function={name!r}"
    if not (module and attribute) or module.endswith(".py"):
        raise UserError(
            f"{setting} names no function of a module; write it as my_module:reward, for the "
            "function `reward` of my_module.py in the working directory"
        )
    try:
        imported = import_module(module)
    except (Exception, SystemExit) as error:  # the module is a program and raises anything
        where = failure(error)["where"]
        raise UserError(
            f"{setting}: {module} can't be imported from {os.getcwd()} ({one_line(error)}"
            f"{', ' * bool(where)}{where}){_near_modules(module, error)}"
        ) from error
    if not hasattr(imported, attribute):
        names = [n for n, value in vars(imported).items() if callable(value)]
        raise UserError(f"{setting}: {module} has no {attribute}{nearest(attribute, names)}")
    function = getattr(imported, attribute)
    try:
        inspect.signature(function).bind({}, "")
    except TypeError as error:
        raise UserError(
            f"{setting} must be a function of two arguments, record and response ({error})"
        ) from error
    except ValueError:  # written in C, without a signature
        pass
    return function


def source_files(name: str) -> list[Path]:
    """The Python file of the function's module, if it has one: part of the grader's identity."""
    find_function(name)
    file = Path(getattr(sys.modules[name.partition(":")[0]], "__file__", None) or "")
    return [file] if file.suffix == ".py" else []


def _near_modules(module: str, error: BaseException) -> str:
    """Modules of the working directory that resemble a misspelt one, as the end of a sentence."""
    if not isinstance(error, ModuleNotFoundError) or error.name != module.partition(".")[0]:
        return "; correct it"
    near = difflib.get_close_matches(module, [path.stem for path in Path().glob("*.py")], n=3)
    return (
        f"; did you mean {' or '.join(near)}?" if near else "; start in the directory that has it"
    )


class FunctionVerifier:
    """Calls the function, and counts and shows its errors; every method is thread-safe.

    Args:
      name: "module:function", see `find_function`.
      config: of the pool, whose processes start when they are first needed.
    """

    def __init__(self, name: str, config: FunctionPoolConfig):
        self.name, self._function = name, find_function(name)
        cheap = getattr(self._function, "cheap", False)
        self._pool = None if cheap else FunctionPool(name, config)
        self._counts = Counter[str](returned=0, error=0, timeout=0)
        self._shown: set[tuple[str, str]] = set()  # kinds of errors
        self._lock = threading.Lock()

    def verify(self, prompt: Prompt, response: str) -> FunctionVerdict:
        record = record_of(prompt)
        if self._pool is None:
            reply = call(self._function, record, response)
        else:
            reply = self._pool.ask(record, response)
        if "parts" not in reply:
            return self._failed(reply, prompt)
        parts = {name: value for name, value in reply["parts"].items() if name}
        # Rounded as it is trained on: 0.7 + 0.2 + 0.1 is 1.
        reward = float(np.float32(math.fsum(reply["parts"].values())))
        with self._lock:
            self._counts["returned"] += 1
        named = f": {', '.join(f'{name} {value:.3g}' for name, value in parts.items())}"
        reason = f"reward {reward:.3g}{named if parts else ''}"
        return FunctionVerdict("right" if reward >= 1 else "wrong", reward, parts, reason)

    def final_answer(self, response: str) -> str:
        """The whole response, for a vote: equal strings are equal answers."""
        return response.strip()

    def counts(self) -> dict[str, int]:
        """Calls so far: "returned", "timeout", "error", and "error/CLASS" of each exception."""
        with self._lock:
            return dict(self._counts)

    def close(self) -> None:
        if self._pool is not None:
            self._pool.close()

    def _failed(self, reply: Mapping[str, Any], prompt: Prompt) -> FunctionVerdict:
        """Counts a failed call; an error of a new kind is shown, its traceback in the log."""
        kind, message, where = reply["error"], reply["message"], reply["where"]
        late = kind == TIMEOUT
        what = message if late else f"{kind}: {message}" if message else kind
        what += f" ({where})" if where else ""
        with self._lock:
            self._counts.update([TIMEOUT] if late else ["error", f"error/{kind}"])
            new = (kind, where) not in self._shown and len(self._shown) < SHOWN_KINDS
            if new:
                self._shown.add((kind, where))
        if new:
            count = f"rewards/function/{TIMEOUT if late else f'error/{kind}'}"
            log.warning(
                "rewards.function=%s failed for prompt %s: %s; such responses get reward 0 and are "
                "counted in %s (shown once)",
                *(self.name, prompt.id, what, count),
            )
            if reply["traceback"]:
                tracebacks.warning("rewards.function=%s:\n%s", self.name, reply["traceback"])
        return FunctionVerdict("timeout" if late else "error", 0.0, {}, what)


def record_of(prompt: Prompt) -> dict[str, Any]:
    """The record of a prompt as a reward function sees it: the columns of its row, beside "id",
    "question" and "answer" where no column has these names."""
    row = json.loads(prompt.metadata) if prompt.metadata else {}
    return {"id": prompt.id, "question": prompt.text, "answer": prompt.answer, **row}


class PartMeans:
    """Means of the named parts of rewards since the last `take`; thread-safe."""

    def __init__(self):
        self._values: defaultdict[str, list[float]] = defaultdict(list)
        self._lock = threading.Lock()

    def add(self, parts: Mapping[str, float]) -> None:
        with self._lock:
            for name, value in parts.items():
                self._values[name].append(value)

    def take(self) -> dict[str, float]:
        with self._lock:
            values, self._values = self._values, defaultdict(list)
        return {name: float(np.mean(of)) for name, of in values.items()}


class FunctionPool:
    """Processes that call the function, for one response at a time each; thread-safe."""

    def __init__(self, name: str, config: FunctionPoolConfig):
        settings = (name, str(config.seconds), str(config.memory_bytes))
        self._command = [sys.executable, "-m", "oapl_jax.rewards.function.worker", *settings]
        self._name, self._seconds, self._size = name, config.seconds, config.processes
        self._free: queue.SimpleQueue[SpawnedWorker | None] = queue.SimpleQueue()
        for _ in range(self._size):
            self._free.put(None)
        self._closed = False

    def ask(self, record: Mapping[str, Any], response: str) -> dict[str, Any]:
        """Calls the function in a free process; the reply is as of `worker.call`.

        A call past its deadline, and one in which the process ended, are errors of the kinds
        TIMEOUT and ENDED. RunError if no process starts or gets free, or the pool is
        closed.
        """
        request, process = json.dumps([record, response]).encode(), self._next()
        try:
            if self._closed:
                raise RunError("the pool of rewards.function is closed")
            process = process or self._start()
            reply = self._exchange(process, request)
            if reply.get("error") in FATAL:
                process.kill()
                process = None
            return reply
        finally:
            self._free.put(process)

    def _exchange(self, process: SpawnedWorker, request: bytes) -> dict[str, Any]:
        deadline = time.monotonic() + self._seconds
        try:
            process.send(request, deadline)
            return json.loads(process.receive(deadline))
        except Late:
            setting = f"rewards.function_pool.seconds={self._seconds:g}"
            return _reply(TIMEOUT, f"longer than {setting}")
        except Ended:
            return _reply(ENDED, f"the process of the function ended with code {process.kill()}")

    def close(self) -> None:
        """Ends all processes after the calls that they have."""
        self._closed = True
        for process in [self._next() for _ in range(self._size)]:
            if process is not None:
                process.kill()
            self._free.put(None)  # a thread that still waits gets a RunError

    def _next(self) -> SpawnedWorker | None:
        try:
            return self._free.get(timeout=PATIENCE_SECONDS)
        except queue.Empty:
            message = f"no process of rewards.function got free within {PATIENCE_SECONDS:.0f} s"
            raise RunError(message) from None

    def _start(self) -> SpawnedWorker:
        # It must not take the accelerator, nor all cores.
        env = {**os.environ, "JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": ""}
        env |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        paths = (str(Path(__file__).parents[3]), os.environ.get("PYTHONPATH", ""))
        env["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
        process = SpawnedWorker(self._command, env, cwd=os.getcwd())
        try:
            process.receive(time.monotonic() + START_SECONDS)
        except (Ended, Late):
            process.kill()
            raise RunError(
                f"a process of rewards.function={self._name} did not start; see standard error"
            ) from None
        return process


def _reply(kind: str, message: str) -> dict[str, Any]:
    return {"error": kind, "message": message, "where": "", "traceback": ""}
