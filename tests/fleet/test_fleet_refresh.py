"""Refreshes of a fleet's servers to new versions, under load; see fault_server.py."""

import itertools
import time

import pytest
from fault_server import publish_toy
from fleets import PATIENCE, SAMPLING, N, Taken, always, prompt, prompts, wait_until

from oapl_jax.errors import UserError
from oapl_jax.weights.publisher import version_path


def held(taken):
    """Returns the pairs of server and version that groups were sampled from."""
    return {(s.server, s.rollouts[0].policy_version) for s in taken}


@pytest.mark.parametrize("allow_older", [False, True])
@pytest.mark.parametrize("drain_deadline", [0.0, 10.0])
def test_refreshes_under_load(ready_fleet, allow_older, drain_deadline):
    fleet, made = ready_fleet(4, allow_older=allow_older, drain_deadline=drain_deadline)
    for server in made:
        server.seconds, server.update_seconds = 0.08, 0.2
    paths = [publish_toy(fleet.directory, version) for version in range(1, 6)]
    target_of = {}

    def pull():
        """Refreshes from inside the pull, as a worker does."""
        for index in range(120):
            if index % 20 == 0:
                version = index // 20
                if version:
                    fleet.refresh(version, paths[version - 1])
            target_of[index] = version
            yield prompt(index)

    taken = fleet.take(pull()).right(120)
    assert all(s.rollouts for s in taken)
    versions = {s.prompt.stream_index: s.rollouts[0].policy_version for s in taken}
    if not allow_older:
        assert all(versions[index] >= target_of[index] for index in versions)
        assert set(versions.values()) >= {0, 5}
    else:
        assert any(versions[index] < target_of[index] for index in versions)
    spans = [span for server in made for span in server.updates[1:]]  # without version 0
    assert max(sum(begin <= at < end for begin, end in spans) for at, _ in spans) <= 2
    aborted = fleet.counts()["aborted"]
    assert aborted > 0 if drain_deadline == 0 else aborted == 0
    assert set(taken.reasons) <= {"aborted"}
    assert fleet.counts()["refresh_refused"] == 0
    fleet.assert_balanced(taken, 120)
    wait_until(lambda: fleet.versions() == {5})


def test_requests_beyond_the_drain_deadline_are_aborted(ready_fleet):
    fleet, (slow, _) = ready_fleet(2, drain_deadline=0.1, attempts=1)
    slow.seconds = PATIENCE
    taker = fleet.take(prompts(6))
    wait_until(lambda: slow.running > 0)
    slow.seconds = 0.0  # for requests from now on
    fleet.publish(1)
    retried = Taken(s for s in taker.right(6) if s.attempts)
    assert (set(retried.reasons), retried.versions) == ({"aborted"}, {1})
    assert slow.calls["abort"] == 1


@pytest.mark.parametrize("allow_older", [False, True])
def test_a_server_that_refuses_a_version(ready_fleet, allow_older):
    """It continues with its older version, if that is allowed."""
    fleet, (bad, good) = ready_fleet(2, allow_older=allow_older)
    bad.plan = always("update", "refuse")
    fleet.publish(1)
    wait_until(lambda: fleet.of(good, "version") == 1)
    wait_until(lambda: fleet.of(bad, "refresh_refused") >= 2, "a retry")
    if allow_older:
        fleet.wait_ready()
        assert held(fleet.sample(60)) == {(bad.url, 0), (good.url, 1)}
        assert fleet.versions() == {0, 1}
    else:
        assert held(fleet.sample(30)) == {(good.url, 1)}
    bad.plan = lambda this: ""
    fleet.wait_ready(1)


def test_a_new_target_resets_the_backoff_of_a_refused_server(ready_fleet):
    fleet, (bad, _) = ready_fleet(2, backoff=1000.0, backoff_limit=1000.0)
    bad.plan = always("update", "refuse")
    fleet.publish(1)
    wait_until(lambda: fleet.of(bad, "state") == "refused")
    bad.plan = lambda this: ""
    fleet.publish(2)
    fleet.wait_ready(2)


def test_servers_sample_between_versions_that_come_faster_than_they_load(ready_fleet):
    fleet, made = ready_fleet(2, allow_older=True, max_in_flight=4)
    for server in made:
        server.seconds, server.update_seconds = 0.01, 0.1
    paths = [publish_toy(fleet.directory, version) for version in range(1, 50)]
    versions = itertools.cycle(enumerate(paths, 1))

    def pull():
        indices = itertools.count()
        while min(len(server.loads) for server in made) < 6:
            fleet.refresh(*next(versions))
            yield from (prompt(next(indices)) for _ in range(4))

    sampled_from = held(fleet.take(pull()).right())
    for server in made:
        assert len({version for url, version in sampled_from if url == server.url}) > 2


def test_stale_weights_after_a_refusal_fail_the_probe(ready_fleet):
    """A server whose update fails half-way reports its old version and holds other weights."""
    fleet, (bad, good) = ready_fleet(2, allow_older=True)

    def half(this):
        if this == "update":
            bad.held = 55
            return "refuse"
        return ""

    bad.plan = half
    fleet.publish(1)
    wait_until(lambda: fleet.of(bad, "probe_failed"))
    assert fleet.sample(30).servers == {good.url}


@pytest.mark.parametrize("off", [0.01, float("nan")])
def test_a_server_whose_log_probs_differ_from_the_probe(make_fleet, off):
    fleet, (server,) = make_fleet(1)
    fleet.publish(0, off=off)
    wait_until(lambda: fleet.of(server, "refused"))
    assert fleet.has_logged(f"{off:.3g} nats")
    assert fleet.of(server, "probe_failed")


def test_a_damaged_version_reaches_no_server(ready_fleet):
    """The error of the pull is that of `generate`."""
    fleet, (server,) = ready_fleet(1)
    path = publish_toy(fleet.directory, 1)
    (path / "model.safetensors").write_text('{"version": 2}')

    def pull():
        yield prompt(0)
        fleet.refresh(1, path)
        yield prompt(1)

    with pytest.raises(UserError, match=r"model\.safetensors"):
        fleet.take(pull()).result()
    assert (server.loads, fleet.version) == ([0], 0)
    fleet.sample(4)  # the fleet continues
    with pytest.raises(UserError):
        fleet.refresh(9, version_path(fleet.directory, 9))


def test_a_return_to_an_older_version(ready_fleet):
    fleet, (server,) = ready_fleet(1)
    publish_toy(fleet.directory, 1)
    for version in (1, 0, 1):
        fleet.refresh(version, version_path(fleet.directory, version))
        assert fleet.sample(3).versions == {version}
    assert server.loads == [0, 1, 0, 1]


def test_versions_include_those_of_groups_that_were_just_taken(ready_fleet):
    fleet, _ = ready_fleet(1)
    groups = fleet.generate(prompts(1), n=N, sampling=SAMPLING)
    next(groups)
    fleet.publish(1)
    wait_until(lambda: fleet.servers().popitem()[1]["version"] == 1)
    assert fleet.versions() == {0, 1}  # the group that was yielded last is of version 0
    assert next(groups, None) is None
    assert fleet.versions() == {1}


def test_a_draining_server_gets_no_new_group(ready_fleet):
    fleet, (server,) = ready_fleet(1, allow_older=True, drain_deadline=2.0)
    server.seconds = 0.05

    def pull():  # staggered, so that the server is never idle
        for index in range(120):
            if index == 20:
                fleet.publish(1)
            time.sleep(0.01)
            yield prompt(index)

    taken = fleet.take(pull()).right(120)
    assert (fleet.counts()["aborted"], taken.versions) == (0, {0, 1})
