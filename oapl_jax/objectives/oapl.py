"""OAPL: regress the policy's log-ratio to the lagged policy onto the optimal advantage.

"LLMs can learn to reason via off-policy RL", arXiv 2602.19362. The KL-regularised problem
    max_pi E_pi[r] - beta KL(pi || pi_lag)
has the solution beta log(pi*/pi_lag) = r - V* for every response, under any sampling policy. So
there is no importance ratio and no clipping; the anchor is the policy that generated the data.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from oapl_jax.objectives.annotations import Losses, PerResponse, PerToken, Positive
from oapl_jax.objectives.ratios import log_ratio


def advantage(reward: Float[Array, " G"], *, beta1: Positive) -> Float[Array, " G"]:
    """A_i = r_i - V^,  V^ = beta1 log( (1/G) sum_j exp(r_j / beta1) )   (Eq. 2).

    V^ goes to the maximum as beta1 -> 0, to the mean as beta1 -> inf; mean A is never above 0.

    Args:
      reward: of the whole group, never of a filtered or split part of it.
      beta1: temperature of the value estimate, in units of reward.
    """
    below_best = reward.astype(jnp.float32)
    below_best = below_best - jnp.max(below_best)
    # expm1 and log1p keep V^ exact for equal rewards, and for a large beta1: exp(r / beta1) ~ 1.
    v_star = beta1 * jnp.log1p(jnp.mean(jnp.expm1(below_best / beta1)))  # less the best reward
    return jax.lax.stop_gradient(below_best - v_star)


def loss(
    logp: PerToken,
    behavior_logp: PerToken,
    advantage: PerResponse,
    mask: PerToken,
    *,
    beta2: Positive,
) -> Losses:
    """L_i = ( beta2 [log pi(y_i|x) - log pi_lag(y_i|x)] - A_i )^2   (Eq. 3).

    The log-probabilities of a response are sums over its tokens, stop token included, without
    length normalisation. The loss is zero at the fixed point log(pi/pi_lag) = A / beta2.

    Args:
      logp: of each response token under the policy, at the sampling temperature; carries the
        gradient.
      behavior_logp: the same under the lagged policy, at the same temperature.
      advantage: from the whole group.
      mask: 1 on response tokens, 0 elsewhere.
      beta2: strength of the anchor, in units of reward per nat.

    Returns:
      The loss of each sequence, and per-sequence `log_ratio`, `residual` and `target_log_ratio`.
    """
    delta = log_ratio(logp, behavior_logp, mask)
    residual = beta2 * delta - jax.lax.stop_gradient(advantage)
    metrics = {"log_ratio": delta, "residual": residual, "target_log_ratio": advantage / beta2}
    return jnp.square(residual), metrics
