"""Log-ratios of policies in float32, zero where masked, and the quantities made from them."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from oapl_jax.objectives.annotations import PerResponse, PerToken


def masked_logp(logp: PerToken, mask: PerToken) -> PerToken:
    """log pi of response tokens, 0 elsewhere; a masked value has no gradient, even if it is nan."""
    return jnp.where(mask > 0, logp.astype(jnp.float32), 0.0)


def token_log_ratio(logp: PerToken, behavior_logp: PerToken, mask: PerToken) -> PerToken:
    """log pi - log pi_behavior of response tokens, 0 elsewhere; the gradient is the policy's."""
    return masked_logp(logp, mask) - masked_logp(jax.lax.stop_gradient(behavior_logp), mask)


def log_ratio(logp: PerToken, behavior_logp: PerToken, mask: PerToken) -> PerResponse:
    """Delta_i = log pi(y_i|x) - log pi_behavior(y_i|x): the sum over the tokens of a response."""
    return jnp.sum(token_log_ratio(logp, behavior_logp, mask), axis=-1)


def bounded_exp(log_ratio: Float[Array, "..."]) -> Float[Array, "..."]:
    """exp of a log-ratio clipped to 20 nats, so that a sum of exponentials can't overflow."""
    return jnp.exp(jnp.clip(log_ratio, -20.0, 20.0))


def reference_kl(
    logp: PerToken, behavior_logp: PerToken, reference_logp: PerToken, mask: PerToken
) -> PerResponse:
    """sum_t rho_t ( exp(-d_t) + d_t - 1 ),  d_t = log pi - log pi_ref,  rho_t = pi / pi_behavior.

    The bracket is the non-negative estimate of KL(pi || pi_ref) (k3, as in GRPO, arXiv 2402.03300)
    for tokens of pi. The importance weight makes it one for tokens of the behavior policy and turns
    its gradient into rho_t d_t grad log pi: value and gradient of each token's KL at the sampled
    prefixes. The gradient of the KL of whole responses also holds a token's effect on later ones.
    """
    weight = bounded_exp(token_log_ratio(logp, behavior_logp, mask))
    gap = jnp.clip(token_log_ratio(logp, reference_logp, mask), -20.0, 20.0)
    return jnp.sum(weight * (jnp.expm1(-gap) + gap), axis=-1)


def effective_share(log_weight: Float[Array, " B"]) -> Float[Array, ""]:
    """ESS / B = (sum W)^2 / (B sum W^2), between 1/B and 1, for W = pi / pi_behavior of responses.

    VCPO, "Stable asynchrony", arXiv 2602.17616, shortens a step by it: lr_eff = lr sqrt(ESS / B)
    for Adam, and without the root for plain gradient descent.

    Args:
      log_weight: log W of every response of the global batch, neither clipped nor truncated.
    """
    log_weight = jax.lax.stop_gradient(jnp.asarray(log_weight, jnp.float32))
    weight = jnp.exp(log_weight - jnp.max(log_weight))  # a common factor cancels
    return jnp.square(jnp.sum(weight)) / (weight.size * jnp.sum(jnp.square(weight)))
