"""Lag policy: versions served, the distribution of lags, and availability of what is served."""

from collections import Counter

import pytest

from oapl_jax.weights.lag import LagPolicy

POLICIES = [
    LagPolicy("window", 1, 0),
    LagPolicy("window", 5, 0),
    LagPolicy("fixed", 0, 0),
    LagPolicy("fixed", 4, 0),
    LagPolicy("uniform", 0, 0),
    LagPolicy("uniform", 4, 3),
]
NAMES = [f"{p.mode} {p.steps}" for p in POLICIES]


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


def test_uniform_draws_from_fewer_versions_at_the_start():
    draws = [served(LagPolicy("uniform", 3, seed), 3) for seed in range(50)]
    assert [{*versions} for versions in zip(*draws, strict=True)] == [{0}, {0, 1}, {0, 1, 2}]


@pytest.mark.parametrize("resumed_at", [None, 1, 7, 25])
@pytest.mark.parametrize("policy", POLICIES, ids=NAMES)
def test_the_serving_version_was_published_and_not_collected(policy, resumed_at):
    """Keeps only the versions of `needs`; a resumed run starts with those of its step."""
    published, most_kept = set(), 0
    for step in range(60):
        if step == resumed_at:
            published = {v for v in policy.needs(step) if v < step}  # `step` is published again
        if policy.publishes(step):
            published.add(step)
        published &= policy.needs(step)
        assert policy.serves(step) in published
        most_kept = max(most_kept, len(published))
    assert most_kept == (1 if policy.mode == "window" else policy.steps + 1)


@pytest.mark.parametrize("policy", POLICIES, ids=NAMES)
def test_lag_stays_within_its_bounds_and_reaches_them(policy):
    most = policy.steps - 1 if policy.mode == "window" else policy.steps
    found = [step - version for step, version in enumerate(served(policy, 200))]
    assert max(found) == most
    assert min(found) >= 0
    least = most if policy.mode == "fixed" else 0
    assert min(found[policy.steps :]) == least
