"""The mixture of likelihood and reinforcement, and its two ends."""

import jax.numpy as jnp
import numpy as np
import pytest
from cases import bound, random_group, run

REWARD = jnp.array([1.0, 0.0, 0.0, 1.0])


def test_its_gradient_is_the_weighted_sum_of_its_terms():
    """0.3 of the likelihood of responses 0 and 3, and twice REINFORCE with A' = r - mean r."""
    logp, behavior, _, mask = random_group(0, [3, 5, 1, 2], 5, spread=0.5)
    objective = bound("mixed", estimator="dr_grpo", reinforcement_weight=2.0, likelihood_weight=0.3)
    advantage = objective.advantage(REWARD)
    np.testing.assert_allclose(advantage, [1.3, -1.0, -1.0, 1.3], rtol=1e-6)
    _, gradient, _ = run(objective, logp, behavior, advantage, mask)
    likelihood = run(bound("sft"), logp, behavior, bound("sft").advantage(REWARD), mask)[1]
    reinforce = run(bound("sft"), logp, behavior, REWARD - 0.5, mask)[1]
    np.testing.assert_allclose(gradient, 0.3 * likelihood + 2 * reinforce, rtol=1e-6)


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_its_ends_are_grpo_and_maximum_likelihood(value):
    reward = jnp.array([value, 0.0, 1.0, 1.0])
    of = lambda name, **changes: bound(name, **changes).advantage(reward)
    np.testing.assert_array_equal(of("mixed", likelihood_weight=0.0), of("grpo"))
    only = of("mixed", likelihood_weight=1.0, reinforcement_weight=0.0)
    np.testing.assert_array_equal(only, of("sft"))


def test_verified_answers_are_imitated_where_all_are_right_and_none_where_all_are_wrong():
    of = lambda reward, **changes: bound("mixed", **changes).advantage(jnp.array(reward))
    np.testing.assert_allclose(of([1.0] * 4), [0.1] * 4)
    np.testing.assert_array_equal(of([0.0] * 4), [0.0] * 4)
    np.testing.assert_allclose(of([0.5] * 2, verified_reward=0.5), [0.1] * 2)


def test_a_correction_weighs_both_terms():
    logp, behavior, advantage, mask = random_group(1, [3, 5, 1, 2], 5, spread=0.5)
    plain = run(bound("mixed"), logp, behavior, advantage, mask)[1]
    corrected = run(bound("mixed", correction="token_truncate"), logp, behavior, advantage, mask)[1]
    weight = np.minimum(np.exp(logp.astype(np.float64) - behavior), 2.0)
    np.testing.assert_allclose(corrected, plain * weight, rtol=1e-5)
