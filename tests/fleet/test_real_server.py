"""Assumptions of the fleet about SGLang, checked with a real server."""

import concurrent.futures
import contextlib
import time

import numpy as np
import pytest
import requests
from fleets import CLOSE, wait_until

from oapl_jax.fleet.client import sampling_params
from oapl_jax.rollout.sampler import Sampling

PROMPT = [4, 11, 6, 12, 3, 14]
EOS = 1
LONG = dict(ignore_eos=True, max_new_tokens=4000)  # some twenty seconds
PATIENCE = 60.0  # seconds until a test fails


@pytest.fixture
def server(servers, published):
    """The first server, idle and on version 1."""
    server = servers.servers[0]
    server.ask("/continue_generation", {})
    abort_all(server)
    take(server, published, 1)
    return server


@pytest.fixture
def meanwhile():
    """Calls a function in a thread; returns its future a moment later."""
    with concurrent.futures.ThreadPoolExecutor(8) as pool:

        def call(what, *args, **kwargs):
            future = pool.submit(what, *args, **kwargs)
            time.sleep(0.5)
            assert not future.done()
            return future

        yield call


def request(ids=PROMPT, *, top=(), **sampling):
    params = {"temperature": 1.0, "max_new_tokens": 24, **sampling}
    ids = list(ids)
    return dict(top) | {"input_ids": ids, "sampling_params": params, "return_logprob": True}


def generate(server, **how):
    answer = server.ask("/generate", request(**how))
    return answer if isinstance(answer, list) else [answer]


def update(server, published, version, **more):
    body = {"model_path": str(published.path(version)), "weight_version": str(version), **more}
    return server.call("/update_weights_from_disk", body)


def take(server, published, version):
    wait_idle(server)  # the last answer comes a little before the scheduler is done with it
    status, answer = update(server, published, version, flush_cache=True)
    assert (status, answer["success"]) == (200, True)


def abort_all(server):
    server.ask("/abort_request", {"abort_all": True})


def version_of(server):
    return server.ask("/model_info")["weight_version"]


def wait_idle(server):
    is_idle = lambda: server.call("/flush_cache", {})[0] == 200
    wait_until(is_idle, "an idle server", PATIENCE, every=0.1)


def logp_of(response):
    return np.array([entry[0] for entry in response["meta_info"]["output_token_logprobs"]])


def difference(published, response, version=1, temperature=1.0):
    """Returns the largest difference of a response's log-probs from those of a version."""
    expected = published.logp(version, PROMPT, response["output_ids"], temperature)
    return np.abs(logp_of(response) - expected).max()


def span(version, start, end):
    return {"version": version, "start": start, "end": end}


def test_responses_of_a_group(server):
    assert isinstance(server.ask("/generate", request(n=1)), dict)
    group = server.ask("/generate", request(n=8))
    assert isinstance(group, list)
    assert len(group) == 8
    assert len({tuple(response["output_ids"]) for response in group}) > 1
    for response in group:
        meta = response["meta_info"]
        assert [entry[1] for entry in meta["output_token_logprobs"]] == response["output_ids"]
        assert meta["completion_tokens"] == len(response["output_ids"])
        assert meta["weight_version"] == "1"
        assert meta["weight_versions"] == [span("1", 0, len(response["output_ids"]))]
        assert meta["finish_reason"]["type"] in ("stop", "length")
        assert "text" not in response  # the server has no tokenizer


def test_log_probs_follow_a_new_version(server, published):
    (before,) = generate(server, temperature=0.0)
    take(server, published, 2)
    (after,) = generate(server, temperature=0.0)
    assert after["meta_info"]["weight_version"] == "2"
    for version, response in ((1, before), (2, after)):
        assert difference(published, response, version) < CLOSE
    assert difference(published, after) > 0.1
    info = server.ask("/model_info")
    assert (info["weight_version"], info["model_path"]) == ("2", str(published.path(2)))
    assert server.ask("/server_info")["weight_version"] == "1"  # as it was started


def test_greedy_takes_the_best_token_with_log_probs_at_temperature_1(server, published):
    (greedy,) = generate(server, temperature=0.0, ignore_eos=True)
    (top,) = generate(server, temperature=1.0, top_k=1, ignore_eos=True)
    assert greedy["output_ids"] == top["output_ids"]
    assert difference(published, greedy) < CLOSE


@pytest.mark.parametrize("cut", [dict(top_k=2), dict(top_p=0.3), dict(min_p=0.5)])
def test_log_probs_are_over_the_whole_vocabulary_even_where_sampling_is_not(server, published, cut):
    for response in generate(server, n=4, **cut):
        assert difference(published, response) < CLOSE


def test_a_prompts_log_probs_ignore_the_temperature(server, published):
    row = [*PROMPT, 5, 9, 2, 13, 7]
    body = request(ids=row, temperature=0.5, max_new_tokens=0, top={"logprob_start_len": 0})
    answer = server.ask("/generate", body)
    assert answer["output_ids"] == []
    entries = answer["meta_info"]["input_token_logprobs"]
    assert [entry[1] for entry in entries] == row
    assert entries[0][0] is None
    expected = published.logp(1, row[:1], row[1:])
    np.testing.assert_allclose([entry[0] for entry in entries[1:]], expected, atol=CLOSE, rtol=0)


def test_the_stop_token_is_in_the_response_with_its_log_prob(server, published):
    stopped = set()
    for response in generate(server, n=16, max_new_tokens=100, stop_token_ids=[7]):
        tokens, reason = response["output_ids"], response["meta_info"]["finish_reason"]
        if reason["type"] == "stop":
            stopped.add(reason["matched"])
            assert tokens[-1] == reason["matched"]
        assert not {EOS, 7} & set(tokens[:-1])
        assert difference(published, response) < CLOSE
    assert stopped == {EOS, 7}  # stop_token_ids adds to the model's own end


def test_every_setting_that_the_client_names_is_known(server):
    sampling = Sampling(temperature=1.0, top_p=1.0, top_k=0, max_response_tokens=5)
    body = request()
    body["sampling_params"] = sampling_params(sampling, n=2, stop_ids=[EOS])
    assert len(server.ask("/generate", body)) == 2
    body["sampling_params"]["topp"] = 1.0
    assert server.call("/generate", body)[0] == 400


def test_a_key_of_its_own_separates_the_prefix_cache(server):
    cached = lambda key: generate(server, top={"extra_key": key})[0]["meta_info"]["cached_tokens"]
    assert [cached("v1"), cached("v1"), cached("v2"), cached("v2")] == [0, 5, 0, 5]


def test_a_response_ends_two_tokens_before_the_context_does(server, published):
    (model,) = server.ask("/v1/models")["data"]
    limit = published.policy.config.max_positions
    assert model["max_model_len"] == limit
    status = lambda prompt, new: server.call(
        "/generate", request(ids=[3] * prompt, max_new_tokens=new, ignore_eos=True)
    )[0]
    assert [status(limit - 6, 1), status(limit - 7, 8), status(limit - 7, 7)] == [400, 400, 200]
    for asked, given in ((10, 8), (8, 8)):
        body = request(ids=[3] * (limit - 10), max_new_tokens=asked, ignore_eos=True)
        answer = server.ask("/generate", body)
        assert answer["meta_info"]["finish_reason"] == {"type": "length", "length": given}
        assert len(answer["output_ids"]) == given


def test_server_info_has_dtypes_and_backends(server):
    info = server.ask("/server_info")
    dtypes = (info["dtype"], info["kv_cache_dtype"], info["quantization"])
    assert dtypes == ("float32", "auto", None)
    assert info["skip_tokenizer_init"] is True


def test_a_missing_directory_is_refused_and_the_weights_stay(server, published, tmp_path):
    (before,) = generate(server, temperature=0.0)
    body = {"model_path": str(tmp_path / "nothing"), "weight_version": "9"}
    status, answer = server.call("/update_weights_from_disk", body)
    assert (status, answer["success"], version_of(server)) == (400, False, "1")
    (after,) = generate(server, temperature=0.0)
    assert after["output_ids"] == before["output_ids"]
    assert after["meta_info"]["weight_version"] == "1"


def test_an_update_waits_for_running_requests_which_end_on_the_old_version(
    server, published, meanwhile
):
    running = meanwhile(generate, server, n=4, ignore_eos=True, max_new_tokens=800)
    update(server, published, 2)  # now and then its flush comes too early: see the next test
    for response in running.result(PATIENCE):
        assert response["meta_info"]["weight_versions"] == [span("1", 0, 800)]
    assert generate(server)[0]["meta_info"]["weight_version"] == "2"


def test_an_update_that_fails_to_flush_still_loads_the_weights(server, published, meanwhile):
    running = meanwhile(generate, server, n=2, **LONG)
    server.ask("/pause_generation", {"mode": "in_place"})
    status, answer = update(server, published, 2, flush_cache=True)
    assert (status, answer["success"]) == (400, False)
    assert version_of(server) == "1"  # which is wrong:
    server.ask("/continue_generation", {})
    abort_all(server)
    assert running.result(PATIENCE)[0]["meta_info"]["weight_version"] == "2"

    # Its cache still holds the old weights' keys of this prompt; a key of its own passes it by.
    gaps = []
    for extra in ({}, {"extra_key": "v2"}):
        (response,) = generate(server, top=extra)
        assert response["meta_info"]["weight_version"] == "2"
        gaps.append(difference(published, response, 2))
    assert gaps[0] > 0.1
    assert gaps[1] < CLOSE
    take(server, published, 2)
    assert version_of(server) == "2"


def test_a_pause_in_place_lets_a_response_span_two_versions(server, published, meanwhile):
    running = meanwhile(generate, server, ignore_eos=True, max_new_tokens=800)
    server.ask("/pause_generation", {"mode": "in_place"})
    assert update(server, published, 2, flush_cache=False)[0] == 200
    server.ask("/continue_generation", {})
    (response,) = running.result(PATIENCE)
    first, second = response["meta_info"]["weight_versions"]
    assert first == span("1", 0, first["end"])
    assert second == span("2", first["end"], 800)
    assert response["meta_info"]["weight_version"] == "2"


def test_pause_by_abort_returns_partial_responses(server, meanwhile):
    running = meanwhile(generate, server, n=2, **LONG)
    server.ask("/pause_generation", {"mode": "abort"})
    for response in running.result(PATIENCE):
        assert response["meta_info"]["finish_reason"]["type"] == "abort"
        assert 0 < len(response["output_ids"]) < 4000
    waiting = meanwhile(generate, server, max_new_tokens=2)  # a paused server refuses nothing
    server.ask("/continue_generation", {})
    assert len(waiting.result(PATIENCE)[0]["output_ids"]) in (1, 2)


def test_a_busy_server_does_not_flush(server, meanwhile):
    running = meanwhile(generate, server, n=2, **LONG)
    assert server.call("/flush_cache", {})[0] == 400
    abort_all(server)
    for response in running.result(PATIENCE):
        assert response["meta_info"]["finish_reason"]["type"] == "abort"
        assert len(logp_of(response)) == len(response["output_ids"]) < 4000
    wait_idle(server)


def test_a_request_can_be_aborted_by_its_id_but_a_group_can_not(server, meanwhile):
    single = meanwhile(generate, server, top={"rid": "single"}, **LONG)
    server.ask("/abort_request", {"rid": "single"})
    assert single.result(PATIENCE)[0]["meta_info"]["finish_reason"]["type"] == "abort"

    group = meanwhile(generate, server, n=2, top={"rid": "group"}, **LONG)
    server.ask("/abort_request", {"rid": "group"})
    time.sleep(1.0)
    assert not group.done()
    abort_all(server)
    group.result(PATIENCE)


def test_a_caller_that_hangs_up_frees_the_server(server):
    with pytest.raises(requests.Timeout):
        server.call("/generate", request(n=4, **LONG), timeout=0.5)
    wait_idle(server)
    assert server.ask("/v1/loads")["loads"][0]["num_running_reqs"] == 0


def test_an_id_outside_the_vocabulary_ends_the_server(start_server, published):
    # Its table is padded to a multiple of 64 rows, uninitialised: a smaller id, outside the
    # vocabulary all the same, may be taken in silence.
    server = start_server(published.path(1))
    assert published.policy.config.vocab_size < 64
    with contextlib.suppress(OSError):
        server.call("/generate", request(ids=[3, 64]))
    server.wait_exit(PATIENCE)


def test_the_router_gives_a_group_to_one_server_in_turn(servers, published):
    for version, server in enumerate(servers.servers, start=1):
        take(server, published, version)
    seen = []
    for _ in range(4):
        group = servers.router.ask("/generate", request(n=4))
        seen.append({response["meta_info"]["weight_version"] for response in group})
    assert all(len(versions) == 1 for versions in seen)
    assert seen[0] != seen[1] == seen[3] != seen[2]


def test_the_router_names_its_servers_and_forwards_no_control_call(servers, published):
    workers = servers.router.ask("/workers")["workers"]
    assert {worker["url"] for worker in workers} == set(servers.urls)
    assert all(worker["is_healthy"] for worker in workers)
    assert update(servers.router, published, 2)[0] == 404
    controls = {"abort_request": {"abort_all": True}, "pause_generation": {"mode": "abort"}}
    for path, content in {**controls, "model_info": None, "server_info": None}.items():
        assert servers.router.call(f"/{path}", content)[0] == 404, path
