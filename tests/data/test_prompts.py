"""The prompt stream: permutations, hosts, exact resumption, and prompts that are too long."""

import copy
import dataclasses
import datetime
import json
import logging

import numpy as np
import pytest

from oapl_jax.data.prompts import PromptStream, PromptTemplate, all_prompts, response_text
from oapl_jax.data.records import Record, user
from oapl_jax.errors import UserError
from oapl_jax.model.tokenizer import CONTENTS_ONLY, make_character_tokenizer

SIZE = 7


def source(size: int = SIZE, first: int = 10) -> list[Record]:
    """Prompts of 5 tokens; from 100 on, of 6."""
    return [
        Record(f"id{i}", user(f"{i}+1="), str(i + 1), "chain_sum", {})
        for i in range(first, first + size)
    ]


SOME_LONG = source(5, first=97)  # 97, 98, 99 fit into 5 tokens; 100, 101 do not


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return make_character_tokenizer("0123456789+-=,\n", tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
def template(tokenizer):
    def make(**changes):
        settings = dict(task="chain_sum", max_prompt_tokens=5, instruction="")
        return PromptTemplate(tokenizer, **settings | changes)

    return make


@pytest.fixture
def stream(template):
    def make(records=None, seed=0, host=0, hosts=1, **changes):
        records = source() if records is None else records
        return PromptStream(records, template(**changes), seed=seed, host=host, hosts=hosts)

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


def test_each_epoch_is_another_permutation_of_the_seed(stream):
    prompts = take(stream(), 3 * SIZE)
    assert [p.stream_index for p in prompts] == list(range(3 * SIZE))
    epochs = [[p.id for p in prompts[i : i + SIZE]] for i in range(0, 3 * SIZE, SIZE)]
    for epoch in epochs:
        assert sorted(epoch) == sorted(r.id for r in source())
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
    assert described(take(stream(), SIZE)) == described(prompts[:SIZE])
    assert described(take(stream(seed=1), SIZE)) != described(prompts[:SIZE])


@pytest.mark.parametrize("taken", [0, 3, SIZE - 1, SIZE, SIZE + 1, 2 * SIZE + 2])
@pytest.mark.parametrize("records", [None, SOME_LONG])
def test_resumes_exactly_over_the_epoch_boundary(stream, taken, records):
    whole, resumed = stream(records), stream(records)
    take(whole, taken)
    state = json.loads(json.dumps(whole.state()))
    resumed.restore(state)
    assert resumed.state() == state
    assert resumed.dropped == whole.dropped
    assert whole.dropped > 0 or records is None or taken <= 3
    assert described(take(resumed, 2 * SIZE)) == described(take(whole, 2 * SIZE))


@pytest.mark.parametrize(
    "other", [{"seed": 1}, {"records": source(SIZE + 1)}, {"records": source(first=30)}]
)
def test_rejects_a_state_of_other_data(stream, other):
    with pytest.raises(UserError, match=r"data\.\*"):
        stream(**other).restore(stream().state())


def test_random_access_by_stream_index(stream):
    prompts = take(stream(), 2 * SIZE + 3)
    other = stream()
    take(other, 4)
    for index in (16, 0, 7, 6):
        assert described([other.at(index)]) == described([prompts[index]])
    assert next(other).stream_index == 4  # the stream has not advanced


# Hosts


@pytest.mark.parametrize("hosts", [2, 3, 7, 10])
def test_hosts_share_the_stream(stream, hosts):
    whole = described(take(stream(), 3 * SIZE * hosts))
    shared = [described(take(stream(host=h, hosts=hosts), 3 * SIZE)) for h in range(hosts)]
    assert [p for round in zip(*shared, strict=True) for p in round] == whole


def test_resumes_on_another_number_of_hosts(stream):
    whole = described(take(stream(), 40))
    three = [stream(host=host, hosts=3) for host in range(3)]
    for part in three:
        take(part, 4)
    state, *others = [json.loads(json.dumps(part.state())) for part in three]
    assert others == [state, state]
    again = stream(host=1, hosts=3)
    again.restore(state)
    assert described(take(again, 3)) == [whole[13], whole[16], whole[19]]
    for hosts, first in ((1, 12), (2, 12), (4, 12), (5, 10)):  # 5: indices 10 and 11 repeat
        parts = [stream(host=h, hosts=hosts) for h in range(hosts)]
        for part in parts:
            part.restore(state)
        rounds = [described([next(part) for part in parts]) for _ in range(2)]
        assert rounds[0] + rounds[1] == whole[first : first + 2 * hosts]


@pytest.mark.parametrize(("host", "hosts"), [(2, 2), (-1, 2), (0, 0)])
def test_rejects_an_unknown_host(stream, host, hosts):
    with pytest.raises(ValueError, match=f"host {host}"):
        stream(host=host, hosts=hosts)


def test_the_instruction_follows_the_last_message_in_the_tokens_alone(template, tokenizer):
    record = Record("a", (*user("1+1="), *user("2+2=")), "4", "chain_sum", {})
    made = [template(instruction=i, max_prompt_tokens=11) for i in ("", "7", "77")]
    *prompts, long = [each.prompt(record, 0) for each in made]
    assert [tokenizer.decode(p.tokens) for p in prompts] == ["1+1=2+2=", "1+1=2+2=\n\n7"]
    assert [p.text for p in prompts] == ["2+2="] * 2
    assert long is None
    assert record.messages[1]["content"] == "2+2="  # the record is unchanged


# Unusable records

GEMMA = (
    "{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}{{ message['content'] }}{% endfor %}"
)
CHATML = (
    "{% for message in messages %}{% if message['role'] in ('user', 'assistant') %}"
    "{{ message['content'] }}{% endif %}{% endfor %}"
)


def conversation(roles, number, more=""):
    messages = tuple({"role": role, "content": f"{number}+1={more}"} for role in roles.split())
    return Record(f"{roles} {number}{more}", messages, str(number + 1), "chain_sum", {})


@pytest.fixture
def templated(template, tokenizer):
    """A prompt template with another chat template."""

    def make(chat_template, **changes):
        other = copy.copy(tokenizer)
        other.chat_template = chat_template
        return dataclasses.replace(template(max_prompt_tokens=20), tokenizer=other, **changes)

    return make


@pytest.mark.parametrize(
    ("chat_template", "roles", "more"),
    [
        *(
            (GEMMA, roles, "")
            for roles in ("system user", "user user", "assistant", "user assistant user user")
        ),
        *((CHATML, roles, "") for roles in ("human", "user tool", "user User")),
        ("{{ strftime_now('%f') }}" + CHATML, "user tool", ""),  # another text at each moment
        (CONTENTS_ONLY, "user", "é"),  # not of the tokenizer
        ("{% if messages[0]['content'] < '20' %}" + CONTENTS_ONLY + "{% endif %}", "user", ""),
    ],
)
def test_records_that_the_chat_template_refuses_are_dropped_and_counted(
    templated, chat_template, roles, more, caplog
):
    good = [conversation("user", n) for n in (10, 11, 12)]
    if chat_template == GEMMA:
        good += [conversation("user assistant user", n) for n in (13, 14, 15)]
    bad = [conversation(roles, n, more) for n in (20, 21)]
    with caplog.at_level(logging.WARNING):
        made = all_prompts([*bad, *good], templated(chat_template))
    assert [prompt.id for prompt in made] == [record.id for record in good]
    assert len(caplog.records) == 1
    mixed = PromptStream([*good, *bad], templated(chat_template), seed=0, host=0, hosts=1)
    assert {prompt.id for prompt in take(mixed, 2 * len(good))} == {r.id for r in good}
    assert mixed.dropped in (2, 3, 4)  # in one epoch and what it has seen of the next
    assert len(caplog.records) == 2  # once for each reason and stream
    for use in (
        lambda: next(PromptStream(bad, templated(chat_template), seed=0, host=0, hosts=1)),
        lambda: PromptStream(bad, templated(chat_template), seed=0, host=0, hosts=1).at(0),
        lambda: all_prompts(bad, templated(chat_template)),
    ):
        with pytest.raises(UserError):
            use()


def test_the_chat_template_prints_the_time_of_the_run(templated, tokenizer):
    dated = "{{ strftime_now('%Y-%m-%d') }}" + CONTENTS_ONLY
    prompt = templated(dated, now=datetime.datetime(2024, 7, 26)).prompt(source()[0], 0)
    assert tokenizer.decode(prompt.tokens) == "2024-07-2610+1="


def test_long_prompts_are_skipped_counted_and_logged_once(stream, caplog):
    with caplog.at_level(logging.WARNING):
        short = stream(SOME_LONG)
        prompts = take(short, 9)
    for epoch in range(3):
        ids = [p.id for p in prompts[3 * epoch : 3 * epoch + 3]]
        assert sorted(ids) == ["id97", "id98", "id99"]
    everything = take(stream(SOME_LONG, max_prompt_tokens=6), prompts[-1].stream_index + 1)
    fitting = [p for p in everything if len(p.tokens) == 5]
    assert described(prompts) == described(fitting)  # with the indices of the whole stream
    assert short.dropped == len(everything) - 9 > 0
    assert len(caplog.records) == 1


def test_rejects_a_source_without_usable_prompts(stream, template):
    for setting, use in (
        ("max_prompt_tokens", lambda: stream(max_prompt_tokens=4).at(3)),
        ("max_prompt_tokens", lambda: next(stream(max_prompt_tokens=4))),
        ("max_prompt_tokens", lambda: all_prompts(source(), template(max_prompt_tokens=4))),
        ("task", lambda: all_prompts(source(), template(task="number_sorting"))),
        ("train_size", lambda: stream(records=[])),
    ):
        with pytest.raises(UserError, match=rf"data\.{setting}"):
            use()


def test_all_prompts_are_in_order_without_long_ones(template, caplog):
    whole = all_prompts(source(), template())
    assert [(p.id, p.stream_index) for p in whole] == [(f"id{10 + i}", i) for i in range(SIZE)]
    with caplog.at_level(logging.WARNING):
        prompts = all_prompts(SOME_LONG, template())
    assert [(p.id, p.stream_index) for p in prompts] == [("id97", 0), ("id98", 1), ("id99", 2)]
    assert len(caplog.records) == 1


def test_response_text_has_no_special_tokens(tokenizer):
    tokens = np.array([*tokenizer.encode("12,3"), tokenizer.eos_token_id], np.int32)
    assert response_text(tokenizer, tokens) == "12,3"
    assert response_text(tokenizer, tokens[-1:]) == ""
