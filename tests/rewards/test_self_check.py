"""The reward self-check, with real verifiers: it passes what is sound and refuses what is not."""

import copy
import json
import re
from contextlib import closing
from dataclasses import replace
from types import SimpleNamespace

import pytest
from processes import REWARDS

from oapl_jax.data.prompts import PromptTemplate
from oapl_jax.data.records import Record, user
from oapl_jax.errors import UserError
from oapl_jax.model.tokenizer import CONTENTS_ONLY, make_character_tokenizer
from oapl_jax.rewards.grader import Grader, check_rewards

CHARACTERS = "".join(map(chr, range(32, 127))) + "\n"
THINKING = CONTENTS_ONLY + "{% if add_generation_prompt %}<think>\n{% endif %}"
TESTS = json.dumps({"kind": "stdin", "name": "", "tests": [["1\n", "2\n"]]})
RECORDS = {
    "math": [Record("a", user("1+1?"), "2", "math", {}), Record("b", user("x"), "x^2", "math", {})],
    "code": [Record("c", user("Add one."), TESTS, "code", {})],
    "chain_sum": [Record("d", user("4+3="), "7", "chain_sum", {"terms": ["4", "+", "3"]})],
    "number_sorting": [
        Record("e", user("3,1<"), "1,3", "number_sorting", {"numbers": [3, 1], "direction": "asc"})
    ],
    "countdown": [Record("f", user("3,4:7="), "3 4 -> 7", "countdown", {"expression": "3+4"})],
}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return make_character_tokenizer(CHARACTERS, tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def graders(tokenizer):
    """By whether prompts are said to open the thinking part."""
    opened = {
        task: replace(getattr(REWARDS, task), thinking_opened=True) for task in ("math", "code")
    }
    with (
        closing(Grader(tokenizer, REWARDS)) as closed,
        closing(Grader(tokenizer, replace(REWARDS, **opened))) as thinking,
    ):
        yield {False: closed, True: thinking}


def check(grader, tokenizer, task, records=None):
    template = PromptTemplate(tokenizer, task=task, max_prompt_tokens=99, instruction="Think.")
    check_rewards(grader, template, records or RECORDS[task])


@pytest.mark.parametrize("task", RECORDS)
def test_sound_rewards_pass(graders, tokenizer, task):
    check(graders[False], tokenizer, task)


@pytest.mark.parametrize("task", ["math", "code"])
def test_the_chat_template_may_open_the_thinking_part(graders, tokenizer, task):
    thinking = copy.copy(tokenizer)
    thinking.chat_template = THINKING
    check(graders[True], thinking, task)
    with pytest.raises(UserError, match=r"rewards\..*\.thinking_opened"):
        check(graders[False], thinking, task)
    with pytest.raises(UserError, match=r"rewards\..*\.thinking_opened"):
        check(graders[True], tokenizer, task)


@pytest.mark.parametrize(
    ("task", "reward", "response", "kind"),
    [
        ("math", lambda text, reason: 0.0, r"\\frac{1}{2}}", "right"),
        ("code", lambda text, reason: 0.0, "print(a + b)", "right"),
        ("chain_sum", lambda text, reason: 0.0, "'07'", "right"),
        ("math", lambda text, reason: 1.0, r"boxed{2}", "wrong"),
        ("chain_sum", lambda text, reason: 1.0, "'071'", "wrong"),
        ("math", lambda text, reason: float("1}{2" in text or "0.5" in text), "", "right but"),
        ("chain_sum", lambda text, reason: float(text == "07"), "'07'", "right but cut off"),
        ("countdown", lambda text, reason: float(reason == "stop" and text != "3+41"), "''", "w"),
    ],
)
def test_a_reward_that_errs_is_refused(tokenizer, task, reward, response, kind):
    def grade(prompt, rollout):
        text = tokenizer.decode(rollout.tokens, skip_special_tokens=True)
        return reward(text, rollout.finish_reason)

    with pytest.raises(UserError, match=f"{re.escape(response)}.* {kind}"):
        check(SimpleNamespace(reward=grade, function=None), tokenizer, task)


def test_the_data_are_checked_too(graders, tokenizer):
    """A reference that no response can meet."""
    long = Record("g", user("How long?"), "9" * 2000, "math", {})
    with pytest.raises(UserError, match=r"How long\?"):
        check(graders[False], tokenizer, "math", [*RECORDS["math"][:1], long])
    check(graders[False], tokenizer, "math", [*RECORDS["math"], long])  # not among the first


def test_data_without_a_usable_record_are_refused(graders, tokenizer):
    with pytest.raises(UserError, match=r"data\.max_prompt_tokens"):
        check(graders[False], tokenizer, "math", [Record("g", user("?" * 99), "1", "math", {})])


def test_a_tokenizer_that_loses_line_breaks_of_a_program_is_refused(graders, tokenizer):
    """The whole path: graded are decoded token ids."""
    deaf = copy.copy(tokenizer)
    deaf.encode = lambda text, **how: tokenizer.encode(text.replace("\n", " "), **how)
    with pytest.raises(UserError, match="print"):
        check(graders[False], deaf, "code")
