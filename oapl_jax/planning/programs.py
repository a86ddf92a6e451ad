"""Programs that a run compiles: traced for a mesh without hardware, their FLOPs and their HBM.

HBM is that of one chip while a program runs, by kind, from the compiler's memory analysis. The
compiler decides: a program that it refuses does not fit; one that it accepts fits if the compiler's
own figure and the arrays beside the program fit the available HBM.
"""

import contextlib
import dataclasses
import functools
import itertools
import math
import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.traverse_util import unflatten_dict
from jax.extend.core import Var
from jax.sharding import Mesh, NamedSharding

from oapl_jax import config as sections
from oapl_jax.errors import RunError, UserError
from oapl_jax.learner import packing, train_step
from oapl_jax.model import hf, lora, sharding
from oapl_jax.model.config import ModelConfig
from oapl_jax.model.transformer import Transformer
from oapl_jax.objectives import Objective
from oapl_jax.planning.hardware import Slice
from oapl_jax.planning.hlo import Module, saved_bytes
from oapl_jax.rollout import decoding, local_sampler
from oapl_jax.structs import Batch, Group, Prompt, Rollout
from oapl_jax.weights import probe

REFUSALS = ("RESOURCE_EXHAUSTED", "Ran out of memory", "out of memory")
SIZES = ("argument", "output", "alias", "temp", "host_temp", "generated_code")
FIGURES = (*(f"{kind}_size" for kind in SIZES), "peak_memory")
REPLICATED = "Involuntary full rematerialization"


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


# Kinds of the embedded sampler's arrays. An evaluation has a version of its own, and with overlap a
# cache of its own; with overlap a new version is loaded while responses of the one before go on.
SAMPLER, CACHE, PROMPTS = "embedded sampler", "KV cache", "prefilled prompts"
EVALUATED, SECOND_CACHE = "evaluated parameters", "KV cache of the evaluation"
BEFORE = "sampler's version before"
VERSIONS = (SAMPLER, BEFORE, EVALUATED)
GROWING = (CACHE, SECOND_CACHE, PROMPTS)  # with the number of slots


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplerPrograms:
    """The embedded sampler of one host on a mesh, as shapes: the same functions and settings."""

    config: ModelConfig
    dtype: str
    mesh: Mesh
    rollout: sections.RolloutConfig
    group_size: int
    max_prompt_tokens: int

    @property
    def slots(self) -> int:
        """Responses that are decoded together, a multiple of the devices."""
        return self.rollout.max_sequences + -self.rollout.max_sequences % self.mesh.size

    @property
    def width(self) -> int:
        """Tokens of a prompt of the greatest length, with its padding."""
        multiple = self.rollout.prompt_multiple
        return local_sampler.prompt_widths(self.max_prompt_tokens, multiple)[-1]

    @property
    def prompts(self) -> int:
        """Prompts of a prefill, at most."""
        sizes = self.slots, self.group_size, self.width, self.mesh.size
        return local_sampler.prefill_sizes(*sizes)[-1]

    @property
    def places(self) -> int:
        """Tokens of a slot: prompt and response."""
        return self.width + self.rollout.max_response_tokens

    @property
    def steps(self) -> int:
        """Tokens that a round of decoding samples in each slot, at most."""
        return min(self.rollout.tokens_per_round, self.rollout.max_response_tokens)

    @property
    def model(self) -> Transformer:
        return Transformer(self.config, jnp.dtype(self.dtype), remat="none")

    @functools.cached_property
    def params(self) -> Any:
        """Shapes and shardings of a version."""
        shapes = unflatten_dict(hf.parameter_shapes(self.config), sep="/")

        def place(path: Any, leaf: Any, of: NamedSharding) -> jax.ShapeDtypeStruct:
            dtype = sharding.serving_dtype(path[-1].key, self.dtype)
            return jax.ShapeDtypeStruct(leaf.shape, dtype, sharding=of)

        shardings = sharding.parameter_shardings(shapes, self.mesh, setting="rollout.mesh")
        return jax.tree_util.tree_map_with_path(place, shapes, shardings)

    @functools.cached_property
    def state(self) -> decoding.Slots:
        """Shapes and shardings of all slots, with their cache."""
        sizes = self.config, self.slots, self.places, self.model.dtype
        return self._result(lambda: decoding.empty_slots(*sizes), decoding.SLOTS)

    @functools.cached_property
    def prefilled(self) -> decoding.Prefilled:
        """Shapes and shardings of a prefill's result."""
        prefill = functools.partial(decoding.prefill, model=self.model)
        return self._result(prefill, decoding.PREFILLED, self.params, *self._prompts())

    def _result(self, program: Callable[..., Any], specs: Any, *arguments: Any) -> Any:
        with jax.set_mesh(self.mesh):
            shapes = jax.eval_shape(program, *arguments)
        place = lambda leaf, spec: jax.ShapeDtypeStruct(
            leaf.shape, leaf.dtype, sharding=NamedSharding(self.mesh, spec)
        )
        return jax.tree.map(place, shapes, specs)

    def _prompts(self) -> tuple[Any, Any]:
        tokens = jax.ShapeDtypeStruct((self.prompts, self.width), np.int32)
        return tokens, tokens

    def programs(self, beside: Mapping[str, int]) -> list[Program]:
        """Decoding, placement and prefill, with these arrays beside them on each chip."""
        kept = {SAMPLER: self.params, CACHE: self.state, PROMPTS: self.prefilled}

        def program(name: str, trace: Callable[[], Any], *takes: str) -> Program:
            others = {kind: per_chip(tree) for kind, tree in kept.items() if kind not in takes}
            return Program(name, trace, {kind: kept[kind] for kind in takes}, {**beside, **others})

        return [
            program("decoding", self._decode, SAMPLER, CACHE),
            program("placement", self._place, CACHE, PROMPTS),
            program("prefill", self._prefill, SAMPLER),
        ]

    def _decode(self) -> Any:
        number = jax.ShapeDtypeStruct((), np.float32)
        return self._trace(
            decoding.decode,
            *(self.params, self.state, jax.ShapeDtypeStruct((), np.int32)),
            number if self.rollout.temperature else None,
            number if self.rollout.top_p < 1 else None,
            model=self.model,
            top_k=self.rollout.top_k,
            stop_ids=self.config.eos_token_ids,
            steps=self.steps,
        )

    def _place(self) -> Any:
        of_slots = jax.ShapeDtypeStruct((self.slots,), np.int32)
        seed = jax.eval_shape(jax.random.key, 0)
        return self._trace(decoding.place, self.state, self.prefilled, *[of_slots] * 4, seed)

    def _prefill(self) -> Any:
        return self._trace(decoding.prefill, self.params, *self._prompts(), model=self.model)

    def _trace(self, program: Any, *arguments: Any, **static: Any) -> Any:
        with jax.set_mesh(self.mesh):
            return program.trace(*arguments, **static)

    def smaller_mesh(self, room: int) -> dict[str, int] | None:
        """Sizes of `rollout.mesh` with which a version takes at most `room` bytes of a chip.

        Heads are split before weights are gathered for each token; None if no sizes do.
        """
        devices = self.mesh.devices.reshape(-1)
        parts = [count for count in range(2, devices.size + 1) if not devices.size % count]
        for count, axis in itertools.product(parts, ("tensor", "fsdp")):
            sizes = dict(data=devices.size // count, fsdp=1, tensor=1) | {axis: count}
            shape = [sizes.get(axis, 1) for axis in sharding.AXES]
            mesh = Mesh(devices.reshape(shape), sharding.AXES)
            with contextlib.suppress(UserError):
                local_sampler.check_divides(self.config, mesh)
                if per_chip(dataclasses.replace(self, mesh=mesh).params) <= room:
                    return sizes
        return None


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunPrograms:
    """Learner and embedded sampler of a run, as shapes: the same functions and settings.

    The fields are all that decides its programs, memory and bounds.
    """

    model: Transformer
    mesh: Mesh
    sampler_mesh: Mesh  # of one host's devices, which may be the learner's
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
    evaluates: bool  # by an embedded sampler of its own
    not_planned: tuple[str, ...]  # parts of the run that need HBM beside the planned programs

    @property
    def sequences(self) -> int:
        return self.group_size * self.groups_per_step

    @functools.cached_property
    def state(self) -> train_step.TrainState:
        """Shapes and shardings of the state that a run keeps in HBM from step to step."""
        return train_step.abstract_state(self.model, self.optimizer, self.mesh)

    @functools.cached_property
    def frozen(self) -> Any:
        """Shapes and shardings of the weights under the adapters; {} without LoRA."""
        return train_step.abstract_frozen(self.model, self.mesh)

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
        if self.frozen:
            kinds["frozen parameters"] = per_chip(self.frozen)
        if objective.denominator == "reference" or objective.kl_weight > 0:
            kinds["reference parameters"] = kinds["parameters"]
        if self.samples and not self.rollout.devices:
            kinds[SAMPLER] = per_chip(self.sampler.params)
            if self.rollout.overlap:
                kinds |= {BEFORE: kinds[SAMPLER], CACHE: per_chip(self.sampler.state)}
        return kinds

    @property
    def samples(self) -> bool:
        """True if the embedded sampler makes the rollouts."""
        return self.rollout.sampler == "local" and self.rollout.source != "dataset"

    @functools.cached_property
    def sampler(self) -> SamplerPrograms:
        return SamplerPrograms(
            config=self.model.config,
            dtype=np.dtype(self.model.dtype).name,
            mesh=self.sampler_mesh,
            rollout=self.rollout,
            group_size=self.group_size,
            max_prompt_tokens=self.max_prompt_tokens,
        )

    def sampling(self) -> list[Program]:
        """Programs of the embedded sampler, which samples rollouts or the run's evaluation.

        During an evaluation it has the learner's parameters beside the version of the rollouts.
        """
        if not self.samples and not self.evaluates:
            return []
        beside = {} if self.rollout.devices else dict(self.kept)
        for kind in (SAMPLER, CACHE):
            beside.pop(kind, 0)
        version, overlap = per_chip(self.sampler.params), self.rollout.overlap
        if self.samples and overlap:
            beside[BEFORE] = version
        if self.samples and self.evaluates:
            beside[EVALUATED] = version
            if overlap:
                beside[SECOND_CACHE] = per_chip(self.sampler.state)
        return self.sampler.programs(beside)

    def with_slots(self, slots: int) -> "RunPrograms":
        """A copy whose embedded sampler has another number of slots."""
        return dataclasses.replace(
            self, rollout=dataclasses.replace(self.rollout, max_sequences=slots)
        )

    def _beside(self, arguments: Mapping[str, Any]) -> dict[str, int]:
        return {kind: size for kind, size in self.kept.items() if kind not in arguments}

    def programs(self) -> list[Program]:
        """The learner's: the train step, which needs most HBM, then the others."""
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
        arguments |= {"batch": self.batch} | self._frozen_argument
        trace = lambda: step.trace(self.state, self.batch, *self._frozen_argument.values())
        return Program("train step", trace, arguments, self._beside(arguments))

    @property
    def _frozen_argument(self) -> dict[str, Any]:
        return {"frozen parameters": self.frozen} if self.frozen else {}

    def initialization(self) -> Program:
        fresh = not self.from_checkpoint or bool(self.frozen)
        given = jax.eval_shape(jax.random.key, 0) if fresh else self.state.params
        init: Any = train_step.make_init(self.model, self.optimizer, self.mesh, fresh=fresh)
        arguments = self._frozen_argument if fresh else {"parameters": given}
        return Program("initialisation", lambda: init.trace(given), arguments, {})

    def recomputation(self) -> list[Program]:
        """Log-probs of the lagged or the reference policy, if the objective needs them."""
        beside = dict(self.kept)
        lagged = self.objective.denominator == "learner"
        if not lagged and not beside.pop("reference parameters", 0):
            return []
        beside.pop("frozen parameters", 0)
        arguments = {"lagged parameters": self.state.params, "batch": self.batch}
        temperature = self.rollout.temperature
        return [self._logp_step("recomputed log-probs", arguments, beside, temperature)]

    def probe(self) -> Program:
        """Log-probs that are published with each version."""
        few, _ = probe.probe_batch(self.model.config.vocab_size, self.learner)
        arguments = {"parameters": self.state.params, "batch": self._placed(few)}
        beside = self._beside(arguments | self._frozen_argument)
        return self._logp_step("probe", arguments, beside, 1.0)

    def _logp_step(
        self, name: str, arguments: dict[str, Any], beside: dict[str, int], temperature: float
    ) -> Program:
        settings: Any = dict(temperature=temperature, logp_chunk=self.learner.logp_chunk)
        step: Any = train_step.make_logp_step(self.model, self.mesh, **settings)
        params, batch = arguments.values()
        trace = lambda: step.trace(lora.join(self.frozen, params), batch)
        return Program(name, trace, arguments | self._frozen_argument, beside)


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


def step_flops(
    config: ModelConfig, sequences: int, prompt: int, response: int, *, frozen: bool = False
) -> float:
    """FLOPs of a gradient step by formula: three forward passes, with logits of responses only.

    A token attends to half of its sequence on average. Of frozen weights no gradient is needed: two
    forward passes, and the adapters' own FLOPs are left out.
    """
    length = prompt + response
    heads = config.num_heads * config.head_dim
    keys = 2 * config.num_kv_heads * config.head_dim
    layer = config.hidden_size * (2 * heads + keys + 3 * config.intermediate_size)
    attention = 2 * heads * (length / 2)
    head = config.hidden_size * config.vocab_size
    tokens, logits = sequences * length, sequences * response
    passes = 2 if frozen else 3
    return passes * 2.0 * (config.num_layers * (layer + attention) * tokens + head * logits)


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


@dataclasses.dataclass(frozen=True)
class Compilation:
    """Result of compiling a program for a slice."""

    fits: bool
    because: str  # the reason, one sentence
    # Kind -> bytes on a chip; empty if the compiler refused, arguments if it was not asked.
    hbm: Mapping[str, int] = dataclasses.field(default_factory=dict)
    # Arrays and bytes of arguments that results reuse, bytes of results that do not.
    donated: Mapping[str, int] = dataclasses.field(default_factory=dict)
    traced: Any = None  # the jax.stages.Traced
    compiled: Any = None  # the jax.stages.Compiled
    module: Module | None = None  # its HLO text, read
    offloaded: int = 0  # bytes of the host's memory that it needs for a chip
    replicated: int = 0  # arrays that are resharded by replicating them whole on every chip


def memory_analysis(compiled: Any) -> dict[str, int]:
    """Figure -> bytes on one chip; raises a RunError if a figure is missing or negative."""
    analysis = compiled.memory_analysis()
    figures = {}
    for name in FIGURES:
        figures[name] = getattr(analysis, f"{name}_in_bytes", None)
        if not isinstance(figures[name], int) or figures[name] < 0:
            raise RunError(f"the compiler's memory analysis has no known {name}: {figures[name]}")
    return figures


@contextlib.contextmanager
def compiler_log() -> Iterator[list[str]]:
    """Lines that the compiler writes to file descriptor 2; complete when the block has ended."""
    lines: list[str] = []
    sys.stderr.flush()
    before = os.dup(2)
    with tempfile.TemporaryFile() as file:
        os.dup2(file.fileno(), 2)
        try:
            yield lines
        finally:
            sys.stderr.flush()
            os.dup2(before, 2)
            os.close(before)
            file.seek(0)
            lines += file.read().decode(errors="replace").splitlines()


def available_hbm(where: Slice) -> int:
    """Bytes of a chip's HBM that a program may use.

    The compiler names the figure only when it refuses a program, so it is asked for a petabyte.
    Raises a RunError unless the refusal is also in its log: else warnings could not be read there.
    """
    everywhere = jax.sharding.SingleDeviceSharding(where.devices[0])
    huge = jax.ShapeDtypeStruct((2**48,), np.float32, sharding=everywhere)
    try:
        with compiler_log() as lines:
            jax.jit(lambda x: x + 1).lower(huge).compile()
    except jax.errors.JaxRuntimeError as error:
        found = re.search(r"available HBM \(([0-9.]+)([MG])\)", str(error))
        if not found:
            raise RunError(f"the TPU compiler does not name the available HBM: {error}") from error
        if not any("Ran out of memory" in line for line in lines):
            remedy = "plan in a process that has not loaded libtpu before"
            raise RunError(f"the TPU compiler's log can't be read; {remedy}") from error
        return int(float(found.group(1)) * {"M": 2**20, "G": 2**30}[found.group(2)])
    raise RunError("the TPU compiler accepts a petabyte; its memory analysis can't be trusted")


def compile_program(program: Program, available: int) -> Compilation:
    """Compiles a program and compares its HBM with the `available` bytes.

    If arguments and arrays beside it are already too large, it is not compiled. Raises a RunError
    if the compiler fails for another reason than memory, or its output has an unknown form.
    """
    total, gib = sum(program.hbm.values()), f"GiB of {available / 2**30:.2f} GiB"
    if total > available:
        return Compilation(False, f"arguments alone are {total / 2**30:.2f} {gib}", program.hbm)
    traced = program.trace()
    try:
        with compiler_log() as lines:
            compiled = traced.lower().compile()
    except jax.errors.JaxRuntimeError as error:
        sentence = " ".join(str(error).split())
        if any(word in sentence for word in REFUSALS):
            return Compilation(False, f"the compiler: {sentence}")
        raise RunError(f"{program.name} does not compile for this slice: {sentence}") from error
    module, analysis = Module(compiled.as_text()), memory_analysis(compiled)
    hbm = by_kind(program, analysis, module)
    total, reused = sum(hbm.values()), analysis["alias_size"]
    aliases = module.header.count("-alias)")
    if bool(aliases) != bool(reused):
        raise RunError(f"donated arguments can't be read from {module.header[:120]!r}")
    new = "results not in an argument's place"
    return Compilation(
        fits=total <= available,
        because=f"{total / 2**30:.2f} {gib}",
        hbm=hbm,
        donated={"arrays": aliases, "bytes": reused, new: analysis["output_size"] - reused},
        traced=traced,
        compiled=compiled,
        module=module,
        offloaded=analysis["host_temp_size"],
        replicated=sum(REPLICATED in line for line in lines),
    )


def by_kind(program: Program, analysis: Mapping[str, int], module: Module) -> dict[str, int]:
    """HBM by kind; the kinds add up to no less than the compiler's own figures."""
    # Unused arguments are no parameters of the program and occupy HBM all the same.
    entry = module.entry.instructions.values()
    used = sum(i.bytes for i in entry if i.opcode == "parameter")
    arguments, results = analysis["argument_size"], analysis["output_size"] - analysis["alias_size"]
    # The compiler's second figure, which includes the host's memory: the greater one counts.
    peak = analysis["peak_memory"] - analysis["host_temp_size"] - arguments
    made = max(analysis["temp_size"] + results, peak)
    saved = min(saved_bytes(module), made - results)
    given = sum(map(per_chip, program.arguments.values()))
    kinds = program.hbm | {
        "other arguments": max(used - given, 0),
        "padding": arguments - used,
        "activations": saved,
        "temporaries": made - results - saved,
        "results": results,
        "program": analysis["generated_code_size"],
    }
    return {kind: size for kind, size in kinds.items() if size}
