"""A*-PO is OAPL with the anchor replaced, solved by the tilted reference."""

import jax
import jax.numpy as jnp
import numpy as np
from cases import (
    BETA,
    LOG_Z,
    OPTIMUM,
    REFERENCE,
    REWARDS,
    SAMPLING,
    bound,
    random_group,
    run,
    tokens,
)

from oapl_jax.objectives import oapl

REWARD = jnp.array([1.0, 0.0, 0.5, 0.0])
LENGTHS = [6, 1, 4, 9]


def test_a_star_po_is_oapl_with_the_anchor_replaced():
    logp, behavior, advantage, mask = random_group(0, LENGTHS, 9, spread=0.2)
    reference = behavior + np.float32(0.3)
    mine = run(bound("a_star_po", beta2=0.2), logp, reference, advantage, mask)
    jax.tree.map(
        np.testing.assert_array_equal,
        mine,
        run(bound("oapl", beta2=0.2), logp, reference, advantage, mask),
    )
    assert not np.allclose(
        mine[0], run(bound("oapl", beta2=0.2), logp, behavior, advantage, mask)[0]
    )
    np.testing.assert_array_equal(
        bound("a_star_po").advantage(REWARD), oapl.advantage(REWARD, beta1=0.5)
    )


def test_a_star_po_is_solved_by_the_tilted_reference_whoever_samples():
    """A group in the reference's proportions has V^ = V*; then every residual is zero at pi*."""
    counts = (REFERENCE * 10).round().astype(int)
    group = jnp.asarray(np.repeat(REWARDS, counts), jnp.float32)
    advantage = bound("a_star_po", beta1=BETA).advantage(group)[np.cumsum(counts) - 1]
    np.testing.assert_allclose(advantage, REWARDS - BETA * LOG_Z, atol=1e-6)
    objective = bound("a_star_po", beta2=BETA)
    there = run(objective, tokens(OPTIMUM), tokens(REFERENCE), advantage, np.ones((4, 2)))
    np.testing.assert_allclose(there[0], 0, atol=1e-12)
    np.testing.assert_allclose(there[1], 0, atol=1e-6)
    elsewhere = run(objective, tokens(OPTIMUM), tokens(SAMPLING), advantage, np.ones((4, 2)))
    assert elsewhere[0].min() > 0.01
