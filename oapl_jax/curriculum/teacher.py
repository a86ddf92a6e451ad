"""What weighs prompts: the common ground of all curricula, and the one that weighs none."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from oapl_jax.structs import Group, Prompt


class Teacher:
    """Weighs candidates and hears what became of the prompts; what it has no use for is passed by.

    Every method but `awake` and `rescores` is called with the buffer's lock held: the worker's
    thread asks and tells, the learner's trains and saves.
    """

    @property
    def awake(self) -> bool:
        """Whether it chooses; asleep, every prompt of the stream is sampled."""
        return True

    @property
    def rescores(self) -> bool:
        """Whether `trained` needs the updated learner's log-probs."""
        return False

    def logits(self, prompts: Sequence[Prompt]) -> np.ndarray:
        """float[C]: a prompt is chosen with the softmax of these; all are equal here."""
        return np.zeros(len(prompts))

    def picked(self, candidates: Sequence[Prompt], log_p: np.ndarray, chosen: np.ndarray) -> None:
        """Of C candidates those at the indices `chosen` will be sampled; float64[C] log_p is what
        they were chosen with."""

    def ended(self, group: Group) -> None:
        """A group's rewards are known."""

    def trained(self, groups: Sequence[Group], logp: np.ndarray | None) -> None:
        """The learner has taken a gradient step on these groups.

        Args:
          groups: of the step.
          logp: float32[S, C], log-probs of all their responses' tokens, one row each in the order
            of the groups, by the learner after the step; None unless `rescores`.
        """

    def metrics(self) -> dict[str, float]:
        return {}

    def state(self, alive: set[int]) -> dict[str, Any]:
        """JSON-able; what it knows of draws that are not `alive` may be forgotten."""
        return {}

    def arrays(self) -> Any | None:
        """Arrays on the mesh, to be saved beside `state`; None if it has none."""
        return None

    def restore(
        self, state: dict[str, Any], read: Callable[[Any], Any], at: Callable[[int], Prompt]
    ) -> None:
        """Continues where `state` and `arrays` were taken.

        Args:
          state: of `state`.
          read: takes what `arrays` gives now, for shapes and shardings; gives what was saved.
          at: draw -> prompt.
        """


class Uniform(Teacher):
    """Never awake: the stream as it comes."""

    @property
    def awake(self) -> bool:
        return False
