"""Opens the parts that a configuration names: the only room that knows all others.

Each room gets its own section of the configuration and nothing else.
"""

import dataclasses
import functools
import string
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from etils import epath
from jax.sharding import Mesh

from oapl_jax import multihost
from oapl_jax.config import Config, PublicDataConfig
from oapl_jax.curriculum import CURRICULA, Curriculum
from oapl_jax.data import prompts
from oapl_jax.data.public import releases
from oapl_jax.data.records import Record
from oapl_jax.data.synthetic import tasks
from oapl_jax.errors import UserError
from oapl_jax.evaluation import evaluate
from oapl_jax.files import checksum
from oapl_jax.fleet.admission import Requirements
from oapl_jax.fleet.sampler import Fleet
from oapl_jax.learner import train_step
from oapl_jax.learner.optimizer import make_optimizer
from oapl_jax.learner.packing import check_whole_groups
from oapl_jax.model.policy import Policy, check_lengths, open_policy
from oapl_jax.model.sharding import gathered, make_mesh
from oapl_jax.model.transformer import Transformer
from oapl_jax.objectives import bind
from oapl_jax.preferences import (
    JUDGES,
    Preferences,
    RecordedComparators,
    SampledComparators,
)
from oapl_jax.rewards.grader import Grader
from oapl_jax.rewards.self_check import check_rewards
from oapl_jax.rollout import dataset
from oapl_jax.rollout.buffer import Buffer
from oapl_jax.rollout.group_store import GroupStore
from oapl_jax.rollout.ledger import FILE, Ledger, ZeroRewardGuard
from oapl_jax.rollout.local_sampler import LocalSampler
from oapl_jax.rollout.recorded import RecordedStream
from oapl_jax.rollout.sampler import Sampler, Sampling
from oapl_jax.rollout.source import GroupSource
from oapl_jax.rollout.worker import Worker
from oapl_jax.structs import Group, Prompt, Rollout
from oapl_jax.tracking.progress import say
from oapl_jax.weights import checkpoint, probe, publisher
from oapl_jax.weights.versions import Versions


@dataclasses.dataclass(frozen=True)
class Run:
    """The opened parts that training, evaluation and recording share."""

    workdir: epath.Path
    mesh: Mesh
    policy: Policy
    model: Transformer
    optimizer: optax.GradientTransformation
    splits: Mapping[str, Sequence[Record]]
    grader: Grader
    sampling: Sampling
    checkpoints: checkpoint.Checkpoints
    versions: Versions

    def abstract_state(self) -> train_step.TrainState:
        """Shapes, dtypes and shardings of the train state, to restore into."""
        fresh = lambda: train_step.new_state(
            train_step.init_params(self.model, jax.random.key(0)), self.optimizer
        )
        shardings = train_step.state_shardings(self.model, self.optimizer, self.mesh)
        place = lambda leaf, s: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=s)
        return jax.tree.map(place, jax.eval_shape(fresh), shardings)

    def checkpoint_step(self, step: int | None) -> int:
        """The checkpoint step asked for, or the newest.

        Raises:
          UserError: if the workdir has no such step.
        """
        steps = self.checkpoints.steps()
        if not steps or (step is not None and step not in steps):
            have, asked = ", ".join(map(str, steps)) or "none", "" if step is None else step
            raise UserError(
                f"{self.workdir} has no checkpoint step {asked} (have: {have}); train first"
            )
        return steps[-1] if step is None else step

    def params_at(self, step: int | None) -> tuple[int, Any]:
        """Step and parameters of a checkpoint, the newest if None."""
        found = self.checkpoint_step(step)
        return found, self.checkpoints.restore_params(found, self.abstract_state().params)

    def close(self) -> None:
        self.grader.close()
        self.versions.close()
        self.checkpoints.close()


def open_run(config: Config, workdir: epath.Path) -> Run:
    """Opens mesh, policy, data and checkpoints; rejects what does not fit, before any work.

    Raises:
      UserError: naming the setting and the remedy.
    """
    mesh = check_config(config)
    with multihost.host0_first("model and data", deadline=config.rollout.deadline):
        task = tasks.TASKS.get(config.data.task)
        policy = open_policy(
            workdir / "model",
            path=config.model.path,
            architecture=config.model.architecture,
            characters=task.characters if task else string.printable,
        )
        splits = open_splits(config)
    check_lengths(
        policy.config,
        max_prompt_tokens=config.data.max_prompt_tokens,
        max_response_tokens=config.rollout.max_response_tokens,
        row_length=config.learner.row_length,
    )
    model = Transformer(policy.config, jnp.dtype(config.model.dtype), config.model.remat)
    make_probe = probe.make_probe(
        model,
        mesh,
        row_length=config.learner.row_length,
        rows_multiple=config.learner.rows_multiple,
        logp_chunk=config.learner.logp_chunk,
    )
    return Run(
        workdir=workdir,
        mesh=mesh,
        policy=policy,
        model=model,
        optimizer=make_optimizer(**config.optim, num_steps=config.num_steps),
        splits=splits,
        grader=Grader(policy.tokenizer, config.rewards),
        sampling=Sampling(
            temperature=config.rollout.temperature,
            top_p=config.rollout.top_p,
            top_k=config.rollout.top_k,
            max_response_tokens=config.rollout.max_response_tokens,
        ),
        checkpoints=checkpoint.Checkpoints(workdir / "checkpoints", keep=config.checkpoint.keep),
        versions=Versions(
            workdir,
            policy.config,
            policy.tokenizer,
            mesh,
            lambda params: {**make_probe(params), "dtype": config.model.dtype},
            dtype=config.publish_dtype,
            config_hash=publisher.config_hash(config.to_dict()),
            deadline=config.rollout.deadline,
        ),
    )


def open_splits(config: Config) -> Mapping[str, Sequence[Record]]:
    """The records of train, validation and test."""
    section = dataclasses.asdict(config.data)
    data = {key: value for key, value in section.items() if key not in prompts.PROMPT_SETTINGS}
    if isinstance(config.data, PublicDataConfig):
        return releases.open_splits(**data)
    return tasks.open_splits(**data)


def check_config(config: Config) -> Mesh:
    """Rejects sizes that do not fit these devices and hosts, and constants of the objective.

    Returns:
      The mesh over all devices.

    Raises:
      UserError: naming the setting and the remedy.
    """
    mesh = make_mesh(**config.mesh)
    config.check_layout(mesh=mesh.shape, hosts=jax.process_count())
    objective = bind(
        config.objective.name, config.objective.constants, group_size=config.group_size
    )
    if objective.needs_whole_groups:
        check_whole_groups(
            config.groups_per_step,
            config.group_size,
            longest=config.data.max_prompt_tokens + config.rollout.max_response_tokens,
            row_length=config.learner.row_length,
            micro_batches=config.learner.micro_batches,
            rows_multiple=config.learner.rows_multiple,
        )
    return mesh


def prompt_settings(config: Config) -> dict[str, Any]:
    """Arguments that make a prompt of a record."""
    data = config.data
    return dict(
        task=data.task, max_prompt_tokens=data.max_prompt_tokens, instruction=data.instruction
    )


def split_prompts(config: Config, run: Run, split: str) -> list[Prompt]:
    """Every prompt of a split, in order."""
    records, tokenizer = run.splits[split], run.policy.tokenizer
    return prompts.all_prompts(records, tokenizer, limit=None, **prompt_settings(config))


def check_grader(config: Config, run: Run) -> None:
    """Grades known responses end to end before any sampling; see rewards.self_check."""
    records, tokenizer = run.splits["train"], run.policy.tokenizer
    check_rewards(run.grader, tokenizer, records, **prompt_settings(config))


def open_local_sampler(config: Config, run: Run, *, seed: int) -> LocalSampler:
    return LocalSampler(
        run.policy.config,
        dtype=config.model.dtype,
        stop_ids=run.policy.stop_ids,
        seed=seed,
        max_sequences=config.rollout.max_sequences,
        prompt_multiple=config.rollout.prompt_multiple,
    )


def open_sampler(config: Config, run: Run, *, seed: int, older_versions: bool) -> Sampler:
    """The sampler that `rollout.sampler` names; a fleet contacts its servers at once.

    Args:
      config, run: of the run.
      seed: of the embedded sampler.
      older_versions: whether groups of a version older than the target are of use.
    """
    if config.rollout.sampler == "local":
        return open_local_sampler(config, run, seed=seed)
    config.fleet.check_source()
    requirements = Requirements(
        model_config=run.policy.config,
        tokenizer=run.policy.tokenizer,
        stop_ids=run.policy.stop_ids,
        sampling=run.sampling,
        max_prompt_tokens=config.data.max_prompt_tokens,
        dtype=config.publish_dtype,
        probe_tolerance=config.fleet.probe_tolerance,
    )
    return Fleet(config.fleet, requirements, allow_older=older_versions, log=say)


def open_evaluator(config: Config, run: Run) -> Callable[[int, Any, str], dict[str, Any]]:
    """Function (step, parameters, split) -> pass@k and further results of the learner's policy."""
    # Other random numbers than those of training.
    sampler = open_local_sampler(config, run, seed=config.seed + 1)

    def evaluate_split(step: int, params: Any, split: str) -> dict[str, Any]:
        name = f"the gathering of step {step}"
        with multihost.collective_section(name, deadline=config.rollout.deadline):
            sampler.set_params(step, gathered(params))
        return evaluate(
            sampler,
            split_prompts(config, run, split),
            run.grader.reward,
            run.grader.final_answer,
            n=config.evaluation.n,
            ks=config.evaluation.ks,
            sampling=run.sampling,
            resamples=config.evaluation.resamples,
            seed=config.seed,
        )

    return evaluate_split


def open_source(config: Config, run: Run) -> GroupSource:
    """Opens the source of groups: sampler, curriculum, buffer, ledger, worker, recorded dataset.

    Raises:
      UserError: for a recorded dataset of another task, tokenizer or model, or a damaged one.
    """
    rollout, host0 = config.rollout, not jax.process_index()
    recorded_groups = rollout.recorded_groups(config.groups_per_step)
    ledger = Ledger(run.workdir / multihost.per_host_path(FILE))
    guard = ZeroRewardGuard(
        limit=rollout.max_zero_reward_groups, decode=run.policy.tokenizer.decode
    )
    writer = open_writer(config, run) if rollout.record else None

    def on_group(group: Group) -> None:
        if writer:
            writer.add(group)
        guard.note(group)

    store = GroupStore(
        open_curriculum(config, run),
        Buffer(config.buffer, seed=config.seed, on_end=ledger.end),
        ledger,
        # Host 0 alone reads the recorded dataset.
        open_recorded(config, run, ledger) if host0 and rollout.source != "live" else None,
        group_size=config.group_size,
        on_group=on_group,
    )
    if rollout.source == "dataset":
        sampler: Sampler = open_local_sampler(config, run, seed=config.seed)  # never used
    else:
        older_versions = config.buffer.mode != "clear_on_sync"
        sampler = open_sampler(config, run, seed=config.seed, older_versions=older_versions)
    preferences = open_preferences(config, run) if config.compares else None
    worker = Worker(
        store,
        sampler,
        preferences.reward if preferences else functools.partial(verify, run.grader),
        group_size=config.group_size,
        sampling=run.sampling,
        prompts_per_call=rollout.prompts_per_call,
        reward_threads=rollout.reward_threads,
        deadline=rollout.deadline,
    )
    return GroupSource(
        worker=worker,
        store=store,
        sampler=sampler,
        ledger=ledger,
        guard=guard,
        writer=writer,
        workdir=run.workdir,
        sampled=(config.groups_per_step - recorded_groups) // jax.process_count(),
        recorded=recorded_groups if host0 else 0,
        fresh=rollout.prompts_per_call if config.buffer.mode == "replay" else 0,
        overlap=rollout.overlap,
        deadline=rollout.deadline,
        metrics=[run.grader.metrics, *([preferences.metrics] if preferences else [])],
    )


def verify(grader: Grader, prompt: Prompt, rollouts: Sequence[Rollout]) -> np.ndarray:
    """float32[n], the verifier's rewards."""
    return np.array([grader.reward(prompt, rollout) for rollout in rollouts], np.float32)


def open_curriculum(config: Config, run: Run) -> Curriculum:
    section = config.curriculum
    scorer = CURRICULA[section.name](
        rates=section.rates,
        window=section.window,
        curator=section.curator,
        policy=run.policy.config,
        mesh=run.mesh,
        seed=config.seed,
        max_prompt_tokens=config.data.max_prompt_tokens,
        num_steps=config.num_steps,
    )
    stream = prompts.PromptStream(
        run.splits["train"],
        run.policy.tokenizer,
        seed=config.seed,
        host=jax.process_index(),
        hosts=jax.process_count(),
        **prompt_settings(config),
    )
    return Curriculum(
        stream,
        scorer,
        candidates=section.candidates,
        picks=config.rollout.prompts_per_call,
        top_p=section.top_p,
        seed=config.seed,
    )


def open_preferences(config: Config, run: Run) -> Preferences:
    """Rewards by comparison with version 0 or with a recorded dataset.

    Raises:
      UserError: for a judge or a dataset that can't be opened.
    """
    section, count = config.preferences, config.preferences.comparators
    judge = JUDGES[section.judge](getattr(section, section.judge))
    if section.dataset:
        directory = epath.Path(section.dataset)
        comparators = RecordedComparators(directory, about(config, run, {}), count=count)
    else:
        comparators = SampledComparators(
            # Other random numbers than those of the group.
            open_local_sampler(config, run, seed=config.seed + 2),
            version=0,
            path=run.versions.path(0),
            count=count,
            sampling=run.sampling,
        )
    return Preferences(
        judge,
        comparators,
        beta=section.beta,
        text=lambda rollout: prompts.response_text(run.policy.tokenizer, rollout.tokens),
        verify=run.grader.reward,
    )


def open_recorded(config: Config, run: Run, ledger: Ledger) -> RecordedStream:
    rollout = config.rollout
    recorded = dataset.Dataset(epath.Path(rollout.dataset))
    recorded.check(about(config, run, {}), max_prompt_tokens=config.data.max_prompt_tokens)
    return RecordedStream(
        recorded,
        order=rollout.dataset_order,
        seed=config.seed,
        policy_version=rollout.dataset_version if rollout.dataset_version >= 0 else None,
        start=run.policy.checkpoint,
        drop_zero_variance=config.buffer.zero_variance == "drop",
        ledger=ledger,
    )


def open_writer(config: Config, run: Run) -> dataset.DatasetWriter:
    writer = dataset.DatasetWriter(
        run.workdir / "rollouts",
        about(config, run, {"by": "train"}),
        groups_per_shard=config.rollout.groups_per_shard,
        weights_digest=lambda version: checksum(run.versions.path(version) / publisher.MANIFEST),
    )
    if not run.checkpoints.steps():
        writer.keep(0)  # shards of a run that was killed before its first checkpoint
    return writer


def about(config: Config, run: Run, made: Mapping[str, Any]) -> dict[str, Any]:
    """Task, model and sampling of a run, for the manifest of a recorded dataset."""
    return dataset.identity(
        task=config.data.task,
        tokenizer=run.policy.tokenizer,
        model=run.policy.config,
        sampling=run.sampling,
        group_size=config.group_size,
        made=made,
    )
