"""A Hugging Face checkpoint's names: of its files, and of its tensors, through one table."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict

from oapl_jax.model.config import ModelConfig
from oapl_jax.model.transformer import Transformer

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
# Our parameter -> their tensor. A name with {layer} stands for one tensor a layer, stacked here on
# the leading axis. Kernels and the head are transposed: a torch Linear keeps [out, in].
TABLE = {
    "embed/embedding": "model.embed_tokens.weight",
    "layers/attention_norm/scale": "model.layers.{layer}.input_layernorm.weight",
    "layers/q/kernel": "model.layers.{layer}.self_attn.q_proj.weight",
    "layers/q/bias": "model.layers.{layer}.self_attn.q_proj.bias",
    "layers/q_norm/scale": "model.layers.{layer}.self_attn.q_norm.weight",
    "layers/k/kernel": "model.layers.{layer}.self_attn.k_proj.weight",
    "layers/k/bias": "model.layers.{layer}.self_attn.k_proj.bias",
    "layers/k_norm/scale": "model.layers.{layer}.self_attn.k_norm.weight",
    "layers/v/kernel": "model.layers.{layer}.self_attn.v_proj.weight",
    "layers/v/bias": "model.layers.{layer}.self_attn.v_proj.bias",
    "layers/o/kernel": "model.layers.{layer}.self_attn.o_proj.weight",
    "layers/o/bias": "model.layers.{layer}.self_attn.o_proj.bias",
    "layers/mlp_norm/scale": "model.layers.{layer}.post_attention_layernorm.weight",
    "layers/gate/kernel": "model.layers.{layer}.mlp.gate_proj.weight",
    "layers/up/kernel": "model.layers.{layer}.mlp.up_proj.weight",
    "layers/down/kernel": "model.layers.{layer}.mlp.down_proj.weight",
    "final_norm/scale": "model.norm.weight",
    "head": "lm_head.weight",
}


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A tensor of a checkpoint, and the parameter (or the layer of a stacked one) that it is."""

    name: str
    shape: tuple[int, ...]
    path: str
    layer: int | None
    transposed: bool


def tensors_of(config: ModelConfig) -> list[Tensor]:
    """The tensors of this model's checkpoint, with the shapes of our own initialiser.

    Raises:
      KeyError: for a parameter without a row: it would be neither loaded nor published.
    """
    tensors = []
    for path, leaf in parameter_shapes(config).items():
        if path not in TABLE:
            raise KeyError(f"no row names parameter {path!r}; add one to TABLE")
        stacked = "{layer}" in TABLE[path]
        transposed = path == "head" or path.endswith("/kernel")
        shape = leaf.shape[1:] if stacked else leaf.shape
        shape = shape[::-1] if transposed else shape
        for layer in range(config.num_layers) if stacked else (None,):
            tensors.append(Tensor(TABLE[path].format(layer=layer), shape, path, layer, transposed))
    return tensors


@functools.cache
def parameter_shapes(config: ModelConfig) -> dict[str, jax.ShapeDtypeStruct]:
    """Path -> shape as the initialiser has it: the truth that the table is held against."""
    model = Transformer(config, jnp.float32, "none")
    token = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    variables = jax.eval_shape(model.init, jax.random.key(0), token, token, token)
    return flatten(variables["params"])


def flatten(tree: Any) -> dict[str, Any]:
    """A leaf by its path."""
    return {"/".join(path): leaf for path, leaf in flatten_dict(tree).items()}
