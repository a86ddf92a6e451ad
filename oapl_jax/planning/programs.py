"""The programs that a run of a configuration compiles, traced for a mesh whose devices need not be
there.

They are made by the same functions, from the same settings, as in train.py, begin.py and job.py.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from oapl_jax.assemble import make_batch
from oapl_jax.build import Config
from oapl_jax.learner import train_step as learner
from oapl_jax.learner.optimizer import make_optimizer
from oapl_jax.model.config import ModelConfig
from oapl_jax.model.transformer import Transformer
from oapl_jax.objectives import bind
from oapl_jax.structs import Batch, Group, Prompt, Rollout
from oapl_jax.weights import probe


@dataclasses.dataclass(frozen=True)
class Program:
    """What is compiled, and what lies in HBM while it runs.

    Attributes:
      name: of the stage of a run.
      trace: gives a jax.stages.Traced.
      arguments: kind -> arrays that the program is given.
      beside: kind -> bytes on a chip that are neither arguments nor made by the program.
    """

    name: str
    trace: Callable[[], Any]
    arguments: Mapping[str, Any]
    beside: Mapping[str, int]


@dataclasses.dataclass(frozen=True)
class Learner:
    """A run's learner on a mesh, in shapes only.

    Attributes:
      config: of the run.
      model_config: sizes of its model.
      mesh: of the slice.
      from_checkpoint: whether it starts from weights in files or from fresh ones.
    """

    config: Config
    model_config: ModelConfig
    mesh: Mesh
    from_checkpoint: bool

    @functools.cached_property
    def model(self) -> Transformer:
        settings = self.config.model
        return Transformer(self.model_config, jnp.dtype(settings.dtype), settings.remat)

    @functools.cached_property
    def optimizer(self) -> Any:
        return make_optimizer(**self.config.optim, num_steps=self.config.num_steps)

    @functools.cached_property
    def objective(self) -> Any:
        return bind(**self.config.objective, group_size=self.config.group_size)

    @functools.cached_property
    def state(self) -> learner.TrainState:
        """Shapes and shardings of what a run keeps in HBM from step to step."""
        fresh = lambda: learner.new_state(
            learner.init_params(self.model, jax.random.key(0)), self.optimizer
        )
        shardings = learner.state_shardings(self.model, self.optimizer, self.mesh)
        return jax.tree.map(_placed, jax.eval_shape(fresh), shardings)

    @functools.cached_property
    def longest(self) -> Batch:
        """A step's batch on the host when every prompt and response has its greatest length.

        No batch has more rows: of shorter sequences more share a row.
        """
        config = self.config
        length = config.rollout.max_response_tokens
        prompt = Prompt("", 0, np.zeros(config.data.max_prompt_tokens, np.int32), "", "", "")
        blank = Rollout(np.zeros(length, np.int32), np.zeros(length, np.float32), 0, "length")
        group = Group(prompt, (blank,) * config.group_size, np.arange(config.group_size) % 2.0)
        return make_batch(config, self.objective, [group] * config.groups_per_step, 0)

    @functools.cached_property
    def batch(self) -> Batch:
        return jax.tree.map(_placed, self.longest, learner.batch_shardings(self.mesh))

    def programs(self) -> list[Program]:
        """The train step first: what is most likely not to fit."""
        return [self.train_step(), self.initialise(), *self.recomputations(), self.probe()]

    def train_step(self) -> Program:
        objective = self.config.objective
        step = learner.make_train_step(
            self.model,
            self.objective,
            self.optimizer,
            self.mesh,
            kl_weight=objective.kl_weight,
            ess_power=objective.ess_power,
            to_reference=objective.denominator == "reference",
            **self._settings(),
        )
        return Program(
            "train step",
            lambda: step.trace(self.state, self.batch),
            {**self._kinds(self.state), "batch": self.batch},
            {**self._reference(), **self._samplers()},
        )

    def initialise(self) -> Program:
        make = functools.partial(learner.new_state, optimizer=self.optimizer)
        given: Any = self.state.params
        kinds = {"parameters": given}
        if not self.from_checkpoint:
            make = lambda key: learner.new_state(
                learner.init_params(self.model, key), self.optimizer
            )
            given = jax.eval_shape(jax.random.key, 0)
            kinds = {}
        shardings = jax.tree.map(lambda leaf: leaf.sharding, self.state)
        jitted = jax.jit(make, out_shardings=shardings)
        return Program("initialisation", lambda: jitted.trace(given), kinds, {})

    def recomputations(self) -> list[Program]:
        """The log-probs of the lagged or the reference policy, if the objective asks for them."""
        denominator = self.config.objective.denominator
        if denominator == "behavior" and not self._reference():
            return []
        step = learner.make_logp_step(self.model, self.mesh, **self._settings())
        beside = {**_sizes(self._kinds(self.state)), **self._samplers()}
        if denominator == "learner":
            beside |= self._reference()
        return [
            Program(
                "recomputed log-probs",
                lambda: step.trace(self.state.params, self.batch),
                {"lagged parameters": self.state.params, "batch": self.batch},
                beside,
            )
        ]

    def probe(self) -> Program:
        """The log-probs that travel with each published version."""
        step = learner.make_logp_step(
            self.model, self.mesh, temperature=1.0, logp_chunk=self.config.learner.logp_chunk
        )
        few = self._probe_batch()
        rest = self.state.replace(params=())  # pyright: ignore[reportAttributeAccessIssue]
        return Program(
            "probe",
            lambda: step.trace(self.state.params, few),
            {"parameters": self.state.params, "batch": few},
            {"optimizer": per_chip(rest), **self._reference(), **self._samplers()},
        )

    def _probe_batch(self) -> Batch:
        settings = self.config.learner
        host, _ = probe.probe_batch(
            self.model_config.vocab_size,
            row_length=settings.row_length,
            rows_multiple=settings.rows_multiple,
        )
        return jax.tree.map(_placed, host, learner.batch_shardings(self.mesh))

    def _settings(self) -> dict[str, Any]:
        config = self.config
        return dict(temperature=config.rollout.temperature, logp_chunk=config.learner.logp_chunk)

    def _kinds(self, state: learner.TrainState) -> dict[str, Any]:
        rest = state.replace(params=())  # pyright: ignore[reportAttributeAccessIssue]
        return {"parameters": state.params, "optimizer": rest}

    def _reference(self) -> dict[str, int]:
        objective = self.config.objective
        kept = objective.denominator == "reference" or objective.kl_weight > 0
        return {"reference parameters": per_chip(self.state.params)} if kept else {}

    def _samplers(self) -> dict[str, int]:
        """Embedded samplers hold all parameters on a host's first chip: one for the rollouts, one
        for evaluation."""
        config = self.config
        copies = (config.rollout.sampler == "local") + (config.evaluation.every > 0)
        whole = sum(
            math.prod(p.shape) * p.dtype.itemsize for p in jax.tree.leaves(self.state.params)
        )
        return {"embedded samplers": copies * whole} if copies else {}


def not_planned(config: Config) -> list[str]:
    """What a run of this configuration compiles beside the programs above."""
    parts = {
        "the warm-up (warmup.num_steps)": config.warmup.num_steps > 0,
        "decoding by the embedded sampler (rollout.sampler)": config.rollout.sampler == "local",
        "decoding for evaluation (evaluation.every)": config.evaluation.every > 0,
        "the curator (curriculum.name)": config.curriculum.name == "actor_curator",
    }
    return [part for part, there in parts.items() if there]


def per_chip(tree: Any) -> int:
    """Bytes of a tree of arrays on one chip, without the padding of layouts."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )


def _sizes(kinds: Mapping[str, Any]) -> dict[str, int]:
    return {kind: per_chip(tree) for kind, tree in kinds.items()}


def _placed(leaf: Any, sharding: Any) -> jax.ShapeDtypeStruct:
    dtype = jax.dtypes.canonicalize_dtype(leaf.dtype)
    return jax.ShapeDtypeStruct(leaf.shape, dtype, sharding=sharding)
