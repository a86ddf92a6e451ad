"""A fleet against servers with injected faults; see fault_server.py."""

import itertools
import threading
from collections import Counter

import numpy as np
import pytest
from etils import epath
from fault_server import CONTROL, FAULTS, is_right, publish_toy
from fleets import PATIENCE, SAMPLING, SETTINGS, N, Run, always, once, prompt, prompts, wait_until

from oapl_jax.model.tokenizer import make_character_tokenizer

UPDATE = ("refuse", "no", "misnamed", "half", "stale")
# The states that the faults of a call lead to.
BAD_ADMISSIONS = {
    ("update", "refused"): UPDATE,
    ("update", "lost"): ("500", "reset", "hang"),
    ("flush", "refused"): ("busy",),
    ("flush", "lost"): ("500",),
    ("score", "refused"): ("stale", "wrong_version"),
    ("score", "lost"): ("nan", "few", "500"),
    ("info", "refused"): ("wrong_version",),
    ("info", "lost"): ("500", "hang"),
    ("generate", "refused"): ("400",),
    ("generate", "lost"): ("nan", "few", "truncated", "500", "no_logp"),
}


@pytest.mark.parametrize(
    ("call", "state", "fault"),
    [(*key, fault) for key, faults in BAD_ADMISSIONS.items() for fault in faults],
)
def test_a_server_that_fails_a_refresh_samples_nothing(make_fleet, call, state, fault):
    """The other server samples alone, until the first one recovers."""
    deadlines = dict(control_deadline=0.5, update_deadline=0.5, start_deadline=0.1)
    fleet, (bad, good) = make_fleet(2, **deadlines)
    bad.plan = always(call, fault)
    fleet.publish(3)
    wait_until(lambda: fleet.of(good, "state") == "ready")
    wait_until(lambda: fleet.of(bad, state))
    assert fleet.sample(20).servers == {good.url}
    assert fleet.has_logged(f"{bad.url} is {state}")
    bad.plan = lambda this: ""
    fleet.wait_ready()
    assert fleet.has_logged(f"{bad.url} is ready")
    assert fleet.sample(40).servers == {good.url, bad.url}


def test_a_server_that_loads_the_weights_and_refuses(make_fleet):
    fleet, (server,) = make_fleet(1)
    server.plan = always("update", "late_no")
    fleet.publish(2)
    assert fleet.sample(5).versions == {2}


@pytest.mark.parametrize("fault", ["503", "hang", "reset"])
def test_a_server_that_fails_its_health_check_is_lost(ready_fleet, fault):
    """Its requests in flight are retried on another server."""
    fleet, (bad, good) = ready_fleet(2, control_deadline=1.0, request_deadline=1000.0)
    bad.seconds = 1000.0
    taker = fleet.take(prompts(20))
    wait_until(lambda: fleet.of(bad, "in_flight") > 0)
    bad.plan = lambda this: fault if this in CONTROL else ""
    taken = taker.right(20)
    assert taken.servers == {good.url}
    assert {a.server for s in taken for a in s.attempts} == {bad.url}
    fleet.assert_balanced(taken, 20)


def test_a_killed_server_comes_back(ready_fleet):
    fleet, made = ready_fleet(2)
    victim = made[0]
    victim.seconds, made[1].seconds = 0.2, 0.01  # the victim has requests in flight when it ends
    killed, back = threading.Event(), threading.Event()

    def pull():
        for index in itertools.count():
            if index == 40:
                victim.kill()
                killed.set()
            if back.is_set():
                break
            yield prompt(index)

    taker = fleet.take(pull())
    assert killed.wait(PATIENCE)
    wait_until(lambda: fleet.of(victim, "state") == "lost")
    assert victim.loads == [0]
    victim.start()  # with weights of no version
    wait_until(lambda: fleet.of(victim, "state") == "ready")
    assert victim.loads == [0, 0]  # it loaded the target version first
    sampled = fleet.of(victim, "sampled")
    wait_until(lambda: fleet.of(victim, "sampled") > sampled)
    back.set()
    taken = taker.right()
    assert any(s.attempts for s in taken)
    assert all(s.rollouts for s in taken)
    assert fleet.counts()["refused"] == 0
    fleet.assert_balanced(taken, len(taken))


def test_a_server_that_comes_back_with_other_weights_under_the_same_name(ready_fleet):
    fleet, (server,) = ready_fleet(1, 3, control_deadline=0.5)
    server.plan = lambda this: "503" if this in CONTROL else ""
    wait_until(lambda: fleet.states() == {"lost"})
    server.held = 55
    server.plan = lambda this: ""
    fleet.sample(20)
    assert (fleet.counts()["probe_failed"], server.loads) == (1, [3, 3])


def test_a_server_that_comes_back_loads_the_target_version_first(ready_fleet):
    """Even where older versions are allowed and it was refreshed a moment ago."""
    fleet, (server,) = ready_fleet(1, allow_older=True)
    server.update_seconds = 1.5  # and so long it samples before the next refresh
    fleet.publish(1)
    fleet.wait_ready(1)
    server.update_seconds = 0.0
    fleet.publish(2)
    server.plan = once("health", "503")
    wait_until(lambda: fleet.of(server, "lost"))
    fleet.wait_ready()
    assert (fleet.versions(), server.loads) == ({2}, [0, 1, 2])


def test_a_thousand_random_faults(ready_fleet, tmp_path):
    """The ledger has each group once, and no rollout is wrong."""
    rng, lock = np.random.default_rng(0), threading.Lock()
    faults = {
        "generate": FAULTS,
        "score": (*("stale", "nan", "few", "500", "reset") * 3, "hang"),
        "update": (*(*UPDATE, "late_no", "500", "reset") * 2, "hang"),
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

    deadlines = dict(control_deadline=0.5, request_deadline=0.5, update_deadline=0.5)
    deadlines |= dict(drain_deadline=0.05, backoff_limit=0.05)
    fleet, made = ready_fleet(6, allow_older=True, max_in_flight=24, **deadlines)
    for server in made:
        server.plan, server.seconds = plan, 0.002
    committed = lambda: sum(n for s in made for (_, fault), n in s.faults.items() if fault)
    tokenizer = make_character_tokenizer("0123456789+=", tmp_path / "tokenizer")
    run = Run(fleet, epath.Path(tmp_path), tokenizer, capacity=48)
    run.worker.start()
    dead = made[0]
    for step in itertools.count():
        if committed() >= 1000:
            break
        if step % 150 == 75:
            version = step // 150 + 1
            run.store.set_target(version, publish_toy(fleet.directory, version))
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
    attempts = Counter(
        row.id.split(".")[1]
        for row in found.rollouts()
        if row.id.endswith(".0") and row.reason in ("failed", "mixed")
    )
    failed = [group for group in found.groups() if group.state == "failed"]
    assert all(attempts[str(group.stream_index)] == SETTINGS["attempts"] for group in failed)
