"""VESPO's kernel by its values, and the loss by its limits."""

import jax.numpy as jnp
import numpy as np
import pytest
from cases import bound, random_group, run

from oapl_jax.objectives.vespo import kernel

GOOD, BAD = (2.0, 3.0), (3.0, 2.0)


def phi(weight, pair):
    power, decay = pair
    return np.asarray(weight, np.float64) ** power * np.exp(decay * (1 - np.asarray(weight)))


@pytest.mark.parametrize(
    ("pair", "values"),
    [(GOOD, [1.120, 1, 0.199, 0.002]), (BAD, [0.340, 1, 1.083, 0.159])],
)
def test_the_kernel_at_half_one_two_four(pair, values):
    weight = np.array([0.5, 1.0, 2.0, 4.0])
    found = kernel(jnp.log(weight), *map(jnp.float32, pair))
    np.testing.assert_allclose(found, values, atol=6e-4)
    np.testing.assert_allclose(found, phi(weight, pair), rtol=1e-5)


def test_loss_and_gradient_in_float64():
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


def test_its_limits_are_reinforce_and_full_importance_sampling():
    group = random_group(1, [6, 1, 4, 9], 9, spread=0.3)
    flat = run(bound("vespo", **FLAT), *group)
    np.testing.assert_allclose(flat[1], run(bound("sft"), *group)[1], rtol=1e-6)
    powers = dict(FLAT, power_good=1, power_bad=1)
    found = run(bound("vespo", **powers), *group)[1]
    whole = bound("grpo_is", correction="sequence_truncate", correction_cap=1e9)
    np.testing.assert_allclose(found, run(whole, *group)[1], rtol=1e-5)
    assert not np.allclose(found, flat[1])


def test_the_weight_is_of_the_whole_response_and_not_its_mean():
    """Dividing by the length, which the authors found to collapse, would leave the weight."""
    logp = np.full((2, 64), -1.0, np.float32)
    mask = (np.arange(64) < np.array([[8], [64]])).astype(np.float32)
    weights = run(bound("vespo"), logp, logp - 0.02, np.ones(2, np.float32), mask)[2]["correction"]
    np.testing.assert_allclose(weights, phi(np.exp([0.16, 1.28]), GOOD), rtol=1e-4)
