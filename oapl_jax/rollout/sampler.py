"""What a worker asks of anything that can sample: the embedded decoder, or a fleet of servers."""

import dataclasses
from collections.abc import Iterable, Iterator
from typing import Protocol

from etils import epath

from oapl_jax.errors import UserError
from oapl_jax.structs import Prompt, Rollout


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How tokens are drawn.

    Attributes:
      temperature: divides the logits; 0 takes the most likely token, and then log-probs are those
        at temperature 1.
      top_p: only the smallest set of tokens with at least this probability; 1 switches it off.
      top_k: only the k most likely tokens; 0 switches it off.
      max_response_tokens: a response that has not stopped by then is cut off ("length").

    Raises:
      UserError: for values that leave no token to draw.
    """

    temperature: float
    top_p: float
    top_k: int
    max_response_tokens: int

    def __post_init__(self):
        for name, value, fits, range_ in (
            ("temperature", self.temperature, self.temperature >= 0, "at least 0"),
            ("top_p", self.top_p, 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("top_k", self.top_k, self.top_k >= 0, "at least 0"),
            (
                "max_response_tokens",
                self.max_response_tokens,
                self.max_response_tokens >= 1,
                "at least 1",
            ),
        ):
            if not fits:
                raise UserError(f"rollout.{name}={value} is not possible; it must be {range_}")


@dataclasses.dataclass(frozen=True)
class Attempt:
    """A request for a group that came to nothing.

    Attributes:
      server: that was asked.
      version: that it should have sampled from.
      reason: "failed" (an error, a wrong answer), "aborted" (given up for a new version) or "mixed"
        (its responses span two versions).
      seconds: that it took.
    """

    server: str
    version: int
    reason: str
    seconds: float


@dataclasses.dataclass(frozen=True)
class Sampled:
    """What became of one prompt.

    Attributes:
      prompt: as it was handed over.
      rollouts: n of one version; none if every attempt failed.
      server: that sampled them; "local" for the embedded sampler.
      seconds: from the request to the last token.
      attempts: the earlier ones, which came to nothing.
    """

    prompt: Prompt
    rollouts: tuple[Rollout, ...]
    server: str
    seconds: float
    attempts: tuple[Attempt, ...] = ()


class Sampler(Protocol):
    """A policy that may be older than the learner's.

    One thread generates. The prompts, which may refresh, can be taken in another one.
    """

    @property
    def version(self) -> int:
        """The version that prompts taken from now on are sampled from; -1 before the first.

        A sampler of several servers may be made so that some go on with another one for a while;
        each rollout says which it is of.
        """
        ...

    def versions(self) -> set[int]:
        """Every version that it holds or samples from, and whose files must stay. Any thread."""
        ...

    def generate(
        self, prompts: Iterable[Prompt], *, n: int, sampling: Sampling
    ) -> Iterator[Sampled]:
        """Yields each prompt with `n` rollouts, all of one version, in the order they are done.

        Prompts are taken one by one as there is room to sample them, so they may be endless, may
        block, and may call `refresh`.
        """
        ...

    def refresh(self, version: int, path: epath.Path) -> None:
        """Prompts taken from now on are sampled from this published version. Any thread.

        Raises:
          UserError: if the version is missing, damaged, or was not written to its end.
        """
        ...

    def metrics(self) -> dict[str, float]:
        """What it counts itself, under names of its own. Any thread."""
        ...

    def close(self) -> None:
        """Gives up what is in flight, which ends `generate`. Any thread, any number of times."""
        ...
