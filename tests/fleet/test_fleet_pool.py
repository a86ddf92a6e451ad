"""Membership of a fleet, its no-server timeout, and its end; see fault_server.py."""

import http.server
import itertools
import json
import threading
import time
from typing import Any, ClassVar

import pytest
from fault_server import publish_toy
from fleets import (
    PATIENCE,
    SETTINGS,
    Taker,
    assert_balanced,
    assert_right,
    prompt,
    prompts,
    reasons_of,
    servers_of,
    wait_until,
)

from oapl_jax.config import FleetConfig
from oapl_jax.errors import FleetLost, UserError
from oapl_jax.rollout.sampler import Sampling

# Membership


def test_servers_join_and_leave(make_fleet, toy_servers, directory, tmp_path):
    first, second, third = toy_servers(3)
    listed = tmp_path / "servers.txt"

    def write(*servers):
        aside = tmp_path / "aside.txt"
        aside.write_text("# mine\n" + "\n".join(server.url + "/" for server in servers))
        aside.rename(listed)  # so that no half of it is read

    write(first)
    fleet = make_fleet(servers_file=str(listed))
    fleet.refresh(0, publish_toy(directory, 0))
    ended = threading.Event()
    taker = Taker(
        fleet, map(prompt, itertools.takewhile(lambda _: not ended.is_set(), itertools.count()))
    )
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
    assert fleet.metrics()["fleet/joined"] == 4
    assert_balanced(fleet, taken, len(taken))


class Router(http.server.BaseHTTPRequestHandler):
    """Serves GET /workers."""

    urls: ClassVar[list[str]] = []

    def do_GET(self):
        workers = [{"id": str(i), "url": url} for i, url in enumerate(self.urls)]
        self.send_response(200 if self.path == "/workers" else 404)
        self.end_headers()
        self.wfile.write(json.dumps({"workers": workers}).encode())

    def log_message(self, *args):
        pass


def test_a_router_is_a_list_of_servers(make_fleet, toy_servers, directory):
    made = toy_servers(2)
    Router.urls = [server.url for server in made]
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Router) as router:
        threading.Thread(target=router.serve_forever, daemon=True).start()
        fleet = make_fleet(router=f"http://127.0.0.1:{router.server_port}/")
        fleet.refresh(0, publish_toy(directory, 0))
        wait_until(lambda: set(fleet.servers()) == set(Router.urls))
        assert servers_of(fleet.sample(20)) <= set(Router.urls)
        Router.urls = [made[0].url]
        wait_until(lambda: set(fleet.servers()) == {made[0].url})
        router.shutdown()


# No ready server


def test_the_no_server_timeout_ends_the_run(ready_fleet, toy_servers):
    made = toy_servers(2)
    deadlines: Any = dict(start_deadline=0.5, drain_deadline=0.1, update_deadline=0.4)
    fleet = ready_fleet(made, no_server_deadline=0.6, **deadlines)
    for server in made:
        server.kill()
    with pytest.raises(FleetLost, match="no_server_deadline") as caught:
        Taker(fleet, prompts(5)).result()
    assert caught.value.exit_code == 3
    assert all(server.url in str(caught.value) for server in made)
    assert fleet.has_logged("training pauses")
    found = fleet.metrics()
    assert found["fleet/prompts"] == found["fleet/cancelled"]
    with pytest.raises(FleetLost):  # and stays so
        Taker(fleet, prompts(5)).result()


def test_training_pauses_and_continues(ready_fleet, toy_servers):
    (server,) = toy_servers(1)
    fleet = ready_fleet([server])
    server.kill()
    taker = Taker(fleet, prompts(20))
    wait_until(lambda: fleet.has_logged("training pauses"))
    server.start()
    taken = taker.right(20)
    wait_until(lambda: fleet.has_logged("training continues"))
    assert fleet.metrics()["fleet/paused_seconds"] > 0
    assert_balanced(fleet, taken, 20)


def test_an_idle_fleet_has_no_timeout(ready_fleet, toy_servers):
    (server,) = toy_servers(1)
    deadlines: Any = dict(start_deadline=0.2, drain_deadline=0.1, update_deadline=0.1)
    fleet = ready_fleet([server], no_server_deadline=0.3, **deadlines)
    server.kill()
    time.sleep(0.8)  # longer than the deadline, while no group waits
    server.start()
    fleet.wait_ready()
    fleet.sample(3)


def test_a_fleet_whose_servers_are_all_refused_is_an_error(make_fleet, toy_servers, directory):
    made = toy_servers(2)
    for server in made:
        server.max_model_len = 10
    fleet = make_fleet([server.url for server in made])
    fleet.refresh(0, publish_toy(directory, 0))
    with pytest.raises(UserError, match="context length"):
        Taker(fleet, prompts(1)).result()
    assert all(server.loads == [] for server in made)


def test_one_refused_server_is_named_and_the_other_samples(make_fleet, toy_servers, directory):
    bad, good = toy_servers(2)
    bad.information["preferred_sampling_params"] = {"min_p": 0.1}
    fleet = make_fleet([bad.url, good.url])
    fleet.refresh(0, publish_toy(directory, 0))
    wait_until(lambda: fleet.of(good, "state") == "ready")
    assert servers_of(fleet.sample(10)) == {good.url}
    assert bad.loads == []
    assert sum(bad.url in s and "min_p" in s for s in fleet.logged) == 1


def test_a_server_that_starts_late(make_fleet, toy_servers, directory):
    (server,) = toy_servers(1)
    server.kill()
    fleet = make_fleet([server.url])
    fleet.refresh(0, publish_toy(directory, 0))
    taker = Taker(fleet, prompts(3))
    wait_until(lambda: "failed" in fleet.of(server, "reason"))
    assert fleet.states() == {"starting"}
    server.start()
    taker.right(3)
    late = make_fleet(["127.0.0.1:9"], start_deadline=0.1)
    wait_until(lambda: late.states() == {"lost"})
    assert late.has_logged("127.0.0.1:9")


def test_a_server_that_warms_up_gets_no_request(make_fleet, toy_servers, directory):
    """SGLang then serves all routes, and returns 503 from /health."""
    (server,) = toy_servers(1)
    warm = threading.Event()
    server.plan = lambda this: "503" if this == "health" and not warm.is_set() else ""
    fleet = make_fleet([server.url])
    fleet.refresh(0, publish_toy(directory, 0))
    taker = Taker(fleet, prompts(3))
    wait_until(lambda: "503" in fleet.of(server, "reason"))
    assert fleet.states() == {"starting"}
    assert not server.loads
    warm.set()
    assert not reasons_of(taker.right(3))


# The end


def test_close_while_groups_are_in_flight_and_the_pull_is_blocked(
    ready_fleet, toy_servers, directory
):
    made = toy_servers(2)
    fleet = ready_fleet(made)
    for server in made:
        server.seconds = PATIENCE
    blocked, released = threading.Event(), threading.Event()

    def pull():
        yield from prompts(3)
        blocked.set()
        assert released.wait(PATIENCE)
        yield prompt(3)  # too late

    taker = Taker(fleet, pull())
    assert blocked.wait(PATIENCE)
    wait_until(lambda: fleet.metrics()["fleet/in_flight"] == 3)
    fleet.close()
    assert taker.result() == []  # although the pull is blocked still
    wait_until(lambda: not any(server.running for server in made), "the end of the requests")
    released.set()
    fleet.close()
    assert Taker(fleet, prompts(2)).result() == []
    fleet.refresh(1, publish_toy(directory, 1))
    found = fleet.metrics()
    assert (found["fleet/prompts"], found["fleet/cancelled"]) == (3, 3)
    assert not [t for t in threading.enumerate() if t.name == "fleet"]


def test_many_threads_may_close(ready_fleet, toy_servers):
    fleet = ready_fleet(toy_servers(1))
    taker = Taker(fleet, map(prompt, itertools.count()))
    wait_until(lambda: taker.taken)
    closers = [threading.Thread(target=fleet.close) for _ in range(4)]
    for closer in closers:
        closer.start()
    for closer in closers:
        closer.join(PATIENCE)
    assert_right(taker.result())
    found = fleet.metrics()
    assert found["fleet/prompts"] == found["fleet/groups"] + found["fleet/cancelled"]


# Settings


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        (dict(servers=()), "fleet.servers"),
        (dict(router="http://r"), "fleet.router"),
        (dict(attempts=0), "fleet.attempts"),
        (dict(refresh_fraction=1.5), "fleet.refresh_fraction"),
        (dict(no_server_deadline=19.0), "fleet.no_server_deadline"),
        (dict(mixed_versions="drop"), "fleet.mixed_versions"),
    ],
)
def test_invalid_settings(changes, name):
    settings = {**SETTINGS, "servers": ("http://a",), **changes}
    with pytest.raises(UserError, match=name):
        FleetConfig.from_dict(settings, path="fleet").check_source()


def test_sampling_that_the_learner_cannot_reproduce_is_logged(make_fleet):
    odd = Sampling(temperature=1.0, top_p=0.95, top_k=7, max_response_tokens=6)
    fleet = make_fleet(["http://127.0.0.1:9"], sampling=odd)
    assert fleet.has_logged("rollout.top_p=0.95")
