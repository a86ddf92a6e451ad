"""pass@k, maj@n, and how sure of them one is: intervals by bootstrap, paired tests by sign flips.

A problem is the unit throughout: n samples of one problem are no n problems.
"""

from collections import defaultdict
from collections.abc import Sequence

import numpy as np

AT_ONCE = 1000  # resamples or sign vectors in memory
TIE = 1e-9  # sums that differ by less are equal: rounding must not decide a test


def pass_curve(num_samples: int, num_correct: int) -> np.ndarray:
    """float64[n], pass@1 .. pass@n: the chance that k of the n samples hold a right one.

    1 - C(n - c, k) / C(n, k), the unbiased estimator of arXiv 2107.03374, as the product over i < k
    of (n - c - i) / (n - i), so that no binomial overflows.

    Raises:
      ValueError: unless 0 <= c <= n and n >= 1.
    """
    if not 0 <= num_correct <= num_samples or num_samples < 1:
        raise ValueError(f"pass@k needs 0 <= c <= n and n >= 1; n={num_samples}, c={num_correct}")
    left = np.arange(num_samples, 0, -1)  # samples before the i-th is drawn
    wrong = np.maximum(left - num_correct, 0)
    return 1.0 - np.cumprod(wrong / left)


def pass_at_k(num_samples: int, num_correct: int, k: int) -> float:
    """One element of `pass_curve`.

    Raises:
      ValueError: unless 1 <= k <= n and 0 <= c <= n.
    """
    if not 1 <= k <= num_samples or not 0 <= num_correct <= num_samples:
        raise ValueError(
            f"pass@{k} needs 1 <= k <= n and 0 <= c <= n; n={num_samples}, c={num_correct}"
        )
    return float(pass_curve(num_samples, num_correct)[k - 1])


def maj_at_n(answers: Sequence[str], correct: Sequence[float]) -> float:
    """Whether the most frequent final answer is right; in a tie, the share of those that are.

    An answer is right if a response with it is: one that was cut off behind it gets no reward.
    """
    votes: dict[str, list[float]] = defaultdict(list)
    for answer, right in zip(answers, correct, strict=True):
        votes[answer].append(right)
    most = max(map(len, votes.values()))
    return float(np.mean([max(v) for v in votes.values() if len(v) == most]))


def interval(values: np.ndarray, *, resamples: int, seed: int) -> tuple[float, float]:
    """95 % interval of the mean of float[P] by bootstrap over problems (percentiles)."""
    values = np.asarray(values, np.float64)[:, None]
    low, high = intervals(values, np.ones_like(values), resamples=resamples, seed=seed)
    return float(low[0]), float(high[0])


def intervals(
    values: np.ndarray, weights: np.ndarray, *, resamples: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """95 % intervals of sum(values) / sum(weights) by bootstrap over problems (percentiles).

    Args:
      values: float[P, K], K statistics of P problems; each resample draws P problems with
        replacement, the same for all K.
      weights: float[P, 1] or [P, K], positive; ones for a mean.
      resamples: how many.
      seed: of the draws.

    Returns:
      low and high, float64[K] each.
    """
    rng = np.random.default_rng(seed)
    problems = len(values)
    found = []
    for done in range(0, resamples, AT_ONCE):
        rows = min(AT_ONCE, resamples - done)
        drawn = rng.integers(0, problems, (rows, problems)) + problems * np.arange(rows)[:, None]
        times = np.bincount(drawn.ravel(), minlength=rows * problems).reshape(rows, problems)
        found.append((times @ values) / (times @ weights))
    low, high = np.percentile(np.concatenate(found), [2.5, 97.5], axis=0)
    return low, high


def sign_flip_test(differences: np.ndarray, *, flips: int, seed: int) -> np.ndarray:
    """Two-sided p-values of a mean difference of 0, for problems that were tried twice.

    If neither side is better, a problem's difference is as likely as its negative. p is the share
    of sign vectors whose mean is at least as far from 0 as the observed one: of all of them if
    there are at most `flips`, else of so many drawn ones and the observed one.

    Args:
      differences: float[P, K], K statistics of P problems; each sign goes with a problem.
      flips: as above.
      seed: of the drawn signs.

    Returns:
      float64[K].
    """
    differences = differences[np.any(differences != 0, axis=1)]  # the sign of 0 changes nothing
    problems = len(differences)
    observed = np.abs(differences.sum(axis=0)) - TIE
    every = problems < 63 and 2**problems <= flips
    total = 2**problems if every else flips
    rng = np.random.default_rng(seed)
    as_far = np.zeros(differences.shape[1], np.int64)
    for done in range(0, total, AT_ONCE):
        rows = min(AT_ONCE, total - done)
        if every:
            bits = (done + np.arange(rows))[:, None] >> np.arange(problems) & 1
        else:
            bits = rng.integers(0, 2, (rows, problems))
        as_far += np.sum(np.abs((2.0 * bits - 1.0) @ differences) >= observed, axis=0)
    return as_far / total if every else (as_far + 1) / (total + 1)
