"""The optimizer: AdamW behind a gradient-norm clip, with a warm-up and a cosine decay."""

import optax


def make_schedule(
    *, learning_rate: float, warmup_steps: int, final_fraction: float, num_steps: int
) -> optax.Schedule:
    """Up to learning_rate over `warmup_steps`, then a cosine to learning_rate * final_fraction."""
    return optax.warmup_cosine_decay_schedule(
        init_value=learning_rate / (warmup_steps + 1),  # not 0: the first step would be wasted
        peak_value=learning_rate,
        warmup_steps=warmup_steps,
        decay_steps=max(num_steps, warmup_steps + 1),
        end_value=learning_rate * final_fraction,
    )


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

    The first moment is kept in `mu_dtype`, computed in float32; the second one is float32.
    """
    schedule = make_schedule(
        learning_rate=learning_rate,
        warmup_steps=warmup_steps,
        final_fraction=final_fraction,
        num_steps=num_steps,
    )
    return optax.chain(
        optax.clip_by_global_norm(max_grad_norm),
        optax.adamw(schedule, b1=b1, b2=b2, eps=eps, weight_decay=weight_decay, mu_dtype=mu_dtype),
    )
