"""PROSPER: regress differences of log-ratios onto differences of preference, pair by pair.

"Back to Blackwell", arXiv 2602.19041. A step of mirror ascent on the value of the policy,
pi_{t+1} ~ pi_t exp(eta g), has log-ratios that differ by eta times what the responses' targets g
differ by. The reward that it gets is g, of preferences/winner.py; on any other reward it is REBEL,
arXiv 2404.16767.
"""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from oapl_jax.objectives import advantages
from oapl_jax.objectives.ratios import token_log_ratio


def advantage(reward: Float[Array, " G"]) -> Float[Array, " G"]:
    """A_i = g_i - mean g; only the differences count."""
    return advantages.advantage(reward, estimator="dr_grpo")


def loss(
    logp: Float[Array, "S T"],
    behavior_logp: Float[Array, "S T"],
    advantage: Float[Array, " S"],
    mask: Float[Array, "S T"],
    *,
    beta2: float,
    pair_share: float,
    group_size: int,
) -> tuple[Float[Array, " S"], dict[str, Float[Array, " S"]]]:
    """L_i = G / 2K sum_k c_ik ( beta2 [Delta_i - Delta_k] - [A_i - A_k] )^2,  beta2 = 1 / eta,

    with Delta_i = log pi(y_i|x) - log pi_t(y_i|x), k over the group, and c_ik = 1 for the K of its
    pairs whose targets differ most, so that the mean of L is the mean over these pairs. Whoever
    sampled the pairs, the minimum is the same.

    Args:
      logp, behavior_logp, mask: as in objectives/oapl.py, of S / G whole groups one after another;
        the behavior policy is pi_t.
      advantage: g_i, but for a constant of the group.
      beta2: 1 / eta, above 0, in units of preference per nat.
      pair_share: of the G (G - 1) / 2 pairs that train, above 0 and at most 1; with those whose
        differences equal the last one's.
      group_size: G, at least 2.
    """
    log_ratio = jnp.sum(token_log_ratio(logp, behavior_logp, mask), axis=-1)
    groups = lambda of: of.reshape(-1, group_size)
    gaps = lambda of: groups(of)[:, :, None] - groups(of)[:, None, :]  # [S / G, G, G]
    target_gap = gaps(jax.lax.stop_gradient(advantage))
    size = jnp.where(jnp.eye(group_size, dtype=bool), -jnp.inf, jnp.abs(target_gap))
    kept = 2 * math.ceil(pair_share * group_size * (group_size - 1) / 2)  # in both directions
    least = jnp.sort(size.reshape(len(size), -1), axis=-1)[:, -kept]
    chosen = (size >= least[:, None, None]).astype(jnp.float32)
    squares = chosen * jnp.square(beta2 * gaps(log_ratio) - target_gap)
    losses = group_size * jnp.sum(squares, -1) / jnp.sum(chosen, (1, 2))[:, None]
    centred = groups(log_ratio) - jnp.mean(groups(log_ratio), axis=-1, keepdims=True)
    residual = beta2 * centred.reshape(-1) - advantage
    metrics = {"log_ratio": log_ratio, "residual": residual, "target_log_ratio": advantage / beta2}
    return losses.reshape(-1), metrics
