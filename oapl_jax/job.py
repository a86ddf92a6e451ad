"""What a configuration names, opened: the one room that train and evaluate enter first."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax
from etils import epath
from jax.sharding import Mesh

from oapl_jax import checkpoint, learner
from oapl_jax.data import prompts, reasoning
from oapl_jax.data.tasks import TASKS
from oapl_jax.errors import UserError
from oapl_jax.evaluate import evaluate
from oapl_jax.models.transformer import REMAT_POLICIES, Transformer
from oapl_jax.objectives import OBJECTIVES
from oapl_jax.objectives.aggregation import AGGREGATIONS
from oapl_jax.objectives.grpo import CORRECTIONS, PROXIMALS
from oapl_jax.optim import make_optimizer
from oapl_jax.policy import Policy, check_lengths, open_policy
from oapl_jax.rewards import Grader
from oapl_jax.rollout.local import LocalSampler
from oapl_jax.rollout.sampler import Sampling
from oapl_jax.sharding import make_mesh
from oapl_jax.structs import Prompt

Config = Any  # an ml_collections.ConfigDict, whose attributes have no static types


@dataclasses.dataclass(frozen=True)
class Job:
    config: Config
    workdir: epath.Path
    mesh: Mesh
    policy: Policy
    model: Transformer
    optimizer: optax.GradientTransformation
    splits: dict[str, reasoning.Split]
    grader: Grader
    sampling: Sampling
    checkpoints: checkpoint.Checkpoints

    def new_sampler(self, seed: int) -> LocalSampler:
        return LocalSampler(
            self.policy.config,
            dtype=self.config.model.dtype,
            stop_ids=self.policy.stop_ids,
            seed=seed,
            max_sequences=self.config.rollout.max_sequences,
            prompt_multiple=self.config.rollout.prompt_multiple,
        )

    def split_prompts(self, split: str) -> list[Prompt]:
        """Every prompt of a split, in order."""
        return prompts.all_prompts(
            self.splits[split],
            self.policy.tokenizer,
            task=self.config.data.task,
            max_prompt_tokens=self.config.data.max_prompt_tokens,
            limit=None,
        )

    def prompt_stream(self) -> prompts.Prompts:
        return prompts.Prompts(
            self.splits["train"],
            self.policy.tokenizer,
            task=self.config.data.task,
            seed=self.config.seed,
            max_prompt_tokens=self.config.data.max_prompt_tokens,
        )

    @functools.cached_property
    def _evaluator(self) -> LocalSampler:
        return self.new_sampler(self.config.seed + 1)  # other random numbers than training

    def grade(self, step: int, params: Any, split: str) -> dict[str, Any]:
        """pass@k and the rest of the learner's parameters at `step` on a split."""
        self._evaluator.hold(step, params)
        settings = self.config.evaluation
        return evaluate(
            self._evaluator,
            self.split_prompts(split),
            self.grader.reward,
            self.grader.final_answer,
            n=settings.n,
            ks=settings.ks,
            sampling=self.sampling,
            resamples=settings.resamples,
            seed=self.config.seed,
        )

    def abstract_state(self) -> learner.TrainState:
        """Shapes, dtypes and shardings of the state, to restore into."""
        fresh = lambda: learner.new_state(
            learner.init_params(self.model, jax.random.key(0)), self.optimizer
        )
        shardings = learner.state_shardings(self.model, self.optimizer, self.mesh)
        place = lambda leaf, s: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=s)
        return jax.tree.map(place, jax.eval_shape(fresh), shardings)

    def params_at(self, step: int | None) -> tuple[int, Any]:
        """The parameters of a checkpoint step, the newest if None.

        Raises:
          UserError: if the workdir has no such step.
        """
        steps = self.checkpoints.steps()
        if not steps or (step is not None and step not in steps):
            have = ", ".join(map(str, steps)) or "none"
            raise UserError(
                f"{self.workdir} has no checkpoint step {step or ''} (have: {have}); train first"
            )
        step = steps[-1] if step is None else step
        return step, self.checkpoints.restore_params(step, self.abstract_state().params)


def open_job(config: Config, workdir: epath.Path) -> Job:
    """Opens mesh, policy, data and checkpoints, and refuses what does not fit, before any work.

    Raises:
      UserError: naming the setting and the remedy.
    """
    check_sizes(config)
    mesh = make_mesh(**config.mesh)
    policy = open_policy(
        workdir / "model",
        path=config.model.path,
        architecture=config.model.architecture,
        characters=TASKS[config.data.task].characters,
    )
    check_lengths(
        policy,
        max_prompt_tokens=config.data.max_prompt_tokens,
        max_response_tokens=config.rollout.max_response_tokens,
        row_length=config.learner.row_length,
    )
    data = {k: v for k, v in config.data.items() if k != "max_prompt_tokens"}
    builder = reasoning.prepare(**data)
    return Job(
        config=config,
        workdir=workdir,
        mesh=mesh,
        policy=policy,
        model=Transformer(policy.config, jnp.dtype(config.model.dtype), config.model.remat),
        optimizer=make_optimizer(**config.optim, num_steps=config.num_steps),
        splits={s: reasoning.load(builder, split=s) for s in ("train", "validation", "test")},
        grader=Grader(policy.tokenizer),
        sampling=Sampling(
            temperature=config.rollout.temperature,
            top_p=config.rollout.top_p,
            top_k=config.rollout.top_k,
            max_response_tokens=config.rollout.max_response_tokens,
        ),
        checkpoints=checkpoint.Checkpoints(workdir / "checkpoints", keep=config.checkpoint.keep),
    )


def check_sizes(config: Config) -> None:
    """Raises a UserError for the first setting or set of sizes that can't work."""

    def refuse(wrong: Any, sentence: str) -> None:
        if wrong:
            raise UserError(sentence)

    for name, value, choices in (
        ("data.task", config.data.task, tuple(TASKS)),
        ("model.remat", config.model.remat, tuple(REMAT_POLICIES)),
        ("model.dtype", config.model.dtype, ("float32", "bfloat16")),
        ("publish_dtype", config.publish_dtype, ("float32", "bfloat16")),
        ("objective.denominator", config.objective.denominator, ("behavior", "learner")),
        ("objective.proximal", config.objective.proximal, PROXIMALS),
        ("objective.correction", config.objective.correction, CORRECTIONS),
        ("objective.aggregation", config.objective.aggregation, AGGREGATIONS),
        ("objective.name", config.objective.name, tuple(OBJECTIVES)),
    ):
        refuse(value not in choices, f"{name}={value!r} is not one of {', '.join(choices)}")
    for name, value in (
        ("group_size", config.group_size),
        ("groups_per_step", config.groups_per_step),
        ("rollout.prompts_per_call", config.rollout.prompts_per_call),
        ("rollout.prompt_multiple", config.rollout.prompt_multiple),
        ("learner.micro_batches", config.learner.micro_batches),
        ("learner.rows_multiple", config.learner.rows_multiple),
        ("learner.logp_chunk", config.learner.logp_chunk),
        ("evaluation.every", config.evaluation.every),
        ("checkpoint.every", config.checkpoint.every),
        ("checkpoint.keep", config.checkpoint.keep),
    ):
        refuse(value < 1, f"{name}={value} must be at least 1")
    for name, value in (
        ("objective.beta1", config.objective.beta1),
        ("objective.beta2", config.objective.beta2),
        ("optim.learning_rate", config.optim.learning_rate),
    ):
        refuse(value <= 0, f"{name}={value} must be above 0")
    proximal, correction = config.objective.proximal, config.objective.correction
    refuse(
        proximal == "behavior" and correction != "none",
        f"objective.correction={correction!r} repairs the gap of behavior and proximal policy; "
        "it needs objective.proximal='learner'",
    )
    temperature = config.rollout.temperature
    refuse(
        temperature <= 0,
        f"rollout.temperature={temperature} leaves nothing to learn from; it must be above 0",
    )
    sequences = config.group_size * config.groups_per_step
    micro_batches = config.learner.micro_batches
    refuse(
        sequences % micro_batches,
        f"learner.micro_batches={micro_batches} does not divide the {sequences} sequences of a "
        "step (group_size x groups_per_step); choose a divisor",
    )
    mesh = make_mesh(**config.mesh)
    devices = mesh.shape["data"] * mesh.shape["fsdp"]
    refuse(
        config.learner.rows_multiple % devices,
        f"learner.rows_multiple={config.learner.rows_multiple} can't be divided over mesh.data x "
        f"mesh.fsdp = {devices} devices; choose a multiple of {devices}",
    )
    needed = config.groups_per_step + config.rollout.prompts_per_call
    refuse(
        config.buffer.capacity < needed,
        f"buffer.capacity={config.buffer.capacity} is too small for groups_per_step + "
        f"rollout.prompts_per_call; raise it to at least {needed}",
    )
    ks, n = config.evaluation.ks, config.evaluation.n
    refuse(
        not ks or min(ks) < 1 or max(ks) > n,
        f"evaluation.ks={list(ks)} must lie within 1 and evaluation.n={n} samples; raise n",
    )
