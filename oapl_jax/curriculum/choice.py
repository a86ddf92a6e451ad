"""Which candidates are sampled: a nucleus of the best weighed, and others uniformly."""

import numpy as np
from jaxtyping import Float, Int


def log_softmax(logits: Float[np.ndarray, " C"]) -> Float[np.ndarray, " C"]:
    """log softmax in float64."""
    shifted = np.asarray(logits, np.float64) - np.max(logits)
    return shifted - np.log(np.sum(np.exp(shifted)))


def nucleus_size(log_p: Float[np.ndarray, " C"], top_p: float) -> int:
    """How many of the most probable have together no more than `top_p`; at least one."""
    mass = np.cumsum(np.sort(np.exp(log_p))[::-1])
    return max(int(np.sum(mass <= top_p)), 1)


def choose(
    log_p: Float[np.ndarray, " C"], count: int, *, top_p: float, rng: np.random.Generator
) -> tuple[Int[np.ndarray, " count"], int]:
    """Draws `count` of C candidates without replacement (arXiv 2602.20532).

    With n the size of the nucleus, m = min(n, count) are drawn one after the other by p, each from
    what is left; the others uniformly from the rest. The more p is concentrated, the more of the
    places that it has no use for go to exploration.

    Args:
      log_p: normalised over the candidates.
      count: at most C.
      top_p: mass of the nucleus.
      rng: its next numbers are used up.

    Returns:
      Indices in ascending order, and m.
    """
    by_p = min(nucleus_size(log_p, top_p), count)
    # The largest m of log p + Gumbel noise are m draws without replacement (arXiv 1903.06059).
    order = np.argsort(-(log_p + rng.gumbel(size=len(log_p))))
    explored = rng.permutation(order[by_p:])[: count - by_p]
    return np.sort(np.concatenate([order[:by_p], explored])), by_p
