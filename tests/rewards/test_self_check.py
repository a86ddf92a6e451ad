"""The reward self-check, with real verifiers: it passes what is sound and refuses what is not."""

import copy
import json
from types import SimpleNamespace

import pytest

from configs import common
from oapl_jax.data.records import Record, user
from oapl_jax.errors import UserError
from oapl_jax.model.tokenizer import CONTENTS_ONLY, make_character_tokenizer
from oapl_jax.rewards import Grader
from oapl_jax.rewards.self_check import check_rewards

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
    "countdown": [
        Record("f", user("3,4:7="), "3 4 -> 7", "countdown", {"expression": "3+4"}),
    ],
}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return make_character_tokenizer(CHARACTERS, tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def graders(tokenizer):
    """By whether prompts are said to open the thinking part."""
    made = {}
    for opened in (False, True):
        settings = common.rewards()
        settings.math.thinking_opened = settings.code.thinking_opened = opened
        made[opened] = Grader(tokenizer, **settings)
    yield made
    for grader in made.values():
        grader.close()


def check(grader, tokenizer, task, records=None):
    records = RECORDS[task] if records is None else records
    check_rewards(grader, tokenizer, records, task=task, max_prompt_tokens=99, instruction="Think.")


def thinking(tokenizer):
    changed = copy.copy(tokenizer)
    changed.chat_template = THINKING
    return changed


@pytest.mark.parametrize("task", RECORDS)
def test_sound_rewards_pass(graders, tokenizer, task):
    check(graders[False], tokenizer, task)


@pytest.mark.parametrize("task", ["math", "code"])
def test_the_chat_template_may_open_the_thinking_part(graders, tokenizer, task):
    check(graders[True], thinking(tokenizer), task)
    with pytest.raises(UserError, match=r"is right but still a thought and was paid; .* inside a"):
        check(graders[False], thinking(tokenizer), task)
    with pytest.raises(UserError, match=r"is right and was not paid; .* outside a thinking part"):
        check(graders[True], tokenizer, task)


@pytest.mark.parametrize(
    ("task", "reward", "words"),
    [
        ("math", lambda text, reason: 0.0, r"frac\{1\}\{2\}\}' is right and was not paid"),
        ("code", lambda text, reason: 0.0, r"print\(a \+ b\)\\n```' is right and was not paid"),
        ("chain_sum", lambda text, reason: 0.0, "to '4.3=' the response '07' is right"),
        ("math", lambda text, reason: 1.0, r"boxed\{2\}' is wrong and was paid"),
        ("chain_sum", lambda text, reason: 1.0, "the response '071' is wrong and was paid"),
        (
            "math",
            lambda text, reason: float("1}{2" in text or "0.5" in text),
            "still a thought|cut",
        ),
        ("chain_sum", lambda text, reason: float(text == "07"), "is right but cut off and was"),
        ("countdown", lambda text, reason: float(reason == "stop" and text != "3+41"), "'' is wr"),
    ],
)
def test_a_reward_that_errs_is_refused(tokenizer, task, reward, words):
    def grade(prompt, rollout):
        text = tokenizer.decode(rollout.tokens, skip_special_tokens=True)
        return reward(text, rollout.finish_reason)

    with pytest.raises(UserError, match=words):
        check(SimpleNamespace(reward=grade), tokenizer, task)


def test_the_data_are_checked_too(graders, tokenizer):
    """A reference that no response can meet."""
    long = Record("g", user("How long?"), "9" * 2000, "math", {})
    with pytest.raises(UserError, match=r"to 'How long\?' the response '.*9' is right and was not"):
        check(graders[False], tokenizer, "math", [*RECORDS["math"][:1], long])
    check(graders[False], tokenizer, "math", [*RECORDS["math"], long])  # not among the first


def test_a_tokenizer_that_loses_what_a_program_needs_is_refused(graders, tokenizer):
    """The whole path: what is graded is decoded token ids."""
    deaf = copy.copy(tokenizer)
    deaf.encode = lambda text, **how: tokenizer.encode(text.replace("\n", " "), **how)
    with pytest.raises(UserError, match="is right and was not paid"):
        check(graders[False], deaf, "code")
