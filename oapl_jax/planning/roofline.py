"""The least time that a step can take: of arithmetic, HBM, interconnect, and the link to the host.

Each is its amount over the chip's published rate, and a chip could do all of them at once: the
longest one is a bound that nothing can beat, not a forecast.
"""

import dataclasses
from collections.abc import Mapping

from oapl_jax.planning.hardware import Chip


@dataclasses.dataclass(frozen=True)
class Roofline:
    """Seconds of one gradient step, and what follows from the longest of them.

    Attributes:
      compute, hbm, interconnect, host: the terms.
      seconds: the longest.
      binds: its name.
      tokens_per_second: of all sequences, prompts included.
      mfu: the share of the chips' peak that the step's mathematics would have.
    """

    compute: float
    hbm: float
    interconnect: float
    host: float
    seconds: float
    binds: str
    tokens_per_second: float
    mfu: float


def roofline(
    chip: Chip,
    chips: int,
    *,
    program_flops: float,
    model_flops: float,
    hbm_bytes: float,
    host_bytes: float,
    received: Mapping[str, float],
    bandwidth: Mapping[str, float],
    tokens: int,
) -> Roofline:
    """The bound of a step.

    Args:
      chip, chips: of the slice.
      program_flops: of all chips, with what is computed again.
      model_flops: of all chips, what the mathematics needs.
      hbm_bytes, host_bytes: that one chip moves.
      received: mesh axes -> bytes that one chip takes in; one set of axes after the other.
      bandwidth: mesh axes -> bytes/s.
      tokens: of the step's sequences.
    """
    terms = {
        "compute": program_flops / chips / chip.flops,
        "hbm": hbm_bytes / chip.hbm_bandwidth,
        "interconnect": sum(size / bandwidth[axes] for axes, size in received.items()),
        "host": host_bytes / chip.host_bandwidth,
    }
    binds = max(terms, key=lambda term: terms[term])
    seconds = terms[binds]
    return Roofline(
        **terms,
        seconds=seconds,
        binds=binds,
        tokens_per_second=tokens / seconds,
        mfu=model_flops / (seconds * chips * chip.flops),
    )
