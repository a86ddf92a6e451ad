"""Responses of a server, checked by hand; and the client's routes, against the fault server."""

import contextlib
import copy
import dataclasses

import aiohttp
import numpy as np
import pytest
from etils import epath
from fault_server import STOP, VOCAB, is_right, publish_toy, stamps
from fleets import SAMPLING

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

KIND = dict(stop_ids=(1, 9), vocab_size=10, version=16, mixed_versions="reissue")
REQUEST = GroupRequest(tokens=(3, 4), n=2, sampling=Sampling(1.0, 1.0, 0, 3), **KIND)


def response(tokens, reason, version="16", spans=None):
    """A response of SGLang 0.5.23: the stop token is in output_ids and has a log-prob."""
    pairs = [[-0.5 * i, token, None] for i, token in enumerate(tokens)]
    meta = {"finish_reason": {"type": reason}, "output_token_logprobs": pairs}
    meta |= stamps((version, len(tokens))) | ({"weight_versions": spans} if spans else {})
    return {"text": "unused", "output_ids": tokens, "meta_info": meta}


def group(second=None):
    return [response([5, 9], "stop"), second or response([2, 3, 4], "length")]


def test_read_a_group_by_hand():
    content = group()
    kept = copy.deepcopy(content)
    (first, second), mixed = REQUEST.read(content)
    assert content == kept
    assert (first.tokens.tolist(), second.tokens.tolist()) == ([5, 9], [2, 3, 4])
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


def change_ids(value):
    return lambda content: content[1].update(output_ids=value)


def replace(value):
    return lambda content: content.__setitem__(1, value)


def change_tokens(*tokens):
    return replace(response(list(tokens), "length"))


def change_logp(value):
    return lambda c: c[1]["meta_info"]["output_token_logprobs"][1].__setitem__(0, value)


SPANS = [{"version": "16", "start": 0, "end": 2}, {"version": "17", "start": 2, "end": 3}]
MIXED = response([2, 3, 4], "length", "17", SPANS)
MALFORMED = [
    lambda c: c.pop(),
    lambda c: c.append(c[0]),
    lambda c: c[1].pop("output_ids"),
    *map(replace, (None, {"error": "busy"})),
    *map(change_ids, ([2, [3], 4], "abc", [2, 3.5, 4], [2, 3], [2, 4, 3])),
    *(change_meta("output_token_logprobs", value) for value in (None, [[-1.0]])),
    *(change_meta("finish_reason", value) for value in (None, {"type": "stop"}, {"type": "end"})),
    *(change_meta("weight_versions", value) for value in ([{"version": "16"}], 7)),
    *(change_tokens(), change_tokens(2, 3), change_tokens(2, 3, 4, 5), change_tokens(2, 9, 4)),
    *(change_tokens(2, 10, 4), change_tokens(-1, 2, 4), change_tokens(2**70, 2, 4)),
    *map(change_logp, (float("nan"), float("-inf"), 0.01, None)),
]


@pytest.mark.parametrize(
    ("change", "error"),
    [
        *((change, ServerError) for change in MALFORMED),
        (change_meta("finish_reason", {"type": "abort", "message": "why"}), Aborted),
        (change_meta("weight_version", "15"), WrongVersion),
        (
            lambda c: c[1]["meta_info"].update(weight_version="17", weight_versions=None),
            WrongVersion,
        ),
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


def test_a_kept_group_of_two_versions_is_of_the_older():
    keep = dataclasses.replace(REQUEST, mixed_versions="keep")
    rollouts, mixed = keep.read(group(MIXED))
    assert mixed
    assert {r.policy_version for r in rollouts} == {16}
    with pytest.raises(WrongVersion):  # the first began with the newer one
        keep.read([response([5, 9], "stop", "17"), MIXED])
    rollouts, _ = dataclasses.replace(keep, version=None).read(group(MIXED))
    assert {r.policy_version for r in rollouts} == {-1}


def test_sampling_params():
    sent = sampling_params(Sampling(0.5, 0.9, 0, 7), n=4, stop_ids=(9, 1))
    expected = dict(n=4, temperature=0.5, top_p=0.9, top_k=-1, max_new_tokens=7, min_p=0.0)
    expected |= dict(presence_penalty=0.0, min_new_tokens=0, ignore_eos=False)
    assert expected.items() <= sent.items()
    assert sent["stop_token_ids"] == [1, 9]
    assert (sent["repetition_penalty"], sent["frequency_penalty"]) == (1.0, 0.0)
    assert sampling_params(Sampling(0.5, 0.9, 3, 7), n=4, stop_ids=())["top_k"] == 3


@pytest.fixture
def server(toy_servers):
    return toy_servers(1)[0]


@contextlib.asynccontextmanager
async def connect(server, *, deadline=5.0, api_key=""):
    async with aiohttp.ClientSession() as session:
        deadlines = dict(connect_deadline=5.0, deadline=deadline)
        yield SGLangClient(session, server.url, **deadlines, api_key=api_key)


def request(version):
    toy = dict(tokens=[2, 3], stop_ids=(STOP,), vocab_size=VOCAB, sampling=SAMPLING)
    return dataclasses.replace(REQUEST, n=3, version=version, **toy)


async def test_update_and_generate(server, tmp_path):
    async with connect(server) as client:
        assert await client.version() == "default"
        assert await client.can_update()
        await client.update(str(publish_toy(epath.Path(tmp_path), 4)), 4, deadline=5.0)
        assert await client.version() == "4"
        rollouts, _ = await client.generate(request(4))
        assert len(rollouts) == 3
        for rollout in rollouts:
            assert rollout.policy_version == 4
            assert is_right(rollout, np.array([2, 3]), SAMPLING)
        with pytest.raises(WrongVersion):
            await client.generate(request(5))
        for _ in range(2):  # of any version: the prefix cache is bypassed
            await client.generate(request(None))
        keys = [body["extra_key"] for body in server.requests]
        assert (keys[:2], len(set(keys))) == (["v4", "v5"], 4)
        client.url += "/nowhere"
        assert not await client.can_update()


async def test_flush_cache_is_retried_until_the_server_is_idle(server):
    left = ["busy"] * 3
    server.plan = lambda call: left.pop() if left else ""
    async with connect(server) as client:
        await client.flush_cache()
    assert server.calls["flush"] == 4
    server.plan = lambda call: "busy"
    async with connect(server, deadline=0.2) as client:
        with pytest.raises(Refused):
            await client.flush_cache()


@pytest.mark.parametrize("key", ["status", "info", "sk-1/2", "e"])
async def test_a_response_that_repeats_the_api_key_is_not_shown(server, key):
    async with connect(server, api_key=key) as client:
        server.information = [f"{key}; the key is {key}!"]
        with pytest.raises(ServerError) as caught:
            await client.info()
        assert "the key is" not in str(caught.value)
        assert f"{server.url}/server_info" in str(caught.value)


@pytest.mark.parametrize("key", ["status", "info", "malformed"])
async def test_a_message_that_has_the_api_key_as_a_word_stays_whole(server, key):
    async with connect(server, api_key=key) as client:
        server.information = ["7"]
        with pytest.raises(ServerError) as caught:
            await client.info()
    assert f"{server.url}/server_info returned a malformed response" in str(caught.value)
    assert '["7"]' in str(caught.value)
