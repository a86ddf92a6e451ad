"""TBA: trajectory balance with log Z estimated from the group (VarGrad).

"Trajectory balance with asynchrony", arXiv 2503.18929. At the optimum pi_ref exp(r / beta) / Z the
log-ratio plus log Z is r / beta for every response, under any sampling policy.
"""

import jax
import jax.numpy as jnp

from oapl_jax.objectives.annotations import Losses, PerResponse, PerToken, Positive
from oapl_jax.objectives.ratios import log_ratio


def loss(
    logp: PerToken,
    behavior_logp: PerToken,
    advantage: PerResponse,
    mask: PerToken,
    *,
    beta: Positive,
    group_size: int,
) -> Losses:
    """L_i = ( beta [Delta_i + log Z] - r_i )^2,  log Z = sg mean_j( r_j / beta - Delta_j ),

    with Delta_i = log pi(y_i|x) - log pi_ref(y_i|x) and j over the group: beta^2 times the paper's
    loss. Without log Z's share of the log-ratios it would be OPMD's regression.

    Args:
      behavior_logp: of each response token under the reference policy.
      advantage: r_i - mean r.
      beta: strength of the anchor, in units of reward per nat.
      group_size: G.
    """
    delta = log_ratio(logp, behavior_logp, mask)
    mean = jnp.mean(delta.reshape(-1, group_size), axis=-1)
    centred = delta - jax.lax.stop_gradient(jnp.repeat(mean, group_size))
    residual = beta * centred - jax.lax.stop_gradient(advantage)
    return jnp.square(residual), {"log_ratio": delta, "residual": residual}
