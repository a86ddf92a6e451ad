"""A fleet: groups, membership, refreshes, no-server timeout, end; see fault_server.py."""

import itertools
import threading
import time

import numpy as np
import pytest
from fault_server import CONTEXT, FAULTS, STOP, VOCAB, FaultServer, publish_toy
from fleets import PATIENCE, SAMPLING, SETTINGS, N, Taken, always, once, prompt, prompts, wait_until

from oapl_jax.config import FleetConfig
from oapl_jax.errors import FleetLost, RunError, UserError
from oapl_jax.rollout.sampler import Sampling
from oapl_jax.structs import Prompt
from oapl_jax.weights.publisher import version_path


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


@pytest.mark.parametrize("content", ["127.0.0.1:9\n", '["http://127.0.0.1:9"]', "\ufeff# mine"])
def test_a_list_of_servers_that_can_not_work_is_refused_at_once(make_fleet, tmp_path, content):
    listed = tmp_path / "servers.txt"
    listed.write_text(content)
    with pytest.raises(UserError, match=r"line 1 of .*servers\.txt"):
        make_fleet(0, servers_file=str(listed))


def test_a_first_list_of_servers_that_can_not_work_ends_the_run(make_fleet, tmp_path):
    listed = tmp_path / "servers.txt"
    fleet, _ = make_fleet(0, servers_file=str(listed))
    fleet.publish(0)
    taker = fleet.take(prompts(1))
    wait_until(lambda: fleet.has_logged(str(listed)), "the missing list in the log")
    listed.write_text("http://127.0.0.1:9, http://127.0.0.1:9\n")
    with pytest.raises(UserError, match=r"line 1 of .*servers\.txt"):
        taker.result()


def test_a_list_of_servers_that_is_damaged_during_a_run_stays_as_it_was(make_fleet, tmp_path):
    listed = tmp_path / "servers.txt"
    fleet, (server,) = make_fleet(1, servers=(), servers_file=str(listed))
    listed.write_text(f"{server.url}\n")
    fleet.publish(0)
    wait_until(lambda: fleet.states() == {"ready"})
    listed.write_text("127.0.0.1:9\n")
    wait_until(lambda: fleet.has_logged("127.0.0.1:9"), "the damaged line in the log")
    assert fleet.sample(5).servers == {server.url}


def test_a_router_that_does_not_answer_is_named(make_fleet, toy_servers):
    (router,) = toy_servers(1)
    router.plan = always("workers", "hang")
    fleet, _ = make_fleet(0, router=router.url, control_deadline=0.2)
    wait_until(lambda: fleet.has_logged(f"{router.url}/workers"), "the router's name in the log")


def test_a_list_of_servers_that_is_missing_is_named_at_the_end(make_fleet, tmp_path):
    deadlines = dict(start_deadline=0.2, drain_deadline=0.1, update_deadline=0.1)
    listed = str(tmp_path / "servers.txt")
    fleet, _ = make_fleet(0, servers_file=listed, no_server_deadline=0.3, **deadlines)
    fleet.publish(0)
    with pytest.raises(FleetLost, match=listed):
        fleet.take(prompts(1)).result()


@pytest.mark.parametrize("workers", [["127.0.0.1:9"], ["grpc://127.0.0.1:9"], None])
def test_a_router_that_names_no_servers_ends_the_run(make_fleet, toy_servers, workers):
    (router,) = toy_servers(1)
    router.workers = workers or []
    url = router.url if workers else f"{router.url}/other"  # which has no route /workers
    fleet, _ = make_fleet(0, router=url)
    fleet.publish(0)
    with pytest.raises(UserError, match=workers[0] if workers else r"fleet\.router"):
        fleet.take(prompts(1)).result()


def test_a_router_that_starts_late(make_fleet, toy_servers):
    (router,) = toy_servers(1)
    router.plan = always("workers", "503")
    fleet, (server,) = make_fleet(1, servers=(), router=router.url)
    router.workers = [server.url]
    fleet.publish(0)
    taker = fleet.take(prompts(3))
    wait_until(lambda: fleet.has_logged("503"))
    router.plan = lambda call: ""
    taker.right(3)


SECRET = "sk-1234567890"


def write_key(path, key):
    path.touch(0o600)
    path.write_text(key)
    return str(path)


def test_an_api_key_is_sent_and_never_shown(make_fleet, toy_servers, tmp_path):
    demand = lambda server: setattr(server, "api_key", SECRET)
    (router,) = toy_servers(1)
    demand(router)
    key_file = write_key(tmp_path / "key", SECRET)
    fleet, made = make_fleet(
        2, prepare=demand, servers=(), router=router.url, api_key_file=key_file
    )
    router.workers = [server.url for server in made]
    fleet.publish(0)
    wait_until(lambda: len(fleet.servers()) == 2)
    fleet.wait_ready(0)
    assert fleet.sample(20).servers == set(router.workers)
    fleet.publish(1)
    assert fleet.sample(20).versions == {1}
    for server in made:
        server.api_key = "another"  # and its response repeats the one that it got
    fleet.publish(2)
    wait_until(lambda: fleet.states() == {"refused"})
    assert all("api_key_file" in server["reason"] for server in fleet.servers().values())
    made[0].api_key, made[0].information = SECRET, [SECRET]  # a malformed response repeats it
    wait_until(
        lambda: "with the API key" in fleet.of(made[0], "reason"), "a reason without the key"
    )
    shown = [*fleet.logged, repr(fleet.servers())]
    assert not [text for text in shown if SECRET in text]


@pytest.mark.parametrize("given", ["", "another"])
def test_servers_that_demand_another_api_key_are_an_error(make_fleet, tmp_path, given):
    settings = dict(api_key_file=write_key(tmp_path / "key", given)) if given else {}
    demand = lambda server: setattr(server, "api_key", SECRET)
    fleet, made = make_fleet(2, prepare=demand, **settings)
    fleet.publish(0)
    with pytest.raises(UserError, match="api_key_file") as caught:
        fleet.take(prompts(1)).result()
    assert all(server.url in str(caught.value) for server in made)
    assert not any(server.loads for server in made)


def test_an_api_key_that_other_users_can_read_is_logged(make_fleet, tmp_path):
    path = write_key(tmp_path / "key", SECRET)
    assert not make_fleet(1, api_key_file=path)[0].has_logged(path)
    (tmp_path / "key").chmod(0o644)
    assert make_fleet(1, api_key_file=path)[0].has_logged(path)
    with pytest.raises(UserError, match=r"fleet\.api_key_file"):
        make_fleet(1, api_key_file=str(tmp_path / "missing"))


def test_a_server_that_is_to_load_a_version_is_not_called_unready(ready_fleet):
    fleet, (server,) = ready_fleet(1, control_deadline=3.0, no_server_deadline=60.0)
    server.plan = always("health", "hang")
    wait_until(lambda: server.faults["health", "hang"], "a health check that hangs")
    fleet.publish(1)
    taker = fleet.take(prompts(3))
    time.sleep(1.0)  # for the watch
    assert fleet.of(server, "state") == "ready"
    assert not fleet.has_logged("no server is ready")
    server.plan = lambda call: ""
    assert taker.right(3).versions == {1}


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
    fleet, _ = make_fleet(0, servers=("http://127.0.0.1:9",), start_deadline=0.1)
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


@pytest.mark.parametrize("length", ["long", [4096], {}])
def test_a_server_that_describes_itself_wrongly_is_refused(make_fleet, length):
    lengths = [length, CONTEXT]
    set_length = lambda server: setattr(server, "max_model_len", lengths.pop(0))
    fleet, (server, good) = make_fleet(2, prepare=set_length)
    fleet.publish(0)
    wait_until(lambda: fleet.of(server, "state") == "lost")
    assert fleet.sample(5).servers == {good.url}


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
    assert fleet.versions() == {2}


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


def test_a_version_that_is_damaged_later_ends_a_run_without_other_servers(ready_fleet):
    """A restarted server loads it again and holds other weights, as the real one."""
    fleet, (server,) = ready_fleet(1)
    server.kill()
    (version_path(fleet.directory, 0) / "model.safetensors").write_text('{"version": 2}')
    server.plan = always("update", "stale")
    server.start()
    with pytest.raises(FleetLost, match=r"v000000/model\.safetensors"):
        fleet.take(prompts(1)).result()


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
