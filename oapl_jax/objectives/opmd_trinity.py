"""OPMD, online policy mirror descent, as a likelihood: Trinity-RFT's form, arXiv 2505.17826.

Its advantage is that of Kimi's form (opmd_kimi.py).
"""

import jax.numpy as jnp
from jaxtyping import Array, Float

from oapl_jax.objectives.ratios import masked_logp, token_log_ratio


def loss(
    logp: Float[Array, "G T"],
    behavior_logp: Float[Array, "G T"],
    advantage: Float[Array, " G"],
    mask: Float[Array, "G T"],
    *,
    opmd_tau: float,
) -> tuple[Float[Array, " G"], dict[str, Float[Array, " G"]]]:
    """L_i = -A_i / (1 + tau) sum_t log pi: no ratio, no clipping.

    Args:
      logp, behavior_logp, advantage, mask: as in objectives/oapl.py.
      opmd_tau: tau, at least 0.
    """
    log_ratio = jnp.sum(token_log_ratio(logp, behavior_logp, mask), axis=-1)
    losses = -advantage / (1 + opmd_tau) * jnp.sum(masked_logp(logp, mask), axis=-1)
    return losses, {"log_ratio": log_ratio}
