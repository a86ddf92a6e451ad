"""What weighs a token that another policy sampled: an importance ratio, truncated or masked.

Decoupled behavior and proximal policies: AReaL, arXiv 2505.24298. With u_t = pi_prox / pi_behavior
of a token, or for "sequence" the product of them over the response,

    truncate  w_t = min(u_t, cap)
    mask      w_t = u_t where floor <= u_t <= cap, else 0
"""

import jax.numpy as jnp
from jaxtyping import Array, Float

from oapl_jax.objectives.ratios import bounded_exp

CORRECTIONS = ("none", "token_truncate", "sequence_truncate", "token_mask", "sequence_mask")


def correction_weight(
    gap: Float[Array, "G T"], correction: str, *, cap: float, floor: float
) -> Float[Array, "G T"]:
    """w_t of each token; 1 for the correction "none".

    Args:
      gap: log u_t of each token, 0 where masked, without a gradient.
      correction: one of CORRECTIONS.
      cap, floor: bounds of u itself.

    Raises:
      ValueError: for an unknown correction.
    """
    if correction not in CORRECTIONS:
        raise ValueError(f"correction is one of {CORRECTIONS}")
    if correction == "none":
        return jnp.ones_like(gap)
    if correction.startswith("sequence"):
        gap = jnp.broadcast_to(jnp.sum(gap, axis=-1, keepdims=True), gap.shape)
    weight = bounded_exp(gap)
    if correction.endswith("truncate"):
        return jnp.minimum(weight, cap)
    return weight * ((floor <= weight) & (weight <= cap))
