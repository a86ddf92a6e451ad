"""Rewards by a user's Python function: in this process, and in the pool."""

import importlib
import itertools
import logging
import os
import sys
import threading
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from processes import REWARDS, alive, wait_until

from oapl_jax.data.prompts import PromptTemplate
from oapl_jax.data.records import Record, user
from oapl_jax.errors import UserError
from oapl_jax.model.tokenizer import make_character_tokenizer
from oapl_jax.rewards.function.verifier import FunctionVerifier, find_function
from oapl_jax.rewards.grader import Grader, check_rewards
from oapl_jax.structs import Prompt, Rollout

POOL = replace(REWARDS.function_pool, processes=1, seconds=60.0)
PROMPT = Prompt(
    "id", 0, np.zeros(1, np.int32), "2+2?", "4", "function", '{"answer": 4, "level": 3}'
)
# The response is an expression, whose value is the reward.
EVAL = """
import fractions, os, sys, time
import numpy as np

def reward(record, response):
    return eval(response)
"""
CHEAP = f"{EVAL}\nreward.cheap = True\n"
names = (f"rewards_of_test_{i}" for i in itertools.count())


@pytest.fixture
def written(tmp_path, monkeypatch):
    """Writes a module into the working directory; returns its name."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path[:])

    def written(text):
        name = next(names)
        (tmp_path / f"{name}.py").write_text(text)
        importlib.invalidate_caches()
        return name

    return written


@pytest.fixture
def opened(written):
    """Opens the function `reward` of a module."""
    verifiers = []

    def opened(text, **pool):
        verifiers.append(FunctionVerifier(f"{written(text)}:reward", replace(POOL, **pool)))
        return verifiers[-1]

    yield opened
    for verifier in verifiers:
        verifier.close()


@pytest.mark.parametrize(
    ("value", "reward", "parts"),
    [
        ("1", 1.0, {}),
        ("True", 1.0, {}),
        ("-2.5", -2.5, {}),
        ("np.float32(0.5)", 0.5, {}),
        ("np.array(0.5)", 0.5, {}),
        ("fractions.Fraction(1, 4)", 0.25, {}),
        ("{'right': 1, 'short': 0.5}", 1.5, {"right": 1.0, "short": 0.5}),
        # In float64 their sum is below 1.
        ("{'a': 0.7, 'b': 0.2, 'c': 0.1}", 1.0, {"a": 0.7, "b": 0.2, "c": 0.1}),
    ],
)
def test_a_reward_is_a_number_or_the_sum_of_named_parts(opened, value, reward, parts):
    verdict = opened(CHEAP).verify(PROMPT, value)
    assert (verdict.reward, verdict.parts) == (reward, parts)
    assert verdict.outcome == ("right" if reward >= 1 else "wrong")


@pytest.mark.parametrize(
    ("value", "error"),
    [
        *((value, "TypeError") for value in ("None", "'1'", "b'1'", "[1]", "1j", "{}")),
        ("{'a': None}", "TypeError"),
        *((value, "ValueError") for value in ("float('nan')", "float('inf')", "1e300")),
        ("{'a': 3e38, 'b': 3e38}", "ValueError"),
        ("record['none']", "KeyError"),
        ("sys.exit()", "SystemExit"),
        ("1 +", "SyntaxError"),
    ],
)
def test_another_value_and_an_exception_are_errors_and_worth_nothing(opened, value, error):
    verifier = opened(CHEAP)
    verdict = verifier.verify(PROMPT, value)
    assert (verdict.outcome, verdict.reward, verdict.parts) == ("error", 0.0, {})
    counts = {"returned": 0, "timeout": 0, "error": 1, f"error/{error}": 1}
    assert verifier.counts() == counts


def test_the_record_is_the_row_beside_id_question_and_answer(opened):
    expected = {"id": "id", "question": "2+2?", "answer": 4, "level": 3}
    verifier = opened(CHEAP)
    assert verifier.verify(PROMPT, f"record == {expected}").reward == 1
    plain = replace(PROMPT, metadata="")
    expected = {"id": "id", "question": "2+2?", "answer": "4"}
    assert verifier.verify(plain, f"record == {expected}").reward == 1


def test_a_function_that_is_not_cheap_runs_in_another_process(opened):
    for text, here in ((CHEAP, True), (EVAL, False)):
        same = opened(text).verify(PROMPT, "os.getpid()").reward == os.getpid()
        assert same is here


def test_the_pool_survives_what_a_function_does(opened):
    """A late call, a dead process, an exhausted memory, and text on standard output and input."""
    verifier = opened(EVAL, seconds=2.0, memory_bytes=1 << 28)
    assert verifier.verify(PROMPT, "print('said') or 1").reward == 1
    assert verifier.verify(PROMPT, "len(sys.stdin.read())").reward == 0
    assert verifier.verify(PROMPT, "time.sleep(600)").outcome == "timeout"
    for program in ("os._exit(3)", "os.kill(os.getpid(), 9)", "bytearray(1 << 30)"):
        assert verifier.verify(PROMPT, program).outcome == "error"
        assert verifier.verify(PROMPT, "1").outcome == "right"
    assert verifier.verify(PROMPT, "{'x' * 100_000: 1}").outcome == "error"
    assert verifier.verify(PROMPT, f"len({'x' * 200_000!r})").reward == 200_000
    kinds = {"error/ProcessEnded": 2, "error/MemoryError": 1, "error/ValueError": 1}
    assert verifier.counts() == {"returned": 6, "timeout": 1, "error": 4, **kinds}


def test_calls_run_beside_each_other_and_close_ends_the_processes(opened, tmp_path):
    meet = """
import os, pathlib, time
def reward(record, response):
    pathlib.Path(response).touch()
    while len(list(pathlib.Path(".").glob("call*"))) < 2:
        time.sleep(0.01)
    return os.getpid()
"""
    verifier, found = opened(meet, processes=2), []
    threads = [
        threading.Thread(target=lambda i=i: found.append(verifier.verify(PROMPT, f"call{i}")))
        for i in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    processes = {int(verdict.reward) for verdict in found}
    assert len(processes) == 2
    verifier.close()
    wait_until(lambda: not any(map(alive, processes)))


def test_each_kind_of_error_is_shown_once_with_its_traceback(opened, caplog):
    verifier = opened(CHEAP)
    with caplog.at_level(logging.WARNING):
        for value in ("record['a']", "record['b']", "1 / 0", "1"):
            verifier.verify(PROMPT, value)
    shown = [r.getMessage() for r in caplog.records if r.name.startswith("oapl_jax")]
    hidden = [r.getMessage() for r in caplog.records if not r.name.startswith("oapl_jax")]
    assert [
        kind for text in shown for kind in ("KeyError", "ZeroDivisionError") if kind in text
    ] == [
        "KeyError",
        "ZeroDivisionError",
    ]
    assert len(shown) == len(hidden) == 2
    assert all("Traceback" in text and "in reward" in text for text in hidden)


@pytest.mark.parametrize(
    ("text", "name", "said"),
    [
        ("", "{}:reward", "reward"),
        ("def rewards(record, response): ...", "{}:reward", "rewards"),
        ("def reward(record): ...", "{}:reward", "two arguments"),
        ("reward = 3", "{}:reward", "two arguments"),
        ("import of_no_package", "{}:reward", "of_no_package"),
        ("1 / 0", "{}:reward", r"\.py:1"),
        ("raise SystemExit(2)", "{}:reward", "SystemExit"),
        ("def reward(", "{}:reward", "SyntaxError"),
        ("", "{}x:reward", "did you mean"),
        *(("", name, "my_module:reward") for name in ("{}", "{}:", ":reward", "{}.py:reward")),
    ],
)
def test_a_function_that_can_not_be_found_or_called_is_refused(written, text, name, said):
    with pytest.raises(UserError, match=said) as refused:
        find_function(name.format(written(text)))
    assert "rewards.function" in str(refused.value)


def test_an_installed_module_is_found_too():
    assert find_function("operator:contains")({"a": 1}, "a") is True


class Text:
    """A tokenizer whose ids are code points."""

    def decode(self, ids, **_):
        return "".join(map(chr, ids))


def rollout(text, finish_reason="stop"):
    tokens = np.array([ord(c) for c in text], np.int32)
    return Rollout(tokens, np.zeros(len(tokens), np.float32), 0, finish_reason)


@pytest.fixture
def graders(written):
    made = []

    def grader(text, tokenizer: Any = Text()):  # noqa: B008
        name = f"{written(text)}:reward"
        made.append(Grader(tokenizer, replace(REWARDS, function=name, function_pool=POOL)))
        return made[-1]

    yield grader
    for grader in made:
        grader.close()


def test_a_grader_asks_the_function_in_the_place_of_any_verifier(graders):
    grader = graders(CHEAP)
    for task in ("function", "chain_sum", "math", "code"):
        asked = replace(PROMPT, task=task)
        assert grader.reward(asked, rollout("len(response)")) == 13
        assert grader.reward(asked, rollout("1", "length")) == 0.0  # cut off
        assert grader.final_answer(asked, rollout(" 1\n")) == "1"
    assert grader.metrics() == {
        "rewards/function/returned": 4,
        "rewards/function/error": 0,
        "rewards/function/timeout": 0,
    }
    grade = grader.grade(PROMPT, rollout("{'a': 0.5, 'b': 1}"))
    assert (grade.reward, grade.verdict) == (1.5, "right")
    assert all(part in grade.reason for part in ("a 0.5", "b 1"))


def test_means_of_parts_are_those_since_the_last_line_and_apart_of_evaluations(graders):
    grader = graders(CHEAP)
    evaluation = grader.apart()
    for value in ("{'a': 1, 'b': 0}", "{'a': 0}", "3", "1 / 0"):
        grader.reward(PROMPT, rollout(value))
    evaluation.reward(PROMPT, rollout("{'a': 7}"))
    assert grader.part_means() == {"part/a": 0.5, "part/b": 0.0}
    assert grader.part_means() == {}
    assert evaluation.part_means() == {"part/a": 7.0}
    assert grader.metrics()["rewards/function/returned"] == 4


@pytest.mark.parametrize(
    ("body", "refused"),
    [
        ("return 0", False),
        ("return int(response)", False),  # fails for the empty response only
        ("return record['nothing']", True),
        ("return None", True),
    ],
)
def test_the_self_check_refuses_a_function_of_which_every_call_fails(
    graders, tmp_path, body, refused
):
    tokenizer = make_character_tokenizer("0123456789+?", tmp_path / "tokenizer")
    grader = graders(f"def reward(record, response): {body}\nreward.cheap = True", tokenizer)
    template = PromptTemplate(tokenizer, task="function", max_prompt_tokens=9, instruction="")
    records = [Record("a", user("2+2?"), "4", "function", {})]
    if not refused:
        check_rewards(grader, template, records)
        return
    with pytest.raises(UserError, match=r"rewards\.function"):
        check_rewards(grader, template, records)
