"""OAPL against numbers made by hand and in float64, its limits, and its exact minimiser."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import LENGTHS, bound, log_ratios, random_group, run

from configs import objectives
from oapl_jax.objectives import oapl

GROUPS = {
    "one right": [1, 0, 0, 0],
    "three right": [0, 1, 1, 1],
    "graded": [0.3, -0.2, 0.9, 0.55, 0.1],
    "negative": [-3.0, -1.0, -2.5],
    "large": [1e4, -1e4, 9999.5, 0.0],
    "large offset": [10000.0, 10001.0, 10000.5],
    "single": [0.7],
}


def exact_advantage(reward, beta1):
    """r - beta1 log mean exp(r / beta1) in float64."""
    reward = np.asarray(np.float32(reward), np.float64)
    best = reward.max()
    terms = np.exp((reward - best) / beta1)
    return reward - best - beta1 * (np.log(math.fsum(terms)) - np.log(len(reward)))


def advantage(reward, beta1):
    return np.asarray(oapl.advantage(jnp.asarray(reward, jnp.float32), beta1=beta1))


def loss(*arrays, beta2):
    return oapl.loss(*map(jnp.asarray, arrays), beta2=beta2)


@pytest.mark.parametrize(
    ("reward", "beta1", "expected"),
    [
        # V^ = log((1 + e) / 2)
        ([0, 1], 1.0, [-0.6201145069582775, 0.3798854930417225]),
        # 4 right of 8 has the same V^: the 1/G is inside the logarithm
        ([0, 0, 0, 0, 1, 1, 1, 1], 1.0, [-0.6201145069582775] * 4 + [0.3798854930417225] * 4),
        # V^ = 0.5 log((3 + e^2) / 4)
        ([0, 0, 1, 0], 0.5, [-0.4772294] * 2 + [0.5227706] + [-0.4772294]),
        # V^ = 2 log((e^-1 + e^-2 + e^-3) / 3)
        ([-2, -4, -6], 2.0, [-2 + 3.3820126, -4 + 3.3820126, -6 + 3.3820126]),
    ],
)
def test_advantage_by_hand(reward, beta1, expected):
    np.testing.assert_allclose(exact_advantage(reward, beta1), expected, atol=1e-7)
    np.testing.assert_allclose(advantage(reward, beta1), expected, atol=1e-6)


@pytest.mark.parametrize("beta1", [1e-3, 0.05, 1.0, 40.0, 1e6])
@pytest.mark.parametrize("name", GROUPS)
def test_advantage_in_float64(name, beta1):
    found, scale = advantage(GROUPS[name], beta1), max(1.0, np.ptp(GROUPS[name]))
    # At beta1 = 1e6 the plain float64 formula itself is only good to 1e6 * 2^-52.
    np.testing.assert_allclose(found, exact_advantage(GROUPS[name], beta1), atol=3e-7 * scale)
    assert found.dtype == np.float32
    assert found.mean() <= 1e-6 * scale


@pytest.mark.parametrize("name", GROUPS)
def test_the_value_goes_from_the_best_reward_to_the_mean_reward(name):
    reward = np.asarray(GROUPS[name], np.float32).astype(np.float64)
    scale = max(1.0, np.ptp(reward))
    # V^ is between max - beta1 log G and max, and at most mean + (max - min)^2 / (8 beta1).
    np.testing.assert_allclose(advantage(reward, 1e-9), reward - reward.max(), atol=1e-6)
    large = 1e7 * scale
    np.testing.assert_allclose(advantage(reward, large), reward - reward.mean(), atol=5e-7 * scale)
    values = [np.mean(reward - advantage(reward, beta1)) for beta1 in (1e-3, 0.1, 1.0, 10.0, 1e3)]
    assert np.all(np.diff(values) <= 1e-6 * scale)


@pytest.mark.parametrize("beta1", [1e-3, 0.7, 1e6])
@pytest.mark.parametrize("value", [0.0, 1.0, 0.1, -3333.3, 1e4])
@pytest.mark.parametrize("size", [1, 3, 8])
def test_equal_rewards_pull_towards_the_anchor_and_nothing_else(size, value, beta1):
    found = advantage([value] * size, beta1)
    np.testing.assert_array_equal(found, 0.0)
    delta = np.linspace(-2, 3, size).astype(np.float32)[:, None]
    losses, _ = loss(delta, np.zeros_like(delta), found, np.ones_like(delta), beta2=0.5)
    np.testing.assert_array_equal(losses, np.square(np.float32(0.5) * delta[:, 0]))


def test_advantage_follows_a_permutation_and_a_shift_of_the_rewards():
    reward = np.array([0.25, -1.5, 2.0, 0.0, 2.0, 1.0], np.float32)
    order = np.array([4, 0, 5, 2, 1, 3])
    found = advantage(reward, 0.6)
    np.testing.assert_allclose(advantage(reward[order], 0.6), found[order], atol=1e-6)
    np.testing.assert_allclose(advantage(reward + 8192, 0.6), found, atol=1e-6)


# Two responses of 3 and 2 tokens; the fourth place is padding.
LOGP = np.array([[-1.0, -2.0, -0.5, 7.0], [-0.25, -0.75, 9.0, 9.0]], np.float32)
BEHAVIOR = np.array([[-1.5, -1.0, -1.0, 3.0], [-1.0, -1.0, 2.0, 0.0]], np.float32)
MASK = np.array([[1, 1, 1, 0], [1, 1, 0, 0]], np.float32)


def test_loss_gradient_and_metrics_by_hand():
    advantages = np.array([0.5, -0.25], np.float32)
    losses, metrics = loss(LOGP, BEHAVIOR, advantages, MASK, beta2=0.1)
    # log-ratios: -3.5 + 3.5 = 0 and -1 + 2 = 1
    np.testing.assert_allclose(metrics["log_ratio"], [0.0, 1.0], atol=1e-6)
    np.testing.assert_allclose(metrics["residual"], [-0.5, 0.35], atol=1e-6)
    np.testing.assert_allclose(metrics["target_log_ratio"], [5.0, -2.5], atol=1e-6)
    np.testing.assert_allclose(losses, [0.25, 0.1225], atol=1e-6)

    total = lambda logp, behavior, adv: loss(logp, behavior, adv, MASK, beta2=0.1)[0].sum()
    to_logp, to_behavior, to_advantage = jax.grad(total, (0, 1, 2))(LOGP, BEHAVIOR, advantages)
    # 2 beta2 (beta2 Delta - A) on every token of the response
    np.testing.assert_allclose(to_logp, [[-0.1, -0.1, -0.1, 0], [0.07, 0.07, 0, 0]], atol=1e-7)
    np.testing.assert_array_equal(to_behavior, 0.0)
    np.testing.assert_array_equal(to_advantage, 0.0)


# A bandit of nine responses of two tokens, whose lagged policy is a multiple of 1/16: a group that
# holds each response that often has V^ = V*, exactly.
FIRST = np.array([4, 8, 4]) / 16
SECOND = np.array([[1, 1, 2], [2, 1, 1], [1, 2, 1]]) / 4
LAGGED = FIRST[:, None] * SECOND
REWARD = np.array([[0.0, 1.0, -0.5], [2.0, 0.3, 0.0], [1.0, -1.0, 0.5]])
BETA = 0.7
OPTIMUM = LAGGED * np.exp(REWARD / BETA)
OPTIMUM /= OPTIMUM.sum()


def token_logps(policy):
    """[9, 2] log-probabilities of each response's tokens under logits (first[3], second[3, 3])."""
    first, second = jax.nn.log_softmax(policy[0]), jax.nn.log_softmax(policy[1], axis=-1)
    return jnp.stack([jnp.repeat(first, 3), second.ravel()], axis=-1)


def exact_advantages():
    """Of each response, from a group that holds them in the lagged policy's proportions."""
    counts = np.rint(LAGGED * 16).astype(int).ravel()
    group = np.repeat(REWARD.ravel(), counts)
    return advantage(group, BETA)[np.cumsum(counts) - 1]


def bandit_loss(policy, sampling, advantages):
    behavior = token_logps((jnp.log(FIRST), jnp.log(SECOND)))
    losses, _ = loss(token_logps(policy), behavior, advantages, np.ones((9, 2)), beta2=BETA)
    return jnp.sum(sampling * losses)


def test_the_optimum_of_the_bandit_is_the_tilted_lagged_policy():
    """beta log(pi* / pi_lag) is the advantage, and pi* beats every other policy."""
    expected = BETA * np.log(OPTIMUM / LAGGED).ravel()
    np.testing.assert_allclose(exact_advantages(), expected, atol=1e-6)
    value = lambda p: np.sum(p * REWARD) - BETA * np.sum(p * np.log(p / LAGGED))
    rng = np.random.default_rng(3)
    for other in rng.dirichlet(np.ones(9), 100).reshape(-1, 3, 3):
        assert value(other) < value(OPTIMUM)


SAMPLING = {
    "lagged": LAGGED.ravel(),
    "uniform": np.full(9, 1 / 9),
    "mostly the worst": np.where(REWARD.ravel() < 0.2, 0.24, 0.008),
    "mostly one response": np.array([0.84] + [0.02] * 8),
}


@pytest.mark.parametrize("weights", SAMPLING.values(), ids=SAMPLING)
def test_the_minimiser_is_the_same_under_any_sampling_distribution(weights):
    weights, advantages = weights / weights.sum(), exact_advantages()

    # At pi* loss and gradient vanish.
    there = jnp.log(OPTIMUM.sum(1)), jnp.log(OPTIMUM / OPTIMUM.sum(1, keepdims=True))
    loss, gradient = jax.value_and_grad(bandit_loss)(there, weights, advantages)
    assert loss < 1e-11
    np.testing.assert_allclose(np.concatenate(jax.tree.leaves(gradient), None), 0, atol=1e-6)

    # Gradient descent from a wrong policy gets there.
    start = (jnp.array([0.5, -1.0, 0.3]), jnp.array([[0.0, 2, 1], [-1.0, 0, 1], [0.0, 0.5, -2]]))
    optimizer = optax.adam(optax.cosine_decay_schedule(0.05, 3000))

    @jax.jit
    def descend(policy):
        def step(carry, _):
            policy, state = carry
            loss, gradient = jax.value_and_grad(bandit_loss)(policy, weights, advantages)
            updates, state = optimizer.update(gradient, state)
            return (optax.apply_updates(policy, updates), state), loss

        return jax.lax.scan(step, (policy, optimizer.init(policy)), length=3000)

    (policy, _), losses = descend(start)
    assert losses[0] > 0.05
    found = np.exp(np.asarray(token_logps(policy)).sum(-1)).reshape(3, 3)
    np.testing.assert_allclose(found, OPTIMUM, atol=1e-4)


def test_a_star_po_is_oapl_at_the_reference():
    group = random_group(0, LENGTHS, 9, spread=0.2)
    # The reference stands in place of behavior_logp.
    assert objectives.objective("a_star_po").denominator == "reference"
    found, theirs = bound("a_star_po", beta1=0.7, beta2=0.2), bound("oapl", beta1=0.7, beta2=0.2)
    jax.tree.map(np.testing.assert_array_equal, run(found, *group), run(theirs, *group))
    np.testing.assert_array_equal(found.advantage(group[2]), theirs.advantage(group[2]))


def test_length_exponent_0_is_oapl_and_1_the_mean_over_tokens():
    logp, behavior, advantage, mask = group = random_group(1, LENGTHS, 9, spread=0.4)
    plain = run(bound("oapl", beta2=0.2), *group)
    found = run(bound("oapl_length", beta2=0.2, length_exponent=0.0), *group)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6), found, plain)
    delta = log_ratios(logp, behavior, mask)
    for exponent in (0.5, 1.0):
        objective = bound("oapl_length", beta2=0.2, length_exponent=exponent)
        losses, gradient, metrics = run(objective, *group)
        beta = 0.2 / np.array(LENGTHS) ** exponent
        np.testing.assert_allclose(losses, (beta * delta - advantage) ** 2, rtol=1e-4)
        slope = 2 * beta * (beta * delta - advantage)
        np.testing.assert_allclose(gradient, slope[:, None] * mask, rtol=1e-4)
        np.testing.assert_allclose(metrics["target_log_ratio"], advantage / beta, rtol=1e-5)
