"""The estimators of the policy-gradient family by hand, and by each other."""

import jax.numpy as jnp
import numpy as np
import pytest

from oapl_jax.objectives.advantages import ADVANTAGES, advantage


def of(reward, estimator):
    return np.asarray(advantage(jnp.asarray(reward, jnp.float32), estimator=estimator))


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
def test_by_hand(reward, estimator, expected):
    np.testing.assert_allclose(of(reward, estimator), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("estimator", ADVANTAGES)
@pytest.mark.parametrize("reward", [[-5.0], [0.0], [0.1] * 3, [3333.3] * 11, [0.0] * 8, [1.0] * 8])
def test_equal_rewards_have_no_advantage_at_all(estimator, reward):
    """0.1 in threes has a rounded mean, and must not become an advantage of 1e-9 / 1e-6."""
    np.testing.assert_array_equal(of(reward, estimator), np.zeros(len(reward)))
