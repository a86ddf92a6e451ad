"""Builds the parts that a configuration names: the only module that imports all packages.

Each part gets its own section of the configuration and nothing else.
"""

import functools
import os
import string
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from etils import epath

from oapl_jax import multihost
from oapl_jax.config import Config, FileDataConfig, load_config
from oapl_jax.curriculum import CURRICULA, Curriculum
from oapl_jax.data import prompts, question_files
from oapl_jax.data.records import Record
from oapl_jax.data.splits import open_splits
from oapl_jax.data.synthetic import tasks
from oapl_jax.errors import UserError
from oapl_jax.evaluation import evaluate
from oapl_jax.files import absolute, checksum
from oapl_jax.fleet.admission import Requirements
from oapl_jax.fleet.sampler import Fleet
from oapl_jax.learner import train_step
from oapl_jax.learner.optimizer import make_optimizer
from oapl_jax.learner.packing import check_whole_groups
from oapl_jax.model import hf, lora
from oapl_jax.model.policy import Policy, open_policy
from oapl_jax.model.sharding import open_meshes
from oapl_jax.model.transformer import Transformer
from oapl_jax.objectives import bind
from oapl_jax.preferences import (
    JUDGES,
    Preferences,
    RecordedComparators,
    SampledComparators,
)
from oapl_jax.rewards.function.verifier import find_function
from oapl_jax.rewards.grader import Grader, check_rewards
from oapl_jax.rollout import dataset
from oapl_jax.rollout.buffer import Buffer, GroupStore
from oapl_jax.rollout.dataset import RecordedStream
from oapl_jax.rollout.kept import KeptNotes
from oapl_jax.rollout.ledger import FILE, Ledger, ZeroRewardGuard
from oapl_jax.rollout.local_sampler import LocalSampler
from oapl_jax.rollout.sampler import Sampler, Sampling
from oapl_jax.rollout.source import GroupSource
from oapl_jax.rollout.worker import Worker
from oapl_jax.structs import Group, Prompt, Rollout
from oapl_jax.tracking.progress import log
from oapl_jax.weights import checkpoint, probe, publisher
from oapl_jax.weights.lag import LagPolicy
from oapl_jax.weights.versions import Versions

KEPT_SECONDS = 60.0  # between two shards of kept groups, so that a report can follow a run


class Run:
    """The parts of a run, each opened from its own section of the configuration at first use.

    Assigning a part before its first use replaces it.

    Args:
      config: of the run.
      workdir: holds everything that the run writes.

    Attributes:
      mesh: of the learner, over all hosts.
      sampler_mesh: of this host's embedded samplers; its devices may be the learner's.
      given: the configuration with its zeros, which fits other devices too; a workdir keeps it.
      config: with the sizes that follow from the devices.
      leased: True in the training run that holds the lease on the workdir; others, such as an
        evaluation beside it, replace no file of a model.

    Raises:
      UserError: at once for sizes that fit neither devices nor hosts, for constants of the
        objective, and for a reward function that can't be imported; by a part, for files that do
        not fit.
    """

    def __init__(self, config: Config, workdir: epath.Path):
        self.mesh, self.sampler_mesh = open_meshes(
            config.mesh, config.rollout, jax.devices(), host=jax.process_index()
        )
        # Of the sampler's devices, which may be the learner's.
        self._turns = multihost.Turns() if config.rollout.devices else multihost.turns
        config.check_layout(mesh=self.mesh.shape, hosts=jax.process_count())
        self.given, self.workdir = config, workdir
        self.config = config = config.derived(self.mesh.shape)
        self.leased = False
        if config.rewards.function:
            find_function(config.rewards.function)
        self.objective = bind(
            config.objective.name, config.objective.constants, group_size=config.group_size
        )
        if self.objective.needs_whole_groups:
            longest = config.data.max_prompt_tokens + config.rollout.max_response_tokens
            check_whole_groups(config.groups_per_step, config.group_size, longest, config.learner)

    def close(self) -> None:
        """Closes the parts that were opened."""
        for part in ("source", "grader", "versions", "checkpoints"):
            if part in self.__dict__:
                getattr(self, part).close()

    # Policy and learner

    @cached_property
    def policy(self) -> Policy:
        config, characters = self.config, "" if self.config.model.path else self._characters()
        with multihost.host0_first("the model", deadline=config.rollout.deadline):
            policy = open_policy(
                self.workdir / "model",
                path=config.model.path,
                architecture=config.model.architecture,
                characters=characters,
                # A run that was refused may have left a model of other settings.
                renew=self.leased and load_config(self.workdir) is None,
            )
        config.check_lengths(policy.config.max_positions)
        return policy

    def _characters(self) -> str:
        """The vocabulary of a fresh model."""
        data = self.config.data
        if isinstance(data, FileDataConfig):
            return question_files.characters(self.splits, data.instruction)
        task = tasks.TASKS.get(data.task)
        return task.characters if task else string.printable

    @cached_property
    def model(self) -> Transformer:
        section = self.config.model
        adapters = lora.open_lora(section.lora)
        return Transformer(self.policy.config, jnp.dtype(section.dtype), section.remat, adapters)

    @cached_property
    def frozen(self) -> Any:
        """Weights under the adapters, in bfloat16 on the mesh; {} if all weights are trained."""
        if not self.model.lora:
            return {}
        return self.policy.load_params(self.mesh, dtype=lora.FROZEN_DTYPE)

    @cached_property
    def frozen_digest(self) -> str:
        """Of the frozen weights, which no checkpoint has; "" if all weights are trained."""
        return checkpoint.digest(checkpoint.checksums(self.frozen)) if self.frozen else ""

    def whole(self, params: Any) -> Any:
        """Parameters of the model: those that are trained, and the frozen ones, without a copy."""
        return lora.join(self.frozen, params) if self.frozen else params

    def merged(self, params: Any) -> Any:
        """Parameters as a sampler takes them: adapters are merged, in the dtype of activations."""
        return self._merge(self.whole(params)) if self.model.lora else params

    @cached_property
    def _merge(self) -> Callable[[Any], Any]:
        assert self.model.lora
        placed = train_step.abstract_frozen(self.model, self.mesh)
        return jax.jit(
            functools.partial(lora.merge, lora=self.model.lora, dtype=self.model.dtype),
            out_shardings=jax.tree.map(lambda leaf: leaf.sharding, placed),
        )

    def start_params(self) -> Any:
        """Parameters to train from: the checkpoint's, fresh adapters over it, or a seed."""
        if self.policy.checkpoint is None:
            return self.config.seed
        if not self.model.lora:
            return self.policy.load_params(self.mesh)
        parts = self.model, self.optimizer, self.mesh
        return train_step.init_state(*parts, self.config.seed).params

    @property
    def adapters(self) -> hf.Adapters | None:
        """The adapters as they are published; None if all weights are trained."""
        section = self.config.model
        if not self.model.lora:
            return None
        base = os.fspath(absolute(section.path))
        return hf.Adapters(self.model.lora, base, section.lora.merged)

    @cached_property
    def optimizer(self) -> optax.GradientTransformation:
        return make_optimizer(**self.config.optim, num_steps=self.config.num_steps)

    @cached_property
    def abstract_state(self) -> train_step.TrainState:
        """Shapes, dtypes and shardings of the train state, to restore into."""
        return train_step.abstract_state(self.model, self.optimizer, self.mesh)

    # Data and rewards

    @cached_property
    def splits(self) -> dict[str, Sequence[Record]]:
        """The records of train, validation and test."""
        with multihost.host0_first("the data", deadline=self.config.rollout.deadline):
            return open_splits(self.config.data)

    @property
    def prompt_template(self) -> prompts.PromptTemplate:
        names = ("task", "max_prompt_tokens", "instruction")
        settings = {name: self.config.data[name] for name in names}
        settings["keep_metadata"] = bool(self.config.rewards.function)
        return prompts.PromptTemplate(self.policy.tokenizer, **settings, now=self.policy.now)

    def prompts(self, split: str) -> list[Prompt]:
        """Every prompt of a split, in order."""
        return prompts.all_prompts(self.splits[split], self.prompt_template)

    def response_text(self, tokens: np.ndarray) -> str:
        """A response as reward functions and people read it."""
        return prompts.response_text(self.policy.tokenizer, tokens)

    @cached_property
    def grader(self) -> Grader:
        return Grader(self.policy.tokenizer, self.config.rewards)

    def check_grader(self) -> None:
        """Grades known responses end to end before any sampling; see rewards.grader."""
        check_rewards(self.grader, self.prompt_template, self.splits["train"])

    # Weights

    @cached_property
    def checkpoints(self) -> checkpoint.Checkpoints:
        directory = self.workdir / "checkpoints"
        deadline, keep = self.config.rollout.deadline, self.config.checkpoint.keep
        return checkpoint.Checkpoints(directory, deadline=deadline, keep=keep)

    def checkpoint_step(self, step: int | None) -> int:
        """The checkpoint step asked for, or the newest.

        Raises:
          UserError: if the workdir has no such step, or another format.
        """
        load_config(self.workdir)
        steps = self.checkpoints.steps()
        if not steps or (step is not None and step not in steps):
            have, asked = ", ".join(map(str, steps)) or "none", "" if step is None else step
            remedy = "name one of them" if steps else "train first, without naming a step"
            raise UserError(
                f"{self.workdir} has no checkpoint step {asked} (have: {have}); {remedy}"
            )
        return steps[-1] if step is None else step

    def params_at(self, step: int | None) -> tuple[int, Any]:
        """Step and parameters of a checkpoint, the newest if None."""
        found = self.checkpoint_step(step)
        return found, self.checkpoints.restore_params(found, self.abstract_state.params)

    @cached_property
    def versions(self) -> Versions:
        dtype = self.config.model.dtype
        make_probe = probe.make_probe(self.model, self.mesh, self.config.learner)
        return Versions(
            self.workdir,
            self.policy.config,
            self.policy.tokenizer,
            self.mesh,
            lambda params: {**make_probe(self.whole(params)), "dtype": dtype},
            dtype=self.config.publish_dtype,
            config=self.given.to_dict(),
            deadline=self.config.rollout.deadline,
            full_every=self.config.publish_full_every,
            adapters=self.adapters,
            whole=self.whole,
        )

    @cached_property
    def lag(self) -> LagPolicy:
        return LagPolicy(**self.config.lag, seed=self.config.seed)

    # Sampling

    @cached_property
    def sampling(self) -> Sampling:
        names = ("temperature", "top_p", "top_k", "max_response_tokens")
        return Sampling(**{name: self.config.rollout[name] for name in names})

    def open_local_sampler(self, *, seed: int) -> LocalSampler:
        names = ("max_sequences", "prompt_multiple", "tokens_per_round")
        return LocalSampler(
            self.policy.config,
            self.sampler_mesh,
            dtype=self.config.model.dtype,
            stop_ids=self.policy.stop_ids,
            seed=seed,
            max_prompt_tokens=self.config.data.max_prompt_tokens,
            **{name: self.config.rollout[name] for name in names},
            turns=self._turns if self.sampler_mesh.size > 1 else None,
        )

    def open_sampler(self, *, seed: int, allow_older: bool) -> Sampler:
        """The sampler that `rollout.sampler` names; a fleet contacts its servers at once.

        Args:
          seed: of the embedded sampler.
          allow_older: whether groups of a version older than the target are of use.
        """
        if self.config.rollout.sampler == "local":
            return self.open_local_sampler(seed=seed)
        self.config.fleet.check_source()
        self.config.fleet.check_versions(self.workdir)
        requirements = Requirements(
            model_config=self.policy.config,
            tokenizer=self.policy.tokenizer,
            stop_ids=self.policy.stop_ids,
            sampling=self.sampling,
            max_prompt_tokens=self.config.data.max_prompt_tokens,
            dtype=self.config.publish_dtype,
            probe_tolerance=self.config.fleet.probe_tolerance,
            adapters=None if self.config.model.lora.merged else self.model.lora,
        )
        return Fleet(self.config.fleet, requirements, allow_older=allow_older, log=log)

    @cached_property
    def evaluate(self) -> Callable[[int, Any, str], dict[str, Any]]:
        """Function (step, parameters, split) -> pass@k and further results of the policy."""
        section, deadline = self.config.evaluation, self.config.rollout.deadline
        # Other random numbers than those of training.
        sampler = self.open_local_sampler(seed=self.config.seed + 1)
        grader = self.grader.apart()

        def evaluate_split(step: int, params: Any, split: str) -> dict[str, Any]:
            with multihost.collective_section(f"the weights of step {step}", deadline=deadline):
                sampler.set_params(step, self.merged(params))
            results = evaluate(
                sampler,
                self.prompts(split),
                grader.reward,
                grader.final_answer,
                n=section.n,
                ks=section.ks,
                sampling=self.sampling,
                resamples=section.resamples,
                seed=self.config.seed,
                part_means=grader.part_means,
            )
            sampler.drop_params()
            return results

        return evaluate_split

    # The source of groups

    @cached_property
    def source(self) -> GroupSource:
        """Sampler, curriculum, buffer, ledger, worker and recorded dataset of the training loop.

        Raises:
          UserError: for a recorded dataset of another task, tokenizer or model, or a damaged one.
        """
        config, rollout, host0 = self.config, self.config.rollout, not jax.process_index()
        recorded_groups = rollout.recorded_groups(config.groups_per_step)
        ledger = Ledger(self.workdir / multihost.per_host_path(FILE))
        decode = self.policy.tokenizer.decode
        guard = ZeroRewardGuard(limit=rollout.max_zero_reward_groups, decode=decode)
        writer = self._open_writer()
        notes = self._notes if writer else None

        def on_group(group: Group) -> None:
            if writer and notes and notes.keeps(group.prompt):
                writer.add(group)
            guard.note(group)

        store = GroupStore(
            self._open_curriculum(),
            Buffer(config.buffer, seed=config.seed, on_end=ledger.end),
            ledger,
            # Host 0 alone reads the recorded dataset.
            self._open_recorded(ledger) if host0 and rollout.source != "live" else None,
            group_size=config.group_size,
            on_group=on_group,
        )
        sampler = None
        if rollout.source != "dataset":
            allow_older = config.buffer.mode != "clear_on_sync"
            sampler = self.open_sampler(seed=config.seed, allow_older=allow_older)
        preferences = self._open_preferences() if config.compares else None
        worker = Worker(
            store,
            sampler,
            preferences.reward if preferences else functools.partial(self._verify, notes),
            group_size=config.group_size,
            sampling=self.sampling,
            prompts_per_call=rollout.prompts_per_call,
            reward_threads=rollout.reward_threads,
            deadline=rollout.deadline,
        )
        return GroupSource(
            worker=worker,
            store=store,
            ledger=ledger,
            guard=guard,
            writer=writer,
            notes=notes,
            workdir=self.workdir,
            sampled=(config.groups_per_step - recorded_groups) // jax.process_count(),
            recorded=recorded_groups if host0 else 0,
            fresh=rollout.prompts_per_call if config.buffer.mode == "replay" else 0,
            overlap=rollout.overlap,
            deadline=rollout.deadline,
            more_metrics=[
                *([sampler.metrics] if sampler else []),
                self.grader.metrics,
                self.grader.part_means,
                *([preferences.metrics] if preferences else []),
            ],
        )

    def _verify(
        self, notes: KeptNotes | None, prompt: Prompt, rollouts: Sequence[Rollout]
    ) -> np.ndarray:
        """float32[n], the verifier's rewards; notes its verdicts of a group that is kept."""
        if notes is None or not notes.keeps(prompt):
            rewards = [self.grader.reward(prompt, rollout) for rollout in rollouts]
        else:
            grades = [self.grader.grade(prompt, rollout) for rollout in rollouts]
            notes.graded(prompt, grades)
            rewards = [grade.reward for grade in grades]
        return np.array(rewards, np.float32)

    def _open_curriculum(self) -> Curriculum:
        config, section = self.config, self.config.curriculum
        scorer = CURRICULA[section.name](
            rates=section.rates,
            window=section.window,
            curator=section.curator,
            policy=self.policy.config,
            mesh=self.mesh,
            seed=config.seed,
            max_prompt_tokens=config.data.max_prompt_tokens,
            num_steps=config.num_steps,
        )
        stream = prompts.PromptStream(
            self.splits["train"],
            self.prompt_template,
            seed=config.seed,
            host=jax.process_index(),
            hosts=jax.process_count(),
        )
        return Curriculum(
            stream,
            scorer,
            candidates=section.candidates,
            picks=config.rollout.prompts_per_call,
            top_p=section.top_p,
            seed=config.seed,
        )

    def _open_preferences(self) -> Preferences:
        """Rewards by comparison with version 0 or with a recorded dataset."""
        section, count = self.config.preferences, self.config.preferences.comparators
        judge = JUDGES[section.judge](section[section.judge])
        if section.dataset:
            directory = epath.Path(section.dataset)
            comparators = RecordedComparators(directory, self.about({}), count=count)
        else:
            comparators = SampledComparators(
                # Other random numbers than those of the group.
                self.open_local_sampler(seed=self.config.seed + 2),
                version=0,
                path=self.versions.path(0),
                count=count,
                sampling=self.sampling,
            )
        return Preferences(
            judge,
            comparators,
            beta=section.beta,
            text=lambda rollout: self.response_text(rollout.tokens),
            verify=self.grader.reward,
        )

    def _open_recorded(self, ledger: Ledger) -> RecordedStream:
        rollout = self.config.rollout
        recorded = dataset.Dataset(epath.Path(rollout.dataset))
        recorded.check(self.about({}), max_prompt_tokens=self.config.data.max_prompt_tokens)
        return RecordedStream(
            recorded,
            order=rollout.dataset_order,
            seed=self.config.seed,
            policy_version=rollout.dataset_version if rollout.dataset_version >= 0 else None,
            start=self.policy.checkpoint,
            drop_zero_variance=self.config.buffer.zero_variance == "drop",
            ledger=ledger,
        )

    def _open_writer(self) -> dataset.DatasetWriter | None:
        """The dataset of sampled groups that this host records or keeps; None if it has none."""
        rollout = self.config.rollout
        begun = self.checkpoints.steps()  # opened by all hosts together
        if rollout.source == "dataset" or not rollout.kept_share or jax.process_index():
            return None
        try:
            writer = dataset.DatasetWriter(
                self.workdir / "rollouts",
                self.about({"by": "train"}),
                groups_per_shard=rollout.groups_per_shard,
                seconds_per_shard=float("inf") if rollout.record else KEPT_SECONDS,
                weights_digest=lambda version: checksum(
                    self.versions.path(version) / publisher.MANIFEST
                ),
                decode=self.response_text,
            )
        except UserError as error:  # sampling has changed: a run goes on without them
            if rollout.record:
                raise
            log(f"no groups are kept (rollout.keep): {error}")
            return None
        if not begun:
            writer.keep(0)  # shards of a run that was killed before its first checkpoint
        return writer

    @cached_property
    def _notes(self) -> KeptNotes:
        share, hosts = self.config.rollout.kept_share, jax.process_count()
        return KeptNotes(self.workdir / "rollouts", share=share, hosts=hosts)

    def about(self, made: Mapping[str, Any]) -> dict[str, Any]:
        """Task, model and sampling of the run, for the manifest of a recorded dataset."""
        return dataset.identity(
            task=self.config.data.task,
            tokenizer=self.policy.tokenizer,
            model=self.policy.config,
            sampling=self.sampling,
            group_size=self.config.group_size,
            made=made,
        )
