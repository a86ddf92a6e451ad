"""The stream of prompts that the worker takes: all of them, or those that a teacher chooses."""

from collections.abc import Iterator
from typing import Any

import numpy as np

from oapl_jax.curriculum.choice import choose, log_softmax
from oapl_jax.curriculum.teacher import Teacher
from oapl_jax.data.prompts import PromptStream
from oapl_jax.structs import Prompt


class Curriculum(Iterator[Prompt]):
    """Takes the next `candidates` prompts of a stream, gives `picks` of them, and so on.

    A chosen prompt keeps its draw, so `at` finds it again; draws that are not chosen are passed
    over, and come again in another epoch. As long as the teacher is not awake this is the stream
    itself.

    Args:
      prompts: the stream of candidates, uniform over the data.
      teacher: weighs them.
      candidates: C.
      picks: chosen of them, at most C.
      top_p: see `choose`.
      seed: with the first candidate's draw it names the random numbers of a choice.
    """

    def __init__(
        self,
        prompts: PromptStream,
        teacher: Teacher,
        *,
        candidates: int,
        picks: int,
        top_p: float,
        seed: int,
    ):
        self.teacher = teacher
        self._prompts, self._candidates, self._picks = prompts, candidates, picks
        self._top_p, self._seed = top_p, seed
        self._chosen: list[Prompt] = []  # and not yet given
        self._latest: dict[str, float] = {}  # metrics of the latest choice

    def __next__(self) -> Prompt:
        if not self._chosen:
            self._chosen = self._choose() if self.teacher.awake else [next(self._prompts)]
        return self._chosen.pop(0)

    def _choose(self) -> list[Prompt]:
        candidates = [next(self._prompts) for _ in range(self._candidates)]
        log_p = log_softmax(self.teacher.logits(candidates))
        rng = np.random.default_rng([self._seed, candidates[0].stream_index, 1])
        chosen, by_p = choose(log_p, self._picks, top_p=self._top_p, rng=rng)
        self.teacher.picked(candidates, log_p, chosen)
        self._latest = {
            "curriculum/chosen": by_p / self._picks,
            "curriculum/effective_share": float(
                np.exp(-np.sum(np.exp(log_p) * log_p)) / self._candidates
            ),
        }
        return [candidates[i] for i in chosen]

    def at(self, draw: int) -> Prompt:
        """The prompt of one draw, as `PromptStream.at`."""
        return self._prompts.at(draw)

    @property
    def dropped(self) -> int:
        """Prompts of the stream that are too long."""
        return self._prompts.dropped

    def metrics(self) -> dict[str, float]:
        awake = {"curriculum/awake": float(self.teacher.awake)} if self._latest else {}
        return {**awake, **self._latest, **self.teacher.metrics()}

    def state(self) -> dict[str, Any]:
        """The place in the stream and what is chosen, JSON-able; the teacher has a state of its
        own."""
        chosen = [prompt.stream_index for prompt in self._chosen]
        return {"stream": self._prompts.state(), "chosen": chosen, "latest": dict(self._latest)}

    def restore(self, state: dict[str, Any]) -> None:
        """Continues where `state` was taken; raises as `PromptStream.restore` does."""
        self._prompts.restore(state["stream"])
        self._chosen = [self.at(draw) for draw in state["chosen"]]
        self._latest = dict(state["latest"])
