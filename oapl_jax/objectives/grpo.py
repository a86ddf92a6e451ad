"""GRPO, and with a correction of stale data the paper's asynchronous baseline.

GRPO: arXiv 2402.03300. Clip-higher: DAPO, arXiv 2503.14476. Dual clip: arXiv 1912.09729. Decoupled
behavior and proximal policies: AReaL, arXiv 2505.24298. Dr.GRPO, RLOO and others are a choice of
`estimator` (advantages.py) and aggregation.
"""

from typing import Annotated

import jax
import jax.numpy as jnp

from oapl_jax.errors import UserError
from oapl_jax.objectives.annotations import (
    Cap,
    ClipWidth,
    Losses,
    NonNegative,
    OneOf,
    PerResponse,
    PerToken,
    Range,
)
from oapl_jax.objectives.ratios import bounded_exp, token_log_ratio

PROXIMALS = OneOf(("behavior", "learner"))
CORRECTIONS = OneOf(("none", "token_truncate", "sequence_truncate", "token_mask", "sequence_mask"))


def correction_weight(gap: PerToken, correction: str, *, cap: float, floor: float) -> PerToken:
    """Importance weight w_t of each token, truncated or masked; 1 for the correction "none".

    With u_t = pi_prox / pi_behavior of a token, or for "sequence" their product over the response,

        truncate  w_t = min(u_t, cap)
        mask      w_t = u_t where floor <= u_t <= cap, else 0

    Args:
      gap: log u_t of each token, 0 where masked, without a gradient.
      correction: one of CORRECTIONS.
      cap, floor: bounds of u itself.
    """
    if correction == "none":
        return jnp.ones_like(gap)
    if correction.startswith("sequence"):
        gap = jnp.broadcast_to(jnp.sum(gap, axis=-1, keepdims=True), gap.shape)
    weight = bounded_exp(gap)
    if correction.endswith("truncate"):
        return jnp.minimum(weight, cap)
    return weight * ((floor <= weight) & (weight <= cap))


def loss(
    logp: PerToken,
    behavior_logp: PerToken,
    advantage: PerResponse,
    mask: PerToken,
    *,
    clip_low: ClipWidth,
    clip_high: ClipWidth,
    dual_clip: Annotated[float, Range(at_least=1, infinite=True)],
    proximal: Annotated[str, PROXIMALS],
    correction: Annotated[str, CORRECTIONS],
    correction_cap: Cap,
    correction_floor: NonNegative,
) -> Losses:
    """L_i = sum_t w_t max( -A rho_t, -A clip(rho_t, 1 - clip_low, 1 + clip_high) ).

    rho_t = pi / pi_prox carries the gradient, w_t = correction(pi_prox / pi_behavior) does not.
    Where A < 0 the surrogate is at most -A dual_clip.

    Args:
      clip_low, clip_high: half-widths of the trust region; inf switches a side off.
      dual_clip: the largest rho of a bad response; inf switches it off.
      proximal: "behavior" clips against the policy that sampled (w = 1, so `correction` must be
        "none"); "learner" recomputes pi_prox with the learner's weights. A batch gets one gradient
        step, so these are the weights of the step itself: rho = 1, and w alone corrects the lag.
      correction, correction_cap, correction_floor: see correction_weight.
    """
    if proximal == "behavior" and correction != "none":
        raise UserError(
            f"objective.policy_gradient.correction={correction!r} corrects the gap between behavior"
            " and proximal policy; it needs objective.policy_gradient.proximal='learner'"
        )
    log_ratio = token_log_ratio(logp, behavior_logp, mask)
    gap = jax.lax.stop_gradient(log_ratio) if proximal == "learner" else jnp.zeros_like(log_ratio)
    ratio, gain = bounded_exp(log_ratio - gap), advantage[:, None]
    clipped = jnp.clip(ratio, 1 - clip_low, 1 + clip_high)
    surrogate = jnp.maximum(-gain * ratio, -gain * clipped)
    surrogate = jnp.minimum(surrogate, jnp.where(gain < 0, -gain * dual_clip, jnp.inf))
    weight = correction_weight(gap, correction, cap=correction_cap, floor=correction_floor)
    tokens = jnp.maximum(jnp.sum(mask, axis=-1), 1)
    metrics = {
        "log_ratio": jnp.sum(log_ratio, axis=-1),
        "clip_fraction": jnp.sum((surrogate != -gain * ratio) * mask, axis=-1) / tokens,
        "correction": jnp.sum(weight * mask, axis=-1) / tokens,
    }
    return jnp.sum(weight * surrogate * mask, axis=-1), metrics
