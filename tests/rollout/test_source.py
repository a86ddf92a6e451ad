"""What hosts tell each other when they take a step."""

import json
from types import SimpleNamespace
from typing import Any

import jax
import pytest

from oapl_jax import multihost as hosts
from oapl_jax.errors import FleetLost
from oapl_jax.rollout.source import Supply
from oapl_jax.tracking.progress import StopRequest

OTHER = ["", "", [0, 8]]  # what host 1 says: not stopped, has its servers, uses versions 0 and 8


@pytest.fixture
def supply(monkeypatch) -> Supply:
    """That of host 0 of two."""
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(hosts, "meet", lambda what, *, deadline: None)
    answer = lambda mine, *_, **__: [mine, json.dumps(OTHER).encode()]
    monkeypatch.setattr(hosts, "gather", answer)
    parts: dict[str, Any] = dict.fromkeys(Supply.__dataclass_fields__)
    parts |= {
        "job": SimpleNamespace(config=SimpleNamespace(rollout=SimpleNamespace(deadline=1.0))),
        "worker": SimpleNamespace(versions=lambda: {4}),
        "buffer": SimpleNamespace(versions=lambda: {0, 4}),
        "in_use": set(),
    }
    return Supply(**parts)


def stop_request(requested: str = "") -> StopRequest:
    stop = StopRequest.__new__(StopRequest)  # without its signal handlers
    stop.requested = requested
    return stop


def test_versions_in_use_are_those_of_all_hosts_at_the_last_step(supply):
    assert supply.versions() == set()
    supply._agree(3, stop_request(), lost="")
    assert supply.versions() == {0, 4, 8}
    supply.worker.versions = lambda: {8}
    supply.buffer.versions = lambda: {8}
    assert supply.versions() == {0, 4, 8}  # the same on all hosts
    supply._agree(4, stop_request(), lost="")
    assert supply.versions() == {0, 8}


def test_one_host_has_the_versions_that_it_uses_now(supply, monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 1)
    assert supply.versions() == {0, 4}


def test_a_stop_or_a_loss_of_one_host_is_that_of_all(supply, monkeypatch):
    said = [["", "", []], ["SIGTERM", "", []]]
    monkeypatch.setattr(hosts, "gather", lambda *_, **__: [json.dumps(s).encode() for s in said])
    stop = stop_request()
    supply._agree(3, stop, lost="")
    assert stop.requested == "SIGTERM"
    said[1] = ["", "no server is left", []]
    with pytest.raises(FleetLost, match="no server is left"):
        supply._agree(4, stop_request(), lost="")
