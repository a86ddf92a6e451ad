"""Versions that are LoRA adapters: loaded by name beside those in use, and nothing is drained."""

import threading

import pytest
from fleets import always, once, prompts, wait_until

from oapl_jax.errors import UserError
from oapl_jax.model.lora import Lora

LORA = Lora(4, 8.0, ("q_proj", "v_proj"))
TAKES = dict(enable_lora=True, max_lora_rank=8, lora_target_modules=["q_proj", "v_proj", "o_proj"])
PATIENCE = 30.0


def takes(**changes):
    """Prepares a server that takes adapters."""

    def prepare(server):
        server.information = server.information | TAKES | changes

    return prepare


@pytest.fixture
def fleet_of(make_fleet):
    def make(count, version=0, **settings):
        prepare = takes(**settings.pop("server", {}))
        return make_fleet(count, version, prepare=prepare, adapters=LORA, **settings)

    return make


@pytest.mark.parametrize("allow_older", [True, False])
def test_a_refresh_drains_nothing_and_two_versions_are_sampled_at_once(fleet_of, allow_older):
    fleet, (server,) = fleet_of(1, allow_older=allow_older)
    server.seconds = 2.0  # a group takes longer than a refresh
    refreshed = threading.Event()

    def half_after_the_refresh():
        for index, prompt in enumerate(prompts(6)):
            if index == 3:
                refreshed.wait(PATIENCE)
            yield prompt

    taker = fleet.take(half_after_the_refresh())
    wait_until(lambda: server.running == 3, "three groups in flight", PATIENCE)
    fleet.publish(1)
    wait_until(lambda: fleet.of(server, "version") == 1, "version 1", PATIENCE)
    refreshed.set()
    taken = taker.right(6)
    assert taken.versions == {0, 1}
    assert {0, 1} in server.together
    assert not taken.reasons
    assert fleet.counts()["aborted"] == 0
    assert server.calls["update"] == server.calls["flush"] == server.calls["abort"] == 0


def test_adapters_without_requests_are_unloaded(fleet_of):
    fleet, (server,) = fleet_of(1)
    for version in range(1, 5):
        fleet.publish(version)
        fleet.wait_ready(version)
        assert fleet.sample(3).versions == {version}
    assert sorted(server.adapters.values()) == [3, 4]
    assert server.loads == [0, 1, 2, 3, 4]


def test_adapters_of_a_killed_learner_are_unloaded(make_fleet):
    left = {"v000007-0123456789ab": 7, "v1234567-0123456789ab": 8, "of-someone": 9}

    def prepare(server):
        takes()(server)
        server.adapters |= left

    _, (server,) = make_fleet(1, 0, prepare=prepare, adapters=LORA)
    assert sorted(server.adapters.values()) == [0, 9]


def test_versions_of_groups_in_flight_are_in_use(fleet_of):
    fleet, (server,) = fleet_of(1, allow_older=True)
    server.seconds = 0.5
    taker = fleet.take(prompts(2))
    wait_until(lambda: server.running == 2, "two groups in flight", PATIENCE)
    fleet.publish(1)
    wait_until(lambda: fleet.of(server, "version") == 1, "version 1", PATIENCE)
    assert fleet.versions() == {0, 1}
    taker.right(2)
    assert fleet.versions() == {1}


def test_a_restarted_server_gets_the_adapters_again(fleet_of):
    fleet, (server,) = fleet_of(1)
    server.kill()
    server.start()
    taken = fleet.sample(4)
    assert taken.versions == {0}
    assert server.loads[-1] == 0
    assert list(server.adapters.values()) == [0]


def test_adapters_that_a_server_has_already_are_not_loaded_again(fleet_of):
    fleet, (server,) = fleet_of(1)
    server.plan = once("generate", "500")  # it must pass admission again
    assert fleet.sample(3).versions == {0}
    assert server.loads == [0]


@pytest.mark.parametrize(
    "changes",
    [dict(enable_lora=None), dict(max_lora_rank=2), dict(lora_target_modules=["q_proj"])],
)
def test_a_server_that_can_not_take_the_adapters_is_refused(fleet_of, changes):
    fleet, (server,) = fleet_of(1, None, server=changes, no_server_deadline=40.0)
    fleet.publish(0)
    with pytest.raises(UserError, match=r"model\.lora\.merged"):
        fleet.take(prompts(1)).result()
    assert not server.loads


def test_a_server_that_refuses_an_adapter_continues_with_the_older_one(fleet_of):
    fleet, (server,) = fleet_of(1, allow_older=True)
    server.plan = always("adapter", "refuse")
    fleet.publish(1)
    wait_until(lambda: fleet.counts()["refresh_refused"], "a refusal", PATIENCE)
    assert fleet.sample(3).versions == {0}
    server.plan = lambda call: ""
    wait_until(lambda: fleet.versions() == {1}, "version 1", PATIENCE)
    assert fleet.sample(3).versions == {1}


def test_an_adapter_with_other_log_probs_than_its_probe_samples_nothing(fleet_of):
    fleet, _ = fleet_of(1)
    fleet.publish(1, off=0.1)
    wait_until(lambda: fleet.states() == {"refused"}, "a refusal", PATIENCE)
    assert fleet.counts()["probe_failed"] > 0
    fleet.publish(2)
    assert fleet.sample(3).versions == {2}
