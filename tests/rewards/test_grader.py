"""From token ids to a reward, by the task of the prompt."""

import json
from contextlib import closing

import numpy as np
import pytest
from processes import REWARDS

from oapl_jax.config import TASKS
from oapl_jax.rewards.grader import OPENED, Grader
from oapl_jax.rewards.tasks import FINAL_ANSWERS, VERIFIERS
from oapl_jax.structs import Prompt, Rollout

PROGRAM = json.dumps({"kind": "stdin", "name": "", "tests": [["2\n", "4\n"], ["3\n", "9\n"]]})
SQUARE = "```python\nprint(int(input()) ** 2)\n```"


class Text:
    """A tokenizer whose ids are code points."""

    def decode(self, ids, **_):
        return "".join(map(chr, ids))


def rollout(text, finish_reason="stop"):
    tokens = np.array([ord(c) for c in text], np.int32)
    return Rollout(tokens, np.zeros(len(tokens), np.float32), 0, finish_reason)


def prompt(task, answer):
    return Prompt("id", 0, np.zeros(1, np.int32), "", answer, task)


@pytest.fixture(scope="module")
def grader():
    with closing(Grader(Text(), REWARDS)) as made:
        yield made


@pytest.mark.parametrize(
    ("task", "answer", "text", "reward", "final"),
    [
        ("chain_sum", "7", "3,7", 1.0, "7"),
        ("chain_sum", "7", "7,3", 0.0, "3"),
        ("math", r"\frac{1}{2}", r"so \boxed{0.5}", 1.0, "1/2"),
        ("math", r"\frac{1}{2}", r"so \boxed{2}", 0.0, "2"),
        ("code", PROGRAM, SQUARE, 1.0, "print(int(input()) ** 2)"),
        ("code", PROGRAM, SQUARE.replace("** 2", "* 2"), 0.0, "print(int(input()) * 2)"),
    ],
)
def test_each_task_has_its_verifier(grader, task, answer, text, reward, final):
    asked = prompt(task, answer)
    assert grader.reward(asked, rollout(text)) == reward
    assert grader.reward(asked, rollout(text, "length")) == 0.0  # cut off
    assert grader.final_answer(asked, rollout(text)).strip() == final


@pytest.mark.parametrize(
    ("text", "verdict", "named"),
    [("3,7", "right", ()), ("7,3", "wrong", ("3", "7")), ("", "wrong", "7")],
)
def test_the_reason_of_a_wrong_sum_names_both_answers(grader, text, verdict, named):
    grade = grader.grade(prompt("chain_sum", "7"), rollout(text))
    assert grade.verdict == verdict
    assert all(answer in grade.reason for answer in named)


def test_every_task_of_the_configuration_has_one_verifier():
    assert sorted(TASKS) == sorted([*VERIFIERS, *OPENED])
    assert FINAL_ANSWERS.keys() == VERIFIERS.keys()


def test_verdicts_are_counted_and_nothing_opens_before_it_is_needed():
    with closing(Grader(Text(), REWARDS)) as grader:
        grader.reward(prompt("chain_sum", "7"), rollout("7"))
        assert grader.metrics() == {}
        for said in (8, 7):
            grader.reward(prompt("math", "7"), rollout(rf"\boxed{{{said}}}"))
        assert grader.metrics() == {"rewards/math/wrong": 1, "rewards/math/right": 1}
