"""CISPO by hand, and its gradient with and without a cap."""

import numpy as np
import pytest
from cases import INF, bound, random_group, run

# Three tokens with policy / behavior = 8, 1/2, 5/4, then a pad.
LOGP = np.array([[-1.0, -2.0, -0.5, 5.0]], np.float32)
BEHAVIOR = LOGP - np.log([[8.0, 0.5, 1.25, 1e-3]]).astype(np.float32)
MASK = np.array([[1.0, 1.0, 1.0, 0.0]], np.float32)


@pytest.mark.parametrize(
    ("cap", "floor", "weights"),
    [(5.0, 0.0, [5, 0.5, 1.25]), (1.2, 0.8, [1.2, 0.8, 1.2]), (INF, 0.0, [8, 0.5, 1.25])],
)
@pytest.mark.parametrize("advantage", [1.0, -0.5])
def test_by_hand(cap, floor, weights, advantage):
    objective = bound("cispo", cap=cap, floor=floor)
    losses, gradient, metrics = run(objective, LOGP, BEHAVIOR, np.float32([advantage]), MASK)
    weighted = np.dot(weights, [-1.0, -2.0, -0.5])
    np.testing.assert_allclose(losses, [-advantage * weighted], rtol=1e-6)
    np.testing.assert_allclose(gradient, [[*(-advantage * np.array(weights)), 0]], rtol=1e-6)
    np.testing.assert_allclose(metrics["correction"], [np.mean(weights)], rtol=1e-6)
    clipped = np.mean(~np.isclose(weights, [8, 0.5, 1.25]))
    np.testing.assert_allclose(metrics["clip_fraction"], [clipped], rtol=1e-6)


def test_clipped_tokens_keep_their_gradient_where_ppo_drops_it():
    group = LOGP, BEHAVIOR, np.float32([1.0]), MASK
    assert run(bound("cispo"), *group)[1][0, 0] == -5
    assert run(bound("grpo"), *group)[1][0, 0] == 0


def test_without_a_cap_it_has_the_gradient_of_unclipped_ppo():
    group = random_group(0, [5, 3, 8], 8, spread=0.4)
    found = run(bound("cispo", cap=INF), *group)[1]
    expected = run(bound("grpo", clip_low=INF, clip_high=INF), *group)[1]
    assert np.abs(expected).max() > 1
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_it_is_truncated_importance_sampling_with_the_learner_as_proximal_policy():
    group = random_group(1, [5, 3, 8], 8, spread=1.5)
    found = run(bound("cispo"), *group)[1]
    expected = run(bound("grpo_is", correction_cap=5.0), *group)[1]
    assert np.abs(run(bound("cispo", cap=INF), *group)[1] - found).max() > 1
    np.testing.assert_allclose(found, expected, rtol=1e-5)
