"""GSPO against a loop in float64, finite differences, and PPO on responses of one token."""

import numpy as np
import pytest
from cases import INF, bound, random_group, run

LENGTHS = [6, 1, 4, 9, 3, 8]


def by_sequence(logp, behavior, advantages, mask, low, high):
    """Losses and slopes in float64, by the token form: s_t = sg(s) pi_t / sg(pi_t)."""
    losses, slopes = np.zeros(len(logp)), np.zeros(logp.shape)
    for i, advantage in enumerate(map(float, advantages)):
        n = int(mask[i].sum())
        ratio = np.exp((logp[i, :n].astype(np.float64) - behavior[i, :n]).mean())
        plain, clipped = -advantage * ratio, -advantage * min(max(ratio, 1 - low), 1 + high)
        losses[i] = max(plain, clipped)
        slopes[i, :n] = plain / n if plain >= clipped else 0.0
    return losses, slopes


@pytest.mark.parametrize(("low", "high"), [(3e-4, 4e-4), (0.1, 0.1), (INF, INF)])
def test_loss_and_gradient_equal_a_loop_over_responses(low, high):
    group = random_group(0, LENGTHS, 9, spread=0.3)
    objective = bound("gspo", clip_low=low, clip_high=high)
    losses, gradient, metrics = run(objective, *group)
    expected, slopes = by_sequence(*group, low, high)
    np.testing.assert_allclose(losses, expected, rtol=1e-5)
    np.testing.assert_allclose(gradient, slopes, rtol=1e-5)
    clipped = (slopes == 0).all(-1)
    np.testing.assert_array_equal(metrics["clip_fraction"], clipped)
    assert clipped.any() == (high < INF)
    assert not clipped.all()


def test_the_gradient_is_that_of_finite_differences():
    logp, behavior, advantages, mask = random_group(1, LENGTHS, 9, spread=0.2)
    _, gradient, _ = run(
        bound("gspo", clip_low=INF, clip_high=INF), logp, behavior, advantages, mask
    )
    step = 1e-6
    for i, t in [(0, 0), (1, 0), (3, 8), (5, 2)]:
        up, down = logp.astype(np.float64), logp.astype(np.float64)
        up[i, t] += step
        down[i, t] -= step
        total = lambda x: by_sequence64(x, behavior, advantages, mask).sum()
        np.testing.assert_allclose(
            gradient[i, t], (total(up) - total(down)) / (2 * step), rtol=1e-4
        )


def by_sequence64(logp, behavior, advantages, mask):
    mean = ((logp - behavior) * mask).sum(-1) / mask.sum(-1)
    return -advantages.astype(np.float64) * np.exp(mean)


def test_of_one_token_it_is_ppo():
    group = random_group(2, [1] * 6, 1, spread=0.4)
    mine, theirs = (
        run(bound("gspo", clip_low=0.2, clip_high=0.28), *group),
        run(bound("grpo"), *group),
    )
    for found, expected in zip(mine[:2], theirs[:2], strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_repeating_a_response_leaves_its_ratio():
    logp, behavior, advantages, mask = random_group(3, [4] * 5, 4, spread=0.2)
    losses, _, _ = run(bound("gspo"), logp, behavior, advantages, mask)
    twice = [np.tile(x, 2) for x in (logp, behavior)]
    longer, _, _ = run(bound("gspo"), *twice, advantages, np.tile(mask, 2))
    np.testing.assert_allclose(longer, losses, rtol=1e-6)
