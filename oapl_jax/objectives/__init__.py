"""Objectives: the learner's loss as two pure functions of log-probabilities and rewards.

    advantage(reward[G], *, ...) -> [G]                                          no gradient
    loss(logp[S T], behavior_logp[S T], advantage[S], mask[S T], *, ...) -> (loss[S], metrics)

`advantage` sees one whole group; `loss` gives one number a sequence, and `metrics` per-sequence
arrays. The average over sequences is a separate choice, see aggregation.py.

A loss takes any sequences, in any order and number, unless it names `group_size`: then they are
whole groups, one after another. docs/methods.md has every equation with its source.

Constants are keyword-only and required. The configuration has their values in `objective.NAME`, in
`objective.policy_gradient` (GRPO and its relatives) or, for OAPL's two, in `objective` itself.
"""

import difflib
import functools
import inspect
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from oapl_jax.errors import UserError
from oapl_jax.objectives import (
    advantages,
    asymre,
    cispo,
    grpo,
    gspo,
    maxrl,
    mixed,
    oapl,
    oapl_length,
    opmd_kimi,
    opmd_trinity,
    prosper,
    sft,
    tba,
    vespo,
)

OAPL = ""  # the section itself, with the constants of OAPL and its relatives
FAMILY = "policy_gradient"  # the sub-section of GRPO and its relatives


class Objective(NamedTuple):
    advantage: Callable[..., Any]
    loss: Callable[..., Any]
    shared: str | None = None  # holds constants beside the objective's own sub-section

    @property
    def needs_whole_groups(self) -> bool:
        """True if the loss compares the sequences of a group."""
        return "group_size" in constants(self.loss)


OBJECTIVES = {
    "oapl": Objective(oapl.advantage, oapl.loss, OAPL),
    "oapl_length": Objective(oapl.advantage, oapl_length.loss, OAPL),
    "a_star_po": Objective(oapl.advantage, oapl.loss),
    "tba": Objective(advantages.centred, tba.loss),
    "prosper": Objective(advantages.centred, prosper.loss),
    "opmd_kimi": Objective(opmd_kimi.advantage, opmd_kimi.loss),
    "opmd_trinity": Objective(opmd_kimi.advantage, opmd_trinity.loss),
    "asymre": Objective(asymre.advantage, asymre.loss),
    "grpo": Objective(advantages.advantage, grpo.loss, FAMILY),
    "grpo_is": Objective(advantages.advantage, grpo.loss, FAMILY),
    "vcpo": Objective(advantages.advantage, grpo.loss, FAMILY),
    "dr_grpo": Objective(advantages.advantage, grpo.loss, FAMILY),
    "rloo": Objective(advantages.advantage, grpo.loss, FAMILY),
    "gspo": Objective(advantages.advantage, gspo.loss, FAMILY),
    "cispo": Objective(advantages.advantage, cispo.loss, FAMILY),
    "vespo": Objective(advantages.advantage, vespo.loss, FAMILY),
    "maxrl": Objective(maxrl.advantage, grpo.loss, FAMILY),
    "mixed": Objective(mixed.advantage, grpo.loss, FAMILY),
    "sft": Objective(sft.advantage, sft.loss),
}


def constants(function: Callable[..., Any]) -> dict[str, Any]:
    """The keyword-only parameters of a function, with their annotations."""
    parameters = inspect.signature(function).parameters.values()
    return {p.name: p.annotation for p in parameters if p.kind is p.KEYWORD_ONLY}


def bind(name: str, section: Mapping[str, Any], *, group_size: int | None = None) -> Objective:
    """Fills the constants of an objective from the configuration's section `objective`.

    Args:
      section: the constants, nested as above; of other objectives only the names are checked.
      group_size: G. If given, both functions are traced once, which finds constants that contradict
        each other or the group.

    Raises:
      UserError: for an unknown objective, or a missing, misspelt or out-of-range constant.
    """
    if name not in OBJECTIVES:
        raise UserError(f"objective.name={name!r} must be one of {', '.join(OBJECTIVES)}")
    objective, settings = OBJECTIVES[name], settings_of(name, section)
    if group_size:
        settings["group_size"] = ("group_size", group_size)

    def fill(function: Callable[..., Any]) -> Callable[..., Any]:
        values = {}
        for key, annotation in constants(function).items():
            if key not in settings:
                raise UserError(f"objective {name} needs {key} in the section objective; add it")
            setting, values[key] = settings[key]
            for allowed in getattr(annotation, "__metadata__", ()):
                if values[key] not in allowed:
                    raise UserError(f"{setting}={values[key]!r} must be {allowed}")
        return functools.partial(function, **values)

    bound = Objective(fill(objective.advantage), fill(objective.loss), objective.shared)
    if group_size:
        row, grid = (jax.ShapeDtypeStruct((group_size, *t), jnp.float32) for t in ((), (1,)))
        jax.eval_shape(bound.advantage, row)
        jax.eval_shape(bound.loss, grid, grid, row, grid)
    return bound


def settings_of(name: str, section: Mapping[str, Any]) -> dict[str, tuple[str, Any]]:
    """Constant -> its full setting and value; the objective's own sub-section takes precedence.

    Raises:
      UserError: for a name in the section that no objective has, with the nearest one.
    """
    nested = {key: value for key, value in section.items() if isinstance(value, Mapping)}
    flat = {key: value for key, value in section.items() if key not in nested}
    places = {*OBJECTIVES, *(o.shared for o in OBJECTIVES.values() if o.shared)}
    _check_names("objective.", nested, places)
    settings = {}
    for place, values in sorted({OAPL: flat, **nested}.items(), key=lambda item: item[0] == name):
        readers = [o for other, o in OBJECTIVES.items() if place in (other, o.shared)]
        known = {key for o in readers for f in (o.advantage, o.loss) for key in constants(f)}
        prefix = f"objective.{place}." if place else "objective."
        _check_names(prefix, values, known)
        if place in (OBJECTIVES[name].shared, name):
            settings |= {key: (prefix + key, value) for key, value in values.items()}
    return settings


def _check_names(prefix: str, given: Iterable[str], known: Collection[str]) -> None:
    for key in given:
        if key not in known:
            nearest = "".join(difflib.get_close_matches(key, known, n=1, cutoff=0))
            raise UserError(f"{prefix}{key} is unknown; did you mean {nearest}?")
