"""Rubrics, functions of one's own, and what becomes of their preferences."""

import numpy as np
import pytest
from asking import PROMPT, responses

from configs import arithmetic
from oapl_jax.errors import RunError, UserError
from oapl_jax.preferences import Preferences
from oapl_jax.preferences.judge import Callback
from oapl_jax.preferences.rubric import Rubric
from oapl_jax.structs import Rollout

NAN = float("nan")


def test_a_vote_of_rules_is_cyclic_though_none_of_them_is():
    """Short, then varied, then rising: each of the three beats the next by two votes of three."""
    rules = arithmetic.get_config("objective=prosper").preferences.rubric.objectives.manner
    judge = Rubric(objectives={"manner": rules.to_dict()})
    three = responses("01", "3210", "01201")
    (found,) = judge.compare(PROMPT, three, three)
    np.testing.assert_allclose(found, np.array([[3, 4, 2], [2, 3, 4], [4, 2, 3]]) / 6)
    for rule in rules:
        (alone,) = Rubric(objectives={"one": {rule: 1.0}}).compare(PROMPT, three, three)
        order = np.argsort(-alone.sum(1))
        np.testing.assert_array_equal(alone[order][:, order][np.triu_indices(3, 1)], 1)


def test_a_rubric_counts_weights_asks_the_verifier_and_halves_ties():
    judge = Rubric(objectives={"right": {"right": 2.0}, "both": {"right": 3.0, "long": 1.0}})
    mine, theirs = responses("3", "12", right=("3",)), responses("33", "4", "12", right=("33",))
    found = judge.compare(PROMPT, mine, theirs)
    assert judge.objectives == ("right", "both")
    np.testing.assert_allclose(found[0], [[0.5, 1, 1], [0, 0.5, 0.5]])
    np.testing.assert_allclose(found[1], [[0.375, 0.875, 0.75], [0.125, 0.625, 0.5]])


@pytest.mark.parametrize(
    ("objectives", "named"),
    [
        ({}, "is empty"),
        ({"manner": {"shrot": 1.0}}, "'shrot'"),
        ({"manner": {"short": 0.0}}, "objectives.manner"),
        ({"manner": {"short": 2.0, "long": -1.0}}, "objectives.manner"),
    ],
)
def test_a_rubric_that_can_not_vote_is_refused(objectives, named):
    with pytest.raises(UserError, match=named):
        Rubric(objectives=objectives)


def longer(prompt, mine, theirs):
    """The longer one wins; of two texts with an "x" nothing is known."""
    won = [[(np.sign(len(a.text) - len(b.text)) + 1) / 2 for b in theirs] for a in mine]
    missing = [["x" in a.text and "x" in b.text for b in theirs] for a in mine]
    return np.where(missing, NAN, won)[None]


def too_sure(prompt, mine, theirs):
    return longer(prompt, mine, theirs) + 1


def transposed(prompt, mine, theirs):
    return longer(prompt, mine, theirs).swapaxes(1, 2)


def rollout(text, finish_reason="stop"):
    tokens = np.frombuffer(text.encode(), np.uint8).astype(np.int32)
    return Rollout(tokens, np.zeros(len(tokens), np.float32), 0, finish_reason)


def rewards_by(function, comparators, beta=1e9):
    return Preferences(
        Callback(function=f"{__name__}:{function}", objectives=("length",)),
        lambda prompt: comparators,
        beta=beta,
        text=lambda rollout: bytes(rollout.tokens.tolist()).decode(),
        verify=lambda prompt, rollout: 1.0,
    )


def test_a_function_of_ones_own_rewards_a_group():
    preferences = rewards_by("longer", [rollout("ab"), rollout("abcd", "length"), rollout("abx")])
    group = [rollout("a"), rollout("ab"), rollout("abcx"), rollout("abcdefg", "length")]
    # Against "ab", the one that was cut off, and "abx"; two x are not compared.
    expected = [(0 + 1 + 0) / 3, (0.5 + 1 + 0) / 3, (1 + 1) / 2, (0 + 0.5 + 0) / 3]
    found = preferences.reward(PROMPT, group)
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    assert found.dtype == np.float32
    metrics = preferences.metrics()
    assert metrics["preferences/comparisons"] == 12
    assert metrics["preferences/missing"] == 1
    assert metrics["preferences/worst/length"] == 1
    np.testing.assert_allclose(metrics["preferences/value"], (1.5 / 4 + 3.5 / 4 + 0) / 3)
    assert metrics["preferences/value"] == metrics["preferences/value/length"]
    assert set(preferences.metrics()) == {f"preferences/{n}" for n in preferences._counts}
    preferences.reward(PROMPT, [rollout("x"), rollout("xy")])
    assert preferences.metrics()["preferences/comparisons"] == 18


def test_a_group_without_any_score_has_no_advantage_and_is_counted():
    preferences = rewards_by("longer", [rollout("x"), rollout("xx")])
    np.testing.assert_array_equal(preferences.reward(PROMPT, [rollout("xyz")] * 3), 0.5)
    metrics = preferences.metrics()
    assert metrics["preferences/unscored"] == 1
    assert metrics["preferences/missing"] == metrics["preferences/comparisons"] == 6
    assert "preferences/value" not in metrics


def test_responses_that_were_all_cut_off_ask_no_judge():
    preferences = rewards_by("too_sure", [rollout("ab"), rollout("abc", "length")])
    cut = [rollout("abc", "length")] * 2
    np.testing.assert_allclose(preferences.reward(PROMPT, cut), 0.25)


@pytest.mark.parametrize(
    ("function", "named"), [("too_sure", "within 0 and 1"), ("transposed", r"\(1, 3, 2\)")]
)
def test_a_judge_that_answers_something_else_ends_the_run(function, named):
    preferences = rewards_by(function, [rollout("a"), rollout("b"), rollout("c")])
    with pytest.raises(RunError, match=named):
        preferences.reward(PROMPT, [rollout("a"), rollout("bb")])


@pytest.mark.parametrize("function", ["", "no_colon", "json:no_such", "no.such.module:f"])
def test_a_function_that_is_not_there_is_refused(function):
    with pytest.raises(UserError, match=r"preferences\.callable\.function"):
        Callback(function=function, objectives=("length",))
    with pytest.raises(UserError, match=r"preferences\.callable\.objectives"):
        Callback(function=f"{__name__}:longer", objectives=())
