"""From hidden states to log-probabilities, without the [B, T, V] array of logits.

The output matrix is the largest of all. It is gathered from `fsdp` once, and its gradient scattered
once, however many chunks there are; the compiler alone would do both for every chunk.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

from oapl_jax.model.sharding import ROWS
from oapl_jax.model.transformer import logits


def token_logp(
    hidden: Float[Array, "B T D"],
    head_matrix: Float[Array, "D V"],
    targets: Int[Array, "B T"],
    wanted: Bool[Array, "B T"],
    *,
    temperature: float,
    chunk: int,
) -> tuple[Float[Array, "B T"], Float[Array, "B T"]]:
    """log softmax(logits / temperature)[target] and the entropy of that softmax, in float32.

    Only wanted places are computed, the others are 0: in each row (in each device's part of it,
    over `context`) they are brought together in front, and the loop over chunks ends behind them.
    Each chunk's logits are made, reduced, dropped, and made again for the backward pass, so the
    largest temporary is [B, chunk, V]. The entropy carries no gradient.

    Args:
      hidden: final hidden states.
      head_matrix: the output matrix.
      targets: the token whose log-probability is asked for at each place.
      wanted: the places.
      temperature: of the sampler; both sides of a ratio need the same.
      chunk: places of a row at a time.
    """
    mesh = jax.sharding.get_abstract_mesh()
    parts = 1 if mesh.empty else mesh.shape["context"]
    most = jnp.max(jnp.sum(wanted.reshape(-1, wanted.shape[1] // parts), axis=-1))
    of_rows = functools.partial(_of_rows, temperature=temperature, chunk=chunk)
    if mesh.empty or mesh.size == 1:  # where a gather would be a copy
        return of_rows(hidden, head_matrix, targets, wanted, most)

    def on_device(hidden, part, *rest):
        # The TPU compiler dies of a gradient that is scattered narrow, widened and added up in a
        # loop over micro-batches (a check in its while_loop_all_reduce_code_motion); not behind a
        # barrier.
        part = jax.lax.optimization_barrier(part)
        # It moves in the dtype of the activations; sums over chunks are float32.
        whole = jax.lax.all_gather(part.astype(hidden.dtype), "fsdp", axis=0, tiled=True)
        return of_rows(hidden, whole.astype(jnp.float32), *rest)

    places = P(*ROWS, "context")
    return jax.shard_map(
        on_device,
        in_specs=(places, P("fsdp"), places, places, P()),
        out_specs=places,
        axis_names=set(mesh.axis_names) - {"tensor"},  # a split vocabulary is the compiler's
        check_vma=False,
    )(hidden, head_matrix, targets, wanted, most)


def _of_rows(hidden, head_matrix, targets, wanted, most, *, temperature, chunk):
    length = wanted.shape[1]
    order = jnp.argsort(~wanted, axis=1, stable=True)
    fill = lambda x: jnp.pad(x, ((0, 0), (0, -length % chunk), *[(0, 0)] * (x.ndim - 2)))
    found: Any = _of_chunks(
        fill(jnp.take_along_axis(hidden, order[..., None], axis=1)),
        head_matrix,
        fill(jnp.take_along_axis(targets, order, axis=1)),
        -(-most // chunk),
        temperature,
        chunk,
    )
    back = jnp.argsort(order, axis=1)
    spread = lambda x: jnp.where(wanted, jnp.take_along_axis(x, back, axis=1), 0.0)
    return jax.tree.map(spread, found)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _of_chunks(hidden, head_matrix, targets, turns, temperature, chunk):
    """Log-probs and entropies of the first `turns` chunks of places, and 0 behind them."""
    return _forward(hidden, head_matrix, targets, turns, temperature, chunk)[0]


def _forward(hidden, head_matrix, targets, turns, temperature, chunk):
    narrow = head_matrix.astype(hidden.dtype)

    def visit(i, written):
        scaled = logits(_chunk(hidden, i, chunk), narrow) / temperature
        normaliser = jax.nn.logsumexp(scaled, axis=-1)
        chosen = jnp.take_along_axis(scaled, _chunk(targets, i, chunk)[..., None], axis=-1)
        table = scaled - normaliser[..., None]
        entropy = -jnp.sum(jnp.exp(table) * table, axis=-1)
        made = chosen[..., 0] - normaliser, entropy, normaliser
        return tuple(_write(x, i, y) for x, y in zip(written, made, strict=True))

    blank = jnp.zeros(targets.shape, jnp.float32)
    logp, entropy, normaliser = _loop(targets.shape[1] // chunk, turns, visit, (blank,) * 3)
    return (logp, entropy), (hidden, narrow, targets, turns, normaliser)


def _backward(temperature, chunk, kept, d_out):
    hidden, narrow, targets, turns, normaliser = kept
    d_logp = d_out[0] / temperature

    def visit(i, written):
        d_hidden, d_matrix = written
        states, seed = _chunk(hidden, i, chunk), _chunk(d_logp, i, chunk)[..., None]
        scaled = logits(states, narrow) / temperature
        probs = jnp.exp(scaled - _chunk(normaliser, i, chunk)[..., None])
        target = _chunk(targets, i, chunk)[..., None] == jnp.arange(narrow.shape[1])
        d_logits = ((target - probs) * seed).astype(hidden.dtype)
        product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
        d_states = product("btv,dv->btd", d_logits, narrow).astype(hidden.dtype)
        d_matrix += product("btd,btv->dv", states, d_logits)
        return _write(d_hidden, i, d_states), d_matrix

    start = jnp.zeros_like(hidden), jnp.zeros(narrow.shape, jnp.float32)
    d_hidden, d_matrix = _loop(targets.shape[1] // chunk, turns, visit, start)
    return d_hidden, d_matrix, None, None


_of_chunks.defvjp(_forward, _backward)


def _loop(most: int, turns, visit, start):
    """The name says to who reads the compiled program what the bound, which is data, does not."""
    with jax.named_scope(f"at_most_{most}"):
        return jax.lax.fori_loop(0, turns, visit, start)


def _chunk(x, i, chunk):
    return jax.lax.dynamic_slice_in_dim(x, i * chunk, chunk, axis=1)


def _write(x, i, part):
    return jax.lax.dynamic_update_slice_in_dim(x, part, i * part.shape[1], axis=1)
