"""Typed settings: every section validates itself, and a mistake names its setting."""

import functools
import re
import typing

import pytest
from small_runs import checked

from configs import arithmetic, code_contests, competition_math, documents, gsm8k, own_task, smollm2
from oapl_jax import config as settings
from oapl_jax.config import Config
from oapl_jax.curriculum import CURRICULA
from oapl_jax.errors import UserError
from oapl_jax.model.sharding import AXES
from oapl_jax.model.transformer import REMAT_POLICIES
from oapl_jax.objectives import OBJECTIVES, bind, constants
from oapl_jax.objectives.aggregation import AGGREGATIONS
from oapl_jax.preferences import JUDGES
from oapl_jax.rewards.tasks import VERIFIERS

NAN = float("nan")
RECORDED = {"rollout.source": "dataset", "rollout.dataset": "x"}
SIDE_BY_SIDE = {"rollout.devices": 2, "rollout.overlap": True}
# Overrides of the default configuration, and the setting that the error names.
MISTAKES = [
    ({"seed": -1}, "seed"),
    ({"seed": 2**32}, "seed"),
    ({"num_steps": -5}, "num_steps"),
    ({"num_steps": 2**31}, "num_steps"),
    *(({"num_steps": n}, "num_steps") for n in (10**400, -(10**5000))),
    *(({name: 2**63}, name) for name in ("rollout.top_k", "rewards.math.memory_bytes")),
    ({"group_size": 0}, "group_size"),
    ({"learner.micro_batches": 0}, "learner.micro_batches"),
    ({"learner.rows_multiple": 12}, "learner.rows_multiple"),
    ({"fleet.max_in_flight": 0}, "fleet.max_in_flight"),
    ({"fleet.attempts": 0}, "fleet.attempts"),
    ({"fleet.backoff": 0.0}, "fleet.backoff"),
    ({"fleet.request_deadline": -1.0}, "fleet.request_deadline"),
    ({"fleet.refresh_fraction": 1.5}, "fleet.refresh_fraction"),
    ({"fleet.mixed_versions": "drop"}, "fleet.mixed_versions"),
    ({"fleet.probe_tolerance.float32": 0.0}, "fleet.probe_tolerance.float32"),
    ({"rewards.math.recycle_after": 0}, "rewards.math.recycle_after"),
    ({"rewards.documents.weights.closure": -1.0}, "rewards.documents.weights.closure"),
    ({"rewards.documents.plain_formula": 1.5}, "rewards.documents.plain_formula"),
    ({"rewards.documents.per_open_tag": -0.1}, "rewards.documents.per_open_tag"),
    ({"rollout.top_k": -1}, "rollout.top_k"),
    ({"rollout.max_response_tokens": 0}, "rollout.max_response_tokens"),
    ({"evaluation.ks": ()}, "evaluation.ks"),
    ({"evaluation.ks": (0, 1)}, "evaluation.ks"),
    ({"objective.name": "ppo"}, "objective.name"),
    ({"objective.aggregation": "mean"}, "objective.aggregation"),
    ({"objective.denominator": "ours"}, "objective.denominator"),
    ({"objective.beta1": 0.0}, "objective.beta1"),
    ({"objective.beta2": NAN}, "objective.beta2"),
    ({"objective.beta2": float("inf")}, "objective.beta2"),
    ({"objective.beta2": 10**39}, "objective.beta2"),
    ({"objective.kl_weight": -1.0}, "objective.kl_weight"),
    ({"objective.constant_length": 0}, "objective.constant_length"),
    ({"optim.learning_rate": NAN}, "optim.learning_rate"),
    ({"optim.learning_rate": 0.0}, "optim.learning_rate"),
    ({"optim.learning_rate": 10**39}, "optim.learning_rate"),
    ({"optim.b1": 1.0}, "optim.b1"),
    ({"optim.b2": 1.0}, "optim.b2"),
    ({"optim.eps": -1.0}, "optim.eps"),
    # 1, 0 and infinity in float32.
    ({"optim.b2": 0.999999999}, "optim.b2"),
    ({"optim.eps": 1e-60}, "optim.eps"),
    ({"optim.learning_rate": 1e200}, "optim.learning_rate"),
    ({"rollout.temperature": 1e-50}, "rollout.temperature"),
    ({"optim.weight_decay": NAN}, "optim.weight_decay"),
    ({"warmup.batch_size": 0}, "warmup.batch_size"),
    ({"warmup.optim.mu_dtype": "float16"}, "warmup.optim.mu_dtype"),
    ({"lag.mode": "windows"}, "lag.mode"),
    ({"lag.steps": 0}, "lag.steps"),
    ({"buffer.mode": "heap"}, "buffer.mode"),
    ({"buffer.max_reuse": 0}, "buffer.max_reuse"),
    ({"buffer.capacity": 9}, "buffer.capacity"),
    ({"buffer.zero_variance": "no"}, "buffer.zero_variance"),
    ({"group_size": 1, "buffer.zero_variance": "drop"}, "buffer.zero_variance"),
    ({"mesh.fsdp": 0}, "mesh.fsdp"),
    ({"rollout.temperature": 0.0}, "rollout.temperature"),
    ({"rollout.top_p": 1.5}, "rollout.top_p"),
    ({"rollout.deadline": NAN}, "rollout.deadline"),
    ({"rollout.max_sequences": 0}, "rollout.max_sequences"),
    ({"rollout.max_zero_reward_groups": -1}, "rollout.max_zero_reward_groups"),
    ({"rollout.source": "tape"}, "rollout.source"),
    ({"rollout.devices": 2}, "rollout.overlap"),
    (SIDE_BY_SIDE | {"rollout.sampler": "fleet"}, "rollout.devices"),
    (SIDE_BY_SIDE | RECORDED, "rollout.devices"),
    ({"rollout.source": "dataset"}, "rollout.dataset"),
    ({"rollout.dataset": "x"}, "rollout.dataset"),
    (RECORDED | {"rollout.source": "both", "rollout.dataset_share": 0.01}, "rollout.dataset_share"),
    (
        RECORDED | {"rollout.dataset_version": -1, "objective.denominator": "learner"},
        "objective.denominator",
    ),
    ({"model.remat": "some"}, "model.remat"),
    # Sections of a package's own names: every number is finite.
    ({"model.architecture.rms_norm_eps": NAN}, "model.architecture.rms_norm_eps"),
    ({"data.generator.max_terms": 10**400}, "data.generator.max_terms"),
    (
        {"preferences.rubric.objectives": {"short": {"length": NAN}}},
        "preferences.rubric.objectives.short.length",
    ),
    ({"model.dtype": "float16"}, "model.dtype"),
    ({"curriculum.name": "hard"}, "curriculum.name"),
    ({"curriculum.curator.remat": "all"}, "curriculum.curator.remat"),
    ({"preferences.judge": "anyone"}, "preferences.judge"),
    ({"tracking.wandb": "on"}, "tracking.wandb"),
    ({"evaluation.n": 2}, "evaluation.n"),
    ({"evaluation.resamples": 0}, "evaluation.resamples"),
    ({"data.task": "sudoku"}, "data.task"),
    ({"publish_dtype": "int8"}, "publish_dtype"),
    ({"publish_full_every": 0}, "publish_full_every"),
    ({"fleet.fetch_port": 1 << 16}, "fleet.fetch_port"),
    ({"rollout.sampler": "fleet", "publish_full_every": 2}, "fleet.fetch_port"),
]


@pytest.mark.parametrize(("changes", "setting"), MISTAKES, ids=[f"{m[0]!s:.60}" for m in MISTAKES])
def test_a_mistake_names_its_setting(changes, setting):
    config = arithmetic.get_config()
    config.update_from_flattened_dict(changes)
    with pytest.raises(UserError, match=setting.replace(".", r"\.")):
        checked(config)


@pytest.mark.parametrize(
    ("changes", "setting"),
    [
        ({}, "data.sets.train"),
        ({"data.sets.train": "a.jsonl"}, "rewards.function"),
        ({"data.sets.train": "a.jsonl", "rewards.function": "no_module:reward"}, "no_module"),
        ({"data.sets.train": "a.jsonl", "data.task": "chain_sum"}, "data.task"),
        ({"data.sets.train": "a.jsonl", "data.validation_share": 1.0}, "data.validation_share"),
    ],
)
def test_a_mistake_of_a_task_of_one_s_own_names_its_setting(changes, setting):
    config = own_task.get_config()
    config.mesh.update(fsdp=1, data=8)
    config.update_from_flattened_dict(changes)
    with pytest.raises(UserError, match=setting.replace(".", r"\.")):
        checked(config)


def test_a_file_of_one_s_own_needs_no_other_setting():
    for choice in ("", "pretrained", "objective=grpo"):
        config = own_task.get_config(choice)
        changes = {
            "mesh.fsdp": 1,
            "mesh.data": 8,
            "learner.rows_multiple": 8,
            "data.sets.train": "a.jsonl",
            "data.task": "math",
            "data.max_prompt_tokens": 1000,
        }
        config.update_from_flattened_dict(changes)
        typed = checked(config)
        assert isinstance(typed.data, settings.FileDataConfig)
        assert typed.learner.row_length == 1000 + typed.rollout.max_response_tokens


@pytest.mark.parametrize(
    ("changes", "setting"),
    [
        ({"groups_per_step": 5}, "groups_per_step"),
        ({"rollout.record": True}, "rollout.record"),
        ({"curriculum.name": "learnability"}, "curriculum.name"),
    ],
)
def test_a_setting_that_does_not_fit_two_hosts_is_named(changes, setting):
    config = arithmetic.get_config()
    config.update_from_flattened_dict(changes)
    mesh = dict(data=8, fsdp=1, context=1, tensor=1)
    layout = Config.from_dict(config.to_dict())
    with pytest.raises(UserError, match=setting.replace(".", r"\.")):
        layout.check_layout(mesh=mesh, hosts=2)


@pytest.mark.parametrize(
    ("mesh", "changes", "rows", "capacity"),
    [
        ((1, 1, 1, 1), {}, 1, 64),
        ((1, 8, 1, 1), {}, 8, 64),
        ((2, 2, 1, 2), {}, 4, 64),
        ((1, 8, 1, 1), {"rollout.max_sequences": 512}, 8, 96),
        ((1, 8, 1, 1), {"rollout.prompts_per_call": 100}, 8, 132),
        ((1, 8, 1, 1), {"rollout.sampler": "fleet", "fleet.max_in_flight": 50}, 8, 82),
        ((1, 8, 1, 1), {"learner.rows_multiple": 16, "buffer.capacity": 70}, 16, 70),
    ],
)
def test_sizes_that_follow_from_the_devices_are_derived(mesh, changes, rows, capacity):
    config = gsm8k.get_config()
    config.update_from_flattened_dict(changes)
    shape, given = dict(zip(AXES, mesh, strict=True)), Config.from_dict(config.to_dict())
    given.check_layout(mesh=shape, hosts=1)
    derived = given.derived(shape)
    assert (derived.learner.rows_multiple, derived.buffer.capacity) == (rows, capacity)
    derived.check_layout(mesh=shape, hosts=1)
    assert derived.derived(dict.fromkeys(AXES, 2)) == derived


@pytest.mark.parametrize(
    ("changes", "mesh", "proposed"),
    [
        ({"learner.rows_multiple": 12}, (1, 8, 1, 1), {"learner.rows_multiple": 16}),
        ({"buffer.capacity": 40}, (1, 1, 1, 1), {"buffer.capacity": 64}),
        ({"learner.row_length": 770}, (1, 2, 4, 1), {"learner.row_length": 1024}),
        ({"groups_per_step": 7}, (1, 8, 1, 1), {"groups_per_step": 8}),
        (
            RECORDED | {"rollout.source": "both", "groups_per_step": 34},
            (1, 8, 1, 1),
            {"groups_per_step": 36},
        ),
        ({"rollout.max_response_tokens": 900}, (1, 8, 1, 1), {"rollout.max_response_tokens": 744}),
        (
            {"data.max_prompt_tokens": 2000},
            (1, 8, 1, 1),
            {"data.max_prompt_tokens": 500, "rollout.max_response_tokens": 500},
        ),
        ({"learner.row_length": 700}, (1, 8, 1, 1), {"learner.row_length": 768}),
    ],
)
def test_a_refusal_proposes_a_value_that_fits(changes, mesh, proposed):
    """Of two hosts, and a model of 1,000 positions."""
    config, shape = gsm8k.get_config(), dict(zip(AXES, mesh, strict=True))

    def check():
        typed = Config.from_dict(config.to_dict())
        typed.check_layout(mesh=shape, hosts=2)
        typed.check_lengths(1000)

    config.update_from_flattened_dict(changes)
    named = [rf"{setting}\b.*\b{value}\b" for setting, value in proposed.items()]
    with pytest.raises(UserError, match=named[0]) as refused:
        check()
    assert all(re.search(name, str(refused.value)) for name in named)
    config.update_from_flattened_dict(proposed)
    check()


# Two rows a micro-batch, one sequence a row, four sequences a group.
WHOLE_GROUPS = {
    "group_size": 4,
    "groups_per_step": 4,
    "learner.micro_batches": 8,
    "learner.rows_multiple": 1,
    "learner.row_length": 30,
}


@pytest.mark.parametrize(
    ("objective", "changes", "setting"),
    [
        ("grpo", {"objective.policy_gradient.correction": "token_mask"}, "proximal"),
        ("grpo", {"objective.policy_gradient.estimator": "gae"}, "estimator"),
        ("maxrl", {"objective.maxrl.estimator": "truncated", "group_size": 3}, "maxrl.order"),
        ("tba", WHOLE_GROUPS, "learner.micro_batches"),
    ],
)
def test_a_mistake_of_an_objective_names_its_setting(objective, changes, setting):
    config = arithmetic.get_config(f"objective={objective}")
    config.mesh.update(fsdp=1, tensor=8)
    config.update_from_flattened_dict(changes)
    with pytest.raises(UserError, match=setting):
        checked(config)


@pytest.mark.parametrize("digits", [400, 5000, 60_000])
@pytest.mark.parametrize("setting", ["optim.learning_rate", "objective.beta2", "lag.mode"])
def test_an_integer_that_no_float_holds_names_its_setting(setting, digits):
    values = arithmetic.get_config().to_dict()
    section, name = setting.split(".")
    values[section][name] = 10**digits
    with pytest.raises(UserError, match=setting.replace(".", r"\.")):
        Config.from_dict(values)
    with pytest.raises(UserError, match=r"objective\.beta2"):
        bind("oapl", {"beta1": 1.0, "beta2": 10**400})


@pytest.mark.parametrize(
    ("path", "nearest"),
    [
        (("total_steps",), "num_steps"),
        (("lag", "step"), r"lag\.steps\?"),
        (("optim", "lr"), "optim.lr"),
    ],
)
def test_an_unknown_key_at_any_depth_is_named_with_the_nearest(path, nearest):
    values = arithmetic.get_config().to_dict()
    functools.reduce(dict.__getitem__, path[:-1], values)[path[-1]] = 1
    with pytest.raises(UserError, match=nearest):
        Config.from_dict(values)


def test_a_misspelt_key_names_each_setting_once():
    known, elsewhere = ["top_p", "temperature"], ["a.temperature", "rollout.temperature"]
    sentence = settings.nearest("temprature", known, elsewhere, section="rollout")
    assert sentence.count("temperature") == 1
    assert "rollout.temperature" in sentence


def test_every_number_has_a_range():
    def sections(kind):
        for other in kind.__subclasses__():
            yield other
            yield from sections(other)

    for section in sections(settings.Section):
        for name, hint in typing.get_type_hints(section).items():
            if {int, float} & {hint, *typing.get_args(hint)}:
                limits = section.__dataclass_fields__[name].metadata["limits"]
                assert {"at least", "above"} & limits.keys(), f"{section.__name__}.{name}"


VALUES = settings.flatten(arithmetic.get_config().to_dict())
WAITS = [
    name
    for name, value in VALUES.items()
    if type(value) is float and re.search("deadline|seconds|backoff|_every$", name)
]
MANY = [name for name in VALUES if re.search("processes|parallel|reward_threads", name)]
OF_A_PACKAGE = "seed|_bytes$|architecture|generator|objectives|maxrl"
COUNTS = [
    name
    for name, value in VALUES.items()
    if type(value) is int and not re.search(OF_A_PACKAGE, name)
]


@pytest.mark.parametrize(
    ("setting", "value"),
    [*((name, 2e6) for name in WAITS), *((name, 2000) for name in MANY)]
    + [(name, 2**31) for name in COUNTS],
)
def test_waits_processes_and_counts_have_an_upper_limit(setting, value):
    config = arithmetic.get_config()
    config.update_from_flattened_dict({setting: value})
    with pytest.raises(UserError, match=setting.replace(".", r"\.")):
        checked(config)


UNBOUNDED = "clip_low", "clip_high", "dual_clip", "correction_cap", "cap"  # infinity: off


def test_every_constant_of_an_objective_has_a_range():
    for name, objective in OBJECTIVES.items():
        for function in (objective.advantage, objective.loss):
            for constant, annotation in constants(function).items():
                if constant == "group_size" or annotation is bool:
                    continue
                (allowed,) = annotation.__metadata__
                assert NAN not in allowed, f"{name}.{constant}"
                assert (float("inf") in allowed) == (constant in UNBOUNDED), f"{name}.{constant}"
                assert True not in allowed, f"{name}.{constant}"


def test_a_clip_may_be_infinite():
    values = arithmetic.get_config("objective=gspo").to_dict()
    values["objective"]["gspo"]["clip_high"] = float("inf")
    config = Config.from_dict(values)
    assert bind("gspo", config.objective.constants, group_size=4).loss.keywords["clip_high"] > 1e38


def test_a_home_directory_is_expanded(monkeypatch):
    monkeypatch.setenv("HOME", "/home/someone")
    values = arithmetic.get_config().to_dict()
    values["data"]["data_dir"] = "~/data"
    values["rollout"] |= {"source": "dataset", "dataset": "~/round1"}
    config = Config.from_dict(values)
    assert config.data.data_dir == "/home/someone/data"
    assert config.rollout.dataset == "/home/someone/round1"


def test_a_missing_key_and_a_wrong_type_are_named():
    values = arithmetic.get_config().to_dict()
    del values["fleet"]["attempts"]
    with pytest.raises(UserError, match=r"fleet\.attempts"):
        Config.from_dict(values)
    values = arithmetic.get_config().to_dict()
    values["tracking"]["tensorboard"] = 1
    with pytest.raises(UserError, match=r"tracking\.tensorboard"):
        Config.from_dict(values)


@pytest.mark.parametrize(
    "make",
    [
        arithmetic.get_config,
        documents.get_config,
        smollm2.get_config,
        competition_math.get_config,
        lambda: competition_math.get_config("smoke"),
        lambda: code_contests.get_config("round=2"),
        lambda: code_contests.get_config("smoke,round=0"),
    ],
)
def test_every_file_is_typed_and_saved_whole(make):
    typed = Config.from_dict(make().to_dict())
    saved = settings.flatten(typed.to_dict())
    for name, value in settings.flatten(make().to_dict()).items():
        own = name.removeprefix("objective.")
        kept = saved[name] if name in saved else saved[f"objective.constants.{own}"]
        assert kept == value, name
    again = Config.from_dict(typed.to_dict())
    assert again.to_dict() == typed.to_dict()


def test_choices_are_those_of_the_packages():
    field = lambda section, name: section.__dataclass_fields__[name].metadata["choices"]
    assert set(field(settings.CurriculumConfig, "name")) == set(CURRICULA)
    assert set(field(settings.PreferencesConfig, "judge")) == {"none", *JUDGES}
    assert set(field(settings.ObjectiveConfig, "aggregation")) == set(AGGREGATIONS)
    assert set(settings.REMAT) == set(REMAT_POLICIES)
    assert set(settings.TASKS) == {*VERIFIERS, "math", "code", "documents"}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_objective_is_accepted_by_its_name_alone(name):
    config = arithmetic.get_config()
    config.objective.name = name
    config.mesh.fsdp, config.mesh.data = 1, 8
    checked(config)
