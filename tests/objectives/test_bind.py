"""The table of objectives, how a configuration section fills it, and the weights of sequences."""

import inspect
import re

import jax.numpy as jnp
import numpy as np
import pytest

from oapl_jax.errors import UserError
from oapl_jax.objectives import OBJECTIVES, Objective, bind, grpo, hyper_parameters, oapl, sft
from oapl_jax.objectives.aggregation import AGGREGATIONS, sequence_weights

SECTION = {
    "name": "unused",
    "beta1": 0.5,
    "beta2": 0.25,
    "normalize_std": False,
    "clip_low": 0.2,
    "clip_high": 0.3,
    "proximal": "learner",
    "correction": "token_mask",
    "correction_cap": 2.0,
    "correction_floor": 0.5,
}
VALUES = {key: value for key, value in SECTION.items() if key != "name"}
ARGUMENTS = {"advantage": ["reward"], "loss": ["logp", "behavior_logp", "advantage", "mask"]}


def test_the_table_names_the_functions_of_each_module():
    modules = {"oapl": oapl, "grpo": grpo, "sft": sft}
    pairs = {name: (module.advantage, module.loss) for name, module in modules.items()}
    assert pairs == OBJECTIVES


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
    expected = grpo.advantage(reward, normalize_std=False)
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
    with pytest.raises(UserError, match=r"objective\.name='oalp' .*oapl, grpo, sft"):
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
