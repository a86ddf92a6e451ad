"""LoRA (arXiv 2106.09685): low-rank adapters beside the decoder's projections, which stay frozen.

    y = x W + b + (alpha / rank) (x A) B,   A: [in, rank] uniform at first,   B: [rank, out] zero

Adapters are parameters of their own, `layers/q/lora_a` beside `layers/q/kernel`. The learner trains
the tree of adapters; `join` makes a whole model of it and the frozen tree, without a copy.
"""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from oapl_jax.config import LoraConfig

ADAPTERS = ("lora_a", "lora_b")
FROZEN_DTYPE = "bfloat16"


@dataclasses.dataclass(frozen=True)
class Lora:
    """Sizes of the adapters; `targets` have peft's names of the projections."""

    rank: int
    alpha: float
    targets: tuple[str, ...]

    @classmethod
    def of(cls, section: LoraConfig) -> "Lora":
        return cls(section.rank, section.alpha, section.targets)

    @property
    def scale(self) -> float:
        return self.alpha / self.rank


def open_lora(section: LoraConfig) -> Lora | None:
    """Adapters of a configuration; None if all weights are trained."""
    return Lora.of(section) if section.rank else None


class Projection(nn.Dense):
    """nn.Dense, with an adapter if `lora` targets it; the target of "q" is "q_proj"."""

    lora: Lora | None = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        y = super().__call__(x)
        if self.lora is None or f"{self.name}_proj" not in self.lora.targets:
            return y
        # That of torch.nn.Linear, which peft takes: uniform within 1 / sqrt(in).
        uniform = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
        a = self.param("lora_a", uniform, (x.shape[-1], self.lora.rank), jnp.float32)
        b = self.param("lora_b", nn.initializers.zeros, (self.lora.rank, self.features))
        return y + (x @ a.astype(x.dtype)) @ b.astype(x.dtype) * self.lora.scale


def adapters_of(params: Any) -> Any:
    """The adapters of a whole tree."""
    flat = flatten_dict(params, sep="/")
    return unflatten_dict({p: x for p, x in flat.items() if p.endswith(ADAPTERS)}, sep="/")


def join(frozen: Any, adapters: Any) -> Any:
    """A whole tree, whose leaves are those of the two."""
    return unflatten_dict(flatten_dict(frozen, sep="/") | flatten_dict(adapters, sep="/"), sep="/")


def merge(params: Any, lora: Lora, *, dtype: Any) -> Any:
    """W + (alpha / rank) A B of every projection with an adapter, in `dtype`; call it under jit."""
    flat: Any = flatten_dict(params, sep="/")
    for path in [path for path in flat if path.endswith(ADAPTERS[0])]:
        module = path.removesuffix(ADAPTERS[0])
        a, b = (flat.pop(module + name) for name in ADAPTERS)
        added = lora.scale * jnp.matmul(a, b, precision="highest")
        flat[f"{module}kernel"] = (flat[f"{module}kernel"] + added).astype(dtype)
    return unflatten_dict(flat, sep="/")
