"""The maximum-entropy Blackwell winner of a group: worst objective, worst opponent, targets.

"Back to Blackwell", arXiv 2602.19041, seeks for each prompt the policy of

    max_pi min_w min_pi'  < w, P(pi > pi' | x) > + beta KL( pi' || pi_ref ),   w in the simplex.

With vector payoffs the order matters: there is no minimax theorem, and self-play does not converge
to it.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float


class Winner(NamedTuple):
    """Solution of the inner minimization for one group."""

    worst: int  # index of the objective with the least value; -1 without any score
    value: np.ndarray  # float64[J], v_j; nan without a score
    adversary: np.ndarray  # float64[M], probabilities of the comparators; 0 without a score
    target: np.ndarray  # float64[G], g_i


def blackwell_winner(preference: Float[np.ndarray, "J G M"], *, beta: float) -> Winner:
    """Solves the inner minimization on samples: y_i of the policy, y'_l of the reference.

        v_j = -beta log (1/M) sum_l exp( -P_jl / beta ),   P_jl = mean_i P_j(y_i > y'_l)
        j*  = argmin_j v_j
        q_l = exp( -P_j*l / beta ) / sum,   the Gibbs adversary
        g_i = sum_l q_l P_j*(y_i > y'_l)

    v is concave in the weights w of the objectives, so the worst weights are one objective: each
    prompt trains on its weakest one. As beta -> 0 the adversary is the best comparator, as
    beta -> inf it is the reference. g is the gradient of the value with respect to the policy.

    Missing scores (nan) are excluded from every mean, and q is normalized over a response's scored
    comparators. A response without any score gets the mean target of the others, or 1/2 if no
    response has one.

    Args:
      preference: P_j(y_i > y'_l | x), within 0 and 1, or nan.
      beta: weight of the adversary's entropy, above 0, in units of preference per nat.
    """
    preference = preference.astype(np.float64)
    value, adversaries = zip(*(_adversary(of, beta) for of in preference), strict=True)
    value = np.array(value)
    if np.isnan(value).all():
        nothing = np.zeros(preference.shape[2])
        return Winner(-1, value, nothing, np.full(preference.shape[1], 0.5))
    worst = int(np.nanargmin(value))
    adversary = adversaries[worst]
    scored = ~np.isnan(preference[worst])
    mass = scored @ adversary
    won = np.where(scored, preference[worst], 0.0) @ adversary
    target = np.divide(won, mass, out=np.full(len(won), np.nan), where=mass > 0)
    return Winner(worst, value, adversary, np.where(mass > 0, target, np.nanmean(target)))


def _adversary(preference: Float[np.ndarray, "G M"], beta: float) -> tuple[float, np.ndarray]:
    """v and q of one objective, over the comparators that have a score."""
    scored = ~np.isnan(preference)
    counts, there = scored.sum(axis=0), scored.any(axis=0)
    if not there.any():
        return np.nan, np.zeros(preference.shape[1])
    mean = np.where(scored, preference, 0.0).sum(axis=0) / np.maximum(counts, 1)
    least = mean[there].min()
    above = np.where(there, (mean - least) / beta, np.inf)
    # expm1 and log1p keep v exact for equal preferences and for a large beta.
    value = least - beta * np.log1p(np.expm1(-above[there]).mean())
    weight = np.exp(-above)
    return float(value), weight / weight.sum()
