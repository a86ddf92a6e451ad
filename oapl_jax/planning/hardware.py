"""TPU slices and GPUs: published rates, and topologies to compile for without hardware."""

import dataclasses
import importlib.util
import math
import os
import re
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh

from oapl_jax.errors import UserError
from oapl_jax.model import sharding


@dataclasses.dataclass(frozen=True)
class Chip:
    """Rates of one chip, as published at PAGES/generation."""

    generation: str
    flops: float  # bfloat16 FLOP/s
    hbm_bytes: int  # as published; the compiler leaves a program a little less
    hbm_bandwidth: float  # bytes/s
    ici_bandwidth: float  # bytes/s of all links in both directions
    host_bandwidth: float  # bytes/s between a chip and its host, each way
    dimensions: int  # of the torus
    ring: int  # the least size of a dimension that is a ring; its multiples are rings too

    @property
    def link_bandwidth(self) -> float:
        """Bytes/s of one of the two links of each dimension, in one direction."""
        return self.ici_bandwidth / 2 / (2 * self.dimensions)


PAGES = "https://cloud.google.com/tpu/docs"
# Rings: https://jax-ml.github.io/scaling-book/tpus. Bandwidths to hosts are not published: these
# are second-hand, from notes on that book (16 to 32 GB/s of PCIe).
GIB = 2**30
CHIPS = {
    "v5e": Chip("v5e", 197e12, 16 * GIB, 819e9, 400e9, 16e9, 2, 16),
    "v5p": Chip("v5p", 459e12, 95 * GIB, 2765e9, 1200e9, 16e9, 3, 4),
    "v6e": Chip("v6e", 918e12, 32 * GIB, 1600e9, 800e9, 32e9, 2, 16),
}

# Chips of a machine -> bytes of its RAM: the types ct5lp-hightpu-1t, -4t, -8t, ct5p-hightpu-4t and
# ct6e-standard-1t, -4t, -8t of the same pages. A slice of so many chips is one machine; any other
# consists of machines of CHIPS_PER_HOST.
CHIPS_PER_HOST = 4
MACHINES = {
    "v5e": {1: 48e9, 4: 192e9, 8: 384e9},
    "v5p": {4: 448e9},
    "v6e": {1: 176e9, 4: 720e9, 8: 1440e9},
}

# Topologies that can be rented, by number of chips.
FLAT = {1: "1x1", 4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8", 128: "8x16", 256: "16x16"}
CUBES = {4: "2x2x1", 8: "2x2x2", 16: "2x2x4", 32: "2x4x4", 64: "4x4x4", 128: "4x4x8", 256: "4x8x8"}
SLICES = {"v5e": FLAT, "v5p": CUBES, "v6e": FLAT}


@dataclasses.dataclass(frozen=True)
class Gpu:
    """Published rates of one GPU, for which nothing is compiled here."""

    flops: float  # bfloat16 FLOP/s, without sparsity
    bytes: float
    bandwidth: float  # bytes/s


GPUS = {"h200": Gpu(989e12, 141e9, 4.8e12)}  # https://www.nvidia.com/en-us/data-center/h200/

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

    chip: Chip
    shape: tuple[int, ...]
    devices: Sequence[Any]

    @property
    def name(self) -> str:
        return f"{self.chip.generation}:{'x'.join(map(str, self.shape))}"

    @property
    def chips_per_host(self) -> int:
        chips = len(self.devices)
        return chips if chips in MACHINES[self.chip.generation] else CHIPS_PER_HOST

    @property
    def hosts(self) -> int:
        return -(-len(self.devices) // self.chips_per_host)

    @property
    def host_ram(self) -> float:
        return MACHINES[self.chip.generation][self.chips_per_host]


def open_slice(name: str) -> Slice:
    """Opens the topology of the slice "generation:shape", for example "v5e:8x8" or "v5p:4x4x4".

    Raises a UserError for a slice that does not exist, or if libtpu is not installed.
    """
    generation, _, sizes = name.partition(":")
    slices = [f"{g}:{', '.join(shapes.values())}" for g, shapes in SLICES.items()]
    offered = "; ".join([*slices, *GPUS])
    known = generation in CHIPS and re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", sizes)
    if not known or len(sizes.split("x")) != CHIPS[generation].dimensions:
        raise UserError(f"--topology={name} is no slice; for example one of {offered}")
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(
            "the TPU compiler is missing (no TPU is needed): in the checkout, "
            ".venv/bin/pip install --constraint=requirements/dev.lock --editable '.[tpu]'"
        )
    for variable, value in ENVIRONMENT.items():
        os.environ.setdefault(variable, value)
    os.environ.update(LOG_LEVEL)
    shape = tuple(map(int, sizes.split("x")))
    # By default the compiler puts 2 x 2 chips on each host, also where one machine has them all.
    one_machine = SLICES[generation].get(math.prod(shape)) == sizes
    one_machine = one_machine and math.prod(shape) in MACHINES[generation]
    bounds = dict(chips_per_host_bounds=[*shape, 1][:3]) if one_machine else {}
    try:
        found = topologies.get_topology_desc(platform="tpu", topology_name=name, **bounds)
    except jax.errors.JaxRuntimeError as error:
        refused = f"--topology={name} is refused by the TPU compiler ({error})"
        raise UserError(f"{refused}; for example one of {offered}") from error
    return Slice(CHIPS[generation], shape, found.devices)


def make_mesh(
    where: Slice, devices: Sequence[Any] | None = None, *, setting: str = "mesh", **sizes: int
) -> Mesh:
    """The mesh that a run makes of `devices` of this slice (default: all).

    Axes without a size have one chip. `setting` is the section that has the sizes, for errors.
    Raises a UserError if the sizes do not multiply to the number of chips, or fit no such torus.
    """
    devices = where.devices if devices is None else devices
    sizes = dict(data=1, fsdp=1, tensor=1) | sizes
    try:
        return sharding.make_mesh(**sizes, devices=devices, of=where.devices, setting=setting)
    except NotImplementedError as error:
        product = " x ".join(f"{setting}.{axis}={size}" for axis, size in sizes.items())
        raise UserError(
            f"{product} can't be laid out on {where.name}: each size must be a product of whole "
            f"dimensions of the torus ({' x '.join(map(str, where.shape))}); set {setting}.fsdp="
            f"{len(devices)} and the others to 1"
        ) from error


def axis_bandwidth(where: Slice, mesh: Mesh, axes: Sequence[str]) -> float:
    """Bytes/s that a chip can receive from the others along these mesh axes.

    A dimension of the torus that the group covers has two links if it is a ring, one if it is open.
    A slice of three dimensions has rings only if all of them are whole cubes.
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
