"""Actor-curator (arXiv 2602.20532): a network learns which prompts improve the policy most."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
import optax
from jax.sharding import Mesh

from oapl_jax.curriculum.curator import Curator, init_state, make_scorer, make_step, padded
from oapl_jax.curriculum.teacher import Teacher
from oapl_jax.curriculum.utility import utility
from oapl_jax.sharding import gathered
from oapl_jax.structs import Group, Prompt


@dataclasses.dataclass(frozen=True)
class Lesson:
    """A prompt, the log-probability that it was drawn with, and what it was good for."""

    prompt: Prompt
    log_p: float
    utility: float


class ActorCurator(Teacher):
    """Chooses by a curator network, and trains it on the utility of what was chosen.

    Three phases, by the learner's steps: `dormant`, in which nothing is recorded; `warmup`, in
    which the curator is trained and every prompt of the stream still sampled; then it chooses. A
    group whose rewards are equal has utility 0 as soon as they are known, so a curator hears of
    prompts that never reach the learner; any other has it once the learner has trained on it.

    Args:
      model: the network.
      optimizer: of its own.
      mesh: the learner's.
      start: a decoder's parameters, or the seed of fresh ones.
      max_prompt_tokens: of a prompt.
      temperature: of the softmax over candidates.
      clip: eps of the surrogate.
      dormant, warmup: gradient steps of the learner.
      batch_size: lessons that share a normaliser; scoring takes as many prompts at a time.
      passes: gradient steps on each such batch; from the second on the clip may bind.
    """

    def __init__(
        self,
        model: Curator,
        optimizer: optax.GradientTransformation,
        mesh: Mesh,
        start: Any | int,
        *,
        max_prompt_tokens: int,
        temperature: float,
        clip: float,
        dormant: int,
        warmup: int,
        batch_size: int,
        passes: int,
    ):
        self._temperature, self._dormant, self._warmup = temperature, dormant, warmup
        self._batch_size, self._passes = batch_size, passes
        self._width = max_prompt_tokens + -max_prompt_tokens % mesh.shape["context"]
        self._curator = init_state(model, optimizer, mesh, start)
        self._step = make_step(model, optimizer, mesh, temperature=temperature, clip=clip)
        self._score = make_scorer(model, rows=batch_size)
        self._learner_steps, self._steps = 0, 0
        self._log_p: dict[int, float] = {}  # draw -> recorded; its group has yet to end
        self._lessons: list[Lesson] = []  # not yet enough for a step
        self._latest: dict[str, float] = {}  # metrics of the latest step
        self._hold()

    def _hold(self) -> None:
        """A copy of the parameters for the scorer, see there."""
        self._scoring = gathered(self._curator.params)

    @property
    def _trains(self) -> bool:
        return self._learner_steps >= self._dormant

    @property
    def awake(self) -> bool:
        return self._learner_steps >= self._dormant + self._warmup

    @property
    def rescores(self) -> bool:
        return self._trains

    def logits(self, prompts: Sequence[Prompt]) -> np.ndarray:
        tokens, segments = padded(prompts, width=self._width, rows=self._batch_size)
        logits = jax.device_get(self._score(self._scoring, tokens, segments))
        return logits[: len(prompts)] / self._temperature

    def picked(self, prompts: Sequence[Prompt], log_p: np.ndarray) -> None:
        self._log_p.update(zip([p.draw for p in prompts], map(float, log_p), strict=True))

    def ended(self, group: Group) -> None:
        if group.zero_variance:
            self._learn(group.prompt, 0.0)

    def _learn(self, prompt: Prompt, value: float) -> None:
        log_p = self._log_p.pop(prompt.draw, None)
        # None: recorded before this run, or used before (a buffer may replay).
        if self._trains and log_p is not None:
            self._lessons.append(Lesson(prompt, log_p, value))

    def trained(self, groups: Sequence[Group], logp: np.ndarray | None) -> None:
        if logp is not None:
            rows = np.split(logp, np.cumsum([len(g.rollouts) for g in groups])[:-1])
            for group, of_group in zip(groups, rows, strict=True):
                self._learn(group.prompt, utility(group, of_group))
        else:
            for group in groups:
                self._learn(group.prompt, 0.0)  # dormant: only forgets the record
        self._learner_steps += 1
        while len(self._lessons) >= self._batch_size:
            lessons = self._lessons[: self._batch_size]
            self._lessons = self._lessons[self._batch_size :]
            self._study(lessons)

    def _study(self, lessons: Sequence[Lesson]) -> None:
        prompts = [lesson.prompt for lesson in lessons]
        tokens, segments = padded(prompts, width=self._width, rows=self._batch_size)
        log_p = np.array([lesson.log_p for lesson in lessons], np.float32)
        value = np.array([lesson.utility for lesson in lessons], np.float32)
        metrics = {}
        for _ in range(self._passes):
            self._curator, metrics = self._step(self._curator, tokens, segments, log_p, value)
        self._steps += self._passes
        self._hold()
        metrics = {name: float(x) for name, x in jax.device_get(metrics).items()}
        metrics |= {"utility": float(np.mean(value)), "useful": float(np.mean(value > 0))}
        self._latest = {f"curriculum/{name}": x for name, x in metrics.items()}

    def metrics(self) -> dict[str, float]:
        if not self._latest:
            return {}
        return {**self._latest, "curriculum/steps": self._steps}

    def state(self, alive: set[int]) -> dict[str, Any]:
        """Groups that expired or failed are forgotten here: their draws are not alive."""
        self._log_p = {draw: x for draw, x in self._log_p.items() if draw in alive}
        return {
            "learner_steps": self._learner_steps,
            "steps": self._steps,
            "log_p": list(self._log_p.items()),
            "lessons": [[x.prompt.draw, x.log_p, x.utility] for x in self._lessons],
            "latest": dict(self._latest),
        }

    def arrays(self) -> Any:
        curator = self._curator
        return {
            "params": curator.params,
            "opt_state": curator.opt_state,
            "skipped": curator.skipped,
        }

    def restore(
        self, state: dict[str, Any], read: Callable[[Any], Any], at: Callable[[int], Prompt]
    ) -> None:
        self._learner_steps, self._steps = state["learner_steps"], state["steps"]
        self._log_p = dict(state["log_p"])
        self._lessons = [Lesson(at(draw), *rest) for draw, *rest in state["lessons"]]
        self._latest = dict(state["latest"])
        self._curator = self._curator.replace(**read(self.arrays()))  # pyright: ignore[reportAttributeAccessIssue]
        self._hold()
