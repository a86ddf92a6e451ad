"""The prompt stream: permutations, hosts, exact resumption, and prompts that do not fit."""

import json
import logging

import numpy as np
import pytest

from oapl_jax.data.prompts import Prompts, all_prompts, instructed, make_prompt, response_text
from oapl_jax.data.records import Record, user
from oapl_jax.errors import UserError
from oapl_jax.model.tokenizer import make_character_tokenizer

SIZE = 7


def source(size: int = SIZE, first: int = 10) -> list[Record]:
    """Prompts of 5 tokens; from 100 on, of 6."""
    return [
        Record(f"id{i}", user(f"{i}+1="), str(i + 1), "chain_sum", {})
        for i in range(first, first + size)
    ]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return make_character_tokenizer("0123456789+-=,", tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
def stream(tokenizer):
    def make(records=None, seed=0, max_prompt_tokens=5, instruction="", host=0, hosts=1):
        return Prompts(
            source() if records is None else records,
            tokenizer,
            task="chain_sum",
            seed=seed,
            max_prompt_tokens=max_prompt_tokens,
            instruction=instruction,
            host=host,
            hosts=hosts,
        )

    return make


def take(stream, n):
    return [next(stream) for _ in range(n)]


def described(prompts):
    return [(p.id, p.stream_index, p.tokens.tolist(), p.text, p.answer, p.task) for p in prompts]


def test_a_prompt_is_the_templated_question(stream, tokenizer):
    prompt = next(stream())
    assert prompt.tokens.dtype == np.int32
    assert tokenizer.decode(prompt.tokens) == prompt.text
    assert prompt.answer == str(int(prompt.text[:2]) + 1)
    assert (prompt.stream_index, prompt.task, prompt.id) == (0, "chain_sum", f"id{prompt.text[:2]}")


def test_each_epoch_is_another_permutation(stream):
    prompts = take(stream(), 3 * SIZE)
    assert [p.stream_index for p in prompts] == list(range(3 * SIZE))
    epochs = [[p.id for p in prompts[i : i + SIZE]] for i in range(0, 3 * SIZE, SIZE)]
    for epoch in epochs:
        assert sorted(epoch) == sorted(r.id for r in source())
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]


def test_the_order_is_that_of_the_seed(stream):
    assert described(take(stream(), SIZE)) == described(take(stream(), SIZE))
    assert described(take(stream(), SIZE)) != described(take(stream(seed=1), SIZE))


@pytest.mark.parametrize("drawn", [0, 3, SIZE - 1, SIZE, SIZE + 1, 2 * SIZE + 2])
def test_resumes_exactly_over_the_epoch_boundary(stream, drawn):
    whole = stream()
    take(whole, drawn)
    state = json.loads(json.dumps(whole.state()))
    resumed = stream()
    resumed.restore(state)
    assert resumed.state() == state
    assert described(take(resumed, 2 * SIZE)) == described(take(whole, 2 * SIZE))


def test_state_does_not_draw(stream):
    one, other = stream(), stream()
    take(one, SIZE)
    take(other, SIZE)
    one.state()
    assert described(take(one, 3)) == described(take(other, 3))


@pytest.mark.parametrize(
    "other", [{"seed": 1}, {"records": source(SIZE + 1)}, {"records": source(first=30)}]
)
def test_refuses_a_state_of_other_data(stream, other):
    state = stream().state()
    with pytest.raises(UserError, match="not the configured one"):
        stream(**other).restore(state)


# Random access


def test_a_draw_names_a_prompt(stream):
    prompts = take(stream(), 2 * SIZE + 3)
    other = stream()
    take(other, 4)
    for draw in (16, 0, 7, 6):
        assert described([other.at(draw)]) == described([prompts[draw]])
    assert next(other).stream_index == 4  # the stream stays where it was


# Hosts


@pytest.mark.parametrize("hosts", [2, 3, 7, 10])
def test_hosts_share_the_stream(stream, hosts):
    whole = described(take(stream(), 3 * SIZE * hosts))
    shared = [described(take(stream(host=h, hosts=hosts), 3 * SIZE)) for h in range(hosts)]
    assert [p for round in zip(*shared, strict=True) for p in round] == whole


def test_hosts_resume_and_may_then_be_another_number(stream):
    whole = described(take(stream(), 40))
    states = []
    for host in range(3):
        part = stream(host=host, hosts=3)
        take(part, 4)
        states.append(json.loads(json.dumps(part.state())))
    assert states[0] == states[1] == states[2]
    again = stream(host=1, hosts=3)
    again.restore(states[2])
    assert described(take(again, 3)) == [whole[13], whole[16], whole[19]]
    for hosts, first in ((1, 12), (2, 12), (4, 12), (5, 10)):  # 5: draws 10 and 11 come again
        parts = [stream(host=h, hosts=hosts) for h in range(hosts)]
        for part in parts:
            part.restore(states[0])
        rounds = [described([next(part) for part in parts]) for _ in range(2)]
        assert rounds[0] + rounds[1] == whole[first : first + 2 * hosts]


def test_a_host_that_is_not_one_of_them(stream):
    for host, hosts in ((2, 2), (-1, 2), (0, 0)):
        with pytest.raises(ValueError, match=f"host {host} is not one of {hosts}"):
            stream(host=host, hosts=hosts)


# Instructions


def test_the_instruction_stands_below_the_last_message(tokenizer):
    record = Record("a", (*user("1+1="), *user("2+2=")), "4", "chain_sum", {})
    assert instructed(record.messages, "3") == [*user("1+1="), *user("2+2=\n\n3")]
    assert instructed(record.messages, "") == list(record.messages)
    assert record.messages[1]["content"] == "2+2="  # the record is as it was


def test_the_instruction_is_in_the_tokens_and_not_in_the_text(tmp_path):
    tokenizer = make_character_tokenizer("0123456789+=\n", tmp_path)
    prompts = [
        make_prompt(
            source(1)[0],
            tokenizer,
            stream_index=0,
            task="chain_sum",
            max_prompt_tokens=8,
            instruction=instruction,
        )
        for instruction in ("", "7", "77")
    ]
    assert [tokenizer.decode(p.tokens) for p in prompts[:2]] == ["10+1=", "10+1=\n\n7"]
    assert [p.text for p in prompts[:2]] == ["10+1=", "10+1="]
    assert prompts[2] is None  # too long because of it


# Prompts that do not fit


def test_long_prompts_are_passed_over_counted_and_reported_once(stream, caplog):
    records = source(5, first=97)  # 97, 98, 99 fit; 100, 101 do not
    with caplog.at_level(logging.WARNING):
        short = stream(records)
        prompts = take(short, 9)
    for epoch in range(3):
        ids = [p.id for p in prompts[3 * epoch : 3 * epoch + 3]]
        assert sorted(ids) == ["id97", "id98", "id99"]
    everything = take(stream(records, max_prompt_tokens=6), prompts[-1].stream_index + 1)
    fitting = [p for p in everything if len(p.tokens) == 5]
    assert described(prompts) == described(fitting)  # the draws are those of the whole stream
    assert short.left_out == len(everything) - 9 > 0
    (message,) = (r.getMessage() for r in caplog.records)
    assert message.startswith("prompt id10")
    assert "left out and counted" in message


def test_what_was_left_out_survives_a_resumption(stream):
    records = source(5, first=97)
    whole, resumed = stream(records), stream(records)
    take(whole, 7)
    resumed.restore(json.loads(json.dumps(whole.state())))
    assert (resumed.left_out, resumed.state()) == (whole.left_out, whole.state())
    assert whole.left_out > 0
    assert described(take(resumed, 9)) == described(take(whole, 9))


def test_a_draw_of_a_long_prompt_is_refused(stream):
    with pytest.raises(
        UserError, match=r"id1\d \(draw 3\) has more tokens than data\.max_prompt_t"
    ):
        stream(max_prompt_tokens=4).at(3)


def test_nothing_fits(stream, tokenizer):
    with pytest.raises(UserError, match=r"7 prompts in a row.*data\.max_prompt_tokens \(4\)"):
        next(stream(max_prompt_tokens=4))
    with pytest.raises(UserError, match=r"7 of 7 prompts are longer.*tokens \(4\); raise it"):
        all_prompts(
            source(), tokenizer, task="chain_sum", max_prompt_tokens=4, limit=None, instruction=""
        )


def test_evaluation_leaves_out_long_prompts_too(tokenizer, caplog):
    records = source(5, first=97)
    with caplog.at_level(logging.WARNING):
        prompts = all_prompts(
            records, tokenizer, task="chain_sum", max_prompt_tokens=5, limit=None, instruction=""
        )
    assert [(p.id, p.stream_index) for p in prompts] == [("id97", 0), ("id98", 1), ("id99", 2)]
    assert [r.getMessage() for r in caplog.records] == [
        "2 of 5 prompts are longer than data.max_prompt_tokens (5) and are left out"
    ]


def test_another_task_and_an_empty_source_are_refused(stream, tokenizer):
    with pytest.raises(UserError, match=r"data\.task is number_sorting"):
        all_prompts(
            source(),
            tokenizer,
            task="number_sorting",
            max_prompt_tokens=5,
            limit=None,
            instruction="",
        )
    with pytest.raises(UserError, match="empty"):
        stream(records=[])


def test_all_prompts_are_in_order(tokenizer):
    def chosen(limit):
        return all_prompts(
            source(), tokenizer, task="chain_sum", max_prompt_tokens=5, limit=limit, instruction=""
        )

    assert [p.id for p in chosen(None)] == [r.id for r in source()]
    assert [p.stream_index for p in chosen(None)] == list(range(SIZE))
    assert described(chosen(3)) == described(chosen(None)[:3])
    for limit in (0, SIZE + 1):
        with pytest.raises(UserError, match=f"{limit} prompts"):
            chosen(limit)


def test_response_text_has_no_special_tokens(tokenizer):
    tokens = np.array([*tokenizer.encode("12,3"), tokenizer.eos_token_id], np.int32)
    assert response_text(tokenizer, tokens) == "12,3"
    assert response_text(tokenizer, tokens[-1:]) == ""
