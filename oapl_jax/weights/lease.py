"""Lease on a directory: one process at a time, on a file system or bucket that machines share.

The lease is a file that its owner renews. A new run takes over a lease that is not renewed, or
whose process on this machine has ended. The clocks of two machines may differ, so the lease of
another machine counts as expired only if it has not changed while this process watched it. The file
system or object store decides between processes that start at once, by exclusive creation; on a
mounted bucket that lets both pass, the one whose lease was overwritten ends at its next renewal.
"""

import contextlib
import dataclasses
import json
import os
import platform
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from typing import Any

from etils import epath

from oapl_jax.errors import RunError, UserError
from oapl_jax.files import create, is_local, naming

FILE = "lease.json"
RENEW = 5.0  # seconds between two renewals
EXPIRE = 30.0  # seconds without a renewal after which a lease may be taken over


@dataclasses.dataclass(frozen=True)
class Lease:
    """Content of the file: owner of the workdir and time of its start.

    Attributes:
      owner: random name of the process.
      host, machine: name of the machine, and its boot and process namespace.
      pid, started: process id and its start (clock ticks since the boot), which tell a process
        from a later one with the same id.
      since, renewed: Unix time, seconds.
    """

    owner: str
    host: str
    machine: str
    pid: int
    started: str
    since: float
    renewed: float

    def __str__(self) -> str:
        since = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(self.since))
        return f"process {self.pid} on {self.host} since {since}"


@contextlib.contextmanager
def hold(
    workdir: epath.Path,
    *,
    log: Callable[[str], None],
    lost: Callable[[Exception], Any],
    of: str = "--workdir",
) -> Iterator[None]:
    """Holds the lease on a workdir, or another directory, within the body.

    Args:
      workdir: of the run; created if it does not exist.
      log: takes a line that tells of a lease that was taken over.
      lost: called from a thread with the error if another process takes the lease over.
      of: flag that names the directory.

    Raises:
      UserError: if another process holds it.
    """
    workdir.mkdir(parents=True, exist_ok=True)
    path, now, pid = workdir / FILE, time.time(), os.getpid()
    mine = Lease(
        owner=str(uuid.uuid4()),
        host=platform.node(),
        machine=_machine(),
        pid=pid,
        started=_started(pid),
        since=now,
        renewed=now,
    )
    _acquire(path, mine, log, of)
    ended = threading.Event()
    thread = threading.Thread(target=_renew, args=(path, mine, ended, lost), daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        if (found := _read(path)) and found.owner == mine.owner:
            path.unlink()


def hold_bucket(directory: epath.Path, **how: Any) -> contextlib.AbstractContextManager[None]:
    """`hold` of a directory in a bucket; files on a disk have locks of their own."""
    return contextlib.nullcontext() if is_local(directory) else hold(directory, **how)


def _in_use(path: epath.Path, by: Lease | None, of: str) -> UserError:
    return UserError(
        f"{of}={path.parent} is in use by {by or 'another process'}; stop that one, or give "
        f"another {of}"
    )


def _acquire(path: epath.Path, mine: Lease, log: Callable[[str], None], of: str) -> None:
    """Creates the file, or replaces that of an owner who has ended.

    Raises:
      UserError: if the owner lives, or another process has just succeeded it.
    """
    with contextlib.suppress(FileExistsError):
        create(path, _encode(mine).encode())
        return
    found, alive = _watch(path, log)
    if found and found.owner == mine.owner:  # a store's client has repeated its request
        return
    if not path.exists():  # released meanwhile
        _acquire(path, mine, log, of)
        return
    if alive:
        raise _in_use(path, found, of)
    # One process at a time may succeed an owner; a successor may be killed and have successors.
    claim = path.parent / f"{path.name}.{found.owner if found else 'unreadable'}"
    _acquire(claim, mine, log, of)
    try:
        if (later := _read(path)) != found:
            raise _in_use(path, later, of)
        _write(path, mine)
    finally:
        claim.unlink()
    log(f"took {path} over from {found or 'a process'}, which has ended")


def _renew(
    path: epath.Path, mine: Lease, ended: threading.Event, lost: Callable[[Exception], Any]
) -> None:
    while not ended.wait(RENEW):
        found = _read(path)
        if found and found.owner != mine.owner:
            lost(RunError(f"{path.parent} was taken over by {found}; this process had stalled"))
            return
        # A full disk or an unreachable store ends the run elsewhere, with a message.
        with contextlib.suppress(Exception):
            _write(path, dataclasses.replace(mine, renewed=time.time()))


def _watch(path: epath.Path, log: Callable[[str], None]) -> tuple[Lease | None, bool]:
    """The lease of a file, and True if its owner is alive.

    The owner on another machine is alive if it renews its lease within EXPIRE seconds.
    """
    first = _read(path)
    if first and first.machine == _machine():
        return first, _started(first.pid) == first.started
    log(f"waiting up to {EXPIRE:g} seconds for a sign of {first or 'the owner'} of {path}")
    give_up = time.monotonic() + EXPIRE
    while time.monotonic() < give_up and path.exists():
        time.sleep(RENEW / 5)
        if (found := _read(path)) != first:
            return found, found is not None
    return first, False


def _machine() -> str:
    if not os.path.exists("/proc/self/ns/pid"):  # not Linux: every lease is watched
        return str(uuid.uuid4())
    boot = epath.Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot} {os.readlink('/proc/self/ns/pid')}"


def _started(pid: int) -> str:
    """Start time of a process; "" if there is none, or it has ended and nobody waits for it."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            state, *values = file.read().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if state in "ZX" else values[18]


def _read(path: epath.Path) -> Lease | None:
    """The lease of a file; None if there is none, or no whole one."""
    try:
        return Lease(**json.loads(path.read_text()))
    except Exception:  # the libraries of stores name no closed set
        return None


def _write(path: epath.Path, lease: Lease) -> None:
    """Replaces the file at once; each owner has a temporary file of its own."""
    if not is_local(path):
        path.write_text(_encode(lease))
        return
    temporary = path.parent / f"{path.name}.{lease.owner}.tmp"
    try:
        with naming(path):
            temporary.write_text(_encode(lease))
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _encode(lease: Lease) -> str:
    return json.dumps(dataclasses.asdict(lease))
