"""Several hosts that run one program: how they find each other, meet, and exchange bytes.

Every host runs the same command, takes its share of the prompts, and holds its share of the
buffer. What a gradient step needs of all of them is exchanged here, in two ways: `meet`, with a
deadline, and `gather`. With one host both do nothing.
"""

import atexit
import contextlib
import io
import json
import os
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from typing import Any, NoReturn

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from oapl_jax.errors import HostLost, RunError, UserError

JOIN_DEADLINE = 300  # seconds until all hosts have started
JSON = "json"  # the array that holds the data which is no array
SIGNS_OF_LOSS = ("Gloo", "UNAVAILABLE", "DEADLINE_EXCEEDED", "Connection")  # in JAX's messages
SILENCE = 40.0  # seconds after which a host that says nothing counts as lost
JAX_SILENCE = 100  # seconds after which JAX ends everybody, without a sentence for people
JAX_ERROR = jax.errors.JaxRuntimeError
GOODBYE = "goodbye"
LAST_WORDS = 10.0  # seconds that host 0 stays for those of the others
FIRST = 4088  # bytes of a message that go with its length; of most messages all
BLOCK = 1 << 20  # bytes that follow at a time
AGAIN = "the same command on all hosts goes on from the newest checkpoint"


def join(*, pod: bool, coordinator: str, hosts: int, host: int) -> None:
    """Joins the other hosts, before JAX has looked for devices.

    Args:
      pod: whether the environment (a TPU pod, GKE, Slurm) says who the hosts are.
      coordinator: "address:port" of host 0, where it does not; "" for a single host.
      hosts: how many there are.
      host: which one this is.

    Raises:
      UserError: for flags that do not go together, or hosts that do not come in time.
    """
    if not pod and not coordinator:
        return
    if pod and coordinator:
        raise UserError("--pod finds the hosts by itself; leave out --coordinator, or --pod")
    if coordinator and not 0 <= host < hosts:
        raise UserError(f"--host={host} must lie within 0 and --hosts={hosts} - 1")
    jax.config.update("jax_enable_preemption_service", False)  # SIGTERM saves and leaves: see train
    try:
        jax.distributed.initialize(
            coordinator_address=coordinator or None,
            num_processes=None if pod else hosts,
            process_id=None if pod else host,
            initialization_timeout=JOIN_DEADLINE,
            heartbeat_timeout_seconds=JAX_SILENCE,
        )
    except (RuntimeError, ValueError) as error:
        raise UserError(
            f"the hosts did not find each other ({str(error).splitlines()[0]}); start the same "
            f"command on all of them within {JOIN_DEADLINE} s, with --coordinator, --hosts and "
            "--host, or --pod where the environment knows them"
        ) from error
    leaving = threading.Event()
    watch = threading.Thread(target=_watch, args=(leaving,), name="hosts", daemon=True)
    watch.start()
    atexit.register(_say_goodbye, leaving, watch)  # before JAX's own, which ends the connection


def _watch(leaving: threading.Event) -> None:
    """Tells the others that this host lives, and ends it if one of them does not.

    A computation, or a save, of all hosts can hang for ever when one is killed.
    """
    client: Any = ocp.multihost.get_jax_distributed_client()
    mine, beat, heard = f"alive/{jax.process_index()}", 0, {}
    while not leaving.wait(SILENCE / 20):
        beat += 1
        try:
            client.key_value_set(mine, str(beat), allow_overwrite=True)
            said = dict(client.key_value_dir_get("alive/"))
        except JAX_ERROR as error:
            first = str(error).splitlines()[0]
            end(HostLost(f"host 0, the coordinator, does not answer ({first}); {AGAIN}"))
        now = time.monotonic()
        for host in {*said, *heard}:
            if said.get(host) != heard.get(host, ("", 0))[0]:
                heard[host] = said.get(host), now
            elif said.get(host) != GOODBYE and now - heard[host][1] > SILENCE:
                number = host.rpartition("/")[2]
                end(HostLost(f"host {number} has not been heard of for {SILENCE:.0f} s; {AGAIN}"))


def _say_goodbye(leaving: threading.Event, watch: threading.Thread) -> None:
    leaving.set()
    watch.join()
    client: Any = ocp.multihost.get_jax_distributed_client()
    client.key_value_set(f"alive/{jax.process_index()}", GOODBYE, allow_overwrite=True)


def end(error: Exception) -> NoReturn:
    """Ends this process here, with the sentence and the code of its error.

    To unwind instead would be to wait: what is closed on the way asks hosts that are gone, or that
    wait for this one. Whatever was whole on disk stays.
    """
    if isinstance(error, UserError | RunError):
        print(f"error: {error}", file=sys.stderr)
    else:
        traceback.print_exception(error)
    sys.stdout.flush()
    sys.stderr.flush()
    with contextlib.suppress(JAX_ERROR):
        _leave_in_order()
    os._exit(error.exit_code if isinstance(error, UserError | RunError) else 1)


def _leave_in_order() -> None:
    """Host 0 leaves last if the others leave too: JAX kills who loses it before their sentence."""
    client: Any = ocp.multihost.get_jax_distributed_client()
    if jax.process_index():
        client.key_value_set(f"alive/{jax.process_index()}", GOODBYE, allow_overwrite=True)
        return
    give_up, left = time.monotonic() + LAST_WORDS, 0
    while left < jax.process_count() - 1 and time.monotonic() < give_up:
        time.sleep(0.05)
        left = [said for _, said in client.key_value_dir_get("alive/")].count(GOODBYE)


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


def meet(what: str, *, deadline: float) -> None:
    """Returns when all hosts are here.

    Args:
      what: a name that no other meeting has, for people too.
      deadline: seconds.

    Raises:
      HostLost: if one does not come.
    """
    barrier = ocp.multihost.get_barrier_sync_fn()
    try:
        barrier(key=what, timeout_ms=int(1000 * deadline))
    except RuntimeError as error:
        raise HostLost(
            f"host {jax.process_index()} waited {deadline:.0f} s for the others at {what}: "
            f"{_missing(error)}; {AGAIN}"
        ) from error


def _missing(error: Exception) -> str:
    """Which hosts did not come, as far as JAX says so."""
    lines = str(error).splitlines()
    after = [i for i, line in enumerate(lines) if "timed out task names" in line]
    names = [name for name in (lines[after[0] + 1 :] if after else []) if name.strip().isdigit()]
    return f"host {', '.join(names)} did not come" if names else lines[0]


def gather(mine: bytes) -> list[bytes]:
    """What each host has to say, in their order; all must call it."""
    if jax.process_count() == 1:
        return [mine]
    first = _exchange(len(mine).to_bytes(8, "little") + mine[:FIRST], 8 + FIRST)
    sizes = [int.from_bytes(row[:8], "little") for row in first]
    said = [row[8:] for row in first]
    for start in range(FIRST, max(sizes), BLOCK):
        blocks = _exchange(mine[start : start + BLOCK], BLOCK)
        for whole, block in zip(said, blocks, strict=True):
            whole += block
    return [bytes(whole[:size]) for whole, size in zip(said, sizes, strict=True)]


def _exchange(mine: bytes, size: int) -> list[bytearray]:
    """At most `size` bytes of each host, filled up with zeros: JAX compiles a program a size."""
    padded = np.zeros(size, np.uint8)
    padded[: len(mine)] = np.frombuffer(mine, np.uint8)
    return [bytearray(row) for row in np.asarray(multihost_utils.process_allgather(padded))]


def union(mine: set[int]) -> set[int]:
    """The numbers that any host has; all must call it."""
    return {n for said in gather(json.dumps(sorted(mine)).encode()) for n in json.loads(said)}


@contextlib.contextmanager
def first_host_first(what: str, *, deadline: float) -> Iterator[None]:
    """Host 0 runs the body, which may write files; then the others do, and find them.

    Raises:
      HostLost: as `meet`.
    """
    if jax.process_index():
        meet(what, deadline=deadline)
    yield
    if not jax.process_index():
        meet(what, deadline=deadline)


def own(name: str, host: int | None = None) -> str:
    """The file name of a host, this one by default: metrics.jsonl is host 0's, metrics.host1.jsonl
    that of host 1."""
    host = jax.process_index() if host is None else host
    stem, dot, suffix = name.partition(".")
    return f"{stem}.host{host}{dot}{suffix}" if host else name


def encode(data: dict[str, Any], arrays: dict[str, np.ndarray]) -> bytes:
    """JSON-able data and arrays as bytes."""
    file = io.BytesIO()
    text = np.frombuffer(json.dumps(data).encode(), np.uint8)
    np.savez(file, allow_pickle=False, **arrays, **{JSON: text})
    return file.getvalue()


def decode(content: bytes) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The inverse of `encode`."""
    with np.load(io.BytesIO(content), allow_pickle=False) as file:
        arrays = dict(file)
    return json.loads(arrays.pop(JSON).tobytes()), arrays
