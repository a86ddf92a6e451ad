"""Groups of a fleet: prompts in, responses out, failed attempts; see fault_server.py."""

import itertools
import threading
import time

import numpy as np
import pytest
from fault_server import FAULTS, VOCAB
from fleets import (
    PATIENCE,
    SAMPLING,
    SETTINGS,
    N,
    Taker,
    assert_balanced,
    assert_right,
    once,
    prompt,
    prompts,
    reasons_of,
    servers_of,
    versions_of,
    wait_until,
)

from oapl_jax.errors import RunError, UserError
from oapl_jax.rollout.sampler import Sampling
from oapl_jax.structs import Prompt


def test_every_prompt_comes_out_once(ready_fleet, toy_servers):
    made = toy_servers(2)
    fleet = ready_fleet(made, 5)
    assert (fleet.version, fleet.versions()) == (5, {5})
    taken = fleet.sample(60)
    assert all(len(s.rollouts) == N and not s.attempts and s.seconds > 0 for s in taken)
    assert versions_of(taken) == {5}
    assert servers_of(taken) == {server.url for server in made}
    assert {r.finish_reason for s in taken for r in s.rollouts} == {"stop", "length"}
    assert_balanced(fleet, taken, 60)
    greedy = Sampling(0.0, 1.0, 0, 4)
    assert_right(Taker(fleet, prompts(5), greedy).result(), greedy)
    assert fleet.sample(0) == []


def test_max_in_flight_limits_requests_and_pulls(ready_fleet, toy_servers):
    (server,) = toy_servers(1)
    fleet = ready_fleet([server], max_in_flight=3)
    server.seconds, pulled = 0.02, []
    count_pulled = lambda count: (pulled.append(i) or prompt(i) for i in range(count))
    Taker(fleet, count_pulled(20)).right(20)
    assert server.most_running == 3
    pulled.clear()
    groups = fleet.generate(count_pulled(100), n=N, sampling=SAMPLING)
    next(groups)
    wait_until(lambda: fleet.metrics()["fleet/waiting"] == 0)
    time.sleep(0.3)  # for further pulls
    assert len(pulled) <= 3 + 3 + 1  # finished, in flight and taken
    groups.close()


def test_a_blocked_pull_delays_no_group(ready_fleet, toy_servers):
    fleet = ready_fleet(toy_servers(1))
    blocked = threading.Event()

    def pull():
        yield from prompts(3)
        assert blocked.wait(PATIENCE)

    taker = Taker(fleet, pull())
    wait_until(lambda: len(taker.taken) == 3, "three groups while the pull blocks")
    assert taker.is_alive()
    blocked.set()
    taker.right(3)


def test_generate_raises_the_error_of_a_pull(ready_fleet, toy_servers):
    fleet = ready_fleet(toy_servers(1))

    def pull():
        yield prompt(0)
        raise UserError("no more")

    with pytest.raises(UserError, match="no more"):
        Taker(fleet, pull()).result()
    fleet.sample(4)  # the fleet continues


def test_a_prompt_that_would_crash_a_server_is_not_sent(ready_fleet, toy_servers):
    (server,) = toy_servers(1)
    fleet = ready_fleet([server])
    before = server.calls["generate"]
    bad = Prompt("p0", 0, np.array([3, VOCAB], np.int32), "", "", "toy")
    with pytest.raises(UserError, match="prompt p0"):
        Taker(fleet, [bad]).result()
    assert server.calls["generate"] == before


def test_a_prompt_before_the_first_version(make_fleet, toy_servers):
    fleet = make_fleet([server.url for server in toy_servers(1)])
    assert (fleet.version, fleet.versions()) == (-1, set())
    with pytest.raises(RunError):
        Taker(fleet, prompts(1)).result()


def test_abandoned_groups_are_cancelled(ready_fleet, toy_servers):
    (server,) = toy_servers(1)
    fleet = ready_fleet([server], request_deadline=1000.0)
    groups = fleet.generate(prompts(50), n=N, sampling=SAMPLING)
    next(groups)
    server.seconds = 1000.0
    wait_until(lambda: server.running == SETTINGS["max_in_flight"])
    groups.close()
    wait_until(lambda: fleet.metrics()["fleet/in_flight"] == server.running == 0)
    server.seconds = 0.0
    found = fleet.metrics()
    assert found["fleet/prompts"] == found["fleet/groups"] + found["fleet/cancelled"]
    assert found["fleet/groups"] == 1
    assert found["fleet/cancelled"] >= SETTINGS["max_in_flight"]
    fleet.sample(9)


# Failed attempts


def test_each_fault_is_a_named_attempt_and_a_retry(ready_fleet, toy_servers):
    (server,) = toy_servers(1)
    fleet = ready_fleet([server], request_deadline=0.5)
    total = []
    for index, fault in enumerate(FAULTS):
        server.plan = once("generate", fault)
        fleet.wait_ready()  # so that the group meets the fault, not the admission of the server
        (sampled,) = Taker(fleet, [prompt(index)]).result()
        total.append(sampled)
        assert server.faults["generate", fault] == 1
        assert len(sampled.rollouts) == N
        expected = {"delay": [], "mixed": ["mixed"]}.get(fault, ["failed"])
        assert reasons_of([sampled]) == expected, fault
        assert all((a.server, a.version) == (server.url, 0) for a in sampled.attempts)
    assert_right(total)
    assert_balanced(fleet, total, len(FAULTS))


def test_a_group_that_always_fails_is_dropped_and_counted(ready_fleet, toy_servers):
    made = toy_servers(2)
    fleet = ready_fleet(made, backoff=0.1, backoff_limit=1.0)
    poison = prompt(3).tokens.tolist()
    for server in made:
        poisoned = lambda server=server: server.requests[-1]["input_ids"] == poison
        server.plan = lambda call, poisoned=poisoned: (
            "500" if call == "generate" and poisoned() else ""
        )
    taken = Taker(fleet, [prompt(3)]).result()
    assert_balanced(fleet, taken, 1)
    (sampled,) = taken
    assert sampled.rollouts == ()
    assert reasons_of(taken) == ["failed"] * SETTINGS["attempts"]
    used = [a.server for a in sampled.attempts]
    assert all(one != next_ for one, next_ in itertools.pairwise(used))  # another server each time
    assert sampled.server == used[-1]


def test_mixed_groups_can_be_kept(ready_fleet, toy_servers):
    (server,) = toy_servers(1)
    fleet = ready_fleet([server], 4, mixed_versions="keep")
    server.plan = once("generate", "mixed")
    taken = Taker(fleet, prompts(1)).result()
    assert not reasons_of(taken)
    assert versions_of(taken) == {4}  # with which they began
    assert fleet.metrics()["fleet/mixed"] == 1
    server.plan = once("generate", "other_mixed")  # began with another version
    assert reasons_of(Taker(fleet, prompts(1)).result()) == ["failed"]
