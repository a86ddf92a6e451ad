"""The maximum-entropy Blackwell winner: what each response of a group is worth against the worst
objective and the worst opponent, in closed form.

"Back to Blackwell", arXiv 2602.19041, looks for the policy that reaches

    max_pi min_w min_pi'  < w, P(pi > pi' | x) > + beta KL( pi' || pi_ref ),   w in the simplex,

prompt by prompt. With vector payoffs this order of the three matters: there is no minimax theorem,
and self-play does not reach it.
"""

import dataclasses

import numpy as np
from jaxtyping import Float


@dataclasses.dataclass(frozen=True)
class Winner:
    """The inner minimisation, solved for one group.

    Attributes:
      worst: index of the objective that the group is weakest on; -1 if nothing was scored.
      value: float64[J], v_j; nan where nothing was scored.
      adversary: float64[M], probabilities of the comparators; 0 where nothing was scored.
      target: float64[G], g_i.
    """

    worst: int
    value: np.ndarray
    adversary: np.ndarray
    target: np.ndarray


def blackwell_winner(preference: Float[np.ndarray, "J G M"], *, beta: float) -> Winner:
    """Solves the inner problem on samples: y_i of the policy, y'_l of the reference.

        v_j = -beta log (1/M) sum_l exp( -P_jl / beta ),   P_jl = mean_i P_j(y_i > y'_l)
        j*  = argmin_j v_j
        q_l = exp( -P_j*l / beta ) / sum,   the Gibbs adversary
        g_i = sum_l q_l P_j*(y_i > y'_l)

    v is concave in the weights w of the objectives, so that the worst weights are one objective:
    each prompt trains on the one that it is weakest on. As beta -> 0 the adversary is the best
    comparator, as beta -> inf it is the reference. g is the gradient of the value by the policy.

    A score that is missing (nan) is left out of every mean, q being normalised over what a response
    was compared with. A response without any score gets the mean of the others, one without others
    1/2: neither says anything of it.

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
