"""GRPO, and with a correction of stale data the paper's asynchronous baseline.

GRPO: arXiv 2402.03300. Clip-higher: DAPO, arXiv 2503.14476. Dual clip: arXiv 1912.09729. Dr.GRPO,
RLOO and others are a choice of `estimator` (advantages.py) and aggregation.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from oapl_jax.objectives.corrections import correction_weight
from oapl_jax.objectives.ratios import bounded_exp, token_log_ratio

PROXIMALS = ("behavior", "learner")


def loss(
    logp: Float[Array, "G T"],
    behavior_logp: Float[Array, "G T"],
    advantage: Float[Array, " G"],
    mask: Float[Array, "G T"],
    *,
    clip_low: float,
    clip_high: float,
    dual_clip: float,
    proximal: str,
    correction: str,
    correction_cap: float,
    correction_floor: float,
) -> tuple[Float[Array, " G"], dict[str, Float[Array, " G"]]]:
    """L_i = sum_t w_t max( -A rho_t, -A clip(rho_t, 1 - clip_low, 1 + clip_high) ).

    rho_t = pi / pi_prox carries the gradient, w_t = correction(pi_prox / pi_behavior) does not.
    Where A < 0 the surrogate is at most -A dual_clip.

    Args:
      logp, behavior_logp, advantage, mask: as in objectives/oapl.py.
      clip_low, clip_high: half-widths of the trust region; inf switches a side off.
      dual_clip: the most that rho counts for bad responses, above 1; inf switches it off.
      proximal: "behavior" clips against the policy that sampled (w = 1, so `correction` must be
        "none"); "learner" recomputes pi_prox with the learner's weights. A batch gets one gradient
        step, so these are the weights of the step itself: rho = 1, and w alone repairs the lag.
      correction, correction_cap, correction_floor: see corrections.py.

    Raises:
      ValueError: for unknown or contradicting choices.
    """
    if proximal not in PROXIMALS:
        raise ValueError(f"proximal is one of {PROXIMALS}")
    if proximal == "behavior" and correction != "none":
        raise ValueError(
            f"correction={correction!r} repairs a gap that proximal='behavior' does not have"
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
