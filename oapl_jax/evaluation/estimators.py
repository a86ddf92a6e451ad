"""pass@k, maj@n, and their uncertainty: bootstrap intervals and a paired sign-flip test.

A problem is the unit throughout: n responses to one problem are not n problems.
"""

from collections import defaultdict
from collections.abc import Sequence

import numpy as np

BATCH = 1000  # resamples or sign vectors in memory
DIGITS = 9  # of a sum: rounding errors must not decide a test


def pass_curve(num_samples: int, num_correct: int) -> np.ndarray:
    """Estimates pass@1 .. pass@n: the probability that k of the n samples hold a right one.

    1 - C(n - c, k) / C(n, k), the unbiased estimator of arXiv 2107.03374, as the product over i < k
    of (n - c - i) / (n - i), so that no binomial overflows.

    Returns:
      float64[n].

    Raises:
      ValueError: unless 0 <= c <= n and n >= 1.
    """
    if not 0 <= num_correct <= num_samples or num_samples < 1:
        raise ValueError(f"pass@k needs 0 <= c <= n and n >= 1; n={num_samples}, c={num_correct}")
    left = np.arange(num_samples, 0, -1)  # samples before the i-th is drawn
    wrong = np.maximum(left - num_correct, 0)
    return 1.0 - np.cumprod(wrong / left)


def pass_at_k(num_samples: int, num_correct: int, k: int) -> float:
    """Estimates pass@k, one element of `pass_curve`.

    Raises:
      ValueError: unless 1 <= k <= n and 0 <= c <= n.
    """
    if not 1 <= k <= num_samples:
        raise ValueError(f"pass@{k} needs 1 <= k <= n; n={num_samples}, c={num_correct}")
    return float(pass_curve(num_samples, num_correct)[k - 1])


def maj_at_n(answers: Sequence[str], correct: Sequence[float]) -> float:
    """1 if the most frequent final answer is right, else 0; in a tie, the share of right ones.

    An answer is right if a response with it is: a response that was cut off behind its answer gets
    no reward.
    """
    votes: dict[str, list[float]] = defaultdict(list)
    for answer, right in zip(answers, correct, strict=True):
        votes[answer].append(right)
    most = max(map(len, votes.values()))
    return float(np.mean([max(v) for v in votes.values() if len(v) == most]))


def interval(values: np.ndarray, *, resamples: int, seed: int) -> tuple[float, float]:
    """Estimates the 95 % interval of the mean of float[P]; see `intervals`."""
    values = np.asarray(values, np.float64)[:, None]
    low, high = intervals(values, np.ones_like(values), resamples=resamples, seed=seed)
    return float(low[0]), float(high[0])


def intervals(
    values: np.ndarray, weights: np.ndarray, *, resamples: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Estimates 95 % intervals of sum(values) / sum(weights): percentile bootstrap over problems.

    Args:
      values: float[P, K], K statistics of P problems; each resample draws P problems with
        replacement, the same for all K.
      weights: float[P, 1] or [P, K], positive; ones for a mean.

    Returns:
      low and high, float64[K] each.
    """
    problems = len(values)
    if problems == 1:
        point = (values / weights)[0].astype(np.float64)
        return point, point

    def ratios(drawn: np.ndarray, axis: int) -> np.ndarray:
        """[R, P] problems -> [K, R]; a matrix product with their counts, far cheaper than sums."""
        rows = np.arange(len(drawn))[:, None]
        counts = np.bincount((drawn + problems * rows).ravel(), minlength=drawn.size)
        counts = counts.reshape(drawn.shape)
        return ((counts @ values) / (counts @ weights)).T

    from scipy import stats  # a fourth of a command's start, and only evaluations need it

    found = stats.bootstrap(
        (np.arange(problems),),
        ratios,
        n_resamples=resamples,
        batch=BATCH,
        vectorized=True,
        method="percentile",
        rng=np.random.default_rng(seed),
    )
    return found.confidence_interval.low, found.confidence_interval.high


def sign_flip_test(differences: np.ndarray, *, flips: int, seed: int) -> np.ndarray:
    """Computes two-sided p-values of a mean difference of 0, for problems that were tried twice.

    If neither side is better, a problem's difference is as likely as its negative. p is the share
    of sign vectors whose mean is at least as far from 0 as the observed one: of all of them if
    there are at most `flips`, otherwise of `flips` random ones and the observed one.

    `differences` are float[P, K], K statistics of P problems, and each sign goes with a problem;
    returns float64[K].
    """
    differences = differences[np.any(differences != 0, axis=1)]  # the sign of 0 changes nothing
    if not len(differences):
        return np.ones(differences.shape[1])

    def distance(signs: np.ndarray, axis: int) -> np.ndarray:
        return np.abs(np.round(signs @ differences, DIGITS))

    from scipy import stats

    found = stats.permutation_test(
        (np.ones(len(differences)),),
        distance,
        permutation_type="samples",
        alternative="greater",
        n_resamples=flips,
        batch=BATCH,
        vectorized=True,
        rng=np.random.default_rng(seed),
    )
    return np.asarray(found.pvalue)
