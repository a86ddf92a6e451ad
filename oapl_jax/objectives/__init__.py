"""Objectives: what a learner minimises, as two pure functions of log-probabilities and rewards.

    advantage(reward[G], *, ...) -> [G]                                          no gradient
    loss(logp[G T], behavior_logp[G T], advantage[G], mask[G T], *, ...) -> (loss[G], metrics)

`advantage` sees one whole group; `loss` gives one number a sequence, and `metrics` per-sequence
arrays. How sequences are averaged is a separate choice, see aggregation.py.

A loss takes any sequences, in any order and number, unless it names `group_size`: then they must be
whole groups, one after another. docs/methods.md has every equation with its source.
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

from oapl_jax.errors import UserError
from oapl_jax.objectives import (
    a_star_po,
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


class Objective(NamedTuple):
    advantage: Callable[..., Any]
    loss: Callable[..., Any]


OBJECTIVES = {
    "oapl": Objective(oapl.advantage, oapl.loss),
    "oapl_length": Objective(oapl.advantage, oapl_length.loss),
    "a_star_po": Objective(a_star_po.advantage, a_star_po.loss),
    "tba": Objective(tba.advantage, tba.loss),
    "prosper": Objective(prosper.advantage, prosper.loss),
    "opmd_kimi": Objective(opmd_kimi.advantage, opmd_kimi.loss),
    "opmd_trinity": Objective(opmd_kimi.advantage, opmd_trinity.loss),
    "asymre": Objective(asymre.advantage, asymre.loss),
    "grpo": Objective(advantages.advantage, grpo.loss),
    "grpo_is": Objective(advantages.advantage, grpo.loss),
    "vcpo": Objective(advantages.advantage, grpo.loss),
    "dr_grpo": Objective(advantages.advantage, grpo.loss),
    "rloo": Objective(advantages.advantage, grpo.loss),
    "gspo": Objective(advantages.advantage, gspo.loss),
    "cispo": Objective(advantages.advantage, cispo.loss),
    "vespo": Objective(advantages.advantage, vespo.loss),
    "maxrl": Objective(maxrl.advantage, grpo.loss),
    "mixed": Objective(mixed.advantage, grpo.loss),
    "sft": Objective(sft.advantage, sft.loss),
}


def hyper_parameters(function: Callable[..., Any]) -> list[str]:
    """The names of a function's keyword-only parameters."""
    parameters = inspect.signature(function).parameters.values()
    return [p.name for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY]


def bind(name: str, **values: Any) -> Objective:
    """The objective with its hyper-parameters filled in from a configuration section.

    The section may serve several objectives: each function takes the values that its signature
    names.

    Raises:
      UserError: if the objective is unknown or one of its hyper-parameters is missing.
    """
    if name not in OBJECTIVES:
        raise UserError(
            f"objective.name={name!r} is unknown; choose one of {', '.join(OBJECTIVES)}"
        )

    def fill(function):
        names = hyper_parameters(function)
        missing = [key for key in names if key not in values]
        if missing:
            raise UserError(
                f"objective {name} needs objective.{', objective.'.join(missing)}; add them"
            )
        return functools.partial(function, **{key: values[key] for key in names})

    return Objective(*map(fill, OBJECTIVES[name]))
