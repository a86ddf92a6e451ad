"""pass@k against counting, the vote, the interval, and an evaluation worked out by hand."""

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest

from oapl_jax.errors import UserError
from oapl_jax.evaluate import evaluate, interval, maj_at_n, pass_at_k, table
from oapl_jax.rollout.sampler import Sampling
from oapl_jax.structs import Prompt, Rollout

# pass@k


@pytest.mark.parametrize("n", range(1, 13))
def test_pass_at_k_is_the_share_of_subsets_that_hold_a_right_one(n):
    for c, k in itertools.product(range(n + 1), range(1, n + 1)):
        exact = 1 - Fraction(math.comb(n - c, k), math.comb(n, k))
        assert pass_at_k(n, c, k) == pytest.approx(float(exact), abs=1e-14)
        if n <= 9:
            subsets = list(itertools.combinations([True] * c + [False] * (n - c), k))
            assert exact == Fraction(sum(map(any, subsets)), len(subsets))


def test_pass_at_k_is_stable_where_binomials_overflow():
    n = 256
    assert math.comb(n, n // 2) > 1e75
    values = np.array([[pass_at_k(n, c, k) for k in range(1, n + 1)] for c in range(n + 1)])
    for c, k in [(1, 1), (1, 128), (3, 17), (128, 2), (128, 128), (255, 1), (200, 56), (200, 57)]:
        exact = 1 - Fraction(math.comb(n - c, k), math.comb(n, k))
        assert values[c, k - 1] == pytest.approx(float(exact), rel=1e-12)
    np.testing.assert_allclose(values[:, 0], np.arange(n + 1) / n, atol=1e-12)
    assert (np.diff(values, axis=0) >= -1e-12).all()  # more right ones, or more tries,
    assert (np.diff(values, axis=1) >= -1e-12).all()  # do no harm
    assert values.min() == 0
    assert values.max() == 1


def test_pass_at_k_is_unbiased():
    """The mean over n samples of a coin is 1 - (1 - p)^k, for every k <= n."""
    n, p = 8, 0.3
    chance = [math.comb(n, c) * p**c * (1 - p) ** (n - c) for c in range(n + 1)]
    for k in range(1, n + 1):
        mean = sum(weight * pass_at_k(n, c, k) for c, weight in enumerate(chance))
        assert mean == pytest.approx(1 - (1 - p) ** k)


@pytest.mark.parametrize(("n", "c", "k"), [(4, 2, 0), (4, 2, 5), (4, 5, 1), (4, -1, 1), (0, 0, 1)])
def test_pass_at_k_refuses_what_has_no_meaning(n, c, k):
    with pytest.raises(ValueError, match=rf"pass@{k} .* n={n}, c={c}"):
        pass_at_k(n, c, k)


# maj@n


@pytest.mark.parametrize(
    ("answers", "correct", "expected"),
    [
        ("aab", [1, 1, 0], 1),
        ("abb", [1, 0, 0], 0),
        ("a", [1], 1),
        ("aabb", [1, 1, 0, 0], 1 / 2),
        ("abc", [0, 1, 0], 1 / 3),
        ("aabbc", [0, 0, 1, 1, 0], 1 / 2),
        ("abcdd", [1, 1, 1, 0, 0], 0),
    ],
)
def test_the_most_frequent_answer_counts_and_ties_share(answers, correct, expected):
    for order in itertools.islice(itertools.permutations(range(len(answers))), 24):
        shuffled = [answers[i] for i in order], [float(correct[i]) for i in order]
        assert maj_at_n(*shuffled) == pytest.approx(expected)


def test_an_answer_is_right_if_one_response_with_it_was():
    """One that was cut off behind the right answer gets no reward; the vote has no order."""
    assert maj_at_n(["a", "a", "b"], [0.0, 1.0, 0.0]) == 1
    assert maj_at_n(["a", "a", "b"], [1.0, 0.0, 0.0]) == 1


def test_a_vote_needs_a_verdict_for_each_answer():
    with pytest.raises(ValueError, match="zip"):
        maj_at_n(["a", "b"], [1.0])


# The interval


def test_the_interval_covers_the_mean_and_has_the_width_of_theory():
    values = (np.arange(400) % 4 == 0).astype(float)
    low, high = interval(values, resamples=4000, seed=0)
    assert low < 0.25 < high
    assert high - low == pytest.approx(2 * 1.96 * np.sqrt(0.25 * 0.75 / 400), rel=0.1)
    assert interval(values, resamples=4000, seed=0) == (low, high)
    assert interval(values, resamples=4000, seed=1) != (low, high)


def test_the_interval_of_a_constant_is_a_point():
    assert interval(np.ones(5), resamples=100, seed=0) == (1, 1)


def test_intervals_cover_the_truth_as_often_as_they_say():
    rng = np.random.default_rng(0)
    covered = 0
    for seed in range(400):
        values = (rng.random(200) < 0.4).astype(float)
        low, high = interval(values, resamples=400, seed=seed)
        covered += low <= 0.4 <= high
    assert 0.92 < covered / 400 < 0.98


# An evaluation

SAMPLING = Sampling(temperature=0.8, top_p=0.9, top_k=5, max_response_tokens=6)


def rollout(text, logp=-0.5, cut=False):
    tokens = np.frombuffer(text.encode(), np.uint8).astype(np.int32)
    reason = "length" if cut else "stop"
    return Rollout(tokens, np.full(len(tokens), logp, np.float32), 11, reason)


SAMPLED = {
    "a": [rollout("a"), rollout("a"), rollout("b"), rollout("ccc")],  # 2 of 4, the vote is right
    "b": [rollout("xx", logp=-2.0), rollout("xx"), rollout("b"), rollout("b", cut=True)],  # 1, tie
    "c": [rollout("x") for _ in range(4)],  # 0 of 4
}
GREEDY = {"a": [rollout("a")], "b": [rollout("b", cut=True)], "c": [rollout("c")]}
PROMPTS = [Prompt(name, i, np.zeros(1, np.int32), name, name, "t") for i, name in enumerate("abc")]


class ScriptedSampler:
    version = 11

    def generate(self, prompts, *, n, sampling):
        if n == 1:
            assert (sampling.temperature, sampling.top_p, sampling.top_k) == (0, 1, 0)
            assert sampling.max_response_tokens == SAMPLING.max_response_tokens
            return [GREEDY[p.answer] for p in prompts]
        assert (n, sampling) == (4, SAMPLING)
        return [SAMPLED[p.answer] for p in prompts]

    def refresh(self, version, path):
        raise AssertionError("an evaluation keeps its weights")


def answer(prompt, rollout):
    return bytes(rollout.tokens.tolist()).decode()


def reward(prompt, rollout):
    right = answer(prompt, rollout) == prompt.answer and rollout.finish_reason == "stop"
    return 0.5 if right else -1.0  # right means above 0


def run(prompts=PROMPTS, n=4, ks=(1, 2, 4)):
    return evaluate(
        ScriptedSampler(),
        prompts,
        reward,
        answer,
        n=n,
        ks=ks,
        sampling=SAMPLING,
        resamples=200,
        seed=3,
    )


def test_an_evaluation_gives_the_numbers_worked_out_by_hand():
    result = run()
    assert result["pass@1"] == pytest.approx((2 / 4 + 1 / 4 + 0) / 3)
    assert result["pass@2"] == pytest.approx((5 / 6 + 3 / 6 + 0) / 3)
    assert result["pass@4"] == pytest.approx(2 / 3)
    assert result["avg@4"] == pytest.approx(3 / 12)
    assert result["maj@4"] == pytest.approx((1 + 1 / 2 + 0) / 3)
    assert result["greedy"] == pytest.approx(2 / 3)
    tokens = (1 + 1 + 1 + 3) + (2 + 2 + 1 + 1) + 4
    assert result["length"] == pytest.approx(tokens / 12)
    assert result["truncated"] == pytest.approx(1 / 12)
    assert result["entropy"] == pytest.approx((0.5 * (tokens - 2) + 2 * 2) / tokens)
    assert (result["version"], result["prompts"], result["samples"]) == (11, 3, 4)
    for k in (1, 2, 4):
        low, high = result[f"pass@{k}/interval"]
        assert 0 <= low < result[f"pass@{k}"] < high <= 1
    assert set(result) == {
        *("pass@1", "pass@2", "pass@4"),
        *("pass@1/interval", "pass@2/interval", "pass@4/interval"),
        *("avg@4", "maj@4", "greedy", "length", "truncated", "entropy"),
        *("version", "prompts", "samples"),
    }


def test_the_intervals_are_those_of_the_problems():
    values = np.array([5 / 6, 3 / 6, 0])
    assert run()["pass@2/interval"] == interval(values, resamples=200, seed=3)


@pytest.mark.parametrize("ks", [(), (0, 1), (1, 5)])
def test_ks_beyond_the_samples_are_refused_by_name_before_any_is_drawn(ks, monkeypatch):
    monkeypatch.setattr(ScriptedSampler, "generate", None)
    with pytest.raises(UserError, match=r"evaluation\.ks=.* evaluation\.n=4"):
        run(ks=ks)


def test_the_table_shows_a_row_for_each_result():
    before, after = run(prompts=PROMPTS[1:], ks=(1, 4)), run(prompts=PROMPTS[:1], ks=(1, 4))
    head, *rows = (line.split() for line in table({"before": before, "after": after}).split("\n"))
    assert head == ["pass@1", "pass@4", "maj@4", "greedy", "length", "truncated", "entropy"]
    assert rows == [
        ["before", "0.125", "0.500", "0.250", "0.500", "1.250", "0.125", "0.800"],
        ["after", "0.500", "1.000", "1.000", "1.000", "1.500", "0.000", "0.500"],
    ]
