"""The lag policy: which version serves, how far it lags, and that it is there when it is needed."""

from collections import Counter

import pytest

from oapl_jax.errors import UserError
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


def lags(policy, steps):
    return [step - policy.serves(step) for step in range(steps)]


def test_window_publishes_every_so_many_steps_and_serves_until_the_next():
    policy = LagPolicy("window", 3, 0)
    assert [s for s in range(8) if policy.publishes(s)] == [0, 3, 6]
    assert served(policy, 8) == [0, 0, 0, 3, 3, 3, 6, 6]
    assert lags(policy, 8) == [0, 1, 2, 0, 1, 2, 0, 1]


def test_fixed_serves_the_version_so_many_steps_behind():
    policy = LagPolicy("fixed", 3, 0)
    assert all(policy.publishes(s) for s in range(8))
    assert served(policy, 8) == [0, 0, 0, 0, 1, 2, 3, 4]
    assert lags(policy, 8) == [0, 1, 2, 3, 3, 3, 3, 3]


def test_uniform_draws_every_lag_alike_from_seed_and_step():
    policy = LagPolicy("uniform", 3, 7)
    assert all(policy.publishes(s) for s in range(8))
    steps = 2000
    counts = Counter(lags(policy, steps)[3:])
    assert sorted(counts) == [0, 1, 2, 3]
    assert all(abs(count - steps / 4) < 100 for count in counts.values())  # five deviations
    # A resumed run asks from the middle: the answer depends on nothing before.
    assert [LagPolicy("uniform", 3, 7).serves(s) for s in range(90, 100)] == served(policy, 100)[
        90:
    ]
    assert served(LagPolicy("uniform", 3, 8), 100) != served(policy, 100)


def test_uniform_starts_with_what_there_is():
    draws = [served(LagPolicy("uniform", 3, seed), 3) for seed in range(50)]
    assert {d[0] for d in draws} == {0}
    assert {d[1] for d in draws} == {0, 1}
    assert {d[2] for d in draws} == {0, 1, 2}


@pytest.mark.parametrize("policy", POLICIES, ids=NAMES)
def test_lag_stays_within_its_bounds_and_reaches_them(policy):
    most = policy.steps - 1 if policy.mode == "window" else policy.steps
    found = lags(policy, 200)
    assert max(found) == most
    assert min(found) >= 0
    least = most if policy.mode == "fixed" else 0
    assert min(found[policy.steps :]) == least


@pytest.mark.parametrize("resumed_at", [None, 1, 7, 25])
@pytest.mark.parametrize("policy", POLICIES, ids=NAMES)
def test_what_serves_was_published_and_not_collected(policy, resumed_at):
    """A run that keeps only what `needs` names; a resumed one starts from what that step needs."""
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
def test_needs_names_what_may_serve_and_no_more(policy):
    for step in range(policy.steps + 1, 40):
        needs = policy.needs(step)
        assert max(needs) <= step
        later = {policy.serves(s) for s in range(step, step + 200)}
        assert {v for v in later if v <= step} <= needs
        if policy.mode != "uniform":
            assert needs <= later | {step}


@pytest.mark.parametrize(
    ("mode", "steps", "message"),
    [
        ("windows", 4, r"lag\.mode='windows' .* window, fixed, uniform"),
        ("window", 0, r"lag\.steps=0 is too small; lag\.mode=window needs at least 1"),
        ("fixed", -1, r"lag\.steps=-1 is too small; lag\.mode=fixed needs at least 0"),
        ("uniform", -1, r"lag\.steps=-1 is too small; lag\.mode=uniform needs at least 0"),
    ],
)
def test_impossible_policies_are_refused_by_name(mode, steps, message):
    with pytest.raises(UserError, match=message):
        LagPolicy(mode, steps, 0)
