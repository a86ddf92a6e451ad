"""An optimizer whose moments begin anew, for the question what they carry over a sync."""

import jax
import jax.numpy as jnp
import optax


def forgetful(
    optimizer: optax.GradientTransformation, *, every: int
) -> optax.GradientTransformation:
    """The same with Adam's moments and their bias correction begun anew every so many steps.

    The schedule goes on. With `every` a window of the lag policy, no gradient of one window weighs
    in the steps of the next. (A step that is skipped, since it was not finite, is not counted.)
    """
    adam = lambda part: isinstance(part, optax.ScaleByAdamState)

    def update(updates, state, params=None):
        step, inner = state
        kept = step % every != 0
        forget = lambda part: jax.tree.map(lambda x: x * kept.astype(x.dtype), part)
        inner = jax.tree.map(lambda p: forget(p) if adam(p) else p, inner, is_leaf=adam)
        updates, inner = optimizer.update(updates, inner, params)
        return updates, (step + 1, inner)

    return optax.GradientTransformation(
        lambda params: (jnp.zeros((), jnp.int32), optimizer.init(params)), update
    )
