"""CISPO, GSPO and VESPO by hand, in float64, and as limits of each other."""

import jax.numpy as jnp
import numpy as np
import pytest
from cases import INF, bound, random_group, run

from oapl_jax.objectives.vespo import kernel

# Three tokens with policy / behavior = 8, 1/2, 5/4, then a pad.
LOGP = np.array([[-1.0, -2.0, -0.5, 5.0]], np.float32)
BEHAVIOR = LOGP - np.log([[8.0, 0.5, 1.25, 1e-3]]).astype(np.float32)
MASK = np.array([[1.0, 1.0, 1.0, 0.0]], np.float32)


@pytest.mark.parametrize(
    ("cap", "floor", "weights"),
    [(5.0, 0.0, [5, 0.5, 1.25]), (1.2, 0.8, [1.2, 0.8, 1.2]), (INF, 0.0, [8, 0.5, 1.25])],
)
@pytest.mark.parametrize("advantage", [1.0, -0.5])
def test_cispo_by_hand(cap, floor, weights, advantage):
    objective = bound("cispo", cap=cap, floor=floor)
    losses, gradient, metrics = run(objective, LOGP, BEHAVIOR, np.float32([advantage]), MASK)
    weighted = np.dot(weights, [-1.0, -2.0, -0.5])
    np.testing.assert_allclose(losses, [-advantage * weighted], rtol=1e-6)
    np.testing.assert_allclose(gradient, [[*(-advantage * np.array(weights)), 0]], rtol=1e-6)
    np.testing.assert_allclose(metrics["correction"], [np.mean(weights)], rtol=1e-6)
    clipped = np.mean(~np.isclose(weights, [8, 0.5, 1.25]))
    np.testing.assert_allclose(metrics["clip_fraction"], [clipped], rtol=1e-6)


def test_cispo_without_a_cap_has_the_gradient_of_unclipped_ppo():
    group = random_group(0, [5, 3, 8], 8, spread=0.4)
    found = run(bound("cispo", cap=INF), *group)[1]
    expected = run(bound("grpo", clip_low=INF, clip_high=INF), *group)[1]
    assert np.abs(expected).max() > 1
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_cispo_is_truncated_importance_sampling_with_the_learner_as_proximal_policy():
    group = random_group(1, [5, 3, 8], 8, spread=1.5)
    found = run(bound("cispo"), *group)[1]
    expected = run(bound("grpo_is", correction_cap=5.0), *group)[1]
    assert np.abs(run(bound("cispo", cap=INF), *group)[1] - found).max() > 1
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def by_sequence(logp, behavior, advantages, mask, low, high):
    """Losses and slopes in float64, by the token form: s_t = sg(s) pi_t / sg(pi_t)."""
    losses, slopes = np.zeros(len(logp)), np.zeros(logp.shape)
    for i, advantage in enumerate(map(float, advantages)):
        n = int(mask[i].sum())
        ratio = np.exp((logp[i, :n].astype(np.float64) - behavior[i, :n]).mean())
        plain, clipped = -advantage * ratio, -advantage * min(max(ratio, 1 - low), 1 + high)
        losses[i] = max(plain, clipped)
        slopes[i, :n] = plain / n if plain >= clipped else 0.0
    return losses, slopes


@pytest.mark.parametrize(("low", "high"), [(3e-4, 4e-4), (0.1, 0.1), (INF, INF)])
def test_gspo_equals_a_loop_over_responses(low, high):
    group = random_group(0, [6, 1, 4, 9, 3, 8], 9, spread=0.3)
    objective = bound("gspo", clip_low=low, clip_high=high)
    losses, gradient, metrics = run(objective, *group)
    expected, slopes = by_sequence(*group, low, high)
    np.testing.assert_allclose(losses, expected, rtol=1e-5)
    np.testing.assert_allclose(gradient, slopes, rtol=1e-5)
    clipped = (slopes == 0).all(-1)
    np.testing.assert_array_equal(metrics["clip_fraction"], clipped)
    assert clipped.any() == (high < INF)
    assert not clipped.all()


def test_gspo_of_one_token_is_ppo():
    group = random_group(2, [1] * 6, 1, spread=0.4)
    mine, theirs = (
        run(bound("gspo", clip_low=0.2, clip_high=0.28), *group),
        run(bound("grpo"), *group),
    )
    for found, expected in zip(mine[:2], theirs[:2], strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-5)


GOOD, BAD = (2.0, 3.0), (3.0, 2.0)


def phi(weight, pair):
    power, decay = pair
    return np.asarray(weight, np.float64) ** power * np.exp(decay * (1 - np.asarray(weight)))


@pytest.mark.parametrize(
    ("pair", "values"),
    [(GOOD, [1.120, 1, 0.199, 0.002]), (BAD, [0.340, 1, 1.083, 0.159])],
)
def test_vespos_kernel_at_half_one_two_four(pair, values):
    weight = np.array([0.5, 1.0, 2.0, 4.0])
    found = kernel(jnp.log(weight), *map(jnp.float32, pair))
    np.testing.assert_allclose(found, values, atol=6e-4)
    np.testing.assert_allclose(found, phi(weight, pair), rtol=1e-5)


def test_vespo_in_float64():
    logp, behavior, advantages, mask = random_group(0, [6, 1, 4, 9, 3], 9, spread=0.3)
    advantages[2] = 0.7
    losses, gradient, metrics = run(bound("vespo"), logp, behavior, advantages, mask)
    weight = np.exp(((logp.astype(np.float64) - behavior) * mask).sum(-1))
    expected = np.where(advantages >= 0, phi(weight, GOOD), phi(weight, BAD))
    assert 0 < np.sum(advantages > 0) < 5
    np.testing.assert_allclose(metrics["correction"], expected, rtol=1e-4)
    np.testing.assert_allclose(gradient, -(expected * advantages)[:, None] * mask, rtol=1e-4)
    np.testing.assert_allclose(losses, -expected * advantages * (logp * mask).sum(-1), rtol=1e-4)


FLAT = dict(power_good=0, decay_good=0, power_bad=0, decay_bad=0)


def test_vespos_limits_are_reinforce_and_full_importance_sampling():
    group = random_group(1, [6, 1, 4, 9], 9, spread=0.3)
    flat = run(bound("vespo", **FLAT), *group)
    np.testing.assert_allclose(flat[1], run(bound("sft"), *group)[1], rtol=1e-6)
    powers = dict(FLAT, power_good=1, power_bad=1)
    found = run(bound("vespo", **powers), *group)[1]
    whole = bound("grpo_is", correction="sequence_truncate", correction_cap=1e9)
    np.testing.assert_allclose(found, run(whole, *group)[1], rtol=1e-5)
    assert not np.allclose(found, flat[1])


def test_vespos_weight_is_of_the_whole_response_and_not_its_mean():
    """Dividing by the length, which the authors found to collapse, would leave the weight."""
    logp = np.full((2, 64), -1.0, np.float32)
    mask = (np.arange(64) < np.array([[8], [64]])).astype(np.float32)
    weights = run(bound("vespo"), logp, logp - 0.02, np.ones(2, np.float32), mask)[2]["correction"]
    np.testing.assert_allclose(weights, phi(np.exp([0.16, 1.28]), GOOD), rtol=1e-4)
