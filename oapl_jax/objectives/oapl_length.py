"""OAPL with the log-ratio divided by a power of the response's length; the paper has power 0."""

import jax
import jax.numpy as jnp

from oapl_jax.objectives.annotations import Losses, NonNegative, PerResponse, PerToken, Positive
from oapl_jax.objectives.ratios import log_ratio


def loss(
    logp: PerToken,
    behavior_logp: PerToken,
    advantage: PerResponse,
    mask: PerToken,
    *,
    beta2: Positive,
    length_exponent: NonNegative,
) -> Losses:
    """L_i = ( beta2 |y_i|^-e [log pi(y_i|x) - log pi_lag(y_i|x)] - A_i )^2.

    The fixed point is log(pi/pi_lag) = A |y|^e / beta2, no longer the optimum of a problem with a
    KL: long responses may move further, good or bad.

    Args:
      beta2: strength of the anchor; at e = 1 in units of reward per nat a token.
      length_exponent: e; 0 is OAPL, 1 the mean over tokens.
    """
    beta = beta2 * jnp.maximum(jnp.sum(mask, axis=-1), 1) ** -length_exponent
    delta = log_ratio(logp, behavior_logp, mask)
    residual = beta * delta - jax.lax.stop_gradient(advantage)
    metrics = {"log_ratio": delta, "residual": residual, "target_log_ratio": advantage / beta}
    return jnp.square(residual), metrics
