"""CISPO: clips the importance weight and keeps the gradient of every token.

MiniMax-M1, arXiv 2506.13585; with an absolute cap, ScaleRL, arXiv 2510.13786.
"""

import jax
import jax.numpy as jnp

from oapl_jax.objectives.annotations import Cap, Losses, NonNegative, PerResponse, PerToken
from oapl_jax.objectives.ratios import bounded_exp, masked_logp, token_log_ratio


def loss(
    logp: PerToken,
    behavior_logp: PerToken,
    advantage: PerResponse,
    mask: PerToken,
    *,
    cap: Cap,
    floor: NonNegative,
) -> Losses:
    """L_i = -A_i sum_t sg( clip(rho_t, floor, cap) ) log pi_t,  rho_t = pi / pi_behavior.

    Args:
      cap, floor: bounds of rho itself (some codes bound rho - 1); cap = inf and floor = 0 are full
        importance sampling of tokens.
    """
    log_ratio = token_log_ratio(logp, behavior_logp, mask)
    ratio = jax.lax.stop_gradient(bounded_exp(log_ratio))
    weight = jnp.clip(ratio, floor, cap)
    tokens = jnp.maximum(jnp.sum(mask, axis=-1), 1)
    metrics = {
        "log_ratio": jnp.sum(log_ratio, axis=-1),
        "clip_fraction": jnp.sum((weight != ratio) * mask, axis=-1) / tokens,
        "correction": jnp.sum(weight * mask, axis=-1) / tokens,
    }
    return -advantage * jnp.sum(weight * masked_logp(logp, mask), axis=-1), metrics
