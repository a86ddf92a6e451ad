"""Programs that a run compiles, traced for a mesh without hardware, and their FLOPs."""

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
import optax
from jax.extend.core import Var
from jax.sharding import Mesh

from oapl_jax import config as sections
from oapl_jax.errors import RunError
from oapl_jax.learner import packing, train_step
from oapl_jax.model.config import ModelConfig
from oapl_jax.model.transformer import Transformer
from oapl_jax.objectives import Objective
from oapl_jax.structs import Batch, Group, Prompt, Rollout
from oapl_jax.weights import probe


@dataclasses.dataclass(frozen=True)
class Program:
    """A program of a run, and the arrays in HBM while it runs."""

    name: str  # of the stage of a run
    trace: Callable[[], Any]  # returns a jax.stages.Traced
    arguments: Mapping[str, Any]  # kind -> arrays that the program takes
    beside: Mapping[str, int]  # kind -> bytes on a chip, neither arguments nor made by the program

    @property
    def hbm(self) -> dict[str, int]:
        """Bytes on a chip of arguments and of arrays beside the program, by kind."""
        return {kind: per_chip(tree) for kind, tree in self.arguments.items()} | dict(self.beside)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunPrograms:
    """The learner of a run on a mesh, as shapes: the same functions and settings as in training.

    The fields are all that decides its programs, memory and bounds.
    """

    model: Transformer
    mesh: Mesh
    from_checkpoint: bool  # the weights come from files, not from an initialization
    loss: Objective
    optimizer: optax.GradientTransformation
    group_size: int
    groups_per_step: int
    max_prompt_tokens: int
    objective: sections.ObjectiveConfig
    rollout: sections.RolloutConfig
    buffer: sections.BufferConfig
    lag: sections.LagConfig
    learner: sections.LearnerConfig
    publish_dtype: str
    embedded_samplers: int  # each holds all parameters on a host's first chip
    not_planned: tuple[str, ...]  # parts of the run that need HBM beside the planned programs

    @property
    def sequences(self) -> int:
        return self.group_size * self.groups_per_step

    @functools.cached_property
    def state(self) -> train_step.TrainState:
        """Shapes and shardings of the state that a run keeps in HBM from step to step."""
        return train_step.abstract_state(self.model, self.optimizer, self.mesh)

    @functools.cached_property
    def longest(self) -> Batch:
        """A batch on the host in which every prompt and response has its greatest length.

        No batch of a run has more rows: shorter sequences share them.
        """
        length, size = self.rollout.max_response_tokens, self.group_size
        prompt = Prompt("", 0, np.zeros(self.max_prompt_tokens, np.int32), "", "", "")
        blank = Rollout(np.zeros(length, np.int32), np.zeros(length, np.float32), 0, "length")
        zeros = np.zeros(size, np.float32)
        return packing.build_batch(
            [Group(prompt, (blank,) * size, zeros)] * self.groups_per_step,
            self.loss,
            self.learner,
            aggregation=self.objective.aggregation,
            step=0,
            max_prompt_tokens=self.max_prompt_tokens,
            max_response_tokens=length,
        )

    @functools.cached_property
    def batch(self) -> Batch:
        return self._placed(self.longest)

    def _placed(self, batch: Batch) -> Batch:
        spec = lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s)
        return jax.tree.map(spec, batch, train_step.batch_shardings(self.mesh))

    @functools.cached_property
    def optimizer_state(self) -> train_step.TrainState:
        return self.state.replace(params=())  # pyright: ignore[reportAttributeAccessIssue]

    @functools.cached_property
    def kept(self) -> dict[str, int]:
        """Bytes on a chip that a run keeps in HBM between its programs, by kind."""
        objective, params = self.objective, self.state.params
        kinds = {"parameters": per_chip(params), "optimizer": per_chip(self.optimizer_state)}
        if objective.denominator == "reference" or objective.kl_weight > 0:
            kinds["reference parameters"] = kinds["parameters"]
        if copies := self.embedded_samplers:
            whole = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(params))
            kinds["embedded samplers"] = copies * whole
        return kinds

    def _beside(self, arguments: Mapping[str, Any]) -> dict[str, int]:
        return {kind: size for kind, size in self.kept.items() if kind not in arguments}

    def programs(self) -> list[Program]:
        """The train step, which needs most HBM, then the others."""
        return [self.gradient_step(), self.initialization(), *self.recomputation(), self.probe()]

    def gradient_step(self) -> Program:
        step = train_step.make_train_step(
            self.model,
            self.loss,
            self.optimizer,
            self.mesh,
            kl_weight=self.objective.kl_weight,
            ess_power=self.objective.ess_power,
            to_reference=self.objective.denominator == "reference",
            temperature=self.rollout.temperature,
            logp_chunk=self.learner.logp_chunk,
        )
        arguments = {"parameters": self.state.params, "optimizer": self.optimizer_state}
        arguments |= {"batch": self.batch}
        trace = lambda: step.trace(self.state, self.batch)
        return Program("train step", trace, arguments, self._beside(arguments))

    def initialization(self) -> Program:
        fresh = not self.from_checkpoint
        given = jax.eval_shape(jax.random.key, 0) if fresh else self.state.params
        init: Any = train_step.make_init(self.model, self.optimizer, self.mesh, fresh=fresh)
        arguments = {} if fresh else {"parameters": given}
        return Program("initialisation", lambda: init.trace(given), arguments, {})

    def recomputation(self) -> list[Program]:
        """Log-probs of the lagged or the reference policy, if the objective needs them."""
        beside = dict(self.kept)
        lagged = self.objective.denominator == "learner"
        if not lagged and not beside.pop("reference parameters", 0):
            return []
        arguments = {"lagged parameters": self.state.params, "batch": self.batch}
        temperature = self.rollout.temperature
        return [self._logp_step("recomputed log-probs", arguments, beside, temperature)]

    def probe(self) -> Program:
        """Log-probs that are published with each version."""
        few, _ = probe.probe_batch(self.model.config.vocab_size, self.learner)
        arguments = {"parameters": self.state.params, "batch": self._placed(few)}
        return self._logp_step("probe", arguments, self._beside(arguments), 1.0)

    def _logp_step(
        self, name: str, arguments: dict[str, Any], beside: dict[str, int], temperature: float
    ) -> Program:
        settings: Any = dict(temperature=temperature, logp_chunk=self.learner.logp_chunk)
        step: Any = train_step.make_logp_step(self.model, self.mesh, **settings)
        return Program(name, lambda: step.trace(*arguments.values()), arguments, beside)


def per_chip(tree: Any) -> int:
    """Bytes of a tree of arrays on one chip, without the padding of layouts."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )


# FLOPs: two for each multiplication of a matrix product, and nothing else.

REMAT = "rematted_computation"  # the scope of products that remat repeats
CAUSAL = 0.5  # share of the attention kernel's blocks that a causal row does not skip
# A scope named at_most_N bounds the trips of a loop whose end depends on data.
AT_MOST = re.compile(r"at_most_(\d+)\)*$")


def step_flops(config: ModelConfig, sequences: int, prompt: int, response: int) -> float:
    """FLOPs of a gradient step by formula: three forward passes, with logits of responses only.

    A token attends to half of its sequence on average.
    """
    length = prompt + response
    heads = config.num_heads * config.head_dim
    keys = 2 * config.num_kv_heads * config.head_dim
    layer = config.hidden_size * (2 * heads + keys + 3 * config.intermediate_size)
    attention = 2 * heads * (length / 2)
    head = config.hidden_size * config.vocab_size
    tokens, logits = sequences * length, sequences * response
    return 3 * 2.0 * (config.num_layers * (layer + attention) * tokens + head * logits)


def program_flops(traced: Any) -> dict[str, float]:
    """FLOPs of all matrix products of a jax.stages.Traced, and the part that remat repeats.

    Raises a RunError for a loop without a known trip count, as attention on a CPU has.
    """
    found = list(_products(traced.jaxpr.jaxpr, 1.0, False))
    total, repeated = sum(n for n, _ in found), sum(n for n, again in found if again)
    return {"program": total, "remat": repeated}


def _products(jaxpr: Any, times: float, repeated: bool) -> Iterator[tuple[float, bool]]:
    for equation in _live(jaxpr):
        name, params = equation.primitive.name, equation.params
        scope = str(equation.source_info.name_stack)
        here, inside = repeated or REMAT in scope, times
        if name == "dot_general":
            (contracted, _), _ = params["dimension_numbers"]
            left, out = equation.invars[0].aval.shape, equation.outvars[0].aval.shape
            yield times * 2.0 * math.prod(out) * math.prod(left[axis] for axis in contracted), here
            continue
        if name == "cond":
            branches = [list(_products(b.jaxpr, inside, here)) for b in params["branches"]]
            yield from max(branches, key=lambda found: sum(flops for flops, _ in found))
            continue
        if name == "scan":
            inside *= params["length"]
        elif name == "shard_map":
            inside *= math.prod(params["mesh"].shape[axis] for axis in params["newly_manual_axes"])
        elif name == "pallas_call":
            inside *= math.prod(params["grid_mapping"].grid) * CAUSAL
        elif name == "while" and (most := AT_MOST.search(scope)):
            inside *= int(most.group(1))
        elif name == "while" and any(_products(params["body_jaxpr"].jaxpr, 1.0, False)):
            raise RunError(
                "the program has matrix products in a loop whose trip count is not known before it "
                f"runs, at {scope}; its FLOPs can't be counted"
            )
        for value in params.values():
            for part in value if isinstance(value, list | tuple) else (value,):
                body = getattr(part, "jaxpr", part)
                if hasattr(body, "eqns"):
                    yield from _products(body, inside, here)


def _live(jaxpr: Any) -> list[Any]:
    """Equations with a used result; the compiler drops the others.

    Remat traces a layer again and uses a part of it. JAX's dce_jaxpr would keep unused kernels.
    """
    used, live = {v for v in jaxpr.outvars if isinstance(v, Var)}, []
    for equation in reversed(jaxpr.eqns):
        if equation.effects or not used.isdisjoint(equation.outvars):
            live.append(equation)
            used.update(v for v in equation.invars if isinstance(v, Var))
    return live
