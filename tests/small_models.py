"""Decoder configurations and device meshes of test size."""

import jax
import numpy as np
from jax.sharding import AxisType, Mesh

from oapl_jax.model.config import ModelConfig
from oapl_jax.model.sharding import AXES

SIZES = dict(
    vocab_size=32,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=64,
    rms_norm_eps=1e-6,
)


def small_config(model_type: str = "llama", **changes) -> ModelConfig:
    """Two layers of 32 units; `changes` have the names of config.json."""
    return ModelConfig.from_hf({"model_type": model_type, **SIZES, **changes}, source="a test")


def small_mesh(data: int = 1, fsdp: int = 1, context: int = 1, tensor: int = 1) -> Mesh:
    """A mesh over the first devices."""
    sizes = data, fsdp, context, tensor
    devices = jax.devices()[: int(np.prod(sizes))]
    return jax.make_mesh(sizes, AXES, (AxisType.Auto,) * 4, devices=devices)
