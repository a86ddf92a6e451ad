"""Splash attention, JAX's Pallas kernel for TPUs, over packed rows.

The [Tq, Tk] weights never leave the chip's vector memory, keys are not repeated for the query heads
that share them, and blocks of the future are skipped.
"""

import functools
from typing import Any

import jax
import numpy as np
from jax.experimental.pallas.ops.tpu import splash_attention as splash
from jax.sharding import AbstractMesh, NamedSharding
from jax.sharding import PartitionSpec as P

from oapl_jax.model.blockwise_attention import ATTENTION

LANES = 128  # of a vector register; every block is a multiple
BLOCKS = (512, 256, LANES)


def splash_kernel(
    heads: int, slots: np.ndarray, mesh: AbstractMesh, *, interpret: bool = False
) -> tuple[Any, Any]:
    """Makes a kernel for `attention.over_mesh`, and the sharding of its tables.

    Args:
      heads: query heads of one device.
      slots: int[T], the slot of each query of a row; split over the axis `context`.
      mesh: its `context` must divide T into multiples of LANES.
      interpret: run the kernel's program by ordinary operations, on any platform.
    """
    length, context = len(slots), mesh.shape["context"]
    block = next(b for b in BLOCKS if length // context % b == 0)
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
    return jax.tree_util.Partial(_rows, kernel), jax.tree_util.Partial(_rows, split)


def _rows(kernel, query, key, value, query_segments, key_segments, query_slots):
    del query_slots  # the kernel's mask contains them
    heads_first = functools.partial(jax.numpy.swapaxes, axis1=1, axis2=2)
    query = (query * query.shape[-1] ** -0.5).astype(query.dtype)  # the kernel does not scale
    segments = splash.SegmentIds(query_segments, key_segments)
    return heads_first(
        jax.vmap(kernel)(heads_first(query), heads_first(key), heads_first(value), segments)
    )
