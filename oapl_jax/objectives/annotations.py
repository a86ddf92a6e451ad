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
    """The allowed values of a number, which must be finite."""

    above: float = -math.inf
    at_least: float = -math.inf
    at_most: float = math.inf

    def __contains__(self, value: Any) -> bool:
        if isinstance(value, bool) or not isinstance(value, int | float):
            return False
        if not abs(value) <= sys.float_info.max:  # an integer may be larger than any float
            return False
        single = ctypes.c_float(value).value  # of the devices: 1e-50 is 0 there
        return math.isfinite(single) and all(
            self.above < x and self.at_least <= x <= self.at_most for x in (value, single)
        )

    def __str__(self) -> str:
        bounds = ((name.replace("_", " "), bound) for name, bound in vars(self).items())
        finite = [f"{name} {bound:g}" for name, bound in bounds if math.isfinite(bound)]
        return f"{' and '.join(finite) or 'a finite number'}, in float32 too"


class OneOf(tuple[str, ...]):
    """The allowed values of a string."""

    def __str__(self) -> str:
        return f"one of {', '.join(self)}"


Finite = Annotated[float, Range()]
Positive = Annotated[float, Range(above=0)]
NonNegative = Annotated[float, Range(at_least=0)]
AtLeastOne = Annotated[float, Range(at_least=1)]
Fraction = Annotated[float, Range(above=0, at_most=1)]
