"""SFT: maximum likelihood, the warm-up's objective; on rollouts it is expert iteration."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from oapl_jax.objectives.annotations import Losses, PerResponse, PerToken
from oapl_jax.objectives.ratios import masked_logp


def advantage(reward: Float[Array, " G"]) -> Float[Array, " G"]:
    """A_i = r_i: a demonstration has reward 1; a response with reward 0 is not imitated."""
    return jax.lax.stop_gradient(reward.astype(jnp.float32))


def loss(logp: PerToken, behavior_logp: PerToken, advantage: PerResponse, mask: PerToken) -> Losses:
    """L_i = -A_i sum_t log pi(y_it|x); `behavior_logp` is not used."""
    del behavior_logp
    return -advantage * jnp.sum(masked_logp(logp, mask), axis=-1), {}
