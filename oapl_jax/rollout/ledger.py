"""The ledger: an event for every rollout that was requested, and the report of a run's events.

`WORKDIR/ledger.jsonl` is a log (files.py): it only grows. A group is requested; it is sampled, with
its lengths, rewards and its failed attempts; it ends: trained, expired, zero_variance or failed. A
resumed run appends the position in the file that its checkpoint knows, and the report gives the
groups that were requested since then the state "rewound".

The report replays the events into an in-memory SQLite table with one row a rollout and queries it:
the balance of rollouts, the bias of dropping groups, the throughput of each server.
"""

import dataclasses
import json
import sqlite3
import time
from collections import namedtuple
from collections.abc import Callable, Collection
from typing import Any

import numpy as np
from etils import epath

from oapl_jax.errors import NoReward, UserError
from oapl_jax.files import JsonLines, read_log, whole_lines
from oapl_jax.rollout.sampler import Sampled
from oapl_jax.structs import Group, Prompt

FILE = "ledger.jsonl"
RESPONSES = 3  # of the last group, shown by the guard
CHARACTERS = 600  # of a prompt or a response, shown by the guard; the middle is left out
# The first two can still change; a held group is sampled, and in the buffer.
STATES = "in flight", "held", "trained", "expired", "zero_variance", "failed", "reissued", "rewound"

ROLLOUTS = """
PRAGMA journal_mode = OFF;
CREATE TABLE rollouts (
  incarnation, stream_index, attempt, sample, prompt, version, server, seconds, tokens,
  finish_reason, reward, requested, sampled, ended, state, step, reason, sampled_at, ended_at);
CREATE INDEX groups ON rollouts (stream_index, incarnation);
BEGIN;
"""
BIAS = """
SELECT {kind} AS name, count(*) AS rollouts, avg(tokens) AS length,
  avg(finish_reason = 'length') AS truncated, avg(reward) AS reward
FROM rollouts WHERE tokens IS NOT NULL {only} GROUP BY 1
"""
# Seconds in which a server had a group: the length of the union of [sampled - seconds, sampled].
SERVERS = """
WITH
  spans AS (SELECT server, sampled - seconds AS start, sampled AS stop FROM rollouts
            WHERE sample = 0 AND tokens IS NOT NULL),
  parts AS (SELECT server, stop - max(start, coalesce(max(stop) OVER (
              PARTITION BY server ORDER BY start
              ROWS BETWEEN UNBOUNDED PRECEDING AND 1 PRECEDING), start)) AS part FROM spans),
  busy AS (SELECT server, sum(max(part, 0.0)) AS seconds FROM parts GROUP BY server)
SELECT
  server AS name, count(tokens) FILTER (WHERE sample = 0) AS groups, count(tokens) AS rollouts,
  coalesce(sum(tokens), 0) AS tokens, count(reason) FILTER (WHERE sample = 0) AS failed,
  coalesce(busy.seconds, 0.0) AS seconds,
  coalesce(sum(tokens) / nullif(busy.seconds, 0.0), 0.0) AS tokens_per_second
FROM rollouts LEFT JOIN busy USING (server) WHERE server IS NOT NULL GROUP BY server ORDER BY server
"""


class Ledger:
    """Appends events; a kill loses none, and in a bucket the loss of the machine those of the last
    seconds, which the run that resumes would have rewound.

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
        """Syncs the log; returns its size, which belongs into a checkpoint."""
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


class LedgerReport:
    """Replays the events of a ledger, up to its last whole line; a UserError if it is damaged."""

    def __init__(self, path: epath.Path):
        if not path.exists():
            raise UserError(f"{path} is missing; give the workdir of a run that has begun")
        self.requested, self.faults, self._incarnation, at = 0, [], 0, 0
        self._db = sqlite3.connect(":memory:", isolation_level=None)
        self._db.executescript(ROLLOUTS)
        for line in whole_lines(read_log(path)):
            try:
                self._replay(json.loads(line), at)
            except (ValueError, LookupError, TypeError) as error:
                raise UserError(f"{path} is damaged at byte {at}; restore a whole copy") from error
            at += len(line)

    def groups(self) -> list[Any]:
        """Named tuples, one a group, in the order of the requests; fields as in `rollouts`."""
        return self._rows(
            "SELECT incarnation, stream_index, prompt, count(*) AS n, version, state, step"
            " FROM rollouts WHERE state != 'reissued'"
            " GROUP BY incarnation, stream_index ORDER BY min(rowid)"
        )

    def rollouts(self) -> list[Any]:
        """Named tuples, one a requested rollout, earlier attempts included.

        Returns:
          id: "incarnation.stream_index.attempt.sample"; the incarnation counts resumes.
          prompt: id of the record.
          version, server, seconds; tokens, finish_reason, reward: of its group and its response.
          requested, sampled, ended: times in seconds since 1970.
          state: one of STATES; step: that trained it.
          reason: of a failed attempt; reissued_as: id of the row that replaced it.
        """
        group = "incarnation || '.' || stream_index || '.' ||"
        return self._rows(
            f"SELECT {group} attempt || '.' || sample AS id, prompt, version, server, seconds,"
            " tokens, finish_reason, reward, requested, sampled, ended, state, step, reason,"
            f" iif(state = 'reissued', {group} (attempt + 1) || '.' || sample, NULL) AS reissued_as"
            " FROM rollouts ORDER BY requested, incarnation, stream_index, attempt, sample"
        )

    def summary(self) -> dict[str, Any]:
        """Sums everything up, JSON-able.

        Returns:
          "requested" rollouts; "balance", rollouts in each state; "balanced", whether these sum up
          to "requested" without "faults"; "bias", of the sampled rollouts in each state
          ("reissued": of the responses to prompts that were requested more than once); "servers",
          for each, its totals, and the seconds in which it had a group.
        """
        balance = dict.fromkeys(STATES, 0)
        balance |= dict(self._db.execute("SELECT state, count(*) FROM rollouts GROUP BY state"))
        bias = [
            *self._rows(BIAS.format(kind="state", only="")),
            *self._rows(BIAS.format(kind="'reissued'", only="AND attempt > 0")),
        ]
        return {
            "requested": self.requested,
            "balance": balance,
            "balanced": sum(balance.values()) == self.requested and not self.faults,
            "faults": self.faults,
            "bias": _by_name(bias),
            "servers": _by_name(self._rows(SERVERS)),
        }

    def _rows(self, query: str) -> list[Any]:
        rows = self._db.execute(query)
        kind = namedtuple("Row", [column for column, *_ in rows.description])
        return [kind(*row) for row in rows]

    def _replay(self, event: dict[str, Any], at: int) -> None:
        kind, now = event["event"], event["time"]
        if kind == "resume":
            self._rewind(event, at)
            return
        index, state = event["stream_index"], self._state(event["stream_index"])
        if kind == "request":
            if state not in ("not requested", "rewound"):
                self.faults.append(f"group {index} is requested twice")
            self.requested += event["n"]
            self._db.executemany(
                "INSERT INTO rollouts (incarnation, stream_index, attempt, sample, prompt,"
                " requested, state) VALUES (?, ?, 0, ?, ?, ?, 'in flight')",
                [(self._incarnation, index, i, event["prompt"], now) for i in range(event["n"])],
            )
        elif state != ("in flight" if kind == "sampled" else "held"):
            self.faults.append(f"group {index} is {event.get('end', kind)} but was {state}")
        elif kind == "sampled":
            self._sampled(event, at)
        else:
            self._db.execute(
                "UPDATE rollouts SET state = ?, step = ?, ended = ?, ended_at = ?"
                " WHERE stream_index = ? AND state = 'held'",
                (event["end"], event["step"], now, at, index),
            )

    def _sampled(self, event: dict[str, Any], at: int) -> None:
        index, now, tokens = event["stream_index"], event["time"], event["tokens"]
        tries = list(event["attempts"])
        if tokens or not tries:
            tries.append((event["server"], event["version"], None, event["seconds"]))
        for attempt, (server, version, reason, seconds) in enumerate(tries[:-1]):
            again = self._db.execute(
                "INSERT INTO rollouts SELECT incarnation, stream_index, ?, sample, prompt, ?, ?,"
                " ?, NULL, NULL, NULL, requested, ?, ?, 'reissued', NULL, ?, ?, ?"
                " FROM rollouts WHERE stream_index = ? AND state = 'in flight'",
                (attempt, version, server, seconds, now, now, reason, at, at, index),
            )
            self.requested += again.rowcount
        server, version, reason, seconds = tries[-1]
        end = ("held", None, None) if tokens else ("failed", now, at)
        responses = [json.dumps(event[name]) for name in ("tokens", "finish", "reward")]
        updated = self._db.execute(
            "UPDATE rollouts SET attempt = ?, version = ?, server = ?, seconds = ?, reason = ?,"
            " sampled = ?, sampled_at = ?, state = ?, ended = ?, ended_at = ?,"
            " tokens = ? ->> sample, finish_reason = ? ->> sample, reward = ? ->> sample"
            " WHERE stream_index = ? AND state = 'in flight'",
            (len(tries) - 1, version, server, seconds, reason, now, at, *end, *responses, index),
        )
        if tokens and len(tokens) != updated.rowcount:
            self.faults.append(f"group {index} has {len(tokens)} rollouts of {updated.rowcount}")

    def _rewind(self, event: dict[str, Any], at: int) -> None:
        """Restores the checkpoint's state: what was requested later, or in flight, is rewound."""
        self._incarnation += 1
        position, held = event["position"], sorted(event["held"])
        self._db.execute(
            "UPDATE rollouts SET state = 'held', step = NULL, ended = NULL"
            " WHERE state NOT IN ('rewound', 'reissued') AND ended_at >= ?",
            (position,),
        )
        self._db.execute(
            "UPDATE rollouts SET state = 'rewound', ended = ?, ended_at = ?"
            " WHERE state IN ('in flight', 'held') AND (sampled_at >= ?"
            f" OR stream_index NOT IN ({', '.join(map(str, held))}))",
            (event["time"], at, position),
        )
        for index in held:
            # A group that is replayed has its end already, and may be held to be used again.
            if self._state(index) not in ("held", "trained"):
                self.faults.append(f"group {index} is held by the checkpoint but was not sampled")

    def _state(self, index: int) -> str:
        """State of the newest request for a group."""
        rows = self._db.execute(
            "SELECT state FROM rollouts WHERE stream_index = ? AND state != 'reissued'"
            " ORDER BY incarnation DESC LIMIT 1",
            (index,),
        )
        return next((state for (state,) in rows), "not requested")


def _by_name(rows: list[Any]) -> dict[str, dict[str, Any]]:
    """Keys named tuples by their field `name`."""
    return {row.name: {k: v for k, v in row._asdict().items() if k != "name"} for row in rows}


def table(summary: dict[str, Any]) -> str:
    """Formats a summary for people."""
    requested, servers = summary["requested"], summary["servers"]
    lines = [f"{requested} rollouts requested"]
    for state, count in summary["balance"].items():
        if count:
            lines.append(f"  {state:<16}{count:>10}{count / requested:>9.2%}")
    lines += ["balanced" if summary["balanced"] else "NOT balanced", *summary["faults"]]
    lines.append(f"\n{'sampled':<18}{'rollouts':>10}{'length':>9}{'truncated':>11}{'reward':>9}")
    for kind, means in summary["bias"].items():
        row = "  {:<16}{rollouts:>10}{length:>9.2f}{truncated:>11.3f}{reward:>9.3f}"
        lines.append(row.format(kind, **means))
    width = max(map(len, servers), default=6) + 2
    head = ("groups", "rollouts", "tokens", "failed", "seconds", "tokens/s")
    lines.append("\n{:<{}}{:>9}{:>10}{:>12}{:>8}{:>10}{:>10}".format("server", width, *head))
    for server, totals in servers.items():
        row = "{:<{}}{:>9}{:>10}{:>12}{:>8}{:>10.1f}{:>10.0f}"
        lines.append(row.format(server, width, *totals.values()))
    return "\n".join(lines)
