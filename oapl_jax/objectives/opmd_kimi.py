"""OPMD, online policy mirror descent, as a regression: Kimi k1.5's form.

"Kimi k1.5", arXiv 2501.12599, section 2.3: max_pi E[r] - tau KL(pi || pi_i), repeated, with pi_i
the policy that sampled.
"""

from typing import Annotated

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from oapl_jax.objectives import advantages, oapl
from oapl_jax.objectives.annotations import Losses, OneOf, PerResponse, PerToken, Positive
from oapl_jax.objectives.ratios import log_ratio

BASELINES = OneOf(("mean", "log_mean_exp"))


def advantage(
    reward: Float[Array, " G"], *, baseline: Annotated[str, BASELINES], tau: Positive
) -> Float[Array, " G"]:
    """A_i = r_i - mean r, or r_i - tau log Z with log Z = log mean_j exp(r_j / tau).

    Args:
      baseline: "mean", the limit of tau log Z for a large tau, or "log_mean_exp".
      tau: temperature of "log_mean_exp", in units of reward.
    """
    if baseline == "log_mean_exp":
        return oapl.advantage(reward, beta1=tau)
    return advantages.centred(reward)


def loss(
    logp: PerToken,
    behavior_logp: PerToken,
    advantage: PerResponse,
    mask: PerToken,
    *,
    tau: Positive,
) -> Losses:
    """L_i = -A_i Delta_i + (tau / 2) Delta_i^2,  Delta_i = sum_t [log pi - log pi_i].

    Its gradient is that of the regression (A - tau Delta)^2 / (2 tau); the limit at tau = 0 is
    REINFORCE without an importance weight.

    Args:
      tau: strength of the anchor, in units of reward per nat.
    """
    delta = log_ratio(logp, behavior_logp, mask)
    residual = tau * delta - jax.lax.stop_gradient(advantage)
    losses = -advantage * delta + tau / 2 * jnp.square(delta)
    return losses, {"log_ratio": delta, "residual": residual}
