"""The optimizer: gradient-norm clip, then AdamW with a warm-up and a cosine decay."""

from typing import Any

import optax


def make_optimizer(
    *,
    learning_rate: float,
    warmup_steps: int,
    final_fraction: float,
    num_steps: int,
    b1: float,
    b2: float,
    eps: float,
    weight_decay: float,
    max_grad_norm: float,
    mu_dtype: str,
) -> optax.GradientTransformation:
    """clip_by_global_norm, then AdamW with decoupled weight decay (arXiv 1711.05101).

    The rate rises linearly to `learning_rate`, then falls by a cosine to a `final_fraction` of it.
    The first moment is stored in `mu_dtype`; a step computes with it in float32 and rounds the
    result. The second moment is float32.
    """
    schedule = optax.warmup_cosine_decay_schedule(
        init_value=learning_rate / (warmup_steps + 1),  # not 0: the first step would be wasted
        peak_value=learning_rate,
        warmup_steps=warmup_steps,
        decay_steps=max(num_steps, warmup_steps + 1),
        end_value=learning_rate * final_fraction,
    )
    return optax.chain(
        optax.clip_by_global_norm(max_grad_norm),
        optax.chain(
            scale_by_adam(b1=b1, b2=b2, eps=eps, mu_dtype=mu_dtype),
            optax.add_decayed_weights(weight_decay),
            optax.scale_by_learning_rate(schedule),
        ),
    )


def scale_by_adam(
    *, b1: float, b2: float, eps: float, mu_dtype: str
) -> optax.GradientTransformation:
    """optax.scale_by_adam with its first moment stored in `mu_dtype`.

    Optax's own `mu_dtype` multiplies the moment by b1 in that dtype: in bfloat16 that adds a
    rounding to each step, unless the compiler happens to remove it.
    """
    adam = optax.scale_by_adam(b1=b1, b2=b2, eps=eps)
    with_mu = lambda state, dtype: state._replace(mu=optax.tree.cast(state.mu, dtype))

    def init(params: Any) -> Any:
        return with_mu(adam.init(params), mu_dtype)

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        updates, state = adam.update(updates, with_mu(state, "float32"), params)
        return updates, with_mu(state, mu_dtype)

    return optax.GradientTransformation(init, update)
