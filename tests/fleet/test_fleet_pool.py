"""Membership of a fleet, its no-server timeout, and its end; see fault_server.py."""

import itertools
import threading
import time

import pytest
from fault_server import FaultServer
from fleets import PATIENCE, SETTINGS, always, prompt, prompts, wait_until

from oapl_jax.config import FleetConfig
from oapl_jax.errors import FleetLost, UserError
from oapl_jax.rollout.sampler import Sampling


def test_servers_join_and_leave(make_fleet, tmp_path):
    listed = tmp_path / "servers.txt"

    def write(*servers):
        aside = tmp_path / "aside.txt"
        aside.write_text("# mine\n" + "\n".join(server.url + "/" for server in servers))
        aside.rename(listed)  # so that no half of it is read

    listed.touch()
    fleet, (first, second, third) = make_fleet(3, servers=(), servers_file=str(listed))
    write(first)
    fleet.publish(0)
    ended = threading.Event()
    indices = itertools.takewhile(lambda _: not ended.is_set(), itertools.count())
    taker = fleet.take(map(prompt, indices))
    urls = lambda: set(fleet.servers())
    sampled = lambda server: fleet.of(server, "sampled")
    wait_until(lambda: urls() == {first.url}, "the first read of the list")
    wait_until(lambda: sampled(first) > 5)
    write(first, second, third)
    wait_until(lambda: {second.url, third.url} <= urls())
    wait_until(lambda: min(sampled(second), sampled(third)) > 5, "work for new servers")
    write(third)
    wait_until(lambda: urls() == {third.url})
    listed.unlink()  # then the list stays as it is
    wait_until(lambda: fleet.has_logged("list"))
    before = sampled(third)
    wait_until(lambda: sampled(third) > before + 5)
    assert urls() == {third.url}
    write(first, third)
    wait_until(lambda: first.url in urls() and fleet.states() == {"ready"})
    ended.set()
    taken = taker.right()
    assert all(s.rollouts and not s.attempts for s in taken)
    assert fleet.counts()["joined"] == 4
    fleet.assert_balanced(taken, len(taken))


def test_a_router_is_a_list_of_servers(make_fleet, toy_servers):
    (router,) = toy_servers(1)
    fleet, made = make_fleet(2, servers=(), router=f"{router.url}/")
    router.workers = [server.url for server in made]
    fleet.publish(0)
    wait_until(lambda: set(fleet.servers()) == set(router.workers))
    assert fleet.sample(20).servers <= set(router.workers)
    router.workers = [made[0].url]
    wait_until(lambda: set(fleet.servers()) == {made[0].url})


def test_the_no_server_timeout_ends_the_run(ready_fleet):
    deadlines = dict(start_deadline=0.5, drain_deadline=0.1, update_deadline=0.4)
    fleet, made = ready_fleet(2, no_server_deadline=0.6, **deadlines)
    for server in made:
        server.kill()
    with pytest.raises(FleetLost, match="no_server_deadline") as caught:
        fleet.take(prompts(5)).result()
    assert caught.value.exit_code == 3
    assert all(server.url in str(caught.value) for server in made)
    assert fleet.has_logged("training pauses")
    found = fleet.counts()
    assert found["prompts"] == found["cancelled"]
    with pytest.raises(FleetLost):  # and stays so
        fleet.take(prompts(5)).result()


def test_training_pauses_and_continues(ready_fleet):
    fleet, (server,) = ready_fleet(1)
    server.kill()
    taker = fleet.take(prompts(20))
    wait_until(lambda: fleet.has_logged("training pauses"))
    server.start()
    taken = taker.right(20)
    wait_until(lambda: fleet.has_logged("training continues"))
    assert fleet.counts()["paused_seconds"] > 0
    fleet.assert_balanced(taken, 20)


def test_an_idle_fleet_has_no_timeout(ready_fleet):
    deadlines = dict(start_deadline=0.2, drain_deadline=0.1, update_deadline=0.1)
    fleet, (server,) = ready_fleet(1, no_server_deadline=0.3, **deadlines)
    server.kill()
    time.sleep(0.8)  # longer than the deadline, while no group waits
    server.start()
    fleet.wait_ready()
    fleet.sample(3)


def test_a_fleet_whose_servers_are_all_refused_is_an_error(make_fleet):
    fleet, made = make_fleet(2, prepare=lambda server: setattr(server, "max_model_len", 10))
    fleet.publish(0)
    with pytest.raises(UserError, match="context length"):
        fleet.take(prompts(1)).result()
    assert all(server.loads == [] for server in made)


@pytest.mark.parametrize("fault", ["no server", "503"])
def test_a_server_that_starts_late(make_fleet, fault):
    """While SGLang warms up it serves all routes, and returns 503 from /health."""
    warms_up = lambda server: setattr(server, "plan", always("health", "503"))
    fleet, (server,) = make_fleet(1, prepare=warms_up if fault == "503" else FaultServer.kill)
    fleet.publish(0)
    taker = fleet.take(prompts(3))
    wait_until(lambda: ("503" if fault == "503" else "failed") in fleet.of(server, "reason"))
    assert fleet.states() == {"starting"}
    assert not server.loads
    server.plan = lambda this: ""
    if fault != "503":
        server.start()
    assert not taker.right(3).reasons


def test_a_server_that_never_starts_is_lost(make_fleet):
    fleet, _ = make_fleet(0, servers=("127.0.0.1:9",), start_deadline=0.1)
    fleet.publish(0)
    wait_until(lambda: fleet.states() == {"lost"})
    assert fleet.has_logged("127.0.0.1:9")


def test_close_while_groups_are_in_flight_and_the_pull_is_blocked(ready_fleet):
    fleet, made = ready_fleet(2)
    for server in made:
        server.seconds = PATIENCE
    blocked, released = threading.Event(), threading.Event()

    def pull():
        yield from prompts(3)
        blocked.set()
        assert released.wait(PATIENCE)
        yield prompt(3)  # too late

    taker = fleet.take(pull())
    assert blocked.wait(PATIENCE)
    wait_until(lambda: fleet.counts()["in_flight"] == 3)
    closers = [threading.Thread(target=fleet.close) for _ in range(4)]
    for closer in closers:
        closer.start()
    for closer in closers:
        closer.join(PATIENCE)
    assert taker.result() == []  # although the pull is blocked still
    wait_until(lambda: not any(server.running for server in made), "the end of the requests")
    released.set()
    fleet.close()
    assert fleet.take(prompts(2)).result() == []
    fleet.publish(1)
    found = fleet.counts()
    assert (found["prompts"], found["cancelled"]) == (3, 3)
    assert not [t for t in threading.enumerate() if t.name == "fleet"]


@pytest.mark.parametrize(
    ("name", "value"), [("servers", ()), ("router", "http://r"), ("no_server_deadline", 19.0)]
)
def test_invalid_settings(name, value):
    settings = {**SETTINGS, "servers": ("http://a",), name: value}
    with pytest.raises(UserError, match=f"fleet.{name}"):
        FleetConfig.from_dict(settings, path="fleet").check_source()


def test_sampling_that_the_learner_cannot_reproduce_is_logged(make_fleet):
    odd = Sampling(temperature=1.0, top_p=0.95, top_k=7, max_response_tokens=6)
    fleet, _ = make_fleet(1, sampling=odd)
    assert fleet.has_logged("rollout.top_p=0.95")


def test_one_refused_server_loads_nothing_and_the_other_samples(make_fleet):
    made = []

    def prepare(server):
        if not made:
            server.information["preferred_sampling_params"] = {"min_p": 0.1}
        made.append(server)

    fleet, (bad, good) = make_fleet(2, prepare=prepare)
    fleet.publish(0)
    wait_until(lambda: fleet.of(bad, "state") == "refused")
    wait_until(lambda: fleet.of(good, "state") == "ready")
    assert (fleet.sample(10).servers, bad.loads) == ({good.url}, [])
