"""Runs of several hosts: initialization, barriers, all-gather of bytes, and a liveness watchdog.

Every host runs the same program, samples its share of the prompts and holds its share of the
buffer. `barrier` and `allgather_bytes` exchange what a gradient step needs of all of them; with
one host both return at once. Two threads of each host watch the others: one writes a heartbeat to
the coordinator and reads those of the others, one compares their ages with the limits. If a host
dies or stalls, every other host exits with an error that names it.
"""

import atexit
import contextlib
import ctypes
import dataclasses
import faulthandler
import json
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from oapl_jax.errors import HostLost, UserError, sentence

JOIN_DEADLINE = 300  # seconds until all hosts have started
SILENCE = 40.0  # seconds without a heartbeat after which a host counts as lost
JAX_SILENCE = 100  # seconds until JAX aborts every host; > SILENCE: the watchdog exits first
LAST_MESSAGES = 15.0  # seconds that host 0 stays for the other hosts' errors, above SILENCE / 4
COORDINATOR_DEADLINE = 5.0  # seconds within which a live coordinator answers
POLL = 0.25  # seconds between two looks for a file of another host
HEADER = 4088  # bytes of a message that travel with its length; most messages fit
BLOCK = 1 << 20  # bytes of each further all-gather
SIGNS_OF_LOSS = ("Gloo", "UNAVAILABLE", "DEADLINE_EXCEEDED", "Connection")  # in JAX's messages
JAX_ERROR = jax.errors.JaxRuntimeError
GOODBYE, ENDED = "goodbye", "ended: "  # a host's last heartbeat: at the end of the run; an error
RESTART = "the same command on all hosts resumes from the newest checkpoint"
HEARTBEATS = "alive/"  # key prefix at the coordinator


def initialize(*, pod: bool, coordinator: str, hosts: int, host: int) -> None:
    """Joins the other hosts; call it before JAX looks for devices.

    Args:
      pod: whether the environment (a TPU pod, GKE, Slurm) names the hosts.
      coordinator: "address:port" of host 0, where it does not; "" for a single host.
      hosts: number of hosts.
      host: index of this host.

    Raises:
      UserError: for flags that do not fit together.
      HostLost: if a host does not join in time.
    """
    if not pod and not coordinator:
        if (hosts, host) != (1, 0):
            raise UserError(
                f"--hosts={hosts} and --host={host} need --coordinator=ADDRESS:PORT of host 0; "
                "without it each process would be a run of its own"
            )
        return
    if pod and (coordinator or (hosts, host) != (1, 0)):
        raise UserError(
            "--pod finds the hosts by itself; leave out --coordinator, --hosts and --host, or --pod"
        )
    address, _, port = coordinator.rpartition(":")
    if coordinator and not (address and port.isdecimal() and 0 < int(port) < 1 << 16):
        raise UserError(f"--coordinator={coordinator} must be ADDRESS:PORT of host 0")
    if coordinator and not 0 <= host < hosts:
        raise UserError(f"--host={host} must lie within 0 and --hosts={hosts} - 1")
    if coordinator and not host:
        _check_port(int(port))
    # SIGTERM saves and exits: see tracking.progress.StopRequest.
    jax.config.update("jax_enable_preemption_service", False)
    not_joined = HostLost(
        f"the hosts did not find each other within {JOIN_DEADLINE} s; start the same command on "
        "all of them, with --coordinator, --hosts and --host, or --pod where the environment names "
        "them"
    )
    _on_abort(lambda: not_joined)
    try:
        jax.distributed.initialize(
            coordinator_address=coordinator or None,
            num_processes=None if pod else hosts,
            process_id=None if pod else host,
            initialization_timeout=JOIN_DEADLINE,
            heartbeat_timeout_seconds=JAX_SILENCE,
        )
    except ValueError as error:
        raise UserError(
            f"--pod found no hosts ({str(error).splitlines()[0]}); name them with --coordinator, "
            "--hosts and --host"
        ) from error
    except RuntimeError as error:
        raise not_joined from error
    _start_watchdog()


def _check_port(port: int) -> None:
    """Raises a UserError if another process listens: JAX's coordinator would crash."""
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(("", port))
        except OSError as error:
            raise UserError(
                f"port {port} of --coordinator can't be used on host 0 ({error.strerror}); choose "
                "another, the same on all hosts"
            ) from error


def barrier(name: str, *, deadline: float) -> None:
    """Returns when all hosts have called it with this name.

    Args:
      name: unique to this barrier, and readable.
      deadline: seconds (rollout.deadline).

    Raises:
      HostLost: if a host does not come.
    """
    sync = ocp.multihost.get_barrier_sync_fn()
    try:
        sync(key=name, timeout_ms=int(1000 * deadline))
    except RuntimeError as error:
        raise HostLost(
            f"host {jax.process_index()} waited {deadline:.0f} s (rollout.deadline) for the others "
            f"at {name}: {_missing_hosts(error)}; {RESTART}"
        ) from error


def _missing_hosts(error: Exception) -> str:
    """The hosts that did not reach a barrier, as far as JAX names them."""
    lines = str(error).splitlines()
    after = [i for i, line in enumerate(lines) if "timed out task names" in line]
    names = [name for name in (lines[after[0] + 1 :] if after else []) if name.strip().isdigit()]
    return f"host {', '.join(names)} did not come" if names else lines[0]


def allgather_bytes(mine: bytes, name: str, *, deadline: float) -> list[bytes]:
    """Every host's bytes, by host; all hosts must call it.

    Args:
      mine: this host's, of any length.
      name: readable name for errors.
      deadline: seconds (rollout.deadline).
    """
    if jax.process_count() == 1:
        return [mine]
    with collective_section(name, deadline=deadline):
        first = _allgather(len(mine).to_bytes(8, "little") + mine[:HEADER], 8 + HEADER)
        sizes = [int.from_bytes(row[:8], "little") for row in first]
        messages = [row[8:] for row in first]
        for start in range(HEADER, max(sizes), BLOCK):
            blocks = _allgather(mine[start : start + BLOCK], BLOCK)
            for message, block in zip(messages, blocks, strict=True):
                message += block
    return [bytes(message[:size]) for message, size in zip(messages, sizes, strict=True)]


def _allgather(mine: bytes, size: int) -> list[bytearray]:
    """`size` bytes of each host, padded with zeros, since JAX compiles one program a size."""
    padded = np.zeros(size, np.uint8)
    padded[: len(mine)] = np.frombuffer(mine, np.uint8)
    return [bytearray(row) for row in np.asarray(multihost_utils.process_allgather(padded))]


def allgather_set(mine: set[int], name: str, *, deadline: float) -> set[int]:
    """Union of every host's numbers; all hosts must call it, see `allgather_bytes`."""
    gathered = allgather_bytes(json.dumps(sorted(mine)).encode(), name, deadline=deadline)
    return {number for numbers in gathered for number in json.loads(numbers)}


def wait_until(condition: Callable[[], bool], what: str, *, deadline: float) -> None:
    """Polls until this host sees a file of another one, which may be later than its write.

    Raises:
      HostLost: if `deadline` seconds have passed.
    """
    give_up = time.monotonic() + deadline
    while not condition():
        if time.monotonic() > give_up:
            raise HostLost(
                f"host {jax.process_index()} waited {deadline:.0f} s (rollout.deadline) to see "
                f"{what}; see that all hosts share --workdir, and {RESTART}"
            )
        time.sleep(POLL)


@contextlib.contextmanager
def host0_first(name: str, *, deadline: float) -> Iterator[None]:
    """Host 0 runs the body, which may write files; then the others run it and find them.

    Raises:
      HostLost: as `barrier`.
    """
    if jax.process_index():
        barrier(name, deadline=deadline)
    yield
    if not jax.process_index():
        barrier(name, deadline=deadline)


def per_host_path(name: str, host: int | None = None) -> str:
    """File name of a host, this one by default: "metrics.jsonl" is host 0's,
    "metrics.host1.jsonl" host 1's."""
    host = jax.process_index() if host is None else host
    stem, dot, suffix = name.partition(".")
    return f"{stem}.host{host}{dot}{suffix}" if host else name


@dataclasses.dataclass
class Section:
    """A section that all hosts run in the same order."""

    name: str
    deadline: float  # seconds without progress
    since: float = dataclasses.field(default_factory=time.monotonic)

    def progress(self) -> None:
        """Resets the timeout."""
        self.since = time.monotonic()


class Turns:
    """A reentrant lock that threads get in the order in which they ask for it."""

    def __init__(self):
        self._changed = threading.Condition()
        self._threads: deque[int] = deque()  # the first one has the lock
        self._depth = 0

    @property
    def waiting(self) -> int:
        """Threads that wait for it."""
        return max(len(self._threads) - 1, 0)

    def __enter__(self) -> None:
        me = threading.get_ident()
        with self._changed:
            if not self._threads or self._threads[0] != me:
                self._threads.append(me)
                self._changed.wait_for(lambda: self._threads[0] == me)
            self._depth += 1

    def __exit__(self, *_: Any) -> None:
        with self._changed:
            self._depth -= 1
            if not self._depth:
                self._threads.popleft()
                self._changed.notify_all()


# Of the learner's devices. Programs with collectives that two threads start on the same devices
# could deadlock: each may hold some devices and wait for the others.
turns = Turns()
_sections: list[Section] = []  # of the main thread, innermost last
_entered = 0  # sections, so far
_exiting = threading.Lock()  # never released
_abort_handler: Any = None  # kept alive, since the C library holds its address


@contextlib.contextmanager
def collective_section(name: str, *, deadline: float) -> Iterator[Section]:
    """Marks a section that all hosts enter together; `progress()` resets its timeout.

    If one host does not take part, the collectives of the others hang forever. A host that stays
    in the section for `deadline` seconds (rollout.deadline) without progress exits and names the
    hosts that have not entered it. The section has `turns`, so a sampler that shares the learner's
    devices waits.
    """
    global _entered
    section = Section(name, deadline)
    _sections.append(section)
    _entered += 1
    try:
        with turns:
            yield section
    finally:
        _sections.remove(section)


class _Watchdog:
    """Heartbeat and watchdog threads of this host."""

    def __init__(self):
        self.host, hosts = jax.process_index(), jax.process_count()
        self._client: Any = ocp.multihost.get_jax_distributed_client()
        self._leaving = threading.Event()
        self._answered = time.monotonic()
        first = ("0 0", self._answered)
        self._beats: dict[int, tuple[str, float]] = dict.fromkeys(range(hosts), first)
        start = lambda target, name: threading.Thread(target=target, name=name, daemon=True)
        self._threads = [start(self._beat, "heartbeat"), start(self._watch, "watchdog")]
        for thread in self._threads:
            thread.start()

    def leave(self) -> None:
        self._leaving.set()
        for thread in self._threads:
            thread.join()
        faulthandler.cancel_dump_traceback_later()
        signal.signal(signal.SIGABRT, signal.SIG_DFL)
        self._write(GOODBYE)

    def leave_with_error(self, error: str) -> None:
        """Writes the error for the others; host 0, the coordinator, exits last."""
        self._leaving.set()
        with contextlib.suppress(JAX_ERROR):
            self._write(f"{ENDED}{error}")
            since = time.monotonic() - SILENCE / 2
            alive = {host for host, (_, heard) in self._beats.items() if heard > since}
            while not self.host and alive:
                time.sleep(0.05)
                beats = self._read().items()
                alive -= {host for host, beat in beats if beat.startswith((GOODBYE, ENDED))}

    def _write(self, beat: str) -> None:
        self._client.key_value_set(f"{HEARTBEATS}{self.host}", beat, allow_overwrite=True)

    def _read(self) -> dict[int, str]:
        beats = self._client.key_value_dir_get(HEARTBEATS)
        return {int(key.rpartition("/")[2]): beat for key, beat in beats}

    def _beat(self) -> None:
        count = 0
        while not self._leaving.wait(SILENCE / 20):
            count += 1
            _exit_if_stuck()
            try:
                self._write(f"{count} {_entered}")
                beats = self._read()
            except JAX_ERROR as error:
                first = str(error).splitlines()[0]
                exit_now(HostLost(f"host 0, the coordinator, does not answer ({first}); {RESTART}"))
            self._answered = time.monotonic()
            for host, beat in beats.items():
                if beat != self._beats[host][0]:
                    self._beats[host] = beat, self._answered

    def _watch(self) -> None:
        while not self._leaving.wait(SILENCE / 40):
            failure = self._silent_host() or self._late_section()
            if failure:
                exit_now(HostLost(f"{failure}; {RESTART}"))

    def _silent_host(self) -> str:
        """A sentence naming a host without heartbeat, or ""."""
        now = time.monotonic()
        if now - self._answered > SILENCE:
            return f"host 0, the coordinator, has not answered for {SILENCE:.0f} s"
        for host, (beat, heard) in self._beats.items():
            if beat.startswith(ENDED) and now - heard > SILENCE / 4:  # time for an error of its own
                return f"host {host} {beat}"
            if beat != GOODBYE and now - heard > SILENCE:
                return f"host {host} has not been heard of for {SILENCE:.0f} s"
        return ""

    def _late_section(self) -> str:
        """A sentence naming a section over its deadline and the hosts outside it, or ""."""
        now = time.monotonic()
        for section in list(_sections):
            if now - section.since > section.deadline:
                beats = {str(host): beat.split() for host, (beat, _) in self._beats.items()}
                alive = {host: words for host, words in beats.items() if words[0].isdigit()}
                late = [host for host, words in alive.items() if int(words[1]) < _entered]
                why = f"host {', '.join(late)} has not begun it" if late else "no other is behind"
                return (
                    f"host {self.host} waited {section.deadline:.0f} s (rollout.deadline) in "
                    f"{section.name}: {why}"
                )
        return ""


_watchdog: _Watchdog | None = None


def _start_watchdog() -> None:
    global _watchdog
    _on_abort(_lost_coordinator)
    _watchdog = _Watchdog()
    _on_abort(_lost_coordinator)  # again: a TPU's runtime, loaded by now, installs its own handler
    atexit.register(_watchdog.leave)  # runs before JAX's own, which ends the connection


def _on_abort(error: Callable[[], Exception | None]) -> None:
    """Makes an abort of this process call `error` first and exit with its error, if it gives one.

    JAX aborts a process that does not find or that loses the coordinator, from a thread of its
    own, and breaks if it is told to call a Python function instead. C's signal handling runs inside
    the abort; Python's own would run too late.
    """
    global _abort_handler

    def handle(_: int) -> None:
        found = error()
        if found:
            exit_now(found)
        library.signal(signal.SIGABRT, kind(0))  # the default action
        os.kill(os.getpid(), signal.SIGABRT)

    kind = ctypes.CFUNCTYPE(None, ctypes.c_int)
    library: Any = ctypes.CDLL(None)
    library.signal.argtypes, library.signal.restype = (ctypes.c_int, kind), ctypes.c_void_p
    library.signal(signal.SIGABRT, handler := kind(handle))
    _abort_handler = handler


def _lost_coordinator() -> HostLost | None:
    """None if the coordinator answers: an abort for another reason prints its own message."""
    client: Any = ocp.multihost.get_jax_distributed_client()
    answered = threading.Event()

    def ask() -> None:
        with contextlib.suppress(JAX_ERROR):
            client.key_value_dir_get(HEARTBEATS)
            answered.set()

    threading.Thread(target=ask, daemon=True).start()
    if answered.wait(COORDINATOR_DEADLINE):
        return None
    return HostLost(f"host 0, the coordinator, is lost; {RESTART}")


def _exit_if_stuck() -> None:
    """Exits with code 1 and all stacks if no thread runs Python for 2 SILENCE from now on."""
    faulthandler.dump_traceback_later(2 * SILENCE, exit=True)


def exit_now(error: Exception) -> NoReturn:
    """Exits this process at once, with the message and exit code of the error.

    Unwinding would wait: the clean-up on the way contacts hosts that are gone or that wait for
    this one. Complete files on disk stay.
    """
    _exiting.acquire()  # one message; a second thread waits for the end of the process
    _exit_if_stuck()
    found = sentence(error)
    if found:
        print(f"error: {found[1]}", file=sys.stderr)
    else:
        traceback.print_exception(error)
    sys.stdout.flush()
    sys.stderr.flush()
    if _watchdog:
        why = str(error).removesuffix(f"; {RESTART}") or type(error).__name__
        leaving = threading.Thread(target=_watchdog.leave_with_error, args=(why,), daemon=True)
        leaving.start()  # in a thread, since it hangs without the coordinator
        leaving.join(COORDINATOR_DEADLINE if _watchdog.host else LAST_MESSAGES)
    os._exit(found[0] if found else 1)


@contextlib.contextmanager
def abort_on_peer_failure() -> Iterator[None]:
    """Exits immediately on an exception if there are several hosts; see `exit_now`."""
    try:
        yield
    except Exception as error:
        if jax.process_count() == 1:
            raise
        if isinstance(error, HostLost):
            exit_now(error)
        broken = next((e for e in (error, error.__cause__) if isinstance(e, JAX_ERROR)), None)
        if any(sign in str(broken) for sign in SIGNS_OF_LOSS):
            first = str(broken).splitlines()[0]
            exit_now(HostLost(f"host {jax.process_index()} lost another one ({first}); {RESTART}"))
        exit_now(error)
