"""Who is in a fleet, what becomes of it without servers, and its end."""

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
    assert_each_once,
    assert_right,
    prompt,
    prompts,
    ready_fleet,
    states,
    wait_until,
)

from oapl_jax.config import FleetConfig
from oapl_jax.errors import FleetLost, UserError
from oapl_jax.rollout.sampler import Sampling

# Who is in the fleet


def test_servers_join_and_leave(make_fleet, toy_servers, directory, tmp_path):
    first, second, third = toy_servers(3)
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
    wait_until(lambda: any("list of servers can't be read" in sentence for sentence in fleet.said))
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


def test_a_router_is_a_list_of_servers(make_fleet, toy_servers, directory):
    made = toy_servers(2)
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


def test_no_server_for_too_long_ends_the_run(make_fleet, toy_servers, directory):
    made = toy_servers(2)
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
    assert found["fleet/prompts"] == found["fleet/cancelled"]
    with pytest.raises(FleetLost):  # and stays so
        Taker(fleet, prompts(5)).result()


def test_training_pauses_and_goes_on(make_fleet, toy_servers, directory):
    (server,) = toy_servers(1)
    fleet = ready_fleet(make_fleet, [server], directory)
    server.kill()
    taker = Taker(fleet, prompts(20))
    wait_until(lambda: any("training pauses" in said for said in fleet.said))
    server.start()
    taken = taker.result()
    assert_each_once(taken, 20)
    assert_right(taken)
    wait_until(lambda: any("training continues" in said for said in fleet.said))
    assert fleet.metrics()["fleet/paused_seconds"] > 0
    assert_balanced(fleet, taken, 20)


def test_an_idle_fleet_without_servers_ends_nothing(make_fleet, toy_servers, directory):
    (server,) = toy_servers(1)
    deadlines: Any = dict(start_deadline=0.2, drain_deadline=0.1, update_deadline=0.1)
    fleet = ready_fleet(make_fleet, [server], directory, no_server_deadline=0.3, **deadlines)
    server.kill()
    time.sleep(0.8)  # longer than the deadline, with nobody who waits
    server.start()
    wait_until(lambda: states(fleet) == {"ready"})
    assert_each_once(Taker(fleet, prompts(3)).result(), 3)


def test_servers_that_are_all_refused_from_the_start(make_fleet, toy_servers, directory):
    made = toy_servers(2)
    for server in made:
        server.max_model_len = 10
    fleet = make_fleet([server.url for server in made])
    fleet.refresh(0, publish_toy(directory, 0))
    with pytest.raises(UserError, match=r"no server can be used: .* context length is 10 tokens"):
        Taker(fleet, prompts(1)).result()
    assert all(server.loads == [] for server in made)


def test_one_refused_server_is_named_and_the_other_goes_on(make_fleet, toy_servers, directory):
    bad, good = toy_servers(2)
    bad.information["preferred_sampling_params"] = {"min_p": 0.1}
    fleet = make_fleet([bad.url, good.url])
    fleet.refresh(0, publish_toy(directory, 0))
    wait_until(lambda: fleet.servers()[good.url]["state"] == "ready")
    taken = Taker(fleet, prompts(10)).result()
    assert {s.server for s in taken} == {good.url}
    assert bad.loads == []
    assert sum(f"{bad.url} is refused: " in s and "min_p=0.1" in s for s in fleet.said) == 1


def test_a_server_that_is_not_there_yet(make_fleet, toy_servers, directory):
    (server,) = toy_servers(1)
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


def test_a_server_that_still_warms_up_is_not_sampled_from(make_fleet, toy_servers, directory):
    """SGLang answers all routes then, and its health with 503."""
    (server,) = toy_servers(1)
    warm = threading.Event()
    server.plan = lambda this: "503" if this == "health" and not warm.is_set() else ""
    fleet = make_fleet([server.url])
    fleet.refresh(0, publish_toy(directory, 0))
    taker = Taker(fleet, prompts(3))
    wait_until(lambda: "503" in fleet.servers()[server.url]["reason"])
    assert states(fleet) == {"starting"}
    assert not server.loads
    warm.set()
    taken = taker.result()
    assert_each_once(taken, 3)
    assert not any(s.attempts for s in taken)


def test_close_while_groups_are_in_flight_and_the_pull_is_blocked(
    make_fleet, toy_servers, directory
):
    made = toy_servers(2)
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
    assert (found["fleet/prompts"], found["fleet/cancelled"]) == (3, 3)
    assert not [t for t in threading.enumerate() if t.name == "fleet"]


def test_many_threads_may_close(make_fleet, toy_servers, directory):
    fleet = ready_fleet(make_fleet, toy_servers(1), directory)
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
    assert found["fleet/prompts"] == found["fleet/groups"] + found["fleet/cancelled"]


@pytest.mark.parametrize(
    ("changes", "setting"),
    [
        (dict(servers=()), "fleet.servers"),
        (dict(router="http://r"), "fleet.router"),
        (dict(max_in_flight=0), "fleet.max_in_flight"),
        (dict(attempts=0), "fleet.attempts"),
        (dict(backoff=0.0), "fleet.backoff"),
        (dict(request_deadline=-1.0), "fleet.request_deadline"),
        (dict(request_deadline=float("nan")), "fleet.request_deadline"),
        (dict(refresh_fraction=1.5), "fleet.refresh_fraction"),
        (dict(no_server_deadline=19.0), "fleet.no_server_deadline"),
        (dict(mixed_versions="drop"), "fleet.mixed_versions"),
    ],
)
def test_invalid_settings_are_rejected_by_name(changes, setting):
    with pytest.raises(UserError, match=setting):
        FleetConfig(**{**SETTINGS, "servers": ("http://a",), **changes}).check_source()


def test_settings_that_can_not_be_reproduced_are_named(make_fleet):
    odd = Sampling(temperature=1.0, top_p=0.95, top_k=7, max_response_tokens=6)
    said = make_fleet(["http://127.0.0.1:9"], sampling=odd).said
    assert "rollout.top_p=0.95 samples from fewer" in said[0]
    assert "rollout.top_k=7 samples from fewer" in said[1]
