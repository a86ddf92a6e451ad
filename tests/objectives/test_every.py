"""Properties of every objective: on fresh data, on equal rewards, far away, under a mask."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import INF, bound, random_group, run

from oapl_jax.objectives import OBJECTIVES
from oapl_jax.objectives.grpo import CORRECTIONS

NAMES = tuple(OBJECTIVES)
ANCHOR, TAU, EXPONENT = 0.2, 3.0, 0.5
EIGHT = [6, 1, 4, 9, 3, 7, 2, 5]  # lengths of two groups of four
# Every loss, GRPO's with every correction.
LOSSES = [(name, {}) for name in NAMES] + [("grpo_is", {"correction": c}) for c in CORRECTIONS]
every_loss = pytest.mark.parametrize(("name", "changes"), LOSSES, ids=str)
# And without caps.
OPEN = dict(clip_low=INF, clip_high=INF, correction_cap=INF, correction_floor=0.0)
FAR = [*LOSSES, ("grpo", OPEN), *(("grpo_is", {**OPEN, "correction": c}) for c in CORRECTIONS)]

# On data of the policy itself each token's slope is -A times this, for a response of n tokens.
FRESH = {
    "oapl": lambda n: 2 * ANCHOR,
    "oapl_length": lambda n: 2 * ANCHOR / n**EXPONENT,
    "a_star_po": lambda n: 2 * ANCHOR,
    "tba": lambda n: 2 * ANCHOR,
    "prosper": lambda n: 4 * ANCHOR * 4 / 3,  # each pair counts for both, among three others
    "opmd_trinity": lambda n: 1 / (1 + TAU),
    "gspo": lambda n: 1 / n,
}


def anchored(name):
    return bound(name, anchor=ANCHOR, **({"tau": TAU} if name == "opmd_trinity" else {}))


@pytest.mark.parametrize("name", NAMES)
def test_on_fresh_data_every_objective_is_reinforce_with_its_advantage(name):
    logp, _, advantages, mask = random_group(0, EIGHT, 9, spread=0)
    advantages -= np.repeat(advantages.reshape(2, 4).mean(-1), 4)  # a pair has only differences
    losses, gradient, metrics = run(anchored(name), logp, logp, advantages, mask)
    factor = FRESH.get(name, lambda n: 1.0)
    expected = -advantages[:, None] * mask * [[factor(n)] for n in EIGHT]
    np.testing.assert_allclose(gradient, expected, rtol=1e-5)
    assert losses.shape == (8,)
    assert {value.shape for value in metrics.values()} <= {(8,)}


def test_off_policy_objectives_go_their_own_ways():
    """No two names with different losses have the same gradient on stale data."""
    group = random_group(1, [60] * 8, 60, spread=0.2)
    gradients = {name: run(anchored(name), *group)[1] for name in NAMES}
    families = (
        {"oapl", "a_star_po"},  # which differ in the denominator
        {"grpo_is", "rloo"},  # which differ in the advantage
        {"dr_grpo", "maxrl"},
        {"mixed", "sft", "asymre"},
    )
    for name, mine in gradients.items():
        same = {other for other, theirs in gradients.items() if np.allclose(theirs, mine)}
        assert same == next((f for f in families if name in f), {name})


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("value", [0.0, 1.0])
def test_equal_rewards_have_no_advantage_unless_answers_are_imitated(name, value):
    found = np.asarray(bound(name).advantage(jnp.full(8, value)))
    imitated = {"sft": value, "mixed": 0.1 * value, "asymre": 0.1}
    np.testing.assert_allclose(found, np.full(8, imitated.get(name, 0.0)), atol=1e-7)
    if name not in imitated:
        np.testing.assert_array_equal(found, 0.0)


REGRESSIONS = ("oapl", "oapl_length", "a_star_po", "tba", "prosper", "opmd_kimi")


@pytest.mark.parametrize("name", NAMES)
def test_without_an_advantage_only_an_anchor_pulls(name):
    logp, behavior, _, mask = random_group(2, EIGHT, 9, spread=0.3)
    _, gradient, _ = run(bound(name), logp, behavior, np.zeros(8, np.float32), mask)
    assert np.any(gradient != 0) == (name in REGRESSIONS)


@pytest.mark.parametrize(("name", "changes"), FAR, ids=str)
@pytest.mark.parametrize("gap", [-200.0, 200.0])
def test_far_policies_and_long_responses_do_not_overflow(name, changes, gap):
    """200 nats a token, and 16k tokens of them."""
    logp = np.full((4, 16384), -201.0, np.float32) + max(gap, 0)
    advantages, ones = np.array([1.0, -1.0, 0.5, -0.5], np.float32), np.ones_like(logp)
    objective = bound(name, **changes)
    for mask in (ones, ones * (np.arange(16384) < 1)):
        found = run(objective, logp, logp - gap, advantages, mask)
        assert all(np.isfinite(x).all() for x in jax.tree.leaves(found))


@every_loss
@pytest.mark.parametrize("garbage", [1e30, np.nan, -np.inf])
def test_masked_tokens_have_neither_value_nor_gradient(name, changes, garbage):
    logp, behavior, advantages, _ = random_group(3, [7] * 4, 7, spread=0.1)
    mask = np.array([[1, 1, 0, 0, 1, 1, 0], [1] * 7, [0, 1] + [0] * 5, [1] + [0] * 6], np.float32)
    objective = bound(name, **changes)
    clean = run(objective, logp * mask, behavior * mask, advantages, mask)
    logp, behavior = (np.where(mask > 0, x, np.float32(garbage)) for x in (logp, behavior))
    found = run(objective, logp, behavior, advantages, mask)
    jax.tree.map(np.testing.assert_array_equal, found, clean)
    assert np.all(found[1][mask == 0] == 0)
    assert np.any(found[1] != 0)


@every_loss
def test_losses_follow_a_permutation_of_whole_groups(name, changes):
    group, objective = random_group(4, EIGHT, 9, spread=0.2), bound(name, **changes)
    order = np.array([6, 4, 7, 5, 2, 0, 3, 1])
    losses, gradient, _ = run(objective, *group)
    moved, moved_gradient, _ = run(objective, *(x[order] for x in group))
    np.testing.assert_allclose(moved, losses[order], rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(moved_gradient, gradient[order], rtol=1e-4, atol=1e-6)


@every_loss
def test_only_the_policy_gets_a_gradient(name, changes):
    logp, behavior, advantages, mask = map(jnp.asarray, random_group(5, EIGHT, 9, spread=0.2))
    objective = bound(name, **changes)
    total = lambda b: objective.loss(logp, b, advantages, mask)[0].sum()
    np.testing.assert_array_equal(jax.grad(total)(behavior), 0.0)
    of_reward = jax.grad(lambda r: jnp.sum(objective.advantage(r) ** 2))(jnp.eye(4)[0])
    np.testing.assert_array_equal(of_reward, 0.0)


@every_loss
def test_sums_are_made_in_float32(name, changes):
    *both, advantages, mask = random_group(6, [4096, 3000, 5, 800], 4096, spread=0.02)
    narrow = [jnp.asarray(x, jnp.bfloat16) for x in both]
    wide = [np.asarray(x, np.float32) for x in narrow]
    found, expected = (run(bound(name, **changes), *x, advantages, mask)[0] for x in (narrow, wide))
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, expected)
