"""KL to a fixed reference policy, for any objective that wants one beside its own anchor."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from oapl_jax.objectives.ratios import bounded_exp, token_log_ratio


def reference_kl(
    logp: Float[Array, "G T"],
    behavior_logp: Float[Array, "G T"],
    reference_logp: Float[Array, "G T"],
    mask: Float[Array, "G T"],
) -> Float[Array, " G"]:
    """sum_t rho_t ( exp(-d_t) + d_t - 1 ),  d_t = log pi - log pi_ref,  rho_t = pi / pi_behavior.

    The bracket is the estimate of KL(pi || pi_ref) that is never negative (k3, as in GRPO, arXiv
    2402.03300), for tokens of pi. The importance weight makes it one for tokens of the behavior
    policy and turns its gradient into rho_t d_t grad log pi: value and gradient of each token's KL,
    at the prefixes that were sampled. With those of pi that adds up to the KL of whole responses,
    whose gradient also holds what a token does to the prefixes after it; this one does not.
    """
    weight = bounded_exp(token_log_ratio(logp, behavior_logp, mask))
    gap = jnp.clip(token_log_ratio(logp, reference_logp, mask), -20.0, 20.0)
    return jnp.sum(weight * (jnp.expm1(-gap) + gap), axis=-1)
