"""Groups of a fleet: prompts in, responses out, failed attempts; see fault_server.py."""

import itertools
import threading
import time

import numpy as np
import pytest
from fault_server import FAULTS, STOP, VOCAB
from fleets import PATIENCE, SAMPLING, SETTINGS, N, Taken, once, prompt, prompts, wait_until

from oapl_jax.errors import RunError, UserError
from oapl_jax.rollout.sampler import Sampling
from oapl_jax.structs import Prompt


def test_every_prompt_comes_out_once(ready_fleet):
    fleet, made = ready_fleet(2, 5)
    assert (fleet.version, fleet.versions()) == (5, {5})
    taken = fleet.sample(60)
    assert all(len(s.rollouts) == N and not s.attempts and s.seconds > 0 for s in taken)
    assert taken.versions == {5}
    assert taken.servers == {server.url for server in made}
    assert {r.finish_reason for s in taken for r in s.rollouts} == {"stop", "length"}
    fleet.assert_balanced(taken, 60)
    fleet.take(prompts(5), Sampling(0.0, 1.0, 0, 4)).right(5)
    assert fleet.sample(0) == []


def test_max_in_flight_limits_requests_and_pulls(ready_fleet):
    fleet, (server,) = ready_fleet(1, max_in_flight=3)
    server.seconds, pulled = 0.02, []
    count_pulled = lambda count: (pulled.append(i) or prompt(i) for i in range(count))
    fleet.take(count_pulled(20)).right(20)
    assert server.most_running == 3
    pulled.clear()
    groups = fleet.generate(count_pulled(100), n=N, sampling=SAMPLING)
    next(groups)
    wait_until(lambda: fleet.counts()["waiting"] == 0)
    time.sleep(0.3)  # for further pulls
    assert len(pulled) <= 3 + 3 + 1  # finished, in flight and taken
    groups.close()


def test_a_blocked_pull_delays_no_group(ready_fleet):
    fleet, _ = ready_fleet(1)
    blocked = threading.Event()

    def pull():
        yield from prompts(3)
        assert blocked.wait(PATIENCE)

    taker = fleet.take(pull())
    wait_until(lambda: len(taker.taken) == 3, "three groups while the pull blocks")
    assert taker.is_alive()
    blocked.set()
    taker.right(3)


def test_a_request_names_every_setting_and_the_version(ready_fleet):
    fleet, (server,) = ready_fleet(1, 12)
    fleet.take(prompts(1), Sampling(0.7, 0.9, 5, 6)).result()
    request = server.requests[-1]
    assert request["input_ids"] == prompt(0).tokens.tolist()
    assert (request["extra_key"], request["return_logprob"]) == ("v12", True)
    expected = dict(n=N, temperature=0.7, top_p=0.9, top_k=5, max_new_tokens=6)
    expected |= {"stop_token_ids": [STOP]}
    assert expected.items() <= request["sampling_params"].items()


@pytest.mark.parametrize("tokens", [(3, VOCAB), (-3,), (), range(2, 11)])
def test_a_prompt_that_would_crash_a_server_is_not_sent(ready_fleet, tokens):
    fleet, (server,) = ready_fleet(1)
    before = server.calls["generate"]
    bad = Prompt("p0", 0, np.array(tokens, np.int32), "", "", "toy")
    with pytest.raises(UserError, match="prompt p0"):
        fleet.take([bad]).result()
    assert server.calls["generate"] == before


@pytest.mark.parametrize("tokens", [(0, VOCAB - 1), range(2, 10)])
def test_a_prompt_within_the_bounds_is_sent(ready_fleet, tokens):
    fleet, (server,) = ready_fleet(1)
    prompt = Prompt("p0", 0, np.array(tokens, np.int32), "", "", "toy")
    fleet.take([prompt]).result()
    assert server.requests[-1]["input_ids"] == [*tokens]


def test_a_prompt_before_the_first_version(make_fleet):
    fleet, _ = make_fleet(1)
    assert (fleet.version, fleet.versions()) == (-1, set())
    with pytest.raises(RunError):
        fleet.take(prompts(1)).result()


def test_abandoned_groups_are_cancelled(ready_fleet):
    fleet, (server,) = ready_fleet(1, request_deadline=1000.0)
    groups = fleet.generate(prompts(50), n=N, sampling=SAMPLING)
    next(groups)
    server.seconds = 1000.0
    wait_until(lambda: server.running == SETTINGS["max_in_flight"])
    groups.close()
    wait_until(lambda: fleet.counts()["in_flight"] == server.running == 0)
    server.seconds = 0.0
    found = fleet.counts()
    assert found["prompts"] == found["groups"] + found["cancelled"]
    assert found["groups"] == 1
    assert found["cancelled"] >= SETTINGS["max_in_flight"]
    fleet.sample(9)


def test_each_fault_is_a_named_attempt_and_a_retry(ready_fleet):
    fleet, (server,) = ready_fleet(1, request_deadline=0.5)
    total = Taken()
    for fault in FAULTS:
        server.plan = once("generate", fault)
        fleet.wait_ready()  # so that the group meets the fault, not the admission of the server
        taken = fleet.take([prompt(0)]).right(1)
        total += taken
        assert server.faults["generate", fault] == 1
        assert len(taken[0].rollouts) == N
        assert taken.reasons == {"delay": [], "mixed": ["mixed"]}.get(fault, ["failed"]), fault
        assert all((a.server, a.version) == (server.url, 0) for a in taken[0].attempts)
    fleet.assert_balanced(total, len(FAULTS))


def test_a_group_that_always_fails_is_dropped_and_counted(ready_fleet):
    fleet, made = ready_fleet(2, backoff=0.1, backoff_limit=1.0)
    poison = prompt(3).tokens.tolist()
    for server in made:
        poisoned = lambda server=server: server.requests[-1]["input_ids"] == poison
        server.plan = lambda call, poisoned=poisoned: (
            "500" if call == "generate" and poisoned() else ""
        )
    taken = fleet.take([prompt(3)]).result()
    fleet.assert_balanced(taken, 1)
    (sampled,) = taken
    assert sampled.rollouts == ()
    assert taken.reasons == ["failed"] * SETTINGS["attempts"]
    used = [a.server for a in sampled.attempts]
    assert all(one != next_ for one, next_ in itertools.pairwise(used))  # another server each time
    assert sampled.server == used[-1]


def test_mixed_groups_can_be_kept(ready_fleet):
    fleet, (server,) = ready_fleet(1, 4, mixed_versions="keep")
    server.plan = once("generate", "mixed")
    taken = fleet.take(prompts(1)).result()
    assert not taken.reasons
    assert taken.versions == {4}  # with which they began
    assert fleet.counts()["mixed"] == 1
    server.plan = once("generate", "other_mixed")  # began with another version
    assert fleet.take(prompts(1)).result().reasons == ["failed"]
