"""The fleet over servers that do as they are told, and its groups; see fault_server.py."""

import itertools
import threading
import time

import numpy as np
import pytest
from fault_server import FAULTS, STOP, VOCAB
from fleets import (
    PATIENCE,
    SAMPLING,
    SETTINGS,
    N,
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

from oapl_jax.errors import RunError, UserError
from oapl_jax.rollout.sampler import Sampling
from oapl_jax.structs import Prompt

# Groups


def test_every_prompt_comes_out_once(make_fleet, toy_servers, directory):
    made = toy_servers(2)
    fleet = ready_fleet(make_fleet, made, directory, 5)
    assert (fleet.version, fleet.versions()) == (5, {5})
    taken = Taker(fleet, prompts(60)).result()
    assert_each_once(taken, 60)
    assert_right(taken)
    assert all(len(s.rollouts) == N and not s.attempts and s.seconds > 0 for s in taken)
    assert {r.policy_version for s in taken for r in s.rollouts} == {5}
    assert {s.server for s in taken} == {server.url for server in made}
    assert {r.finish_reason for s in taken for r in s.rollouts} == {"stop", "length"}
    assert_balanced(fleet, taken, 60)
    greedy = Sampling(0.0, 1.0, 0, 4)
    taken = Taker(fleet, prompts(5), greedy).result()
    assert_right(taken, greedy)
    assert Taker(fleet, []).result() == []


def test_a_request_names_every_setting_and_the_version(make_fleet, toy_servers, directory):
    (server,) = toy_servers(1)
    fleet = ready_fleet(make_fleet, [server], directory, 12)
    odd = Sampling(temperature=0.7, top_p=0.9, top_k=5, max_response_tokens=6)
    Taker(fleet, prompts(1), odd).result()
    request = server.requests[-1]
    assert request["input_ids"] == prompt(0).tokens.tolist()
    assert (request["extra_key"], request["return_logprob"]) == ("v12", True)
    settings = request["sampling_params"]
    expected = dict(n=N, temperature=0.7, top_p=0.9, top_k=5, max_new_tokens=6, min_p=0.0)
    assert expected.items() <= settings.items()
    assert settings["stop_token_ids"] == [STOP]
    assert (settings["repetition_penalty"], settings["frequency_penalty"]) == (1.0, 0.0)


def test_no_more_groups_in_flight_than_allowed(make_fleet, toy_servers, directory):
    (server,) = toy_servers(1)
    fleet = ready_fleet(make_fleet, [server], directory, max_in_flight=3)
    server.seconds, pulled = 0.02, []
    taker = Taker(fleet, (pulled.append(i) or prompt(i) for i in range(20)))
    assert_each_once(taker.result(), 20)
    assert server.most_running == 3


def test_prompts_are_not_taken_ahead_of_who_takes_groups(make_fleet, toy_servers, directory):
    fleet = ready_fleet(make_fleet, toy_servers(1), directory, max_in_flight=2)
    pulled = []
    groups = fleet.generate(
        (pulled.append(i) or prompt(i) for i in itertools.count()), n=N, sampling=SAMPLING
    )
    next(groups)
    wait_until(lambda: fleet.metrics()["fleet/waiting"] == 0)
    time.sleep(0.3)  # for those that would be taken
    assert len(pulled) <= 2 + 2 + 1
    groups.close()


def test_a_blocked_pull_holds_back_no_group(make_fleet, toy_servers, directory):
    fleet = ready_fleet(make_fleet, toy_servers(1), directory)
    blocked = threading.Event()

    def some_and_wait():
        yield from prompts(3)
        assert blocked.wait(PATIENCE)

    taker = Taker(fleet, some_and_wait())
    wait_until(lambda: len(taker.taken) == 3, "three groups while the pull blocks")
    assert taker.is_alive()
    blocked.set()
    assert_each_once(taker.result(), 3)


def test_what_a_pull_raises_is_raised_by_generate(make_fleet, toy_servers, directory):
    fleet = ready_fleet(make_fleet, toy_servers(1), directory)

    def some_and_fail():
        yield prompt(0)
        raise UserError("no more")

    with pytest.raises(UserError, match="no more"):
        Taker(fleet, some_and_fail()).result()
    assert_each_once(Taker(fleet, prompts(4)).result(), 4)  # the fleet goes on


@pytest.mark.parametrize(
    ("tokens", "why"),
    [
        ([3, VOCAB], f"prompt p0 has token id {VOCAB}, outside"),
        ([-1], "prompt p0 has token id -1, outside"),
        ([], "prompt p0 has 0 tokens"),
        ([2] * 9, "prompt p0 has 9 tokens"),
    ],
)
def test_a_prompt_that_would_end_a_server_is_not_sent(
    make_fleet, toy_servers, directory, tokens, why
):
    (server,) = toy_servers(1)
    fleet = ready_fleet(make_fleet, [server], directory)
    asked = server.calls["generate"]
    bad = Prompt("p0", 0, np.array(tokens, np.int32), "", "", "toy")
    with pytest.raises(UserError, match=why):
        Taker(fleet, [bad]).result()
    assert server.calls["generate"] == asked


def test_a_prompt_before_the_first_version(make_fleet, toy_servers):
    fleet = make_fleet([server.url for server in toy_servers(1)])
    assert (fleet.version, fleet.versions()) == (-1, set())
    with pytest.raises(RunError, match="before its first version"):
        Taker(fleet, prompts(1)).result()


def test_groups_that_are_abandoned_are_given_up(make_fleet, toy_servers, directory):
    (server,) = toy_servers(1)
    fleet = ready_fleet(make_fleet, [server], directory, request_deadline=1000.0)
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
    assert_each_once(Taker(fleet, prompts(9)).result(), 9)


# Faults of a group


def test_each_fault_is_a_named_attempt_and_another_try(make_fleet, toy_servers, directory):
    (server,) = toy_servers(1)
    fleet = ready_fleet(make_fleet, [server], directory, request_deadline=0.5)
    total = []
    for place, fault in enumerate(FAULTS):
        server.plan = once("generate", fault)
        # The group is what meets the fault, not the contract of a server that is back.
        wait_until(lambda: states(fleet) == {"ready"}, "readiness")
        (sampled,) = Taker(fleet, [prompt(place)]).result()
        total.append(sampled)
        assert server.faults["generate", fault] == 1
        assert len(sampled.rollouts) == N
        expected = {"delay": [], "mixed": ["mixed"]}.get(fault, ["failed"])
        assert [a.reason for a in sampled.attempts] == expected, fault
        assert all((a.server, a.version) == (server.url, 0) for a in sampled.attempts)
    assert_right(total)
    assert_balanced(fleet, total, len(FAULTS))


def test_a_group_that_always_fails_is_dropped_and_counted(make_fleet, toy_servers, directory):
    made = toy_servers(2)
    fleet = ready_fleet(make_fleet, made, directory, backoff=0.1, backoff_limit=1.0)
    poison = prompt(3).tokens.tolist()

    def plan_of(server):
        of_poison = lambda: server.requests[-1]["input_ids"] == poison
        return lambda call: "500" if call == "generate" and of_poison() else ""

    for server in made:
        server.plan = plan_of(server)
    taken = Taker(fleet, [prompt(3)]).result()
    assert_balanced(fleet, taken, 1)
    (sampled,) = taken
    assert sampled.rollouts == ()
    assert [a.reason for a in sampled.attempts] == ["failed"] * SETTINGS["attempts"]
    used = [a.server for a in sampled.attempts]
    assert all(one != next_ for one, next_ in itertools.pairwise(used))  # another server each time
    assert sampled.server == used[-1]


def test_mixed_groups_can_be_kept(make_fleet, toy_servers, directory):
    (server,) = toy_servers(1)
    fleet = ready_fleet(make_fleet, [server], directory, 4, mixed_versions="keep")
    server.plan = once("generate", "mixed")
    (sampled,) = Taker(fleet, prompts(1)).result()
    assert sampled.attempts == ()
    assert {r.policy_version for r in sampled.rollouts} == {4}  # with which they began
    assert fleet.metrics()["fleet/mixed"] == 1
    server.plan = once("generate", "other_mixed")  # began with another than it was asked for
    (sampled,) = Taker(fleet, prompts(1)).result()
    assert [a.reason for a in sampled.attempts] == ["failed"]
