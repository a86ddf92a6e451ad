"""OPMD, online policy mirror descent, as a regression: Kimi k1.5's form.

"Kimi k1.5", arXiv 2501.12599, section 2.3: max_pi E[r] - tau KL(pi || pi_i), again and again, with
pi_i the policy that sampled.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from oapl_jax.objectives import advantages, oapl
from oapl_jax.objectives.ratios import token_log_ratio

BASELINES = ("mean", "log_mean_exp")


def advantage(
    reward: Float[Array, " G"], *, opmd_baseline: str, beta1: float
) -> Float[Array, " G"]:
    """A_i = r_i - mean r, or r_i - tau log Z with tau log Z = beta1 log mean_j exp(r_j / beta1).

    Args:
      reward: of the whole group.
      opmd_baseline: "mean" (which tau log Z goes to for a large tau) or "log_mean_exp".
      beta1: tau of "log_mean_exp", above 0.

    Raises:
      ValueError: for an unknown baseline.
    """
    if opmd_baseline not in BASELINES:
        raise ValueError(f"opmd_baseline is one of {BASELINES}")
    if opmd_baseline == "log_mean_exp":
        return oapl.advantage(reward, beta1=beta1)
    return advantages.advantage(reward, estimator="dr_grpo")


def loss(
    logp: Float[Array, "G T"],
    behavior_logp: Float[Array, "G T"],
    advantage: Float[Array, " G"],
    mask: Float[Array, "G T"],
    *,
    beta2: float,
) -> tuple[Float[Array, " G"], dict[str, Float[Array, " G"]]]:
    """L_i = -A_i Delta_i + (tau / 2) Delta_i^2,  Delta_i = sum_t [log pi - log pi_i].

    It has the gradient of the regression (A - tau Delta)^2 / (2 tau), and a limit at tau = 0:
    REINFORCE without an importance weight.

    Args:
      logp, behavior_logp, advantage, mask: as in objectives/oapl.py.
      beta2: tau, at least 0, in units of reward per nat.
    """
    log_ratio = jnp.sum(token_log_ratio(logp, behavior_logp, mask), axis=-1)
    residual = beta2 * log_ratio - jax.lax.stop_gradient(advantage)
    losses = -advantage * log_ratio + beta2 / 2 * jnp.square(log_ratio)
    return losses, {"log_ratio": log_ratio, "residual": residual}
