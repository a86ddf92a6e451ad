"""Decoder-only transformer (Qwen3, Qwen2, Llama) for learning on packed rows and for sampling.

`Transformer.apply({"params": params}, tokens, positions, segments)` returns hidden states; `head`
is the [D, V] output matrix, separate so that the learner computes logits in chunks.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from oapl_jax.model.attention import attention, masked_attention
from oapl_jax.model.blockwise_attention import ATTENTION, visible
from oapl_jax.model.config import ModelConfig
from oapl_jax.model.lora import Lora, Projection
from oapl_jax.model.sharding import constrain_activations, constrain_embedded, platform

PRODUCT = "product"  # checkpoint name of `cpu_product`, which policies don't recognize as a dot
LAYER = "layer"  # checkpoint name of a layer's input
# Residuals that a layer saves for its backward pass beside its input; the rest is recomputed.
REMAT_POLICIES = {
    "none": None,
    "dots": jax.checkpoint_policies.save_from_both_policies(
        jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
        jax.checkpoint_policies.save_only_these_names(PRODUCT),
    ),
    "attention": jax.checkpoint_policies.save_only_these_names(ATTENTION),
    "full": jax.checkpoint_policies.nothing_saveable,
    # As "attention", but residuals and inputs are offloaded to host memory between the passes.
    "offload": jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=(),
        names_which_can_be_offloaded=(LAYER, ATTENTION),
        offload_src="device",
        offload_dst="pinned_host",
    ),
}


@flax.struct.dataclass
class Cache:
    """Keys and values of earlier tokens; all rows of a batch are filled at the same slot."""

    # Heads before slots saves a CPU a transpose of the cache for every token.
    key: jax.Array  # [layers, B, kv_heads, S, head_dim]
    value: jax.Array  # [layers, B, kv_heads, S, head_dim]
    segments: jax.Array  # int32[B, S]; 0 marks padding and slots not yet filled
    slot: jax.Array  # int32[], the next slot to fill


def empty_cache(config: ModelConfig, batch: int, slots: int, dtype: jnp.dtype) -> Cache:
    shape = (config.num_layers, batch, config.num_kv_heads, slots, config.head_dim)
    keys, values = jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)
    return Cache(keys, values, jnp.zeros((batch, slots), jnp.int32), jnp.zeros((), jnp.int32))


def cpu_product(x, kernel, dimensions, precision):
    """nn.Dense's dot_general for CPUs, with another operand order in the kernel's gradient.

    In JAX's order XLA's CPU backend recomputes and transposes d_out inside that product.
    """
    del dimensions, precision  # constant in nn.Dense
    return checkpoint_name(_product(x, kernel), PRODUCT)


@jax.custom_vjp
def _product(x, kernel):
    return jnp.einsum("btd,df->btf", x, kernel)


def _product_backward(kept, d_out):
    x, kernel = kept
    d_x = jnp.einsum("btf,df->btd", d_out, kernel)
    return d_x, jnp.einsum("btd,btf->df", x, d_out)


_product.defvjp(lambda x, kernel: (_product(x, kernel), (x, kernel)), _product_backward)


def _llama3(plain: np.ndarray, rope: Mapping) -> tuple[np.ndarray, float]:
    """Llama 3.1 (arXiv 2407.21783, section 3.4.1): divides low frequencies by `factor`."""
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    turns = rope["original_max_position_embeddings"] * plain / (2 * math.pi)
    keep = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return keep * plain + (1 - keep) * plain / rope["factor"], 1.0


def _yarn(plain: np.ndarray, rope: Mapping) -> tuple[np.ndarray, float]:
    """YaRN (arXiv 2309.00071, section 3): as llama3, but the ramp is linear in the dimension's
    index, and logits are scaled up."""
    factor, length = rope["factor"], rope["original_max_position_embeddings"]
    dim = 2 * len(plain)

    def dimension_of(turns: float) -> float:
        return dim * math.log(length / (turns * 2 * math.pi)) / (2 * math.log(rope["rope_theta"]))

    low = dimension_of(rope.get("beta_fast") or 32)
    high = dimension_of(rope.get("beta_slow") or 1)
    if rope.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    ramp = np.clip((np.arange(len(plain)) - low) / (high - low or 1e-3), 0.0, 1.0)
    scale = lambda m: 1.0 if factor <= 1 else 0.1 * m * math.log(factor) + 1.0
    attention_factor = rope.get("attention_factor")
    if attention_factor is None:
        over, under = rope.get("mscale"), rope.get("mscale_all_dim")
        attention_factor = scale(over) / scale(under) if over and under else scale(1.0)
    return (1 - ramp) * plain + ramp * plain / factor, float(attention_factor)


ROPE_VARIANTS = {"default": lambda plain, rope: (plain, 1.0), "llama3": _llama3, "yarn": _yarn}


def angles(positions: jax.Array, rope: Mapping, head_dim: int) -> tuple[jax.Array, jax.Array]:
    """RoPE (arXiv 2104.09864): cosines and sines, float32[B, T, 1, head_dim / 2], of positions."""
    exponents = np.arange(0, head_dim, 2, dtype=np.float64) / head_dim
    frequencies, factor = ROPE_VARIANTS[rope["rope_type"]](rope["rope_theta"] ** -exponents, rope)
    angle = positions[:, :, None, None].astype(jnp.float32) * frequencies.astype(np.float32)
    return jnp.cos(angle) * factor, jnp.sin(angle) * factor


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotates [B, T, heads, head_dim] in pairs (i, i + head_dim / 2), the order of checkpoints."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x.dtype)


class RMSNorm(nn.Module):
    eps: float

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],), jnp.float32)
        wide = x.astype(jnp.float32)
        wide = wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + self.eps)
        return (wide * scale).astype(x.dtype)


class Block(nn.Module):
    """One layer, scanned over all layers; the cache is in the carry, so it is updated in place.

    `visibility` is the segments of rows that are whole, or the mask of a cache's slots.
    """

    config: ModelConfig
    dtype: jnp.dtype
    lora: Lora | None = None

    @nn.compact
    def __call__(self, carry, layer, cos, sin, visibility):
        x, cache = carry
        x = checkpoint_name(x, LAYER)
        c = self.config
        dense = functools.partial(
            Projection,
            lora=self.lora,
            dtype=self.dtype,
            param_dtype=jnp.float32,
            dot_general=cpu_product if platform() == "cpu" else None,
        )
        heads = lambda y: y.reshape(*y.shape[:2], -1, c.head_dim)

        h = RMSNorm(c.rms_norm_eps, name="attention_norm")(x)
        inner, kv_inner = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
        query = heads(dense(inner, use_bias=c.qkv_bias, name="q")(h))
        key = heads(dense(kv_inner, use_bias=c.qkv_bias, name="k")(h))
        value = heads(dense(kv_inner, use_bias=c.qkv_bias, name="v")(h))
        if c.qk_norm:
            query = RMSNorm(c.rms_norm_eps, name="q_norm")(query)
            key = RMSNorm(c.rms_norm_eps, name="k_norm")(key)
        query, key = rotate(query, cos, sin), rotate(key, cos, sin)
        by_head = lambda x: x.swapaxes(-3, -2)
        if cache is not None:
            at = (layer, 0, 0, cache.slot, 0)
            cache = cache.replace(
                key=jax.lax.dynamic_update_slice(cache.key, by_head(key[None]), at),
                value=jax.lax.dynamic_update_slice(cache.value, by_head(value[None]), at),
            )
        if visibility.ndim == 2:
            mixed = attention(query, key, value, visibility)
        else:
            key = jax.lax.dynamic_index_in_dim(cache.key, layer, keepdims=False)
            value = jax.lax.dynamic_index_in_dim(cache.value, layer, keepdims=False)
            mixed = masked_attention(query, by_head(key), by_head(value), visibility)
        mixed = mixed.reshape(*x.shape[:2], inner)
        x = constrain_activations(x + dense(c.hidden_size, use_bias=c.output_bias, name="o")(mixed))

        h = RMSNorm(c.rms_norm_eps, name="mlp_norm")(x)
        gate = dense(c.intermediate_size, use_bias=False, name="gate")(h)
        up = dense(c.intermediate_size, use_bias=False, name="up")(h)
        x = x + dense(c.hidden_size, use_bias=False, name="down")(nn.silu(gate) * up)
        return (constrain_activations(x), cache), None


class Transformer(nn.Module):
    """The decoder, with float32 parameters, and adapters beside them if `lora` is set."""

    config: ModelConfig
    dtype: jnp.dtype  # of activations and matrix products
    remat: str  # a name in REMAT_POLICIES
    lora: Lora | None = None

    @nn.compact
    def __call__(
        self,
        tokens: Int[Array, "B T"],
        positions: Int[Array, "B T"],
        segments: Int[Array, "B T"],
        cache: Cache | None = None,
    ):
        """Maps token ids to [B, T, D] hidden states after the last norm; with a cache of earlier
        tokens, fills T more slots and returns (states, cache). T tokens that fill a whole cache
        attend to each other as without one.

        Positions count from 0 in each segment; tokens see only their own segment, 0 is padding.
        """
        c = self.config
        embed = nn.Embed(
            c.vocab_size,
            c.hidden_size,
            dtype=self.dtype,
            param_dtype=jnp.float32,
            embedding_init=nn.initializers.normal(c.hidden_size**-0.5),
            name="embed",
        )
        x = constrain_activations(constrain_embedded(embed(tokens)))
        visibility = segments
        if cache is not None:
            slots = jnp.arange(tokens.shape[1], dtype=jnp.int32)
            filled = jax.lax.dynamic_update_slice(cache.segments, segments, (0, cache.slot))
            cache = dataclasses.replace(cache, segments=filled)
            key_slots = jnp.arange(cache.segments.shape[1], dtype=jnp.int32)
            if len(slots) == 1:  # the newest token of its row: slots may be filled in any order
                visibility = segments[:, :, None] == cache.segments[:, None]
            elif len(slots) < len(key_slots):
                visibility = visible(segments, cache.segments, cache.slot + slots, key_slots)
        cos, sin = angles(positions, dict(c.rope), c.head_dim)

        block = Block
        if self.remat != "none":
            block = nn.remat(Block, policy=REMAT_POLICIES[self.remat], prevent_cse=False)
        layers = nn.scan(
            block,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=(0, nn.broadcast, nn.broadcast, nn.broadcast),  # pyright: ignore[reportArgumentType]
            length=c.num_layers,
        )
        (x, cache), _ = layers(c, self.dtype, self.lora, name="layers")(
            (x, cache), jnp.arange(c.num_layers), cos, sin, visibility
        )
        x = RMSNorm(c.rms_norm_eps, name="final_norm")(x)
        if not c.tie_embeddings and self.is_initializing():
            shape = (c.hidden_size, c.vocab_size)
            self.param("head", nn.initializers.lecun_normal(), shape, jnp.float32)
        if cache is None:
            return x
        return x, dataclasses.replace(cache, slot=cache.slot + tokens.shape[1])


def head(params: Any, config: ModelConfig) -> jax.Array:
    """float32[D, V] output matrix: the transposed embedding if the two are tied."""
    return params["embed"]["embedding"].T if config.tie_embeddings else params["head"]


def logits(
    hidden: Float[Array, "... D"], head_matrix: Float[Array, "D V"]
) -> Float[Array, "... V"]:
    """float32 logits: products in the dtype of `hidden`, sums in float32."""
    narrow = head_matrix.astype(hidden.dtype)
    return jnp.einsum("...d,dv->...v", hidden, narrow, preferred_element_type=jnp.float32)
