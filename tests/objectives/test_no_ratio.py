"""Objectives without an importance ratio: OPMD, TBA and PROSPER beside OAPL, and likelihoods."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import LENGTHS, REWARD, bound, log_ratios, random_group, run

from oapl_jax.objectives import advantages, opmd_kimi


@pytest.mark.parametrize("tau", [0.01, 0.2, 3.0])
def test_opmd_is_the_regression_over_two_tau_up_to_a_constant(tau):
    group = random_group(2, LENGTHS, 9, spread=0.3)
    losses, gradient, metrics = run(bound("opmd_kimi", tau=tau), *group)
    regression, slopes, theirs = run(bound("oapl", beta2=tau), *group)
    constant = group[2] ** 2 / (2 * tau)
    np.testing.assert_allclose(losses, regression / (2 * tau) - constant, rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(gradient, slopes / (2 * tau), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(metrics["residual"], theirs["residual"], rtol=1e-6)


@pytest.mark.parametrize("tau", [0.3, 1.0])
def test_with_the_soft_baseline_opmds_gradient_is_that_of_oapl(tau):
    """From rewards on; OAPL with beta1 = beta2."""
    ours = bound("opmd_kimi", baseline="log_mean_exp", tau=tau)
    theirs = bound("oapl", beta1=tau, beta2=tau)
    logp, behavior, _, mask = random_group(4, LENGTHS, 9, spread=0.3)
    slopes = [run(o, logp, behavior, o.advantage(REWARD), mask)[1] for o in (ours, theirs)]
    np.testing.assert_allclose(slopes[0], slopes[1] / (2 * tau), rtol=1e-4, atol=1e-6)


def test_opmd_without_tau_is_plain_reinforce():
    group = random_group(3, LENGTHS, 9, spread=0.3)
    without = bound("opmd_kimi")._replace(loss=lambda *arrays: opmd_kimi.loss(*arrays, tau=0.0))
    np.testing.assert_array_equal(run(without, *group)[1], run(bound("sft"), *group)[1])


def test_baselines_of_opmd_by_hand():
    mean = bound("opmd_kimi", baseline="mean").advantage(REWARD)
    np.testing.assert_allclose(mean, [0.625, -0.375, 0.125, -0.375], atol=1e-7)
    soft = bound("opmd_kimi", baseline="log_mean_exp", tau=0.5).advantage(REWARD)
    expected = np.asarray(REWARD) - 0.5 * np.log(np.mean(np.exp(np.asarray(REWARD) / 0.5)))
    np.testing.assert_allclose(soft, expected, atol=1e-6)


# A bandit of four responses of two tokens: reference, the policy that samples, and the rewards.
REFERENCE, SAMPLING = np.array([0.4, 0.3, 0.2, 0.1]), np.array([0.1, 0.2, 0.3, 0.4])
REWARDS = np.array([0.0, 1.0, 0.25, -0.5])
BETA = 0.7
OPTIMUM = REFERENCE * np.exp(REWARDS / BETA)
OPTIMUM /= OPTIMUM.sum()
TBA = dict(beta=BETA, group_size=4)
ONES = np.ones((4, 2), np.float32)


def tokens(policy):
    """Log-probs of the two tokens of each response: a third of the nats, and the rest."""
    logp = np.log(np.asarray(policy, np.float64))
    return np.stack([logp / 3, logp * 2 / 3], axis=-1).astype(np.float32)


@pytest.mark.parametrize("chosen", [[0, 1, 2, 3], [1, 1, 3, 2], [0, 3, 3, 3]])
def test_tba_is_solved_by_the_tilted_reference_for_any_group(chosen):
    """Neither log Z nor the loss needs the policy that sampled."""
    objective, anchor = bound("tba", **TBA), tokens(REFERENCE)[chosen]
    advantage = objective.advantage(jnp.asarray(REWARDS[chosen], jnp.float32))
    of = lambda policy: run(objective, tokens(policy)[chosen], anchor, advantage, ONES)
    losses, gradient, _ = of(OPTIMUM)
    np.testing.assert_allclose(losses, 0, atol=1e-12)
    np.testing.assert_allclose(gradient, 0, atol=1e-6)
    assert of(SAMPLING)[0].max() > 0.01


def test_tbas_gradient_is_that_of_the_groups_variance():
    """VarGrad: the stop-gradient at log Z changes nothing where a group's weights are equal."""
    logp, behavior, _, mask = random_group(5, [6, 1, 4, 9, 3, 7, 2, 5], 9, spread=0.3)
    reward = np.random.default_rng(5).uniform(0, 1, (2, 4)).astype(np.float32)
    objective = bound("tba", **TBA)
    advantage = jnp.concatenate([objective.advantage(jnp.asarray(r)) for r in reward])
    losses, gradient, _ = run(objective, logp, behavior, advantage, mask)

    delta = log_ratios(logp, behavior, mask).reshape(2, 4)
    balance = BETA * delta - reward
    np.testing.assert_allclose(losses.reshape(2, 4).mean(-1), balance.var(-1), rtol=1e-4)
    slope = 2 * BETA * (balance - balance.mean(-1, keepdims=True))
    np.testing.assert_allclose(gradient, slope.reshape(-1, 1) * mask, rtol=1e-3, atol=1e-5)
    # With a prompt's log-ratios shifted alike nothing changes, unlike in the regression of OPMD.
    shifted = logp + np.float32(0.5) / mask.sum(-1, keepdims=True)
    found, _, _ = run(objective, shifted, behavior, advantage, mask)
    np.testing.assert_allclose(found, losses, rtol=1e-3, atol=1e-5)
    # A part of a group is refused.
    with pytest.raises(TypeError, match="reshape"):
        run(bound("tba", **TBA), *random_group(6, [2] * 6, 3, spread=0.1))


STRENGTH = 0.4
prosper = lambda **changes: bound("prosper", anchor=STRENGTH, **changes)


def pairs(logp, behavior, advantage, mask, *, keep):
    """The loss of each pair of a group of four, in float64, those with the largest gaps first."""
    delta = log_ratios(logp, behavior, mask)
    all_pairs = itertools.combinations(range(4), 2)
    ordered = sorted(all_pairs, key=lambda p: -abs(advantage[p[0]] - advantage[p[1]]))
    return {
        (i, k): (STRENGTH * (delta[i] - delta[k]) - (advantage[i] - advantage[k])) ** 2
        for i, k in ordered[:keep]
    }


@pytest.mark.parametrize(("pair_share", "keep"), [(1.0, 6), (0.5, 3), (0.15, 1), (0.34, 3)])
def test_prospers_mean_loss_is_the_mean_over_the_pairs_that_differ_most(pair_share, keep):
    group = random_group(0, [3, 7, 1, 5], 7, spread=0.3)
    objective = prosper(pair_share=pair_share)
    losses, gradient, _ = run(objective, *group)
    expected = pairs(*group, keep=keep)
    np.testing.assert_allclose(losses.mean(), np.mean(list(expected.values())), rtol=1e-4)
    for i in range(4):
        mine = sum(value for pair, value in expected.items() if i in pair)
        np.testing.assert_allclose(losses[i], 4 / (2 * keep) * mine, rtol=1e-4)
        assert np.any(gradient[i] != 0) == any(i in pair for pair in expected)


def test_prospers_groups_do_not_mix_and_each_has_its_own_pairs():
    group = random_group(1, [3, 7, 1, 5, 2, 2, 6, 4], 7, spread=0.3)
    objective = prosper(pair_share=0.5)
    together = run(objective, *group)
    for half in (slice(0, 4), slice(4, 8)):
        alone = run(objective, *(x[half] for x in group))
        for found, expected in zip(together[:2], alone[:2], strict=True):
            np.testing.assert_allclose(found[half], expected, rtol=1e-5)


@pytest.mark.parametrize("pair_share", [1.0, 0.3])
def test_prosper_is_solved_by_the_step_of_mirror_ascent_on_any_samples(pair_share):
    """log pi / pi_t = g / beta2 less any constant of the prompt."""
    rng = np.random.default_rng(2)
    old, g = rng.dirichlet(np.ones(6)), rng.uniform(0, 1, 6)
    new = old * np.exp(g / STRENGTH)
    new /= new.sum()
    chosen = [5, 0, 0, 3]
    column = lambda policy: np.log(policy[chosen]).astype(np.float32)[:, None]
    objective = prosper(pair_share=pair_share)
    advantage = objective.advantage(jnp.asarray(g[chosen], jnp.float32))
    ones = np.ones((4, 1), np.float32)
    losses, gradient, metrics = run(objective, column(new), column(old), advantage, ones)
    np.testing.assert_allclose(losses, 0, atol=1e-10)
    np.testing.assert_allclose(gradient, 0, atol=1e-5)
    np.testing.assert_allclose(metrics["residual"], 0, atol=1e-5)
    losses, _, _ = run(objective, column(old), column(old), advantage, ones)
    assert losses.max() > 0.01


def test_with_every_pair_prospers_gradient_is_that_of_tba():
    """The mean over pairs is twice the group's variance, with G - 1."""
    group = random_group(3, [6, 1, 4, 9], 9, spread=0.3)
    group[2][:] -= group[2].mean()
    mine = run(prosper(), *group)[1]
    tba = run(bound("tba", anchor=STRENGTH), *group)[1]
    np.testing.assert_allclose(mine, tba * 2 * 4 / 3, rtol=1e-4)
    fewer = run(prosper(pair_share=0.5), *group)[1]
    assert not np.allclose(fewer, mine, rtol=0.1)


def test_equal_targets_train_every_pair_and_pull_to_the_policy_that_sampled():
    logp, behavior, _, mask = random_group(4, [2, 3, 4, 5], 5, spread=0.3)
    group = logp, behavior, np.zeros(4), mask
    few, expected = run(prosper(pair_share=0.15), *group), pairs(*group, keep=6)
    np.testing.assert_array_equal(few[1], run(prosper(), *group)[1])
    np.testing.assert_allclose(few[0].mean(), np.mean(list(expected.values())), rtol=1e-4)


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


def test_the_gradient_of_mixed_is_the_weighted_sum_of_its_terms():
    """0.3 of the likelihood of responses 0 and 3, and twice REINFORCE with A' = r - mean r."""
    logp, behavior, _, mask = random_group(0, [3, 5, 1, 2], 5, spread=0.5)
    mixed = bound("mixed", estimator="dr_grpo", reinforcement_weight=2.0, likelihood_weight=0.3)
    sft, advantage = bound("sft"), mixed.advantage(RIGHT)
    np.testing.assert_allclose(advantage, [1.3, -1.0, -1.0, 1.3], rtol=1e-6)
    slopes = lambda objective, advantage: run(objective, logp, behavior, advantage, mask)[1]
    expected = 0.3 * slopes(sft, sft.advantage(RIGHT)) + 2 * slopes(sft, RIGHT - 0.5)
    np.testing.assert_allclose(slopes(mixed, advantage), expected, rtol=1e-6)


def test_the_ends_of_mixed_are_grpo_and_maximum_likelihood_and_verified_answers_are_imitated():
    of = lambda name, reward, **changes: bound(name, **changes).advantage(jnp.array(reward))
    for value in (0.0, 1.0):
        reward = [value, 0.0, 1.0, 1.0]
        grpo = of("mixed", reward, likelihood_weight=0.0)
        np.testing.assert_array_equal(grpo, of("grpo", reward))
        sft = of("mixed", reward, likelihood_weight=1.0, reinforcement_weight=0.0)
        np.testing.assert_array_equal(sft, of("sft", reward))
    # In groups of equal rewards too.
    np.testing.assert_allclose(of("mixed", [1.0] * 4), [0.1] * 4)
    np.testing.assert_array_equal(of("mixed", [0.0] * 4), [0.0] * 4)
    np.testing.assert_allclose(of("mixed", [0.5] * 2, verified_reward=0.5), [0.1] * 2)


def test_a_correction_weighs_both_terms_of_mixed():
    logp, behavior, *_ = group = random_group(1, [3, 5, 1, 2], 5, spread=0.5)
    plain = run(bound("mixed"), *group)[1]
    corrected = run(bound("mixed", correction="token_truncate"), *group)[1]
    weight = np.minimum(np.exp(logp.astype(np.float64) - behavior), 2.0)
    np.testing.assert_allclose(corrected, plain * weight, rtol=1e-5)
