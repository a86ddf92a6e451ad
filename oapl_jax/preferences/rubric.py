"""A judge made of rules: each objective is a vote of rules on which of two responses is better."""

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from oapl_jax.errors import UserError
from oapl_jax.preferences.judge import Response
from oapl_jax.structs import Prompt

# What a rule thinks of one response: the higher the better.
RULES: dict[str, Callable[[Response], float]] = {
    "right": lambda response: response.verify(),
    "short": lambda response: -len(response.text),
    "long": lambda response: len(response.text),
    "varied": lambda response: len(set(response.text)),  # different characters
    "rising": lambda response: sum(map(str.__lt__, response.text, response.text[1:])),
}


class Rubric:
    """P_j(y beats y') is the share of objective j's votes for y; a rule that is level gives half.

    A vote of three rules or more can be cyclic though none of them is: this is Condorcet's paradox.

    Args:
      objectives: name -> rule, a key of RULES -> its weight, at least 0.

    Raises:
      UserError: for no objective, an unknown rule, or weights that do not add up to a vote.
    """

    def __init__(self, *, objectives: Mapping[str, Mapping[str, float]]):
        if not objectives:
            raise UserError("preferences.rubric.objectives is empty; name at least one")
        for name, weights in objectives.items():
            unknown = [rule for rule in weights if rule not in RULES]
            if unknown:
                raise UserError(
                    f"preferences.rubric.objectives.{name} has the unknown rule {unknown[0]!r}; "
                    f"choose among {', '.join(RULES)}"
                )
            if min(weights.values(), default=0.0) < 0 or not sum(weights.values()) > 0:
                raise UserError(
                    f"preferences.rubric.objectives.{name} needs weights of at least 0, and one "
                    "above it"
                )
        self.objectives = tuple(objectives)
        self._rules = sorted({rule for weights in objectives.values() for rule in weights})
        votes = np.zeros((len(objectives), len(self._rules)))
        for j, weights in enumerate(objectives.values()):
            for rule, weight in weights.items():
                votes[j, self._rules.index(rule)] = weight / sum(weights.values())
        self._votes = votes

    def compare(
        self, prompt: Prompt, responses: Sequence[Response], comparators: Sequence[Response]
    ) -> np.ndarray:
        mine, theirs = (
            np.array([[RULES[rule](y) for y in of] for rule in self._rules], np.float64)
            for of in (responses, comparators)
        )
        won = (np.sign(mine[:, :, None] - theirs[:, None, :]) + 1) / 2  # [rules, G, M]
        return np.einsum("jr,rgm->jgm", self._votes, won)

    def metrics(self) -> dict[str, float]:
        return {}
