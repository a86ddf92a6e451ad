"""The ledger: what became of every rollout that was ever asked for.

    python -m oapl_jax.rollout.ledger WORKDIR [--host=N] [--json]

`WORKDIR/ledger.jsonl` only grows: a line for each event of a group, handed to the operating system
at once, so that a kill loses none. A group is requested; it is sampled, with its lengths, rewards
and the attempts that came to nothing before; it ends: trained, expired, zero_variance or failed. A
killed run goes back to a checkpoint: then one more line says to which place of the file, and the
reader gives the groups that were asked for since the end "rewound". The command prints the balance
(account.py); its exit code is 1 if the sums do not.
"""

import argparse
import dataclasses
import json
import os
import time
from collections.abc import Collection
from typing import Any

import numpy as np
from etils import epath

from oapl_jax import multihost as hosts
from oapl_jax.errors import RunError, UserError, exit_with_code
from oapl_jax.rollout import ledger_report as account
from oapl_jax.rollout.sampler import Sampled
from oapl_jax.structs import Group, Prompt

FILE = "ledger.jsonl"


class Ledger:
    """Appends events. Whoever calls holds the buffer's lock.

    Args:
      path: of the file; a last line that a kill has cut is removed.
    """

    def __init__(self, path: epath.Path):
        self._path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        content = path.read_bytes() if path.exists() else b""
        self._size = content.rfind(b"\n") + 1
        self._file = path.open("ab")
        self._file.truncate(self._size)
        self._goes_on = self._size == 0  # whether it is settled where this run begins

    def request(self, prompt: Prompt, n: int) -> None:
        """`n` rollouts are asked for."""
        if not self._goes_on:
            self.resume(0, ())  # the run before was killed before its first checkpoint
        self._write(
            {"event": "request", "stream_index": prompt.stream_index, "prompt": prompt.id, "n": n}
        )

    def sampled(self, sampled: Sampled, reward: np.ndarray) -> None:
        """The rollouts have come, or every attempt failed, which ends the group.

        Args:
          sampled: of the prompt that was requested.
          reward: float32[n], or of no element if there are no rollouts.
        """
        rollouts = sampled.rollouts
        self._write(
            {
                "event": "sampled",
                "stream_index": sampled.prompt.stream_index,
                "server": sampled.server,
                "version": rollouts[0].policy_version if rollouts else None,
                "seconds": round(sampled.seconds, 4),
                "tokens": [len(r.tokens) for r in rollouts],
                "finish": [r.finish_reason for r in rollouts],
                "reward": reward.tolist(),
                "attempts": [dataclasses.astuple(attempt) for attempt in sampled.attempts],
            }
        )

    def end(self, group: Group, end: str, step: int | None) -> None:
        """A sampled group was "trained" at a step, or dropped ("expired", "zero_variance")."""
        self._write(
            {"event": "end", "stream_index": group.prompt.stream_index, "end": end, "step": step}
        )

    def position(self) -> int:
        """The place that belongs into a checkpoint; what stands before it is on disk."""
        os.fsync(self._file.fileno())
        return self._size

    def resume(self, position: int, held: Collection[int]) -> None:
        """The run goes on from a checkpoint.

        Args:
          position: as the checkpoint has it.
          held: draws of the groups in its buffer.

        Raises:
          UserError: if the file does not reach that far.
        """
        if position > self._size:
            raise UserError(
                f"{self._path} has {self._size} bytes but the checkpoint knows of {position}; put "
                "the run's own file back, or give another --workdir"
            )
        self._goes_on = True
        if self._size:
            self._write({"event": "resume", "position": position, "held": sorted(held)})

    def close(self) -> None:
        self._file.close()

    def _write(self, event: dict[str, Any]) -> None:
        event["time"] = round(time.time(), 3)
        line = json.dumps(event, separators=(",", ":")).encode() + b"\n"
        self._file.write(line)
        self._file.flush()
        self._size += len(line)


def rewind(path: epath.Path, position: int) -> None:
    """Ends the ledger of a host that takes no part any more: what it held is sampled again."""
    ledger = Ledger(path)
    ledger.resume(position, ())
    ledger.close()


def main() -> None:
    parser = argparse.ArgumentParser(
        "oapl_jax.rollout.ledger", description="What became of rollouts"
    )
    parser.add_argument("workdir", type=epath.Path, help="of a run, which may be under way")
    parser.add_argument("--host", type=int, default=0, help="each host of a run has its own")
    parser.add_argument("--json", action="store_true", help="everything as one JSON object")
    arguments = parser.parse_args()
    found = account.read(arguments.workdir / hosts.own(FILE, arguments.host))
    summary = account.summary(found)
    print(json.dumps(summary) if arguments.json else account.table(summary))
    if not summary["balanced"]:
        raise RunError(
            f"the sums do not balance: {found.requested} rollouts were requested, "
            f"{sum(summary['balance'].values())} are accounted for"
            + "".join(f"; {fault}" for fault in found.faults[:5])
        )


if __name__ == "__main__":
    exit_with_code(main)
