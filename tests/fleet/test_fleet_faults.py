"""The fleet against servers that misbehave on order; see fault_server.py."""

import itertools
import threading
from typing import Any

import numpy as np
import pytest
from etils import epath
from fault_server import CONTROL, FAULTS, is_right, publish_toy
from fleets import (
    PATIENCE,
    SAMPLING,
    N,
    Run,
    Taker,
    assert_balanced,
    assert_each_once,
    assert_right,
    once,
    prompt,
    prompts,
    ready_fleet,
    states,
    wait_until,
)

from oapl_jax.model.tokenizer import make_character_tokenizer

# Faults of a server


BAD_ADMISSIONS = [
    ("update", "refuse", "refused"),
    ("update", "no", "refused"),
    ("update", "misnamed", "refused"),
    ("update", "half", "refused"),
    ("update", "stale", "refused"),
    ("update", "500", "lost"),
    ("update", "reset", "lost"),
    ("update", "hang", "lost"),
    ("flush", "busy", "refused"),
    ("flush", "500", "lost"),
    ("score", "stale", "refused"),
    ("score", "wrong_version", "refused"),
    ("score", "nan", "lost"),
    ("score", "few", "lost"),
    ("score", "500", "lost"),
    ("info", "wrong_version", "refused"),
    ("info", "500", "lost"),
    ("info", "hang", "lost"),
    ("generate", "nan", "lost"),
    ("generate", "400", "refused"),
]


@pytest.mark.parametrize(("call", "fault", "state"), BAD_ADMISSIONS)
def test_a_server_that_fails_a_refresh_samples_nothing(
    make_fleet, toy_servers, directory, call, fault, state
):
    """The other one goes on alone, until the first does as it is told."""
    bad, good = toy_servers(2)
    deadlines = dict(control_deadline=0.5, update_deadline=0.5, start_deadline=0.1)
    fleet = make_fleet([bad.url, good.url], **deadlines)
    bad.plan = lambda this: fault if this == call else ""
    fleet.refresh(3, publish_toy(directory, 3))
    wait_until(lambda: fleet.servers()[good.url]["state"] == "ready")
    wait_until(lambda: fleet.servers()[bad.url][state])
    taken = Taker(fleet, prompts(20)).result()
    assert_each_once(taken, 20)
    assert_right(taken)
    assert {s.server for s in taken} == {good.url}
    assert any(f"server {bad.url} is {state}: " in sentence for sentence in fleet.said)
    bad.plan = lambda this: ""
    wait_until(lambda: states(fleet) == {"ready"}, "recovery")
    assert any(f"server {bad.url} is ready again, with version 3" in s for s in fleet.said)
    taken = Taker(fleet, prompts(40)).result()
    assert_right(taken)
    assert {s.server for s in taken} == {good.url, bad.url}


def test_a_server_that_takes_the_weights_and_says_no(make_fleet, toy_servers, directory):
    (server,) = toy_servers(1)
    server.plan = lambda this: "late_no" if this == "update" else ""
    fleet = ready_fleet(make_fleet, [server], directory, 2)
    taken = Taker(fleet, prompts(5)).result()
    assert_right(taken)
    assert {r.policy_version for s in taken for r in s.rollouts} == {2}


@pytest.mark.parametrize("fault", ["503", "hang", "reset"])
def test_a_server_that_fails_its_health_is_lost(make_fleet, toy_servers, directory, fault):
    """And what is in flight there is requested from another one."""
    bad, good = toy_servers(2)
    deadlines: Any = dict(control_deadline=1.0, request_deadline=1000.0)
    fleet = ready_fleet(make_fleet, [bad, good], directory, **deadlines)
    bad.seconds = 1000.0
    taker = Taker(fleet, prompts(20))
    wait_until(lambda: fleet.servers()[bad.url]["in_flight"] > 0)
    bad.plan = lambda this: fault if this in CONTROL else ""
    taken = taker.result()
    assert_each_once(taken, 20)
    assert_right(taken)
    assert {s.server for s in taken} == {good.url}
    assert {a.server for s in taken for a in s.attempts} == {bad.url}
    assert_balanced(fleet, taken, 20)


def test_a_killed_server_comes_back(make_fleet, toy_servers, directory):
    made = toy_servers(2)
    victim = made[0]
    fleet = ready_fleet(make_fleet, made, directory)
    for server in made:
        server.seconds = 0.01
    killed, back = threading.Event(), threading.Event()

    def killing():
        for draw in itertools.count():
            if draw == 40:
                victim.kill()
                killed.set()
            if back.is_set():
                break
            yield prompt(draw)

    taker = Taker(fleet, killing())
    assert killed.wait(PATIENCE)
    wait_until(lambda: fleet.servers()[victim.url]["state"] == "lost")
    assert victim.loads == [0]
    victim.start()  # with weights of no version
    wait_until(lambda: fleet.servers()[victim.url]["state"] == "ready")
    assert victim.loads == [0, 0]  # it was brought to the wanted version before
    sampled = fleet.servers()[victim.url]["sampled"]
    wait_until(lambda: fleet.servers()[victim.url]["sampled"] > sampled)
    back.set()
    taken = taker.result()
    assert_each_once(taken, len(taken))
    assert_right(taken)
    assert any(s.attempts for s in taken)
    assert all(s.rollouts for s in taken)
    assert fleet.metrics()["fleet/refused"] == 0
    assert_balanced(fleet, taken, len(taken))


def test_a_server_that_comes_back_with_other_weights_under_the_same_name(
    make_fleet, toy_servers, directory
):
    (server,) = toy_servers(1)
    fleet = ready_fleet(make_fleet, [server], directory, 3, control_deadline=0.5)
    server.plan = lambda this: "503" if this in CONTROL else ""
    wait_until(lambda: states(fleet) == {"lost"})
    server.held = 55
    server.plan = lambda this: ""
    taken = Taker(fleet, prompts(20)).result()
    assert_right(taken)
    assert fleet.metrics()["fleet/probe_failed"] == 1
    assert server.loads == [3, 3]


def test_a_server_that_comes_back_takes_the_wanted_version_first(
    make_fleet, toy_servers, directory
):
    """Even where older versions may serve, and it has had its turn just now."""
    (server,) = toy_servers(1)
    fleet = ready_fleet(make_fleet, [server], directory, allow_older=True)
    server.update_seconds = 1.5  # so long it serves before it is refreshed again
    fleet.refresh(1, publish_toy(directory, 1))
    wait_until(lambda: fleet.versions() == {1} and states(fleet) == {"ready"}, "version 1")
    server.update_seconds = 0.0
    fleet.refresh(2, publish_toy(directory, 2))
    server.plan = once("health", "503")
    wait_until(lambda: fleet.servers()[server.url]["lost"])
    wait_until(lambda: states(fleet) == {"ready"}, "its return")
    assert fleet.versions() == {2}
    assert server.loads == [0, 1, 2]


# Everything at once


def test_a_thousand_random_faults(make_fleet, toy_servers, directory, tmp_path):
    """Whatever servers do, the ledger has each group once, and no rollout is wrong."""
    made, rng = toy_servers(6), np.random.default_rng(0)
    lock = threading.Lock()
    faults = {
        "generate": FAULTS,
        "score": (*("stale", "nan", "few", "500", "reset") * 3, "hang"),
        "update": (
            *("refuse", "no", "misnamed", "half", "stale", "late_no", "500", "reset") * 2,
            "hang",
        ),
        "flush": (*("busy", "500") * 5, "hang"),
        "info": (*("wrong_version", "500") * 5, "hang"),
        "health": (*("503", "reset") * 5, "hang"),
        "abort": ("500", "reset"),
    }
    bags: dict[str, list[str]] = {call: [] for call in faults}

    def plan(call):
        with lock:
            # Versions are rare: at the rate of other calls a run might see no bad update at all.
            if rng.random() > {"generate": 0.5, "update": 0.4}.get(call, 0.08):
                return ""
            if not bags[call]:  # in random order, and each as often as another
                bags[call] = [str(fault) for fault in rng.permutation(faults[call])]
            return bags[call].pop()

    fleet = ready_fleet(
        make_fleet,
        made,
        directory,
        allow_older=True,
        control_deadline=0.5,
        request_deadline=0.5,
        update_deadline=0.5,
        drain_deadline=0.05,
        max_in_flight=24,
        backoff_limit=0.05,
    )
    for server in made:
        server.plan, server.seconds = plan, 0.002
    committed = lambda: sum(n for s in made for (_, fault), n in s.faults.items() if fault)
    tokenizer = make_character_tokenizer("0123456789+=", tmp_path / "tokenizer")
    run = Run(fleet, epath.Path(tmp_path), tokenizer, sampling=SAMPLING, capacity=48)
    run.worker.start()
    dead = made[0]
    for step in itertools.count():
        if committed() >= 1000:
            break
        if step % 150 == 75:
            version = step // 150 + 1
            run.worker.serve(version, publish_toy(directory, version))
        if step % 100 == 30:
            dead = made[step // 100 % len(made)]
            dead.kill()
        if step % 100 == 60:
            dead.start()
        run.train(step)
    found = run.finish()

    for group in run.groups:
        assert len(group.rollouts) == N
        assert len({r.policy_version for r in group.rollouts}) == 1
        assert all(is_right(r, group.prompt.tokens, SAMPLING) for r in group.rollouts)
    kinds = {(call, fault) for s in made for (call, fault) in s.faults if fault}
    assert {fault for call, fault in kinds if call == "generate"} == set(FAULTS)
    assert {call for call, _ in kinds} >= {"generate", "score", "update", "flush", "info"}
    assert len({group.policy_version for group in run.groups}) > 1
    reasons = [[a[2] for a in e.sample["attempts"]] for e in found.entries if e.state == "failed"]
    assert all(sum(reason != "aborted" for reason in of_one) == 4 for of_one in reasons)
