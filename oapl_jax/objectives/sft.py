"""Maximum likelihood: the warm-up on demonstrations."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def advantage(reward: Float[Array, " G"]) -> Float[Array, " G"]:
    """A_i = r_i: a demonstration has reward 1; a response with reward 0 is not imitated."""
    return jax.lax.stop_gradient(reward.astype(jnp.float32))


def loss(
    logp: Float[Array, "G T"],
    behavior_logp: Float[Array, "G T"],
    advantage: Float[Array, " G"],
    mask: Float[Array, "G T"],
) -> tuple[Float[Array, " G"], dict[str, Float[Array, " G"]]]:
    """L_i = -A_i sum_t log pi(y_it|x); `behavior_logp` plays no part."""
    del behavior_logp
    return -advantage * jnp.sum(jnp.where(mask > 0, logp.astype(jnp.float32), 0.0), axis=-1), {}
