"""Responses of given lengths from the embedded sampler, whichever tokens are sampled, and times of
programs that are compiled already."""

import pathlib
import time
from collections.abc import Callable, Sequence
from typing import Any
from unittest import mock

import numpy as np

from oapl_jax.errors import RunError
from oapl_jax.rollout import local_sampler
from oapl_jax.rollout.local_sampler import LocalSampler
from oapl_jax.rollout.sampler import Sampling
from oapl_jax.structs import Prompt
from oapl_jax.tracking.metrics import CompileClock

FILE = pathlib.Path(__file__).parent / "lengths_smollm2.json"  # see packing.py
GROUP_SIZE, WIDTH = 8, 64  # of the recorded responses; their prompts, padded
CLOCK = CompileClock()


def sample_lengths(
    sampler: LocalSampler, prompts: Sequence[Prompt], lengths: np.ndarray, sampling: Sampling
) -> None:
    """Samples int[N, G] tokens of the responses to N prompts."""
    place = local_sampler.place

    def of_length(slots, prefilled, source, indices, samples, limits, seed):
        limits = lengths[indices, samples].astype(np.int32)
        return place(slots, prefilled, source, indices, samples, limits, seed)

    with mock.patch.object(local_sampler, "place", of_length):
        groups = list(sampler.generate(prompts, n=lengths.shape[1], sampling=sampling))
    sampled = [[len(rollout.tokens) for rollout in group.rollouts] for group in groups]
    np.testing.assert_array_equal(sampled, lengths)


def compiled_seconds(run: Callable[[], Any]) -> float:
    """Seconds of a run; raises a RunError if it compiled a program, whose time would count."""
    programs, start = CLOCK.programs, time.perf_counter()
    run()
    taken = time.perf_counter() - start
    if more := CLOCK.programs - programs:
        raise RunError(f"the timed run compiled {more} programs; warm up with the same work")
    return taken
