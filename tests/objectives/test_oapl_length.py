"""OAPL's variants: a power of the length, and the mean as a baseline."""

import jax
import jax.numpy as jnp
import numpy as np
from cases import bound, log_ratios, random_group, run

from oapl_jax.objectives import advantages

REWARD = jnp.array([1.0, 0.0, 0.5, 0.0])
LENGTHS = [6, 1, 4, 9]


def test_length_exponent_0_is_oapl_and_1_the_mean_over_tokens():
    logp, behavior, advantage, mask = group = random_group(1, LENGTHS, 9, spread=0.4)
    found = run(bound("oapl_length", beta2=0.2, length_exponent=0.0), *group)
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6),
        found,
        run(bound("oapl", beta2=0.2), *group),
    )
    delta = log_ratios(logp, behavior, mask)
    for exponent in (0.5, 1.0):
        objective = bound("oapl_length", beta2=0.2, length_exponent=exponent)
        losses, gradient, metrics = run(objective, *group)
        beta = 0.2 / np.array(LENGTHS) ** exponent
        np.testing.assert_allclose(losses, (beta * delta - advantage) ** 2, rtol=1e-4)
        slope = 2 * beta * (beta * delta - advantage)
        np.testing.assert_allclose(gradient, slope[:, None] * mask, rtol=1e-4)
        np.testing.assert_allclose(metrics["target_log_ratio"], advantage / beta, rtol=1e-5)


def test_a_mean_baseline_is_a_large_beta1():
    expected = advantages.advantage(REWARD, estimator="dr_grpo")
    np.testing.assert_allclose(bound("oapl", beta1=1e6).advantage(REWARD), expected, atol=1e-6)
    assert np.abs(bound("oapl", beta1=1.0).advantage(REWARD) - expected).max() > 0.05
