"""What the TPU generations can do, as published, and the slices that they are rented in."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Chip:
    """One chip, and the host that it sits on.

    Attributes:
      flops: bfloat16 FLOP/s.
      hbm_bytes: as published; the compiler says what of it a program may have.
      hbm_bandwidth: bytes/s.
      link_bandwidth: bytes/s of one link in one direction: the published bandwidth of all links in
        both directions, divided by two directions and two links for each dimension of the torus.
      dimensions: of the torus.
      ring: chips along a dimension from which its ends are joined; a multiple of it keeps the ring.
      chips_per_host: of a slice of several hosts.
      ram_bytes: of such a host.
      source: where the numbers stand.
    """

    flops: float
    hbm_bytes: float
    hbm_bandwidth: float
    link_bandwidth: float
    dimensions: int
    ring: int
    chips_per_host: int
    ram_bytes: float
    source: str


# Rings: https://jax-ml.github.io/scaling-book/tpus. RAM: the machine types ct5lp-hightpu-4t,
# ct5p-hightpu-4t and ct6e-standard-4t of the same pages.
CHIPS = {
    "v5e": Chip(
        flops=197e12,
        hbm_bytes=16e9,
        hbm_bandwidth=819e9,
        link_bandwidth=400e9 / 2 / 4,
        dimensions=2,
        ring=16,
        chips_per_host=4,
        ram_bytes=192e9,
        source="https://cloud.google.com/tpu/docs/v5e",
    ),
    "v5p": Chip(
        flops=459e12,
        hbm_bytes=95 * 2**30,
        hbm_bandwidth=2765e9,
        link_bandwidth=1200e9 / 2 / 6,
        dimensions=3,
        ring=4,
        chips_per_host=4,
        ram_bytes=448e9,
        source="https://cloud.google.com/tpu/docs/v5p",
    ),
    "v6e": Chip(
        flops=918e12,
        hbm_bytes=32e9,
        hbm_bandwidth=1600e9,
        link_bandwidth=800e9 / 2 / 4,
        dimensions=2,
        ring=16,
        chips_per_host=4,
        ram_bytes=720e9,
        source="https://cloud.google.com/tpu/docs/v6e",
    ),
}

# Topologies by number of chips.
FLAT = {4: "2x2", 16: "4x4", 32: "4x8", 64: "8x8", 128: "8x16", 256: "16x16"}
SLICES = {
    "v5e": FLAT,
    "v5p": {4: "2x2x1", 16: "2x2x4", 32: "2x4x4", 64: "4x4x4", 128: "4x4x8", 256: "4x8x8"},
    "v6e": FLAT,
}
