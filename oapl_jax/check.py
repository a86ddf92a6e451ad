"""What a configuration can't be, refused by name before any work."""

from collections.abc import Callable
from typing import Any

from oapl_jax import rewards
from oapl_jax.errors import UserError
from oapl_jax.models.transformer import REMAT_POLICIES
from oapl_jax.objectives import OBJECTIVES, hyper_parameters
from oapl_jax.objectives.advantages import ADVANTAGES
from oapl_jax.objectives.aggregation import AGGREGATIONS
from oapl_jax.objectives.grpo import CORRECTIONS, PROXIMALS
from oapl_jax.objectives.maxrl import ESTIMATORS
from oapl_jax.objectives.opmd import BASELINES
from oapl_jax.sharding import make_mesh

DENOMINATORS = ("behavior", "learner", "reference")
Config = Any  # an ml_collections.ConfigDict, whose attributes have no static types


def check_sizes(config: Config) -> None:
    """Raises a UserError for the first setting or set of sizes that can't work."""

    def refuse(wrong: Any, sentence: str) -> None:
        if wrong:
            raise UserError(sentence)

    for name, value, choices in (
        ("data.task", config.data.task, rewards.TASKS),
        ("model.remat", config.model.remat, tuple(REMAT_POLICIES)),
        ("model.dtype", config.model.dtype, ("float32", "bfloat16")),
        ("rollout.source", config.rollout.source, ("live", "shards", "both")),
        ("rollout.sampler", config.rollout.sampler, ("local", "fleet")),
        ("publish_dtype", config.publish_dtype, ("float32", "bfloat16")),
    ):
        refuse(value not in choices, f"{name}={value!r} is not one of {', '.join(choices)}")
    for name, value in (
        ("group_size", config.group_size),
        ("groups_per_step", config.groups_per_step),
        ("rollout.prompts_per_call", config.rollout.prompts_per_call),
        ("rollout.reward_threads", config.rollout.reward_threads),
        ("rollout.groups_per_shard", config.rollout.groups_per_shard),
        ("rollout.prompt_multiple", config.rollout.prompt_multiple),
        ("learner.micro_batches", config.learner.micro_batches),
        ("learner.rows_multiple", config.learner.rows_multiple),
        ("learner.logp_chunk", config.learner.logp_chunk),
        ("evaluation.every", config.evaluation.every),
        ("checkpoint.every", config.checkpoint.every),
        ("checkpoint.keep", config.checkpoint.keep),
    ):
        refuse(value < 1, f"{name}={value} must be at least 1")
    rate = config.optim.learning_rate
    refuse(rate <= 0, f"optim.learning_rate={rate} must be above 0")
    check_objective(config, refuse)
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
    # Beside the learner, what a sampler takes at a time must have room in the buffer.
    in_flight, of = {
        "local": (
            max(config.rollout.max_sequences // config.group_size, 1),
            "rollout.max_sequences / group_size",
        ),
        "fleet": (config.fleet.max_in_flight, "fleet.max_in_flight"),
    }[config.rollout.sampler]
    needed = config.groups_per_step + max(config.rollout.prompts_per_call, in_flight)
    source, share = config.rollout.source, config.rollout.recorded_share
    refuse(
        source != "shards" and config.buffer.capacity < needed,
        f"buffer.capacity={config.buffer.capacity} is too small for groups_per_step + "
        f"rollout.prompts_per_call or + {of}; raise it to at least {needed}",
    )
    refuse(
        (source == "live") == bool(config.rollout.shards),
        f"rollout.source={source!r} and rollout.shards={config.rollout.shards!r} do not go "
        "together: name a set made by oapl_jax.rollout.generate with 'shards' or 'both', none with "
        "'live'",
    )
    refuse(
        source == "both" and not 0 < round(share * config.groups_per_step) < config.groups_per_step,
        f"rollout.recorded_share={share} leaves no recorded or no live group of groups_per_step="
        f"{config.groups_per_step}; use rollout.source='shards' or 'live'",
    )
    refuse(
        source != "live"
        and config.rollout.recorded_version != 0
        and config.objective.denominator == "learner",
        "objective.denominator='learner' needs the weights of every version, and this run does not "
        "have those of recorded ones; set rollout.recorded_version=0 or "
        "objective.denominator='behavior'",
    )
    ks, n = config.evaluation.ks, config.evaluation.n
    refuse(
        not ks or min(ks) < 1 or max(ks) > n,
        f"evaluation.ks={list(ks)} must lie within 1 and evaluation.n={n} samples; raise n",
    )


def check_objective(config: Config, refuse: Callable[[Any, str], None]) -> None:
    """Calls `refuse` for every setting of the objective; it raises if the first argument holds."""
    section = config.objective
    for name, choices in (
        ("denominator", DENOMINATORS),
        ("proximal", PROXIMALS),
        ("correction", CORRECTIONS),
        ("aggregation", AGGREGATIONS),
        ("estimator", tuple(ADVANTAGES)),
        ("maxrl_estimator", ESTIMATORS),
        ("opmd_baseline", BASELINES),
        ("name", tuple(OBJECTIVES)),
    ):
        value, offer = section[name], ", ".join(choices)
        refuse(value not in choices, f"objective.{name}={value!r} is not one of {offer}")
    for name in ("beta1", "beta2", "constant_length"):
        refuse(section[name] <= 0, f"objective.{name}={section[name]} must be above 0")
    for name in ("kl_weight", "ess_power"):
        refuse(section[name] < 0, f"objective.{name}={section[name]} must be at least 0")
    refuse(
        section.proximal == "behavior" and section.correction != "none",
        f"objective.correction={section.correction!r} repairs the gap of behavior and proximal "
        "policy; it needs objective.proximal='learner'",
    )
    refuse(
        section.denominator == "reference" and (section.ess_power or section.kl_weight),
        "objective.denominator='reference' replaces the behavior log-probs that objective.ess_power"
        " and objective.kl_weight need; set both to 0",
    )
    refuse(
        section.name == "maxrl"
        and section.maxrl_estimator == "truncated"
        and not 1 <= section.maxrl_order <= config.group_size,
        f"objective.maxrl_order={section.maxrl_order} must lie within 1 and "
        f"group_size={config.group_size}",
    )
    micro_batches = config.learner.micro_batches
    refuse(
        "group_size" in hyper_parameters(OBJECTIVES[section.name].loss)
        and config.groups_per_step % micro_batches,
        f"objective {section.name} needs whole groups in a micro-batch, and learner.micro_batches="
        f"{micro_batches} does not divide groups_per_step={config.groups_per_step}; choose a "
        "divisor",
    )
