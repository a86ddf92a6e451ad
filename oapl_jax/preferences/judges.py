"""Judges of responses: the interface, a rubric of rules, and a user's Python function."""

import dataclasses
import importlib
from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np

from oapl_jax.config import CallableJudgeConfig, RubricConfig
from oapl_jax.errors import UserError
from oapl_jax.structs import Prompt


@dataclasses.dataclass(frozen=True)
class Response:
    """A complete response as a judge sees it."""

    text: str  # without special tokens
    verify: Callable[[], float]  # the reward by the verifier of the prompt's task


class Judge(Protocol):
    """Compares responses under one or several objectives. Thread-safe."""

    objectives: tuple[str, ...]  # their names

    def compare(
        self, prompt: Prompt, responses: Sequence[Response], comparators: Sequence[Response]
    ) -> np.ndarray:
        """P_j(y beats y' | x), [J, G, M]: of each objective, each response y and comparator y'.

        In [0, 1], 1/2 for a tie, nan without a score. It may be cyclic, and P_j(y beats y') need
        not be 1 - P_j(y' beats y).
        """
        ...

    def metrics(self) -> dict[str, float]:
        """The judge's own counts. Thread-safe."""
        return {}


# Score of one response under a rule; the higher the better.
RULES: dict[str, Callable[[Response], float]] = {
    "right": lambda response: response.verify(),
    "short": lambda response: -len(response.text),
    "long": lambda response: len(response.text),
    "varied": lambda response: len(set(response.text)),  # different characters
    "rising": lambda response: sum(map(str.__lt__, response.text, response.text[1:])),
}


class RubricJudge(Judge):
    """P_j(y beats y') is the share of objective j's votes for y; a tied rule gives half its vote.

    A vote of three rules or more can be cyclic though none of them is (Condorcet's paradox).

    Raises:
      UserError: for no objective, an unknown rule, or weights without a positive sum.
    """

    def __init__(self, config: RubricConfig):
        objectives = config.objectives
        if not objectives:
            raise UserError("preferences.rubric.objectives is empty; name at least one")
        for name, weights in objectives.items():
            setting = f"preferences.rubric.objectives.{name}"
            unknown = [rule for rule in weights if rule not in RULES]
            if unknown:
                raise UserError(f"{setting}: rule {unknown[0]!r} is not one of {', '.join(RULES)}")
            if min(weights.values(), default=0.0) < 0 or not sum(weights.values()) > 0:
                raise UserError(f"{setting}: weights must be at least 0, and one of them above 0")
        self.objectives = tuple(objectives)
        each = objectives.values()
        self._rules = sorted({rule for weights in each for rule in weights})
        votes = [[weights.get(rule, 0.0) for rule in self._rules] for weights in each]
        self._votes = np.array(votes) / np.sum(votes, axis=1, keepdims=True)

    def compare(
        self, prompt: Prompt, responses: Sequence[Response], comparators: Sequence[Response]
    ) -> np.ndarray:
        mine, theirs = (
            np.array([[RULES[rule](y) for y in of] for rule in self._rules], np.float64)
            for of in (responses, comparators)
        )
        won = (np.sign(mine[:, :, None] - theirs[:, None, :]) + 1) / 2  # [rules, G, M]
        return np.einsum("jr,rgm->jgm", self._votes, won)


class CallableJudge(Judge):
    """Calls a user's function with the arguments and the result of `Judge.compare`, in threads.

    Raises:
      UserError: for a function that can't be imported, or no objective.
    """

    def __init__(self, config: CallableJudgeConfig):
        module, _, name = config.function.partition(":")
        try:
            compare = getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError, ValueError) as error:
            raise UserError(
                f"preferences.callable.function={config.function!r} can't be imported ({error}); "
                "write it as package.module:name"
            ) from error
        if not config.objectives:
            raise UserError("preferences.callable.objectives is empty; name at least one")
        self.objectives = config.objectives
        self.compare: Callable[..., np.ndarray] = compare
