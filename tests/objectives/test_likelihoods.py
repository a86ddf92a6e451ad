"""Objectives without a ratio: maximum likelihood, AsymRE, OPMD in Trinity's form, and mixtures."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import LENGTHS, REWARD, bound, random_group, run

from oapl_jax.objectives import advantages

RIGHT = jnp.array([1.0, 0.0, 0.0, 1.0])


def test_sft_raises_every_token_of_a_right_answer_alike():
    logp, behavior, _, mask = random_group(1, [3, 5, 1], 5, spread=0.5)
    objective, right = bound("sft"), np.array([1.0, 0.0, 0.5], np.float32)
    advantage = objective.advantage(right)
    np.testing.assert_array_equal(advantage, right)  # no baseline
    losses, gradient, _ = run(objective, logp, behavior, advantage, mask)
    np.testing.assert_allclose(losses, -right * (logp * mask).sum(-1), rtol=1e-6)
    np.testing.assert_array_equal(gradient, -right[:, None] * mask)
    np.testing.assert_array_equal(losses, run(objective, logp, 2 * behavior, advantage, mask)[0])


def test_asymre_shifts_the_baseline_of_reinforce():
    centred = np.asarray(advantages.centred(REWARD))
    shifted = lambda shift: np.asarray(bound("asymre", delta_v=shift).advantage(REWARD))
    np.testing.assert_array_equal(shifted(0.0), centred)
    np.testing.assert_allclose(shifted(-0.1), centred + 0.1, rtol=1e-6)
    group = random_group(4, LENGTHS, 9, spread=0.3)
    found, expected = (run(bound(name), *group)[:2] for name in ("asymre", "sft"))
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_opmd_trinity_divides_reinforce_by_one_plus_tau():
    group = random_group(3, LENGTHS, 9, spread=0.3)
    reinforce = run(bound("sft"), *group)[:2]
    for tau in (1e-9, 1.0, 3.0):
        found = run(bound("opmd_trinity", tau=tau), *group)[:2]
        for mine, plain in zip(found, reinforce, strict=True):
            np.testing.assert_allclose(mine, plain / (1 + tau), rtol=1e-6)


@pytest.mark.parametrize("baseline", ["mean", "log_mean_exp"])
def test_opmd_trinitys_advantage_is_that_of_kimis_form(baseline):
    found, theirs = (
        bound(name, baseline=baseline, tau=0.3).advantage(REWARD)
        for name in ("opmd_trinity", "opmd_kimi")
    )
    np.testing.assert_array_equal(found, theirs)


def test_the_gradient_of_mixed_is_the_weighted_sum_of_its_terms():
    """0.3 of the likelihood of responses 0 and 3, and twice REINFORCE with A' = r - mean r."""
    logp, behavior, _, mask = random_group(0, [3, 5, 1, 2], 5, spread=0.5)
    objective = bound("mixed", estimator="dr_grpo", reinforcement_weight=2.0, likelihood_weight=0.3)
    advantage = objective.advantage(RIGHT)
    np.testing.assert_allclose(advantage, [1.3, -1.0, -1.0, 1.3], rtol=1e-6)
    _, gradient, _ = run(objective, logp, behavior, advantage, mask)
    likelihood = run(bound("sft"), logp, behavior, bound("sft").advantage(RIGHT), mask)[1]
    reinforce = run(bound("sft"), logp, behavior, RIGHT - 0.5, mask)[1]
    np.testing.assert_allclose(gradient, 0.3 * likelihood + 2 * reinforce, rtol=1e-6)


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_the_ends_of_mixed_are_grpo_and_maximum_likelihood(value):
    reward = jnp.array([value, 0.0, 1.0, 1.0])
    of = lambda name, **changes: bound(name, **changes).advantage(reward)
    np.testing.assert_array_equal(of("mixed", likelihood_weight=0.0), of("grpo"))
    only = of("mixed", likelihood_weight=1.0, reinforcement_weight=0.0)
    np.testing.assert_array_equal(only, of("sft"))


def test_mixed_imitates_verified_answers_of_groups_with_equal_rewards():
    of = lambda reward, **changes: bound("mixed", **changes).advantage(jnp.array(reward))
    np.testing.assert_allclose(of([1.0] * 4), [0.1] * 4)
    np.testing.assert_array_equal(of([0.0] * 4), [0.0] * 4)
    np.testing.assert_allclose(of([0.5] * 2, verified_reward=0.5), [0.1] * 2)


def test_a_correction_weighs_both_terms_of_mixed():
    logp, behavior, advantage, mask = random_group(1, [3, 5, 1, 2], 5, spread=0.5)
    plain = run(bound("mixed"), logp, behavior, advantage, mask)[1]
    corrected = run(bound("mixed", correction="token_truncate"), logp, behavior, advantage, mask)[1]
    weight = np.minimum(np.exp(logp.astype(np.float64) - behavior), 2.0)
    np.testing.assert_allclose(corrected, plain * weight, rtol=1e-5)
