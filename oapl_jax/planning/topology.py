"""A TPU slice that is not there: its devices for the compiler, its links for the roofline."""

import dataclasses
import importlib.util
import math
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh

from oapl_jax.errors import RunError, UserError
from oapl_jax.model.sharding import AXES
from oapl_jax.planning import compiler_log
from oapl_jax.planning.hardware import CHIPS, CHIPS_PER_HOST, SLICES, Chip

# Without these the TPU library asks the cloud who it is, and waits for an answer.
ALONE = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


@dataclasses.dataclass(frozen=True)
class Slice:
    """`generation` and `shape` as in "v5e:8x8", and the devices that the compiler knows."""

    generation: str
    shape: tuple[int, ...]
    devices: Sequence[Any]

    @property
    def name(self) -> str:
        return f"{self.generation}:{'x'.join(map(str, self.shape))}"

    @property
    def chip(self) -> Chip:
        return CHIPS[self.generation]

    @property
    def chips_per_host(self) -> int:
        chips = len(self.devices)
        return chips if chips in self.chip.machines else CHIPS_PER_HOST

    @property
    def hosts(self) -> int:
        return -(-len(self.devices) // self.chips_per_host)

    @property
    def host_ram(self) -> float:
        return self.chip.machines[self.chips_per_host]


def open_slice(name: str) -> Slice:
    """The slice "generation:shape", for example "v5e:8x8" or "v5p:4x4x4".

    Raises:
      UserError: for a name that is none, or if the TPU compiler is not installed.
    """
    generation, _, sizes = name.partition(":")
    offered = "; ".join(f"{g}:{', '.join(shapes.values())}" for g, shapes in SLICES.items())
    known = generation in CHIPS and re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", sizes)
    if not known or len(sizes.split("x")) != CHIPS[generation].dimensions:
        raise UserError(f"--topology={name} is no slice; for example one of {offered}")
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(
            "the TPU compiler is not installed; install it with `pip install 'oapl_jax[tpu]'` (no "
            "TPU is needed)"
        )
    for variable, value in ALONE.items():
        os.environ.setdefault(variable, value)
    os.environ.update(compiler_log.LEVEL)
    shape = tuple(map(int, sizes.split("x")))
    # A slice on one machine has all of its chips there; else the compiler puts 2 x 2 in each.
    alone = sizes in SLICES[generation].values() and math.prod(shape) in CHIPS[generation].machines
    bounds = dict(chips_per_host_bounds=[*shape, 1][:3]) if alone else {}
    try:
        found = topologies.get_topology_desc(platform="tpu", topology_name=name, **bounds)
    except jax.errors.JaxRuntimeError as error:
        raise UserError(
            f"--topology={name} is refused by the TPU compiler ({error}); for example one of "
            f"{offered}"
        ) from error
    return Slice(generation, shape, found.devices)


def hbm_available(where: Slice) -> int:
    """Bytes of a chip's HBM that a program may have, in the compiler's own words.

    It says so only when it refuses, so it is asked for a petabyte. It logs that too, which shows
    that what it logs is heard.

    Raises:
      RunError: if its refusal names no number, or was not logged.
    """
    everywhere = jax.sharding.SingleDeviceSharding(where.devices[0])
    huge = jax.ShapeDtypeStruct((2**48,), np.float32, sharding=everywhere)
    try:
        with compiler_log.heard() as lines:
            jax.jit(lambda x: x + 1).lower(huge).compile()
    except jax.errors.JaxRuntimeError as error:
        found = re.search(r"available HBM \(([0-9.]+)([MG])\)", str(error))
        if not found:
            raise RunError(
                f"the TPU compiler does not say how much HBM there is: {error}"
            ) from error
        if not any("Ran out of memory" in line for line in lines):
            raise RunError(
                "the TPU compiler's log can't be heard; plan in a process that has not loaded "
                "libtpu before"
            ) from error
        return int(float(found.group(1)) * {"M": 2**20, "G": 2**30}[found.group(2)])
    raise RunError("the TPU compiler accepts a petabyte; its verdicts are worth nothing")


def make_mesh(where: Slice, sizes: Mapping[str, int]) -> Mesh:
    """The mesh that a run makes on this slice; see sharding.make_mesh.

    Raises:
      UserError: if the sizes do not multiply to the number of chips, or the torus has no such axes.
    """
    sizes = {axis: sizes[axis] for axis in AXES if axis in sizes}  # a ConfigDict has its own order
    chips, given = len(where.devices), list(sizes.values())
    rest = math.prod(size for size in given if size != -1)
    filled = [chips // rest if size == -1 and rest > 0 else size for size in given]
    asked = " x ".join(f"mesh.{axis}={size}" for axis, size in sizes.items())
    if given.count(-1) > 1 or min(filled) < 1 or math.prod(filled) != chips:
        raise UserError(
            f"{asked} does not make the {chips} chips of {where.name}; choose sizes with that "
            "product (one of them may be -1)"
        )
    kinds = (AxisType.Auto,) * len(sizes)
    try:
        return jax.make_mesh(tuple(filled), tuple(sizes), axis_types=kinds, devices=where.devices)
    except NotImplementedError as error:
        raise UserError(
            f"{asked} can't be laid out on {where.name}: each size must be a product of whole "
            f"dimensions of the torus ({' x '.join(map(str, where.shape))})"
        ) from error


def axis_bandwidth(where: Slice, mesh: Mesh, axes: Sequence[str]) -> float:
    """Bytes/s that a chip can take in from the others along these mesh axes.

    Along a dimension of the torus that the group goes all around it has two links; along an open
    line one, since at its ends there is no more. A slice of three dimensions is a torus where it
    is made of whole cubes, and has no ring otherwise.
    """
    rings = [size % where.chip.ring == 0 for size in where.shape]
    if where.chip.dimensions == 3:
        rings = [all(rings)] * 3
    corner = tuple(slice(None) if axis in axes else 0 for axis in mesh.axis_names)
    group = np.asarray(mesh.devices[corner]).reshape(-1)
    places = np.array([device.coords for device in group])
    links = 0
    for dimension, size in enumerate(where.shape):
        reached = len(set(places[:, dimension].tolist()))
        links += 0 if reached == 1 else 2 if reached == size and rings[dimension] else 1
    return max(links, 1) * where.chip.link_bandwidth
