"""Many ways to lay out one run, tried until enough of them fit; results outlast an interruption."""

import json
from collections.abc import Callable, Iterable
from typing import Any

from etils import epath

from oapl_jax.errors import UserError
from oapl_jax.plan.choices import Choice

Plan = dict[str, Any]


def sweep(
    families: Iterable[list[Choice]], plan: Callable[[Choice], Plan], *, enough: int
) -> list[tuple[Choice, Plan]]:
    """The first choice of each family that fits, until there are enough, the fastest first.

    Args:
      families: of choices; a family ends with its first choice that fits.
      plan: of a choice; a UserError says that the slice or the model refuses it.
      enough: plans that fit.
    """
    found = []
    for family in families:
        for choice in family:
            try:
                result = plan(choice)
            except UserError:
                break  # of the mesh, so of all of the family
            if result["fits"]:
                found.append((choice, result))
                break
        if len(found) == enough:
            break
    return sorted(found, key=lambda pair: pair[1]["roofline"]["seconds"])


class Record:
    """Plans by key in one JSON file, written after each."""

    def __init__(self, path: epath.Path):
        self._path = path
        self.plans: dict[str, Plan] = json.loads(path.read_text()) if path.exists() else {}

    def get(self, key: str, make: Callable[[], Plan]) -> Plan:
        """The plan under this key, made if it is not there."""
        if key not in self.plans:
            self.plans[key] = make()
            aside = self._path.with_suffix(".new")
            aside.write_text(json.dumps(self.plans, indent=1) + "\n")
            aside.replace(self._path)
        return self.plans[key]
