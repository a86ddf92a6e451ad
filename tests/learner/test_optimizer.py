"""AdamW with its first moment in bfloat16: what is kept, what is rounded, and how far it strays."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from etils import epath
from small_models import OPTIM

from oapl_jax.learner import train_step
from oapl_jax.learner.optimizer import make_optimizer
from oapl_jax.weights.checkpoint import Checkpoints

RATE, B1, B2, EPS, DECAY = 1e-2, 0.9, 0.95, 1e-8, 0.1
SETTINGS = OPTIM | dict(learning_rate=RATE, final_fraction=1.0, num_steps=100, b1=B1, b2=B2)
SETTINGS |= dict(eps=EPS, weight_decay=DECAY, max_grad_norm=1e9)
SHAPES = {"layers": {"kernel": (3, 16, 8)}, "head": (8, 40)}
ROUNDING = 2.0**-8  # of a number to the nearest in bfloat16, at most


@functools.cache
def optimizer(mu_dtype):
    return make_optimizer(**SETTINGS | dict(mu_dtype=mu_dtype))


@functools.cache
def update(mu_dtype):
    return jax.jit(optimizer(mu_dtype).update)


def arrays(seed):
    """Drawn around 1, so that moments do not cancel out."""
    rng = np.random.default_rng(seed)
    draw = lambda shape: jnp.asarray(rng.normal(1, 1, shape), jnp.float32)
    return jax.tree.map(draw, SHAPES, is_leaf=lambda x: isinstance(x, tuple))


def train(mu_dtype, count):
    """(parameters, optimizer state) after so many steps."""
    params: Any = arrays(0)
    state = optimizer(mu_dtype).init(params)
    for step in range(1, count + 1):
        updates, state = update(mu_dtype)(arrays(step), state, params)
        params = optax.apply_updates(params, updates)
    return params, state


def adam(state):
    return state[1][0]


def dtypes(tree):
    return {leaf.dtype.name for leaf in jax.tree.leaves(tree)}


@pytest.mark.parametrize("mu_dtype", ["float32", "bfloat16"])
def test_the_first_moment_alone_is_kept_in_mu_dtype(mu_dtype):
    for steps in (0, 1):
        params, state = train(mu_dtype, steps)
        assert dtypes(adam(state).mu) == {mu_dtype}
        assert dtypes(adam(state).nu) == dtypes(params) == {"float32"}
    updates, _ = update(mu_dtype)(arrays(1), state, params)
    assert dtypes(updates) == {"float32"}
    # A state has the shape of optax's own.
    own = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(lambda _: RATE))
    assert jax.tree.structure(state) == jax.tree.structure(own.init(params))


def test_a_step_rounds_the_moment_once_and_only_for_the_next_step():
    """Against float64, from a state in the middle of a run."""
    params, state = train("bfloat16", 5)
    gradient = arrays(6)
    updates, new = update("bfloat16")(gradient, state, params)

    def check(p, g, mu, nu, found, kept):
        p, g, mu, nu, found, kept = (
            np.asarray(x.astype(jnp.float32), np.float64) for x in (p, g, mu, nu, found, kept)
        )
        mu, nu = B1 * mu + (1 - B1) * g, B2 * nu + (1 - B2) * g**2
        step = (mu / (1 - B1**6)) / (np.sqrt(nu / (1 - B2**6)) + EPS) + DECAY * p
        np.testing.assert_allclose(found, -RATE * step, rtol=1e-4, atol=1e-7)
        np.testing.assert_allclose(kept, mu, rtol=ROUNDING, atol=1e-7)
        assert np.any(np.abs(kept - mu) > 0.5 * ROUNDING * np.abs(mu))  # it is rounded

    old = adam(state)
    jax.tree.map(check, params, gradient, old.mu, old.nu, updates, adam(new).mu)


@pytest.mark.parametrize("restored_as", ["bfloat16", "float32"])
def test_a_restored_run_goes_on_from_the_same_moments(restored_as, tmp_path):
    """To the bit; or, if float32 is wanted from then on, from the numbers that there are."""
    params, opt_state = train("bfloat16", 3)
    state = train_step.new_state(params, optimizer("bfloat16")).replace(opt_state=opt_state)
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    wanted = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here),
        train_step.new_state(params, optimizer(restored_as)),
    )
    checkpoints = Checkpoints(epath.Path(tmp_path) / "checkpoints", deadline=60.0, keep=1)
    checkpoints.save(3, state, {}, b"", probe={})
    checkpoints.wait()
    found, _, _ = checkpoints.restore(3, wanted)
    checkpoints.close()
    assert dtypes(adam(found.opt_state).mu) == {restored_as}
    jax.tree.map(np.testing.assert_array_equal, found, state)
    if restored_as == "bfloat16":
        again = update("bfloat16")(arrays(4), found.opt_state, found.params)
        unbroken = update("bfloat16")(arrays(4), opt_state, params)
        jax.tree.map(np.testing.assert_array_equal, again, unbroken)
