"""Sharding: the mesh, a strict table from parameter names to mesh axes, activation constraints.

Mesh axes: `data` (batch; parameters replicated), `fsdp` (batch; parameters sharded), `context`
(positions of a row) and `tensor` (heads, feed-forward and vocabulary). Parameters are replicated
along `data` and `context`.
"""

import math
import re
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from oapl_jax.errors import UserError

AXES = ("data", "fsdp", "context", "tensor")
ROWS = P(("data", "fsdp"))  # the leading axis of everything in a micro-batch

# Parameter path -> mesh axes; every parameter must match one. The leading axis of a layer's
# parameter is the scanned layer axis.
PARAMETER_RULES = (
    (r"embed/embedding", P("tensor", "fsdp")),
    (r"head", P("fsdp", "tensor")),
    (r"layers/(q|k|v|gate|up)/kernel", P(None, "fsdp", "tensor")),
    (r"layers/(o|down)/kernel", P(None, "tensor", "fsdp")),
    (r"layers/(q|k|v)/bias", P(None, "tensor")),
    (r"layers/o/bias", P(None, None)),
    (r"layers/(q|k|v|gate|up)/lora_a", P(None, "fsdp", None)),
    (r"layers/(q|k|v|gate|up)/lora_b", P(None, None, "tensor")),
    (r"layers/(o|down)/lora_a", P(None, "tensor", None)),
    (r"layers/(o|down)/lora_b", P(None, None, "fsdp")),
    (r"layers/\w+_norm/scale", P(None, None)),
    (r"final_norm/scale", P(None)),
    (r"score", P(None)),  # the head of a curator (curriculum/curator.py)
)


def make_mesh(
    *, data: int, fsdp: int, context: int, tensor: int, devices: Sequence[Any] | None = None
) -> Mesh:
    """Makes a mesh over `devices` (default: all); one size may be -1 and takes the rest."""
    given = dict(data=data, fsdp=fsdp, context=context, tensor=tensor)
    sizes = [given[axis] for axis in AXES]
    count = jax.device_count() if devices is None else len(devices)
    if sizes.count(-1) == 1:
        rest = -math.prod(sizes)
        sizes[sizes.index(-1)] = max(count // rest, 1) if rest > 0 else 0
    if min(sizes) < 1 or math.prod(sizes) != count:
        product = " x ".join(f"mesh.{axis}={given[axis]}" for axis in AXES)
        others = math.prod(size for axis, size in given.items() if axis != "fsdp")
        fits = others > 0 and count % others == 0
        remedy = (
            f"mesh.fsdp={count // others}" if fits else f"mesh.fsdp={count} and the others to 1"
        )
        raise UserError(f"{product} does not make {count} devices; set {remedy}")
    return jax.make_mesh(tuple(sizes), AXES, (AxisType.Auto,) * len(AXES), devices=devices)


def parameter_spec(path: str) -> P:
    """Mesh axes of a parameter; raises a KeyError if no rule matches."""
    for pattern, spec in PARAMETER_RULES:
        if re.fullmatch(pattern, path):
            return spec
    raise KeyError(f"no sharding rule matches parameter {path!r}; add one to PARAMETER_RULES")


def parameter_shardings(params: Any, mesh: Mesh) -> Any:
    """NamedShardings for a tree of parameters (or shapes); a UserError if an axis can't divide."""

    def place(path, leaf):
        name = "/".join(entry.key for entry in path)
        spec = parameter_spec(name)
        for size, axis in zip(leaf.shape, spec, strict=True):
            if axis is not None and size % mesh.shape[axis]:
                fits = math.gcd(size, mesh.shape[axis])
                raise UserError(
                    f"mesh.{axis}={mesh.shape[axis]} does not divide an axis of {name} with shape "
                    f"{tuple(leaf.shape)}; set mesh.{axis}={fits}, and mesh.data to the rest"
                )
        return NamedSharding(mesh, spec)

    return jax.tree_util.tree_map_with_path(place, params)


def serving_dtype(path: str, dtype: Any) -> Any:
    """dtype of a parameter that is read and not trained, in `dtype`: norms stay in float32."""
    return jnp.dtype(jnp.float32 if path.endswith("scale") else dtype)


def gathered(params: Any) -> Any:
    """All-gathers parameters of any mesh to one device of this host; all hosts must call it."""
    here = jax.local_devices()[0]
    if jax.process_count() == 1:
        return jax.device_put(params, here)

    def one(leaf: Any) -> jax.Array:
        replicated = NamedSharding(leaf.sharding.mesh, P())
        return jax.device_put(jax.device_put(leaf, replicated).addressable_data(0), here)

    return jax.tree.map(one, params)


def constrain_embedded(x: jax.Array) -> jax.Array:
    """Keeps looked-up [B, T, D] embeddings sharded as their table: else they'd be replicated."""
    return _constrain(x, P("data", "context", "fsdp"))


def constrain_activations(x: jax.Array) -> jax.Array:
    """Keeps [B, T, D] activations sharded by row and position: weights move, tokens never."""
    return _constrain(x, P(*ROWS, "context", None))


def platform() -> str:
    """Platform of the abstract mesh's devices, also ones absent here; "cpu" outside a mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    return "cpu" if mesh.empty else mesh.abstract_device.platform


def _constrain(x: jax.Array, spec: P) -> jax.Array:
    if jax.sharding.get_abstract_mesh().empty:  # a sampler on one device
        return x
    return jax.lax.with_sharding_constraint(x, spec)
