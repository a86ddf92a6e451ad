"""Chunked log-softmax: hidden states to token log-probs without the [B, T, V] logits.

The output matrix is all-gathered over `fsdp` once and its gradient reduce-scattered once; the
compiler alone would do both for every chunk.
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
    mask: Bool[Array, "B T"],
    *,
    temperature: float,
    chunk: int,
    frozen_head: bool = False,
) -> tuple[Float[Array, "B T"], Float[Array, "B T"]]:
    """log softmax(logits / temperature)[target] and the entropy of that softmax, in float32.

    Only positions in `mask` are computed, the others are 0: in each device's part of a row they
    are sorted to the front, and the loop over chunks ends behind them. A chunk's logits are
    recomputed for the backward pass, so the largest temporary is [B, chunk, V]. The entropy carries
    no gradient, and neither does a `frozen_head`. `temperature` is the sampler's: both sides of a
    ratio need the same.
    """
    mesh = jax.sharding.get_abstract_mesh()
    parts = 1 if mesh.empty else mesh.shape["context"]
    most = jnp.max(jnp.sum(mask.reshape(-1, mask.shape[1] // parts), axis=-1))
    settings: Any = dict(temperature=temperature, chunk=chunk, frozen_head=frozen_head)
    of_rows = functools.partial(_of_rows, **settings)
    if mesh.empty or mesh.size == 1:  # an all-gather would be a copy
        return of_rows(hidden, head_matrix, targets, mask, most)

    def on_device(hidden, part, *rest):
        # Without the barrier the TPU compiler fails a check (while_loop_all_reduce_code_motion) on
        # gradients that are scattered narrow, widened and summed in a loop over micro-batches.
        part = jax.lax.optimization_barrier(part)
        # All-gathered in the dtype of the activations; sums over chunks are float32.
        whole = jax.lax.all_gather(part.astype(hidden.dtype), "fsdp", axis=0, tiled=True)
        return of_rows(hidden, whole.astype(jnp.float32), *rest)

    positions = P(*ROWS, "context")
    return jax.shard_map(
        on_device,
        in_specs=(positions, P("fsdp"), positions, positions, P()),
        out_specs=positions,
        axis_names=set(mesh.axis_names) - {"tensor"},  # the compiler handles a split vocabulary
        check_vma=False,
    )(hidden, head_matrix, targets, mask, most)


def _of_rows(hidden, head_matrix, targets, mask, most, *, temperature, chunk, frozen_head):
    length = mask.shape[1]
    order = jnp.argsort(~mask, axis=1, stable=True)
    fill = lambda x: jnp.pad(x, ((0, 0), (0, -length % chunk), *[(0, 0)] * (x.ndim - 2)))
    found: Any = _of_chunks(
        fill(jnp.take_along_axis(hidden, order[..., None], axis=1)),
        head_matrix,
        fill(jnp.take_along_axis(targets, order, axis=1)),
        -(-most // chunk),
        temperature,
        chunk,
        frozen_head,
    )
    back = jnp.argsort(order, axis=1)
    spread = lambda x: jnp.where(mask, jnp.take_along_axis(x, back, axis=1), 0.0)
    return jax.tree.map(spread, found)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def _of_chunks(*arguments):
    """Log-probs and entropies of the first `num_chunks` chunks of positions, then 0."""
    return _forward(*arguments)[0]


def _forward(hidden, head_matrix, targets, num_chunks, temperature, chunk, frozen_head):
    del frozen_head
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
    logp, entropy, normaliser = _loop(targets.shape[1] // chunk, num_chunks, visit, (blank,) * 3)
    return (logp, entropy), (hidden, narrow, targets, num_chunks, normaliser)


def _backward(temperature, chunk, frozen_head, kept, d_out):
    hidden, narrow, targets, num_chunks, normaliser = kept
    d_logp = d_out[0] / temperature

    def visit(i, written):
        d_hidden, *d_matrix = written
        states, seed = _chunk(hidden, i, chunk), _chunk(d_logp, i, chunk)[..., None]
        scaled = logits(states, narrow) / temperature
        probs = jnp.exp(scaled - _chunk(normaliser, i, chunk)[..., None])
        target = _chunk(targets, i, chunk)[..., None] == jnp.arange(narrow.shape[1])
        d_logits = ((target - probs) * seed).astype(hidden.dtype)
        product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
        d_states = product("btv,dv->btd", d_logits, narrow).astype(hidden.dtype)
        d_matrix = [x + product("btd,btv->dv", states, d_logits) for x in d_matrix]
        return _write(d_hidden, i, d_states), *d_matrix

    blank = () if frozen_head else (jnp.zeros(narrow.shape, jnp.float32),)
    start = jnp.zeros_like(hidden), *blank
    d_hidden, *d_matrix = _loop(targets.shape[1] // chunk, num_chunks, visit, start)
    return d_hidden, *(d_matrix or [None]), None, None


_of_chunks.defvjp(_forward, _backward)


def _loop(most: int, num_chunks, visit, start):
    """Loops `num_chunks` times, which is data; the scope tells readers of HLO the bound."""
    with jax.named_scope(f"at_most_{most}"):
        return jax.lax.fori_loop(0, num_chunks, visit, start)


def _chunk(x, i, chunk):
    return jax.lax.dynamic_slice_in_dim(x, i * chunk, chunk, axis=1)


def _write(x, i, part):
    return jax.lax.dynamic_update_slice_in_dim(x, part, i * part.shape[1], axis=1)
