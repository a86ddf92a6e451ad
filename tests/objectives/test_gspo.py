"""GSPO against a loop in float64, and PPO on responses of one token."""

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


def test_of_one_token_it_is_ppo():
    group = random_group(2, [1] * 6, 1, spread=0.4)
    mine, theirs = (
        run(bound("gspo", clip_low=0.2, clip_high=0.28), *group),
        run(bound("grpo"), *group),
    )
    for found, expected in zip(mine[:2], theirs[:2], strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-5)
