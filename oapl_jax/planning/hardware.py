"""What the TPU generations can do, as published, and the slices and machines they are rented in."""

import dataclasses
from collections.abc import Mapping


@dataclasses.dataclass(frozen=True)
class Chip:
    """One chip, and the machines that it is in.

    Attributes:
      flops: bfloat16 FLOP/s.
      hbm_bytes: as published; the compiler says what of it a program may have.
      hbm_bandwidth: bytes/s.
      link_bandwidth: bytes/s of one link in one direction: the published bandwidth of all links in
        both directions, divided by two directions and two links for each dimension of the torus.
      host_bandwidth: bytes/s between a chip and its host, each way.
      dimensions: of the torus.
      ring: chips along a dimension from which its ends are joined; a multiple of it keeps the ring.
      machines: chips of a machine -> bytes of its RAM. A slice of so many chips is one machine, any
        other is made of those with CHIPS_PER_HOST.
      source: where the numbers stand.
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
# -8t, ct5p-hightpu-4t and ct6e-standard-1t, -4t, -8t of the same pages as the rest. The links to
# hosts are not on them: these are second-hand, from notes on that book (16 to 32 GB/s of PCIe).
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

# Topologies by number of chips.
FLAT = {1: "1x1", 4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8", 128: "8x16", 256: "16x16"}
SLICES = {
    "v5e": FLAT,
    "v5p": {
        4: "2x2x1",
        8: "2x2x2",
        16: "2x2x4",
        32: "2x4x4",
        64: "4x4x4",
        128: "4x4x8",
        256: "4x8x8",
    },
    "v6e": FLAT,
}
