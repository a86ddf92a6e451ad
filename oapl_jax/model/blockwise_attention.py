"""Blockwise attention for CPUs: never materializes the [Tq, Tk] weights.

The weights of one pair of blocks are computed, used and dropped, with a running maximum and sum for
the softmax (arXiv 2205.14135, algorithms 1 and 4). Pairs that the mask rules out are skipped.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

BLOCK = 128  # positions; larger blocks leave the cache, smaller ones add loop overhead
LOWEST = float(np.finfo(np.float32).min)
ATTENTION = "attention"  # checkpoint name of the residuals of a kernel's backward pass


def visible(
    query_segments: Int[Array, "B Tq"],
    key_segments: Int[Array, "B Tk"],
    query_slots: Int[Array, " Tq"],
    key_slots: Int[Array, " Tk"],
) -> Bool[Array, "B Tq Tk"]:
    """Causal mask of packed rows: a token sees the past (lower slots) of its own segment."""
    same = query_segments[:, :, None] == key_segments[:, None, :]
    return same & (key_slots[None, None, :] <= query_slots[None, :, None])


def blockwise_attention(
    query: Float[Array, "B Tq H D"],
    key: Float[Array, "B Tk K D"],
    value: Float[Array, "B Tk K D"],
    query_segments: Int[Array, "B Tq"],
    key_segments: Int[Array, "B Tk"],
    query_slots: Int[Array, " Tq"],
) -> Float[Array, "B Tq H D"]:
    """softmax(q k' / sqrt(d)) v under the mask of `visible`; logits, sums and softmax in float32.

    Key s has slot s, and each query's own key is among the keys; the output's dtype is `value`'s.
    """
    length, keys = query.shape[1], key.shape[1]
    query_block, key_block = min(BLOCK, length), min(BLOCK, keys)

    def fill(x, block, value=0):
        ends = ((0, 0), (0, -x.shape[1] % block), *[(0, 0)] * (x.ndim - 2))
        return jnp.pad(x, ends, constant_values=value)

    out: Any = _attend(
        fill(query, query_block),
        fill(key, key_block),
        fill(value, key_block),
        fill(query_segments, query_block, -1),  # no token's segment
        fill(key_segments, key_block, -1),
        jnp.pad(query_slots, (0, -length % query_block), mode="edge"),
        query_block,
        key_block,
    )
    return out[:, :length]


@functools.partial(jax.custom_vjp, nondiff_argnums=(6, 7))
def _attend(*arguments):
    return _forward(*arguments)[0]


def _forward(query, key, value, query_segments, key_segments, query_slots, query_block, key_block):
    blocks = _Blocks(key, value, key_segments, key_block)

    def one_block(block):
        queries, segments, slots = block

        def visit(j, carry):
            out, top, total = carry
            logits = blocks.logits(j, queries, segments, slots)
            new_top = jnp.maximum(top, logits.max(-1))
            weights = jnp.exp(logits - new_top[..., None])
            shrink = jnp.exp(top - new_top)
            values = blocks.at(blocks.values, j)
            add = _dot("bkrs,bksd->bkrd", weights.astype(value.dtype), values)
            return out * shrink[..., None] + add, new_top, total * shrink + weights.sum(-1)

        nothing = jnp.zeros(queries.shape[:-1], jnp.float32)
        start = jnp.zeros(queries.shape, jnp.float32), nothing + LOWEST, nothing
        out, top, total = jax.lax.fori_loop(*blocks.range(segments, slots), visit, start)
        return (out / total[..., None]).astype(value.dtype), top + jnp.log(total)

    rows = _by_row(query, query_block, key.shape[2])
    places = _split(query_segments, query_block), query_slots.reshape(-1, query_block)
    out, log_total = jax.lax.map(one_block, (rows, *places))
    out = checkpoint_name(_from_rows(out, query.shape), ATTENTION)
    log_total = checkpoint_name(log_total, ATTENTION)
    kept = query, key, value, query_segments, key_segments, query_slots, out, log_total
    return out, kept


def _backward(query_block, key_block, kept, d_out):
    query, key, value, query_segments, key_segments, query_slots, out, log_total = kept
    blocks = _Blocks(key, value, key_segments, key_block)
    scale = query.shape[-1] ** -0.5

    def one_block(d_keys_values, block):
        queries, d_outs, share, log_totals, segments, slots = block

        def visit(j, carry):
            d_query, d_key, d_value = carry
            keys, values = blocks.at(blocks.keys, j), blocks.at(blocks.values, j)
            weights = jnp.exp(blocks.logits(j, queries, segments, slots) - log_totals[..., None])
            d_weights = _dot("bkrd,bksd->bkrs", d_outs, values)
            d_logits = (weights * (d_weights - share) * scale).astype(query.dtype)
            d_query += _dot("bkrs,bksd->bkrd", d_logits, keys)
            d_key = blocks.add(d_key, j, _dot("bkrs,bkrd->bksd", d_logits, queries))
            weights = weights.astype(d_outs.dtype)
            d_value = blocks.add(d_value, j, _dot("bkrs,bkrd->bksd", weights, d_outs))
            return d_query, d_key, d_value

        start = jnp.zeros(queries.shape, jnp.float32), *d_keys_values
        d_query, *rest = jax.lax.fori_loop(*blocks.range(segments, slots), visit, start)
        return tuple(rest), d_query.astype(query.dtype)

    rows = functools.partial(_by_row, block=query_block, kv_heads=key.shape[2])
    share = jnp.sum(d_out.astype(jnp.float32) * out, axis=-1, keepdims=True)
    nothing = jnp.zeros(blocks.keys.shape, jnp.float32)
    places = _split(query_segments, query_block), query_slots.reshape(-1, query_block)
    given = rows(query), rows(d_out), rows(share), log_total, *places
    (d_key, d_value), d_query = jax.lax.scan(one_block, (nothing, nothing), given)
    back = lambda x, like: x.swapaxes(1, 2).astype(like.dtype)
    d_query = _from_rows(d_query, query.shape)
    return d_query, back(d_key, key), back(d_value, value), None, None, None


_attend.defvjp(_forward, _backward)


class _Blocks:
    """Key and value blocks for a block of queries, and the range of blocks with visible keys."""

    def __init__(self, key: jax.Array, value: jax.Array, segments: jax.Array, block: int):
        self.keys, self.values = key.swapaxes(1, 2), value.swapaxes(1, 2)
        self._segments, self._block = segments, block

    def at(self, x: jax.Array, j: jax.Array) -> jax.Array:
        """Block j of [B, kv_heads, Tk, d]."""
        return jax.lax.dynamic_slice_in_dim(x, j * self._block, self._block, axis=2)

    def add(self, x: jax.Array, j: jax.Array, more: jax.Array) -> jax.Array:
        return jax.lax.dynamic_update_slice_in_dim(x, self.at(x, j) + more, j * self._block, axis=2)

    def range(self, segments: jax.Array, slots: jax.Array) -> tuple[jax.Array, jax.Array]:
        """First block with a key that some query may see, and one past the last."""
        by_block = self._segments.reshape(self._segments.shape[0], -1, self._block)
        low, high = segments.min(-1, keepdims=True), segments.max(-1, keepdims=True)
        overlap = (low <= by_block.max(-1)) & (by_block.min(-1) <= high)
        starts = self._block * jnp.arange(by_block.shape[1])
        seen = jnp.any(overlap, axis=0) & (starts <= slots.max())
        return jnp.argmax(seen), len(seen) - jnp.argmax(seen[::-1])

    def logits(self, j, queries: jax.Array, segments: jax.Array, slots: jax.Array) -> jax.Array:
        """float32[B, kv_heads, R, block], LOWEST where masked."""
        start = j * self._block
        key_slots = start + jnp.arange(self._block)
        key_segments = jax.lax.dynamic_slice_in_dim(self._segments, start, self._block, axis=1)
        mask = visible(segments, key_segments, slots, key_slots)
        logits = _dot("bkrd,bksd->bkrs", queries, self.at(self.keys, j))
        logits *= self.keys.shape[-1] ** -0.5
        grouped = logits.reshape(*logits.shape[:2], -1, *mask.shape[1:])
        return jnp.where(mask[:, None, None], grouped, LOWEST).reshape(logits.shape)


_dot: Callable[..., jax.Array] = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)


def _split(x: jax.Array, block: int) -> jax.Array:
    """[B, T] -> [T / block, B, block]."""
    return x.reshape(x.shape[0], -1, block).swapaxes(0, 1)


def _by_row(x: jax.Array, block: int, kv_heads: int) -> jax.Array:
    """[B, T, heads, d] -> [T / block, B, kv_heads, R, d], R = heads / kv_heads x block queries."""
    batch, _, heads, dim = x.shape
    x = x.reshape(batch, -1, block, kv_heads, heads // kv_heads, dim)
    return x.transpose(1, 0, 3, 4, 2, 5).reshape(x.shape[1], batch, kv_heads, -1, dim)


def _from_rows(x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """The inverse of `_by_row`, to [B, T, heads, d]."""
    batch, length, heads, dim = shape
    blocks, kv_heads = x.shape[0], x.shape[2]
    x = x.reshape(blocks, batch, kv_heads, heads // kv_heads, length // blocks, dim)
    return x.transpose(1, 0, 4, 2, 3, 5).reshape(shape)
