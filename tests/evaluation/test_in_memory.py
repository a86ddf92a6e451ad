"""An evaluation of a split, worked out by hand."""

import numpy as np
import pytest

from oapl_jax.errors import RunError
from oapl_jax.evaluation import evaluate, interval, table
from oapl_jax.rollout.sampler import Sampled, Sampling
from oapl_jax.structs import Prompt, Rollout

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
    """Yields the prompts in another order than it takes them."""

    version = 11
    fails: tuple[str, ...] = ()  # prompts that come without rollouts
    forgets: tuple[str, ...] = ()  # or not at all

    def generate(self, prompts, *, n, sampling):
        greedy = Sampling(0, 1, 0, SAMPLING.max_response_tokens)
        assert (n, sampling) in ((1, greedy), (4, SAMPLING))
        answers = GREEDY if n == 1 else SAMPLED
        for prompt in reversed(prompts):
            if prompt.id not in self.forgets:
                rollouts = () if prompt.id in self.fails else tuple(answers[prompt.answer])
                yield Sampled(prompt, rollouts, "s", 0.1)


def answer(prompt, rollout):
    return bytes(rollout.tokens.tolist()).decode()


def reward(prompt, rollout):
    right = answer(prompt, rollout) == prompt.answer and rollout.finish_reason == "stop"
    return 1.0 if right else 0.5  # right is what is paid in full


def run(prompts=PROMPTS, ks=(1, 2, 4)):
    options = dict(n=4, ks=ks, sampling=SAMPLING, resamples=200, seed=3)
    return evaluate(ScriptedSampler(), prompts, reward, answer, **options)


def test_an_evaluation_gives_the_numbers_worked_out_by_hand():
    result, tokens = run(), (1 + 1 + 1 + 3) + (2 + 2 + 1 + 1) + 4
    expected = {
        "pass@1": (2 / 4 + 1 / 4 + 0) / 3,
        "pass@2": (5 / 6 + 3 / 6 + 0) / 3,
        "pass@4": 2 / 3,
        "avg@4": 3 / 12,
        "maj@4": (1 + 1 / 2 + 0) / 3,
        "greedy": 2 / 3,
        "reward": (3 + 9 * 0.5) / 12,
        "length": tokens / 12,
        "truncated": 1 / 12,
        "entropy": (0.5 * (tokens - 2) + 2 * 2) / tokens,
        **dict(version=11, prompts=3, samples=4),
    }
    assert {name: result[name] for name in expected} == pytest.approx(expected)
    values = np.array([5 / 6, 3 / 6, 0])
    assert result["pass@2/interval"] == interval(values, resamples=200, seed=3)


@pytest.mark.parametrize("how", ["fails", "forgets"])
def test_a_prompt_that_could_not_be_sampled_ends_the_evaluation(monkeypatch, how):
    monkeypatch.setattr(ScriptedSampler, how, ("b", "c"))
    with pytest.raises(RunError, match=r"2 of 3 .*\bb\b"):
        run()


def test_the_table_shows_a_row_for_each_result():
    before, after = run(prompts=PROMPTS[1:], ks=(1, 4)), run(prompts=PROMPTS[:1], ks=(1, 4))
    head, *rows = (line.split() for line in table({"before": before, "after": after}).split("\n"))
    assert head == ["pass@1", "pass@4", "maj@4", "greedy", "length", "truncated", "entropy"]
    assert rows == [
        ["before", "0.125", "0.500", "0.250", "0.500", "1.250", "0.125", "0.800"],
        ["after", "0.500", "1.000", "1.000", "1.000", "1.500", "0.000", "0.500"],
    ]
