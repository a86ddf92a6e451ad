"""The effective share of a batch: its bounds, a case by hand, and float64."""

import numpy as np
import pytest

from oapl_jax.objectives.sample_size import effective_share


def test_by_hand_and_in_float64():
    # Weights 1, 2, 3: 36 / (3 * 14).
    np.testing.assert_allclose(effective_share(np.log([1.0, 2.0, 3.0])), 36 / 42, rtol=1e-6)
    log_weight = np.random.default_rng(0).normal(0, 1.5, (4, 16))
    weight = np.exp(log_weight)
    expected = weight.sum() ** 2 / (weight**2).sum() / 64
    assert 0.05 < expected < 0.5
    np.testing.assert_allclose(effective_share(log_weight), expected, rtol=1e-5)


@pytest.mark.parametrize("shift", [0.0, -200.0, 200.0, 1e4])
def test_equal_weights_count_in_full_whatever_they_are(shift):
    np.testing.assert_allclose(effective_share(np.full(32, shift)), 1.0, rtol=1e-3)


@pytest.mark.parametrize("size", [200.0, 1e6])
def test_one_weight_above_all_others_counts_as_one_response(size):
    log_weight = np.zeros(32)
    log_weight[5] = size
    np.testing.assert_allclose(effective_share(log_weight), 1 / 32, rtol=1e-3)
