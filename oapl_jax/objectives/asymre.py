"""AsymRE: off-policy REINFORCE whose baseline lies below the mean, so that it stays stable.

"Asymmetric REINFORCE for off-policy reinforcement learning", arXiv 2506.20520.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float

from oapl_jax.objectives import advantages
from oapl_jax.objectives.ratios import masked_logp, token_log_ratio


def advantage(reward: Float[Array, " G"], *, asymre_shift: float) -> Float[Array, " G"]:
    """A_i = r_i - V,  V = mean r + shift.

    Args:
      reward: of the whole group.
      asymre_shift: below 0, good responses weigh more than bad ones, and groups of equal rewards
        are imitated; at or above 0 the fixed point may put all mass on a few responses.
    """
    return advantages.advantage(reward, estimator="dr_grpo") - asymre_shift


def loss(
    logp: Float[Array, "G T"],
    behavior_logp: Float[Array, "G T"],
    advantage: Float[Array, " G"],
    mask: Float[Array, "G T"],
) -> tuple[Float[Array, " G"], dict[str, Float[Array, " G"]]]:
    """L_i = -A_i sum_t log pi(y_it|x), for responses of the behavior policy, without a ratio.

    Args:
      logp, behavior_logp, advantage, mask: as in objectives/oapl.py.
    """
    log_ratio = jnp.sum(token_log_ratio(logp, behavior_logp, mask), axis=-1)
    return -advantage * jnp.sum(masked_logp(logp, mask), axis=-1), {"log_ratio": log_ratio}
