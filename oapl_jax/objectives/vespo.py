"""VESPO: a soft kernel of the whole response's importance weight, without length normalisation.

"Variational sequence-level soft policy optimization", arXiv 2602.10693.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array

from oapl_jax.objectives.annotations import Losses, NonNegative, PerResponse, PerToken
from oapl_jax.objectives.ratios import log_ratio, masked_logp


def kernel(log_weight: PerResponse, power: Array, decay: Array) -> PerResponse:
    """phi(W) = W^power exp( decay (1 - W) ): 1 at W = 1, largest at W = power / decay."""
    log_weight = jnp.clip(log_weight, -20.0, 20.0)
    return jnp.exp(power * log_weight + decay * (1 - jnp.exp(log_weight)))


def loss(
    logp: PerToken,
    behavior_logp: PerToken,
    advantage: PerResponse,
    mask: PerToken,
    *,
    power_good: NonNegative,
    decay_good: NonNegative,
    power_bad: NonNegative,
    decay_bad: NonNegative,
) -> Losses:
    """L_i = -sg( phi(W_i) ) A_i sum_t log pi_t,  W_i = exp( sum_t [log pi - log pi_behavior] ).

    phi has one pair of constants where A >= 0 (good) and one where A < 0 (bad).

    Args:
      power_good, power_bad: exponent of W.
      decay_good, decay_bad: decay of phi at large weights; power and decay 0 are REINFORCE, power 1
        and decay 0 full importance sampling of responses.
    """
    delta, good = log_ratio(logp, behavior_logp, mask), advantage >= 0
    power = jnp.where(good, power_good, power_bad)
    decay = jnp.where(good, decay_good, decay_bad)
    weight = kernel(jax.lax.stop_gradient(delta), power, decay)
    losses = -weight * advantage * jnp.sum(masked_logp(logp, mask), axis=-1)
    return losses, {"log_ratio": delta, "correction": weight}
