"""Estimators of advantages by hand; MaxRL's against the exact gradient of the truncated likelihood.

A policy over three answers is small enough to go through every group that it can sample.
"""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest

from oapl_jax.objectives import advantages
from oapl_jax.objectives.maxrl import advantage

POLICY = np.array([0.5, 0.2, 0.3])
RIGHT = np.array([0.0, 1.0, 0.0])
SCORE = np.eye(3) - POLICY  # gradient of log pi(y) by the logits


def of(reward, estimator, order=1, verified_reward=1.0):
    hyper = dict(estimator=estimator, order=order, verified_reward=verified_reward)
    return np.asarray(advantage(jnp.asarray(reward, jnp.float32), **hyper), np.float64)


def exact_gradient(order):
    """grad J^(T) = (1 - (1 - p)^T) / p grad p in float64."""
    rate = POLICY @ RIGHT
    return (1 - (1 - rate) ** order) / rate * POLICY * (RIGHT - rate)


def expectation(count, *estimator):
    """Of mean_i A_i grad log pi(y_i) over all 3^N groups, each with its probability."""
    groups = np.array(list(itertools.product(range(3), repeat=count)))
    means = [of(RIGHT[group], *estimator) @ SCORE[group] / count for group in groups]
    return np.prod(POLICY[groups], axis=1) @ means


@pytest.mark.parametrize("count", [2, 3, 5])
@pytest.mark.parametrize(("estimator", "below"), [("baseline", 1), ("success", 0), ("centred", 0)])
def test_the_order_of_an_estimator_is_that_of_its_samples(estimator, below, count):
    """Equations 9 and 10 have order N; algorithm 1, which drops the baseline too, N - 1."""
    found = expectation(count, estimator)
    np.testing.assert_allclose(found, exact_gradient(count - below), atol=1e-6)
    assert not np.allclose(found, exact_gradient(count - 1 + below), atol=1e-3)


@pytest.mark.parametrize(
    ("count", "order"), [(1, 1), (3, 1), (3, 2), (3, 3), (5, 2), (5, 4), (5, 5)]
)
def test_a_truncated_order_is_met_with_any_number_of_samples(count, order):
    found = expectation(count, "truncated", order)
    np.testing.assert_allclose(found, exact_gradient(order), atol=1e-6)


@pytest.mark.parametrize(
    ("reward", "estimator", "order", "expected"),
    [
        ([1, 0, 0, 0], "baseline", 1, [3, -1, -1, -1]),
        ([1, 0, 0, 0], "success", 1, [4, 0, 0, 0]),
        ([1, 0, 0, 0], "centred", 1, [3, -1, -1, -1]),
        ([1, 0, 0, 0], "truncated", 1, [1, 0, 0, 0]),
        # c_2 = 2/3, c_3 = 2/3 1/2, c_4 = 0: three failures show no more.
        ([1, 0, 0, 0], "truncated", 2, [1, -2 / 3, -2 / 3, -2 / 3]),
        ([1, 0, 0, 0], "truncated", 3, [1, -1, -1, -1]),
        ([1, 0, 0, 0], "truncated", 4, [1, -1, -1, -1]),
        # Groups of equal rewards.
        *[([value] * 4, "baseline", 4, [0] * 4) for value in (0, 1)],
        *[([value] * 4, "success", 4, [value] * 4) for value in (0, 1)],
        *[([value] * 4, "centred", 4, [value - 1] * 4) for value in (0, 1)],
        *[([value] * 4, "truncated", 4, [4 * value - 3] * 4) for value in (0, 1)],
    ],
)
def test_maxrl_by_hand(reward, estimator, order, expected):
    np.testing.assert_allclose(of(reward, estimator, order), expected, rtol=1e-6)


def test_graded_rewards_count_from_the_threshold():
    found = of([0.9, 0.2, 0.8, 0], "success", verified_reward=0.8)
    np.testing.assert_array_equal(found, [2, 0, 2, 0])
    found = of([0.9, 0.2, 0.8, 0.1], "baseline")
    np.testing.assert_allclose(found, [0.8, -0.6, 0.6, -0.8], rtol=1e-5)


def family(reward, estimator):
    return np.asarray(advantages.advantage(jnp.asarray(reward, jnp.float32), estimator=estimator))


@pytest.mark.parametrize(
    ("reward", "estimator", "expected"),
    [
        ([1, 0, 0, 0], "dr_grpo", [0.75, -0.25, -0.25, -0.25]),
        ([1, 0, 0, 0], "grpo", [1.5, -0.5, -0.5, -0.5]),  # std with G - 1 is 1/2
        ([1, 0, 0, 0], "rloo", [1, -1 / 3, -1 / 3, -1 / 3]),
        ([1, 0, 0, 0], "maxrl", [3, -1, -1, -1]),
        ([2, 4, 9], "dr_grpo", [-3, -1, 4]),
        ([2, 4, 9], "grpo", [-3 / 13**0.5, -1 / 13**0.5, 4 / 13**0.5]),
        ([2, 4, 9], "rloo", [2 - 6.5, 4 - 5.5, 9 - 3]),
        ([2, 4, 9], "maxrl", [-3 / 5, -1 / 5, 4 / 5]),
        ([-2, 0, 1], "maxrl", [0, 0, 0]),
        ([10000.0, 10001.0], "grpo", [-(0.5**0.5), 0.5**0.5]),
    ],
)
def test_the_family_by_hand(reward, estimator, expected):
    np.testing.assert_allclose(family(reward, estimator), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("estimator", advantages.ADVANTAGES)
@pytest.mark.parametrize("reward", [[-5.0], [0.0], [0.1] * 3, [3333.3] * 11, [0.0] * 8, [1.0] * 8])
def test_equal_rewards_have_no_advantage_at_all(estimator, reward):
    """0.1 in threes has a rounded mean, and must not become an advantage of 1e-9 / 1e-6."""
    np.testing.assert_array_equal(family(reward, estimator), np.zeros(len(reward)))
