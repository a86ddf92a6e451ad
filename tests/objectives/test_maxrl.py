"""MaxRL's estimators against the exact gradient of the truncated likelihood, by enumeration.

A policy over three answers is small enough to go through every group that it can sample.
"""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest

from oapl_jax.objectives.maxrl import advantage

POLICY = np.array([0.5, 0.2, 0.3])
RIGHT = np.array([0.0, 1.0, 0.0])
SCORE = np.eye(3) - POLICY  # gradient of log pi(y) by the logits
NOT_TRUNCATED = dict(order=1, verified_reward=1.0)


def of(reward, **hyper):
    return np.asarray(advantage(jnp.asarray(reward, jnp.float32), **hyper), np.float64)


def exact_gradient(order, right=RIGHT):
    """grad J^(T) = (1 - (1 - p)^T) / p grad p in float64."""
    rate = POLICY @ right
    of_rate = POLICY * (right - rate)
    return (1 - (1 - rate) ** order) / rate * of_rate


def expectation(estimate, count):
    """Of mean_i A_i grad log pi(y_i) over all 3^N groups, each with its probability."""
    total = np.zeros(3)
    for group in itertools.product(range(3), repeat=count):
        group = np.array(group)
        total += np.prod(POLICY[group]) * (estimate(RIGHT[group]) @ SCORE[group]) / count
    return total


@pytest.mark.parametrize("count", [2, 3, 5])
@pytest.mark.parametrize(("estimator", "below"), [("baseline", 1), ("success", 0), ("centred", 0)])
def test_the_order_of_an_estimator_is_that_of_its_samples(estimator, below, count):
    """Equations 9 and 10 have order N; algorithm 1, which drops the baseline too, N - 1."""
    estimate = lambda reward: of(reward, estimator=estimator, **NOT_TRUNCATED)
    found = expectation(estimate, count)
    np.testing.assert_allclose(found, exact_gradient(count - below), atol=1e-6)
    assert not np.allclose(found, exact_gradient(count - 1 + below), atol=1e-3)


@pytest.mark.parametrize(
    ("count", "order"), [(1, 1), (3, 1), (3, 2), (3, 3), (5, 2), (5, 4), (5, 5)]
)
def test_a_truncated_order_is_met_with_any_number_of_samples(count, order):
    hyper = dict(estimator="truncated", order=order, verified_reward=1.0)
    found = expectation(lambda reward: of(reward, **hyper), count)
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
def test_by_hand(reward, estimator, order, expected):
    found = of(reward, estimator=estimator, order=order, verified_reward=1.0)
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_graded_rewards_count_from_the_threshold():
    hyper = dict(estimator="success", order=1)
    np.testing.assert_array_equal(
        of([0.9, 0.2, 0.8, 0], **hyper, verified_reward=0.8), [2, 0, 2, 0]
    )
    found = of([0.9, 0.2, 0.8, 0.1], estimator="baseline", order=1, verified_reward=1.0)
    np.testing.assert_allclose(found, [0.8, -0.6, 0.6, -0.8], rtol=1e-5)
