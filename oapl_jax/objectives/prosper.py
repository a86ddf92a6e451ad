"""PROSPER: regresses differences of log-ratios onto differences of preference, pair by pair.

"Back to Blackwell", arXiv 2602.19041. A step of mirror ascent on the value of the policy,
pi_{t+1} ~ pi_t exp(eta g), gives two responses log-ratios that differ by eta times the difference
of their targets g. The reward here is g, of preferences/winner.py; on any other reward the
objective is REBEL, arXiv 2404.16767.
"""

import math

import jax
import jax.numpy as jnp

from oapl_jax.errors import UserError
from oapl_jax.objectives.annotations import Fraction, Losses, PerResponse, PerToken, Positive
from oapl_jax.objectives.ratios import log_ratio


def loss(
    logp: PerToken,
    behavior_logp: PerToken,
    advantage: PerResponse,
    mask: PerToken,
    *,
    eta: Positive,
    pair_share: Fraction,
    group_size: int,
) -> Losses:
    """L_i = G / 2K sum_k c_ik ( [Delta_i - Delta_k] / eta - [A_i - A_k] )^2,

    with Delta_i = log pi(y_i|x) - log pi_t(y_i|x), k over the group, and c_ik = 1 for the K of its
    pairs whose targets differ most: the mean of L is the mean over these pairs. Its minimum does
    not depend on the policy that sampled.

    Args:
      advantage: g_i, up to a constant of the group.
      eta: step size of the mirror ascent, in nats per unit of preference.
      pair_share: share of the G (G - 1) / 2 pairs that train; pairs that differ as much as the
        last one train too.
      group_size: G, at least 2; a UserError says so.
    """
    if group_size < 2:
        raise UserError(f"objective prosper compares pairs; raise group_size={group_size} to 2")
    beta, delta = 1 / eta, log_ratio(logp, behavior_logp, mask)
    groups = lambda of: of.reshape(-1, group_size)
    gaps = lambda of: groups(of)[:, :, None] - groups(of)[:, None, :]  # [S / G, G, G]
    target_gap = gaps(jax.lax.stop_gradient(advantage))
    size = jnp.where(jnp.eye(group_size, dtype=bool), -jnp.inf, jnp.abs(target_gap))
    kept = 2 * math.ceil(pair_share * group_size * (group_size - 1) / 2)  # in both directions
    least = jnp.sort(size.reshape(len(size), -1), axis=-1)[:, -kept]
    chosen = (size >= least[:, None, None]).astype(jnp.float32)
    squares = chosen * jnp.square(beta * gaps(delta) - target_gap)
    losses = group_size * jnp.sum(squares, -1) / jnp.sum(chosen, (1, 2))[:, None]
    centred = groups(delta) - jnp.mean(groups(delta), axis=-1, keepdims=True)
    residual = beta * centred.reshape(-1) - advantage
    metrics = {"log_ratio": delta, "residual": residual, "target_log_ratio": advantage / beta}
    return losses.reshape(-1), metrics
