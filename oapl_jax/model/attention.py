"""Grouped-query attention: of the learner over packed rows, of a sampler over its cache.

The learner's has a kernel for each platform, and one way to lie over a mesh: rows and heads stay
where they are; over `context`, keys and values are gathered and queries exchanged.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from oapl_jax.errors import UserError
from oapl_jax.model.blockwise_attention import LOWEST, blocked_attention, visible
from oapl_jax.model.sharding import ROWS, platform
from oapl_jax.model.splash import LANES, splash_kernel

# What attention on a GPU may lay out for all pairs of places: in half precision a row of 11,585.
QUADRATIC_BYTES = 256 << 20


def masked_attention(
    query: jax.Array, key: jax.Array, value: jax.Array, mask: jax.Array
) -> jax.Array:
    """softmax(q k' / sqrt(d)) v, with logits and softmax in float32 and no repeated keys.

    All weights exist at a time: it is for the short queries of a sampler, and the reference that
    every kernel must equal.

    Args:
      query: [B, Tq, heads, d]; heads is a multiple of kv_heads.
      key, value: [B, Tk, kv_heads, d].
      mask: bool[B, Tq, Tk].

    Returns:
      [B, Tq, heads, d] in the dtype of `value`.
    """
    batch, length, heads, dim = query.shape
    kv_heads = key.shape[2]
    # In this order of axes a CPU turns neither keys nor values around.
    rows = query.reshape(batch, length, kv_heads, heads // kv_heads, dim).transpose(0, 2, 3, 1, 4)
    logits = jnp.einsum("bkgtd,bskd->bkgts", rows, key, preferred_element_type=jnp.float32)
    logits = jnp.where(mask[:, None, None], logits * dim**-0.5, LOWEST)
    probs = jax.nn.softmax(logits, axis=-1).astype(value.dtype)
    out = jnp.einsum("bkgts,bskd->bkgtd", probs, value)
    return out.transpose(0, 3, 1, 2, 4).reshape(batch, length, heads, dim)


def fused_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    query_segments: jax.Array,
    key_segments: jax.Array,
    query_slots: jax.Array,
) -> jax.Array:
    """The same by cuDNN's kernel, or by what XLA fuses in float32, for which cuDNN has none.

    Segments reach both as a mask of all pairs: of packed rows jax's public function for cuDNN knows
    no more than one length each.
    """
    key_slots = jnp.arange(key.shape[1])
    mask = visible(query_segments, key_segments, query_slots, key_slots)[:, None]
    implementation = "xla" if query.dtype == jnp.float32 else "cudnn"
    return jax.nn.dot_product_attention(query, key, value, mask=mask, implementation=implementation)


def gpu_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    query_segments: jax.Array,
    key_segments: jax.Array,
    query_slots: jax.Array,
) -> jax.Array:
    """`fused_attention` up to QUADRATIC_BYTES, `blocked_attention` for longer rows.

    What grows with the square of the length is cuDNN's mask, two bytes a pair, and XLA's logits,
    four bytes a pair and head.
    """
    batch, length, heads, _ = query.shape
    per_pair = 4 * heads if query.dtype == jnp.float32 else 2
    fits = batch * length * key.shape[1] * per_pair <= QUADRATIC_BYTES
    kernel = fused_attention if fits else blocked_attention
    return kernel(query, key, value, query_segments, key_segments, query_slots)


# Platform -> what the places of a device must be a multiple of, and a function of (heads, slots,
# mesh) that makes a kernel and says along which axes the arrays in it lie, if it has any.
KERNELS = {
    "cpu": (2, lambda *_: (jax.tree_util.Partial(blocked_attention), P())),
    "gpu": (2, lambda *_: (jax.tree_util.Partial(gpu_attention), P())),
    "tpu": (LANES, splash_kernel),
}


def attention(query: jax.Array, key: jax.Array, value: jax.Array, segments: jax.Array) -> jax.Array:
    """softmax(q k' / sqrt(d)) v over packed rows: a token sees the past of its own segment.

    The kernel is that of the platform of the mesh's devices, which may be absent: a program for a
    TPU is compiled on any host. Outside a mesh it is the CPU's.

    Args:
      query: [B, T, heads, d]; heads is a multiple of kv_heads.
      key, value: [B, T, kv_heads, d].
      segments: int32[B, T].

    Returns:
      [B, T, heads, d] in the dtype of `value`.

    Raises:
      UserError: if the mesh can't divide the key heads.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        slots = jnp.arange(query.shape[1])
        return blocked_attention(query, key, value, segments, segments, slots)
    multiple, make_kernel = KERNELS[platform()]
    return over_mesh(make_kernel, query, key, value, segments, multiple=multiple)


def over_mesh(make_kernel: Any, query, key, value, segments, *, multiple: int) -> jax.Array:
    """`attention` by a kernel on every device.

    Places are split over `context` in order, so that the first devices would see little and the
    last ones all; half of each one's queries are therefore exchanged, i with context - 1 - i, and
    all do the same work. Rows are filled up to what kernel and axis divide.

    Args:
      make_kernel, multiple: as in KERNELS.
    """
    mesh = jax.sharding.get_abstract_mesh()
    context, tensor = mesh.shape["context"], mesh.shape["tensor"]
    places, heads, kv_heads = query.shape[1], query.shape[2], key.shape[2]
    if kv_heads % tensor:
        raise UserError(
            f"mesh.tensor={tensor} does not divide the {kv_heads} key heads of the model; choose a "
            "divisor"
        )

    def exchange(x):
        kept, given = jnp.split(x, 2, axis=1)
        pairs = [(i, context - 1 - i) for i in range(context)]
        return jnp.concatenate([kept, jax.lax.ppermute(given, "context", pairs)], axis=1)

    def on_device(kernel, query, key, value, segments, slots):
        if context == 1:
            return kernel(query, key, value, segments, segments, slots)
        whole = lambda x: jax.lax.all_gather(x, "context", axis=1, tiled=True)
        query, query_segments = exchange(query), exchange(segments)
        out = kernel(query, whole(key), whole(value), query_segments, whole(segments), slots)
        return exchange(out)

    length = places + -places % (context * multiple)
    if length > places:
        ends = ((0, 0), (0, length - places))
        query, key, value = (jnp.pad(x, (*ends, (0, 0), (0, 0))) for x in (query, key, value))
        segments = jnp.pad(segments, ends, constant_values=-1)  # that no token has
    slots = np.arange(length, dtype=np.int32)
    if context > 1:
        parts = slots.reshape(context, 2, -1)
        slots = np.stack([parts[:, 0], parts[::-1, 1]], axis=1).reshape(-1)
    kernel, tables = make_kernel(heads // tensor, slots, mesh)
    by_head, by_place = P(*ROWS, "context", "tensor"), P(*ROWS, "context")
    out = jax.shard_map(
        on_device,
        in_specs=(tables, by_head, by_head, by_head, by_place, P("context")),
        out_specs=by_head,
        check_vma=False,
    )(kernel, query, key, value, segments, slots)
    return out[:, :places]
