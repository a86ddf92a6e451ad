"""Actor-curator (arXiv 2602.20532): a network learns which prompts improve the policy most."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
import optax
from jax.sharding import Mesh

from oapl_jax.curriculum.curator import (
    Curator,
    CuratorState,
    init_state,
    make_scorer,
    make_step,
    padded,
)
from oapl_jax.curriculum.teacher import Teacher
from oapl_jax.curriculum.utility import utility
from oapl_jax.model.sharding import gathered
from oapl_jax.structs import Group, Prompt


@dataclasses.dataclass
class Round:
    """One choice, and what is still to be learnt from it.

    Attributes:
      candidates: C prompts.
      log_p: float64[C], what the choice was made with.
      count: how many were chosen.
      awaited: draw -> index of the chosen ones whose groups have yet to end.
      utility: float32[C], of those that the latest gradient step was taken on, 0 elsewhere.
    """

    candidates: Sequence[Prompt]
    log_p: np.ndarray
    count: int
    awaited: dict[int, int]
    utility: np.ndarray = dataclasses.field(init=False)

    def __post_init__(self):
        self.utility = np.zeros(len(self.candidates), np.float32)

    def state(self) -> list[Any]:
        draws = [prompt.stream_index for prompt in self.candidates]
        return [draws, self.log_p.tolist(), self.count, list(self.awaited.items())]

    @classmethod
    def restored(cls, state: list[Any], at: Callable[[int], Prompt]) -> "Round":
        draws, log_p, count, awaited = state
        return cls([at(draw) for draw in draws], np.array(log_p), count, dict(awaited))


class ActorCurator(Teacher):
    """Chooses by a curator network, and trains it on the utility of what was chosen.

    Three phases, by the learner's steps: `dormant`, in which it sleeps; `warmup`, in which it
    chooses uniformly and is trained; then it chooses by the network. After each step of the learner
    it studies every choice that groups of the step came from. A prompt that the learner does not
    see (its rewards are equal, its group failed or expired) has utility 0 and moves nothing.

    Args:
      model: the network.
      optimizer: of its own.
      mesh: the learner's.
      start: a decoder's parameters, or the seed of fresh ones.
      max_prompt_tokens: of a prompt.
      rows: prompts of one forward pass.
      temperature: of the softmax over candidates.
      clip: eps of the surrogate.
      passes: gradient steps on each choice that is studied; from the second on the clip may bind.
      dormant, warmup: gradient steps of the learner.
    """

    def __init__(
        self,
        model: Curator,
        optimizer: optax.GradientTransformation,
        mesh: Mesh,
        start: Any | int,
        *,
        max_prompt_tokens: int,
        rows: int,
        temperature: float,
        clip: float,
        passes: int,
        dormant: int,
        warmup: int,
    ):
        self._temperature, self._passes, self._rows = temperature, passes, rows
        self._dormant, self._warmup = dormant, warmup
        self._width = max_prompt_tokens + -max_prompt_tokens % mesh.shape["context"]
        self._curator = init_state(model, optimizer, mesh, start)
        self._step = make_step(
            model, optimizer, mesh, rows=rows, temperature=temperature, clip=clip
        )
        self._score = make_scorer(model, rows=rows)
        self._learner_steps, self._steps = 0, 0
        self._rounds: list[Round] = []  # that still await groups
        self._latest: dict[str, float] = {}  # metrics of the latest study
        self._hold()

    def _hold(self) -> None:
        """A copy of the parameters for the scorer, see there."""
        self._scoring = gathered(self._curator.params)

    @property
    def awake(self) -> bool:
        return self._learner_steps >= self._dormant

    @property
    def rescores(self) -> bool:
        return self.awake

    def logits(self, prompts: Sequence[Prompt]) -> np.ndarray:
        if self._learner_steps < self._dormant + self._warmup:
            return np.zeros(len(prompts))
        tokens, segments = padded(prompts, width=self._width, rows=self._rows)
        logits = jax.device_get(self._score(self._scoring, tokens, segments))
        return logits[: len(prompts)] / self._temperature

    def picked(self, candidates: Sequence[Prompt], log_p: np.ndarray, chosen: np.ndarray) -> None:
        awaited = {candidates[i].stream_index: int(i) for i in chosen}
        self._rounds.append(Round(candidates, log_p, len(chosen), awaited))

    def ended(self, group: Group) -> None:
        if group.zero_variance:
            for round_ in self._rounds:
                round_.awaited.pop(group.prompt.stream_index, None)

    def trained(self, groups: Sequence[Group], logp: np.ndarray | None) -> None:
        self._learner_steps += 1
        if logp is None:
            return
        rows = np.split(logp, np.cumsum([len(g.rollouts) for g in groups])[:-1])
        for group, of_group in zip(groups, rows, strict=True):
            for round_ in self._rounds:
                # It is in none if it was drawn while this slept, or is recorded or replayed.
                if group.prompt.stream_index in round_.awaited:
                    index = round_.awaited.pop(group.prompt.stream_index)
                    round_.utility[index] = utility(group, of_group)
        for round_ in self._rounds:
            if round_.utility.any():
                self._study(round_)
        self._rounds = [round_ for round_ in self._rounds if round_.awaited]

    def _study(self, round_: Round) -> None:
        tokens, segments = padded(round_.candidates, width=self._width, rows=self._rows)
        missing = len(tokens) - len(round_.candidates)
        log_p = np.pad(round_.log_p.astype(np.float32), (0, missing), constant_values=-np.inf)
        value = np.pad(round_.utility, (0, missing))
        metrics = {}
        for _ in range(self._passes):
            self._curator, metrics = self._step(
                self._curator, tokens, segments, log_p, value, round_.count
            )
        self._steps += self._passes
        self._hold()
        metrics = {name: float(x) for name, x in jax.device_get(metrics).items()}
        metrics |= {"utility": float(np.sum(value)) / round_.count, "steps": self._steps}
        self._latest = {f"curriculum/{name}": x for name, x in metrics.items()}
        round_.utility[:] = 0

    def metrics(self) -> dict[str, float]:
        return dict(self._latest)

    def state(self, alive: set[int]) -> dict[str, Any]:
        """Groups that expired or failed are awaited no longer: their draws are not alive."""
        for round_ in self._rounds:
            round_.awaited = {draw: i for draw, i in round_.awaited.items() if draw in alive}
        self._rounds = [round_ for round_ in self._rounds if round_.awaited]
        return {
            "learner_steps": self._learner_steps,
            "steps": self._steps,
            "rounds": [round_.state() for round_ in self._rounds],
            "latest": dict(self._latest),
        }

    def arrays(self) -> Any:
        return dict(vars(self._curator))

    def restore(
        self, state: dict[str, Any], read: Callable[[Any], Any], at: Callable[[int], Prompt]
    ) -> None:
        self._learner_steps, self._steps = state["learner_steps"], state["steps"]
        self._rounds = [Round.restored(round_, at) for round_ in state["rounds"]]
        self._latest = dict(state["latest"])
        self._curator = CuratorState(**read(self.arrays()))
        self._hold()
