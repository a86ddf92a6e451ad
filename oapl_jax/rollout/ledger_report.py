"""Reads a ledger: one row a rollout, the balance, what dropping does to lengths and difficulty."""

import dataclasses
import json
from collections import Counter, defaultdict
from collections.abc import Iterator
from typing import Any

from etils import epath

from oapl_jax.errors import UserError

# What a row comes to; the first two may change yet (a held group is sampled, and in the buffer).
STATES = (
    *("in flight", "held"),
    *("trained", "expired", "zero_variance", "failed", "reissued", "rewound"),
)


@dataclasses.dataclass
class Entry:
    """One group, as the events tell it; a place (`*_at`) is one in the file, -1 for none."""

    incarnation: int  # how often the run had been resumed
    stream_index: int
    prompt: str
    n: int
    requested: float  # time in seconds since 1970
    requested_at: int
    sample: dict[str, Any] | None = None  # the event "sampled"
    sampled_at: int = -1
    end: str | None = None
    step: int | None = None
    ended: float | None = None
    ended_at: int = -1

    @property
    def state(self) -> str:
        return self.end or ("held" if self.sample else "in flight")

    @property
    def attempts(self) -> int:
        """How often the group was asked for; only the last may have rollouts."""
        if not self.sample:
            return 1
        return max(len(self.sample["attempts"]) + bool(self.sample["tokens"]), 1)


@dataclasses.dataclass(frozen=True)
class Row:
    """One requested rollout.

    Attributes:
      id: "incarnation.stream_index.attempt.sample", unique in a file.
      prompt: id of the record.
      version, server, seconds: that sampled it and how long its group took; None before.
      tokens, finish_reason, reward: of the response; None if there is none.
      requested, sampled, ended: times in seconds since 1970.
      state: one of STATES.
      step: gradient step that trained it.
      reason: why an attempt came to nothing: "failed", "aborted" or "mixed".
      reissued_as: id of the row that took its place.
    """

    id: str
    prompt: str
    version: int | None
    server: str | None
    seconds: float | None
    tokens: int | None
    finish_reason: str | None
    reward: float | None
    requested: float
    sampled: float | None
    ended: float | None
    state: str
    step: int | None
    reason: str | None
    reissued_as: str | None


@dataclasses.dataclass
class Account:
    """A ledger that has been read.

    Attributes:
      entries: the groups in the order of their requests.
      requested: rollouts, summed over the events as they came.
      faults: a sentence for each event that does not fit those before it.
    """

    entries: list[Entry]
    requested: int
    faults: list[str]


def read(path: epath.Path) -> Account:
    """Everything up to the last whole line.

    Raises:
      UserError: if the file is missing or an earlier line is damaged.
    """
    if not path.exists():
        raise UserError(f"{path} is missing; give the workdir of a run that has begun")
    found = Account([], 0, [])
    latest: dict[int, Entry] = {}  # of each draw
    incarnation, at = 0, 0
    for line in path.read_bytes().splitlines(keepends=True):
        if not line.endswith(b"\n"):
            break  # cut by a kill, or being written now
        try:
            event = json.loads(line)
            kind, now = event["event"], event["time"]
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path} is damaged at byte {at}; put a whole copy back") from error
        if kind == "resume":
            _rewind(found, latest, event, at)
            incarnation += 1
        elif kind == "request":
            entry = Entry(incarnation, event["stream_index"], event["prompt"], event["n"], now, at)
            before = latest.get(entry.stream_index)
            if before and before.end != "rewound":
                found.faults.append(f"draw {entry.stream_index} is requested twice")
            found.entries.append(entry)
            found.requested += entry.n
            latest[entry.stream_index] = entry
        else:
            _follow(found, latest.get(event["stream_index"]), event, at)
        at += len(line)
    return found


def _follow(found: Account, entry: Entry | None, event: dict[str, Any], at: int) -> None:
    """A group is sampled or ends."""
    kind, now = event["event"], event["time"]
    if not entry or entry.end or bool(entry.sample) == (kind == "sampled"):
        state = entry.state if entry else "not requested"
        found.faults.append(
            f"draw {event['stream_index']} is {event.get('end', kind)} but was {state}"
        )
    elif kind == "end":
        entry.end, entry.step, entry.ended, entry.ended_at = event["end"], event["step"], now, at
    else:
        entry.sample, entry.sampled_at = event, at
        found.requested += entry.n * (entry.attempts - 1)
        if not event["tokens"]:
            entry.end, entry.ended, entry.ended_at = "failed", now, at
        elif len(event["tokens"]) != entry.n:
            found.faults.append(
                f"draw {entry.stream_index} has {len(event['tokens'])} rollouts of {entry.n}"
            )


def _rewind(found: Account, latest: dict[int, Entry], event: dict[str, Any], at: int) -> None:
    """All is as at the checkpoint; what was asked for since, or was in flight then, is rewound."""
    place, held = event["position"], set(event["held"])
    for entry in found.entries:
        if entry.end == "rewound":
            continue
        if entry.ended_at >= place:
            entry.end = entry.step = entry.ended = None
        if not entry.end and (entry.stream_index not in held or entry.sampled_at >= place):
            entry.end, entry.ended, entry.ended_at = "rewound", event["time"], at
    for draw in sorted(held):
        entry = latest.get(draw)
        # A group that replays has its end already, and may be held to be used again.
        if not entry or entry.state not in ("held", "trained"):
            found.faults.append(f"draw {draw} is held by the checkpoint but was not sampled before")


def rows(entries: list[Entry]) -> Iterator[Row]:
    """One for each requested rollout, those of earlier attempts too."""
    for entry in entries:
        sample = entry.sample or {"attempts": [], "tokens": [], "time": None}
        name = f"{entry.incarnation}.{entry.stream_index}"
        for attempt in range(entry.attempts):
            last = attempt == entry.attempts - 1
            server, version, seconds = (sample.get(k) for k in ("server", "version", "seconds"))
            reason = None
            if attempt < len(sample["attempts"]):
                server, version, reason, seconds = sample["attempts"][attempt]
            for i in range(entry.n):
                answered = last and i < len(sample["tokens"])
                yield Row(
                    id=f"{name}.{attempt}.{i}",
                    prompt=entry.prompt,
                    version=version,
                    server=server,
                    seconds=seconds,
                    tokens=sample["tokens"][i] if answered else None,
                    finish_reason=sample["finish"][i] if answered else None,
                    reward=sample["reward"][i] if answered else None,
                    requested=entry.requested,
                    sampled=sample["time"],
                    ended=entry.ended if last else sample["time"],
                    state=entry.state if last else "reissued",
                    step=entry.step if last else None,
                    reason=reason,
                    reissued_as=None if last else f"{name}.{attempt + 1}.{i}",
                )


def summary(found: Account) -> dict[str, Any]:
    """The balance, the bias and the throughput, JSON-able.

    Returns:
      "requested": rollouts; "balance": how many are in each state; "balanced": whether these sum
      up to "requested" and no event contradicts another; "faults"; "bias": of the sampled rollouts
      in each state, the number, mean tokens, truncated share and mean reward ("reissued": of what
      came in the end for prompts that had to be asked again); "servers": for each, groups,
      rollouts, tokens, failed attempts, seconds in which it had a group, and tokens a second.
    """
    balance = Counter(dict.fromkeys(STATES, 0))
    balance.update(row.state for row in rows(found.entries))
    sampled = [entry for entry in found.entries if entry.sample and entry.sample["tokens"]]
    kinds = {state: [e for e in sampled if e.state == state] for state in STATES}
    kinds["reissued"] = [e for e in sampled if e.attempts > 1]
    return {
        "requested": found.requested,
        "balance": dict(balance),
        "balanced": sum(balance.values()) == found.requested and not found.faults,
        "faults": found.faults,
        "bias": {kind: _means(entries) for kind, entries in kinds.items() if entries},
        "servers": _servers(found.entries),
    }


def _means(entries: list[Entry]) -> dict[str, float]:
    samples = [entry.sample for entry in entries if entry.sample]
    mean = lambda name, value: sum(value(x) for s in samples for x in s[name]) / count
    count = sum(len(s["tokens"]) for s in samples)
    return {
        "rollouts": count,
        "length": mean("tokens", int),
        "truncated": mean("finish", lambda reason: reason == "length"),
        "reward": mean("reward", float),
    }


def _servers(entries: list[Entry]) -> dict[str, dict[str, float]]:
    totals: dict[str, Counter] = defaultdict(Counter)
    spans: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for sample in (entry.sample for entry in entries if entry.sample):
        for server, *_ in sample["attempts"]:
            totals[server]["failed"] += 1
        if sample["tokens"]:
            tokens = sample["tokens"]
            totals[sample["server"]].update(groups=1, rollouts=len(tokens), tokens=sum(tokens))
            spans[sample["server"]].append((sample["time"] - sample["seconds"], sample["time"]))
    result = {}
    for server, total in sorted(totals.items()):
        busy, until = 0.0, 0.0
        for start, end in sorted(spans[server]):
            busy += max(end - max(start, until), 0.0)
            until = max(until, end)
        result[server] = {name: total[name] for name in ("groups", "rollouts", "tokens", "failed")}
        result[server]["seconds"] = busy
        result[server]["tokens_per_second"] = total["tokens"] / busy if busy else 0.0
    return result


def table(summary: dict[str, Any]) -> str:
    """The summary as a person reads it."""
    requested = summary["requested"]
    lines = [f"{requested} rollouts requested"]
    for state, count in summary["balance"].items():
        if count:
            lines.append(f"  {state:<16}{count:>10}{count / requested:>9.2%}")
    lines.append("balanced" if summary["balanced"] else "NOT balanced")
    lines += summary["faults"]
    lines.append(f"\n{'sampled':<18}{'rollouts':>10}{'length':>9}{'truncated':>11}{'reward':>9}")
    for kind, means in summary["bias"].items():
        lines.append(
            f"  {kind:<16}{means['rollouts']:>10}{means['length']:>9.2f}"
            f"{means['truncated']:>11.3f}{means['reward']:>9.3f}"
        )
    width = max(map(len, summary["servers"]), default=6) + 2
    lines.append(
        f"\n{'server':<{width}}{'groups':>9}{'rollouts':>10}{'tokens':>12}{'failed':>8}"
        f"{'seconds':>10}{'tokens/s':>10}"
    )
    for server, of in summary["servers"].items():
        lines.append(
            f"{server:<{width}}{of['groups']:>9}{of['rollouts']:>10}{of['tokens']:>12}"
            f"{of['failed']:>8}{of['seconds']:>10.1f}{of['tokens_per_second']:>10.0f}"
        )
    return "\n".join(lines)
