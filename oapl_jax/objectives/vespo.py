"""VESPO: a soft kernel of the whole response's importance weight, without length normalisation.

"Variational sequence-level soft policy optimization", arXiv 2602.10693. Its advantage is GRPO's
(advantages.py).
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from oapl_jax.objectives.ratios import masked_logp, token_log_ratio


def kernel(log_weight: Float[Array, " G"], power: Array, decay: Array) -> Float[Array, " G"]:
    """phi(W) = W^power exp( decay (1 - W) ): 1 at W = 1, largest at W = power / decay."""
    log_weight = jnp.clip(log_weight, -20.0, 20.0)
    return jnp.exp(power * log_weight + decay * (1 - jnp.exp(log_weight)))


def loss(
    logp: Float[Array, "G T"],
    behavior_logp: Float[Array, "G T"],
    advantage: Float[Array, " G"],
    mask: Float[Array, "G T"],
    *,
    vespo_power_good: float,
    vespo_decay_good: float,
    vespo_power_bad: float,
    vespo_decay_bad: float,
) -> tuple[Float[Array, " G"], dict[str, Float[Array, " G"]]]:
    """L_i = -sg( phi(W_i) ) A_i sum_t log pi_t,  W_i = exp( sum_t [log pi - log pi_behavior] ).

    phi has one pair of constants where A >= 0 (good) and one where A < 0 (bad).

    Args:
      logp, behavior_logp, advantage, mask: as in objectives/oapl.py.
      vespo_power_...: the power of W, at least 0.
      vespo_decay_...: how fast large weights are given up, at least 0; power and decay 0 are
        REINFORCE, power 1 and decay 0 full importance sampling of responses.
    """
    log_ratio = jnp.sum(token_log_ratio(logp, behavior_logp, mask), axis=-1)
    good = advantage >= 0
    power = jnp.where(good, vespo_power_good, vespo_power_bad)
    decay = jnp.where(good, vespo_decay_good, vespo_decay_bad)
    weight = kernel(jax.lax.stop_gradient(log_ratio), power, decay)
    losses = -weight * advantage * jnp.sum(masked_logp(logp, mask), axis=-1)
    return losses, {"log_ratio": log_ratio, "correction": weight}
