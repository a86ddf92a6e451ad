"""GSPO: clip the ratio of whole responses, as a geometric mean over their tokens.

"Group sequence policy optimization", arXiv 2507.18071. Its advantage is GRPO's (advantages.py).
"""

import jax.numpy as jnp
from jaxtyping import Array, Float

from oapl_jax.objectives.ratios import token_log_ratio

LARGEST_LOG = 10.0  # of a response's mean log-ratio; beyond it there is no gradient


def loss(
    logp: Float[Array, "G T"],
    behavior_logp: Float[Array, "G T"],
    advantage: Float[Array, " G"],
    mask: Float[Array, "G T"],
    *,
    clip_low: float,
    clip_high: float,
) -> tuple[Float[Array, " G"], dict[str, Float[Array, " G"]]]:
    """L_i = max( -A s_i, -A clip(s_i, 1 - clip_low, 1 + clip_high) ),
    s_i = exp( (1/|y_i|) sum_t [log pi - log pi_behavior] ).

    The gradient of s_i is s_i times the mean of the tokens' score functions: every token of a
    response weighs the same. Averaged over sequences, not tokens.

    Args:
      logp, behavior_logp, advantage, mask: as in objectives/oapl.py.
      clip_low, clip_high: half-widths of the trust region of the mean ratio, so far below GRPO's.
    """
    log_ratio = jnp.sum(token_log_ratio(logp, behavior_logp, mask), axis=-1)
    tokens = jnp.maximum(jnp.sum(mask, axis=-1), 1)
    ratio = jnp.exp(jnp.clip(log_ratio / tokens, -LARGEST_LOG, LARGEST_LOG))
    clipped = jnp.clip(ratio, 1 - clip_low, 1 + clip_high)
    surrogate = jnp.maximum(-advantage * ratio, -advantage * clipped)
    clip_fraction = (surrogate != -advantage * ratio).astype(jnp.float32)
    return surrogate, {"log_ratio": log_ratio, "clip_fraction": clip_fraction}
