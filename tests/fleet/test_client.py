"""What a server's answers mean, by hand; and the calls of one server, against the fault server."""

import asyncio
import copy
from typing import Any

import aiohttp
import numpy as np
import pytest
from etils import epath
from fault_server import STOP, VOCAB, FaultServer, is_right, publish_toy, toy_logp

from oapl_jax.fleet.client import Server, sampling_params
from oapl_jax.fleet.failures import Aborted, Mixed, Refused, ServerError, Unreachable, WrongVersion
from oapl_jax.fleet.responses import read_group
from oapl_jax.rollout.sampler import Sampling

READ: dict[str, Any] = dict(
    n=2,
    vocab_size=10,
    stop_ids=(1, 9),
    max_response_tokens=3,
    version=16,
    mixed_versions="reissue",
)


def response(tokens, reason, version="16", spans=None):
    """As SGLang 0.5.23 answers; the stop token is in output_ids and has a log-prob."""
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


def group():
    return [response([5, 9], "stop"), response([2, 3, 4], "length")]


def test_a_group_by_hand():
    answer = read_group(group(), **READ)
    first, second = answer.rollouts
    assert first.tokens.tolist() == [5, 9]
    assert second.tokens.tolist() == [2, 3, 4]
    np.testing.assert_array_equal(first.behavior_logp, np.array([0, -0.5], np.float32))
    np.testing.assert_array_equal(second.behavior_logp, np.array([0, -0.5, -1], np.float32))
    assert (first.tokens.dtype, first.behavior_logp.dtype) == (np.int32, np.float32)
    assert (first.finish_reason, second.finish_reason) == ("stop", "length")
    assert (first.policy_version, second.policy_version, answer.mixed) == (16, 16, False)


def test_a_group_of_one_is_no_list():
    (rollout,) = read_group(group()[0], **{**READ, "n": 1}).rollouts
    assert rollout.tokens.tolist() == [5, 9]


def test_a_stop_token_in_the_last_place_is_a_stop():
    """Some servers call it "length" since both are true."""
    answer = [response([5, 2, 1], "length"), response([2, 3, 4], "length")]
    assert [r.finish_reason for r in read_group(answer, **READ).rollouts] == ["stop", "length"]


def test_a_log_prob_of_zero_that_was_rounded_up():
    answer = group()
    answer[0]["meta_info"]["output_token_logprobs"][0][0] = 3e-6
    assert read_group(answer, **READ).rollouts[0].behavior_logp[0] == 0


def test_a_server_without_spans_says_one_version_for_all():
    answer = group()
    for one in answer:
        del one["meta_info"]["weight_versions"]
    assert read_group(answer, **READ).rollouts[0].policy_version == 16
    answer[1]["meta_info"]["weight_version"] = "17"
    with pytest.raises(WrongVersion):
        read_group(answer, **READ)


def meta(key, value):
    return lambda answer: answer[1]["meta_info"].update({key: value})


def ids(tokens):
    def change(answer):
        answer[1] = response(tokens, "length")

    return change


def logp(value):
    def change(answer):
        answer[1]["meta_info"]["output_token_logprobs"][1][0] = value

    return change


SPANS = [{"version": "16", "start": 0, "end": 2}, {"version": "17", "start": 2, "end": 3}]
EMPTY_SPAN = [{"version": "15", "start": 0, "end": 0}, {"version": "16", "start": 0, "end": 3}]


@pytest.mark.parametrize(
    ("change", "error", "why"),
    [
        (lambda a: a.pop(), ServerError, "1 responses instead of 2"),
        (lambda a: a.append(a[0]), ServerError, "3 responses instead of 2"),
        (lambda a: a.__setitem__(1, None), ServerError, "lacks"),
        (lambda a: a.__setitem__(1, {"error": "busy"}), ServerError, "lacks"),
        (lambda a: a[1].pop("output_ids"), ServerError, "lacks"),
        (lambda a: a[1].update(output_ids=[2, [3], 4]), ServerError, "lacks"),
        (lambda a: a[1].update(output_ids="abc"), ServerError, "lacks"),
        (lambda a: a[1].update(output_ids=[2, 3.5, 4]), ServerError, "of other tokens"),
        (lambda a: a[1].update(output_ids=[2, 3]), ServerError, "of other tokens"),
        (lambda a: a[1].update(output_ids=[2, 4, 3]), ServerError, "of other tokens"),
        (meta("output_token_logprobs", None), ServerError, "lacks"),
        (meta("output_token_logprobs", [[-1.0]]), ServerError, "lacks"),
        (meta("finish_reason", None), ServerError, "lacks"),
        (meta("weight_versions", [{"version": "16"}]), ServerError, "lacks"),
        (meta("weight_versions", 7), ServerError, "lacks"),
        (ids([]), ServerError, "shape"),
        (ids([2, 3, 4, 5]), ServerError, "at most 3 tokens"),
        (ids([2, 10, 4]), ServerError, "token id 10 outside the vocabulary of 10"),
        (ids([-1, 2, 4]), ServerError, "token id -1 outside"),
        (ids([2**70, 2, 4]), ServerError, "lacks"),
        (ids([2, 3]), ServerError, "cut off after 2 of 3 tokens"),
        (ids([2, 9, 4]), ServerError, "goes on after a stop token"),
        (logp(float("nan")), ServerError, "above 0 or not finite"),
        (logp(float("-inf")), ServerError, "above 0 or not finite"),
        (logp(0.01), ServerError, "above 0 or not finite"),
        (logp(None), ServerError, "above 0 or not finite"),
        (meta("finish_reason", {"type": "stop"}), ServerError, "stop at token 4, which is no stop"),
        (meta("finish_reason", {"type": "end"}), ServerError, "finish_reason 'end'"),
        (meta("finish_reason", {"type": "abort", "message": "why"}), Aborted, "why"),
        (meta("weight_version", "15"), WrongVersion, "acknowledges version 15 with spans"),
        (
            lambda a: a.__setitem__(1, response([2, 3, 4], "length", "15")),
            WrongVersion,
            "acknowledges version 15, 16 instead of 16",
        ),
        (
            lambda a: a[1]["meta_info"].update(weight_version="17", weight_versions=SPANS),
            Mixed,
            "spans versions 16, 17",
        ),
        (
            lambda a: a.__setitem__(1, response([2, 3, 4], "length", "16", SPANS[::-1])),
            WrongVersion,
            "acknowledges version 16, 17 instead of 16",
        ),
    ],
)
def test_an_answer_that_is_no_group(change, error, why):
    answer = group()
    change(answer)
    with pytest.raises(ServerError, match=why) as caught:
        read_group(answer, **READ)
    assert caught.type is error


def test_a_span_without_tokens_is_none():
    answer = group()
    answer[1] = response([2, 3, 4], "length", "16", EMPTY_SPAN)
    assert not read_group(answer, **READ).mixed


def test_a_response_of_two_versions_is_kept_as_one_of_the_older():
    answer = group()
    answer[1] = response([2, 3, 4], "length", "17", SPANS)
    keep = {**READ, "mixed_versions": "keep"}
    kept = read_group(answer, **keep)
    assert kept.mixed
    assert {r.policy_version for r in kept.rollouts} == {16}
    answer[0] = response([5, 9], "stop", "17")  # began with the newer one
    with pytest.raises(WrongVersion):
        read_group(answer, **keep)
    unasked = read_group(answer, **{**READ, "version": None})
    assert {r.policy_version for r in unasked.rollouts} == {-1}


def test_every_setting_is_sent():
    sent = sampling_params(Sampling(0.5, 0.9, 0, 7), n=4, stop_ids=(9, 1))
    assert sent == {
        "n": 4,
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": -1,
        "max_new_tokens": 7,
        "stop_token_ids": [1, 9],
        "min_p": 0.0,
        "frequency_penalty": 0.0,
        "presence_penalty": 0.0,
        "repetition_penalty": 1.0,
        "min_new_tokens": 0,
        "ignore_eos": False,
    }
    assert sampling_params(Sampling(0.5, 0.9, 3, 7), n=4, stop_ids=())["top_k"] == 3


# The calls of one server


@pytest.fixture
def server(tmp_path):
    one = FaultServer(epath.Path(tmp_path))
    yield one
    one.close()


def ask(server, what, *, answer_deadline=5.0):
    """Runs `what(client)`, a coroutine, with a client of the server."""

    async def run():
        async with aiohttp.ClientSession() as session:
            deadlines = dict(connect_deadline=5.0, answer_deadline=answer_deadline)
            return await what(Server(session, server.url, **deadlines))

    return asyncio.run(run())


def generate(tokens, *, deadline=5.0, **changes):
    sampling = Sampling(1.0, 1.0, 0, 6)
    given = dict(n=3, stop_ids=(STOP,), vocab_size=VOCAB, version=4, mixed_versions="reissue")
    return lambda client: client.generate(
        tokens, sampling=sampling, deadline=deadline, **{**given, **changes}
    )


def test_update_and_generate(server, tmp_path):
    path = publish_toy(epath.Path(tmp_path), 4)
    assert ask(server, lambda client: client.version()) == "default"
    assert ask(server, lambda client: client.update(str(path), 4, deadline=5.0)) is None
    assert ask(server, lambda client: client.version()) == "4"
    answer = ask(server, generate([2, 3]))
    assert len(answer.rollouts) == 3
    for rollout in answer.rollouts:
        assert rollout.policy_version == 4
        assert is_right(rollout, np.array([2, 3]), Sampling(1.0, 1.0, 0, 6))
    with pytest.raises(WrongVersion, match="version 4 instead of 5"):
        ask(server, generate([2, 3], version=5))
    for _ in range(2):  # of whatever it holds: the cache is not used
        ask(server, generate([2, 3], version=None))
    keys = [request["extra_key"] for request in server.requests]
    assert keys[:2] == ["v4", "v5"]
    assert len(set(keys)) == 4


def test_scores_of_rows(server, tmp_path):
    server.held, server.says = 4, "4"
    rows = [[2, 3, 5], [7, 1, VOCAB - 1, 6]]
    scores, versions = ask(server, lambda client: client.score(rows))
    assert versions == {"4"}
    for row, found in zip(rows, scores, strict=True):
        expected = [toy_logp(4)[place, row[place]] for place in range(1, len(row))]
        np.testing.assert_allclose(found, expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("fault", "error", "why"),
    [
        ("500", ServerError, "/generate answered 500: on order"),
        ("400", Refused, "/generate answered 400: on order"),
        ("html", ServerError, "/generate answered no JSON: <html>"),
        ("truncated", ServerError, "/generate answered no JSON"),
        ("empty", ServerError, "/generate answered no JSON"),
        ("cut", Unreachable, "/generate failed: ClientPayloadError"),
        ("reset", Unreachable, "/generate failed"),
        ("hang", ServerError, "/generate did not answer within 0.2 s"),
    ],
)
def test_what_goes_wrong_has_a_name(server, fault, error, why):
    server.plan = lambda call: fault
    with pytest.raises(ServerError, match=why) as caught:
        ask(server, generate([2, 3], deadline=0.2 if fault == "hang" else 5.0))
    assert caught.type is error


def test_nobody_at_the_address(server):
    server.kill()
    with pytest.raises(Unreachable, match="/health failed: ClientConnectorError"):
        ask(server, lambda client: client.health())
    server.start()


@pytest.mark.parametrize(
    ("fault", "error", "why"),
    [
        ("refuse", Refused, "answered 400: .*on order"),
        ("no", Refused, "did not take version 4: .*on order"),
        ("misnamed", WrongVersion, "was told to take version 4 and acknowledges 79"),
    ],
)
def test_an_update_that_is_not_taken(server, tmp_path, fault, error, why):
    path = publish_toy(epath.Path(tmp_path), 4)
    server.plan = lambda call: fault if call == "update" else ""
    with pytest.raises(error, match=why):
        ask(server, lambda client: client.update(str(path), 4, deadline=5.0))


def test_a_flush_is_tried_until_the_server_is_idle(server):
    left = ["busy"] * 3
    server.plan = lambda call: left.pop() if left else ""
    ask(server, lambda client: client.flush())
    assert server.calls["flush"] == 4
    server.plan = lambda call: "busy"
    with pytest.raises(Refused, match="Flush cache failed"):
        ask(server, lambda client: client.flush(), answer_deadline=0.2)


def test_who_has_no_route_for_weights(server):
    assert ask(server, lambda client: client.can_update())

    async def elsewhere(client):
        client.url += "/nowhere"
        return await client.can_update()

    assert not ask(server, elsewhere)


@pytest.mark.parametrize("fault", ["nan", "few"])
def test_scores_that_are_none(server, fault):
    server.plan = lambda call: fault
    with pytest.raises(ServerError, match="wrong log-probs of a prompt"):
        ask(server, lambda client: client.score([[2, 3], [4, 5]]))


def test_an_abort_ends_what_is_in_flight(server):
    server.seconds = 20.0

    async def run(client):
        task = asyncio.create_task(generate([2, 3], version=None)(client))
        while not server.running:
            await asyncio.sleep(0.01)
        await client.abort_all()
        return await task

    with pytest.raises(Aborted):
        ask(server, run)


def test_groups_are_not_changed_by_reading():
    before = group()
    read_group(kept := copy.deepcopy(before), **READ)
    assert kept == before
