"""TPU generations and slices: published rates, and topologies to compile for without hardware."""

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
from jax.sharding import Mesh

from oapl_jax.errors import UserError
from oapl_jax.model import sharding


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chip:
    """Published rates of one chip, and the machines that hold it.

    Attributes:
      flops: bfloat16 FLOP/s.
      hbm_bytes: as published; the compiler leaves a program a little less.
      hbm_bandwidth: bytes/s.
      link_bandwidth: bytes/s of one link in one direction: the published bandwidth of all links in
        both directions, divided by two directions and two links for each dimension of the torus.
      host_bandwidth: bytes/s between a chip and its host, each way.
      dimensions: of the torus.
      ring: smallest size of a dimension that is a ring; its multiples are rings too.
      machines: chips of a machine -> bytes of its RAM. A slice of so many chips is one machine; any
        other consists of machines of CHIPS_PER_HOST.
      source: address of the published numbers.
    """

    flops: float
    hbm_bytes: float
    hbm_bandwidth: float
    link_bandwidth: float
    host_bandwidth: float
    dimensions: int
    ring: int
    machines: Mapping[int, float]
    source: str


CHIPS_PER_HOST = 4
# Rings: https://jax-ml.github.io/scaling-book/tpus. Machines: the types ct5lp-hightpu-1t, -4t,
# -8t, ct5p-hightpu-4t and ct6e-standard-1t, -4t, -8t of the same pages as the rest. Bandwidths to
# hosts are not published: these are second-hand, from notes on that book (16 to 32 GB/s of PCIe).
CHIPS = {
    "v5e": Chip(
        flops=197e12,
        hbm_bytes=16 * 2**30,
        hbm_bandwidth=819e9,
        link_bandwidth=400e9 / 2 / 4,
        host_bandwidth=16e9,
        dimensions=2,
        ring=16,
        machines={1: 48e9, 4: 192e9, 8: 384e9},
        source="https://cloud.google.com/tpu/docs/v5e",
    ),
    "v5p": Chip(
        flops=459e12,
        hbm_bytes=95 * 2**30,
        hbm_bandwidth=2765e9,
        link_bandwidth=1200e9 / 2 / 6,
        host_bandwidth=16e9,
        dimensions=3,
        ring=4,
        machines={4: 448e9},
        source="https://cloud.google.com/tpu/docs/v5p",
    ),
    "v6e": Chip(
        flops=918e12,
        hbm_bytes=32 * 2**30,
        hbm_bandwidth=1600e9,
        link_bandwidth=800e9 / 2 / 4,
        host_bandwidth=32e9,
        dimensions=2,
        ring=16,
        machines={1: 176e9, 4: 720e9, 8: 1440e9},
        source="https://cloud.google.com/tpu/docs/v6e",
    ),
}

# Topologies that can be rented, by number of chips.
FLAT = {1: "1x1", 4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8", 128: "8x16", 256: "16x16"}
CUBES = {4: "2x2x1", 8: "2x2x2", 16: "2x2x4", 32: "2x4x4", 64: "4x4x4", 128: "4x4x8", 256: "4x8x8"}
SLICES = {"v5e": FLAT, "v5p": CUBES, "v6e": FLAT}

# libtpu otherwise queries the cloud's metadata server for its topology and waits for an answer.
# Its warnings go to file descriptor 2 only at this log level; it reads it once, when it is loaded.
ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}
LOG_LEVEL = {"TPU_STDERR_LOG_LEVEL": "1", "TPU_MIN_LOG_LEVEL": "1"}


@dataclasses.dataclass(frozen=True)
class Slice:
    """A slice as in "v5e:8x8", with the devices of its topology for ahead-of-time compilation."""

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
    """Opens the topology of the slice "generation:shape", for example "v5e:8x8" or "v5p:4x4x4".

    Raises:
      UserError: for a slice that does not exist, or if libtpu is not installed.
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
    for variable, value in ENVIRONMENT.items():
        os.environ.setdefault(variable, value)
    os.environ.update(LOG_LEVEL)
    shape = tuple(map(int, sizes.split("x")))
    # By default the compiler puts 2 x 2 chips on each host, also where one machine has them all.
    one_machine = sizes in SLICES[generation].values() and (
        math.prod(shape) in CHIPS[generation].machines
    )
    bounds = dict(chips_per_host_bounds=[*shape, 1][:3]) if one_machine else {}
    try:
        found = topologies.get_topology_desc(platform="tpu", topology_name=name, **bounds)
    except jax.errors.JaxRuntimeError as error:
        raise UserError(
            f"--topology={name} is refused by the TPU compiler ({error}); for example one of "
            f"{offered}"
        ) from error
    return Slice(generation, shape, found.devices)


def make_mesh(
    where: Slice, *, data: int = 1, fsdp: int = 1, context: int = 1, tensor: int = 1
) -> Mesh:
    """The mesh that a run makes on this slice; see sharding.make_mesh.

    Raises:
      UserError: if the sizes do not multiply to the number of chips, or the torus has no such axes.
    """
    sizes = dict(data=data, fsdp=fsdp, context=context, tensor=tensor)
    try:
        return sharding.make_mesh(**sizes, devices=where.devices)
    except NotImplementedError as error:
        product = " x ".join(f"mesh.{axis}={size}" for axis, size in sizes.items())
        raise UserError(
            f"{product} can't be laid out on {where.name}: each size must be a product of whole "
            f"dimensions of the torus ({' x '.join(map(str, where.shape))})"
        ) from error


def axis_bandwidth(where: Slice, mesh: Mesh, axes: Sequence[str]) -> float:
    """Bytes/s that a chip can receive from the others along these mesh axes.

    A dimension of the torus that the group covers has two links if it is a ring; an open line has
    one, because its ends have no more. A slice of three dimensions has rings only if all of them
    are whole cubes.
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
