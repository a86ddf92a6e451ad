"""OPMD, online policy mirror descent, as a likelihood: Trinity-RFT's form, arXiv 2505.17826."""

import jax.numpy as jnp

from oapl_jax.objectives.annotations import Losses, NonNegative, PerResponse, PerToken
from oapl_jax.objectives.ratios import log_ratio, masked_logp


def loss(
    logp: PerToken,
    behavior_logp: PerToken,
    advantage: PerResponse,
    mask: PerToken,
    *,
    tau: NonNegative,
) -> Losses:
    """L_i = -A_i / (1 + tau) sum_t log pi: no ratio, no clipping."""
    losses = -advantage / (1 + tau) * jnp.sum(masked_logp(logp, mask), axis=-1)
    return losses, {"log_ratio": log_ratio(logp, behavior_logp, mask)}
