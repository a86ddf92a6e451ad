"""Comparators: sampled from the reference policy, or read from a recorded dataset."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
from asking import PROMPT
from etils import epath
from groups import SAMPLING

from oapl_jax.errors import UserError
from oapl_jax.preferences import RecordedComparators, SampledComparators
from oapl_jax.rollout.dataset import DatasetWriter
from oapl_jax.rollout.sampler import Sampled
from oapl_jax.structs import Group, Rollout


def rollout(*tokens):
    return Rollout(np.array(tokens, np.int32), np.zeros(len(tokens), np.float32), 0, "stop")


class CountingSampler:
    """A Sampler whose tokens are version, prompt and sample index; one thread at a time."""

    def __init__(self):
        self.version, self.refreshed, self.inside = -1, [], threading.Lock()

    def refresh(self, version, path):
        self.version = version
        self.refreshed.append((version, path))

    def generate(self, prompts, *, n, sampling):
        assert self.inside.acquire(blocking=False), "two threads at once"
        time.sleep(0.002)
        for prompt in prompts:
            group = [rollout(self.version, prompt.stream_index, i) for i in range(n)]
            yield Sampled(prompt, tuple(group), "", 0.0)
        self.inside.release()


def test_comparators_are_sampled_from_the_reference_by_many_threads():
    sampler, path = CountingSampler(), epath.Path("v0")
    settings = dict(version=0, path=path, count=4, sampling=SAMPLING)
    comparators = SampledComparators(sampler, **settings)
    with ThreadPoolExecutor(16) as threads:
        found = list(threads.map(comparators, [PROMPT] * 16))
    assert [[r.tokens.tolist() for r in of] for of in found] == [[[0, 7, i] for i in range(4)]] * 16
    assert sampler.refreshed == [(0, path)]


def test_comparators_of_a_recorded_dataset(tmp_path):
    directory, about = epath.Path(tmp_path), dict(task="chain_sum", tokenizer="t", group_size=3)
    writer = DatasetWriter(directory, about, groups_per_shard=2, weights_digest=lambda version: "")
    for i in range(5):
        group = tuple(rollout(i, k) for k in range(3))
        prompt = replace(PROMPT, id=f"id{i}", stream_index=i)
        writer.add(Group(prompt, group, np.zeros(3, np.float32)))
    writer.flush()
    comparators = RecordedComparators(directory, about, count=2)
    asked = comparators(replace(PROMPT, id="id3"))
    assert [r.tokens.tolist() for r in asked] == [[3, 0], [3, 1]]
    with pytest.raises(UserError, match="prompt id7"):
        comparators(PROMPT)
    with pytest.raises(UserError, match=r"preferences\.comparators=4"):
        RecordedComparators(directory, about, count=4)
    with pytest.raises(UserError, match=r"preferences\.dataset"):
        RecordedComparators(directory, {**about, "task": "countdown"}, count=2)
