"""Several hosts that run one program: how they find each other, meet, and exchange bytes.

Every host runs the same command, takes its share of the prompts, and holds its share of the
buffer. What a gradient step needs of all of them is exchanged here, in two ways: `meet` and
`gather`. With one host both do nothing.
"""

import contextlib
import io
import json
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from oapl_jax import heartbeat
from oapl_jax.errors import HostLost, UserError
from oapl_jax.heartbeat import AGAIN

JOIN_DEADLINE = 300  # seconds until all hosts have started
JSON = "json"  # the array that holds the data which is no array
JAX_SILENCE = 100  # seconds after which JAX aborts everybody: heartbeat.py is to be first
LOOK = 0.25  # seconds between two looks for what another host is to write
FIRST = 4088  # bytes of a message that go with its length; of most messages all
BLOCK = 1 << 20  # bytes that follow at a time


def join(*, pod: bool, coordinator: str, hosts: int, host: int) -> None:
    """Joins the other hosts, before JAX has looked for devices.

    Args:
      pod: whether the environment (a TPU pod, GKE, Slurm) says who the hosts are.
      coordinator: "address:port" of host 0, where it does not; "" for a single host.
      hosts: how many there are.
      host: which one this is.

    Raises:
      UserError: for flags that do not go together.
      HostLost: if a host does not come in time.
    """
    if not pod and not coordinator:
        return
    if pod and coordinator:
        raise UserError("--pod finds the hosts by itself; leave out --coordinator, or --pod")
    if coordinator and not 0 <= host < hosts:
        raise UserError(f"--host={host} must lie within 0 and --hosts={hosts} - 1")
    jax.config.update("jax_enable_preemption_service", False)  # SIGTERM saves and leaves: see train
    apart = HostLost(
        f"the hosts did not find each other within {JOIN_DEADLINE} s; start the same command on "
        "all of them, with --coordinator, --hosts and --host, or --pod where the environment knows "
        "them"
    )
    heartbeat.before_abort(lambda: apart)
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
        raise apart from error
    heartbeat.watch()


def meet(what: str, *, deadline: float) -> None:
    """Returns when all hosts are here.

    Args:
      what: a name that no other meeting has, for people too.
      deadline: seconds (rollout.deadline).

    Raises:
      HostLost: if one does not come.
    """
    barrier = ocp.multihost.get_barrier_sync_fn()
    try:
        barrier(key=what, timeout_ms=int(1000 * deadline))
    except RuntimeError as error:
        raise HostLost(
            f"host {jax.process_index()} waited {deadline:.0f} s (rollout.deadline) for the others "
            f"at {what}: {_missing(error)}; {AGAIN}"
        ) from error


def _missing(error: Exception) -> str:
    """Which hosts did not come, as far as JAX says so."""
    lines = str(error).splitlines()
    after = [i for i, line in enumerate(lines) if "timed out task names" in line]
    names = [name for name in (lines[after[0] + 1 :] if after else []) if name.strip().isdigit()]
    return f"host {', '.join(names)} did not come" if names else lines[0]


def gather(mine: bytes, what: str, *, deadline: float) -> list[bytes]:
    """What each host has to say, in their order; all must call it.

    Args:
      mine: of any length.
      what: a name, for people.
      deadline: seconds (rollout.deadline).
    """
    if jax.process_count() == 1:
        return [mine]
    with heartbeat.together(what, deadline=deadline):
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


def union(mine: set[int], what: str, *, deadline: float) -> set[int]:
    """The numbers that any host has; all must call it, see `gather`."""
    said = gather(json.dumps(sorted(mine)).encode(), what, deadline=deadline)
    return {number for numbers in said for number in json.loads(numbers)}


def wait_until(seen: Callable[[], bool], what: str, *, deadline: float) -> None:
    """Returns when this host sees what another one writes, which may be later than it is written.

    Raises:
      HostLost: if it does not.
    """
    give_up = time.monotonic() + deadline
    while not seen():
        if time.monotonic() > give_up:
            raise HostLost(
                f"host {jax.process_index()} waited {deadline:.0f} s (rollout.deadline) to see "
                f"{what}; see that all hosts share --workdir, and {AGAIN}"
            )
        time.sleep(LOOK)


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
