"""Sharding: the mesh, a strict table from parameter names to mesh axes, activation constraints.

Mesh axes: `data` (batch; parameters replicated), `fsdp` (batch; parameters sharded), `context`
(positions of a row) and `tensor` (heads, feed-forward and vocabulary). Parameters are replicated
along `data` and `context`.
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from oapl_jax.config import MeshConfig, RolloutConfig
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


def mesh_sizes(given: Mapping[str, int], count: int, *, setting: str) -> dict[str, int]:
    """Sizes of AXES that make `count` devices; see `make_mesh`."""
    sizes = [given.get(axis, 1) for axis in AXES]
    if sizes.count(-1) == 1:
        rest = -math.prod(sizes)
        sizes[sizes.index(-1)] = max(count // rest, 1) if rest > 0 else 0
    if min(sizes) < 1 or math.prod(sizes) != count:
        named = [axis for axis in AXES if axis in given]
        product = " x ".join(f"{setting}.{axis}={given[axis]}" for axis in named)
        rest = "data" if setting == "rollout.mesh" else "fsdp"
        others = math.prod(size for axis, size in given.items() if axis != rest)
        fits = others > 0 and count % others == 0
        remedy = (
            f"{setting}.{rest}={count // others}"
            if fits
            else f"{setting}.{rest}={count} and the others to 1"
        )
        raise UserError(f"{product} does not make {count} devices; set {remedy}")
    return dict(zip(AXES, sizes, strict=True))


def make_mesh(
    *,
    data: int,
    fsdp: int,
    context: int | None = None,
    tensor: int,
    devices: Sequence[Any] | None = None,
    of: Sequence[Any] | None = None,
    setting: str = "mesh",
) -> Mesh:
    """Makes a mesh over `devices` (default: all); one size may be -1 and takes the rest.

    `of` are the devices that they may be a part of (default: this run's). `setting` is the section
    that has the sizes, for errors.
    """
    count = jax.device_count() if devices is None else len(devices)
    given = dict(data=data, fsdp=fsdp, tensor=tensor)
    given |= {} if context is None else dict(context=context)
    sizes = tuple(mesh_sizes(given, count, setting=setting).values())
    types = (AxisType.Auto,) * len(AXES)
    if devices is not None and set(devices) < set(of or jax.devices()):
        # jax.make_mesh refuses parts of a TPU that are no rectangle: in the devices' own order.
        return Mesh(np.array(devices).reshape(sizes), AXES, axis_types=types)
    return jax.make_mesh(sizes, AXES, types, devices=devices)


def split_devices(
    devices: Sequence[Any], sampler: int, *, host: int
) -> tuple[list[Any], list[Any]]:
    """Devices of the learner, on all hosts, and of one host's sampler.

    Args:
      devices: of all hosts.
      sampler: devices of each host, its last ones, that its sampler has for itself; 0: the two
        share all of them.
    """
    of_hosts: dict[int, list[Any]] = {}
    for device in devices:
        of_hosts.setdefault(device.process_index, []).append(device)
    fewest = min(map(len, of_hosts.values()))
    if sampler >= fewest:
        fits = f"{fewest // 2}, or 0 to share them" if fewest > 1 else "0 to share it"
        raise UserError(
            f"rollout.devices={sampler} leaves the learner none of a host's {fewest} devices; set "
            f"{fits}"
        )
    learner = [d for of_host in of_hosts.values() for d in of_host[: len(of_host) - sampler]]
    return learner, of_hosts[host][-sampler:]  # [-0:] has all


def open_meshes(
    mesh: MeshConfig,
    rollout: RolloutConfig,
    devices: Sequence[Any],
    *,
    host: int,
    make: Callable[..., Mesh] = make_mesh,
) -> tuple[Mesh, Mesh]:
    """Meshes of the learner, over `devices` of all hosts, and of one host's embedded sampler."""
    learner, sampler = split_devices(devices, rollout.devices, host=host)
    sizes: Any = rollout.mesh
    return make(devices=learner, **mesh), make(devices=sampler, setting="rollout.mesh", **sizes)


def parameter_spec(path: str) -> P:
    """Mesh axes of a parameter; raises a KeyError if no rule matches."""
    for pattern, spec in PARAMETER_RULES:
        if re.fullmatch(pattern, path):
            return spec
    raise KeyError(f"no sharding rule matches parameter {path!r}; add one to PARAMETER_RULES")


def parameter_shardings(params: Any, mesh: Mesh, *, setting: str = "mesh") -> Any:
    """NamedShardings for a tree of parameters (or shapes); a UserError if an axis can't divide.

    `setting` is the section that has the mesh's sizes, for errors.
    """

    def place(path, leaf):
        name = "/".join(entry.key for entry in path)
        spec = parameter_spec(name)
        for size, axis in zip(leaf.shape, spec, strict=True):
            if axis is not None and size % mesh.shape[axis]:
                raise UserError(
                    f"{setting}.{axis}={mesh.shape[axis]} does not divide an axis of {name} with "
                    f"shape {tuple(leaf.shape)}; {smaller_axis(size, mesh, axis, setting)}"
                )
        return NamedSharding(mesh, spec)

    return jax.tree_util.tree_map_with_path(place, params)


def smaller_axis(size: int, mesh: Mesh | AbstractMesh, axis: str, setting: str) -> str:
    """Remedy: the largest size of a mesh axis that divides `size`; `data` takes the rest."""
    fits = math.gcd(size, mesh.shape[axis])
    rest = mesh.shape["data"] * mesh.shape[axis] // fits
    return f"set {setting}.{axis}={fits} and {setting}.data={rest}"


def serving_dtype(path: str, dtype: Any) -> Any:
    """dtype of a parameter that is read and not trained, in `dtype`: norms stay in float32."""
    return jnp.dtype(jnp.float32 if path.endswith("scale") else dtype)


def to_local_mesh(params: Any, mesh: Mesh, dtype: Any) -> Any:
    """Copies parameters of any mesh to one of this host's devices, for a sampler in `dtype`.

    All hosts must call it; on several hosts each parameter in turn is replicated first. A parameter
    that is already as it should be is not copied.
    """

    def one(path: Any, leaf: jax.Array, sharding: NamedSharding) -> jax.Array:
        leaf = jnp.asarray(leaf).astype(serving_dtype(path[-1].key, dtype))
        if jax.process_count() == 1:
            return jax.device_put(leaf, sharding)
        replicated = jax.device_put(leaf, NamedSharding(leaf.sharding.mesh, P()))  # pyright: ignore
        return jax.device_put(replicated.addressable_data(0), sharding).block_until_ready()

    return jax.tree_util.tree_map_with_path(one, params, parameter_shardings(params, mesh))


def constrain_embedded(x: jax.Array) -> jax.Array:
    """Keeps looked-up [B, T, D] embeddings sharded as their table: else they'd be replicated."""
    return constrain(x, P("data", "context", "fsdp"))


def constrain_activations(x: jax.Array) -> jax.Array:
    """Keeps [B, T, D] activations sharded by row and position: weights move, tokens never."""
    return constrain(x, P(*ROWS, "context", None))


def platform() -> str:
    """Platform of the abstract mesh's devices, also ones absent here; "cpu" outside a mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    return "cpu" if mesh.empty else mesh.abstract_device.platform


def constrain(x: jax.Array, spec: P) -> jax.Array:
    """Shards `x` over the mesh's axes; outside a mesh it stays as it is."""
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, spec)
