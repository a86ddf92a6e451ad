"""What holds for every objective: on fresh data, on equal rewards, far away, under a mask."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import bound, random_group, run, settings

from oapl_jax.objectives import OBJECTIVES

NAMES = tuple(OBJECTIVES)
BETA2, TAU, EXPONENT, CONSTANTS = 0.2, 3.0, 0.5, dict(group_size=4, beta2=0.2, opmd_tau=3.0)
LENGTHS = [6, 1, 4, 9, 3, 7, 2, 5]  # two groups of four

# On data of the policy itself each token's slope is -A times this, for a response of n tokens.
FRESH = {
    "oapl": lambda n: 2 * BETA2,
    "oapl_length": lambda n: 2 * BETA2 / n**EXPONENT,
    "a_star_po": lambda n: 2 * BETA2,
    "tba": lambda n: 2 * BETA2,
    "prosper": lambda n: 4 * BETA2 * 4 / 3,  # each pair counts for both, among three others
    "opmd_trinity": lambda n: 1 / (1 + TAU),
    "gspo": lambda n: 1 / n,
}


@pytest.mark.parametrize("name", NAMES)
def test_on_fresh_data_every_objective_is_reinforce_with_its_advantage(name):
    logp, _, advantages, mask = random_group(0, LENGTHS, 9, spread=0)
    advantages -= np.repeat(advantages.reshape(2, 4).mean(-1), 4)  # a pair has only differences
    losses, gradient, metrics = run(bound(name, **CONSTANTS), logp, logp, advantages, mask)
    factor = FRESH.get(name, lambda n: 1.0)
    expected = -advantages[:, None] * mask * [[factor(n)] for n in LENGTHS]
    np.testing.assert_allclose(gradient, expected, rtol=1e-5)
    assert losses.shape == (8,)
    assert {value.shape for value in metrics.values()} <= {(8,)}


@pytest.mark.parametrize("name", NAMES)
def test_off_policy_objectives_go_their_own_ways(name):
    """No two names with different losses have the same gradient on stale data."""
    group = random_group(1, [60] * 8, 60, spread=0.2)
    mine = run(bound(name, **CONSTANTS), *group)[1]
    same = [n for n in NAMES if np.allclose(run(bound(n, **CONSTANTS), *group)[1], mine)]
    families = (
        {"oapl", "a_star_po"},  # which differ in whose log-probs anchor
        {"grpo_is", "rloo"},  # which differ in the advantage
        {"dr_grpo", "maxrl"},
        {"mixed", "sft", "asymre"},
    )
    assert set(same) == next((f for f in families if name in f), {name})


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("value", [0.0, 1.0])
def test_equal_rewards_have_no_advantage_but_where_answers_are_imitated(name, value):
    found = np.asarray(bound(name).advantage(jnp.full(8, value)))
    imitated = {"sft": value, "mixed": 0.1 * value, "asymre": 0.1}
    np.testing.assert_allclose(found, np.full(8, imitated.get(name, 0.0)), atol=1e-7)
    if name not in imitated:
        np.testing.assert_array_equal(found, 0.0)


ANCHORED = ("oapl", "oapl_length", "a_star_po", "tba", "prosper", "opmd_kimi")


@pytest.mark.parametrize("name", NAMES)
def test_without_an_advantage_only_an_anchor_pulls(name):
    logp, behavior, _, mask = random_group(2, LENGTHS, 9, spread=0.3)
    _, gradient, _ = run(bound(name), logp, behavior, np.zeros(8, np.float32), mask)
    assert np.any(gradient != 0) == (name in ANCHORED)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("gap", [-200.0, 200.0])
def test_far_policies_and_long_responses_do_not_overflow(name, gap):
    """200 nats a token, and 16k tokens of them."""
    logp = np.full((4, 16384), -201.0, np.float32) + max(gap, 0)
    advantages = np.array([1.0, -1.0, 0.5, -0.5], np.float32)
    for mask in (np.ones_like(logp), (np.arange(16384) < 1) * np.ones_like(logp)):
        losses, gradient, metrics = run(bound(name), logp, logp - gap, advantages, mask)
        for values in (losses, gradient, *metrics.values()):
            assert np.all(np.isfinite(values))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("garbage", [1e30, np.nan, -np.inf])
def test_what_is_masked_has_neither_value_nor_gradient(name, garbage):
    logp, behavior, advantages, _ = random_group(3, [7] * 4, 7, spread=0.1)
    mask = np.array([[1, 1, 0, 0, 1, 1, 0], [1] * 7, [0, 1] + [0] * 5, [1] + [0] * 6], np.float32)
    clean = run(bound(name), logp * mask, behavior * mask, advantages, mask)
    logp, behavior = (np.where(mask > 0, x, np.float32(garbage)) for x in (logp, behavior))
    found = run(bound(name), logp, behavior, advantages, mask)
    jax.tree.map(np.testing.assert_array_equal, found, clean)
    assert np.all(found[1][mask == 0] == 0)
    assert np.any(found[1] != 0)


@pytest.mark.parametrize("name", NAMES)
def test_losses_follow_a_permutation_of_whole_groups(name):
    group = random_group(4, LENGTHS, 9, spread=0.2)
    order = np.array([6, 4, 7, 5, 2, 0, 3, 1])
    losses, gradient, _ = run(bound(name), *group)
    moved, moved_gradient, _ = run(bound(name), *(x[order] for x in group))
    np.testing.assert_allclose(moved, losses[order], rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(moved_gradient, gradient[order], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_only_the_policy_gets_a_gradient(name):
    logp, behavior, advantages, mask = map(jnp.asarray, random_group(5, LENGTHS, 9, spread=0.2))
    loss = bound(name).loss
    of_behavior = jax.grad(lambda b: loss(logp, b, advantages, mask)[0].sum())(behavior)
    np.testing.assert_array_equal(of_behavior, 0.0)
    reward = jnp.array([1.0, 0.0, 0.0, 1.0])
    of_reward = jax.grad(lambda r: jnp.sum(bound(name).advantage(r) ** 2))(reward)
    np.testing.assert_array_equal(of_reward, 0.0)


@pytest.mark.parametrize("name", NAMES)
def test_sums_are_made_in_float32(name):
    logp, behavior, advantages, mask = random_group(6, [4096, 3000, 5, 800], 4096, spread=0.02)
    narrow = [jnp.asarray(x, jnp.bfloat16) for x in (logp, behavior)]
    wide = [np.asarray(x, np.float32) for x in narrow]
    found, _, _ = run(bound(name), *narrow, advantages, mask)
    expected, _, _ = run(bound(name), *wide, advantages, mask)
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, expected)


def test_settings_are_those_of_the_configuration():
    assert settings("cispo")["correction_cap"] == 5.0
    assert settings("grpo")["correction_cap"] == 2.0
