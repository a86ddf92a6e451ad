"""GRPO and the importance corrections that make it the paper's asynchronous baseline.

GRPO: arXiv 2402.03300. Clip-higher: DAPO, arXiv 2503.14476. Without the standard deviation:
Dr.GRPO, arXiv 2503.20783. Decoupled behavior and proximal policies: AReaL, arXiv 2505.24298.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

CORRECTIONS = ("none", "token_truncate", "sequence_truncate", "token_mask", "sequence_mask")
PROXIMALS = ("behavior", "learner")


def advantage(reward: Float[Array, " G"], *, normalize_std: bool) -> Float[Array, " G"]:
    """A_i = r_i - mean(r), divided by std(r) + 1e-6 (with G - 1) if `normalize_std`."""
    reward = reward.astype(jnp.float32)
    reward = reward - reward[0]  # the mean of equal rewards is rounded; that of zeros is not
    centred = reward - jnp.mean(reward)
    if normalize_std and len(reward) > 1:
        centred = centred / (jnp.std(reward, ddof=1) + 1e-6)
    return jax.lax.stop_gradient(centred)


def loss(
    logp: Float[Array, "G T"],
    behavior_logp: Float[Array, "G T"],
    advantage: Float[Array, " G"],
    mask: Float[Array, "G T"],
    *,
    clip_low: float,
    clip_high: float,
    proximal: str,
    correction: str,
    correction_cap: float,
    correction_floor: float,
) -> tuple[Float[Array, " G"], dict[str, Float[Array, " G"]]]:
    """L_i = sum_t w_t max( -A rho_t, -A clip(rho_t, 1 - clip_low, 1 + clip_high) ).

    rho_t = pi / pi_prox carries the gradient, w_t = correction(pi_prox / pi_behavior) does not.

    Args:
      logp, behavior_logp, advantage, mask: as in objectives/oapl.py.
      clip_low, clip_high: half-widths of the trust region; inf switches a side off.
      proximal: "behavior" clips against the policy that sampled (w = 1, so `correction` must be
        "none"); "learner" recomputes pi_prox with the learner's weights. A batch gets one gradient
        step, so these are the weights of the step itself: rho = 1, and w alone repairs the lag.
      correction: "none" (w = 1); "token_truncate" min(w_t, cap); "sequence_truncate" the same for
        the product over the response; "token_mask", "sequence_mask" w where
        floor <= w <= cap, else 0.
      correction_cap, correction_floor: the bounds of `correction`.

    Raises:
      ValueError: for unknown or contradicting choices.
    """
    if proximal not in PROXIMALS or correction not in CORRECTIONS:
        raise ValueError(f"proximal is one of {PROXIMALS} and correction one of {CORRECTIONS}")
    if proximal == "behavior" and correction != "none":
        raise ValueError(
            f"correction={correction!r} repairs a gap that proximal='behavior' does not have"
        )
    logp, behavior_logp = logp.astype(jnp.float32), behavior_logp.astype(jnp.float32)
    behavior_logp = jnp.where(mask > 0, jax.lax.stop_gradient(behavior_logp), 0.0)
    logp = jnp.where(mask > 0, logp, 0.0)
    proximal_logp = behavior_logp if proximal == "behavior" else jax.lax.stop_gradient(logp)

    ratio = _ratio(logp - proximal_logp)
    clipped = jnp.clip(ratio, 1 - clip_low, 1 + clip_high)
    gain = advantage[:, None]
    surrogate = jnp.maximum(-gain * ratio, -gain * clipped)
    weight = _correct(proximal_logp - behavior_logp, correction, correction_cap, correction_floor)
    tokens = jnp.maximum(jnp.sum(mask, axis=-1), 1)
    metrics = {
        "log_ratio": jnp.sum(logp - behavior_logp, axis=-1),
        "clip_fraction": jnp.sum((surrogate != -gain * ratio) * mask, axis=-1) / tokens,
        "correction": jnp.sum(weight * mask, axis=-1) / tokens,
    }
    return jnp.sum(weight * surrogate * mask, axis=-1), metrics


def _ratio(log_ratio: jax.Array) -> jax.Array:
    # exp(20) is still far from an overflow of the sum.
    return jnp.exp(jnp.clip(log_ratio, -20.0, 20.0))


def _correct(gap: jax.Array, correction: str, cap: float, floor: float) -> jax.Array:
    """The weight of each token, for the masked log-gap between proximal and behavior policy."""
    if correction == "none":
        return jnp.ones_like(gap)
    if correction.startswith("sequence"):
        gap = jnp.broadcast_to(jnp.sum(gap, axis=-1, keepdims=True), gap.shape)
    weight = _ratio(gap)
    if correction.endswith("truncate"):
        return jnp.minimum(weight, cap)
    return weight * ((floor <= weight) & (weight <= cap))
