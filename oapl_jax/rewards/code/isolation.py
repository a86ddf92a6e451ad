"""The limits and the syscall filter that `sandbox_main.py` adds to bubblewrap's isolation.

Two layers hold without each other. Bubblewrap's namespaces, its almost empty file system and an
unknown user id leave a program nothing to reach. The syscall filter leaves it no way to start a
process, open a socket or hold memory that the limits do not count: a program that can't fork can't
daemonise or multiply, so the limits of one process are those of the whole program.
"""

import ctypes
import errno
import os
import platform
import resource
import struct
from collections.abc import Sequence

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
NEWER = dict(  # the same number on every machine
    clone3=435,
    pidfd_getfd=438,
    open_tree=428,
    move_mount=429,
    fsopen=430,
    fsmount=432,
    mount_setattr=442,
    io_uring_setup=425,
    io_uring_enter=426,
    io_uring_register=427,
    memfd_secret=447,
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
    version3 = struct.pack("Ii", 0x20080522, 0)
    _call("capset", version3, bytes(24))
    _control(SET_NO_NEW_PRIVILEGES, 1)
    _control(SET_DUMPABLE, 0)  # no program attaches to what serves it
    _control(SET_DEATH_SIGNAL, 9)  # last: a change of user clears it


def limit(resources: Sequence[tuple[int, int]]) -> None:
    """Lowers limits of this process and of its children; a lower hard limit stays."""
    for name, most in resources:
        hard = resource.getrlimit(name)[1]
        most = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(name, (most, most))


def limit_program(settings: dict) -> None:
    """Sets the limits of a program beside memory."""
    seconds = int(settings["seconds_per_test"]) + 2  # of CPU; the clock outside comes first
    resources = [
        (resource.RLIMIT_CPU, seconds),
        (resource.RLIMIT_FSIZE, settings["output_bytes"]),
        (resource.RLIMIT_NPROC, settings["processes"] + 1),  # what serves it is counted too
        (resource.RLIMIT_NOFILE, OPEN_FILES),
        (resource.RLIMIT_STACK, STACK_BYTES),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_MEMLOCK, 0),
        (resource.RLIMIT_MSGQUEUE, 0),
        (resource.RLIMIT_SIGPENDING, 64),
    ]
    limit(resources)


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
    _call("prctl", SET_SECCOMP, ctypes.c_ulong(2), program, ctypes.c_ulong(0), ctypes.c_ulong(0))


def _control(option: int, value: int) -> None:
    zero = ctypes.c_ulong(0)
    _call("prctl", option, ctypes.c_ulong(value), zero, zero, zero)


def _call(name: str, *arguments) -> None:
    if getattr(_libc, name)(*arguments) < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")
