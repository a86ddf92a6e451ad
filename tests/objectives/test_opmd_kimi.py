"""OPMD in Kimi's form is a regression, without its anchor REINFORCE; and its baselines by hand."""

import numpy as np
import pytest
from cases import LENGTHS, REWARD, bound, random_group, run

from oapl_jax.objectives import opmd_kimi


@pytest.mark.parametrize("tau", [0.01, 0.2, 3.0])
def test_it_is_the_regression_over_two_tau_up_to_a_constant(tau):
    group = random_group(2, LENGTHS, 9, spread=0.3)
    losses, gradient, metrics = run(bound("opmd_kimi", tau=tau), *group)
    regression, slopes, theirs = run(bound("oapl", beta2=tau), *group)
    constant = group[2] ** 2 / (2 * tau)
    np.testing.assert_allclose(losses, regression / (2 * tau) - constant, rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(gradient, slopes / (2 * tau), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(metrics["residual"], theirs["residual"], rtol=1e-6)


@pytest.mark.parametrize("tau", [0.3, 1.0])
def test_with_the_soft_baseline_its_gradient_is_that_of_oapl(tau):
    """From rewards on; OAPL with beta1 = beta2."""
    ours = bound("opmd_kimi", baseline="log_mean_exp", tau=tau)
    theirs = bound("oapl", beta1=tau, beta2=tau)
    logp, behavior, _, mask = random_group(4, LENGTHS, 9, spread=0.3)
    slopes = [run(o, logp, behavior, o.advantage(REWARD), mask)[1] for o in (ours, theirs)]
    np.testing.assert_allclose(slopes[0], slopes[1] / (2 * tau), rtol=1e-4, atol=1e-6)


def test_without_tau_it_is_plain_reinforce():
    group = random_group(3, LENGTHS, 9, spread=0.3)
    without = bound("opmd_kimi")._replace(loss=lambda *arrays: opmd_kimi.loss(*arrays, tau=0.0))
    np.testing.assert_array_equal(run(without, *group)[1], run(bound("sft"), *group)[1])


def test_baselines_by_hand():
    mean = bound("opmd_kimi", baseline="mean").advantage(REWARD)
    np.testing.assert_allclose(mean, [0.625, -0.375, 0.125, -0.375], atol=1e-7)
    soft = bound("opmd_kimi", baseline="log_mean_exp", tau=0.5).advantage(REWARD)
    expected = np.asarray(REWARD) - 0.5 * np.log(np.mean(np.exp(np.asarray(REWARD) / 0.5)))
    np.testing.assert_allclose(soft, expected, atol=1e-6)
