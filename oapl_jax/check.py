"""What a configuration can't be, refused by name before any work."""

from collections.abc import Callable, Mapping
from typing import Any

import jax

from oapl_jax.curriculum import CURRICULA
from oapl_jax.errors import UserError
from oapl_jax.learner.packing import check_whole_groups
from oapl_jax.model.sharding import make_mesh
from oapl_jax.model.transformer import REMAT_POLICIES
from oapl_jax.objectives import bind
from oapl_jax.objectives.aggregation import AGGREGATIONS
from oapl_jax.preferences import JUDGES
from oapl_jax.rewards import grader

DENOMINATORS = ("behavior", "learner", "reference")
Config = Any  # an ml_collections.ConfigDict, whose attributes have no static types
Refuse = Callable[[Any, str], None]  # raises the sentence as a UserError if the first one holds


def check_sizes(config: Config) -> None:
    """Raises a UserError for the first setting or set of sizes that can't work on these hosts."""
    check_layout(config, mesh=make_mesh(**config.mesh).shape, hosts=jax.process_count())


def check_layout(config: Config, *, mesh: Mapping[str, int], hosts: int) -> None:
    """`check_sizes` for a mesh of these sizes and so many hosts, which need not be there."""

    def refuse(wrong: Any, sentence: str) -> None:
        if wrong:
            raise UserError(sentence)

    check_values(config, refuse)
    check_mesh(config, refuse, mesh)
    check_rollout(config, refuse)
    check_objective(config, refuse)
    check_curriculum(config, refuse, mesh)
    check_preferences(config, refuse)
    check_hosts(config, refuse, hosts)


def check_values(config: Config, refuse: Refuse) -> None:
    """Calls `refuse` for each setting that can't have its value; it raises if its first argument
    holds."""
    for name, value, choices in (
        ("data.task", config.data.task, grader.TASKS),
        ("model.remat", config.model.remat, tuple(REMAT_POLICIES)),
        ("curriculum.curator.remat", config.curriculum.curator.remat, tuple(REMAT_POLICIES)),
        ("model.dtype", config.model.dtype, ("float32", "bfloat16")),
        ("optim.mu_dtype", config.optim.mu_dtype, ("float32", "bfloat16")),
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
        ("checkpoint.every", config.checkpoint.every),
        ("checkpoint.keep", config.checkpoint.keep),
    ):
        refuse(value < 1, f"{name}={value} must be at least 1")
    for name, value in (
        ("evaluation.every", config.evaluation.every),
        ("rollout.unpaid_groups", config.rollout.unpaid_groups),
    ):
        refuse(value < 0, f"{name}={value} must be at least 0; 0 is never")
    rate = config.optim.learning_rate
    refuse(rate <= 0, f"optim.learning_rate={rate} must be above 0")
    temperature = config.rollout.temperature
    refuse(
        temperature <= 0,
        f"rollout.temperature={temperature} leaves nothing to learn from; it must be above 0",
    )
    ks, n = config.evaluation.ks, config.evaluation.n
    refuse(
        not ks or min(ks) < 1 or max(ks) > n,
        f"evaluation.ks={list(ks)} must lie within 1 and evaluation.n={n} samples; raise n",
    )


def check_mesh(config: Config, refuse: Refuse, mesh: Mapping[str, int]) -> None:
    """Calls `refuse` for rows that can't be divided over the devices."""
    devices = mesh["data"] * mesh["fsdp"]
    refuse(
        config.learner.rows_multiple % devices,
        f"learner.rows_multiple={config.learner.rows_multiple} can't be divided over mesh.data x "
        f"mesh.fsdp = {devices} devices; choose a multiple of {devices}",
    )
    context = mesh["context"]
    refuse(
        config.learner.row_length % context,
        f"learner.row_length={config.learner.row_length} can't be divided over mesh.context="
        f"{context}; choose a multiple of it, on TPU of {128 * context}",
    )


def check_rollout(config: Config, refuse: Refuse) -> None:
    """Calls `refuse` for a buffer, waits and recorded sets that do not go together."""
    # Beside the learner, what a sampler takes at a time must have room in the buffer.
    in_flight, of = {
        "local": (
            max(config.rollout.max_sequences // config.group_size, 1),
            "rollout.max_sequences / group_size",
        ),
        "fleet": (config.fleet.max_in_flight, "fleet.max_in_flight"),
    }[config.rollout.sampler]
    needed = config.groups_per_step + max(config.rollout.prompts_per_call, in_flight)
    waits, pauses = config.rollout.deadline, config.fleet.no_server_deadline
    refuse(
        config.rollout.sampler == "fleet" and waits <= pauses,
        f"rollout.deadline={waits:g} would end a run that pauses without a server before "
        f"fleet.no_server_deadline={pauses:g} does; raise it above that",
    )
    refuse(
        config.group_size == 1 and config.buffer.zero_variance == "drop",
        "group_size=1 makes all rewards of a group equal, and buffer.zero_variance='drop' drops "
        "such groups, so that nothing is left; raise group_size or set buffer.zero_variance='keep'",
    )
    source, share = config.rollout.source, config.rollout.recorded_share
    refuse(
        source != "shards" and config.buffer.capacity < needed,
        f"buffer.capacity={config.buffer.capacity} is too small for groups_per_step + "
        f"rollout.prompts_per_call or + {of}; raise it to at least {needed}",
    )
    refuse(
        (source == "live") == bool(config.rollout.shards),
        f"rollout.source={source!r} and rollout.shards={config.rollout.shards!r} do not go "
        "together: name a set made by oapl_jax.record with 'shards' or 'both', none with "
        "'live'",
    )
    refuse(
        source == "both" and not 0 < recorded_groups(config) < config.groups_per_step,
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


def recorded_groups(config: Config) -> int:
    """Of the groups of a step, those that come from a recorded set; the others are sampled."""
    shares = {"live": 0.0, "both": config.rollout.recorded_share, "shards": 1.0}
    return round(shares[config.rollout.source] * config.groups_per_step)


def check_hosts(config: Config, refuse: Refuse, hosts: int) -> None:
    """Calls `refuse` for what several hosts can't do, or can't do together."""
    live = config.groups_per_step - recorded_groups(config)
    refuse(
        live % hosts,
        f"groups_per_step={config.groups_per_step} can't be divided over {hosts} hosts ({live} of "
        "them are sampled); choose a multiple",
    )
    for name, value, alone in (
        ("rollout.record", config.rollout.record, config.rollout.record),
        ("curriculum.name", config.curriculum.name, config.curriculum.name != "uniform"),
    ):
        refuse(
            hosts > 1 and alone, f"{name}={value!r} needs a single host, and this run has {hosts}"
        )
    servers = config.fleet.servers
    refuse(
        config.rollout.sampler == "fleet" and 0 < len(servers) < hosts,
        f"fleet.servers names {len(servers)} servers for {hosts} hosts; each host needs its own",
    )


def check_objective(config: Config, refuse: Refuse) -> None:
    """Calls `refuse` for every setting of the objective; it raises if the first argument holds."""
    section = config.objective
    for name, choices in (("denominator", DENOMINATORS), ("aggregation", AGGREGATIONS)):
        value, offer = section[name], ", ".join(choices)
        refuse(value not in choices, f"objective.{name}={value!r} is not one of {offer}")
    refuse(section.constant_length <= 0, "objective.constant_length must be above 0")
    for name in ("kl_weight", "ess_power"):
        refuse(section[name] < 0, f"objective.{name}={section[name]} must be at least 0")
    objective = bind(section.name, section, group_size=config.group_size)
    if objective.needs_whole_groups:
        check_whole_groups(
            config.groups_per_step,
            config.group_size,
            longest=config.data.max_prompt_tokens + config.rollout.max_response_tokens,
            row_length=config.learner.row_length,
            micro_batches=config.learner.micro_batches,
            rows_multiple=config.learner.rows_multiple,
        )


def check_preferences(config: Config, refuse: Refuse) -> None:
    """Calls `refuse` for every setting of the preferences that is none of a judge's own."""
    section, choices = config.preferences, ("none", *JUDGES)
    name, offer = section.judge, ", ".join(choices)
    refuse(name not in choices, f"preferences.judge={name!r} is not one of {offer}")
    if name == "none":
        return
    refuse(section.beta <= 0, f"preferences.beta={section.beta} must be above 0")
    count = section.comparators
    refuse(count < 1, f"preferences.comparators={count} must be at least 1")
    refuse(
        config.rollout.sampler == "fleet"
        and config.rollout.source != "shards"
        and not section.shards,
        "a fleet holds the newest version and can't sample what preferences compare with; record "
        "responses of the reference with oapl_jax.record and name the set in "
        "preferences.shards",
    )


def check_curriculum(config: Config, refuse: Refuse, mesh: Mapping[str, int]) -> None:
    """Calls `refuse` for every setting that the curriculum chosen by name takes."""
    section, picks = config.curriculum, config.rollout.prompts_per_call
    name, rates, window, curator = section.name, section.rates, section.window, section.curator
    offer = ", ".join(CURRICULA)
    refuse(name not in CURRICULA, f"curriculum.name={name!r} is not one of {offer}")
    if name == "uniform":
        return
    refuse(
        config.rollout.source == "shards",
        f"curriculum.name={name!r} chooses what is sampled, and rollout.source='shards' samples "
        "nothing; set one of them back",
    )
    refuse(
        section.candidates < picks,
        f"curriculum.candidates={section.candidates} are too few to choose "
        f"rollout.prompts_per_call={picks} of them; raise it, to several times as many",
    )
    for setting, value, good, bounds in (
        ("top_p", section.top_p, 0 < section.top_p <= 1, "above 0 and at most at 1"),
        ("rates.decay", rates.decay, 0 <= rates.decay <= 1, "within 0 and 1"),
        ("rates.prior_rate", rates.prior_rate, 0 < rates.prior_rate < 1, "between 0 and 1"),
        ("rates.prior_count", rates.prior_count, rates.prior_count > 0, "above 0"),
        ("window.low", window.low, 0 <= window.low <= window.high, "within 0 and window.high"),
        ("window.high", window.high, window.high <= 1, "at most at 1"),
        ("window.outside", window.outside, 0 < window.outside <= 1, "above 0 and at most at 1"),
        ("curator.temperature", curator.temperature, curator.temperature > 0, "above 0"),
        ("curator.clip", curator.clip, curator.clip > 0, "above 0"),
        ("curator.dormant", curator.dormant, curator.dormant >= 0, "at 0 or above"),
        ("curator.warmup", curator.warmup, curator.warmup >= 0, "at 0 or above"),
        ("curator.rows", curator.rows, curator.rows > 0, "above 0"),
        ("curator.passes", curator.passes, curator.passes > 0, "above 0"),
    ):
        refuse(not good, f"curriculum.{setting}={value} must lie {bounds}")
    devices = mesh["data"] * mesh["fsdp"]
    refuse(
        name == "actor_curator" and curator.rows % devices,
        f"curriculum.curator.rows={curator.rows} can't be divided over mesh.data x "
        f"mesh.fsdp = {devices} devices; choose a multiple of {devices}",
    )
