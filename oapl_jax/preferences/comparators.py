"""The responses that a group is compared with, of the reference policy.

The reference never moves, so they may be sampled when they are needed or have been recorded before.
"""

import threading

from etils import epath

from oapl_jax.errors import UserError
from oapl_jax.rollout.dataset import Dataset, differences
from oapl_jax.rollout.sampler import Sampler, Sampling
from oapl_jax.structs import Prompt, Rollout


class SampledComparators:
    """Draws them from a published version, one prompt at a time. Any thread.

    Args:
      sampler: nobody else's.
      version, path: of the reference policy; read for the first prompt.
      count: of each prompt.
      sampling: how tokens are drawn.
    """

    def __init__(
        self, sampler: Sampler, *, version: int, path: epath.Path, count: int, sampling: Sampling
    ):
        self._sampler, self._version, self._path = sampler, version, path
        self._count, self._sampling = count, sampling
        self._lock = threading.Lock()

    def __call__(self, prompt: Prompt) -> tuple[Rollout, ...]:
        with self._lock:
            if self._sampler.version != self._version:
                self._sampler.refresh(self._version, self._path)
            (sampled,) = self._sampler.generate([prompt], n=self._count, sampling=self._sampling)
        return sampled.rollouts


class RecordedComparators:
    """Takes the first responses of a recorded set's group of the same prompt. Any thread.

    The reference is who recorded the set, whatever its model and temperature.

    Args:
      directory: of a set by oapl_jax.record.
      about: see `dataset.identity`; task and tokenizer must be those of the set.
      count: of each prompt.

    Raises:
      UserError: for a set of another kind, one with smaller groups, or a prompt that it lacks.
    """

    def __init__(self, directory: epath.Path, about: dict, *, count: int):
        self._shards = Dataset(directory)
        theirs = self._shards.manifest["about"]
        differing = differences(about, theirs, ("task", "tokenizer"))
        if differing:
            raise UserError(
                f"the rollouts in {directory} (preferences.dataset) are of another kind than this "
                f"job's ({differing}); name a set of this task and tokenizer"
            )
        if theirs["group_size"] < count:
            raise UserError(
                f"{directory} (preferences.dataset) has groups of {theirs['group_size']}, "
                f"fewer than preferences.comparators={count}; lower it, or record larger groups"
            )
        self._count, self._lock = count, threading.Lock()
        self._place = {group.prompt.id: i for i, group in enumerate(self._shards)}

    def __call__(self, prompt: Prompt) -> tuple[Rollout, ...]:
        if prompt.id not in self._place:
            raise UserError(
                f"{self._shards.directory} (preferences.dataset) has no responses to prompt "
                f"{prompt.id}; record the whole training split with oapl_jax.record"
            )
        with self._lock:
            return self._shards[self._place[prompt.id]].rollouts[: self._count]
