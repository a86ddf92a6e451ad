"""TBA: trajectory balance with log Z estimated from the group (VarGrad).

"Trajectory balance with asynchrony", arXiv 2503.18929. At the optimum pi_ref exp(r / beta) / Z the
log-ratio plus log Z is r / beta for every response, whoever sampled it.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from oapl_jax.objectives import advantages
from oapl_jax.objectives.ratios import token_log_ratio


def advantage(reward: Float[Array, " G"]) -> Float[Array, " G"]:
    """A_i = r_i - mean r: the reward's part of log Z, taken from the whole group."""
    return advantages.advantage(reward, estimator="dr_grpo")


def loss(
    logp: Float[Array, "S T"],
    behavior_logp: Float[Array, "S T"],
    advantage: Float[Array, " S"],
    mask: Float[Array, "S T"],
    *,
    beta2: float,
    group_size: int,
) -> tuple[Float[Array, " S"], dict[str, Float[Array, " S"]]]:
    """L_i = ( beta [Delta_i + log Z] - r_i )^2,  log Z = sg mean_j( r_j / beta - Delta_j ),

    with Delta_i = log pi(y_i|x) - log pi_ref(y_i|x) and j over the group: beta^2 times the paper's
    loss. Without log Z's share of the log-ratios it would be OPMD's regression.

    Args:
      logp, mask: as in objectives/oapl.py, of S / G whole groups one after another.
      behavior_logp: of each response token under the reference policy.
      advantage: r_i - mean r.
      beta2: beta, above 0, in units of reward per nat.
      group_size: G.
    """
    log_ratio = jnp.sum(token_log_ratio(logp, behavior_logp, mask), axis=-1)
    mean = jnp.mean(log_ratio.reshape(-1, group_size), axis=-1)
    log_ratio_less_mean = log_ratio - jax.lax.stop_gradient(jnp.repeat(mean, group_size))
    residual = beta2 * log_ratio_less_mean - jax.lax.stop_gradient(advantage)
    return jnp.square(residual), {"log_ratio": log_ratio, "residual": residual}
