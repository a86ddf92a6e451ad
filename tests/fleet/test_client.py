"""Responses of a server, checked by hand; and the client's routes, against the fault server."""

import asyncio
import copy
import dataclasses

import aiohttp
import numpy as np
import pytest
from fault_server import STOP, VOCAB, is_right, publish_toy, toy_logp

from oapl_jax.fleet.client import (
    Aborted,
    GroupRequest,
    Mixed,
    Refused,
    ServerError,
    SGLangClient,
    WrongVersion,
    sampling_params,
)
from oapl_jax.rollout.sampler import Sampling

REQUEST = GroupRequest(
    tokens=(3, 4),
    n=2,
    sampling=Sampling(1.0, 1.0, 0, 3),
    stop_ids=(1, 9),
    vocab_size=10,
    version=16,
    mixed_versions="reissue",
)


def response(tokens, reason, version="16", spans=None):
    """A response of SGLang 0.5.23: the stop token is in output_ids and has a log-prob."""
    return {
        "text": "unused",
        "output_ids": tokens,
        "meta_info": {
            "finish_reason": {"type": reason},
            "output_token_logprobs": [[-0.5 * i, token, None] for i, token in enumerate(tokens)],
            "weight_version": version,
            "weight_versions": spans or [{"version": version, "start": 0, "end": len(tokens)}],
        },
    }


def group(second=None):
    return [response([5, 9], "stop"), second or response([2, 3, 4], "length")]


def test_read_a_group_by_hand():
    content = group()
    kept = copy.deepcopy(content)
    (first, second), mixed = REQUEST.read(content)
    assert content == kept
    assert first.tokens.tolist() == [5, 9]
    assert second.tokens.tolist() == [2, 3, 4]
    np.testing.assert_array_equal(first.behavior_logp, np.array([0, -0.5], np.float32))
    np.testing.assert_array_equal(second.behavior_logp, np.array([0, -0.5, -1], np.float32))
    assert (first.tokens.dtype, first.behavior_logp.dtype) == (np.int32, np.float32)
    assert (first.finish_reason, second.finish_reason) == ("stop", "length")
    assert (first.policy_version, second.policy_version, mixed) == (16, 16, False)
    ((rollout,), _) = dataclasses.replace(REQUEST, n=1).read(content[0])  # no list
    assert rollout.tokens.tolist() == [5, 9]


def test_read_tolerates_differences_between_servers():
    content = [response([5, 2, 1], "length"), response([2, 3, 4], "length")]
    content[0]["meta_info"]["output_token_logprobs"][0][0] = 3e-6  # rounded up
    del content[1]["meta_info"]["weight_versions"]
    rollouts, _ = REQUEST.read(content)
    assert [r.finish_reason for r in rollouts] == ["stop", "length"]
    assert rollouts[0].behavior_logp[0] == 0
    assert rollouts[1].policy_version == 16
    empty = [{"version": "15", "start": 0, "end": 0}, {"version": "16", "start": 0, "end": 3}]
    assert not REQUEST.read(group(response([2, 3, 4], "length", "16", empty)))[1]


def change_meta(key, value):
    return lambda content: content[1]["meta_info"].update({key: value})


def change_response(key, value):
    return lambda content: content[1].update({key: value})


def replace(value):
    return lambda content: content.__setitem__(1, value)


def change_tokens(tokens):
    return replace(response(tokens, "length"))


def change_logp(value):
    def change(content):
        content[1]["meta_info"]["output_token_logprobs"][1][0] = value

    return change


SPANS = [{"version": "16", "start": 0, "end": 2}, {"version": "17", "start": 2, "end": 3}]
MIXED = response([2, 3, 4], "length", "17", SPANS)


MALFORMED = [
    lambda c: c.pop(),
    lambda c: c.append(c[0]),
    replace(None),
    replace({"error": "busy"}),
    lambda c: c[1].pop("output_ids"),
    change_response("output_ids", [2, [3], 4]),
    change_response("output_ids", "abc"),
    change_response("output_ids", [2, 3.5, 4]),
    change_response("output_ids", [2, 3]),
    change_response("output_ids", [2, 4, 3]),
    change_meta("output_token_logprobs", None),
    change_meta("output_token_logprobs", [[-1.0]]),
    change_meta("finish_reason", None),
    change_meta("finish_reason", {"type": "stop"}),
    change_meta("finish_reason", {"type": "end"}),
    change_meta("weight_versions", [{"version": "16"}]),
    change_meta("weight_versions", 7),
    change_tokens([]),
    change_tokens([2, 3, 4, 5]),
    change_tokens([2, 10, 4]),
    change_tokens([-1, 2, 4]),
    change_tokens([2**70, 2, 4]),
    change_tokens([2, 3]),
    change_tokens([2, 9, 4]),
    change_logp(float("nan")),
    change_logp(float("-inf")),
    change_logp(0.01),
    change_logp(None),
]


@pytest.mark.parametrize(
    ("change", "error"),
    [
        *((change, ServerError) for change in MALFORMED),
        (change_meta("finish_reason", {"type": "abort", "message": "why"}), Aborted),
        (change_meta("weight_version", "15"), WrongVersion),
        (replace(response([2, 3, 4], "length", "15")), WrongVersion),
        (replace(response([2, 3, 4], "length", "16", SPANS[::-1])), WrongVersion),
        (replace(MIXED), Mixed),
    ],
)
def test_read_rejects_an_invalid_response(change, error):
    content = group()
    change(content)
    with pytest.raises(ServerError) as caught:
        REQUEST.read(content)
    assert caught.type is error


def test_a_mixed_response_is_kept_as_one_of_the_older_version():
    keep = dataclasses.replace(REQUEST, mixed_versions="keep")
    rollouts, mixed = keep.read(group(MIXED))
    assert mixed
    assert {r.policy_version for r in rollouts} == {16}
    newer = [response([5, 9], "stop", "17"), MIXED]  # began with the newer version
    with pytest.raises(WrongVersion):
        keep.read(newer)
    rollouts, _ = dataclasses.replace(keep, version=None).read(newer)
    assert {r.policy_version for r in rollouts} == {-1}


def test_sampling_params():
    sent = sampling_params(Sampling(0.5, 0.9, 0, 7), n=4, stop_ids=(9, 1))
    expected = dict(n=4, temperature=0.5, top_p=0.9, top_k=-1, max_new_tokens=7, min_p=0.0)
    assert expected.items() <= sent.items()
    assert sent["stop_token_ids"] == [1, 9]
    assert (sent["repetition_penalty"], sent["frequency_penalty"]) == (1.0, 0.0)
    assert sampling_params(Sampling(0.5, 0.9, 3, 7), n=4, stop_ids=())["top_k"] == 3


# Routes


@pytest.fixture
def server(toy_servers):
    return toy_servers(1)[0]


def call(server, request, *, deadline=5.0):
    """Runs `request(client)`, a coroutine, with a client of the server."""

    async def run():
        async with aiohttp.ClientSession() as session:
            client = SGLangClient(session, server.url, connect_deadline=5.0, deadline=deadline)
            return await request(client)

    return asyncio.run(run())


def generate(version=4, deadline=None):
    request = GroupRequest(
        tokens=[2, 3],
        n=3,
        sampling=Sampling(1.0, 1.0, 0, 6),
        stop_ids=(STOP,),
        vocab_size=VOCAB,
        version=version,
        mixed_versions="reissue",
    )
    return lambda client: client.generate(request, deadline=deadline)


def test_update_and_generate(server, directory):
    path = publish_toy(directory, 4)
    assert call(server, lambda client: client.version()) == "default"
    call(server, lambda client: client.update(str(path), 4, deadline=5.0))
    assert call(server, lambda client: client.version()) == "4"
    rollouts, _ = call(server, generate())
    assert len(rollouts) == 3
    for rollout in rollouts:
        assert rollout.policy_version == 4
        assert is_right(rollout, np.array([2, 3]), Sampling(1.0, 1.0, 0, 6))
    with pytest.raises(WrongVersion):
        call(server, generate(version=5))
    for _ in range(2):  # of any version: the prefix cache is bypassed
        call(server, generate(version=None))
    keys = [request["extra_key"] for request in server.requests]
    assert keys[:2] == ["v4", "v5"]
    assert len(set(keys)) == 4


def test_score(server):
    server.held, server.says = 4, "4"
    rows = [[2, 3, 5], [7, 1, VOCAB - 1, 6]]
    scores, versions = call(server, lambda client: client.score(rows))
    assert versions == {"4"}
    for row, found in zip(rows, scores, strict=True):
        expected = [toy_logp(4)[place, row[place]] for place in range(1, len(row))]
        np.testing.assert_allclose(found, expected, rtol=1e-6)
    for fault in ("nan", "few"):
        server.plan = lambda call, fault=fault: fault
        with pytest.raises(ServerError):
            call(server, lambda client: client.score([[2, 3], [4, 5]]))


@pytest.mark.parametrize(
    "fault", ["500", "400", "html", "truncated", "empty", "cut", "reset", "hang"]
)
def test_a_failed_request_names_its_route(server, fault):
    server.plan = lambda call: fault
    with pytest.raises(ServerError, match="/generate") as caught:
        call(server, generate(deadline=0.2 if fault == "hang" else None))
    assert isinstance(caught.value, Refused) == (fault == "400")


def test_an_address_without_a_server(server):
    server.kill()
    with pytest.raises(ServerError, match="/health"):
        call(server, lambda client: client.check_health())
    server.start()


@pytest.mark.parametrize(
    ("fault", "error"), [("refuse", Refused), ("no", Refused), ("misnamed", WrongVersion)]
)
def test_a_failed_update(server, directory, fault, error):
    path = publish_toy(directory, 4)
    server.plan = lambda call: fault if call == "update" else ""
    with pytest.raises(error):
        call(server, lambda client: client.update(str(path), 4, deadline=5.0))


def test_flush_cache_is_retried_until_the_server_is_idle(server):
    left = ["busy"] * 3
    server.plan = lambda call: left.pop() if left else ""
    call(server, lambda client: client.flush_cache())
    assert server.calls["flush"] == 4
    server.plan = lambda call: "busy"
    with pytest.raises(Refused):
        call(server, lambda client: client.flush_cache(), deadline=0.2)


def test_can_update(server):
    assert call(server, lambda client: client.can_update())

    async def elsewhere(client):
        client.url += "/nowhere"
        return await client.can_update()

    assert not call(server, elsewhere)


def test_abort_all_ends_requests_in_flight(server):
    server.seconds = 20.0

    async def run(client):
        task = asyncio.create_task(generate(version=None)(client))
        while not server.running:
            await asyncio.sleep(0.01)
        await client.abort_all()
        return await task

    with pytest.raises(Aborted):
        call(server, run)
