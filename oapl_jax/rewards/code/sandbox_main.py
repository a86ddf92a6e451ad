"""The program inside a sandbox: takes a model's program and inputs, and returns its outputs.

Not imported: `sandbox.py` starts it as a program of its own, with nothing but the standard library,
and it never receives an expected output. As the first process of its pid namespace it forks once a
test; when it ends, the kernel ends all processes that are left. Its standard input and output:

    out  a byte, when the isolation is complete
    in   length (4 bytes), {"kind", "name", "code"} as JSON
    in   length, the input of a test; then, for each
    out  exit code (negative: a signal), length, the program's output or its function's value
"""

import atexit
import contextlib
import json
import os
import resource
import select
import shutil
import signal
import struct
import sys
import threading
import types
from typing import Any

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
import isolation  # pyright: ignore[reportMissingImports]  # -I leaves this folder out

sys.path.pop(0)

# LiveCodeBench's checker imports these before a program, so programs rely on them:
# lcb_runner/evaluation/testing_util.py.
MODULES = (
    "string, re, datetime, collections, heapq, bisect, copy, math, random, statistics, itertools, "
    "functools, operator, io, sys, json"
)
STARRED = f"{MODULES}, builtins, typing".split(", ")  # later names win
PRELUDE = "".join(f"from {name} import *\n" for name in STARRED) + f"import {MODULES}\n"
RECURSION = 50_000


class Server:
    """Serves the tests of one program; `next_test` returns in a forked child for each test."""

    def __init__(self, settings: dict):
        self._settings, self._folder = settings, settings["folder"]
        self._in, self._out = os.dup(0), os.dup(1)
        self._prelude: dict = {}
        exec(PRELUDE, self._prelude)

    def next_test(self) -> tuple[dict, types.CodeType, list, int]:
        """The program and its names, its code, arguments and the descriptor for its result."""
        os.write(self._out, b"!")
        program = json.loads(self._read())
        code = compile(program["code"], "program.py", "exec", dont_inherit=True)
        while True:
            text = self._read()
            called = program["kind"] == "call"
            arguments = [json.loads(line) for line in text.split(b"\n")] if called else []
            result = os.memfd_create("result")
            with open(f"{self._folder}/stdin", "wb") as file:
                file.write(b"" if called else text)
            child = os.fork()
            if child == 0:
                self._confine(result, called)
                name = "solution" if called else "__main__"  # a called program's main part rests
                return program | {"names": self._prelude | {"__name__": name}}, code, arguments, 3
            status = self._wait(child)
            size = min(os.fstat(result).st_size, self._settings["output_bytes"])
            reply = struct.pack(">iI", status, size) + os.pread(result, size, 0)
            os.close(result)
            with open(self._out, "wb", closefd=False) as file:
                file.write(reply)
            self._clean()

    def _confine(self, result: int, called: bool) -> None:
        """In the child: closes all but the input, the result and the null device, and limits it."""
        null = os.open("/dev/null", os.O_RDWR)
        given = os.open(f"{self._folder}/stdin", os.O_RDONLY)
        os.dup2(result, 63)  # out of the way of the numbers that are set now
        for source, target in ((given, 0), (null if called else result, 1), (null, 2), (63, 3)):
            os.dup2(source, target)
        os.closerange(4 if called else 3, isolation.OPEN_FILES)
        for name, number, mode in (("stdin", 0, "r"), ("stdout", 1, "w"), ("stderr", 2, "w")):
            stream = open(  # noqa: SIM115
                number, mode, encoding="utf-8", errors="surrogateescape", closefd=False
            )
            setattr(sys, name, stream)
            setattr(sys, f"__{name}__", stream)
        os.chdir(self._folder)
        isolation.limit_program(self._settings)
        if self._settings["filter"]:
            isolation.filter_calls()

    def _wait(self, child: int) -> int:
        """The child's exit code; ends everything if the other end of the pipe is closed."""
        process = os.pidfd_open(child)
        waiting = select.poll()
        waiting.register(process, select.POLLIN)
        waiting.register(self._in, select.POLLHUP)
        if any(descriptor == self._in for descriptor, _ in waiting.poll()):
            os.kill(child, signal.SIGKILL)
            os._exit(0)
        os.close(process)
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

    def _clean(self) -> None:
        for entry in os.scandir(self._folder):
            if entry.is_dir(follow_symlinks=False):
                shutil.rmtree(entry.path)
            else:
                os.unlink(entry.path)

    def _read(self) -> bytes:
        return self._take(struct.unpack(">I", self._take(4))[0])

    def _take(self, size: int) -> bytes:
        parts = []
        while size:
            part = os.read(self._in, min(size, 1 << 20))
            if not part:
                os._exit(0)
            parts.append(part)
            size -= len(part)
        return b"".join(parts)


def run_test(program: dict, code: types.CodeType, arguments: list, result: int) -> None:
    """Runs a test and ends the process, with code 0 if nothing was raised."""
    module = types.ModuleType(program["names"]["__name__"])
    module.__dict__.update(program["names"])
    sys.modules[module.__name__] = module
    sys.argv = ["program.py"]
    sys.setrecursionlimit(RECURSION)
    try:
        if program["kind"] == "stdin":
            # sys.exit is no failure: what was printed counts, as in the benchmarks' checkers.
            with contextlib.suppress(SystemExit):
                exec(code, module.__dict__)
        else:
            exec(code, module.__dict__)
            solution: Any = module.__dict__.get("Solution")
            place = solution() if hasattr(solution, program["name"]) else module
            value = getattr(place, program["name"])(*arguments)
            with open(result, "w", encoding="utf-8") as file:
                file.write(json.dumps(value))
        finish(module)
    except BaseException:
        os._exit(1)
    os._exit(0)


def finish(module: types.ModuleType) -> None:
    """Python's shutdown in its order, without the 20 ms of taking modules apart."""
    for thread in threading.enumerate():
        if not thread.daemon and thread is not threading.current_thread():
            thread.join()
    atexit._run_exitfuncs()
    module.__dict__.clear()  # files that the program left open are written
    streams: tuple[Any, ...] = (sys.stdout, sys.__stdout__)
    for stream in streams:
        with contextlib.suppress(ValueError):  # closed
            stream.flush()


def main() -> None:
    settings = json.loads(sys.argv[1])
    os.umask(0o022)
    # Libraries of linear algebra start a thread for each core of the machine, and die of the limit.
    os.environ |= {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    server = Server(settings)
    sys.path += settings["package_folders"]
    if settings["isolated"]:
        isolation.limit_temporary(settings["temporary_bytes"])
        isolation.drop_privileges(settings["uid"])
    # Before the program: compiling its source may take much memory.
    isolation.limit([(resource.RLIMIT_AS, settings["memory_bytes"])])
    run_test(*server.next_test())


if __name__ == "__main__":
    main()
