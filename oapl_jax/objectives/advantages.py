"""Group-relative advantages, for any loss whose gradient on fresh data is that of -A log pi."""

from typing import Annotated

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from oapl_jax.objectives.annotations import OneOf


def dr_grpo(reward: Float[Array, " G"]) -> Float[Array, " G"]:
    """A_i = r_i - mean r, arXiv 2503.20783."""
    reward = reward - reward[0]  # the mean of equal rewards is rounded; that of zeros is not
    return reward - jnp.mean(reward)


def grpo(reward: Float[Array, " G"]) -> Float[Array, " G"]:
    """A_i = (r_i - mean r) / (std r + 1e-6), std with G - 1, arXiv 2402.03300."""
    if len(reward) == 1:
        return dr_grpo(reward)
    return dr_grpo(reward) / (jnp.std(reward - reward[0], ddof=1) + 1e-6)


def rloo(reward: Float[Array, " G"]) -> Float[Array, " G"]:
    """A_i = r_i - mean_{j != i} r_j = G / (G - 1) (r_i - mean r), arXiv 2402.14740."""
    return dr_grpo(reward) * len(reward) / max(len(reward) - 1, 1)


def maxrl(reward: Float[Array, " G"]) -> Float[Array, " G"]:
    """A_i = (r_i - mean r) / mean r, 0 without any success; for rewards that are not negative.

    arXiv 2602.02710, algorithm 1: it turns the gradient of the pass rate p into that of log p, so
    that hard prompts weigh more. For its expectation see maxrl.py.
    """
    mean = jnp.mean(reward)
    return jnp.where(mean > 0, dr_grpo(reward) / jnp.where(mean > 0, mean, 1.0), 0.0)


ADVANTAGES = {"grpo": grpo, "dr_grpo": dr_grpo, "rloo": rloo, "maxrl": maxrl}
Estimator = Annotated[str, OneOf(ADVANTAGES)]


def advantage(reward: Float[Array, " G"], *, estimator: Estimator) -> Float[Array, " G"]:
    """Advantages of a whole group by one of `ADVANTAGES`; exactly 0 if its rewards are equal."""
    return jax.lax.stop_gradient(ADVANTAGES[estimator](reward.astype(jnp.float32)))


def centred(reward: Float[Array, " G"]) -> Float[Array, " G"]:
    """A_i = r_i - mean r, without a choice."""
    return advantage(reward, estimator="dr_grpo")
