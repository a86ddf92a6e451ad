"""What a worker asks of anything that can sample: the embedded decoder, or a fleet of servers."""

import dataclasses
from collections.abc import Sequence
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


class Sampler(Protocol):
    """A policy that may be older than the learner's."""

    @property
    def version(self) -> int:
        """The learner step of the weights that it holds."""
        ...

    def generate(
        self, prompts: Sequence[Prompt], *, n: int, sampling: Sampling
    ) -> list[list[Rollout]]:
        """`n` rollouts for each prompt, all of one prompt from one version."""
        ...

    def refresh(self, version: int, path: epath.Path) -> None:
        """Takes the weights of a published version.

        Raises:
          UserError: if the version is missing, or was not written to its end.
        """
        ...
