"""Grouped-query attention over packed rows or a KV cache."""

import jax
import jax.numpy as jnp


def visible(
    query_segments: jax.Array, key_segments: jax.Array, query_slots: jax.Array, key_slots: jax.Array
) -> jax.Array:
    """bool[B, Tq, Tk]: a token sees the tokens of its own segment that do not come after it.

    Args:
      query_segments, key_segments: int32[B, Tq], int32[B, Tk]; packed neighbours differ.
      query_slots, key_slots: int32[Tq], int32[Tk]; places in the row or in the cache.
    """
    same = query_segments[:, :, None] == key_segments[:, None, :]
    return same & (key_slots[None, None, :] <= query_slots[None, :, None])


def attention(query: jax.Array, key: jax.Array, value: jax.Array, mask: jax.Array) -> jax.Array:
    """softmax(q k' / sqrt(d)) v, with logits and softmax in float32 and no repeated keys.

    Args:
      query: [B, Tq, heads, d]; heads is a multiple of kv_heads.
      key, value: [B, Tk, kv_heads, d].
      mask: bool[B, Tq, Tk].

    Returns:
      [B, Tq, heads, d] in the dtype of `value`.
    """
    batch, length, heads, dim = query.shape
    kv_heads = key.shape[2]
    grouped = query.reshape(batch, length, kv_heads, heads // kv_heads, dim)
    logits = jnp.einsum("btkgd,bskd->bkgts", grouped, key, preferred_element_type=jnp.float32)
    logits = jnp.where(mask[:, None, None], logits * dim**-0.5, jnp.finfo(jnp.float32).min)
    probs = jax.nn.softmax(logits, axis=-1).astype(value.dtype)
    out = jnp.einsum("bkgts,bskd->btkgd", probs, value)
    return out.reshape(batch, length, heads, dim)
