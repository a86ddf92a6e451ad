"""Where arrays live: the mesh, the table from parameter names to axes, one activation constraint.

Mesh axes: `data` (batch; parameters replicated), `fsdp` (batch; parameters sharded), `context`
(the places of a row) and `tensor` (heads, feed-forward and vocabulary sharded). Parameters are the
same along `data` and `context`.
"""

import math
import re
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from oapl_jax.errors import UserError

AXES = ("data", "fsdp", "context", "tensor")
ROWS = P(("data", "fsdp"))  # the leading axis of everything in a micro-batch

# Parameter path -> axes; the first match counts, and every parameter must match. The leading axis
# of a layer's parameter is the scanned layer axis.
PARAMETER_RULES = (
    (r"embed/embedding", P("tensor", "fsdp")),
    (r"head", P("fsdp", "tensor")),
    (r"layers/(q|k|v|gate|up)/kernel", P(None, "fsdp", "tensor")),
    (r"layers/(o|down)/kernel", P(None, "tensor", "fsdp")),
    (r"layers/(q|k|v)/bias", P(None, "tensor")),
    (r"layers/o/bias", P(None, None)),
    (r"layers/\w+_norm/scale", P(None, None)),
    (r"final_norm/scale", P(None)),
)


def make_mesh(*, data: int, fsdp: int, context: int, tensor: int) -> Mesh:
    """A mesh over all devices; one of the sizes may be -1 and takes what is left.

    Raises:
      UserError: if the sizes do not multiply to the number of devices.
    """
    asked = dict(data=data, fsdp=fsdp, context=context, tensor=tensor)
    sizes = [asked[axis] for axis in AXES]
    devices = jax.device_count()
    if sizes.count(-1) == 1:
        rest = -math.prod(sizes)
        sizes[sizes.index(-1)] = max(devices // rest, 1) if rest > 0 else 0
    if min(sizes) < 1 or math.prod(sizes) != devices:
        product = " x ".join(f"mesh.{axis}={asked[axis]}" for axis in AXES)
        raise UserError(
            f"{product} does not make {devices} devices; choose sizes with that product (one of "
            "them may be -1)"
        )
    return jax.make_mesh(tuple(sizes), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def parameter_spec(path: str) -> P:
    """The axes of the parameter with this slash-joined path.

    Raises:
      KeyError: if no rule matches; a parameter that nobody placed would be replicated unseen.
    """
    for pattern, spec in PARAMETER_RULES:
        if re.fullmatch(pattern, path):
            return spec
    raise KeyError(f"no sharding rule matches parameter {path!r}; add one to PARAMETER_RULES")


def parameter_shardings(params: Any, mesh: Mesh) -> Any:
    """A tree of NamedShardings for a tree of parameters (or of their shapes).

    Raises:
      UserError: if an axis of a parameter can't be divided over its mesh axis.
    """

    def place(path, leaf):
        name = "/".join(entry.key for entry in path)
        spec = parameter_spec(name)
        for size, axis in zip(leaf.shape, spec, strict=True):
            if axis is not None and size % mesh.shape[axis]:
                raise UserError(
                    f"mesh.{axis}={mesh.shape[axis]} does not divide an axis of {name} with shape "
                    f"{tuple(leaf.shape)}; choose a divisor of {size}"
                )
        return NamedSharding(mesh, spec)

    return jax.tree_util.tree_map_with_path(place, params)


def gathered(params: Any) -> Any:
    """Parameters of any mesh, whole on one device of this host; all hosts must call it."""
    here = jax.local_devices()[0]
    if jax.process_count() == 1:
        return jax.device_put(params, here)

    def one(leaf: Any) -> jax.Array:
        everywhere = NamedSharding(leaf.sharding.mesh, P())
        return jax.device_put(jax.device_put(leaf, everywhere).addressable_data(0), here)

    return jax.tree.map(one, params)


def constrain_embedded(x: jax.Array) -> jax.Array:
    """Leaves looked-up [B, T, D] embeddings split as their table is, before they are split by row.

    From there the rows are exchanged within `fsdp`; in one stride the compiler finds no way but to
    replicate them on every device.
    """
    return _constrain(x, P("data", "context", "fsdp"))


def constrain_activations(x: jax.Array) -> jax.Array:
    """Keeps [B, T, D] activations split by row and place: weights are gathered, tokens never.

    Outside a mesh (a sampler on one device) there is nothing to constrain.
    """
    return _constrain(x, P(*ROWS, "context", None))


def platform() -> str:
    """Of the mesh's devices, which need not be here; outside a mesh taken to be "cpu"."""
    mesh = jax.sharding.get_abstract_mesh()
    return "cpu" if mesh.empty else mesh.abstract_device.platform


def _constrain(x: jax.Array, spec: P) -> jax.Array:
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, spec)
