"""The draw of a token is exact, whatever the size of the vocabulary."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from scipy.special import log_softmax, softmax

from oapl_jax.rollout.token_sampling import BLOCK, greedy_tokens, sample_tokens

DRAWS, ROWS = 200_000, 2_000  # ROWS at a time
REJECT = 1e-4  # chance that a right sampler fails; keys are fixed, so it does always or never


def drawn(scores: np.ndarray) -> np.ndarray:
    """Tokens of DRAWS draws from one row of scores."""
    many = jax.jit(jax.vmap(lambda key: sample_tokens(key[None], jnp.asarray(scores)[None])[0][0]))
    keys = jax.random.split(jax.random.key(7), DRAWS).reshape(-1, ROWS)
    return np.concatenate([np.asarray(many(some)) for some in keys])


@pytest.mark.parametrize("size", [16, BLOCK, 1000, 151_936])
def test_chi_square(size):
    """Bins of 25 expected draws or more: single tokens at the top, and the tail in slices."""
    scores = (3 * np.random.default_rng(size).standard_normal(size)).astype(np.float32)
    expected = DRAWS * softmax(scores.astype(np.float64))
    order = np.argsort(-expected, kind="stable")
    bin_of = np.empty(size, int)
    bin_of[order] = np.floor(np.cumsum(expected[order]) / 25).astype(int)
    bin_of = np.unique(bin_of, return_inverse=True)[1]
    wanted = np.bincount(bin_of, expected)
    wanted[-2] += wanted[-1]  # what is left over is no bin of its own
    bin_of[bin_of == len(wanted) - 1] -= 1
    found = np.bincount(bin_of[drawn(scores)], minlength=len(wanted) - 1)
    assert scipy.stats.chisquare(found, wanted[:-1] * DRAWS / wanted[:-1].sum()).pvalue > REJECT


@pytest.mark.parametrize("size", [16, 300, 1025])
def test_log_probs(size):
    scores = (5 * np.random.default_rng(size).standard_normal((64, size))).astype(np.float32)
    whole = log_softmax(scores.astype(np.float64), axis=1)
    for tokens, logp in (
        sample_tokens(jax.random.split(jax.random.key(0), 64), jnp.asarray(scores)),
        greedy_tokens(jnp.asarray(scores)),
    ):
        np.testing.assert_allclose(logp, whole[np.arange(64), tokens], atol=2e-6, rtol=1e-6)
    np.testing.assert_array_equal(greedy_tokens(jnp.asarray(scores))[0], scores.argmax(axis=1))


def test_forbidden_tokens_are_never_drawn():
    scores = np.full((256, 700), -np.inf, np.float32)
    allowed = np.random.default_rng(0).integers(0, 700, (256, 3))
    np.put_along_axis(scores, allowed, 1.0, axis=1)
    tokens, _ = sample_tokens(jax.random.split(jax.random.key(3), 256), jnp.asarray(scores))
    assert (np.asarray(tokens)[:, None] == allowed).any(axis=1).all()
