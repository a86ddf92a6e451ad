"""The Sampler protocol: the embedded decoder, or a fleet of servers."""

import dataclasses
from collections.abc import Iterable, Iterator
from typing import Protocol

from etils import epath

from oapl_jax.structs import Prompt, Rollout


@dataclasses.dataclass(frozen=True)
class Sampling:
    """Distribution of tokens, and the longest response."""

    temperature: float  # divides the logits; 0 takes the most likely token, with log-probs at 1
    top_p: float  # the smallest set of tokens with at least this probability; 1 switches it off
    top_k: int  # the k most likely tokens; 0 switches it off
    max_response_tokens: int  # longer responses are truncated ("length")


@dataclasses.dataclass(frozen=True)
class Attempt:
    """A failed request for a group.

    The reason is "failed" (an error, a malformed response), "aborted" (for a new version) or
    "mixed" (the responses span two versions).
    """

    server: str
    version: int  # that the server should have sampled from
    reason: str
    seconds: float


@dataclasses.dataclass(frozen=True)
class Sampled:
    """The rollouts of one prompt."""

    prompt: Prompt  # as given to `generate`
    rollouts: tuple[Rollout, ...]  # n of one version; none if every attempt failed
    server: str  # "local" for the embedded sampler
    seconds: float  # from the request to the last token
    attempts: tuple[Attempt, ...] = ()  # failed requests before


class Sampler(Protocol):
    """Samples a policy that may be older than the learner's.

    One thread calls `generate`; it may take the prompts, which may call `refresh`, in another one.
    """

    @property
    def version(self) -> int:
        """Version of prompts taken from now on, by servers that may lag; -1 before the first."""
        ...

    def versions(self) -> set[int]:
        """Versions in use, whose files must stay. Any thread."""
        ...

    def generate(
        self, prompts: Iterable[Prompt], *, n: int, sampling: Sampling
    ) -> Iterator[Sampled]:
        """Yields each prompt with `n` rollouts of one version, in the order of completion.

        Prompts are taken one by one as there is room; they may be endless, or block.
        """
        ...

    def refresh(self, version: int, path: epath.Path) -> None:
        """Samples prompts taken from now on from this published version. Any thread.

        Raises a UserError if the version is missing, damaged or incomplete.
        """
        ...

    def metrics(self) -> dict[str, float]:
        """Metrics of this sampler, by name. Any thread."""
        ...

    def close(self) -> None:
        """Aborts requests in flight, which ends `generate`. Idempotent; any thread."""
        ...
