"""The Blackwell winner's closed form: by hand, against random alternatives, with missing scores."""

import numpy as np
import pytest

from oapl_jax.preferences.winner import blackwell_winner


def random_preferences(seed, shape=(3, 6, 5)):
    return np.random.default_rng(seed).uniform(0, 1, shape)


def test_the_winner_of_a_game_by_hand():
    """beta = 1 / log 2, so that each exp is a power of one half."""
    preference = np.array([[[0.0, 1.0], [1.0, 1.0]], [[1.0, 0.0], [1.0, 0.0]]])
    winner = blackwell_winner(preference, beta=1 / np.log(2))
    first = -np.log2((2**-0.5 + 2**-1.0) / 2)  # the means over responses are 1/2 and 1
    second = -np.log2((2**-1.0 + 2**0.0) / 2)  # and here 1 and 0
    np.testing.assert_allclose(winner.value, [first, second], rtol=1e-12)
    assert winner.worst == 1
    np.testing.assert_allclose(winner.adversary, [1 / 3, 2 / 3], rtol=1e-12)
    np.testing.assert_allclose(winner.target, [1 / 3, 1 / 3], rtol=1e-12)
    alone = blackwell_winner(preference[:1], beta=1 / np.log(2))
    heavy = 2**-0.5 / (2**-0.5 + 2**-1.0)
    np.testing.assert_allclose(alone.target, [1 - heavy, 1], rtol=1e-12)


@pytest.mark.parametrize("seed", range(4))
def test_other_weights_and_adversaries_cost_the_minimizer_more(seed):
    """<w, P q> + beta KL(q || reference) over random w and q is above the closed form."""
    beta, rng, preference = 0.3, np.random.default_rng(seed), random_preferences(seed)
    worst, value, gibbs, _ = blackwell_winner(preference, beta=beta)
    mean = preference.mean(1)  # [J, M]
    cost = lambda w, q: w @ mean @ q + beta * np.sum(q * np.log(q * len(q)))
    np.testing.assert_allclose(cost(np.eye(3)[worst], gibbs), value[worst], rtol=1e-12)
    draws = ((np.full(3, 0.3), gibbs * 200) for _ in range(20_000))
    others = [cost(*map(rng.dirichlet, of_both)) for of_both in draws]
    assert value[worst] < min(others) < value[worst] + 0.02


@pytest.mark.parametrize("seed", range(4))
def test_the_target_is_the_gradient_of_the_value(seed):
    """d V / d pi(y_i), for a policy that weighs the sampled responses unequally."""
    beta, preference = 0.3, random_preferences(seed)
    winner = blackwell_winner(preference, beta=beta)

    def value(weights):
        won = np.einsum("i,jil->jl", weights, preference)
        return (-beta * np.log(np.exp(-won / beta).mean(-1))).min()

    even, step = np.full(6, 1 / 6), 1e-6
    slope = [(value(even + step * e) - value(even - step * e)) / (2 * step) for e in np.eye(6)]
    np.testing.assert_allclose(winner.target, slope, rtol=1e-6)


def test_without_entropy_the_best_comparator_and_with_all_of_it_the_reference():
    preference = random_preferences(5)
    mean = preference.mean(1)
    cold, hot = (blackwell_winner(preference, beta=beta) for beta in (1e-6, 1e9))
    np.testing.assert_allclose(cold.value, mean.min(-1), atol=1e-5)
    np.testing.assert_allclose(cold.adversary, np.eye(5)[mean[cold.worst].argmin()], atol=1e-6)
    np.testing.assert_allclose(hot.value, mean.mean(-1), atol=1e-8)
    np.testing.assert_allclose(hot.adversary, 0.2, atol=1e-8)
    np.testing.assert_allclose(hot.target, preference[hot.worst].mean(-1), atol=1e-8)


def test_missing_scores_are_excluded_from_every_mean():
    preference = random_preferences(6)
    preference[0] -= 0.4  # the worst
    full = blackwell_winner(preference, beta=0.3)
    assert full.worst == 0

    def without(*at):
        scores = preference.copy()
        scores[at] = np.nan
        return blackwell_winner(scores, beta=0.3)

    every = slice(None)
    # A comparator that was never scored is one comparator less, an objective one objective less.
    found = without(every, every, 2)
    expected = blackwell_winner(np.delete(preference, 2, 2), beta=0.3)
    np.testing.assert_allclose(found.value, expected.value, rtol=1e-12)
    np.testing.assert_allclose(found.target, expected.target, rtol=1e-12)
    assert found.adversary[2] == 0
    found = without(0)
    assert found.worst == 1 + blackwell_winner(preference[1:], beta=0.3).worst
    assert np.isnan(found.value[0])
    # One score less: the mean of that comparator, and the weights of that response.
    found = without(0, 4, 1)
    mean = preference[0].mean(0)
    mean[1] = np.delete(preference[0, :, 1], 4).mean()
    q = np.exp(-mean / 0.3) / np.exp(-mean / 0.3).sum()
    np.testing.assert_allclose(found.adversary, q, rtol=1e-12)
    kept = [0, 2, 3, 4]
    expected = q[kept] @ preference[0, 4, kept] / q[kept].sum()
    np.testing.assert_allclose(found.target[4], expected, rtol=1e-12)
    # A response without any score stands where the others do on average.
    found = without(every, 3)
    np.testing.assert_allclose(found.target[3], np.delete(found.target, 3).mean(), rtol=1e-12)
    nothing = blackwell_winner(np.full((2, 3, 4), np.nan), beta=0.3)
    assert nothing.worst == -1
    np.testing.assert_array_equal(nothing.target, 0.5)


def test_equal_responses_have_equal_targets():
    """Exactly, as groups of equal rewards are found by equality."""
    preference = np.repeat(random_preferences(7, (3, 1, 17)), 29, axis=1)
    target = blackwell_winner(preference, beta=0.25).target
    assert len(set(target.tolist())) == 1
