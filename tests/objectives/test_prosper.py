"""PROSPER's regression: by hand, its pairs, its minimum, and TBA's as a limit."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest
from cases import bound, log_ratios, random_group, run

BETA2 = 0.4


def pairs(logp, behavior, advantage, mask, *, keep):
    """The loss of each pair of a group of four, in float64, those with the largest gaps first."""
    delta = log_ratios(logp, behavior, mask)
    all_pairs = itertools.combinations(range(4), 2)
    ordered = sorted(all_pairs, key=lambda p: -abs(advantage[p[0]] - advantage[p[1]]))
    return {
        (i, k): (BETA2 * (delta[i] - delta[k]) - (advantage[i] - advantage[k])) ** 2
        for i, k in ordered[:keep]
    }


@pytest.mark.parametrize(("pair_share", "keep"), [(1.0, 6), (0.5, 3), (0.15, 1), (0.34, 3)])
def test_the_mean_loss_is_the_mean_over_the_pairs_that_differ_most(pair_share, keep):
    group = random_group(0, [3, 7, 1, 5], 7, spread=0.3)
    objective = bound("prosper", anchor=BETA2, pair_share=pair_share, group_size=4)
    losses, gradient, _ = run(objective, *group)
    expected = pairs(*group, keep=keep)
    np.testing.assert_allclose(losses.mean(), np.mean(list(expected.values())), rtol=1e-4)
    for i in range(4):
        mine = sum(value for pair, value in expected.items() if i in pair)
        np.testing.assert_allclose(losses[i], 4 / (2 * keep) * mine, rtol=1e-4)
        assert np.any(gradient[i] != 0) == any(i in pair for pair in expected)


def test_groups_do_not_mix_and_each_has_its_own_pairs():
    group = random_group(1, [3, 7, 1, 5, 2, 2, 6, 4], 7, spread=0.3)
    objective = bound("prosper", anchor=BETA2, pair_share=0.5, group_size=4)
    together = run(objective, *group)
    for half in (slice(0, 4), slice(4, 8)):
        alone = run(objective, *(x[half] for x in group))
        for found, expected in zip(together[:2], alone[:2], strict=True):
            np.testing.assert_allclose(found[half], expected, rtol=1e-5)


@pytest.mark.parametrize("pair_share", [1.0, 0.3])
def test_it_is_solved_by_the_step_of_mirror_ascent_on_any_samples(pair_share):
    """log pi / pi_t = g / beta2 less any constant of the prompt."""
    rng = np.random.default_rng(2)
    old, g = rng.dirichlet(np.ones(6)), rng.uniform(0, 1, 6)
    new = old * np.exp(g / BETA2)
    new /= new.sum()
    chosen = [5, 0, 0, 3]
    column = lambda policy: np.log(policy[chosen]).astype(np.float32)[:, None]
    objective = bound("prosper", anchor=BETA2, pair_share=pair_share, group_size=4)
    advantage = objective.advantage(jnp.asarray(g[chosen], jnp.float32))
    ones = np.ones((4, 1), np.float32)
    losses, gradient, metrics = run(objective, column(new), column(old), advantage, ones)
    np.testing.assert_allclose(losses, 0, atol=1e-10)
    np.testing.assert_allclose(gradient, 0, atol=1e-5)
    np.testing.assert_allclose(metrics["residual"], 0, atol=1e-5)
    losses, _, _ = run(objective, column(old), column(old), advantage, ones)
    assert losses.max() > 0.01


def test_with_every_pair_its_gradient_is_that_of_tba():
    """The mean over pairs is twice the group's variance, with G - 1."""
    group = random_group(3, [6, 1, 4, 9], 9, spread=0.3)
    group[2][:] -= group[2].mean()
    mine = run(bound("prosper", anchor=BETA2), *group)[1]
    tba = run(bound("tba", anchor=BETA2), *group)[1]
    np.testing.assert_allclose(mine, tba * 2 * 4 / 3, rtol=1e-4)
    fewer = run(bound("prosper", anchor=BETA2, pair_share=0.5), *group)[1]
    assert not np.allclose(fewer, mine, rtol=0.1)


def test_equal_targets_train_every_pair_and_pull_to_the_policy_that_sampled():
    logp, behavior, _, mask = random_group(4, [2, 3, 4, 5], 5, spread=0.3)
    few = run(bound("prosper", anchor=BETA2, pair_share=0.15), logp, behavior, np.zeros(4), mask)
    all_ = run(bound("prosper", anchor=BETA2), logp, behavior, np.zeros(4), mask)
    np.testing.assert_array_equal(few[1], all_[1])
    expected = pairs(logp, behavior, np.zeros(4), mask, keep=6)
    np.testing.assert_allclose(few[0].mean(), np.mean(list(expected.values())), rtol=1e-4)
