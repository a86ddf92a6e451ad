"""Grouped-query attention: the learner's over packed rows, the sampler's over its cache."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas.ops.gpu import attention as pallas_gpu
from jax.experimental.pallas.ops.tpu import splash_attention as splash
from jax.sharding import AbstractMesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

from oapl_jax.errors import UserError
from oapl_jax.model.blockwise_attention import ATTENTION, LOWEST, blockwise_attention, visible
from oapl_jax.model.sharding import ROWS, platform, smaller_axis

# Bound on a [Tq, Tk] array of `mask_attention`: in half precision a row of 11,585 tokens.
QUADRATIC_BYTES = 256 << 20
TILE = 128  # most positions of a block of `segment_attention`; divides the rows
# Numbers in a block: one of queries, two of keys and two of values fit 99 KB of shared memory.
TILE_NUMBERS = 128 * 64
LANES = 128  # of a TPU's vector register; every block of splash attention is a multiple
SPLASH_BLOCKS = (512, 256, LANES)


def masked_attention(
    query: Float[Array, "B Tq H D"],
    key: Float[Array, "B Tk K D"],
    value: Float[Array, "B Tk K D"],
    mask: Bool[Array, "B Tq Tk"],
) -> Float[Array, "B Tq H D"]:
    """softmax(q k' / sqrt(d)) v, with logits and softmax in float32 and no repeated keys.

    Holds all weights at a time: for the short queries of a sampler, and as the reference that every
    kernel must equal. H is a multiple of K; the output has the dtype of `value`.
    """
    batch, length, heads, dim = query.shape
    kv_heads = key.shape[2]
    # This order of axes avoids transposing K and V on CPU.
    rows = query.reshape(batch, length, kv_heads, heads // kv_heads, dim).transpose(0, 2, 3, 1, 4)
    logits = jnp.einsum("bkgtd,bskd->bkgts", rows, key, preferred_element_type=jnp.float32)
    logits = jnp.where(mask[:, None, None], logits * dim**-0.5, LOWEST)
    probs = jax.nn.softmax(logits, axis=-1).astype(value.dtype)
    out = jnp.einsum("bkgts,bskd->bkgtd", probs, value)
    return out.transpose(0, 3, 1, 2, 4).reshape(batch, length, heads, dim)


def segment_attention(
    query, key, value, query_segments, key_segments, query_slots, *, interpret: bool = False
) -> jax.Array:
    """Attention with the arguments of `blockwise_attention` by JAX's Pallas kernel for GPUs.

    The kernel compares the segment ids of a block of queries with those of a block of keys, so
    memory is linear in the length. Blocks of the future are skipped; those between two segments are
    computed and masked. Queries have the slots of their keys, and TILE divides their number.

    Args:
      interpret: run the kernel's program by ordinary operations, on any platform.
    """
    del key_segments, query_slots  # those of the queries, and their order
    heads, dim = query.shape[2:]
    block = min(TILE, TILE_NUMBERS // pl.next_power_of_2(dim))
    sizes = dataclasses.replace(pallas_gpu.BlockSizes.get_default(), block_q=block, block_k=block)
    # The kernel has a key head for each query head.
    key, value = (jnp.repeat(x, heads // x.shape[2], axis=2) for x in (key, value))
    return pallas_gpu.mha(
        query,
        key,
        value,
        query_segments,
        sm_scale=dim**-0.5,
        causal=True,
        block_sizes=sizes,
        interpret=interpret,
    )


def mask_attention(query, key, value, query_segments, key_segments, query_slots) -> jax.Array:
    """Attention with the arguments of `blockwise_attention`, which also computes long rows.

    Up to QUADRATIC_BYTES, cuDNN's kernel computes it, or XLA in float32, for which cuDNN has none.
    Both take a mask of all pairs, so memory is quadratic: cuDNN's mask, two bytes a pair, or XLA's
    logits, four bytes a pair and head.
    """
    batch, length, heads, _ = query.shape
    single = query.dtype == jnp.float32
    if batch * length * key.shape[1] * (4 * heads if single else 2) > QUADRATIC_BYTES:
        return blockwise_attention(query, key, value, query_segments, key_segments, query_slots)
    key_slots = jnp.arange(key.shape[1])
    mask = visible(query_segments, key_segments, query_slots, key_slots)[:, None]
    kernel = "xla" if single else "cudnn"
    return jax.nn.dot_product_attention(query, key, value, mask=mask, implementation=kernel)


def gpu_attention(query, *rest) -> jax.Array:
    """`segment_attention` in half precision; its kernel would round float32 products to TF32."""
    return (mask_attention if query.dtype == jnp.float32 else segment_attention)(query, *rest)


def gpu_kernel(heads: int, slots: np.ndarray, mesh: AbstractMesh) -> tuple[Any, Any]:
    """Makes the kernel for GPUs, with the arguments of `splash_kernel`.

    It is `mask_attention` where `context` splits a row, so that queries are not the keys' ones.
    """
    del heads, mesh
    in_order = np.array_equal(slots, np.arange(len(slots)))
    return jax.tree_util.Partial(gpu_attention if in_order else mask_attention), P()


def splash_kernel(
    heads: int, slots: np.ndarray, mesh: AbstractMesh, *, interpret: bool = False
) -> tuple[Any, Any]:
    """Makes JAX's Pallas kernel for TPUs, and the sharding of its tables.

    The [Tq, Tk] weights never leave the chip's vector memory, keys are not repeated for the query
    heads that share them, and blocks of the future are skipped.

    Args:
      heads: query heads of one device.
      slots: int[T], the slot of each query of a row; `context` divides T into multiples of LANES.
      interpret: run the kernel's program by ordinary operations, on any platform.
    """
    length, context = len(slots), mesh.shape["context"]
    block = next(b for b in SPLASH_BLOCKS if length // context % b == 0)
    sizes: Any = dict.fromkeys(("q", "kv", "q_dkv", "kv_dkv", "q_dq", "kv_dq"), block)
    causal = splash.CausalMask((length, length))
    causal.q_sequence = slots.astype(np.int32)
    kernel = splash.make_splash_mha(
        splash.MultiHeadMask([causal] * heads),
        block_sizes=splash.BlockSizes(**{f"block_{name}": size for name, size in sizes.items()}),
        head_shards=1,
        q_seq_shards=context,
        residual_checkpoint_name=ATTENTION,
        interpret=interpret,
    )
    split = kernel.manual_sharding_spec(NamedSharding(mesh, P(None, "context")))
    return jax.tree_util.Partial(_splash_rows, kernel), jax.tree_util.Partial(_splash_rows, split)


def _splash_rows(kernel, query, key, value, query_segments, key_segments, query_slots):
    del query_slots  # the kernel's mask contains them
    heads_first = functools.partial(jnp.swapaxes, axis1=1, axis2=2)
    query = (query * query.shape[-1] ** -0.5).astype(query.dtype)  # the kernel does not scale
    segments = splash.SegmentIds(query_segments, key_segments)
    out = jax.vmap(kernel)(heads_first(query), heads_first(key), heads_first(value), segments)
    return heads_first(out)


# (query heads of a device, slots, mesh) -> a kernel and the mesh axes of the arrays in it, if any.
MakeKernel = Callable[[int, np.ndarray, AbstractMesh], tuple[Any, Any]]
# Platform -> the positions of a device must be a multiple of this, and its kernel.
KERNELS: dict[str, tuple[int, MakeKernel]] = {
    "cpu": (2, lambda *_: (jax.tree_util.Partial(blockwise_attention), P())),
    "gpu": (TILE, gpu_kernel),
    "tpu": (LANES, splash_kernel),
}


def attention(
    query: Float[Array, "B T H D"],
    key: Float[Array, "B T K D"],
    value: Float[Array, "B T K D"],
    segments: Int[Array, "B T"],
) -> Float[Array, "B T H D"]:
    """softmax(q k' / sqrt(d)) v over packed rows: a token sees the past of its own segment.

    The platform of the mesh's devices selects the kernel, so any host compiles for a TPU; outside a
    mesh it is the CPU's. A mesh that can't divide the key heads raises a UserError.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        slots = jnp.arange(query.shape[1])
        return blockwise_attention(query, key, value, segments, segments, slots)
    multiple, make_kernel = KERNELS[platform()]
    return over_mesh(make_kernel, query, key, value, segments, multiple=multiple)


def over_mesh(make_kernel: MakeKernel, query, key, value, segments, *, multiple: int) -> jax.Array:
    """`attention` by a kernel of KERNELS on every device.

    Rows and heads stay where they are; over `context`, keys and values are all-gathered. Positions
    are split over it in order, so the first devices would see few keys and the last ones all: to
    balance the work, device i exchanges half of its queries with device context - 1 - i. Rows are
    padded to a length that kernel and axis divide.
    """
    mesh = jax.sharding.get_abstract_mesh()
    context, tensor = mesh.shape["context"], mesh.shape["tensor"]
    positions, heads, kv_heads = query.shape[1], query.shape[2], key.shape[2]
    if kv_heads % tensor:
        raise UserError(
            f"mesh.tensor={tensor} does not divide the model's {kv_heads} key heads; "
            f"{smaller_axis(kv_heads, mesh, 'tensor', 'mesh')}"
        )

    def exchange(x):
        kept, given = jnp.split(x, 2, axis=1)
        pairs = [(i, context - 1 - i) for i in range(context)]
        return jnp.concatenate([kept, jax.lax.ppermute(given, "context", pairs)], axis=1)

    def on_device(kernel, query, key, value, segments, slots):
        if context == 1:
            return kernel(query, key, value, segments, segments, slots)
        gather = lambda x: jax.lax.all_gather(x, "context", axis=1, tiled=True)
        query, query_segments = exchange(query), exchange(segments)
        out = kernel(query, gather(key), gather(value), query_segments, gather(segments), slots)
        return exchange(out)

    length = positions + -positions % (context * multiple)
    if length > positions:
        ends = ((0, 0), (0, length - positions))
        query, key, value = (jnp.pad(x, (*ends, (0, 0), (0, 0))) for x in (query, key, value))
        segments = jnp.pad(segments, ends, constant_values=-1)  # no token's segment
    slots = np.arange(length, dtype=np.int32)
    if context > 1:
        parts = slots.reshape(context, 2, -1)
        slots = np.stack([parts[:, 0], parts[::-1, 1]], axis=1).reshape(-1)
    kernel, tables = make_kernel(heads // tensor, slots, mesh)
    by_head, by_position = P(*ROWS, "context", "tensor"), P(*ROWS, "context")
    out = jax.shard_map(
        on_device,
        in_specs=(tables, by_head, by_head, by_head, by_position, P("context")),
        out_specs=by_head,
        check_vma=False,
    )(kernel, query, key, value, segments, slots)
    return out[:, :positions]
