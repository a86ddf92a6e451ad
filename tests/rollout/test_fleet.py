"""The fleet against servers that misbehave on order; see fault_server.py."""

import http.server
import itertools
import json
import threading
import time
from collections import Counter
from typing import Any, ClassVar

import numpy as np
import pytest
from etils import epath
from fault_server import (
    CONTROL,
    FAULTS,
    MODEL,
    STOP,
    VOCAB,
    FaultServer,
    is_right,
    publish_toy,
)

from oapl_jax.errors import FleetLost, RunError, UserError
from oapl_jax.publisher import version_path
from oapl_jax.rollout.fleet import Fleet
from oapl_jax.rollout.roster import FleetSettings
from oapl_jax.rollout.sampler import Sampling
from oapl_jax.structs import Prompt

N = 3
SAMPLING = Sampling(temperature=0.7, top_p=1.0, top_k=0, max_response_tokens=6)
PATIENCE = 30.0  # seconds until a test gives up
SETTINGS: dict[str, Any] = dict(
    servers=(),
    servers_file="",
    router="",
    members_every=0.05,
    max_in_flight=8,
    attempts=4,
    backoff=0.01,
    backoff_limit=0.1,
    health_every=0.1,
    connect_deadline=5.0,
    answer_deadline=10.0,
    request_deadline=10.0,
    drain_deadline=10.0,
    update_deadline=10.0,
    start_deadline=10.0,
    no_server_deadline=25.0,
    refresh_share=0.5,
    probe_gap={"float32": 1e-3, "bfloat16": 0.1},
    mixed_versions="reissue",
)


def prompt(draw):
    tokens = np.random.default_rng(draw).integers(2, VOCAB, 1 + draw % 5).astype(np.int32)
    return Prompt(f"p{draw}", draw, tokens, "", "", "toy")


def prompts(count):
    return map(prompt, range(count))


class Taker(threading.Thread):
    """Takes what a fleet generates, in a thread, so that no failure of the fleet hangs a test."""

    def __init__(self, fleet, prompts, sampling=SAMPLING):
        super().__init__(daemon=True)
        self._generate = lambda: fleet.generate(prompts, n=N, sampling=sampling)
        self.taken, self.error = [], None
        self.start()

    def run(self):
        try:
            for sampled in self._generate():
                self.taken.append(sampled)
        except BaseException as error:
            self.error = error

    def result(self):
        self.join(PATIENCE)
        assert not self.is_alive(), "the fleet hangs"
        if self.error:
            raise self.error
        return self.taken


def wait_until(condition, what="it"):
    give_up = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < give_up, f"{what} does not happen"
        time.sleep(0.005)


def states(fleet):
    return {server["state"] for server in fleet.servers().values()}


def assert_right(taken, sampling=SAMPLING):
    for sampled in taken:
        assert len(sampled.rollouts) in (0, N)
        assert len({r.policy_version for r in sampled.rollouts}) <= 1
        for rollout in sampled.rollouts:
            assert is_right(rollout, sampled.prompt.tokens, sampling)
            assert rollout.tokens.dtype == np.int32
            assert rollout.behavior_logp.dtype == np.float32


def assert_each_once(taken, count):
    assert sorted(s.prompt.draw for s in taken) == list(range(count))


def assert_balanced(fleet, taken, count):
    """The books, when nothing is in flight."""
    found = {name.removeprefix("fleet/"): value for name, value in fleet.metrics().items()}
    attempts = Counter(a.reason for s in taken for a in s.attempts)
    assert found["prompts"] == count
    assert found["groups"] == sum(bool(s.rollouts) for s in taken)
    assert found["dropped"] == sum(not s.rollouts for s in taken)
    assert found["prompts"] == found["groups"] + found["dropped"] + found["given_up"]
    assert found["sampled"] == found["groups"]
    assert found["tokens"] == sum(len(r.tokens) for s in taken for r in s.rollouts)
    assert found["attempts_failed"] == attempts["failed"]
    assert found["aborted"] == attempts["aborted"]
    assert found["mixed"] == attempts["mixed"]
    assert found["in_flight"] == found["waiting"] == 0


@pytest.fixture
def directory(tmp_path):
    return epath.Path(tmp_path / "versions")


@pytest.fixture
def servers(tmp_path):
    """Makes servers, and ends them at the end."""
    made = []

    def make(count):
        made.extend(FaultServer(epath.Path(tmp_path)) for _ in range(count))
        return made[-count:]

    yield make
    for server in made:
        server.close()


@pytest.fixture
def make_fleet(servers):
    """Makes a fleet whose sentences are in its `said`; closes it at the end."""
    fleets = []

    def make(urls=(), *, older_versions=False, sampling=SAMPLING, **settings):
        said = []
        fleet: Any = Fleet(
            MODEL,
            FleetSettings(**{**SETTINGS, "servers": tuple(urls), **settings}),
            tokenizer=None,
            stop_ids=(STOP,),
            sampling=sampling,
            max_prompt_tokens=8,
            dtype="float32",
            older_versions=older_versions,
            say=said.append,
        )
        fleet.said = said
        fleets.append(fleet)
        return fleet

    yield make
    for fleet in fleets:
        fleet.close()


def ready_fleet(make_fleet, made, directory, version=0, **settings: Any):
    """A fleet of these servers, all of which serve `version`."""
    fleet = make_fleet([server.url for server in made], **settings)
    fleet.refresh(version, publish_toy(directory, version))
    wait_until(lambda: states(fleet) == {"ready"}, "readiness")
    return fleet


def once(call, fault):
    """A plan that commits one fault at the next such call."""
    left = [fault]
    return lambda this: left.pop() if this == call and left else ""


# Groups


def test_every_prompt_comes_out_once(make_fleet, servers, directory):
    made = servers(2)
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


def test_a_request_names_every_setting_and_the_version(make_fleet, servers, directory):
    (server,) = servers(1)
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


def test_no_more_groups_in_flight_than_allowed(make_fleet, servers, directory):
    (server,) = servers(1)
    fleet = ready_fleet(make_fleet, [server], directory, max_in_flight=3)
    server.seconds, pulled = 0.02, []
    taker = Taker(fleet, (pulled.append(i) or prompt(i) for i in range(20)))
    assert_each_once(taker.result(), 20)
    assert server.most_running == 3


def test_prompts_are_not_taken_ahead_of_who_takes_groups(make_fleet, servers, directory):
    fleet = ready_fleet(make_fleet, servers(1), directory, max_in_flight=2)
    pulled = []
    groups = fleet.generate(
        (pulled.append(i) or prompt(i) for i in itertools.count()), n=N, sampling=SAMPLING
    )
    next(groups)
    wait_until(lambda: fleet.metrics()["fleet/waiting"] == 0)
    time.sleep(0.3)  # for those that would be taken
    assert len(pulled) <= 2 + 2 + 1
    groups.close()


def test_a_blocked_pull_holds_back_no_group(make_fleet, servers, directory):
    fleet = ready_fleet(make_fleet, servers(1), directory)
    blocked = threading.Event()

    def some_and_wait():
        yield from prompts(3)
        assert blocked.wait(PATIENCE)

    taker = Taker(fleet, some_and_wait())
    wait_until(lambda: len(taker.taken) == 3, "three groups while the pull blocks")
    assert taker.is_alive()
    blocked.set()
    assert_each_once(taker.result(), 3)


def test_what_a_pull_raises_is_raised_by_generate(make_fleet, servers, directory):
    fleet = ready_fleet(make_fleet, servers(1), directory)

    def some_and_fail():
        yield prompt(0)
        raise UserError("no more")

    with pytest.raises(UserError, match="no more"):
        Taker(fleet, some_and_fail()).result()
    assert_each_once(Taker(fleet, prompts(4)).result(), 4)  # the fleet goes on


@pytest.mark.parametrize(
    ("tokens", "why"),
    [
        ([3, VOCAB], f"prompt p0 holds token id {VOCAB}, outside"),
        ([-1], "prompt p0 holds token id -1, outside"),
        ([], "prompt p0 has 0 tokens"),
        ([2] * 9, "prompt p0 has 9 tokens"),
    ],
)
def test_a_prompt_that_would_end_a_server_is_not_sent(make_fleet, servers, directory, tokens, why):
    (server,) = servers(1)
    fleet = ready_fleet(make_fleet, [server], directory)
    asked = server.calls["generate"]
    bad = Prompt("p0", 0, np.array(tokens, np.int32), "", "", "toy")
    with pytest.raises(UserError, match=why):
        Taker(fleet, [bad]).result()
    assert server.calls["generate"] == asked


def test_a_prompt_before_the_first_version(make_fleet, servers):
    fleet = make_fleet([server.url for server in servers(1)])
    assert (fleet.version, fleet.versions()) == (-1, set())
    with pytest.raises(RunError, match="before its first version"):
        Taker(fleet, prompts(1)).result()


def test_groups_that_are_abandoned_are_given_up(make_fleet, servers, directory):
    (server,) = servers(1)
    fleet = ready_fleet(make_fleet, [server], directory, request_deadline=1000.0)
    groups = fleet.generate(prompts(50), n=N, sampling=SAMPLING)
    next(groups)
    server.seconds = 1000.0
    wait_until(lambda: server.running == SETTINGS["max_in_flight"])
    groups.close()
    wait_until(lambda: fleet.metrics()["fleet/in_flight"] == server.running == 0)
    server.seconds = 0.0
    found = fleet.metrics()
    assert found["fleet/prompts"] == found["fleet/groups"] + found["fleet/given_up"]
    assert found["fleet/groups"] == 1
    assert found["fleet/given_up"] >= SETTINGS["max_in_flight"]
    assert_each_once(Taker(fleet, prompts(9)).result(), 9)


# Faults of a group


def test_each_fault_is_a_named_attempt_and_another_try(make_fleet, servers, directory):
    (server,) = servers(1)
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


def test_a_group_that_always_fails_is_dropped_and_counted(make_fleet, servers, directory):
    made = servers(2)
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


def test_mixed_groups_can_be_kept(make_fleet, servers, directory):
    (server,) = servers(1)
    fleet = ready_fleet(make_fleet, [server], directory, 4, mixed_versions="keep")
    server.plan = once("generate", "mixed")
    (sampled,) = Taker(fleet, prompts(1)).result()
    assert sampled.attempts == ()
    assert {r.policy_version for r in sampled.rollouts} == {4}  # with which they began
    assert fleet.metrics()["fleet/mixed"] == 1
    server.plan = once("generate", "other_mixed")  # began with another than it was asked for
    (sampled,) = Taker(fleet, prompts(1)).result()
    assert [a.reason for a in sampled.attempts] == ["failed"]


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
    make_fleet, servers, directory, call, fault, state
):
    """The other one goes on alone, until the first does as it is told."""
    bad, good = servers(2)
    deadlines = dict(answer_deadline=0.5, update_deadline=0.5, start_deadline=0.1)
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


def test_a_server_that_takes_the_weights_and_says_no(make_fleet, servers, directory):
    (server,) = servers(1)
    server.plan = lambda this: "late_no" if this == "update" else ""
    fleet = ready_fleet(make_fleet, [server], directory, 2)
    taken = Taker(fleet, prompts(5)).result()
    assert_right(taken)
    assert {r.policy_version for s in taken for r in s.rollouts} == {2}


@pytest.mark.parametrize("fault", ["503", "hang", "reset"])
def test_a_server_that_fails_its_health_is_lost(make_fleet, servers, directory, fault):
    """And what is in flight there is requested from another one."""
    bad, good = servers(2)
    deadlines: Any = dict(answer_deadline=1.0, request_deadline=1000.0)
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


def test_a_killed_server_comes_back(make_fleet, servers, directory):
    made = servers(2)
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
    make_fleet, servers, directory
):
    (server,) = servers(1)
    fleet = ready_fleet(make_fleet, [server], directory, 3, answer_deadline=0.5)
    server.plan = lambda this: "503" if this in CONTROL else ""
    wait_until(lambda: states(fleet) == {"lost"})
    server.held = 55
    server.plan = lambda this: ""
    taken = Taker(fleet, prompts(20)).result()
    assert_right(taken)
    assert fleet.metrics()["fleet/probe_failed"] == 1
    assert server.loads == [3, 3]


# Refreshes


class Updating:
    """How many servers load a version at a time, over all of them."""

    def __init__(self, made):
        self.now = self.most = 0
        self._lock = threading.Lock()
        for server in made:
            server.updating = self.change

    def change(self, by):
        with self._lock:
            self.now += by
            self.most = max(self.most, self.now)


@pytest.mark.parametrize("older_versions", [False, True])
@pytest.mark.parametrize("drain_deadline", [0.0, 10.0])
def test_refreshes_under_load(make_fleet, servers, directory, older_versions, drain_deadline):
    made = servers(4)
    updating = Updating(made)
    fleet = ready_fleet(
        make_fleet, made, directory, older_versions=older_versions, drain_deadline=drain_deadline
    )
    for server in made:
        server.seconds, server.update_seconds = 0.08, 0.2
    paths = [publish_toy(directory, version) for version in range(1, 6)]
    taken_at = {}

    def refreshing():
        """As a worker does it: from inside the pull."""
        for draw in range(120):
            if draw % 20 == 0:
                version = draw // 20
                if version:
                    fleet.refresh(version, paths[version - 1])
            taken_at[draw] = version
            yield prompt(draw)

    taken = Taker(fleet, refreshing()).result()
    assert_each_once(taken, 120)
    assert_right(taken)
    assert all(s.rollouts for s in taken)
    versions = {s.prompt.draw: s.rollouts[0].policy_version for s in taken}
    if not older_versions:
        assert all(versions[draw] >= taken_at[draw] for draw in versions)
        assert set(versions.values()) >= {0, 5}
    else:
        assert any(versions[draw] < taken_at[draw] for draw in versions)
    assert 1 <= updating.most <= 2
    aborted = fleet.metrics()["fleet/aborted"]
    assert aborted > 0 if drain_deadline == 0 else aborted == 0
    assert {a.reason for s in taken for a in s.attempts} <= {"aborted"}
    assert fleet.metrics()["fleet/refresh_refused"] == 0
    assert_balanced(fleet, taken, 120)
    wait_until(lambda: fleet.versions() == {5})


def test_a_server_that_drains_takes_no_new_group(make_fleet, servers, directory):
    (server,) = servers(1)
    fleet = ready_fleet(make_fleet, [server], directory, older_versions=True, drain_deadline=2.0)
    server.seconds = 0.05

    def staggered():  # so that the server is idle at no moment
        for draw in range(120):
            if draw == 20:
                fleet.refresh(1, publish_toy(directory, 1))
            time.sleep(0.01)
            yield prompt(draw)

    taken = Taker(fleet, staggered()).result()
    assert_each_once(taken, 120)
    assert_right(taken)
    assert fleet.metrics()["fleet/aborted"] == 0
    assert {s.rollouts[0].policy_version for s in taken} == {0, 1}


def test_a_drain_that_takes_too_long_is_an_abort(make_fleet, servers, directory):
    slow, other = servers(2)
    fleet = ready_fleet(make_fleet, [slow, other], directory, drain_deadline=0.1, attempts=1)
    slow.seconds = PATIENCE
    taker = Taker(fleet, prompts(6))
    wait_until(lambda: slow.running > 0)
    slow.seconds = 0.0  # for requests from now on
    fleet.refresh(1, publish_toy(directory, 1))
    taken = taker.result()
    assert_each_once(taken, 6)
    assert_right(taken)
    again = [s for s in taken if s.attempts]
    assert again
    assert {a.reason for s in again for a in s.attempts} == {"aborted"}
    assert {s.rollouts[0].policy_version for s in again} == {1}
    assert slow.calls["abort"] == 1


def test_a_server_that_refuses_goes_on_only_if_older_versions_may(make_fleet, servers, directory):
    bad, good = servers(2)
    fleet = ready_fleet(make_fleet, [bad, good], directory, older_versions=True)
    bad.plan = lambda this: "refuse" if this == "update" else ""
    fleet.refresh(1, publish_toy(directory, 1))
    wait_until(lambda: fleet.servers()[good.url]["version"] == 1)
    wait_until(lambda: fleet.servers()[bad.url]["refresh_refused"] >= 2, "another try")
    wait_until(lambda: states(fleet) == {"ready"})
    taken = Taker(fleet, prompts(60)).result()
    assert_right(taken)
    held = {(s.server, s.rollouts[0].policy_version) for s in taken}
    assert held == {(bad.url, 0), (good.url, 1)}
    assert fleet.versions() == {0, 1}
    assert any("goes on with version 0" in sentence for sentence in fleet.said)
    bad.plan = lambda this: ""
    wait_until(lambda: fleet.versions() == {1}, "the version is taken after all")


def test_a_server_that_refuses_is_out_otherwise(make_fleet, servers, directory):
    bad, good = servers(2)
    fleet = ready_fleet(make_fleet, [bad, good], directory)
    bad.plan = lambda this: "refuse" if this == "update" else ""
    fleet.refresh(1, publish_toy(directory, 1))
    wait_until(lambda: fleet.servers()[bad.url]["refresh_refused"] >= 2, "another try")
    taken = Taker(fleet, prompts(30)).result()
    assert_right(taken)
    assert {(s.server, s.rollouts[0].policy_version) for s in taken} == {(good.url, 1)}
    bad.plan = lambda this: ""
    fleet.refresh(2, publish_toy(directory, 2))
    wait_until(lambda: states(fleet) == {"ready"} and fleet.versions() == {2})


def test_a_new_version_is_offered_at_once_to_who_refused_another(make_fleet, servers, directory):
    bad, good = servers(2)
    patience: Any = dict(backoff=1000.0, backoff_limit=1000.0)
    fleet = ready_fleet(make_fleet, [bad, good], directory, **patience)
    bad.plan = lambda this: "refuse" if this == "update" else ""
    fleet.refresh(1, publish_toy(directory, 1))
    wait_until(lambda: fleet.servers()[bad.url]["state"] == "refused")
    bad.plan = lambda this: ""
    fleet.refresh(2, publish_toy(directory, 2))
    wait_until(lambda: states(fleet) == {"ready"} and fleet.versions() == {2})


def test_versions_that_come_faster_than_servers_take_them(make_fleet, servers, directory):
    """Each server samples between two updates, and each has its turn."""
    made = servers(2)
    fleet = ready_fleet(make_fleet, made, directory, older_versions=True, max_in_flight=4)
    for server in made:
        server.seconds, server.update_seconds = 0.01, 0.1
    paths = [publish_toy(directory, version) for version in range(1, 50)]
    versions = itertools.cycle(enumerate(paths, 1))
    updated = lambda: min(len(server.loads) for server in made)

    def another_each_time():
        draws = itertools.count()
        while updated() < 6:
            fleet.refresh(*next(versions))
            yield from (prompt(next(draws)) for _ in range(4))

    taken = Taker(fleet, another_each_time()).result()
    assert_right(taken)
    held = {(s.server, s.rollouts[0].policy_version) for s in taken}
    for server in made:
        assert len({version for url, version in held if url == server.url}) > 2


def test_stale_weights_after_a_refusal_do_not_pass_for_the_older_version(
    make_fleet, servers, directory
):
    """A server whose update fails half-way says its old version and samples from something else."""
    bad, good = servers(2)
    fleet = ready_fleet(make_fleet, [bad, good], directory, older_versions=True)

    def half(this):
        if this == "update":
            bad.held = 55
            return "refuse"
        return ""

    bad.plan = half
    fleet.refresh(1, publish_toy(directory, 1))
    wait_until(lambda: fleet.servers()[bad.url]["probe_failed"])
    taken = Taker(fleet, prompts(30)).result()
    assert_right(taken)
    assert {s.server for s in taken} == {good.url}


def test_a_damaged_version_reaches_no_server(make_fleet, servers, directory):
    (server,) = servers(1)
    fleet = ready_fleet(make_fleet, [server], directory)
    path = publish_toy(directory, 1)
    (path / "model.safetensors").write_text('{"version": 2}')

    def refreshing():
        yield prompt(0)
        fleet.refresh(1, path)
        yield prompt(1)

    with pytest.raises(UserError, match=r"model\.safetensors in version directory .* damaged"):
        Taker(fleet, refreshing()).result()
    assert (server.loads, fleet.version) == ([0], 0)
    with pytest.raises(UserError, match="is missing"):
        fleet.refresh(9, version_path(directory, 9))


def test_going_back_to_a_version_is_checked_once(make_fleet, servers, directory):
    (server,) = servers(1)
    fleet = ready_fleet(make_fleet, [server], directory)
    for version in (1, 0, 1):
        path = version_path(directory, version)
        fleet.refresh(version, path if path.exists() else publish_toy(directory, version))
        taken = Taker(fleet, prompts(3)).result()
        assert {s.rollouts[0].policy_version for s in taken} == {version}
        assert_right(taken)
    assert server.loads == [0, 1, 0, 1]


def test_versions_of_groups_that_nobody_has_rewarded_yet(make_fleet, servers, directory):
    fleet = ready_fleet(make_fleet, servers(1), directory)
    groups = fleet.generate(prompts(1), n=N, sampling=SAMPLING)
    next(groups)
    fleet.refresh(1, publish_toy(directory, 1))
    wait_until(lambda: fleet.servers().popitem()[1]["version"] == 1)
    assert fleet.versions() == {0, 1}  # the group that was yielded last is of 0
    assert next(groups, None) is None
    assert fleet.versions() == {1}


# Who is in the fleet


def test_servers_join_and_leave(make_fleet, servers, directory, tmp_path):
    first, second, third = servers(3)
    listed = tmp_path / "servers.txt"

    def write(*which):
        aside = tmp_path / "aside.txt"
        aside.write_text("# mine\n" + "\n".join(server.url + "/" for server in which))
        aside.rename(listed)  # no half of it is read

    write(first)
    fleet = make_fleet(servers_file=str(listed))
    fleet.refresh(0, publish_toy(directory, 0))
    ended = threading.Event()
    endless = (
        prompt(i) for i in itertools.takewhile(lambda _: not ended.is_set(), itertools.count())
    )
    taker = Taker(fleet, endless)
    urls = lambda: set(fleet.servers())
    sampled = lambda server: fleet.servers()[server.url]["sampled"]
    wait_until(lambda: urls() == {first.url}, "the first look at the list")
    wait_until(lambda: sampled(first) > 5)
    write(first, second, third)
    wait_until(lambda: {second.url, third.url} <= urls())
    wait_until(lambda: min(sampled(second), sampled(third)) > 5, "work for who joined")
    write(third)
    wait_until(lambda: urls() == {third.url})
    listed.unlink()  # then the list stays as it is
    wait_until(lambda: any("list can't be read" in sentence for sentence in fleet.said))
    before = sampled(third)
    wait_until(lambda: sampled(third) > before + 5)
    assert urls() == {third.url}
    write(first, third)
    wait_until(lambda: first.url in urls() and states(fleet) == {"ready"})
    ended.set()
    taken = taker.result()
    assert_each_once(taken, len(taken))
    assert_right(taken)
    assert all(s.rollouts and not s.attempts for s in taken)
    assert fleet.metrics()["fleet/joined"] == 4
    assert_balanced(fleet, taken, len(taken))


class Router(http.server.BaseHTTPRequestHandler):
    """Answers GET /workers."""

    urls: ClassVar[list[str]] = []

    def do_GET(self):
        workers = [{"id": str(i), "url": url} for i, url in enumerate(self.urls)]
        self.send_response(200 if self.path == "/workers" else 404)
        self.end_headers()
        self.wfile.write(json.dumps({"workers": workers}).encode())

    def log_message(self, *args):
        pass


def test_a_router_is_a_list_of_servers(make_fleet, servers, directory):
    made = servers(2)
    Router.urls = [server.url for server in made]
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Router) as router:
        threading.Thread(target=router.serve_forever, daemon=True).start()
        fleet = make_fleet(router=f"http://127.0.0.1:{router.server_port}/")
        fleet.refresh(0, publish_toy(directory, 0))
        wait_until(lambda: set(fleet.servers()) == {s.url for s in made})
        taken = Taker(fleet, prompts(20)).result()
        assert_right(taken)
        assert {s.server for s in taken} <= {s.url for s in made}
        Router.urls = [made[0].url]
        wait_until(lambda: set(fleet.servers()) == {made[0].url})
        router.shutdown()


# No server, and the end


def test_no_server_for_too_long_ends_the_run(make_fleet, servers, directory):
    made = servers(2)
    deadlines: Any = dict(start_deadline=0.5, drain_deadline=0.1, update_deadline=0.4)
    fleet = ready_fleet(make_fleet, made, directory, no_server_deadline=0.6, **deadlines)
    for server in made:
        server.kill()
    with pytest.raises(FleetLost, match=r"no server was ready for 0\.6 s .* is lost \(") as caught:
        Taker(fleet, prompts(5)).result()
    assert caught.value.exit_code == 3
    assert all(server.url in str(caught.value) for server in made)
    assert any(said.startswith("no server is ready: training pauses") for said in fleet.said)
    found = fleet.metrics()
    assert found["fleet/prompts"] == found["fleet/given_up"]
    with pytest.raises(FleetLost):  # and stays so
        Taker(fleet, prompts(5)).result()


def test_training_pauses_and_goes_on(make_fleet, servers, directory):
    (server,) = servers(1)
    fleet = ready_fleet(make_fleet, [server], directory)
    server.kill()
    taker = Taker(fleet, prompts(20))
    wait_until(lambda: any("training pauses" in said for said in fleet.said))
    server.start()
    taken = taker.result()
    assert_each_once(taken, 20)
    assert_right(taken)
    wait_until(lambda: any("training goes on" in said for said in fleet.said))
    assert fleet.metrics()["fleet/paused_seconds"] > 0
    assert_balanced(fleet, taken, 20)


def test_an_idle_fleet_without_servers_ends_nothing(make_fleet, servers, directory):
    (server,) = servers(1)
    deadlines: Any = dict(start_deadline=0.2, drain_deadline=0.1, update_deadline=0.1)
    fleet = ready_fleet(make_fleet, [server], directory, no_server_deadline=0.3, **deadlines)
    server.kill()
    time.sleep(0.8)  # longer than the deadline, with nobody who waits
    server.start()
    wait_until(lambda: states(fleet) == {"ready"})
    assert_each_once(Taker(fleet, prompts(3)).result(), 3)


def test_servers_that_are_all_refused_from_the_start(make_fleet, servers, directory):
    made = servers(2)
    for server in made:
        server.max_model_len = 10
    fleet = make_fleet([server.url for server in made])
    fleet.refresh(0, publish_toy(directory, 0))
    with pytest.raises(UserError, match=r"no server can be used: .* context length is 10 tokens"):
        Taker(fleet, prompts(1)).result()
    assert all(server.loads == [] for server in made)


def test_one_refused_server_is_named_and_the_other_goes_on(make_fleet, servers, directory):
    bad, good = servers(2)
    bad.information["preferred_sampling_params"] = {"min_p": 0.1}
    fleet = make_fleet([bad.url, good.url])
    fleet.refresh(0, publish_toy(directory, 0))
    wait_until(lambda: fleet.servers()[good.url]["state"] == "ready")
    taken = Taker(fleet, prompts(10)).result()
    assert {s.server for s in taken} == {good.url}
    assert bad.loads == []
    assert sum(f"{bad.url} is refused: " in s and "min_p=0.1" in s for s in fleet.said) == 1


def test_a_server_that_is_not_there_yet(make_fleet, servers, directory):
    (server,) = servers(1)
    server.kill()
    fleet = make_fleet([server.url])
    fleet.refresh(0, publish_toy(directory, 0))
    taker = Taker(fleet, prompts(3))
    wait_until(lambda: "failed" in fleet.servers()[server.url]["reason"])
    assert states(fleet) == {"starting"}
    server.start()
    assert_each_once(taker.result(), 3)
    late = make_fleet(["127.0.0.1:9"], start_deadline=0.1)
    wait_until(lambda: states(late) == {"lost"})
    assert any("127.0.0.1:9 is lost" in said for said in late.said)


def test_close_while_groups_are_in_flight_and_the_pull_is_blocked(make_fleet, servers, directory):
    made = servers(2)
    fleet = ready_fleet(make_fleet, made, directory)
    for server in made:
        server.seconds = PATIENCE
    blocked, released = threading.Event(), threading.Event()

    def some_and_wait():
        yield from prompts(3)
        blocked.set()
        assert released.wait(PATIENCE)
        yield prompt(3)  # too late for it

    taker = Taker(fleet, some_and_wait())
    assert blocked.wait(PATIENCE)
    wait_until(lambda: fleet.metrics()["fleet/in_flight"] == 3)
    fleet.close()
    assert taker.result() == []  # although the pull is blocked still
    wait_until(lambda: not any(server.running for server in made), "an end of what is in flight")
    released.set()
    fleet.close()
    assert Taker(fleet, prompts(2)).result() == []
    fleet.refresh(1, publish_toy(directory, 1))
    found = fleet.metrics()
    assert (found["fleet/prompts"], found["fleet/given_up"]) == (3, 3)
    assert not [t for t in threading.enumerate() if t.name == "fleet"]


def test_many_threads_may_close(make_fleet, servers, directory):
    fleet = ready_fleet(make_fleet, servers(1), directory)
    endless = map(prompt, itertools.count())
    taker = Taker(fleet, endless)
    wait_until(lambda: taker.taken)
    closers = [threading.Thread(target=fleet.close) for _ in range(4)]
    for closer in closers:
        closer.start()
    for closer in closers:
        closer.join(PATIENCE)
    assert_right(taker.result())
    found = fleet.metrics()
    assert found["fleet/prompts"] == found["fleet/groups"] + found["fleet/given_up"]


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        (dict(servers=()), "fleet names its servers by nothing"),
        (dict(router="http://r"), "by servers and router; set exactly one"),
        (dict(max_in_flight=0), "fleet.max_in_flight=0"),
        (dict(attempts=0), "fleet.attempts=0"),
        (dict(backoff=0.0), "fleet.backoff=0.0 must be above 0"),
        (dict(request_deadline=-1.0), "fleet.request_deadline=-1.0 must be above 0"),
        (dict(refresh_share=1.5), "fleet.refresh_share=1.5 must be at most 1"),
        (dict(no_server_deadline=19.0), "fleet.no_server_deadline=19 .* at least 20"),
        (dict(mixed_versions="drop"), "fleet.mixed_versions='drop' is not one of reissue, keep"),
        (dict(probe_gap={"float32": 1e-3}), "fleet.probe_gap needs a value for float32 and one"),
        (dict(probe_gap={"float32": 0.0, "bfloat16": 1.0}), "fleet.probe_gap.float32=0.0 must be"),
    ],
)
def test_settings_that_can_not_work(changes, why):
    with pytest.raises(UserError, match=why):
        FleetSettings(**{**SETTINGS, "servers": ("http://a",), **changes})


def test_settings_that_can_not_be_reproduced_are_named(make_fleet):
    odd = Sampling(temperature=1.0, top_p=0.95, top_k=7, max_response_tokens=6)
    said = make_fleet(["http://127.0.0.1:9"], sampling=odd).said
    assert "rollout.top_p=0.95 draws from fewer" in said[0]
    assert "rollout.top_k=7 draws from fewer" in said[1]


# Everything at once


def test_a_thousand_random_faults(make_fleet, servers, directory):
    """Whatever servers do, each prompt comes out once, and no rollout is wrong."""
    made, rng = servers(6), np.random.default_rng(0)
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
            if rng.random() > (0.5 if call == "generate" else 0.08):
                return ""
            if not bags[call]:  # in random order, and each as often as another
                bags[call] = [str(fault) for fault in rng.permutation(faults[call])]
            return bags[call].pop()

    fleet = ready_fleet(
        make_fleet,
        made,
        directory,
        older_versions=True,
        answer_deadline=0.5,
        request_deadline=0.5,
        update_deadline=0.5,
        drain_deadline=0.05,
        max_in_flight=24,
        backoff_limit=0.05,
    )
    for server in made:
        server.plan, server.seconds = plan, 0.002
    committed = lambda: sum(n for s in made for (_, fault), n in s.faults.items() if fault)
    drawn = itertools.count()

    def until_a_thousand():
        dead = None
        while committed() < 1000:
            draw = next(drawn)
            if draw % 150 == 75:
                version = draw // 150 + 1
                fleet.refresh(version, publish_toy(directory, version))
            if draw % 100 == 30:
                dead = made[draw // 100 % len(made)]
                dead.kill()
            if draw % 100 == 60 and dead:
                dead.start()
            yield prompt(draw)

    taker = Taker(fleet, until_a_thousand())
    taker.join(2 * PATIENCE)
    taken = taker.result()
    count = len(taken)
    assert_each_once(taken, count)
    assert next(drawn) == count
    assert_right(taken)
    assert_balanced(fleet, taken, count)
    kinds = {(call, fault) for s in made for (call, fault) in s.faults if fault}
    assert {fault for call, fault in kinds if call == "generate"} == set(FAULTS)
    assert {call for call, _ in kinds} >= {"generate", "score", "update", "flush", "info"}
    assert len({r.policy_version for s in taken for r in s.rollouts}) > 1
    dropped = [s for s in taken if not s.rollouts]
    assert all(sum(a.reason != "aborted" for a in s.attempts) == 4 for s in dropped)
