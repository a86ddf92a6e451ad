"""The table of objectives, how a configuration section fills it, and the weights of sequences."""

import inspect
import re

import jax.numpy as jnp
import numpy as np
import pytest
from cases import settings

from configs import objectives
from oapl_jax.errors import UserError
from oapl_jax.objectives import (
    OBJECTIVES,
    Objective,
    advantages,
    bind,
    grpo,
    gspo,
    hyper_parameters,
    maxrl,
    oapl,
    tba,
)
from oapl_jax.objectives.aggregation import AGGREGATIONS, sequence_weights

VALUES = settings(
    "grpo",
    beta1=0.5,
    beta2=0.25,
    estimator="dr_grpo",
    proximal="learner",
    correction="token_mask",
    group_size=3,
)
ARGUMENTS = {"advantage": ["reward"], "loss": ["logp", "behavior_logp", "advantage", "mask"]}
# What a section says beside hyper-parameters.
OTHERS = {"denominator", "aggregation", "constant_length", "kl_weight", "ess_power"}


def test_every_objective_has_a_configuration_and_the_other_way_round():
    assert list(objectives.OBJECTIVES) == list(OBJECTIVES)
    assert OBJECTIVES["oapl"] == (oapl.advantage, oapl.loss)
    assert OBJECTIVES["grpo"] == OBJECTIVES["rloo"] == (advantages.advantage, grpo.loss)
    assert OBJECTIVES["gspo"] == (advantages.advantage, gspo.loss)
    assert OBJECTIVES["maxrl"] == (maxrl.advantage, grpo.loss)
    assert OBJECTIVES["tba"] == (tba.advantage, tba.loss)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_objective_binds_from_its_own_section(name):
    section = objectives.objective(name).to_dict()
    assert section["name"] == name
    assert section["aggregation"] in AGGREGATIONS
    assert "aggregation" in objectives.OBJECTIVES[name]  # its own, not another's by default
    assert set(section) == set(objectives.objective("oapl"))  # nothing misspelt has been added
    bind(**section, group_size=4)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_misspelt_hyper_parameter_fails(name):
    for form in OBJECTIVES[name]:
        for parameter in hyper_parameters(form):
            values = settings(name)
            values[parameter + "_"] = values.pop(parameter)
            with pytest.raises(UserError, match=f"{name} needs objective.{parameter};"):
                bind(name, **values)


def test_a_section_has_no_setting_that_no_objective_takes():
    taken = {p for pair in OBJECTIVES.values() for form in pair for p in hyper_parameters(form)}
    assert set(settings("oapl")) - OTHERS == taken


def test_the_configurations_differ_in_what_the_methods_differ():
    of = lambda name, *keys: tuple(objectives.objective(name)[key] for key in keys)
    assert of("grpo", "aggregation", "clip_low", "clip_high") == ("token", 0.2, 0.28)
    assert of("dr_grpo", "aggregation", "estimator") == ("constant", "dr_grpo")
    assert of("gspo", "aggregation", "clip_low", "clip_high") == ("sequence", 3e-4, 4e-4)
    assert of("grpo_is", "proximal", "correction") == ("learner", "token_truncate")
    assert of("a_star_po", "denominator", "beta1", "beta2") == ("reference", 0.5, 1e-3)
    assert of("oapl", "denominator", "beta1", "beta2") == ("behavior", 1.0, 1e-3)


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("form", ARGUMENTS)
def test_every_objective_has_the_two_forms_with_required_keyword_only_hyper_parameters(name, form):
    function = getattr(OBJECTIVES[name], form)
    parameters = list(inspect.signature(function).parameters.values())
    positional = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    keyword_only = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY]
    assert positional == ARGUMENTS[form]
    assert positional + keyword_only == [p.name for p in parameters]  # no *args, no **kwargs
    assert [p.name for p in parameters if p.default is not p.empty] == []
    assert hyper_parameters(function) == keyword_only
    assert function.__doc__


@pytest.mark.parametrize("name", OBJECTIVES)
def test_an_objective_maps_a_group_to_one_loss_and_one_of_each_metric_a_sequence(name):
    objective = bind(name, **VALUES)
    assert isinstance(objective, Objective)
    advantages = objective.advantage(jnp.array([1.0, 0.0, 0.5]))
    logp, behavior = -jnp.ones((3, 4)), -1.1 * jnp.ones((3, 4))
    losses, metrics = objective.loss(logp, behavior, advantages, jnp.ones((3, 4)))
    assert advantages.shape == losses.shape == (3,)
    assert {value.shape for value in metrics.values()} <= {(3,)}


def test_bind_fills_what_each_signature_names():
    reward = jnp.array([1.0, 0.0, 0.5])
    rng = np.random.default_rng(0)
    logp, behavior = jnp.asarray(rng.normal(-1, 0.3, (2, 3, 4)), jnp.float32)
    arrays = logp, behavior, reward, jnp.ones((3, 4))
    bound = bind("oapl", **VALUES)
    np.testing.assert_array_equal(bound.advantage(reward), oapl.advantage(reward, beta1=0.5))
    expected, _ = oapl.loss(*arrays, beta2=0.25)
    np.testing.assert_array_equal(bound.loss(*arrays)[0], expected)

    bound = bind("grpo", **VALUES)
    expected = advantages.advantage(reward, estimator="dr_grpo")
    np.testing.assert_array_equal(bound.advantage(reward), expected)
    names = hyper_parameters(grpo.loss)
    expected, _ = grpo.loss(*arrays, **{name: VALUES[name] for name in names})
    np.testing.assert_array_equal(bound.loss(*arrays)[0], expected)


def test_maximum_likelihood_imitates_demonstrations_with_reward_one():
    bound = bind("sft")
    logp = jnp.array([[-1.0, -2.0, jnp.nan], [-0.5, -0.5, -0.5]])
    mask = jnp.array([[1.0, 1.0, 0.0], [1.0, 1.0, 1.0]])
    losses, _ = bound.loss(logp, jnp.zeros((2, 3)), bound.advantage(jnp.array([1.0, 0.0])), mask)
    np.testing.assert_array_equal(losses, [3.0, 0.0])


def test_an_unknown_objective_is_refused_with_the_choices():
    with pytest.raises(UserError, match=r"objective\.name='oalp' .*oapl, .*grpo, .*sft"):
        bind("oalp", **VALUES)


@pytest.mark.parametrize(
    ("name", "missing"),
    [("oapl", ["beta1"]), ("oapl", ["beta2"]), ("grpo", ["clip_low", "correction_cap"])],
)
def test_a_missing_hyper_parameter_is_refused_by_name(name, missing):
    values = {key: value for key, value in VALUES.items() if key not in missing}
    with pytest.raises(UserError) as error:
        bind(name, **values)
    assert name in str(error.value)
    assert re.findall(r"objective\.(\w+)", str(error.value)) == missing


LENGTHS = np.array([3, 17, 1, 9, 9, 240])


def plain(token_losses, aggregation, constant_length):
    """The loss of a batch, as its name says it, from ragged lists of token losses."""
    if aggregation == "sequence":
        return np.mean([np.sum(x) for x in token_losses])
    if aggregation == "token":
        return np.mean(np.concatenate(token_losses))
    if aggregation == "sequence_token":
        return np.mean([np.mean(x) for x in token_losses])
    assert aggregation == "constant"
    return np.mean([np.sum(x) / constant_length for x in token_losses])


@pytest.mark.parametrize("lengths", [LENGTHS, np.array([5]), np.full(4, 8)], ids=str)
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_an_aggregation_is_the_plain_mean_that_it_is_named_after(aggregation, lengths):
    rng = np.random.default_rng(1)
    token_losses = [rng.normal(0.3, 1, n) for n in lengths]
    weights = sequence_weights(lengths, aggregation, constant_length=256)
    assert weights.dtype == np.float32
    assert weights.shape == lengths.shape
    found = np.sum(weights.astype(np.float64) * [np.sum(x) for x in token_losses])
    np.testing.assert_allclose(found, plain(token_losses, aggregation, 256), rtol=1e-6)


def test_aggregations_differ_on_ragged_lengths():
    tables = [sequence_weights(LENGTHS, a, constant_length=100) for a in AGGREGATIONS]
    for i, one in enumerate(tables):
        assert not any(np.allclose(one, other) for other in tables[:i])


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_a_split_or_shuffled_batch_keeps_the_weights_of_the_whole(aggregation):
    weigh = lambda lengths: sequence_weights(lengths, aggregation, constant_length=100)
    order = np.array([4, 2, 0, 5, 1, 3])
    np.testing.assert_array_equal(weigh(LENGTHS[order]), weigh(LENGTHS)[order])
    # What would be wrong: weights from the counts of a part add up to several batches.
    rng = np.random.default_rng(2)
    token_losses = [rng.uniform(1, 2, n) for n in LENGTHS]
    sums = np.array([x.sum() for x in token_losses])
    whole = plain(token_losses, aggregation, 100)
    for parts in ([slice(0, 3), slice(3, 6)], [slice(0, 2), slice(2, 4), slice(4, 6)]):
        split = sum(np.sum(weigh(LENGTHS)[part] * sums[part]) for part in parts)
        np.testing.assert_allclose(split, whole, rtol=1e-6)
        wrong = sum(np.sum(weigh(LENGTHS[part]) * sums[part]) for part in parts)
        assert wrong > 1.5 * whole


def test_an_unknown_aggregation_is_refused_with_the_choices():
    with pytest.raises(UserError, match=r"objective\.aggregation='mean' .*sequence_token"):
        sequence_weights(LENGTHS, "mean", constant_length=1)
