"""Objectives with importance weights, the KL to a reference and the effective sample size: by hand,
in float64, and their limits."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import INF, bound, log_ratios, random_group, run

from oapl_jax.objectives.grpo import CORRECTIONS
from oapl_jax.objectives.ratios import effective_share, reference_kl
from oapl_jax.objectives.vespo import kernel

OPEN = dict(clip_low=INF, clip_high=INF)  # no clipping
PAPER = dict(clip_low=0.2, clip_high=0.28)
DEFAULTS = {**PAPER, "dual_clip": INF, "correction_cap": 1.5, "correction_floor": 0.6}


def grpo(**changes):
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
def test_grpos_clipping_by_hand(hyper, advantage, tokens, slopes):
    clipped = np.mean(~np.isclose(tokens, -advantage * RATIOS))
    check(grpo(**hyper), advantage, sum(tokens), slopes, clip_fraction=clipped, correction=1.0)


def check(objective, advantage, loss, slopes, **metrics):
    """Loss, gradient and metrics of the response above."""
    losses, gradient, found = run(objective, LOGP, BEHAVIOR, [advantage], MASK)
    np.testing.assert_allclose(losses, [loss], rtol=1e-6)
    np.testing.assert_allclose(gradient, [[*slopes, 0]], rtol=1e-6)
    for name, value in {"log_ratio": np.log(1.25), **metrics}.items():
        np.testing.assert_allclose(found[name], [value], rtol=1e-6, atol=1e-6)


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
def test_grpos_corrections_by_hand(correction, cap, floor, weights, advantage):
    """With the learner as proximal policy rho = 1: the loss is -A sum w, the gradient -A w."""
    objective = grpo(
        proximal="learner", correction=correction, correction_cap=cap, correction_floor=floor
    )
    slopes = -advantage * np.array(weights)
    check(objective, advantage, sum(slopes), slopes, clip_fraction=0, correction=np.mean(weights))


def in_float64(logp, behavior, advantages, mask, **h):
    """Losses and the derivative by each token's log-probability."""
    gap, gain = logp.astype(np.float64) - behavior, advantages.astype(np.float64)[:, None]
    ratio, weight = np.exp(gap), np.ones_like(gap)
    if h["proximal"] == "learner":
        level, _, kind = h["correction"].partition("_")
        u = np.exp((gap * mask).sum(-1, keepdims=True)) if level == "sequence" else ratio
        inside = (h["correction_floor"] <= u) & (u <= h["correction_cap"])
        truncated = np.minimum(u, h["correction_cap"])
        weight = {"": weight, "truncate": truncated, "mask": u * inside}[kind]
        ratio = np.ones_like(gap)
    plain = -gain * ratio
    clipped = -gain * np.clip(ratio, 1 - h["clip_low"], 1 + h["clip_high"])
    most = np.where(gain < 0, -gain * h["dual_clip"], INF)
    losses = weight * np.minimum(np.maximum(plain, clipped), most)
    slopes = np.where((clipped <= plain) & (plain < most), weight * plain, 0.0)
    return (losses * mask).sum(-1), slopes * mask


CASES = [("behavior", "none"), *itertools.product(["learner"], CORRECTIONS)]


@pytest.mark.parametrize("dual_clip", [INF, 1.2])
@pytest.mark.parametrize(("proximal", "correction"), CASES)
def test_grpo_in_float64(proximal, correction, dual_clip):
    group = random_group(0, [6, 1, 4, 9, 3], 9, spread=0.3)
    hyper = {**DEFAULTS, "proximal": proximal, "correction": correction, "dual_clip": dual_clip}
    losses, gradient, _ = run(grpo(**hyper), *group)
    expected, slopes = in_float64(*group, **hyper)
    np.testing.assert_allclose(losses, expected, atol=1e-5)
    np.testing.assert_allclose(gradient, slopes, atol=1e-5)


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_floor_zero_and_cap_infinity_mask_nothing(level):
    group = random_group(3, [5, 3, 8], 8, spread=0.8)
    wide = dict(proximal="learner", correction_cap=INF, correction_floor=0.0)
    kinds = [run(grpo(correction=f"{level}_{k}", **wide), *group)[:2] for k in ("mask", "truncate")]
    jax.tree.map(np.testing.assert_array_equal, *kinds)


@pytest.mark.parametrize(
    ("cap", "floor", "weights"),
    [(1.5, 0.0, [1.5, 0.5, 1.25]), (1.2, 0.8, [1.2, 0.8, 1.2]), (INF, 0.0, RATIOS)],
)
@pytest.mark.parametrize("advantage", [1.0, -0.5])
def test_cispo_by_hand(cap, floor, weights, advantage):
    objective, slopes = bound("cispo", cap=cap, floor=floor), -advantage * np.array(weights)
    found = dict(clip_fraction=np.mean(weights != RATIOS), correction=np.mean(weights))
    check(objective, advantage, slopes @ [-1.0, -2.0, -0.5], slopes, **found)


def test_the_gradients_of_cispo_are_those_of_other_forms():
    """Unclipped PPO without a cap; truncated importance sampling, with the learner as proximal."""
    group = random_group(1, [5, 3, 8], 8, spread=1.5)
    slopes = lambda name, **changes: run(bound(name, **changes), *group)[1]
    without, capped = slopes("cispo", cap=INF), slopes("cispo")
    unclipped = slopes("grpo", clip_low=INF, clip_high=INF)
    assert np.abs(unclipped).max() > 1
    np.testing.assert_allclose(without, unclipped, rtol=1e-5)
    assert np.abs(without - capped).max() > 1
    np.testing.assert_allclose(capped, slopes("grpo_is", correction_cap=5.0), rtol=1e-5)


def by_sequence(logp, behavior, advantages, mask, low, high):
    """Losses and slopes in float64, by the token form: s_t = sg(s) pi_t / sg(pi_t)."""
    lengths = mask.sum(-1)
    ratio = np.exp(log_ratios(logp, behavior, mask) / lengths)
    plain, clipped = -advantages * ratio, -advantages * np.clip(ratio, 1 - low, 1 + high)
    slopes = np.where(plain >= clipped, plain / lengths, 0.0)
    return np.maximum(plain, clipped), slopes[:, None] * mask


@pytest.mark.parametrize(("low", "high"), [(3e-4, 4e-4), (0.1, 0.1), (INF, INF)])
def test_gspo_in_float64(low, high):
    group = random_group(0, [6, 1, 4, 9, 3, 8], 9, spread=0.3)
    objective = bound("gspo", clip_low=low, clip_high=high)
    losses, gradient, metrics = run(objective, *group)
    expected, slopes = by_sequence(*group, low, high)
    np.testing.assert_allclose(losses, expected, rtol=1e-5)
    np.testing.assert_allclose(gradient, slopes, rtol=1e-5)
    clipped = (slopes == 0).all(-1)
    np.testing.assert_array_equal(metrics["clip_fraction"], clipped)
    assert clipped.any() == (high < INF)
    assert not clipped.all()


GOOD, BAD = (2.0, 3.0), (3.0, 2.0)


def phi(weight, pair):
    power, decay = pair
    return np.asarray(weight, np.float64) ** power * np.exp(decay * (1 - np.asarray(weight)))


@pytest.mark.parametrize(
    ("pair", "values"),
    [(GOOD, [1.120, 1, 0.199, 0.002]), (BAD, [0.340, 1, 1.083, 0.159])],
)
def test_vespos_kernel_at_half_one_two_four(pair, values):
    weight = np.array([0.5, 1.0, 2.0, 4.0])
    found = kernel(jnp.log(weight), *map(jnp.float32, pair))
    np.testing.assert_allclose(found, values, atol=6e-4)
    np.testing.assert_allclose(found, phi(weight, pair), rtol=1e-5)


@pytest.mark.parametrize(
    ("good", "bad"),
    [(GOOD, BAD), ((0, 0), (0, 0)), ((1, 0), (1, 0))],
    ids=("default", "REINFORCE", "full importance sampling"),
)
def test_vespo_in_float64(good, bad):
    """The weight is of the whole response: the authors found its mean to collapse."""
    names = ("power_good", "decay_good", "power_bad", "decay_bad")
    objective = bound("vespo", **dict(zip(names, (*good, *bad), strict=True)))
    logp, behavior, advantages, mask = random_group(0, [6, 1, 4, 9, 3], 9, spread=0.3)
    advantages[2] = 0.7
    losses, gradient, metrics = run(objective, logp, behavior, advantages, mask)
    weight = np.exp(log_ratios(logp, behavior, mask))
    expected = np.where(advantages >= 0, phi(weight, good), phi(weight, bad))
    assert 0 < np.sum(advantages > 0) < 5
    np.testing.assert_allclose(metrics["correction"], expected, rtol=1e-4)
    np.testing.assert_allclose(gradient, -(expected * advantages)[:, None] * mask, rtol=1e-4)
    np.testing.assert_allclose(losses, -expected * advantages * (logp * mask).sum(-1), rtol=1e-4)


def two_tokens(first, second):
    """log-probs [4, 2] of the responses (a, b), a and b 0 or 1, from logits of a, and of b by a."""
    of_first, of_second = jax.nn.log_softmax(first), jax.nn.log_softmax(second)
    return jnp.stack([jnp.repeat(of_first, 2), of_second.reshape(-1)], axis=-1)


def test_the_kl_of_two_tokens_is_that_of_each_at_the_sampled_prefixes():
    parts = jnp.array([0.7, -0.4]), jnp.array([[0.2, 1.1], [-0.9, 0.3]])
    reference = two_tokens(jnp.array([-0.2, 0.5]), jnp.array([[0.6, -0.3], [1.2, 0.1]]))
    behavior = two_tokens(jnp.array([-1.0, 0.8]), jnp.array([[0.4, 0.4], [0.3, -0.5]]))

    def expectation(parts, sampling):
        kl = reference_kl(two_tokens(*parts), sampling, reference, jnp.ones((4, 2)))
        return jnp.sum(jnp.exp(sampling.sum(-1)) * kl)

    def by_place(parts, sampling):
        """Both tokens' KL, the second's averaged over prefixes of the sampling policy."""
        logp = two_tokens(*parts)
        of_first = jnp.sum(jnp.exp(logp[::2, 0]) * (logp - reference)[::2, 0])
        of_second = jnp.sum((jnp.exp(logp[:, 1]) * (logp - reference)[:, 1]).reshape(2, 2), axis=-1)
        return of_first + jnp.sum(jnp.exp(sampling[::2, 0]) * of_second)

    def of_responses(parts):
        logp = two_tokens(*parts)
        return jnp.sum(jnp.exp(logp.sum(-1)) * (logp - reference).sum(-1))

    for sampling in (two_tokens(*parts), behavior):
        value, gradient = jax.value_and_grad(expectation)(parts, sampling)
        expected, slope = jax.value_and_grad(by_place)(parts, sampling)
        np.testing.assert_allclose(value, expected, rtol=1e-5)
        for found, right in zip(gradient, slope, strict=True):
            np.testing.assert_allclose(found, right, rtol=1e-4, atol=1e-6)
    whole, logp = of_responses(parts), two_tokens(*parts)
    np.testing.assert_allclose(expectation(parts, logp), whole, rtol=1e-5)  # of responses, if fresh
    assert abs(expectation(parts, behavior) - whole) > 0.01
    fresh, of_whole = jax.grad(expectation)(parts, logp)[0], jax.grad(of_responses)(parts)[0]
    assert np.abs(fresh - of_whole).max() > 0.01  # what the first token does to the second


def test_on_fresh_data_a_tokens_slope_is_its_log_ratio():
    logp, reference, _, mask = random_group(0, [5, 2, 7], 7, spread=0.4)
    total = lambda x: reference_kl(x, logp, reference, mask).sum()
    expected = (logp.astype(np.float64) - reference) * mask
    np.testing.assert_allclose(jax.grad(total)(jnp.asarray(logp)), expected, atol=1e-6)


@pytest.mark.parametrize("gap", [-200.0, 200.0])
def test_far_references_do_not_overflow(gap):
    logp = np.full((2, 4096), -201.0, np.float32) + max(gap, 0)
    kl = lambda x, other: reference_kl(x, other, other, np.ones_like(logp)).sum()
    value, gradient = jax.value_and_grad(kl)(jnp.asarray(logp), logp - gap)
    assert np.isfinite(value)
    assert np.all(np.isfinite(gradient))
    assert kl(logp, logp) == 0


def test_the_effective_share_by_hand_and_in_float64():
    # Weights 1, 2, 3: 36 / (3 * 14).
    np.testing.assert_allclose(effective_share(np.log([1.0, 2.0, 3.0])), 36 / 42, rtol=1e-6)
    log_weight = np.random.default_rng(0).normal(0, 1.5, (4, 16))
    weight = np.exp(log_weight)
    expected = weight.sum() ** 2 / (weight**2).sum() / 64
    assert 0.05 < expected < 0.5
    np.testing.assert_allclose(effective_share(log_weight), expected, rtol=1e-5)


@pytest.mark.parametrize(
    ("log_weight", "share"),
    [
        *((np.full(32, shift), 1) for shift in (0.0, -200.0, 200.0, 1e4)),
        *((size * np.eye(32)[5], 1 / 32) for size in (200.0, 1e6)),
    ],
)
def test_equal_weights_count_in_full_and_one_above_all_as_one_response(log_weight, share):
    np.testing.assert_allclose(effective_share(log_weight), share, rtol=1e-3)
