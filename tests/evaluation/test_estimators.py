"""pass@k against counting, the vote, intervals against theory, the paired test against counting."""

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest

from oapl_jax.evaluation import pass_at_k
from oapl_jax.evaluation.estimators import interval, intervals, maj_at_n, pass_curve, sign_flip_test


@pytest.mark.parametrize("n", range(1, 13))
def test_pass_at_k_is_the_share_of_subsets_that_hold_a_right_one(n):
    for c, k in itertools.product(range(n + 1), range(1, n + 1)):
        exact = 1 - Fraction(math.comb(n - c, k), math.comb(n, k))
        assert pass_at_k(n, c, k) == pytest.approx(float(exact), abs=1e-14)
        if n <= 9:
            subsets = list(itertools.combinations([True] * c + [False] * (n - c), k))
            assert exact == Fraction(sum(map(any, subsets)), len(subsets))


def test_pass_at_k_of_256_samples_is_that_of_the_definition():
    """Every c and k, in exact integers."""
    n = 256
    curves = np.array([pass_curve(n, c) for c in range(n + 1)])
    assert curves.shape == (n + 1, n)
    for c, k in itertools.product(range(n + 1), range(1, n + 1)):
        every = math.comb(n, k)
        exact = (every - math.comb(n - c, k)) / every  # integers divide with one rounding
        assert abs(curves[c, k - 1] - exact) <= 1e-13 * exact, (c, k)
    assert (np.diff(curves, axis=0) >= 0).all()  # more right ones, or more tries,
    assert (np.diff(curves, axis=1) >= 0).all()  # do no harm
    assert (curves[0] == 0).all()
    assert (curves[-1] == 1).all()


@pytest.mark.parametrize(("n", "c", "k"), [(4, 2, 0), (4, 2, 5), (4, 5, 1), (4, -1, 1), (0, 0, 1)])
def test_pass_at_k_refuses_impossible_counts(n, c, k):
    with pytest.raises(ValueError, match=rf"n={n}, c={c}"):
        pass_at_k(n, c, k)


@pytest.mark.parametrize(
    ("answers", "correct", "expected"),
    [
        ("aab", [1, 1, 0], 1),
        ("aab", [1, 0, 0], 1),  # a right one that was cut off gets no reward
        ("abb", [1, 0, 0], 0),
        ("a", [1], 1),
        ("aabb", [1, 1, 0, 0], 1 / 2),
        ("abc", [0, 1, 0], 1 / 3),
        ("aabbc", [0, 0, 1, 1, 0], 1 / 2),
        ("abcdd", [1, 1, 1, 0, 0], 0),
    ],
)
def test_the_most_frequent_answer_counts_and_ties_share(answers, correct, expected):
    for order in itertools.islice(itertools.permutations(range(len(answers))), 24):
        shuffled = [answers[i] for i in order], [float(correct[i]) for i in order]
        assert maj_at_n(*shuffled) == pytest.approx(expected)
    with pytest.raises(ValueError, match="zip"):
        maj_at_n(answers, correct[1:])  # a vote needs a verdict for each answer


def test_the_interval_covers_the_mean_and_has_the_width_of_theory():
    values = (np.arange(400) % 4 == 0).astype(float)
    low, high = interval(values, resamples=4000, seed=0)
    assert low < 0.25 < high
    assert high - low == pytest.approx(2 * 1.96 * np.sqrt(0.25 * 0.75 / 400), rel=0.1)
    assert interval(values, resamples=4000, seed=0) == (low, high)
    assert interval(values, resamples=4000, seed=1) != (low, high)
    assert interval(np.ones(5), resamples=100, seed=0) == (1, 1)


def test_intervals_cover_the_truth_as_often_as_they_say():
    rng = np.random.default_rng(0)
    covered = 0
    for seed in range(400):
        values = (rng.random(200) < 0.4).astype(float)
        low, high = interval(values, resamples=400, seed=seed)
        covered += low <= 0.4 <= high
    assert 0.92 < covered / 400 < 0.98


def test_intervals_are_those_of_each_column_and_of_ratios():
    rng = np.random.default_rng(0)
    values, ones = rng.random((7, 3)), np.ones((7, 1))
    low, high = intervals(values, ones, resamples=2500, seed=5)
    for column in range(3):
        alone = interval(values[:, column], resamples=2500, seed=5)
        assert alone == pytest.approx((low[column], high[column]), abs=1e-12)
    # The definition: draw problems, average, take percentiles. Same draws, another arithmetic.
    # Resamples are drawn in portions of 1000, and none is missing.
    weights = rng.random((7, 1)) + 0.5
    low, high = intervals(values, weights, resamples=2007, seed=5)
    draws = np.random.default_rng(5)
    drawn = np.concatenate([draws.integers(0, 7, (rows, 7)) for rows in (1000, 1000, 7)])
    ratios = values[drawn].sum(axis=1) / weights[drawn].sum(axis=1)
    np.testing.assert_allclose(low, np.percentile(ratios, 2.5, axis=0), rtol=1e-12)
    np.testing.assert_allclose(high, np.percentile(ratios, 97.5, axis=0), rtol=1e-12)


@pytest.mark.parametrize("problems", [1, 2, 5, 11])
def test_p_is_the_share_of_all_sign_vectors_that_are_as_extreme(problems):
    rng = np.random.default_rng(problems)
    differences = rng.integers(-3, 4, (problems, 2)) / 4
    found = sign_flip_test(differences, flips=2**problems, seed=0)
    for column in range(2):
        d = [Fraction(x) for x in differences[:, column].tolist()]
        sums = [abs(sum(signed)) for signed in itertools.product(*((x, -x) for x in d))]
        expected = Fraction(sum(s >= abs(sum(d)) for s in sums), len(sums))
        assert found[column] == pytest.approx(float(expected), abs=1e-12)


def test_p_worked_out_by_hand():
    """Five gains: only all-plus and all-minus are as far out, 2 of 32. A problem without a
    difference has no say, however many there are."""
    gains = np.ones((5, 1)) * [0.25]
    assert sign_flip_test(gains, flips=1000, seed=0) == [2 / 32]
    padded = np.concatenate([gains, np.zeros((100, 1))])
    assert sign_flip_test(padded, flips=1000, seed=0) == [2 / 32]
    assert sign_flip_test(np.zeros((4, 2)), flips=1000, seed=0).tolist() == [1, 1]
    assert sign_flip_test(np.array([[1.0], [-1.0]]), flips=1000, seed=0) == [1]


def test_drawn_signs_come_near_to_all_of_them():
    rng = np.random.default_rng(1)
    differences = rng.normal(0.2, 1, (14, 1))
    every = sign_flip_test(differences, flips=2**14, seed=0)[0]
    drawn = sign_flip_test(differences, flips=2**14 - 1, seed=0)[0]
    assert 0.02 < every < 0.5
    assert drawn != every
    assert drawn == pytest.approx(every, abs=4 * (every * (1 - every) / 2**14) ** 0.5)
    many = sign_flip_test(np.ones((40, 1)), flips=2000, seed=0)
    assert many == [1 / 2001]  # never 0: the observed signs are one of the possible


def test_p_is_below_a_level_as_often_as_the_level_says():
    rng = np.random.default_rng(2)
    p = [sign_flip_test(rng.normal(0, 1, (12, 1)), flips=500, seed=s)[0] for s in range(1000)]
    for level in (0.05, 0.2, 0.5):
        assert np.mean(np.array(p) <= level) == pytest.approx(level, abs=0.04)
