"""MaxRL: policy gradients of the likelihood of a right answer, to the order that samples allow.

"Maximum likelihood reinforcement learning", arXiv 2602.02710. With p the pass rate of a prompt,
    J^(T) = -sum_{k <= T} (1 - p)^k / k,   grad J^(T) = (1 - (1 - p)^T) / p  grad p;
T = 1 is plain RL, T -> inf is log p. The loss is GRPO's, whose importance corrections of stale data
go beyond the paper.
"""

from typing import Annotated

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from oapl_jax.errors import UserError
from oapl_jax.objectives.advantages import maxrl
from oapl_jax.objectives.annotations import Finite, OneOf, Range

ESTIMATORS = OneOf(("baseline", "success", "centred", "truncated"))


def advantage(
    reward: Float[Array, " G"],
    *,
    estimator: Annotated[str, ESTIMATORS],
    order: Annotated[int, Range(at_least=1)],
    verified_reward: Finite,
) -> Float[Array, " G"]:
    """A_i such that mean_i A_i grad log pi(y_i) estimates grad J^(T), for N = G responses.

    With K successes, r_i in {0, 1}, and 0 / 0 = 0:
    "baseline"   (r_i - K/N) / (K/N), 0 if K = 0; T = N - 1 (algorithm 1; graded rewards too)
    "success"    r_i N / K; T = N (Eq. 9)
    "centred"    r_i N / K - 1; T = N (Eq. 10); a group without successes is pushed down
    "truncated"  1 for a success, -sum_{k=2}^{min(T, N - K)} c_k for a failure; any T <= N.
                 c_k = C(N - K - 1, k - 1) / C(N - 1, k - 1): that k - 1 of the others all fail

    Args:
      order: T of "truncated", from 1 to G.
      verified_reward: the least reward of a success.

    Raises:
      UserError: for an order of "truncated" above G.
    """
    count = len(reward)
    if estimator == "truncated" and order > count:
        raise UserError(f"objective.maxrl.order={order} must be at most group_size={count}")
    reward = jax.lax.stop_gradient(reward.astype(jnp.float32))
    right = (reward >= verified_reward).astype(jnp.float32)
    successes = jnp.sum(right)
    if estimator == "baseline":
        return maxrl(reward)
    if estimator == "truncated":
        k = jnp.arange(1, order, dtype=jnp.float32)
        others_fail = jnp.cumprod(jnp.maximum(count - successes - k, 0) / (count - k))
        return right - (1 - right) * jnp.sum(others_fail)
    share = right * count / jnp.maximum(successes, 1)
    return share - 1 if estimator == "centred" else share
