"""Log-probabilities and their ratios as objectives use them: float32, zero where masked."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def masked_logp(logp: Float[Array, "G T"], mask: Float[Array, "G T"]) -> Float[Array, "G T"]:
    """log pi of response tokens, 0 elsewhere; what is masked has no gradient, be it nan."""
    return jnp.where(mask > 0, logp.astype(jnp.float32), 0.0)


def token_log_ratio(
    logp: Float[Array, "G T"], behavior_logp: Float[Array, "G T"], mask: Float[Array, "G T"]
) -> Float[Array, "G T"]:
    """log pi - log pi_behavior of response tokens, 0 elsewhere; the gradient is the policy's."""
    return masked_logp(logp, mask) - masked_logp(jax.lax.stop_gradient(behavior_logp), mask)


def bounded_exp(log_ratio: Float[Array, "..."]) -> Float[Array, "..."]:
    """exp of a log-ratio within 20 nats: still far from an overflow of a sum of them."""
    return jnp.exp(jnp.clip(log_ratio, -20.0, 20.0))
