"""Groups, and a sampler that yields scripted ones."""

import numpy as np

from oapl_jax.rollout.sampler import Sampled, Sampling
from oapl_jax.structs import Group, Prompt, Rollout

SAMPLING = Sampling(1.0, 1.0, 0, 4)
VERSION = 5


def make_group(index, *, version=4, equal=False, size=3, longest=6):
    rng = np.random.default_rng(index)
    rollouts = tuple(
        Rollout(
            rng.integers(0, 99, length).astype(np.int32),
            -rng.exponential(size=length).astype(np.float32),
            version,
            str(rng.choice(["stop", "length"])),
        )
        for length in rng.integers(0, longest, size)
    )
    tokens = rng.integers(0, 99, index % 5).astype(np.int32)
    prompt = Prompt(f"id{index}", index, tokens, 'a "text"\n', "é", "chain_sum")
    reward = np.zeros(size) if equal else np.arange(size)
    return Group(prompt, rollouts, reward.astype(np.float32))


def assert_same_groups(found, expected):
    def arrays(group):
        yield from (group.prompt.tokens, group.reward)
        for rollout in group.rollouts:
            yield from (rollout.tokens, rollout.behavior_logp)

    def scalars(group):
        prompt = {k: v for k, v in vars(group.prompt).items() if k != "tokens"}
        return prompt, [(r.policy_version, r.finish_reason) for r in group.rollouts]

    assert list(map(scalars, found)) == list(map(scalars, expected))
    for mine, theirs in zip(found, expected, strict=True):
        for a, b in zip(arrays(mine), arrays(theirs), strict=True):
            assert a.dtype == b.dtype
            assert a.tobytes() == b.tobytes()


def make_prompts(count):
    none = np.zeros(1, np.int32)
    return [Prompt(f"id{i}", 7 * i, none, f"What is {i}?", f"{i}", "t") for i in range(count)]


class Killed(Exception):
    pass


class ScriptedSampler:
    """A sample is its stream index and index in the group; groups come in a random order.

    `fails` and `stale` are ids of prompts; it is killed when it has yielded `lives` times.
    """

    def __init__(self, seed=0, fails=(), stale=(), lives=10**9):
        self._rng = np.random.default_rng(seed)
        self._fails, self._stale, self._lives = fails, stale, lives
        self.asked = []

    def generate(self, prompts, *, n, sampling):
        assert sampling == SAMPLING
        prompts = list(prompts)
        self.asked += [(p.stream_index, n) for p in prompts]
        for i in self._rng.permutation(len(prompts)):
            if not self._lives:
                raise Killed
            self._lives -= 1
            prompt = prompts[i]
            index, version = prompt.stream_index, VERSION - (prompt.id in self._stale)
            logps = [np.array([-index, -j / 8], np.float32) for j in range(n)]
            rollouts = [
                Rollout(np.array([index, j], np.int32), logp, version, "stop")
                for j, logp in enumerate(logps)
            ]
            yield Sampled(prompt, () if prompt.id in self._fails else tuple(rollouts), "s", 0.1)
