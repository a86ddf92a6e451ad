"""The stop of a run that is never paid: a verifier or a format that no response meets, or a task
that is too hard."""

from collections.abc import Callable
from typing import Any

import numpy as np

from oapl_jax.errors import NoReward
from oapl_jax.structs import Group, Rollout

RESPONSES = 3  # of the last group that are shown
CHARACTERS = 600  # of a prompt or a response; what is longer is shown without its middle


class Unpaid:
    """Counts the groups since the last one with a reward.

    Args:
      limit: so many in a row end the run; 0: no number does.
      decode: token ids -> text.

    `count` is part of a run's state.
    """

    def __init__(self, *, limit: int, decode: Callable[[Any], str]):
        self._limit, self._decode = limit, decode
        self.count = 0

    def note(self, group: Group) -> None:
        """Takes a group of rewards into account.

        Raises:
          NoReward: if it is the last of `limit` without any.
        """
        self.count = 0 if np.any(group.reward) else self.count + 1
        if self._limit and self.count >= self._limit:
            raise NoReward(self._message(group))

    def _message(self, group: Group) -> str:
        prompt, rollouts = group.prompt, group.rollouts[:RESPONSES]
        parts = [
            f"all rewards of the last {self.count} groups are 0 (rollout.unpaid_groups="
            f"{self._limit}): either the task is too hard for this policy, or its responses do not "
            "have the form that the verifier reads; these are of the last group",
            f"--- prompt {prompt.id}\n{shortened(self._decode(prompt.tokens))}",
            f"--- reference\n{shortened(prompt.answer)}",
            *(self._response(rollout) for rollout in rollouts),
        ]
        return "\n".join(parts)

    def _response(self, rollout: Rollout) -> str:
        about = f"{len(rollout.tokens)} tokens, finish reason {rollout.finish_reason}"
        return f"--- response of {about}\n{shortened(self._decode(rollout.tokens))}"


def shortened(text: str) -> str:
    """Begin and end of a long text."""
    half = CHARACTERS // 2
    return text if len(text) <= CHARACTERS else f"{text[:half]}\n[..]\n{text[-half:]}"
