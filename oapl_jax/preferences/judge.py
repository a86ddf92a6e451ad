"""What compares responses: the interface, and a judge that is a function of one's own."""

import dataclasses
import importlib
from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np

from oapl_jax.errors import UserError
from oapl_jax.structs import Prompt


@dataclasses.dataclass(frozen=True)
class Response:
    """A response as a judge sees it; it was not cut off.

    Attributes:
      text: without special tokens.
      verify: asks the verifier of the prompt's task what the response is worth.
    """

    text: str
    verify: Callable[[], float]


class Judge(Protocol):
    """Compares responses under one or several objectives. Any thread, several at a time."""

    @property
    def objectives(self) -> tuple[str, ...]:
        """Their names."""
        ...

    def compare(
        self, prompt: Prompt, responses: Sequence[Response], comparators: Sequence[Response]
    ) -> np.ndarray:
        """P_j(y beats y' | x), [J, G, M]: of each objective, each response y and comparator y'.

        Within 0 and 1, a tie being 1/2, or nan where there is no score. Nothing else is asked of
        it: it may be cyclic, and y need not beat y' with 1 - P_j(y' beats y).
        """
        ...

    def metrics(self) -> dict[str, float]:
        """What it counts itself, under names of its own. Any thread."""
        ...


class Callback:
    """A function of one's own.

    Args:
      function: "package.module:name" of a function with the arguments and the result of
        `Judge.compare`; called in threads.
      objectives: names of what it compares by, in its order.

    Raises:
      UserError: if there is no such function, or no objective.
    """

    def __init__(self, *, function: str, objectives: Sequence[str]):
        module, _, name = function.partition(":")
        try:
            found = getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError, ValueError) as error:
            raise UserError(
                f"preferences.callable.function={function!r} can't be imported ({error}); write it "
                "as package.module:name"
            ) from error
        if not objectives:
            raise UserError("preferences.callable.objectives is empty; name what it compares by")
        self.objectives = tuple(objectives)
        self.compare: Callable[..., np.ndarray] = found

    def metrics(self) -> dict[str, float]:
        return {}
