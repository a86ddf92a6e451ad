"""The batch of a step: what groups of equal rewards weigh, and whose log-probs it holds."""

import types

import jax.numpy as jnp
import numpy as np
import pytest

from configs import arithmetic
from oapl_jax.assemble import make_batch, recompute
from oapl_jax.objectives import bind
from oapl_jax.structs import Group, Prompt, Rollout

STEP = 7
LENGTHS = np.array([[3, 1, 4, 2], [5, 2, 6, 3], [1, 1, 2, 4]])
REWARDS = np.array([[0, 1, 0, 1], [1, 1, 1, 1], [0, 0, 0, 0]], np.float32)
VERSIONS = (5, 6, 6)  # of each group


def config_of(**changes):
    config = arithmetic.get_config().unlock()
    config.group_size, config.groups_per_step = REWARDS.shape[1], len(REWARDS)
    config.update_from_flattened_dict(changes)
    return config


def groups():
    """One of different rewards, one all right, one all wrong."""
    made = []
    for draw, (lengths, reward, version) in enumerate(zip(LENGTHS, REWARDS, VERSIONS, strict=True)):
        prompt = Prompt(str(draw), draw, np.array([3, 4], np.int32), "", "", "")
        rollouts = [
            Rollout(np.full(n, 5, np.int32), np.full(n, -1.0, np.float32), version, "stop")
            for n in lengths
        ]
        made.append(Group(prompt, tuple(rollouts), reward))
    return made


def batch_of(config):
    objective = bind(**config.objective, group_size=config.group_size)
    return make_batch(config, objective, groups(), STEP)


@pytest.mark.parametrize("weight", [0.0, 0.1])
@pytest.mark.parametrize("aggregation", ["sequence", "token"])
def test_groups_of_equal_rewards_weigh_what_the_setting_says(aggregation, weight):
    """The others keep theirs: the normaliser is the whole batch, as if no group weighed less."""
    section = {"objective.aggregation": aggregation, "zero_variance_weight": weight}
    whole = {"sequence": LENGTHS.size, "token": LENGTHS.sum()}[aggregation]
    kept = batch_of(config_of(**section, **{"buffer.zero_variance": "keep"}))
    np.testing.assert_allclose(kept.weight, np.full(LENGTHS.size, 1 / whole), rtol=1e-6)
    weighed = batch_of(config_of(**section, **{"buffer.zero_variance": "weight"}))
    expected = np.repeat([1, weight, weight], REWARDS.shape[1]) / whole
    np.testing.assert_allclose(weighed.weight, expected, rtol=1e-6)
    np.testing.assert_array_equal(weighed.advantage, kept.advantage)
    assert np.any(weighed.advantage[:4] != 0)
    np.testing.assert_array_equal(
        weighed.advantage[4:], 0
    )  # so that the anchor is all they pull to


@pytest.mark.parametrize(
    ("denominator", "behavior"),
    [
        ("behavior", [-1.0, -1.0, -1.0]),
        ("learner", [-5.0, -6.0, -6.0]),  # of the weights of each rollout's version
        ("reference", [-1.0, -1.0, -1.0]),  # the drift remains that from who sampled
    ],
)
def test_the_denominator_says_whose_log_probs_are_recomputed(denominator, behavior):
    """A token has log-probability -v under the weights of version v, and -9 under version 0."""
    config = config_of(**{"objective.denominator": denominator})
    job = types.SimpleNamespace(
        config=config,
        needs_reference_logp=denominator == "reference",
        reference=9.0,
        load_version=float,
    )
    batch = batch_of(config)
    found = recompute(job, lambda version, batch: -version * jnp.asarray(batch.mask), batch, STEP)
    of_groups = lambda values: np.repeat(values, REWARDS.shape[1])[:, None] * batch.mask
    np.testing.assert_array_equal(found.behavior_logp, of_groups(behavior))
    if denominator == "reference":
        np.testing.assert_array_equal(found.reference_logp, -9.0 * batch.mask)
