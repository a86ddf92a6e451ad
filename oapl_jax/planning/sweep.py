"""Many ways to lay out one run, tried until enough of them fit; results outlast an interruption."""

import json
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from etils import epath

from oapl_jax.planning.layouts import Choice, Mesh

Plan = dict[str, Any]
Found = list[tuple[Choice, Plan]]


def sweep(
    meshes: Sequence[Mesh],
    remats: Sequence[str],
    family: Callable[[Mesh, str], list[Choice]],
    plan: Callable[[Choice], Plan],
    *,
    enough: int,
) -> Found:
    """The layouts that fit, the fastest first.

    Meshes are tried with the first policy until enough fit, then the fastest mesh with the other
    policies, unless one plan is enough; if no mesh fits, all of them with the other policies.

    Args:
      meshes: in the order in which they are tried.
      remats: names of policies, the first one for all meshes.
      family: of a mesh and a policy, from few micro-batches to many; its first that fits is taken.
      plan: of a choice.
      enough: plans that fit.
    """
    first, *others = remats
    found = fitting((family(mesh, first) for mesh in meshes), plan, enough=enough)
    if found:
        best = min(found, key=seconds)[0].mesh
        found += fitting((family(best, remat) for remat in others), plan, enough=enough - 1)
    else:
        rest = (family(mesh, remat) for remat in others for mesh in meshes)
        found = fitting(rest, plan, enough=enough)
    return sorted(found, key=seconds)


def fitting(
    families: Iterable[list[Choice]], plan: Callable[[Choice], Plan], *, enough: int
) -> Found:
    """The first choice of each family that fits, until there are enough."""
    found: Found = []
    for family in families:
        if len(found) == enough:
            break
        for choice in family:
            result = plan(choice)
            if result["fits"]:
                found.append((choice, result))
            if result["chip_fits"]:
                break  # where the host is too small, micro-batches do not help
    return found


def seconds(pair: tuple[Choice, Plan]) -> float:
    return pair[1]["roofline"]["seconds"]


class Record:
    """Plans by key in one JSON file, written after each.

    Args:
      path: of the file.
      made_with: what else they depend on, which becomes a part of their keys.
    """

    def __init__(self, path: epath.Path, made_with: str = ""):
        self._path, self._made_with = path, made_with
        self.plans: dict[str, Plan] = json.loads(path.read_text()) if path.exists() else {}

    def get(self, key: str, make: Callable[[], Plan]) -> Plan:
        """The plan under this key, made if it is not there."""
        key += self._made_with
        if key not in self.plans:
            self.plans[key] = make()
            aside = self._path.with_suffix(".new")
            aside.write_text(json.dumps(self.plans, indent=1) + "\n")
            aside.replace(self._path)
        return self.plans[key]
