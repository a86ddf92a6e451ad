"""Comparators: sampled from the reference policy, or read from a recorded dataset."""

import threading
import time
from typing import Any

import numpy as np
import pytest
from asking import PROMPT
from etils import epath

from oapl_jax.errors import UserError
from oapl_jax.preferences import RecordedComparators, SampledComparators
from oapl_jax.rollout.dataset import DatasetWriter
from oapl_jax.rollout.sampler import Sampled, Sampling
from oapl_jax.structs import Group, Prompt, Rollout


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
            numbers = [np.array([self.version, prompt.stream_index, i], np.int32) for i in range(n)]
            zeros = np.zeros(3, np.float32)
            yield Sampled(prompt, tuple(Rollout(t, zeros, 0, "stop") for t in numbers), "", 0.0)
        self.inside.release()


def test_comparators_are_sampled_from_the_reference_by_many_threads():
    sampler = CountingSampler()
    sampling = Sampling(temperature=1.0, top_p=1.0, top_k=0, max_response_tokens=3)
    comparators = SampledComparators(
        sampler,
        version=0,
        path=epath.Path("v0"),
        count=4,
        sampling=sampling,  # pyright: ignore
    )
    found: list[Any] = [None] * 16
    ask = lambda i: found.__setitem__(i, comparators(PROMPT))
    threads = [threading.Thread(target=ask, args=(i,)) for i in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [[r.tokens.tolist() for r in of] for of in found] == [[[0, 7, i] for i in range(4)]] * 16
    assert sampler.refreshed == [(0, epath.Path("v0"))]


def test_comparators_of_a_recorded_dataset(tmp_path):
    directory, about = epath.Path(tmp_path), dict(task="chain_sum", tokenizer="t", group_size=3)
    writer = DatasetWriter(directory, about, groups_per_shard=2, weights_digest=lambda version: "")
    for i in range(5):
        prompt = Prompt(f"id{i}", i, PROMPT.tokens, "", "", "chain_sum")
        group = tuple(
            Rollout(np.array([i, k], np.int32), np.zeros(2, np.float32), 0, "stop")
            for k in range(3)
        )
        writer.add(Group(prompt, group, np.zeros(3, np.float32)))
    writer.flush()
    comparators = RecordedComparators(directory, about, count=2)
    asked = Prompt("id3", 99, PROMPT.tokens, "", "", "chain_sum")
    assert [r.tokens.tolist() for r in comparators(asked)] == [[3, 0], [3, 1]]
    with pytest.raises(UserError, match="prompt id7"):
        comparators(PROMPT)
    with pytest.raises(UserError, match=r"preferences\.comparators=4"):
        RecordedComparators(directory, about, count=4)
    with pytest.raises(UserError, match=r"preferences\.dataset"):
        RecordedComparators(directory, {**about, "task": "countdown"}, count=2)
