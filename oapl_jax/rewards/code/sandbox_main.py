"""The program inside a sandbox: takes a model's program and inputs, and returns its outputs.

`sandbox.py` starts it as a program of its own, with nothing but the standard library, and it never
receives an expected output. As the first process of its pid namespace it forks once a test; when it
ends, the kernel ends all processes that are left. Its standard input and output:

    out  a byte, when the isolation is complete
    in   length (4 bytes), {"kind", "name", "code"} as JSON
    in   length, the input of a test; then, for each
    out  exit code (negative: a signal), length, the program's output or its function's value

It adds a second layer to bubblewrap's isolation, and each holds without the other. The syscall
filter leaves a program no way to start a process, open a socket or hold memory that the limits do
not count: it can't daemonise or multiply, so the limits of one process are those of all of it.
"""

import atexit
import builtins
import contextlib
import ctypes
import errno
import json
import os
import platform
import resource
import select
import shutil
import signal
import struct
import sys
import threading
import types
from typing import Any

# LiveCodeBench's checker imports these before a program, so programs rely on them:
# lcb_runner/evaluation/testing_util.py.
MODULES = (
    "string, re, datetime, collections, heapq, bisect, copy, math, random, statistics, itertools, "
    "functools, operator, io, sys, json"
)
STARRED = f"{MODULES}, builtins, typing".split(", ")  # later names win
PRELUDE = "".join(f"from {name} import *\n" for name in STARRED) + f"import {MODULES}\n"
# The checker of arXiv 2602.19362's released code has these too, and those of its packages.
OAPL_PRELUDE = f"""{PRELUDE}import io, os
from os.path import commonprefix
from re import search as re_search
"""
OAPL_PACKAGES = {"numpy": "import numpy as np\n", "pandas": "import pandas as pd\n"}
RECURSION = 50_000
DIGITS = 50_000  # of an integer that is read or printed, as in LiveCodeBench
INODES = 4096  # of the temporary folder; the kernel's memory for names is not in its size
OPEN_FILES = 64
STACK_BYTES = 64 << 20  # recursion through C (sort keys, caches) needs more than the usual 8 MB
_libc = ctypes.CDLL(None, use_errno=True)

THREAD = 0x10000  # flag of clone
NO_SETUID, NO_DEVICES, REMOUNT = 2, 4, 32  # flags of mount
SET_DEATH_SIGNAL, SET_DUMPABLE, SET_SECCOMP, SET_NO_NEW_PRIVILEGES = 1, 4, 22, 38  # of prctl

# Calls that a program is refused, by machine: audit's number of the architecture, then numbers.
# Beyond processes and sockets: shared memory that outlives its mapping, other processes' memory,
# keys, namespaces, and interfaces of the kernel that a contest program has no use for.
NEWER = (  # the same number on every machine
    dict(clone3=435, pidfd_getfd=438, open_tree=428, move_mount=429, fsopen=430, fsmount=432)
    | dict(mount_setattr=442, io_uring_setup=425, io_uring_enter=426, io_uring_register=427)
    | dict(memfd_secret=447)
)
MACHINES = {
    "x86_64": (
        0xC000003E,
        NEWER
        | dict(fork=57, vfork=58, clone=56, execve=59, execveat=322, setsid=112, setpgid=109)
        | dict(ptrace=101, process_vm_readv=310, process_vm_writev=311, kcmp=312, unshare=272)
        | dict(setns=308, mount=165, umount2=166, pivot_root=155, chroot=161, add_key=248)
        | dict(open_by_handle_at=304, request_key=249, keyctl=250, bpf=321, perf_event_open=298)
        | dict(userfaultfd=323, memfd_create=319, shmget=29, semget=64, msgget=68, mq_open=240)
        | dict(socket=41),
    ),
    "aarch64": (  # has no fork and no vfork
        0xC00000B7,
        NEWER
        | dict(clone=220, execve=221, execveat=281, setsid=157, setpgid=154, ptrace=117)
        | dict(process_vm_readv=270, process_vm_writev=271, kcmp=272, unshare=97, setns=268)
        | dict(mount=40, umount2=39, pivot_root=41, chroot=51, add_key=217, request_key=218)
        | dict(open_by_handle_at=265, keyctl=219, bpf=280, perf_event_open=241, userfaultfd=282)
        | dict(memfd_create=279, shmget=194, semget=190, msgget=186, mq_open=180, socket=198),
    ),
}


class Server:
    """Serves the tests of one program; `next_test` returns in a forked child for each test."""

    def __init__(self, settings: dict):
        self._settings, self._folder = settings, settings["folder"]
        self._in, self._out = os.dup(0), os.dup(1)
        self._prelude: dict = {}
        exec(prelude(settings), self._prelude)

    def next_test(self) -> tuple[dict, types.CodeType, list, int]:
        """The program and its names, its code, arguments and the descriptor for its result."""
        os.write(self._out, b"!")
        program = json.loads(self._read())
        code = compile(program["code"], "program.py", "exec", dont_inherit=True)
        while True:
            text = self._read()
            called = program["kind"] != "stdin"
            arguments = [json.loads(line) for line in text.split(b"\n")] if called else []
            if program["kind"] == "taco":
                arguments = list(map(integer_keys, arguments))
            result = os.memfd_create("result")
            with open(f"{self._folder}/stdin", "wb") as file:
                file.write(b"" if called else text)
            child = os.fork()
            if child == 0:
                self._confine(result, called)
                name = "solution" if called else "__main__"  # "call" skips the main block
                return program | {"names": self._prelude | {"__name__": name}}, code, arguments, 3
            status = self._wait(child)
            size = min(os.fstat(result).st_size, self._settings["output_bytes"])
            reply = struct.pack(">iI", status, size) + os.pread(result, size, 0)
            os.close(result)
            with open(self._out, "wb", closefd=False) as file:
                file.write(reply)
            for entry in os.scandir(self._folder):
                if entry.is_dir(follow_symlinks=False):
                    shutil.rmtree(entry.path)
                else:
                    os.unlink(entry.path)

    def _confine(self, result: int, called: bool) -> None:
        """Keeps only input, result and null device open in the child; sets its limits."""
        null = os.open("/dev/null", os.O_RDWR)
        given = os.open(f"{self._folder}/stdin", os.O_RDONLY)
        os.dup2(result, 63)  # out of the way of the numbers that are set now
        for source, target in ((given, 0), (null if called else result, 1), (null, 2), (63, 3)):
            os.dup2(source, target)
        os.closerange(4 if called else 3, OPEN_FILES)
        for name, number, mode in (("stdin", 0, "r"), ("stdout", 1, "w"), ("stderr", 2, "w")):
            stream = open(  # noqa: SIM115
                number, mode, encoding="utf-8", errors="surrogateescape", closefd=False
            )
            setattr(sys, name, stream)
            setattr(sys, f"__{name}__", stream)
        os.chdir(self._folder)
        limit_program(self._settings)
        if self._settings["filter"]:
            filter_calls()

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


def prelude(settings: dict) -> str:
    """The imports before every program."""
    if settings["prelude"] == "livecodebench":
        return PRELUDE
    return OAPL_PRELUDE + "".join(OAPL_PACKAGES.get(name, "") for name in settings["packages"])


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
            try:
                text = json.dumps(value)
            except TypeError:
                text = json.dumps(plain(value))
            with open(result, "w", encoding="utf-8") as file:
                file.write(text)
        finish(module)
    except BaseException:
        os._exit(1)
    os._exit(0)


def integer_keys(argument: Any) -> Any:
    """Undoes JSON's change of a dictionary's integer keys into text, as APPS's checker does."""
    try:
        return {int(key): value for key, value in argument.items()}
    except (AttributeError, ValueError):  # no dictionary, or other keys
        return argument


def plain(value: Any) -> Any:
    """Python's own types for numpy's, which equal them in LiveCodeBench's checker."""
    if isinstance(value, dict):
        return {plain(key): plain(element) for key, element in value.items()}
    if isinstance(value, list | tuple):
        return [plain(element) for element in value]
    return value.tolist() if hasattr(value, "tolist") else value


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


def limit_temporary(temporary_bytes: int) -> None:
    """Limits the size and the number of files of /tmp, which bubblewrap has mounted."""
    options = f"mode=1777,size={temporary_bytes},nr_inodes={INODES}".encode()
    flags = ctypes.c_ulong(REMOUNT | NO_SETUID | NO_DEVICES)
    _call("mount", b"tmpfs", b"/tmp", b"", flags, options)
    os.chmod("/tmp", 0o1777)  # the mode of a mount does not change with it


def drop_privileges(uid: int | None) -> None:
    """Becomes `uid` if there is one, and drops every capability for good.

    The kernel does not hold root to a limit of processes, so root becomes a user id of its own.
    Another user stays itself: its limits are counted per user namespace (Linux 5.14).
    """
    if uid is not None:
        os.setgroups([])
        os.setresgid(uid, uid, uid)
        os.setresuid(uid, uid, uid)
    _call("capset", struct.pack("Ii", 0x20080522, 0), bytes(24))  # version 3
    _control(SET_NO_NEW_PRIVILEGES, 1)
    _control(SET_DUMPABLE, 0)  # blocks ptrace by the programs
    _control(SET_DEATH_SIGNAL, 9)  # last: a change of user clears it


def limit(*resources: tuple[int, int]) -> None:
    """Lowers limits of this process and of its children; a lower hard limit stays."""
    for name, most in resources:
        hard = resource.getrlimit(name)[1]
        most = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(name, (most, most))


def limit_program(settings: dict) -> None:
    """Sets the limits of a program beside memory."""
    limit(
        (resource.RLIMIT_CPU, int(settings["seconds_per_test"]) + 2),  # after the clock outside
        (resource.RLIMIT_FSIZE, settings["output_bytes"]),
        (resource.RLIMIT_NPROC, settings["processes"] + 1),  # + 1 for the parent
        (resource.RLIMIT_NOFILE, OPEN_FILES),
        (resource.RLIMIT_STACK, STACK_BYTES),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_MEMLOCK, 0),
        (resource.RLIMIT_MSGQUEUE, 0),
        (resource.RLIMIT_SIGPENDING, 64),
    )


def filter_calls() -> None:
    """Refuses MACHINES' calls from here on (seccomp): EPERM; only a thread can be cloned.

    clone3 hides its flags behind a pointer, so it does not exist (ENOSYS): the C library then
    turns to clone. Calls in another architecture's numbering end the process.
    """
    architecture, numbers = MACHINES[platform.machine()]
    load, equal, at_least, has_bit, answer = 0x20, 0x15, 0x35, 0x45, 0x06
    allow, refuse, kill = 0x7FFF0000, 0x00050000, 0x80000000
    code = [(load, 0, 0, 4), (equal, 1, 0, architecture), (answer, 0, 0, kill)]
    code += [(load, 0, 0, 0), (at_least, 0, 1, 0x40000000), (answer, 0, 0, kill)]  # x32
    for name in numbers.keys() - {"clone"}:
        why = errno.ENOSYS if name == "clone3" else errno.EPERM
        code += [(equal, 0, 1, numbers[name]), (answer, 0, 0, refuse | why)]
    code += [(equal, 0, 3, numbers["clone"]), (load, 0, 0, 16), (has_bit, 1, 0, THREAD)]
    code += [(answer, 0, 0, refuse | errno.EPERM), (answer, 0, 0, allow)]
    packed = b"".join(struct.pack("HBBI", *instruction) for instruction in code)
    buffer = ctypes.create_string_buffer(packed)
    program = struct.pack("HxxxxxxQ", len(code), ctypes.addressof(buffer))
    _control(SET_NO_NEW_PRIVILEGES, 1)
    _control(SET_SECCOMP, 2, program)


def _control(option: int, *values: int | bytes) -> None:
    """Calls prctl, with four arguments."""
    given = [v if isinstance(v, bytes) else ctypes.c_ulong(v) for v in values]
    _call("prctl", option, *given, *[ctypes.c_ulong(0)] * (4 - len(given)))


def _call(name: str, *arguments) -> None:
    if getattr(_libc, name)(*arguments) < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")


def main() -> None:
    settings = json.loads(sys.argv[1])
    os.umask(0o022)
    # Libraries of linear algebra start a thread for each core of the machine, and die of the limit.
    os.environ |= {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    sys.set_int_max_str_digits(DIGITS)
    builtins.exit = builtins.quit = sys.exit  # as without -S
    sys.path += settings["package_folders"]
    server = Server(settings)
    if settings["isolated"]:
        limit_temporary(settings["temporary_bytes"])
        drop_privileges(settings["uid"])
    # Before the program: compiling its source may take much memory.
    limit((resource.RLIMIT_AS, settings["memory_bytes"]))
    run_test(*server.next_test())


if __name__ == "__main__":
    main()
