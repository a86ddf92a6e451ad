"""Types of the objectives' arguments: arrays with their shapes, constants with their ranges."""

import ctypes
import math
import sys
from dataclasses import dataclass
from typing import Annotated, Any

from jaxtyping import Array, Float

PerToken = Float[Array, "S T"]  # of S sequences
PerResponse = Float[Array, " S"]
Losses = tuple[PerResponse, dict[str, PerResponse]]  # and metrics


@dataclass(frozen=True)
class Range:
    """The allowed values of a number, which must be finite unless `infinite`."""

    above: float = -math.inf
    at_least: float = -math.inf
    at_most: float = math.inf
    infinite: bool = False

    def __contains__(self, value: Any) -> bool:
        if isinstance(value, bool) or not isinstance(value, int | float):
            return False
        if value == math.inf:
            return self.infinite
        if not abs(value) <= sys.float_info.max:  # an integer may be larger than any float
            return False
        single = ctypes.c_float(value).value  # of the devices: 1e-50 is 0 there
        return math.isfinite(single) and all(
            self.above < x and self.at_least <= x <= self.at_most for x in (value, single)
        )

    def __str__(self) -> str:
        bounds = {"above": self.above, "at least": self.at_least, "at most": self.at_most}
        finite = [f"{name} {bound:g}" for name, bound in bounds.items() if math.isfinite(bound)]
        return f"{' and '.join(finite) or 'a finite number'}, in float32 too"


class OneOf(tuple[str, ...]):
    """The allowed values of a string."""

    def __str__(self) -> str:
        return f"one of {', '.join(self)}"


Finite = Annotated[float, Range()]
Positive = Annotated[float, Range(above=0)]
NonNegative = Annotated[float, Range(at_least=0)]
ClipWidth = Annotated[float, Range(at_least=0, infinite=True)]  # infinity: clips nothing
Cap = Annotated[float, Range(above=0, infinite=True)]  # likewise
Fraction = Annotated[float, Range(above=0, at_most=1)]
