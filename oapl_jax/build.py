"""What a configuration names, opened: the one room that train and evaluate enter first."""

import dataclasses
import functools
import json
import os
import string
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from etils import epath
from jax.sharding import Mesh

from oapl_jax import heartbeat
from oapl_jax import multihost as hosts
from oapl_jax.check import check_sizes
from oapl_jax.data import prompts
from oapl_jax.data.public import releases
from oapl_jax.data.records import Record
from oapl_jax.data.synthetic import tasks
from oapl_jax.errors import UserError
from oapl_jax.evaluation import evaluate
from oapl_jax.fleet.config import FleetConfig
from oapl_jax.fleet.sampler import Fleet
from oapl_jax.learner import train_step as learner
from oapl_jax.learner.optimizer import make_optimizer
from oapl_jax.model import hf
from oapl_jax.model.policy import Policy, check_lengths, open_policy
from oapl_jax.model.sharding import gathered, make_mesh
from oapl_jax.model.transformer import Transformer
from oapl_jax.rewards.grader import Grader
from oapl_jax.rewards.self_check import check_rewards
from oapl_jax.rollout.local_sampler import LocalSampler
from oapl_jax.rollout.sampler import Sampler, Sampling
from oapl_jax.structs import Prompt
from oapl_jax.tracking.progress import say
from oapl_jax.weights import checkpoint, publisher
from oapl_jax.weights.probe import make_probe

Config = Any  # an ml_collections.ConfigDict, whose attributes have no static types


@dataclasses.dataclass(frozen=True)
class Job:
    config: Config
    workdir: epath.Path
    mesh: Mesh
    policy: Policy
    model: Transformer
    optimizer: optax.GradientTransformation
    splits: Mapping[str, Sequence[Record]]
    grader: Grader
    sampling: Sampling
    checkpoints: checkpoint.Checkpoints
    weights: checkpoint.Weights  # what is published

    def new_sampler(self, seed: int, *, older_versions: bool) -> Sampler:
        """What `rollout.sampler` names; a fleet begins to look at its servers at once.

        Args:
          seed: of the embedded sampler.
          older_versions: whether groups of an older version than the one wanted are of use.
        """
        if self.config.rollout.sampler == "local":
            return self.local_sampler(seed)
        return Fleet(
            self.policy.config,
            FleetConfig(**self.config.fleet),
            tokenizer=self.policy.tokenizer,
            stop_ids=self.policy.stop_ids,
            sampling=self.sampling,
            max_prompt_tokens=self.config.data.max_prompt_tokens,
            dtype=self.config.publish_dtype,
            allow_older=older_versions,
            log=say,
        )

    def local_sampler(self, seed: int) -> LocalSampler:
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
            instruction=self.config.data.instruction,
            limit=None,
        )

    def check_rewards(self) -> None:
        """See rewards.self_check: known responses go the way of every response."""
        check_rewards(
            self.grader,
            self.policy.tokenizer,
            self.splits["train"],
            task=self.config.data.task,
            max_prompt_tokens=self.config.data.max_prompt_tokens,
            instruction=self.config.data.instruction,
        )

    def prompt_stream(self) -> prompts.PromptStream:
        return prompts.PromptStream(
            self.splits["train"],
            self.policy.tokenizer,
            task=self.config.data.task,
            seed=self.config.seed,
            max_prompt_tokens=self.config.data.max_prompt_tokens,
            instruction=self.config.data.instruction,
            host=jax.process_index(),
            hosts=jax.process_count(),
        )

    @functools.cached_property
    def _evaluator(self) -> LocalSampler:
        return self.local_sampler(self.config.seed + 1)  # other random numbers than training

    @functools.cached_property
    def probe(self) -> Callable[[Any], dict[str, Any]]:
        """Parameters -> the probe that travels with them."""
        settings = self.config.learner
        probe = make_probe(
            self.model,
            self.mesh,
            row_length=settings.row_length,
            rows_multiple=settings.rows_multiple,
            logp_chunk=settings.logp_chunk,
        )
        return lambda params: {**probe(params), "dtype": self.config.model.dtype}

    @functools.cached_property
    def _standing(self) -> list[int]:
        """The versions that stood when this run first published, as host 0 sees them: a host that
        sees others, in the cache of a network's file system, would not save with the rest."""
        mine = json.dumps(publisher.published_versions(self.workdir / "versions")).encode()
        deadline = self.config.rollout.deadline
        return json.loads(hosts.gather(mine, "the versions that stand", deadline=deadline)[0])

    def publish(self, step: int, params: Any) -> None:
        """The learner's parameters -> an Orbax step -> a version, unless it stands already.

        Host 0 alone writes the version; the others look for its marker.
        """
        versions, deadline = self.workdir / "versions", self.config.rollout.deadline
        if step not in self._standing:
            with heartbeat.together(f"the weights of version {step}", deadline=deadline):
                self.weights.save(step, params, self.probe(params))
                self.weights.wait()
            if not jax.process_index():
                publisher.publish(
                    self.weights.path(step),
                    self.policy.config,
                    version=step,
                    directory=versions,
                    tokenizer=self.policy.tokenizer,
                    dtype=self.config.publish_dtype,
                    config_hash=publisher.config_hash(self.config.to_dict()),
                )
        marker = publisher.version_path(versions, step) / publisher.COMMITTED
        hosts.wait_until(marker.exists, os.fspath(marker), deadline=deadline)

    def collect_versions(self, keep: set[int]) -> None:
        """Deletes the other versions, and the Orbax steps that they were made of."""
        if not jax.process_index():
            publisher.collect(self.workdir / "versions", keep=keep)
        self.weights.keep_only(keep)

    def close(self) -> None:
        self.grader.close()
        self.weights.close()
        self.checkpoints.close()

    def grade(self, step: int, params: Any, split: str) -> dict[str, Any]:
        """pass@k and the rest of the learner's parameters at `step` on a split."""
        deadline = self.config.rollout.deadline
        with heartbeat.together(f"the gathering of step {step}", deadline=deadline):
            here = gathered(params)
        self._evaluator.set_params(step, here)
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

    @property
    def needs_reference_logp(self) -> bool:
        objective = self.config.objective
        return objective.denominator == "reference" or objective.kl_weight > 0

    @property
    def has_reference(self) -> bool:
        """Whether version 0 is kept: for its log-probs, or to sample what is compared with."""
        sampled = self.compares and not self.config.preferences.shards
        return self.needs_reference_logp or sampled

    @property
    def compares(self) -> bool:
        """Whether a judge rewards what is sampled."""
        return self.config.preferences.judge != "none" and self.config.rollout.source != "shards"

    def load_version(self, version: int) -> Any:
        """The parameters of a published version, on the mesh."""
        path = publisher.version_path(self.workdir / "versions", version)
        publisher.check_version(path)
        return hf.load_params(path, self.policy.config, mesh=self.mesh)

    @functools.cached_property
    def reference(self) -> Any:
        """The parameters of version 0, which a job with a reference policy keeps."""
        return self.load_version(0)

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
            have, asked = ", ".join(map(str, steps)) or "none", "" if step is None else step
            raise UserError(
                f"{self.workdir} has no checkpoint step {asked} (have: {have}); train first"
            )
        step = steps[-1] if step is None else step
        return step, self.checkpoints.restore_params(step, self.abstract_state().params)


def open_job(config: Config, workdir: epath.Path) -> Job:
    """Opens mesh, policy, data and checkpoints, and refuses what does not fit, before any work.

    Raises:
      UserError: naming the setting and the remedy.
    """
    check_sizes(config)
    mesh, task = make_mesh(**config.mesh), config.data.task
    data = {k: v for k, v in config.data.to_dict().items() if k not in prompts.PROMPT_SETTINGS}
    room = tasks if task in tasks.TASKS else releases
    with hosts.first_host_first("model and data", deadline=config.rollout.deadline):
        policy = open_policy(
            workdir / "model",
            path=config.model.path,
            architecture=config.model.architecture,
            characters=tasks.TASKS[task].characters if task in tasks.TASKS else string.printable,
        )
        splits = room.open_splits(**data)
    check_lengths(
        policy.config,
        max_prompt_tokens=config.data.max_prompt_tokens,
        max_response_tokens=config.rollout.max_response_tokens,
        row_length=config.learner.row_length,
    )
    return Job(
        config=config,
        workdir=workdir,
        mesh=mesh,
        policy=policy,
        model=Transformer(policy.config, jnp.dtype(config.model.dtype), config.model.remat),
        optimizer=make_optimizer(**config.optim, num_steps=config.num_steps),
        splits=splits,
        grader=Grader(policy.tokenizer, **config.rewards),
        sampling=Sampling(
            temperature=config.rollout.temperature,
            top_p=config.rollout.top_p,
            top_k=config.rollout.top_k,
            max_response_tokens=config.rollout.max_response_tokens,
        ),
        checkpoints=checkpoint.Checkpoints(workdir / "checkpoints", keep=config.checkpoint.keep),
        weights=checkpoint.Weights(workdir / "weights"),
    )
