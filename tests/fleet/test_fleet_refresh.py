"""The fleet brings its servers to new versions, under load; see fault_server.py."""

import itertools
import threading
import time
from typing import Any

import pytest
from fault_server import publish_toy
from fleets import (
    PATIENCE,
    SAMPLING,
    N,
    Taker,
    assert_balanced,
    assert_each_once,
    assert_right,
    prompt,
    prompts,
    ready_fleet,
    states,
    wait_until,
)

from oapl_jax.errors import UserError
from oapl_jax.weights.publisher import version_path


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


@pytest.mark.parametrize("allow_older", [False, True])
@pytest.mark.parametrize("drain_deadline", [0.0, 10.0])
def test_refreshes_under_load(make_fleet, toy_servers, directory, allow_older, drain_deadline):
    made = toy_servers(4)
    updating = Updating(made)
    fleet = ready_fleet(
        make_fleet, made, directory, allow_older=allow_older, drain_deadline=drain_deadline
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
    versions = {s.prompt.stream_index: s.rollouts[0].policy_version for s in taken}
    if not allow_older:
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


def test_a_server_that_drains_takes_no_new_group(make_fleet, toy_servers, directory):
    (server,) = toy_servers(1)
    fleet = ready_fleet(make_fleet, [server], directory, allow_older=True, drain_deadline=2.0)
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


def test_a_drain_that_takes_too_long_is_an_abort(make_fleet, toy_servers, directory):
    slow, other = toy_servers(2)
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


def test_a_server_that_refuses_goes_on_only_if_allow_older_may(make_fleet, toy_servers, directory):
    bad, good = toy_servers(2)
    fleet = ready_fleet(make_fleet, [bad, good], directory, allow_older=True)
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
    assert any("continues with version 0" in sentence for sentence in fleet.said)
    bad.plan = lambda this: ""
    wait_until(lambda: fleet.versions() == {1}, "the version is taken after all")


def test_a_server_that_refuses_is_out_otherwise(make_fleet, toy_servers, directory):
    bad, good = toy_servers(2)
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


def test_a_new_version_is_offered_at_once_to_who_refused_another(
    make_fleet, toy_servers, directory
):
    bad, good = toy_servers(2)
    patience: Any = dict(backoff=1000.0, backoff_limit=1000.0)
    fleet = ready_fleet(make_fleet, [bad, good], directory, **patience)
    bad.plan = lambda this: "refuse" if this == "update" else ""
    fleet.refresh(1, publish_toy(directory, 1))
    wait_until(lambda: fleet.servers()[bad.url]["state"] == "refused")
    bad.plan = lambda this: ""
    fleet.refresh(2, publish_toy(directory, 2))
    wait_until(lambda: states(fleet) == {"ready"} and fleet.versions() == {2})


def test_versions_that_come_faster_than_servers_take_them(make_fleet, toy_servers, directory):
    """Each server samples between two updates, and each has its turn."""
    made = toy_servers(2)
    fleet = ready_fleet(make_fleet, made, directory, allow_older=True, max_in_flight=4)
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
    make_fleet, toy_servers, directory
):
    """A server whose update fails half-way says its old version and samples from something else."""
    bad, good = toy_servers(2)
    fleet = ready_fleet(make_fleet, [bad, good], directory, allow_older=True)

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


@pytest.mark.parametrize("off", [0.01, float("nan")])
def test_a_version_whose_log_probs_a_server_does_not_have(make_fleet, toy_servers, directory, off):
    (server,) = toy_servers(1)
    fleet = make_fleet([server.url])
    fleet.refresh(0, publish_toy(directory, 0, off=off))
    wait_until(lambda: fleet.servers()[server.url]["refused"])
    assert f"by {off:.3g} nats" in next(said for said in fleet.said if "is refused" in said)
    assert fleet.servers()[server.url]["probe_failed"]


def test_a_damaged_version_reaches_no_server(make_fleet, toy_servers, directory):
    (server,) = toy_servers(1)
    fleet = ready_fleet(make_fleet, [server], directory)
    path = publish_toy(directory, 1)
    (path / "model.safetensors").write_text('{"version": 2}')

    def refreshing():
        yield prompt(0)
        fleet.refresh(1, path)
        yield prompt(1)

    with pytest.raises(UserError, match=r"model\.safetensors is missing or damaged"):
        Taker(fleet, refreshing()).result()
    assert (server.loads, fleet.version) == ([0], 0)
    with pytest.raises(UserError, match="is missing"):
        fleet.refresh(9, version_path(directory, 9))


def test_going_back_to_a_version_is_checked_once(make_fleet, toy_servers, directory):
    (server,) = toy_servers(1)
    fleet = ready_fleet(make_fleet, [server], directory)
    for version in (1, 0, 1):
        path = version_path(directory, version)
        fleet.refresh(version, path if path.exists() else publish_toy(directory, version))
        taken = Taker(fleet, prompts(3)).result()
        assert {s.rollouts[0].policy_version for s in taken} == {version}
        assert_right(taken)
    assert server.loads == [0, 1, 0, 1]


def test_versions_of_groups_that_nobody_has_rewarded_yet(make_fleet, toy_servers, directory):
    fleet = ready_fleet(make_fleet, toy_servers(1), directory)
    groups = fleet.generate(prompts(1), n=N, sampling=SAMPLING)
    next(groups)
    fleet.refresh(1, publish_toy(directory, 1))
    wait_until(lambda: fleet.servers().popitem()[1]["version"] == 1)
    assert fleet.versions() == {0, 1}  # the group that was yielded last is of 0
    assert next(groups, None) is None
    assert fleet.versions() == {1}
