"""The KL to a reference by enumeration, and the effective sample size by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import random_group

from oapl_jax.objectives.ratios import effective_share, reference_kl


def two_tokens(first, second):
    """log-probs [4, 2] of the responses (a, b), a and b 0 or 1, from logits of a, and of b by a."""
    of_first, of_second = jax.nn.log_softmax(first), jax.nn.log_softmax(second)
    return jnp.stack([jnp.repeat(of_first, 2), of_second.reshape(-1)], axis=-1)


def test_the_kl_of_two_tokens_is_that_of_each_at_the_sampled_prefixes():
    first, second = jnp.array([0.7, -0.4]), jnp.array([[0.2, 1.1], [-0.9, 0.3]])
    reference = two_tokens(jnp.array([-0.2, 0.5]), jnp.array([[0.6, -0.3], [1.2, 0.1]]))
    behavior = two_tokens(jnp.array([-1.0, 0.8]), jnp.array([[0.4, 0.4], [0.3, -0.5]]))

    def expectation(parts, sampling):
        chances = jnp.exp(sampling.sum(-1))
        return jnp.sum(
            chances * reference_kl(two_tokens(*parts), sampling, reference, jnp.ones((4, 2)))
        )

    def by_place(parts, sampling):
        """Both tokens' KL, the second's averaged over prefixes of the sampling policy."""
        logp = two_tokens(*parts)
        of_first = jnp.sum(jnp.exp(logp[::2, 0]) * (logp - reference)[::2, 0])
        of_second = jnp.sum((jnp.exp(logp[:, 1]) * (logp - reference)[:, 1]).reshape(2, 2), axis=-1)
        return of_first + jnp.sum(jnp.exp(sampling[::2, 0]) * of_second)

    def of_responses(parts):
        logp = two_tokens(*parts)
        return jnp.sum(jnp.exp(logp.sum(-1)) * (logp - reference).sum(-1))

    parts = (first, second)
    for sampling in (two_tokens(*parts), behavior):
        value, gradient = jax.value_and_grad(expectation)(parts, sampling)
        expected, slope = jax.value_and_grad(by_place)(parts, sampling)
        np.testing.assert_allclose(value, expected, rtol=1e-5)
        for found, right in zip(gradient, slope, strict=True):
            np.testing.assert_allclose(found, right, rtol=1e-4, atol=1e-6)
    whole, logp = of_responses(parts), two_tokens(*parts)
    np.testing.assert_allclose(expectation(parts, logp), whole, rtol=1e-5)  # of responses, if fresh
    assert abs(expectation(parts, behavior) - whole) > 0.01
    fresh, of_whole = jax.grad(expectation)(parts, logp)[0], jax.grad(of_responses)(parts)[0]
    assert np.abs(fresh - of_whole).max() > 0.01  # what the first token does to the second


def test_on_fresh_data_a_tokens_slope_is_its_log_ratio():
    logp, reference, _, mask = random_group(0, [5, 2, 7], 7, spread=0.4)
    total = lambda x: reference_kl(x, logp, reference, mask).sum()
    expected = (logp.astype(np.float64) - reference) * mask
    np.testing.assert_allclose(jax.grad(total)(jnp.asarray(logp)), expected, atol=1e-6)


@pytest.mark.parametrize("gap", [-200.0, 200.0])
def test_far_references_do_not_overflow(gap):
    logp = np.full((2, 4096), -201.0, np.float32) + max(gap, 0)
    value, gradient = jax.value_and_grad(
        lambda x: reference_kl(x, logp - gap, logp - gap, np.ones_like(logp)).sum()
    )(jnp.asarray(logp))
    assert np.isfinite(value)
    assert np.all(np.isfinite(gradient))
    assert reference_kl(logp, logp, logp, np.ones_like(logp)).sum() == 0


def test_the_effective_share_by_hand_and_in_float64():
    # Weights 1, 2, 3: 36 / (3 * 14).
    np.testing.assert_allclose(effective_share(np.log([1.0, 2.0, 3.0])), 36 / 42, rtol=1e-6)
    log_weight = np.random.default_rng(0).normal(0, 1.5, (4, 16))
    weight = np.exp(log_weight)
    expected = weight.sum() ** 2 / (weight**2).sum() / 64
    assert 0.05 < expected < 0.5
    np.testing.assert_allclose(effective_share(log_weight), expected, rtol=1e-5)


@pytest.mark.parametrize("shift", [0.0, -200.0, 200.0, 1e4])
def test_equal_weights_count_in_full_at_any_size(shift):
    np.testing.assert_allclose(effective_share(np.full(32, shift)), 1.0, rtol=1e-3)


@pytest.mark.parametrize("size", [200.0, 1e6])
def test_one_weight_above_all_others_counts_as_one_response(size):
    np.testing.assert_allclose(effective_share(size * np.eye(32)[5]), 1 / 32, rtol=1e-3)
