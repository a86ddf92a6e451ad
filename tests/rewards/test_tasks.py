"""Verifiers on right, wrong and hostile responses."""

import ast
import builtins
import time

import pytest

from oapl_jax.config import WORD_TASKS
from oapl_jax.rewards.tasks import MAX_CHARACTERS, MAX_EXPRESSION, VERIFIERS

COUNTDOWN = "3 4 5 -> 17"
ANSWERS = {"chain_sum": "-5", "number_sorting": "-1,2,2,10", "countdown": COUNTDOWN}
ANSWERS |= dict.fromkeys(WORD_TASKS, "Ada-May")


RIGHT = {
    "chain_sum": ("-5", "7,-5", "7,99, -5", "nonsense,-5", "-5,", "4 - 9 = -5."),
    "number_sorting": ("-1,2,2,10", "-1, 2, 2, 10"),
    "countdown": ("3*4+5", " 5 + (4 * 3) ", "-(-5-4*3)"),
    **dict.fromkeys(
        WORD_TASKS, ("Ada-May", " ada-may.\n", "**Ada-May** likes tea", "Ada-May, not Bo")
    ),
}
WRONG = {
    "chain_sum": (
        *("", "5", "-5,7"),
        "7-5",  # an operator, not a sign
        "-5.0",  # ends in another integer
        "-\u0665",  # an Arabic five, which int() would take
    ),
    "number_sorting": (*("", "-1,2,10", "10,2,2,-1", "-1,2,2,10,11", "-1,2,2,10,", "-1,2,2,1e1"),),
    "countdown": (
        *("", "17", "3+4+5", "3*4+5+0", "3*4+5+5-5", "12+5", "3*4+5=17", "3*4+05"),
        *("3 4 5", "3(4)(5)", "3*4+5)", "5/(4-4)+3"),
    ),
    **dict.fromkeys(
        WORD_TASKS, ("", "Ada", "May", "Ada May", "Ada-Mays", "Bo, Ada-May", "It is Ada-May")
    ),
}


@pytest.mark.parametrize("task", VERIFIERS)
def test_right_and_wrong(task):
    reward = lambda responses: {r: VERIFIERS[task](r, ANSWERS[task]) for r in responses}
    assert reward(RIGHT[task]) == dict.fromkeys(RIGHT[task], 1.0)
    assert reward(WRONG[task]) == dict.fromkeys(WRONG[task], 0.0)


@pytest.mark.parametrize(
    ("response", "answer", "reward"),
    [
        ("8/(3-8/3)", "3 3 8 8 -> 24", 1.0),  # right only in exact arithmetic
        ("1/3*3", "1 3 3 -> 1", 1.0),
        ("7/2", "2 7 -> 3", 0.0),
        ("7//2", "2 7 -> 3", 0.0),
        ("2**3", "2 3 -> 8", 0.0),
        ("1/(2-2)", "1 2 2 -> 1", 0.0),
        ("2-9", "2 9 -> -7", 1.0),
    ],
)
def test_countdown_arithmetic(response, answer, reward):
    assert VERIFIERS["countdown"](response, answer) == reward


HOSTILE = {
    "power": "9**9**9",
    "power of the given numbers": "3**4**5",
    "import": "__import__('os').system('touch /tmp/owned')",
    "lambda": "(lambda: 3*4+5)()",
    "attribute": "(3*4+5).__class__",
    "huge": "9" * 1_000_000,
    "huge sum": "3*4+5+" * 200_000,
    "huge list": "1," * 500_000,
    "parentheses": "(" * 250 + "3*4+5" + ")" * 250,
    "open parentheses": "(" * MAX_EXPRESSION,
    "negations": "-" * (MAX_EXPRESSION - 5) + "3*4+5",
    "negations of a list's length": "-" * MAX_CHARACTERS,
    "digits beyond int()": "1" * 4090,
    "null": "3*4+5\0",
    "newlines inside": "3*4\n+5",
    "surrogate": "\ud800",
    "comment": "3*4+5 # 17",
    "walrus": "(x:=17)",
    "string": "'17'",
    "condition": "17 if 3*4*5 else 0",
    "underscores": "1_7",
    "complex": "3*4+5j",
}


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize("task", VERIFIERS)
def test_hostile_text_is_worth_nothing_quickly(task, name):
    start = time.perf_counter()
    assert VERIFIERS[task](HOSTILE[name], ANSWERS[task]) == 0.0
    assert time.perf_counter() - start < 0.2


def test_the_depth_bound_and_not_the_parser_stops_deep_nesting():
    assert VERIFIERS["countdown"]("-" * 60 + "(3*4+5)", COUNTDOWN) == 1.0
    assert VERIFIERS["countdown"]("-" * 70 + "(3*4+5)", COUNTDOWN) == 0.0


def test_no_response_reaches_eval_exec_or_compile(monkeypatch):
    called = []

    def forbidden(*words, **__):
        called.append(words)
        raise AssertionError("model text was executed")

    parse = ast.parse("3*4+5", mode="eval")
    monkeypatch.setattr(ast, "parse", lambda *_, **__: parse)  # ast.parse itself calls compile
    for name in ("eval", "exec", "compile", "__import__"):
        monkeypatch.setattr(builtins, name, forbidden)
    for task, verify in VERIFIERS.items():
        for response in HOSTILE.values():
            verify(response, ANSWERS[task])
    monkeypatch.undo()
    assert called == []  # a verifier may have caught what was raised
