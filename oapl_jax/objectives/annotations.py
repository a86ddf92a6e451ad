"""Types of the objectives' arguments: arrays with their shapes, constants with their ranges."""

import math
from dataclasses import dataclass
from typing import Annotated, Any

from jaxtyping import Array, Float

PerToken = Float[Array, "S T"]  # of S sequences
PerResponse = Float[Array, " S"]
Losses = tuple[PerResponse, dict[str, PerResponse]]  # and metrics


@dataclass(frozen=True)
class Range:
    """The allowed values of a number."""

    above: float = -math.inf
    at_least: float = -math.inf
    at_most: float = math.inf

    def __contains__(self, value: Any) -> bool:
        number = isinstance(value, int | float)
        return number and self.above < value and self.at_least <= value <= self.at_most

    def __str__(self) -> str:
        bounds = ((name.replace("_", " "), bound) for name, bound in vars(self).items())
        return " and ".join(f"{name} {bound:g}" for name, bound in bounds if math.isfinite(bound))


class OneOf(tuple[str, ...]):
    """The allowed values of a string."""

    def __str__(self) -> str:
        return f"one of {', '.join(self)}"


Positive = Annotated[float, Range(above=0)]
NonNegative = Annotated[float, Range(at_least=0)]
AtLeastOne = Annotated[float, Range(at_least=1)]
Fraction = Annotated[float, Range(above=0, at_most=1)]
