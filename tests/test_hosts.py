"""What hosts exchange, with real processes on one machine."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from oapl_jax import hosts
from oapl_jax.errors import UserError

ROOT = Path(__file__).parent.parent
TALK = """
import os, sys, time
import jax
from oapl_jax import hosts
from oapl_jax.metrics import CompileClock

host, coordinator, ending = int(sys.argv[1]), sys.argv[2], sys.argv[3]

def exchange_more_than_a_block():
    clock, programs = CompileClock(), []
    for count in (hosts.FIRST, hosts.FIRST + 1, hosts.FIRST + hosts.BLOCK, 10**6, 3 * 10**6):
        sizes = (count - 7, count)  # whoever says less is done first
        said = hosts.gather(bytes([65 + host]) * sizes[host])
        assert said == [bytes([65 + i]) * size for i, size in enumerate(sizes)], count
        programs.append(clock.programs)
    assert programs == [0, 1, 1, 1, 1]  # of the first block

def main():
    hosts.join(pod=False, coordinator=coordinator, hosts=2, host=host)
    assert (jax.device_count(), jax.local_device_count()) == (8, 4)
    hosts.meet("start", deadline=30.0)
    mine = b"x" * (3 + host) if ending != "empty" else b""
    print("gathered", hosts.gather(mine))
    if ending == "long":
        exchange_more_than_a_block()
    assert hosts.union({host, 7}) == {0, 1, 7}
    assert hosts.own("a.jsonl") == ("a.jsonl", "a.host1.jsonl")[host]
    if host == 1 and ending == "dies":
        os._exit(9)
    if host == 1 and ending == "hangs":
        time.sleep(60)
    hosts.meet("end", deadline=4.0)

with hosts.ending_at_once():
    main()
"""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def talk(ending: str) -> list[subprocess.Popen]:
    environment = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=4"}
    command = [sys.executable, "-c", TALK]
    coordinator = f"127.0.0.1:{free_port()}"
    return [
        subprocess.Popen(
            [*command, str(host), coordinator, ending],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for host in range(2)
    ]


@pytest.mark.parametrize("ending", ["well", "empty", "long"])
def test_hosts_exchange_bytes(ending):
    for process in talk(ending):
        out, err = process.communicate(timeout=120)
        assert process.returncode == 0, err
        said = "[b'', b'']" if ending == "empty" else "[b'xxx', b'xxxx']"
        assert f"gathered {said}" in out


@pytest.mark.parametrize("ending", ["dies", "hangs"])
def test_a_host_that_does_not_come_is_named(ending):
    first, second = talk(ending)
    try:
        _, err = first.communicate(timeout=60)
        assert first.returncode == 4, err
        assert "error: host 0 waited 4 s for the others at end: host 1 did not come" in err
    finally:
        second.kill()
        second.communicate()


def test_one_host_alone():
    hosts.join(pod=False, coordinator="", hosts=1, host=0)
    hosts.meet("alone", deadline=0.1)
    assert hosts.gather(b"mine") == [b"mine"]
    assert hosts.union({3, 4}) == {3, 4}


def test_encode():
    arrays = {"a": np.arange(3, dtype=np.int32), "b": np.zeros((0,), np.float32)}
    data, found = hosts.decode(hosts.encode({"x": [1, None, "é"]}, arrays))
    assert data == {"x": [1, None, "é"]}
    assert {k: v.dtype for k, v in found.items()} == {k: v.dtype for k, v in arrays.items()}
    assert all(np.array_equal(found[k], arrays[k]) for k in arrays)


@pytest.mark.parametrize(
    ("flags", "why"),
    [
        (dict(pod=True, coordinator="a:1", hosts=2, host=0), "leave out --coordinator"),
        (dict(pod=False, coordinator="a:1", hosts=2, host=2), "--host=2 must lie within"),
    ],
)
def test_flags_that_do_not_go_together(flags, why):
    with pytest.raises(UserError, match=why):
        hosts.join(**flags)
