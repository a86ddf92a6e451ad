"""Rotary position embedding and its scaling variants.

Sources: RoPE arXiv 2104.09864; YaRN arXiv 2309.00071 (section 3, NTK-by-parts with attention
scaling); the llama3 variant as published with Llama 3.1 (arXiv 2407.21783, section 3.4.1).
"""

import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np


def _llama3(plain: np.ndarray, rope: Mapping) -> tuple[np.ndarray, float]:
    """Divides low frequencies by `factor`, keeps high ones, and interpolates between."""
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    turns = rope["original_max_position_embeddings"] * plain / (2 * math.pi)
    keep = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return keep * plain + (1 - keep) * plain / rope["factor"], 1.0


def _yarn(plain: np.ndarray, rope: Mapping) -> tuple[np.ndarray, float]:
    """As llama3, but the ramp is linear in the dimension's index, and logits are scaled up."""
    factor, length = rope["factor"], rope["original_max_position_embeddings"]
    dim = 2 * len(plain)

    def dimension_of(turns: float) -> float:
        return dim * math.log(length / (turns * 2 * math.pi)) / (2 * math.log(rope["rope_theta"]))

    low = dimension_of(rope.get("beta_fast") or 32)
    high = dimension_of(rope.get("beta_slow") or 1)
    if rope.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    ramp = np.clip((np.arange(len(plain)) - low) / max(high - low, 1e-3), 0.0, 1.0)
    scale = lambda m: 1.0 if factor <= 1 else 0.1 * m * math.log(factor) + 1.0
    attention_factor = rope.get("attention_factor")
    if attention_factor is None:
        over, under = rope.get("mscale"), rope.get("mscale_all_dim")
        attention_factor = scale(over) / scale(under) if over and under else scale(1.0)
    return (1 - ramp) * plain + ramp * plain / factor, float(attention_factor)


VARIANTS = {"default": lambda plain, rope: (plain, 1.0), "llama3": _llama3, "yarn": _yarn}


def angles(positions: jax.Array, rope: Mapping, head_dim: int) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines, float32[B, T, 1, head_dim / 2], for int32[B, T] positions.

    Args:
      rope: `ModelConfig.rope` as a dictionary.
    """
    exponents = np.arange(0, head_dim, 2, dtype=np.float64) / head_dim
    frequencies, factor = VARIANTS[rope["rope_type"]](rope["rope_theta"] ** -exponents, rope)
    angle = positions[:, :, None, None].astype(jnp.float32) * frequencies.astype(np.float32)
    return jnp.cos(angle) * factor, jnp.sin(angle) * factor


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotates [B, T, heads, head_dim] in pairs (i, i + head_dim / 2), the order of checkpoints."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x.dtype)
