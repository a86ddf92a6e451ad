"""TBA: its optimum, and the gradient of a variance."""

import jax.numpy as jnp
import numpy as np
import pytest
from cases import bound, log_ratios, random_group, run

# A bandit of four responses of two tokens: reference, the policy that samples, and the rewards.
REFERENCE, SAMPLING = np.array([0.4, 0.3, 0.2, 0.1]), np.array([0.1, 0.2, 0.3, 0.4])
REWARDS = np.array([0.0, 1.0, 0.25, -0.5])
BETA = 0.7
OPTIMUM = REFERENCE * np.exp(REWARDS / BETA)
OPTIMUM /= OPTIMUM.sum()
TBA = dict(beta=BETA, group_size=4)
ONES = np.ones((4, 2), np.float32)


def tokens(policy):
    """Log-probs of the two tokens of each response: a third of the nats, and the rest."""
    logp = np.log(np.asarray(policy, np.float64))
    return np.stack([logp / 3, logp * 2 / 3], axis=-1).astype(np.float32)


@pytest.mark.parametrize("chosen", [[0, 1, 2, 3], [1, 1, 3, 2], [0, 3, 3, 3]])
def test_tba_is_solved_by_the_tilted_reference_for_any_group(chosen):
    """Neither log Z nor the loss needs the policy that sampled."""
    objective = bound("tba", **TBA)
    advantage = objective.advantage(jnp.asarray(REWARDS[chosen], jnp.float32))
    pick = lambda policy: tokens(policy)[chosen]
    losses, gradient, _ = run(objective, pick(OPTIMUM), pick(REFERENCE), advantage, ONES)
    np.testing.assert_allclose(losses, 0, atol=1e-12)
    np.testing.assert_allclose(gradient, 0, atol=1e-6)
    losses, _, _ = run(objective, pick(SAMPLING), pick(REFERENCE), advantage, ONES)
    assert losses.max() > 0.01


def test_tbas_gradient_is_that_of_the_groups_variance():
    """VarGrad: the stop-gradient at log Z changes nothing where a group's weights are equal."""
    logp, behavior, _, mask = random_group(5, [6, 1, 4, 9, 3, 7, 2, 5], 9, spread=0.3)
    reward = np.random.default_rng(5).uniform(0, 1, (2, 4)).astype(np.float32)
    objective = bound("tba", **TBA)
    advantage = jnp.concatenate([objective.advantage(jnp.asarray(r)) for r in reward])
    losses, gradient, _ = run(objective, logp, behavior, advantage, mask)

    delta = log_ratios(logp, behavior, mask).reshape(2, 4)
    balance = BETA * delta - reward
    np.testing.assert_allclose(losses.reshape(2, 4).mean(-1), balance.var(-1), rtol=1e-4)
    slope = 2 * BETA * (balance - balance.mean(-1, keepdims=True))
    np.testing.assert_allclose(gradient, slope.reshape(-1, 1) * mask, rtol=1e-3, atol=1e-5)
    # With a prompt's log-ratios shifted alike nothing changes, unlike in the regression of OPMD.
    shifted = logp + np.float32(0.5) / mask.sum(-1, keepdims=True)
    np.testing.assert_allclose(
        run(objective, shifted, behavior, advantage, mask)[0], losses, rtol=1e-3, atol=1e-5
    )


def test_tba_refuses_a_part_of_a_group():
    with pytest.raises(TypeError, match="reshape"):
        run(bound("tba", **TBA), *random_group(6, [2] * 6, 3, spread=0.1))
