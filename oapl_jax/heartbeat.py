"""Whether the hosts of a run live and go on. Who is left ends with a sentence when one does not.

Two threads of each host see to it. One says "I live, and have begun so many works", through the
coordinator, and takes what the others say; the other judges, also while no answer comes. A work is
what all hosts do together, and can hang in for ever: see `together`.
"""

import atexit
import contextlib
import ctypes
import dataclasses
import faulthandler
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

import jax
import orbax.checkpoint as ocp

from oapl_jax.errors import HostLost, RunError, UserError

SIGNS_OF_LOSS = ("Gloo", "UNAVAILABLE", "DEADLINE_EXCEEDED", "Connection")  # in JAX's messages
SILENCE = 40.0  # seconds after which a host that says nothing counts as lost
JAX_ERROR = jax.errors.JaxRuntimeError
GOODBYE, ENDED = "goodbye", "ended: "  # the last beat: at the end of the run; with an error
LAST_WORDS = 15.0  # seconds that host 0 stays for those of the others, above SILENCE / 4
ANSWER = 5.0  # seconds within which a coordinator that lives answers
AGAIN = "the same command on all hosts goes on from the newest checkpoint"
BEATS = "alive/"


@dataclasses.dataclass
class Work:
    """What this host does with all others, in the same order as they."""

    name: str
    deadline: float  # seconds without progress
    since: float = dataclasses.field(default_factory=time.monotonic)

    def goes_on(self) -> None:
        """Another part of it is done."""
        self.since = time.monotonic()


_works: list[Work] = []  # the main thread's, innermost last
_begun = 0  # works, so far
_ending = threading.Lock()  # never released
_before_abort: Any = None  # kept, for the C library has its address


@contextlib.contextmanager
def together(name: str, *, deadline: float) -> Iterator[Work]:
    """A work of all hosts, by the main thread; the body may tell its progress.

    If one host does not take part, the others would wait in their devices for ever. So, of several
    hosts, whoever is in the work for `deadline` seconds (rollout.deadline) ends there, and says who
    has not begun it.
    """
    global _begun
    work = Work(name, deadline)
    _works.append(work)
    _begun += 1
    try:
        yield work
    finally:
        _works.remove(work)


class _Watch:
    """The threads of this host."""

    def __init__(self):
        self.host, hosts = jax.process_index(), jax.process_count()
        self._client: Any = ocp.multihost.get_jax_distributed_client()
        self._leaving = threading.Event()
        self._answered = time.monotonic()
        first = ("0 0", self._answered)  # as if all had just said so
        self._heard: dict[int, tuple[str, float]] = dict.fromkeys(range(hosts), first)
        run = lambda part, name: threading.Thread(target=part, name=name, daemon=True)
        self._threads = [run(self._beat, "beat"), run(self._judge, "judge")]
        for thread in self._threads:
            thread.start()

    def leave(self) -> None:
        self._leaving.set()
        for thread in self._threads:
            thread.join()
        faulthandler.cancel_dump_traceback_later()
        signal.signal(signal.SIGABRT, signal.SIG_DFL)
        self._say(GOODBYE)

    def leave_in_order(self, why: str) -> None:
        """Host 0 leaves last if the others leave too: who loses it can say no other sentence."""
        self._leaving.set()
        with contextlib.suppress(JAX_ERROR):
            self._say(f"{ENDED}{why}")
            since = time.monotonic() - SILENCE / 2
            living = {host for host, (_, heard) in self._heard.items() if heard > since}
            while not self.host and living:
                time.sleep(0.05)
                said = self._hear().items()
                living -= {host for host, beat in said if beat.startswith((GOODBYE, ENDED))}

    def _say(self, beat: str) -> None:
        self._client.key_value_set(f"{BEATS}{self.host}", beat, allow_overwrite=True)

    def _hear(self) -> dict[int, str]:
        said = self._client.key_value_dir_get(BEATS)
        return {int(key.rpartition("/")[2]): beat for key, beat in said}

    def _beat(self) -> None:
        beat = 0
        while not self._leaving.wait(SILENCE / 20):
            beat += 1
            _end_if_stuck()
            try:
                self._say(f"{beat} {_begun}")
                beats = self._hear()
            except JAX_ERROR as error:
                first = str(error).splitlines()[0]
                end(HostLost(f"host 0, the coordinator, does not answer ({first}); {AGAIN}"))
            self._answered = time.monotonic()
            for host, said in beats.items():
                if said != self._heard[host][0]:
                    self._heard[host] = said, self._answered

    def _judge(self) -> None:
        while not self._leaving.wait(SILENCE / 40):
            lost = self._silent() or self._late()
            if lost:
                end(HostLost(f"{lost}; {AGAIN}"))

    def _silent(self) -> str:
        """Who has not been heard of for too long, as a sentence, or ""."""
        now = time.monotonic()
        if now - self._answered > SILENCE:
            return f"host 0, the coordinator, has not answered for {SILENCE:.0f} s"
        for host, (beat, heard) in self._heard.items():
            if beat.startswith(ENDED) and now - heard > SILENCE / 4:  # time for an error of its own
                return f"host {host} {beat}"
            if beat != GOODBYE and now - heard > SILENCE:
                return f"host {host} has not been heard of for {SILENCE:.0f} s"
        return ""

    def _late(self) -> str:
        """Which work takes too long, and who has not begun it, as a sentence, or ""."""
        now = time.monotonic()
        for work in list(_works):
            if now - work.since > work.deadline:
                beats = {str(host): beat.split() for host, (beat, _) in self._heard.items()}
                living = {host: words for host, words in beats.items() if words[0].isdigit()}
                late = [host for host, words in living.items() if int(words[1]) < _begun]
                why = f"host {', '.join(late)} has not begun it" if late else "no other is behind"
                return (
                    f"host {self.host} waited {work.deadline:.0f} s (rollout.deadline) in "
                    f"{work.name}: {why}"
                )
        return ""


_watch: _Watch | None = None


def watch() -> None:
    """Begins to watch the other hosts, once they have joined, until this process ends."""
    global _watch
    before_abort(_lost_coordinator)
    _watch = _Watch()
    before_abort(_lost_coordinator)  # again: a TPU's runtime, which is now loaded, has its own
    atexit.register(_watch.leave)  # runs before JAX's own, which ends the connection


def before_abort(error: Callable[[], Exception | None]) -> None:
    """From now on an abort first calls `error`, and ends with it instead if there is one.

    JAX aborts a process that does not find the coordinator or loses it, from a thread of its own,
    and can't be told otherwise: it breaks if it is to call a Python function instead. So this is
    called in the abort, by C's signal handling. Python's own would be too late.
    """
    global _before_abort

    def speak(_: int) -> None:
        found = error()
        if found:
            end(found)
        library.signal(signal.SIGABRT, kind(0))  # as if nobody had asked
        os.kill(os.getpid(), signal.SIGABRT)

    kind = ctypes.CFUNCTYPE(None, ctypes.c_int)
    library: Any = ctypes.CDLL(None)
    library.signal.argtypes, library.signal.restype = (ctypes.c_int, kind), ctypes.c_void_p
    library.signal(signal.SIGABRT, now := kind(speak))
    _before_abort = now


def _lost_coordinator() -> HostLost | None:
    """None if the coordinator answers: an abort for another reason says itself what it is."""
    client: Any = ocp.multihost.get_jax_distributed_client()
    answered = threading.Event()

    def ask() -> None:
        with contextlib.suppress(JAX_ERROR):
            client.key_value_dir_get(BEATS)
            answered.set()

    threading.Thread(target=ask, daemon=True).start()
    return None if answered.wait(ANSWER) else HostLost(f"host 0, the coordinator, is lost; {AGAIN}")


def _end_if_stuck() -> None:
    """Should no thread of this process run Python for too long from now on, it ends all the same,
    with code 1 and what each was at."""
    faulthandler.dump_traceback_later(2 * SILENCE, exit=True)


def end(error: Exception) -> NoReturn:
    """Ends this process here, with the sentence and the code of its error.

    To unwind instead would be to wait: what is closed on the way asks hosts that are gone, or that
    wait for this one. Whatever was whole on disk stays.
    """
    _ending.acquire()  # one sentence; whoever comes second waits for the end of the process
    _end_if_stuck()
    if isinstance(error, UserError | RunError):
        print(f"error: {error}", file=sys.stderr)
    else:
        traceback.print_exception(error)
    sys.stdout.flush()
    sys.stderr.flush()
    if _watch:
        why = str(error).removesuffix(f"; {AGAIN}") or type(error).__name__
        words = threading.Thread(target=_watch.leave_in_order, args=(why,), daemon=True)
        words.start()
        words.join(ANSWER if _watch.host else LAST_WORDS)  # without the coordinator it would hang
    os._exit(error.exit_code if isinstance(error, UserError | RunError) else 1)


@contextlib.contextmanager
def ending_at_once() -> Iterator[None]:
    """Of several hosts, one that fails ends here; see `end`."""
    try:
        yield
    except Exception as error:
        if jax.process_count() == 1:
            raise
        if isinstance(error, HostLost):
            end(error)
        broken = next((e for e in (error, error.__cause__) if isinstance(e, JAX_ERROR)), None)
        if any(sign in str(broken) for sign in SIGNS_OF_LOSS):
            first = str(broken).splitlines()[0]
            end(HostLost(f"host {jax.process_index()} lost another one ({first}); {AGAIN}"))
        end(error)
