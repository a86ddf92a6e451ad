"""Exchange between hosts at each step, and shares of another number of hosts."""

import json
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import jax
import numpy as np
import pytest
from etils import epath

from oapl_jax import multihost
from oapl_jax.errors import FleetLost
from oapl_jax.rollout.source import GroupSource, reshard
from oapl_jax.structs import Group, Prompt, Rollout, encode_groups


class Host0:
    """The source of host 0 of two; the test plays host 1, and the worker."""

    def __init__(self, monkeypatch):
        self.mine: set[int] = set()
        self.other: list[Any] = ["", "", []]  # host 1's stop, lost fleet and versions
        self.stop: Any = SimpleNamespace(requested="")
        monkeypatch.setattr(jax, "process_count", lambda: 2)
        monkeypatch.setattr(multihost, "barrier", lambda name, *, deadline: None)
        gather = lambda mine, *_, **__: [mine, json.dumps(self.other).encode()]
        monkeypatch.setattr(multihost, "allgather_bytes", gather)
        parts: Any = dict.fromkeys(("store", "ledger", "guard", "writer", "notes"), MagicMock())
        worker: Any = SimpleNamespace(versions=lambda: self.mine)
        settings: Any = dict(
            sampled=0, recorded=0, fresh=0, overlap=True, deadline=1.0, more_metrics=()
        )
        workdir = epath.Path("nowhere")
        self.source = GroupSource(worker=worker, workdir=workdir, **parts, **settings)

    def collect(self, step):
        self.stop.requested = "stop"  # so that no groups are exchanged
        return self.source.collect(step, self.stop)


def test_versions_in_use_are_those_of_all_hosts_at_the_last_step(monkeypatch):
    host = Host0(monkeypatch)
    assert host.source.versions() == set()
    host.mine, host.other[2] = {0, 4}, [0, 8]
    host.collect(3)
    assert host.source.versions() == {0, 4, 8}
    host.mine = {8}
    assert host.source.versions() == {0, 4, 8}  # the same on all hosts
    host.collect(4)
    assert host.source.versions() == {0, 8}
    monkeypatch.setattr(jax, "process_count", lambda: 1)
    host.mine = {0, 4}
    assert host.source.versions() == {0, 4}  # a single host's own


def test_a_stop_or_a_lost_fleet_of_one_host_ends_all(monkeypatch):
    host = Host0(monkeypatch)
    host.other = ["SIGTERM", "", []]
    groups, _ = host.source.collect(3, host.stop)
    assert (groups, host.stop.requested) == ([], "SIGTERM")
    host.other = ["", "no server is left", []]
    with pytest.raises(FleetLost, match="no server is left"):
        host.collect(4)


def share(position, held=(), again=(), chosen=()):
    rollout = Rollout(np.array([1], np.int32), np.zeros(1, np.float32), 0, "stop")
    prompt = lambda i: Prompt(f"p{i}", i, np.array([1], np.int32), "", "", "")
    groups = [Group(prompt(i), (rollout,), np.zeros(1, np.float32)) for i in held]
    prompts = {"stream": {"stream_index": position}, "chosen": list(chosen)}
    state = dict(prompts=prompts, again=list(again), scorer={}, ledger=7, recorded=None)
    buffer = {"groups": encode_groups(groups)}
    return dict(state, buffer=buffer, zero_reward_groups=position, shards=None)


@pytest.mark.parametrize("hosts", [1, 2, 3, 4])
def test_every_untrained_prompt_is_sampled_by_one_of_the_new_hosts(hosts):
    """Host 0 reserved 0, 2, 4, 6; host 1, which is slower, 1 and 3."""
    saved = [share(8, held=[4], again=[6]), share(4, held=[3])]
    states = [reshard(saved, host=h, hosts=hosts) for h in range(hosts)]
    assert {s["prompts"]["stream"]["stream_index"] for s in states} == {8}
    start = 8 // hosts * hosts  # the stream continues there
    again = sorted(index for s in states for index in s["again"])
    assert again == [i for i in (3, 4, 5, 6, 7) if i < start]
    assert states[0]["zero_reward_groups"] == 8
    assert all(s["ledger"] == (7 if h < 2 else 0) for h, s in enumerate(states))
