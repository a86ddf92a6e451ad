"""GSPO: clips the ratio of whole responses, a geometric mean over their tokens.

"Group sequence policy optimization", arXiv 2507.18071.
"""

import jax.numpy as jnp

from oapl_jax.objectives.annotations import ClipWidth, Losses, PerResponse, PerToken
from oapl_jax.objectives.ratios import log_ratio

LARGEST_LOG = 10.0  # of a response's mean log-ratio; beyond it there is no gradient


def loss(
    logp: PerToken,
    behavior_logp: PerToken,
    advantage: PerResponse,
    mask: PerToken,
    *,
    clip_low: ClipWidth,
    clip_high: ClipWidth,
) -> Losses:
    """L_i = max( -A s_i, -A clip(s_i, 1 - clip_low, 1 + clip_high) ),
    s_i = exp( (1/|y_i|) sum_t [log pi - log pi_behavior] ).

    The gradient of s_i is s_i times the mean of the tokens' score functions: every token of a
    response weighs the same. Averaged over sequences, not tokens.

    Args:
      clip_low, clip_high: half-widths of the trust region of the mean ratio, so far below GRPO's.
    """
    delta = log_ratio(logp, behavior_logp, mask)
    tokens = jnp.maximum(jnp.sum(mask, axis=-1), 1)
    ratio = jnp.exp(jnp.clip(delta / tokens, -LARGEST_LOG, LARGEST_LOG))
    clipped = jnp.clip(ratio, 1 - clip_low, 1 + clip_high)
    surrogate = jnp.maximum(-advantage * ratio, -advantage * clipped)
    clip_fraction = (surrogate != -advantage * ratio).astype(jnp.float32)
    return surrogate, {"log_ratio": delta, "clip_fraction": clip_fraction}
