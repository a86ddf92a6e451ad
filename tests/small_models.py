"""Decoder configurations, parameters and device meshes of test size."""

import functools
from typing import Any

import jax
import numpy as np
from flax.traverse_util import unflatten_dict
from jax.sharding import AxisType, Mesh

from oapl_jax.model import hf
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


@functools.cache
def random_params(config: ModelConfig, seed: int) -> Any:
    """Normal draws for all parameters: no norm is one, no bias zero."""
    rng = np.random.default_rng(seed)
    shapes = {path: leaf.shape for path, leaf in hf.parameter_shapes(config).items()}
    draws = {path: rng.normal(size=shape).astype(np.float32) for path, shape in shapes.items()}
    return unflatten_dict(draws, sep="/")


def assert_same(found: Any, expected: Any) -> None:
    """Two trees have the same structure, dtypes and values, bit for bit."""
    assert jax.tree.structure(found) == jax.tree.structure(expected)

    def compare(a, b):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)

    jax.tree.map(compare, found, expected)
