"""Rubric and callable judges, and the rewards made of their preferences."""

import numpy as np
import pytest
from asking import PROMPT, responses

from configs import arithmetic
from oapl_jax.config import CallableJudgeConfig, RubricConfig
from oapl_jax.errors import RunError, UserError
from oapl_jax.preferences import Preferences
from oapl_jax.preferences.judges import CallableJudge, RubricJudge
from oapl_jax.structs import Rollout


def rubric(objectives):
    return RubricJudge(RubricConfig(objectives=objectives))


def callable_judge(function, objectives=("length",)):
    return CallableJudge(CallableJudgeConfig(function=function, objectives=objectives))


def test_a_vote_of_rules_is_cyclic_though_no_rule_is():
    """Short, then varied, then rising: each of the three beats the next by two votes of three."""
    rules = arithmetic.get_config("objective=prosper").preferences.rubric.objectives.manner
    judge = rubric({"manner": rules.to_dict()})
    three = responses("01", "3210", "01201")
    (found,) = judge.compare(PROMPT, three, three)
    np.testing.assert_allclose(found, np.array([[3, 4, 2], [2, 3, 4], [4, 2, 3]]) / 6)
    for rule in rules:
        (alone,) = rubric({"one": {rule: 1.0}}).compare(PROMPT, three, three)
        order = np.argsort(-alone.sum(1))
        np.testing.assert_array_equal(alone[order][:, order][np.triu_indices(3, 1)], 1)


def test_a_rubric_weighs_votes_calls_the_verifier_and_halves_ties():
    judge = rubric({"right": {"right": 2.0}, "both": {"right": 3.0, "long": 1.0}})
    mine, theirs = responses("3", "12", right=("3",)), responses("33", "4", "12", right=("33",))
    found = judge.compare(PROMPT, mine, theirs)
    assert judge.objectives == ("right", "both")
    np.testing.assert_allclose(found[0], [[0.5, 1, 1], [0, 0.5, 0.5]])
    np.testing.assert_allclose(found[1], [[0.375, 0.875, 0.75], [0.125, 0.625, 0.5]])


def longer(prompt, mine, theirs):
    """The longer one wins; two texts with an "x" have no score."""
    length, x = (lambda y: len(y.text)), (lambda y: "x" in y.text)
    won = [[(np.sign(length(a) - length(b)) + 1) / 2 for b in theirs] for a in mine]
    return np.where([[x(a) and x(b) for b in theirs] for a in mine], np.nan, won)[None]


def too_sure(prompt, mine, theirs):
    return longer(prompt, mine, theirs) + 1


def transposed(prompt, mine, theirs):
    return longer(prompt, mine, theirs).swapaxes(1, 2)


def rollout(text, finish_reason="stop"):
    tokens = np.frombuffer(text.encode(), np.uint8).astype(np.int32)
    return Rollout(tokens, np.zeros(len(tokens), np.float32), 0, finish_reason)


def rewards_by(function, comparators, beta=1e9):
    return Preferences(
        callable_judge(f"{__name__}:{function}"),
        lambda prompt: comparators,
        beta=beta,
        text=lambda rollout: bytes(rollout.tokens.tolist()).decode(),
        verify=lambda prompt, rollout: 1.0,
    )


def named(**metrics):
    return {f"preferences/{name}": value for name, value in metrics.items()}


def test_a_callable_judge_rewards_a_group():
    preferences = rewards_by("longer", [rollout("ab"), rollout("abcd", "length"), rollout("abx")])
    group = [rollout("a"), rollout("ab"), rollout("abcx"), rollout("abcdefg", "length")]
    # Against "ab", the truncated one, and "abx"; two x have no score.
    expected = [(0 + 1 + 0) / 3, (0.5 + 1 + 0) / 3, (1 + 1) / 2, (0 + 0.5 + 0) / 3]
    found = preferences.reward(PROMPT, group)
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    assert found.dtype == np.float32
    counts = dict(comparisons=12, missing=1, unscored=0)
    value = (1.5 / 4 + 3.5 / 4 + 0) / 3
    means = {"value": value, "value/length": value, "worst/length": 1}
    assert preferences.metrics() == pytest.approx(named(**counts, **means))
    assert preferences.metrics() == named(**counts)  # no means without a group
    preferences.reward(PROMPT, [rollout("x"), rollout("xy")])
    assert preferences.metrics()["preferences/comparisons"] == 18


def test_a_group_without_any_score_has_no_advantage_and_is_counted():
    preferences = rewards_by("longer", [rollout("x"), rollout("xx")])
    np.testing.assert_array_equal(preferences.reward(PROMPT, [rollout("xyz")] * 3), 0.5)
    assert preferences.metrics() == named(comparisons=6, missing=6, unscored=1)


def test_truncated_responses_are_not_judged():
    preferences = rewards_by("too_sure", [rollout("ab"), rollout("abc", "length")])
    truncated = [rollout("abc", "length")] * 2
    np.testing.assert_allclose(preferences.reward(PROMPT, truncated), 0.25)


@pytest.mark.parametrize(("function", "named"), [("too_sure", "id7"), ("transposed", "id7")])
def test_a_result_of_wrong_range_or_shape_ends_the_run(function, named):
    preferences = rewards_by(function, [rollout("a"), rollout("b"), rollout("c")])
    with pytest.raises(RunError, match=named):
        preferences.reward(PROMPT, [rollout("a"), rollout("bb")])


@pytest.mark.parametrize(
    ("judge", "settings", "named"),
    [
        (rubric, ({},), "preferences.rubric.objectives"),
        (rubric, ({"manner": {"shrot": 1.0}},), "'shrot'"),
        (rubric, ({"manner": {"short": 0.0}},), "objectives.manner"),
        (rubric, ({"manner": {"short": 2.0, "long": -1.0}},), "objectives.manner"),
        *(
            (callable_judge, (function,), "preferences.callable.function")
            for function in ("", "no_colon", "json:no_such", "no.such.module:f")
        ),
        (callable_judge, (f"{__name__}:longer", ()), "preferences.callable.objectives"),
    ],
)
def test_rejects_settings_of_a_judge(judge, settings, named):
    with pytest.raises(UserError, match=named):
        judge(*settings)
