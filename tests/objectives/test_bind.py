"""The table of objectives, how the configuration's section fills it, and aggregation weights."""

import inspect

import jax.numpy as jnp
import numpy as np
import pytest
from cases import COMMON, bound, own_constants, random_group, section

import oapl_jax.objectives as library
from configs import arithmetic, objectives
from oapl_jax.errors import UserError
from oapl_jax.objectives import (
    OBJECTIVES,
    Objective,
    advantages,
    bind,
    constants,
    grpo,
    oapl,
    vespo,
)
from oapl_jax.objectives.aggregation import AGGREGATIONS, sequence_weights
from oapl_jax.objectives.annotations import Fraction
from oapl_jax.objectives.grpo import CORRECTIONS

ARGUMENTS = {"advantage": ["reward"], "loss": ["logp", "behavior_logp", "advantage", "mask"]}


def test_every_objective_has_a_configuration_and_the_other_way_round():
    assert list(objectives.OBJECTIVES) == list(OBJECTIVES)
    assert OBJECTIVES["oapl"][:2] == (oapl.advantage, oapl.loss)
    assert OBJECTIVES["grpo"] == OBJECTIVES["rloo"]
    assert OBJECTIVES["opmd_trinity"].advantage is OBJECTIVES["opmd_kimi"].advantage
    assert OBJECTIVES["grpo"][:2] == (advantages.advantage, grpo.loss)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_objective_binds_from_its_own_section(name):
    own = section(name)
    assert own["name"] == name
    assert objectives.OBJECTIVES[name]["aggregation"] in AGGREGATIONS  # its own
    assert set(own) == set(section("oapl"))  # nothing misspelt has been added
    bind(name, own_constants(own), group_size=4)
    # Its name alone, in the configuration of another objective, gives one that runs.
    config = arithmetic.get_config("objective=oapl").lock()
    config.objective.name = name
    bind(name, own_constants(config.objective.to_dict()), group_size=config.group_size)


def test_every_setting_is_a_constant_of_some_objective():
    values = section("oapl")
    taken = lambda readers: {k for o in readers for f in o[:2] for k in constants(f)}
    shared = lambda place: taken(o for o in OBJECTIVES.values() if o.shared == place)
    for place, found in values.items():
        if isinstance(found, dict):
            known = shared(place) | taken([OBJECTIVES[place]] if place in OBJECTIVES else [])
            assert set(found) <= known, place
    flat = {key for key, value in values.items() if not isinstance(value, dict)}
    assert flat - COMMON == {"beta1", "beta2"} == constants(oapl.loss).keys() | {"beta1"}


def test_a_new_objective_is_a_module_a_line_and_a_section(monkeypatch):
    """Nothing else knows the names of objectives or of their constants."""

    def loss(logp, behavior_logp, advantage, mask, *, strength: Fraction):
        return jnp.sum(logp * mask, axis=-1) * strength, {}

    monkeypatch.setitem(library.OBJECTIVES, "newest", Objective(advantages.centred, loss))
    entry = dict(aggregation="token", newest=dict(strength=0.5))
    monkeypatch.setitem(objectives.OBJECTIVES, "newest", entry)
    config = arithmetic.get_config("objective=newest").lock()
    objective = bind("newest", own_constants(config.objective.to_dict()), group_size=4)
    ones = np.ones((4, 2), np.float32)
    np.testing.assert_array_equal(objective.loss(ones, ones, ones[:, 0], ones)[0], np.ones(4))
    with pytest.raises(UserError, match=r"objective\.newest\.strength=2"):
        bound("newest", strength=2.0)


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("form", ARGUMENTS)
def test_every_objective_has_the_two_forms_with_required_keyword_only_constants(name, form):
    function = getattr(OBJECTIVES[name], form)
    parameters = list(inspect.signature(function).parameters.values())
    positional = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert positional == ARGUMENTS[form]
    assert positional + list(constants(function)) == [p.name for p in parameters]  # no **kwargs
    assert [p.name for p in parameters if p.default is not p.empty] == []
    assert inspect.Parameter.empty not in constants(function).values()
    assert function.__doc__


def test_bind_fills_the_parameters_of_each_signature():
    logp, behavior, reward, mask = random_group(0, [4, 4, 4], 4, spread=0.3)
    objective = bound("oapl", group_size=3, beta1=0.5, beta2=0.25)
    np.testing.assert_array_equal(objective.advantage(reward), oapl.advantage(reward, beta1=0.5))
    expected, _ = oapl.loss(logp, behavior, reward, mask, beta2=0.25)
    np.testing.assert_array_equal(objective.loss(logp, behavior, reward, mask)[0], expected)

    changes = dict(estimator="dr_grpo", proximal="learner", correction="token_mask")
    objective = bound("grpo", group_size=3, **changes)
    expected = advantages.advantage(reward, estimator="dr_grpo")
    np.testing.assert_array_equal(objective.advantage(reward), expected)
    values = section("grpo", **changes)["policy_gradient"]
    expected, _ = grpo.loss(
        logp, behavior, reward, mask, **{key: values[key] for key in constants(grpo.loss)}
    )
    np.testing.assert_array_equal(objective.loss(logp, behavior, reward, mask)[0], expected)


REFUSED = [
    ("oapl", "beta1", 0.0, "objective.beta1"),
    ("oapl", "beta2", -1.0, "objective.beta2"),
    ("a_star_po", "beta2", 0.0, "objective.a_star_po.beta2"),
    ("tba", "beta", float("nan"), "objective.tba.beta"),
    ("prosper", "pair_share", 1.5, "objective.prosper.pair_share"),
    ("opmd_kimi", "baseline", "max", "objective.opmd_kimi.baseline"),
    ("grpo", "clip_low", -0.1, "objective.policy_gradient.clip_low"),
    ("grpo", "dual_clip", 0.9, "objective.policy_gradient.dual_clip"),
    ("grpo", "correction", "truncate", "objective.policy_gradient.correction"),
    ("cispo", "estimator", "gae", "objective.policy_gradient.estimator"),
    ("cispo", "cap", "5", "objective.cispo.cap"),
    ("maxrl", "order", 0, "objective.maxrl.order"),
    # These contradict each other, or the group of four.
    ("grpo", "proximal", "reference", "objective.policy_gradient.proximal"),
    *(("grpo", "correction", c, "objective.policy_gradient.proximal") for c in CORRECTIONS[1:]),
]


@pytest.mark.parametrize(("name", "constant", "value", "setting"), REFUSED)
def test_a_constant_out_of_its_range_is_refused_by_its_setting(name, constant, value, setting):
    with pytest.raises(UserError, match=setting):
        bound(name, **{constant: value})


def test_constants_that_the_group_is_too_small_for_are_refused():
    with pytest.raises(UserError, match=r"objective\.maxrl\.order=4.*group_size=3"):
        bound("maxrl", estimator="truncated", group_size=3)
    bound("maxrl", estimator="truncated", group_size=4)
    with pytest.raises(UserError, match="group_size=1"):
        bound("prosper", group_size=1)


@pytest.mark.parametrize(
    ("name", "place", "constant", "misspelt"),
    [
        ("cispo", "cispo", "cap", "cop"),
        ("grpo", "policy_gradient", "clip_high", "clip_hihg"),
        ("maxrl", "maxrl", "verified_reward", "verified"),
        ("oapl", "", "beta1", None),
        ("tba", "tba", "beta", None),
        ("grpo", "policy_gradient", "clip_low", None),
    ],
)
def test_a_misspelt_constant_names_the_nearest_and_a_missing_one_itself(
    name, place, constant, misspelt
):
    values = own_constants(section(name))
    of_place = values[place] if place else values
    value, words = of_place.pop(constant), f"{name} needs {constant}"
    if misspelt:
        of_place[misspelt], words = value, rf"objective\.{place}\.{misspelt} .*{constant}"
    with pytest.raises(UserError, match=words):
        bind(name, values, group_size=4)


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        ({"bta1": 1.0}, r"objective\.bta1 .*beta1"),
        ({"cispo": {"cop": 1.0}}, r"objective\.cispo\.cop .*cap"),
        ({"cisp": {}}, r"objective\.cisp .*cispo"),
    ],
)
def test_a_misspelt_constant_of_another_objective_is_refused_too(extra, words):
    with pytest.raises(UserError, match=words):
        bind("oapl", {**own_constants(section("oapl")), **extra})


def test_an_unknown_objective_is_refused_with_the_choices():
    with pytest.raises(UserError, match=r"objective\.name='oalp' .*oapl, .*grpo, .*sft"):
        bind("oalp", {})


RAGGED = np.array([3, 17, 1, 9, 9, 240])


def plain(token_losses, aggregation, constant_length):
    """The loss of a batch by the definition of the aggregation, from lists of token losses."""
    return {
        "sequence": np.mean([np.sum(x) for x in token_losses]),
        "token": np.mean(np.concatenate(token_losses)),
        "sequence_token": np.mean([np.mean(x) for x in token_losses]),
        "constant": np.mean([np.sum(x) / constant_length for x in token_losses]),
    }[aggregation]


@pytest.mark.parametrize("lengths", [RAGGED, np.array([5]), np.full(4, 8)], ids=str)
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_an_aggregation_is_the_plain_mean_of_its_name(aggregation, lengths):
    rng = np.random.default_rng(1)
    token_losses = [rng.normal(0.3, 1, n) for n in lengths]
    weights = sequence_weights(lengths, aggregation, constant_length=256)
    assert weights.dtype == np.float32
    assert weights.shape == lengths.shape
    found = np.sum(weights.astype(np.float64) * [np.sum(x) for x in token_losses])
    np.testing.assert_allclose(found, plain(token_losses, aggregation, 256), rtol=1e-6)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_a_split_or_shuffled_batch_keeps_the_weights_of_the_whole(aggregation):
    weigh = lambda lengths: sequence_weights(lengths, aggregation, constant_length=100)
    order = np.array([4, 2, 0, 5, 1, 3])
    np.testing.assert_array_equal(weigh(RAGGED[order]), weigh(RAGGED)[order])
    # Weights from the counts of a part would add up to several batches.
    token_losses = [np.random.default_rng(2).uniform(1, 2, n) for n in RAGGED]
    sums = np.array([x.sum() for x in token_losses])
    whole = plain(token_losses, aggregation, 100)
    np.testing.assert_allclose(weigh(RAGGED) @ sums, whole, rtol=1e-6)
    for parts in ([slice(0, 3), slice(3, 6)], [slice(0, 2), slice(2, 4), slice(4, 6)]):
        assert sum(weigh(RAGGED[part]) @ sums[part] for part in parts) > 1.5 * whole


def test_the_sections_have_the_constants_of_their_methods():
    grpo_section = section("grpo")["policy_gradient"]
    of = lambda name, *keys: tuple(section(name)[name][key] for key in keys)
    clips = ("clip_low", "clip_high")
    assert [grpo_section[k] for k in (*clips, "correction_cap")] == [0.2, 0.28, 2.0]
    assert section("grpo_is")["policy_gradient"]["proximal"] == "learner"
    assert section("dr_grpo")["policy_gradient"]["estimator"] == "dr_grpo"
    assert of("gspo", *clips) == (3e-4, 4e-4)
    assert of("a_star_po", "beta1", "beta2") == (0.5, 1e-3)
    assert of("vespo", *constants(vespo.loss)) == (2.0, 3.0, 3.0, 2.0)
    assert (of("cispo", "cap"), of("prosper", "pair_share")) == ((5.0,), (1.0,))
    kinds = {name: section(name)["aggregation"] for name in ("grpo", "dr_grpo", "gspo")}
    assert kinds == {"grpo": "token", "dr_grpo": "constant", "gspo": "sequence"}
