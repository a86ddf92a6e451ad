"""The effective size of a stale sample, by which a step can be shortened.

VCPO, "Stable asynchrony", arXiv 2602.17616: lr_eff = lr sqrt( min(1, ESS / B) ) for Adam, and
without the root for plain gradient descent.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def effective_share(log_weight: Float[Array, " B"]) -> Float[Array, ""]:
    """ESS / B = (sum W)^2 / (B sum W^2), between 1/B and 1, for W = pi / pi_behavior of responses.

    Args:
      log_weight: log W of every response of the global batch, neither clipped nor truncated.
    """
    log_weight = jax.lax.stop_gradient(jnp.asarray(log_weight, jnp.float32))
    weight = jnp.exp(log_weight - jnp.max(log_weight))  # a common factor cancels
    return jnp.square(jnp.sum(weight)) / (weight.size * jnp.sum(jnp.square(weight)))
