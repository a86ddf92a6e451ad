"""GRPO with every correction against numbers made by hand, a loop in float64, and its limits."""

import itertools

import numpy as np
import pytest
from cases import INF, bound, random_group, run

from oapl_jax.objectives.grpo import CORRECTIONS

OPEN = dict(clip_low=INF, clip_high=INF)  # no clipping
PAPER = dict(clip_low=0.2, clip_high=0.28)
DEFAULTS = {**PAPER, "dual_clip": INF, "correction_cap": 1.5, "correction_floor": 0.6}


def of(**changes):
    return bound("grpo", **{**DEFAULTS, **changes})


# Three tokens with policy / behavior = 2, 1/2, 5/4 (their product is 5/4), then a pad.
RATIOS = np.array([2.0, 0.5, 1.25])
LOGP = np.array([[-1.0, -2.0, -0.5, 5.0]], np.float32)
BEHAVIOR = LOGP - np.log([[*RATIOS, 1e-3]]).astype(np.float32)
MASK = np.array([[1.0, 1.0, 1.0, 0.0]], np.float32)


@pytest.mark.parametrize(
    ("hyper", "advantage", "tokens", "slopes"),
    [
        # A > 0 is clipped above, A < 0 below; a clipped token has no gradient, the others -A rho.
        (PAPER, 1.0, [-1.28, -0.5, -1.25], [0, -0.5, -1.25]),
        (PAPER, -1.0, [2.0, 0.8, 1.25], [2.0, 0, 1.25]),
        (PAPER, 2.0, [-2.56, -1.0, -2.5], [0, -1.0, -2.5]),
        (dict(clip_low=0.2, clip_high=0.2), 1.0, [-1.2, -0.5, -1.2], [0, -0.5, 0]),
        (dict(clip_low=0.6, clip_high=0.2), -1.0, [2.0, 0.5, 1.25], [2.0, 0.5, 1.25]),
        (dict(clip_low=INF, clip_high=0.28), -1.0, [2.0, 0.5, 1.25], [2.0, 0.5, 1.25]),
        (dict(clip_low=0.2, clip_high=INF), 1.0, [-2.0, -0.5, -1.25], [-2.0, -0.5, -1.25]),
        (OPEN, -1.0, [2.0, 0.5, 1.25], [2.0, 0.5, 1.25]),
        # The dual clip bounds what bad responses cost, and leaves good ones alone.
        (dict(**OPEN, dual_clip=1.5), -2.0, [3.0, 1.0, 2.5], [0, 1.0, 2.5]),
        (dict(**OPEN, dual_clip=1.5), 2.0, [-4.0, -1.0, -2.5], [-4.0, -1.0, -2.5]),
        (dict(**PAPER, dual_clip=1.1), -1.0, [1.1, 0.8, 1.1], [0, 0, 0]),
        (dict(**PAPER, dual_clip=1e30), -1.0, [2.0, 0.8, 1.25], [2.0, 0, 1.25]),
    ],
)
def test_clipping_by_hand(hyper, advantage, tokens, slopes):
    losses, gradient, metrics = run(of(**hyper), LOGP, BEHAVIOR, [advantage], MASK)
    np.testing.assert_allclose(losses, [sum(tokens)], rtol=1e-6)
    np.testing.assert_allclose(gradient, [[*slopes, 0]], rtol=1e-6)
    clipped = np.mean(~np.isclose(tokens, -advantage * RATIOS))
    np.testing.assert_allclose(metrics["clip_fraction"], [clipped], atol=1e-6)
    np.testing.assert_allclose(metrics["correction"], [1.0])
    np.testing.assert_allclose(metrics["log_ratio"], [np.log(1.25)], atol=1e-6)


@pytest.mark.parametrize(
    ("correction", "cap", "floor", "weights"),
    [
        ("none", 1.5, 0.6, [1, 1, 1]),
        ("token_truncate", 1.5, 0.6, [1.5, 0.5, 1.25]),
        ("token_truncate", 0.25, 0.6, [0.25, 0.25, 0.25]),
        ("sequence_truncate", 1.5, 0.6, [1.25, 1.25, 1.25]),
        ("sequence_truncate", 1.1, 0.6, [1.1, 1.1, 1.1]),
        ("token_mask", 1.5, 0.6, [0, 0, 1.25]),
        ("token_mask", 1.5, 0.4, [0, 0.5, 1.25]),
        ("token_mask", 2.5, 0.6, [2, 0, 1.25]),
        ("sequence_mask", 1.5, 0.6, [1.25, 1.25, 1.25]),
        ("sequence_mask", 1.1, 0.6, [0, 0, 0]),
        ("sequence_mask", 2.0, 1.3, [0, 0, 0]),
    ],
)
@pytest.mark.parametrize("advantage", [1.0, -0.5])
def test_corrections_by_hand(correction, cap, floor, weights, advantage):
    """With the learner as proximal policy rho = 1: the loss is -A sum w, the gradient -A w."""
    objective = of(
        proximal="learner", correction=correction, correction_cap=cap, correction_floor=floor
    )
    losses, gradient, metrics = run(objective, LOGP, BEHAVIOR, [advantage], MASK)
    np.testing.assert_allclose(losses, [-advantage * sum(weights)], rtol=1e-6)
    np.testing.assert_allclose(gradient, [[*(-advantage * np.array(weights)), 0]], rtol=1e-6)
    np.testing.assert_allclose(metrics["correction"], [np.mean(weights)], rtol=1e-6)
    np.testing.assert_array_equal(metrics["clip_fraction"], [0.0])
    np.testing.assert_allclose(metrics["log_ratio"], [np.log(1.25)], atol=1e-6)


def token_by_token(logp, behavior, advantages, mask, **h):
    """Losses and the derivative by each token's log-probability: loops over float64 numbers."""
    losses, slopes = np.zeros(len(logp)), np.zeros(logp.shape)
    for i, advantage in enumerate(map(float, advantages)):
        tokens = [t for t in range(logp.shape[1]) if mask[i, t]]
        gaps = {t: float(logp[i, t]) - float(behavior[i, t]) for t in tokens}
        for t in tokens:
            if h["proximal"] == "behavior":
                ratio, weight = np.exp(gaps[t]), 1.0
            else:
                ratio = 1.0
                weight = np.exp(sum(gaps.values()) if "sequence" in h["correction"] else gaps[t])
                if "truncate" in h["correction"]:
                    weight = min(weight, h["correction_cap"])
                elif "mask" in h["correction"]:
                    inside = h["correction_floor"] <= weight <= h["correction_cap"]
                    weight = weight if inside else 0.0
                else:
                    weight = 1.0
            plain = -advantage * ratio
            clipped = -advantage * min(max(ratio, 1 - h["clip_low"]), 1 + h["clip_high"])
            most = -advantage * h["dual_clip"] if advantage < 0 else INF
            losses[i] += weight * min(max(plain, clipped), most)
            slopes[i, t] = weight * plain if clipped <= plain < most else 0.0
    return losses, slopes


CASES = [("behavior", "none"), *itertools.product(["learner"], CORRECTIONS)]


@pytest.mark.parametrize("dual_clip", [INF, 1.2])
@pytest.mark.parametrize(("proximal", "correction"), CASES)
def test_loss_and_gradient_equal_a_loop_over_tokens(proximal, correction, dual_clip):
    group = random_group(0, [6, 1, 4, 9, 3], 9, spread=0.3)
    hyper = {**DEFAULTS, "proximal": proximal, "correction": correction, "dual_clip": dual_clip}
    losses, gradient, _ = run(of(**hyper), *group)
    expected_losses, expected_gradient = token_by_token(*group, **hyper)
    np.testing.assert_allclose(losses, expected_losses, atol=1e-5)
    np.testing.assert_allclose(gradient, expected_gradient, atol=1e-5)


@pytest.mark.parametrize(("proximal", "correction"), CASES)
@pytest.mark.parametrize("gap", [-60.0, 60.0])
def test_without_caps_far_policies_do_not_overflow(proximal, correction, gap):
    logp = np.full((2, 16384), -61.0, np.float32) + max(gap, 0)
    limits = dict(correction_cap=INF, correction_floor=0.0, **OPEN)
    objective = of(proximal=proximal, correction=correction, **limits)
    found = run(objective, logp, logp - gap, np.float32([1, -1]), np.ones_like(logp))
    assert all(np.isfinite(x).all() for x in found[:2])


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_floor_zero_and_cap_infinity_mask_nothing(level):
    group = random_group(3, [5, 3, 8], 8, spread=0.8)
    wide = dict(proximal="learner", correction_cap=INF, correction_floor=0.0)
    kinds = [run(of(correction=f"{level}_{k}", **wide), *group)[:2] for k in ("mask", "truncate")]
    np.testing.assert_array_equal(kinds[0][0], kinds[1][0])
    np.testing.assert_array_equal(kinds[0][1], kinds[1][1])
