"""Log-probabilities in chunks against a whole log_softmax: values, gradients, places, memory."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from small_models import small_mesh

from oapl_jax.model import logprobs
from oapl_jax.model.logprobs import token_logp
from oapl_jax.model.transformer import logits

close = functools.partial(np.testing.assert_allclose, atol=1e-5, rtol=1e-5)


def random_states(rows, length, dtype=jnp.float32):
    """(hidden [rows, length, 16], head [16, 50], targets, a cotangent of the log-probs)."""
    rng = np.random.default_rng(length)
    hidden, head = (jnp.asarray(rng.normal(0, 1, s), dtype) for s in ((rows, length, 16), (16, 50)))
    return hidden, head, rng.integers(0, 50, (rows, length)), rng.normal(0, 1, (rows, length))


def plain(hidden, head, targets, temperature):
    table = jax.nn.log_softmax(hidden @ head / temperature)
    logp = jnp.take_along_axis(table, targets[..., None], axis=-1)[..., 0]
    return logp, -jnp.sum(jnp.exp(table) * table, axis=-1)


def value_and_gradients(f, hidden, head, seed):
    """((sum of seed * logp, (logp, entropy)), gradients) of f(hidden, head) -> (logp, entropy)."""

    def total(hidden, head):
        logp, entropy = f(hidden, head)
        return jnp.sum(seed * logp), (logp, entropy)

    return jax.jit(jax.value_and_grad(total, (0, 1), has_aux=True))(hidden, head)


@pytest.mark.parametrize(("length", "chunk"), [(1, 8), (5, 8), (16, 8), (21, 8), (21, 1), (21, 64)])
@pytest.mark.parametrize("temperature", [1.0, 0.6, 3.0])
def test_chunks_equal_log_softmax_with_their_gradients(length, chunk, temperature):
    hidden, head, targets, seed = random_states(3, length)
    score = functools.partial(token_logp, temperature=temperature, chunk=chunk)
    chunked = lambda hidden, head: score(hidden, head, targets, jnp.ones((3, length), bool))
    whole = lambda hidden, head: plain(hidden, head, targets, temperature)
    found, expected = (value_and_gradients(f, hidden, head, seed) for f in (chunked, whole))
    jax.tree.map(close, found, expected)
    of_entropy = jax.grad(lambda hidden: chunked(hidden, head)[1].sum())(hidden)
    np.testing.assert_array_equal(of_entropy, 0.0)


WITH_TENSOR = (1, 2, 2, 2)


@pytest.mark.parametrize("sizes", [None, (1, 2, 1, 1), (2, 1, 2, 1), WITH_TENSOR])
def test_only_wanted_positions_are_computed(sizes, monkeypatch):
    """Rows with many, few and no wanted places, in ten places of which at most 6 are wanted."""
    hidden, head, targets, seed = random_states(4, 20)
    wanted = np.zeros((4, 20), bool)
    wanted[0, [0, 3, 4, 5, 8, 9]] = wanted[1, 7] = wanted[2, 12:18] = True
    chunks = []

    def counted(hidden, head):
        if sizes != WITH_TENSOR:  # where the compiler can't have side effects
            jax.debug.callback(lambda: chunks.append(1))
        return logits(hidden, head)

    monkeypatch.setattr(logprobs, "logits", counted)
    score = functools.partial(token_logp, temperature=0.7, chunk=2)
    chunked = lambda hidden, head: score(hidden, head, targets, wanted)
    whole = lambda hidden, head: tuple(x * wanted for x in plain(hidden, head, targets, 0.7))
    expected = value_and_gradients(whole, hidden, head, seed)
    if sizes is None:
        found = value_and_gradients(chunked, hidden, head, seed)
    else:
        mesh = small_mesh(*sizes)
        given = jax.device_put((hidden, head), NamedSharding(mesh, P()))
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            found = value_and_gradients(chunked, *given, seed)
    jax.tree.map(close, found, expected)
    jax.effects_barrier()
    if sizes != WITH_TENSOR:
        # Three chunks on each device, once more for the backward pass.
        assert len(chunks) == 2 * 3 * int(np.prod(sizes or 1))


def test_bfloat16_states_are_normalised_in_float32():
    hidden, head, targets, _ = random_states(2, 12, jnp.bfloat16)
    everywhere, wide = jnp.ones((2, 12), bool), head.astype(jnp.float32)
    logp, entropy = token_logp(hidden, wide, targets, everywhere, temperature=0.7, chunk=5)
    assert logp.dtype == entropy.dtype == jnp.float32
    table = np.asarray(hidden, np.float64) @ np.asarray(head, np.float64) / 0.7
    table -= np.log(np.sum(np.exp(table), axis=-1, keepdims=True))
    expected = np.take_along_axis(table, targets[..., None], axis=-1)[..., 0]
    np.testing.assert_allclose(logp, expected, atol=1e-5)


def test_temporaries_are_a_tenth_of_those_of_the_whole_vocabulary():
    """Of value and gradient, as compiled for batch 8, length 1024, vocabulary 32000."""
    spec = lambda dtype, *shape: jax.ShapeDtypeStruct(shape, dtype)
    shapes = spec(jnp.float32, 8, 1024, 64), spec(jnp.float32, 64, 32000), spec(int, 8, 1024)

    def chunked(hidden, head, targets):
        everywhere = jnp.ones(targets.shape, bool)
        return token_logp(hidden, head, targets, everywhere, temperature=0.7, chunk=64)[0].sum()

    def temporaries(f):
        both = jax.jit(jax.value_and_grad(f, (0, 1)))
        analysis: Any = both.lower(*shapes).compile().memory_analysis()
        return analysis.temp_size_in_bytes

    whole = temporaries(lambda hidden, head, targets: plain(hidden, head, targets, 0.7)[0].sum())
    assert whole > 8 * 1024 * 32000 * 4  # the naive form does hold [B, T, V]
    assert temporaries(chunked) <= whole / 10


def test_a_frozen_head_has_no_gradient_and_the_states_have_theirs():
    rng = np.random.default_rng(7)
    hidden, head = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((2, 8, 4), (4, 9)))
    targets, everywhere = rng.integers(0, 9, (2, 8)), np.ones((2, 8), bool)

    def total(hidden, head, frozen_head):
        settings = dict(temperature=0.7, chunk=3, frozen_head=frozen_head)
        return token_logp(hidden, head, targets, everywhere, **settings)[0].sum()

    gradient = jax.grad(total, argnums=(0, 1))
    (d_hidden, d_head), (d_frozen, nothing) = (gradient(hidden, head, f) for f in (False, True))
    np.testing.assert_array_equal(d_frozen, d_hidden)
    assert np.abs(d_head).max() > 0.1
    np.testing.assert_array_equal(nothing, 0.0)
