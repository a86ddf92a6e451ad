"""The ledger: an event for every rollout that was requested; and the guard against zero rewards.

`WORKDIR/ledger.jsonl` only grows. A group is requested; it is sampled, with its lengths, rewards
and its failed attempts; it ends: trained, expired, zero_variance or failed. A
resumed run appends the position in the file that its checkpoint knows, and the report
(ledger_report.py) gives the groups that were requested since then the state "rewound".
"""

import dataclasses
import time
from collections.abc import Callable, Collection
from typing import Any

import numpy as np
from etils import epath

from oapl_jax.errors import NoReward, UserError
from oapl_jax.files import JsonLines
from oapl_jax.rollout.sampler import Sampled
from oapl_jax.structs import Group, Prompt

FILE = "ledger.jsonl"
RESPONSES = 3  # of the last group, shown by the guard
CHARACTERS = 600  # of a prompt or a response, shown by the guard; the middle is left out


class Ledger:
    """Appends events; each is handed to the operating system at once, so that a kill loses none.

    A last line that a kill has cut is removed. The caller holds a lock.
    """

    def __init__(self, path: epath.Path):
        self._lines = JsonLines(path, exclusive=False)
        self._resumed = not self._lines.size  # whether this run's first position is known

    def request(self, prompt: Prompt, n: int) -> None:
        if not self._resumed:
            self.resume(0, ())  # the run before was killed before its first checkpoint
        self._write("request", prompt, prompt=prompt.id, n=n)

    def sampled(self, sampled: Sampled, reward: np.ndarray) -> None:
        """Records rollouts and their float32[n] rewards; without any, the group ends as failed."""
        rollouts = sampled.rollouts
        self._write(
            "sampled",
            sampled.prompt,
            server=sampled.server,
            version=rollouts[0].policy_version if rollouts else None,
            seconds=round(sampled.seconds, 4),
            tokens=[len(r.tokens) for r in rollouts],
            finish=[r.finish_reason for r in rollouts],
            reward=reward.tolist(),
            attempts=[dataclasses.astuple(attempt) for attempt in sampled.attempts],
        )

    def end(self, group: Group, end: str, step: int | None) -> None:
        """Records that a group was "trained" at a step, or dropped: "expired", "zero_variance"."""
        self._write("end", group.prompt, end=end, step=step)

    def position(self) -> int:
        """Syncs the file; returns its size, which belongs into a checkpoint."""
        self._lines.sync()
        return self._lines.size

    def resume(self, position: int, held: Collection[int]) -> None:
        """Records that the run goes on from a checkpoint with groups `held` in its buffer.

        Raises a UserError if the file is shorter than the checkpoint's `position`.
        """
        if position > self._lines.size:
            raise UserError(
                f"{self._lines.path} has {self._lines.size} bytes but the checkpoint knows of "
                f"{position}; put the run's own file back, or give another --workdir"
            )
        self._resumed = True
        if self._lines.size:
            self._write("resume", None, position=position, held=sorted(held))

    def close(self) -> None:
        self._lines.close()

    def _write(self, event: str, of: Prompt | None, **fields: Any) -> None:
        index = {"stream_index": of.stream_index} if of else {}
        self._lines.append({"event": event, **index, **fields, "time": round(time.time(), 3)})


@dataclasses.dataclass(eq=False, kw_only=True)
class ZeroRewardGuard:
    """Aborts after consecutive groups whose rewards are all zero.

    The verifier is broken, the prompt asks for another format, or the task is too hard.
    """

    limit: int  # such groups; 0 never aborts
    decode: Callable[[Any], str]
    count: int = 0  # groups since the last one with a reward; belongs to a checkpoint

    def note(self, group: Group) -> None:
        """Counts a rewarded group; NoReward, if it is the last of `limit`, shows its responses."""
        self.count = 0 if np.any(group.reward) else self.count + 1
        if not self.limit or self.count < self.limit:
            return
        text = lambda tokens: shortened(self.decode(tokens))
        parts = [
            f"all rewards of the last {self.count} groups are 0 (rollout.max_zero_reward_groups="
            f"{self.limit}): the task is too hard for this policy, or its responses do not have "
            "the form that the verifier reads; the last group is:",
            f"--- prompt {group.prompt.id}\n{text(group.prompt.tokens)}",
            f"--- reference\n{shortened(group.prompt.answer)}",
        ]
        for rollout in group.rollouts[:RESPONSES]:
            about = f"{len(rollout.tokens)} tokens, finish reason {rollout.finish_reason}"
            parts.append(f"--- response of {about}\n{text(rollout.tokens)}")
        raise NoReward("\n".join(parts))


def shortened(text: str) -> str:
    """Keeps the beginning and the end of a long text."""
    half = CHARACTERS // 2
    return text if len(text) <= CHARACTERS else f"{text[:half]}\n[..]\n{text[-half:]}"
