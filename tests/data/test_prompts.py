"""The prompt stream: permutations, exact resumption, and prompts that do not fit."""

import json

import numpy as np
import pytest

from oapl_jax.data.prompts import Prompts, all_prompts, response_text
from oapl_jax.data.tasks import Record
from oapl_jax.errors import UserError
from oapl_jax.tokenizer import make_character_tokenizer

SIZE = 7


def source(size: int = SIZE, first: int = 10) -> list[Record]:
    return [
        Record(f"id{i}", f"{i}+1=", str(i + 1), "chain_sum", {}) for i in range(first, first + size)
    ]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return make_character_tokenizer("0123456789+-=,", tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
def stream(tokenizer):
    def make(records=None, seed=0, max_prompt_tokens=5):
        return Prompts(
            source() if records is None else records,
            tokenizer,
            task="chain_sum",
            seed=seed,
            max_prompt_tokens=max_prompt_tokens,
        )

    return make


def take(stream, n):
    return [next(stream) for _ in range(n)]


def described(prompts):
    return [(p.id, p.draw, p.tokens.tolist(), p.text, p.answer, p.task) for p in prompts]


def test_a_prompt_is_the_templated_question(stream, tokenizer):
    prompt = next(stream())
    assert prompt.tokens.dtype == np.int32
    assert tokenizer.decode(prompt.tokens) == prompt.text
    assert prompt.answer == str(int(prompt.text[:2]) + 1)
    assert (prompt.draw, prompt.task, prompt.id) == (0, "chain_sum", f"id{prompt.text[:2]}")


def test_each_epoch_is_another_permutation(stream):
    prompts = take(stream(), 3 * SIZE)
    assert [p.draw for p in prompts] == list(range(3 * SIZE))
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


def test_a_long_prompt_raises_with_its_name(stream):
    take(stream(max_prompt_tokens=5), SIZE)
    with pytest.raises(
        UserError, match=r"prompt id1\d has 5 tokens.*data\.max_prompt_tokens \(4\)"
    ):
        next(stream(max_prompt_tokens=4))


def test_an_error_does_not_skip_the_prompt(stream):
    short = stream(max_prompt_tokens=4)
    for _ in range(2):
        with pytest.raises(UserError, match=r"id1\d has 5 tokens"):
            next(short)
    assert short.state()["draw"] == 0


def test_another_task_and_an_empty_source_are_refused(stream, tokenizer):
    with pytest.raises(UserError, match=r"data\.task is number_sorting"):
        all_prompts(source(), tokenizer, task="number_sorting", max_prompt_tokens=5, limit=None)
    with pytest.raises(UserError, match="empty"):
        stream(records=[])


def test_all_prompts_are_in_order(tokenizer):
    def chosen(limit):
        return all_prompts(source(), tokenizer, task="chain_sum", max_prompt_tokens=5, limit=limit)

    assert [p.id for p in chosen(None)] == [r.id for r in source()]
    assert [p.draw for p in chosen(None)] == list(range(SIZE))
    assert described(chosen(3)) == described(chosen(None)[:3])
    for limit in (0, SIZE + 1):
        with pytest.raises(UserError, match=f"{limit} prompts"):
            chosen(limit)


def test_response_text_has_no_special_tokens(tokenizer):
    tokens = np.array([*tokenizer.encode("12,3"), tokenizer.eos_token_id], np.int32)
    assert response_text(tokenizer, tokens) == "12,3"
    assert response_text(tokenizer, tokens[-1:]) == ""
