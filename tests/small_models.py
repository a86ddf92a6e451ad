"""Decoders, parameters, optimizers and device meshes of test size."""

import functools
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import unflatten_dict
from jax.sharding import AxisType, Mesh

from oapl_jax.model import hf
from oapl_jax.model.config import ModelConfig
from oapl_jax.model.sharding import AXES
from oapl_jax.model.transformer import Transformer, head, logits

GOLDEN = pathlib.Path(__file__).parent / "golden"
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
# eps is large, or the first step of AdamW would be the sign of gradients that are all rounding.
OPTIM: dict[str, Any] = dict(
    learning_rate=1e-3,
    warmup_steps=0,
    final_fraction=0.1,
    num_steps=10,
    b1=0.9,
    b2=0.95,
    eps=1e-3,
    weight_decay=0.1,
    max_grad_norm=0.5,
    mu_dtype="float32",
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


@functools.cache
def golden_model(name: str) -> tuple[ModelConfig, Any]:
    """A checkpoint of tests/golden: its weights use every term of the forward pass."""
    config = hf.load_config(GOLDEN / name)
    return config, hf.load_params(GOLDEN / name, config)


def forward(
    config,
    params,
    tokens,
    positions=None,
    segments=None,
    *,
    dtype=jnp.float32,
    remat="none",
    lora=None,
) -> jax.Array:
    """float32[B, T, V]; without segments, each row is one sequence."""
    if positions is None:
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    segments = jnp.ones_like(tokens) if segments is None else segments
    model = Transformer(config, dtype, remat, lora)
    hidden: Any = model.apply({"params": params}, tokens, positions, segments)
    return logits(hidden, head(params, config))


def next_token_loss(config, params, tokens, **how) -> jax.Array:
    """Mean of -log P(next token), as torch's cross_entropy."""
    logp = jax.nn.log_softmax(forward(config, params, tokens, **how)[:, :-1], axis=-1)
    return -jnp.mean(jnp.take_along_axis(logp, tokens[:, 1:, None], axis=-1))


def assert_same(found: Any, expected: Any) -> None:
    """Two trees have the same structure, dtypes and values, bit for bit."""
    assert jax.tree.structure(found) == jax.tree.structure(expected)

    def compare(a, b):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)

    jax.tree.map(compare, found, expected)
