"""Actor-curator (arXiv 2602.20532): a network learns which prompts improve the policy most."""

import contextlib
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.sharding import Mesh

from oapl_jax import multihost
from oapl_jax.config import CuratorConfig
from oapl_jax.curriculum.curator import Curator, make_score, make_step, pad_prompts, utility
from oapl_jax.curriculum.stream import PromptScorer
from oapl_jax.errors import UserError
from oapl_jax.learner.optimizer import make_optimizer
from oapl_jax.learner.train_step import TrainState, init_state
from oapl_jax.model import hf
from oapl_jax.model.config import ModelConfig
from oapl_jax.structs import Group, Prompt


@dataclasses.dataclass
class Round:
    """One choice, until all its groups have ended."""

    candidates: Sequence[Prompt]
    log_p: np.ndarray  # float64[C], of the choice
    count: int  # of chosen prompts
    awaited: dict[int, int]  # chosen, and not ended: stream index -> candidate index

    def state(self) -> list[Any]:
        indices = [prompt.stream_index for prompt in self.candidates]
        return [indices, self.log_p.tolist(), self.count, list(self.awaited.items())]

    @classmethod
    def restored(cls, state: list[Any], at: Callable[[int], Prompt]) -> "Round":
        indices, log_p, count, awaited = state
        return cls([at(index) for index in indices], np.array(log_p), count, dict(awaited))


class ActorCurator(PromptScorer):
    """Scores prompts by a curator network, trained on the utility of the chosen ones.

    Three phases, by the learner's steps: for `dormant` steps every prompt is sampled; for `warmup`
    steps the choice is uniform and the curator is trained; then the curator chooses. After each
    step of the learner the curator is trained on every choice that groups of the step came from. A
    prompt that the learner does not see (its rewards are equal, its group failed or expired) has
    utility 0.

    Args:
      curator: settings; starts from the checkpoint at `curator.path`, or from `seed`.
      policy: sizes of the policy: both read the same tokens.
      num_steps: of the learner. The curator's learning rate decays over `curator.passes` times as
        many, as if each step trained on one choice.

    Raises:
      UserError: if its vocabulary is not the policy's, or prompts are too long for it.
    """

    def __init__(
        self,
        *,
        curator: CuratorConfig,
        policy: ModelConfig,
        mesh: Mesh,
        seed: int,
        max_prompt_tokens: int,
        num_steps: int,
    ):
        path = epath.Path(curator.path) if curator.path else None
        if path:
            sizes = hf.load_config(path)
        else:
            architecture = {**curator.architecture, "vocab_size": policy.vocab_size}
            sizes = ModelConfig.from_hf(architecture, source="curriculum.curator.architecture")
        if sizes.vocab_size != policy.vocab_size or sizes.max_positions < max_prompt_tokens:
            raise UserError(
                f"the curator has {sizes.vocab_size} tokens and {sizes.max_positions} positions, "
                f"and reads prompts of {max_prompt_tokens} tokens out of {policy.vocab_size}; "
                "correct curriculum.curator.path or its architecture"
            )
        start: Any = seed
        if path:
            start = hf.load_params(path, sizes, mesh=mesh)
            start.pop("head", None)  # of tokens, unless tied; the curator has its own
            start["score"] = jnp.zeros(sizes.hidden_size, jnp.float32)
        sizes = dataclasses.replace(sizes, tie_embeddings=True)
        model = Curator(sizes, jnp.dtype(curator.dtype), curator.remat)
        optimizer = make_optimizer(**vars(curator.optim), num_steps=num_steps * curator.passes)
        self._config = curator
        self._width = max_prompt_tokens + -max_prompt_tokens % mesh.shape["context"]
        self._curator = init_state(model, optimizer, mesh, start)
        self._step = make_step(
            model,
            optimizer,
            mesh,
            rows=curator.rows,
            temperature=curator.temperature,
            clip=curator.clip,
        )
        self._score = make_score(model, mesh, rows=curator.rows)
        # The worker's thread scores while the learner computes.
        self._turns = multihost.turns if mesh.size > 1 else contextlib.nullcontext()
        self._learner_steps, self._steps = 0, 0
        self._rounds: list[Round] = []  # with awaited groups
        self._latest: dict[str, float] = {}  # metrics of the latest training

    @property
    def awake(self) -> bool:
        return self._learner_steps >= self._config.dormant

    @property
    def rescores(self) -> bool:
        return self.awake

    def logits(self, prompts: Sequence[Prompt]) -> np.ndarray:
        if self._learner_steps < self._config.dormant + self._config.warmup:
            return np.zeros(len(prompts))
        tokens, segments = pad_prompts(prompts, width=self._width, rows=self._config.rows)
        with self._turns:
            logits = jax.device_get(self._score(self._curator.params, tokens, segments))
        return logits[: len(prompts)] / self._config.temperature

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
        for round_ in self._rounds:
            value = np.zeros(len(round_.candidates), np.float32)  # 0 for prompts not in this step
            for group, of_group in zip(groups, rows, strict=True):
                # In no round if it was sampled in the dormant phase, is recorded or replayed.
                if group.prompt.stream_index in round_.awaited:
                    index = round_.awaited.pop(group.prompt.stream_index)
                    value[index] = utility(group, of_group)
            if value.any():
                self._train(round_, value)
        self._rounds = [round_ for round_ in self._rounds if round_.awaited]

    def _train(self, round_: Round, value: np.ndarray) -> None:
        tokens, segments = pad_prompts(round_.candidates, width=self._width, rows=self._config.rows)
        missing = (0, len(tokens) - len(value))
        log_p = np.pad(round_.log_p.astype(np.float32), missing, constant_values=-np.inf)
        batch = tokens, segments, log_p, np.pad(value, missing), round_.count
        metrics = {}
        with self._turns:
            for _ in range(self._config.passes):
                self._curator, metrics = self._step(self._curator, *batch)
            metrics = {name: float(x) for name, x in jax.device_get(metrics).items()}
        self._steps += self._config.passes
        metrics |= {"utility": float(np.sum(value)) / round_.count, "steps": self._steps}
        self._latest = {f"curriculum/{name}": x for name, x in metrics.items()}

    def metrics(self) -> dict[str, float]:
        return dict(self._latest)

    def state(self, alive: set[int]) -> dict[str, Any]:
        """Groups that expired or failed are not awaited: their stream indices are not alive."""
        for round_ in self._rounds:
            round_.awaited = {index: i for index, i in round_.awaited.items() if index in alive}
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
        self._curator = TrainState(**read(self.arrays()))
