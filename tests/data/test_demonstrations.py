"""Demonstrations for the warm-up, from the solutions of tasks and releases."""

import itertools

import numpy as np
import pytest

from oapl_jax.data.prompts import PromptTemplate
from oapl_jax.data.public.programs import first_solution
from oapl_jax.data.records import Record, user
from oapl_jax.data.synthetic.demonstrations import demonstrations, solution
from oapl_jax.errors import UserError
from oapl_jax.model.tokenizer import make_character_tokenizer

CHARACTERS = "".join(map(chr, range(32, 127))) + "\n"
MATHS = [Record(str(i), user(f"{i}+{i}?"), str(2 * i), "math", {}) for i in range(10, 18)]
PROGRAM = "```python\nprint(1)\n```"


@pytest.fixture(scope="module")
def demonstrated(tmp_path_factory):
    """Pairs of question and demonstration of one epoch."""
    tokenizer = make_character_tokenizer(CHARACTERS, tmp_path_factory.mktemp("tokenizer"))

    def demonstrated(source, task, *, count, **changes):
        template = PromptTemplate(tokenizer, task=task, max_prompt_tokens=60, instruction="")
        settings = dict(noise=0.0, seed=0, max_response_tokens=60) | changes
        stream = demonstrations(source, template, count=count, **settings)
        groups = list(itertools.islice(stream, max(count, 1)))
        assert all(g.reward.tolist() == [1] and len(g.rollouts) == 1 for g in groups)
        return [(g.prompt.text, tokenizer.decode(g.rollouts[0].tokens)) for g in groups]

    return demonstrated


def test_a_final_answer_is_boxed(demonstrated):
    found = dict(demonstrated(MATHS, "math", count=8))
    assert found == {f"{i}+{i}?": rf"\boxed{{{2 * i}}}<eos>" for i in range(10, 18)}


@pytest.mark.parametrize(
    ("answer", "metadata", "expected"),
    [
        ("4", {}, "4"),
        ("4", {"solution": "2+2=4"}, "2+2=4"),
        ("", {"solution": ""}, ""),
        ("4", {"solution": ["2+2=4"]}, ""),
    ],
)
def test_a_question_of_one_s_own_is_solved_by_its_column_or_answer(answer, metadata, expected):
    assert solution(Record("a", user("2+2?"), answer, "function", metadata)) == expected


def test_noise_gives_the_solution_of_another_problem(demonstrated):
    right = dict(demonstrated(MATHS, "math", count=8))
    wrong = sum(
        right[question] != answer
        for seed in range(50)
        for question, answer in demonstrated(MATHS, "math", count=8, noise=0.5, seed=seed)
    )
    # Of eight problems one is the right one by chance.
    assert wrong / 400 == pytest.approx(0.5 * 7 / 8, abs=0.08)
    assert {a for _, a in demonstrated(MATHS, "math", count=8, noise=1.0)} <= set(right.values())


def test_skips_what_has_no_solution_or_does_not_fit(demonstrated):
    solved = Record("a", user("A"), "", "code", {"solution": PROGRAM})
    unsolved = [Record(str(i), user(f"B{i}"), "", "code", {}) for i in range(3)]
    assert demonstrated([*unsolved, solved], "code", count=1) == [("A", f"{PROGRAM}<eos>")]
    with pytest.raises(UserError, match=r"warmup\.demonstrations=2"):
        demonstrated([*unsolved, solved], "code", count=2)
    with pytest.raises(UserError, match=r"warmup\.demonstrations"):
        demonstrated(unsolved, "code", count=0)
    assert demonstrated([*unsolved, solved], "code", count=0) == [("A", f"{PROGRAM}<eos>")]
    long = Record("long", user("?" * 61), "1", "math", {})
    assert [q for q, _ in demonstrated([long, MATHS[0]], "math", count=1)] == ["10+10?"]
    with pytest.raises(UserError, match=r"max_response_tokens=10"):
        demonstrated(MATHS, "math", count=8, max_response_tokens=10)


def test_the_solution_of_a_synthetic_task_is_always_correct():
    record = Record("a", user("4+3-2="), "5", "chain_sum", {"terms": ["4", "+", "3", "-", "2"]})
    assert {solution(record) for _ in range(3)} == {"07,05"}


@pytest.mark.parametrize(
    ("cell", "expected"),
    [
        ([PROGRAM, "other"], PROGRAM),
        (["print(1)\n"], PROGRAM),
        ('["print(1)"]', PROGRAM),
        (np.array(["print(1)"]).tolist(), PROGRAM),
        *((cell, "") for cell in ([], ["  "], [3], None, "no list", {"a": 1})),
    ],
)
def test_the_first_solution_of_a_release(cell, expected):
    assert first_solution(cell) == expected
