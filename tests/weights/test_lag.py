"""Lag policy: versions served, the distribution of lags, and availability of what is served."""

from collections import Counter

import pytest

from oapl_jax.weights.lag import LagPolicy


def served(policy, steps):
    return [policy.serves(step) for step in range(steps)]


@pytest.mark.parametrize(
    ("mode", "published", "versions"),
    [
        ("window", [0, 3, 6], [0, 0, 0, 3, 3, 3, 6, 6]),
        ("fixed", [*range(8)], [0, 0, 0, 0, 1, 2, 3, 4]),
    ],
)
def test_versions_published_and_served(mode, published, versions):
    policy = LagPolicy(mode, 3, 0)
    assert [s for s in range(8) if policy.publishes(s)] == published
    assert served(policy, 8) == versions


def test_uniform_lags_are_uniform_and_follow_from_seed_and_step():
    policy = LagPolicy("uniform", 3, 7)
    assert all(policy.publishes(s) for s in range(8))
    steps = 2000
    counts = Counter(step - policy.serves(step) for step in range(3, steps))
    assert sorted(counts) == [0, 1, 2, 3]
    assert all(abs(count - steps / 4) < 100 for count in counts.values())  # five deviations
    resumed = LagPolicy("uniform", 3, 7)
    assert [resumed.serves(s) for s in range(90, 100)] == served(policy, 100)[90:]
    assert served(LagPolicy("uniform", 3, 8), 100) != served(policy, 100)
    # It draws from fewer versions at the start.
    draws = [served(LagPolicy("uniform", 3, seed), 3) for seed in range(50)]
    assert [{*versions} for versions in zip(*draws, strict=True)] == [{0}, {0, 1}, {0, 1, 2}]


@pytest.mark.parametrize("resumed_at", [None, 1, 7, 25])
@pytest.mark.parametrize(
    ("mode", "steps", "least", "most"),
    [
        *(("window", 1, 0, 0), ("window", 5, 0, 4)),
        *(("fixed", 0, 0, 0), ("fixed", 4, 4, 4)),
        *(("uniform", 0, 0, 0), ("uniform", 4, 0, 4)),
    ],
)
def test_the_serving_version_is_within_bounds_published_and_kept(
    mode, steps, least, most, resumed_at
):
    """Keeps only the versions of `needs`; a resumed run starts with those of its step."""
    policy, published, most_kept, lags = LagPolicy(mode, steps, 3), set(), 0, []
    for step in range(200):
        if step == resumed_at:
            published = {v for v in policy.needs(step) if v < step}  # `step` is published again
        if policy.publishes(step):
            published.add(step)
        published &= policy.needs(step)
        assert policy.serves(step) in published
        most_kept = max(most_kept, len(published))
        lags.append(step - policy.serves(step))
    assert most_kept == (1 if mode == "window" else steps + 1)
    assert (min(lags[steps:]), max(lags)) == (least, most)
    assert min(lags) >= 0
