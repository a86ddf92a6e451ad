"""AsymRE: off-policy REINFORCE with a baseline below the mean reward, for stability.

"Asymmetric REINFORCE for off-policy reinforcement learning", arXiv 2506.20520.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float

from oapl_jax.objectives import advantages
from oapl_jax.objectives.annotations import Finite, Losses, PerResponse, PerToken
from oapl_jax.objectives.ratios import log_ratio, masked_logp


def advantage(reward: Float[Array, " G"], *, delta_v: Finite) -> Float[Array, " G"]:
    """A_i = r_i - V,  V = mean r + delta_v.

    Args:
      delta_v: below 0, good responses weigh more than bad ones, and groups of equal rewards are
        imitated; at or above 0 the fixed point may put all mass on a few responses.
    """
    return advantages.centred(reward) - delta_v


def loss(logp: PerToken, behavior_logp: PerToken, advantage: PerResponse, mask: PerToken) -> Losses:
    """L_i = -A_i sum_t log pi(y_it|x), for responses of the behavior policy, without a ratio."""
    metrics = {"log_ratio": log_ratio(logp, behavior_logp, mask)}
    return -advantage * jnp.sum(masked_logp(logp, mask), axis=-1), metrics
