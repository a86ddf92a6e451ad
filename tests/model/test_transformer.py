"""The decoder: caches, packing, causality, rematerialization and precision.

Weights are those of the committed checkpoints, since fresh norms and biases have no effect.
test_hf.py tests parity with transformers.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_models import forward, golden_model

from oapl_jax.model.transformer import REMAT_POLICIES, Transformer, empty_cache, head, logits


def rows(lengths, width, vocab_size, seed):
    """Packs sequences of these lengths into one row; the rest is padding (segment 0)."""
    tokens = np.random.default_rng(seed).integers(0, vocab_size, (1, width)).astype(np.int32)
    segments, positions = np.zeros((2, 1, width), np.int32)
    start = 0
    for i, length in enumerate(lengths, start=1):
        segments[0, start : start + length] = i
        positions[0, start : start + length] = np.arange(length)
        start += length
    return tokens, positions, segments


@pytest.mark.parametrize("name", ["qwen3", "qwen2", "llama_yarn"])
def test_gradients_vanish_exactly_at_masked_positions(name):
    """d logits[t] / d input[s] is 0 for later s and for packed neighbours, and only for those."""
    config, params = golden_model(name)
    width = 24
    _, positions, segments = rows([9, 7, 5], width, config.vocab_size, seed=0)
    # Every token occurs once: an embedding row's gradient is that of one input position.
    tokens = np.random.default_rng(1).permutation(config.vocab_size)[None, :width].astype(np.int32)
    probe = jax.random.normal(jax.random.key(0), (config.vocab_size,))

    @jax.jit
    @jax.jacrev
    def influence(embedding):
        changed = {**params, "embed": {"embedding": embedding}}
        return forward(config, changed, tokens, positions, segments)[0] @ probe

    gradients = influence(params["embed"]["embedding"])[:, tokens[0]]  # [t, s, D]
    same = segments[0][:, None] == segments[0][None, :]
    np.testing.assert_array_equal(jnp.abs(gradients).max(-1) > 0, np.tril(same))


@pytest.mark.parametrize("name", ["qwen3_tied", "qwen2_tied", "llama_llama3"])
def test_packed_sequences_have_the_logits_of_separate_ones(name):
    config, params = golden_model(name)
    lengths = [11, 4, 14]
    tokens, positions, segments = rows(lengths, 32, config.vocab_size, seed=2)
    run = jax.jit(functools.partial(forward, config, params))
    packed = run(tokens, positions, segments)
    for start, length in zip([0, 11, 15], lengths, strict=True):
        alone, positions, segments = rows([length], 32, config.vocab_size, seed=3)
        alone[0, :length] = tokens[0, start : start + length]
        found = run(alone, positions, segments)
        np.testing.assert_allclose(packed[0, start : start + length], found[0, :length], atol=1e-5)


@pytest.mark.parametrize("name", ["qwen3_yarn", "qwen2", "llama_bias"])
def test_cached_decoding_equals_the_whole_sequence(name):
    """Left-padded prompts are prefilled together, then every token is decoded on its own."""
    config, params = golden_model(name)
    lengths, prompt, total, slots = np.array([3, 9, 1, 6]), 9, 17, 20
    batch = len(lengths)
    rng = np.random.default_rng(3)
    tokens = rng.integers(0, config.vocab_size, (batch, total)).astype(np.int32)
    places = np.arange(total)[None, :] - (prompt - lengths)[:, None]  # negative on the padding
    positions, segments = np.maximum(places, 0), (places >= 0).astype(np.int32)

    @jax.jit
    def extend(cache, tokens, positions, segments):
        model = Transformer(config, jnp.float32, "none")
        hidden, cache = model.apply({"params": params}, tokens, positions, segments, cache)
        return logits(hidden, head(params, config)), cache

    cache = empty_cache(config, batch, slots, jnp.float32)
    pieces = []
    for start, end in [(0, prompt), *((i, i + 1) for i in range(prompt, total))]:
        part = (x[:, start:end] for x in (tokens, positions, segments))
        found, cache = extend(cache, *part)
        pieces.append(found)
    found = np.concatenate(pieces, axis=1)

    assert int(cache.slot) == total
    np.testing.assert_array_equal(cache.segments[:, total:], 0)
    # Each sequence once more, without padding on its left and without a cache.
    shifts = prompt - lengths
    whole = np.stack([np.roll(row, -shift) for row, shift in zip(tokens, shifts, strict=True)])
    causal = np.broadcast_to(np.arange(total, dtype=np.int32), whole.shape)
    run = jax.jit(functools.partial(forward, config, params))
    expected = run(whole, causal, np.ones_like(whole))
    for row, shift in enumerate(shifts):
        np.testing.assert_allclose(found[row, shift:], expected[row, : total - shift], atol=1e-4)


def test_remat_policies_have_the_same_gradients():
    config, params = golden_model("llama_bias")
    batch = rows([14, 10], 24, config.vocab_size, seed=4)

    def loss(params, remat):
        found = forward(config, params, *batch, remat=remat)
        return jnp.mean(jax.nn.logsumexp(found, axis=-1) ** 2)

    gradients = lambda remat: jax.jit(jax.grad(functools.partial(loss, remat=remat)))(params)
    expected = gradients("none")
    assert all(np.abs(leaf).max() > 1e-4 for leaf in jax.tree.leaves(expected))
    close = functools.partial(np.testing.assert_allclose, atol=1e-5, rtol=1e-4)
    for remat in REMAT_POLICIES.keys() - {"none"}:
        jax.tree.map(close, gradients(remat), expected)


def test_bfloat16_is_for_activations_only():
    config, params = golden_model("qwen3")
    batch = rows([40], 48, config.vocab_size, seed=5)
    model = Transformer(config, jnp.bfloat16, "none")
    loss = lambda params: forward(config, params, *batch, dtype=jnp.bfloat16).mean()
    fresh = jax.eval_shape(model.init, jax.random.key(0), *batch)
    for tree in (fresh, jax.eval_shape(jax.grad(loss), params)):
        assert {leaf.dtype for leaf in jax.tree.leaves(tree)} == {jnp.dtype(jnp.float32)}
    hidden = jax.eval_shape(model.apply, {"params": params}, *batch)
    assert hidden.dtype == jnp.bfloat16

    run = jax.jit(functools.partial(forward, config, params), static_argnames="dtype")
    wide, narrow = run(*batch), run(*batch, dtype=jnp.bfloat16)
    assert narrow.dtype == jnp.float32  # sums stay wide
    difference = np.abs(narrow - wide)
    assert 1e-3 < difference.max() < 0.5  # logits deviate by 1.5
    assert difference.mean() < 0.03
