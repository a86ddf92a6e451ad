r"""The reward of mathematical answers: is what a response says at its end the reference?

A response is hostile until proven otherwise: its answer is cut out here in linear time, plain
numbers are compared here, and all else goes to processes that a deadline kills (pool.py, judge/).
A late answer is a verdict of its own: it is worth nothing, and it is not called wrong.
"""

import dataclasses
import functools
import threading
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal

from oapl_jax.rewards.math.extraction import MAX_ANSWER, canonical, final_answer, tidy
from oapl_jax.rewards.math.judge.exact_numbers import agree, number
from oapl_jax.rewards.math.pool import Pool

Outcome = Literal["right", "wrong", "timeout", "error"]
JUDGE = Path(__file__).parent / "judge"


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What became of an answer, and why.

    Attributes:
      outcome: "right"; "wrong" (also: no answer was given, or it can't be read); "timeout" (the
        deadline passed); "error" (the reference can't be read, or the judge itself failed, for
        instance for want of memory).
      reason: for people and logs.
    """

    outcome: Outcome
    reason: str

    @property
    def reward(self) -> float:
        return float(self.outcome == "right")


class Answers:
    """Judges answers in a pool of processes; every method is thread-safe.

    Args:
      processes: how many judge at a time.
      seconds: deadline of one answer.
      recycle_after: answers after which a process is replaced.
      memory_bytes: address space of a process.
      thinking_opened: whether the prompts end inside the thinking part, see `final_answer`.
    """

    def __init__(
        self,
        *,
        processes: int,
        seconds: float,
        recycle_after: int,
        memory_bytes: int,
        thinking_opened: bool,
    ):
        self._thinking_opened = thinking_opened
        self._pool = Pool(
            JUDGE,
            processes=processes,
            seconds=seconds,
            recycle_after=recycle_after,
            memory_bytes=memory_bytes,
        )
        self._threads = ThreadPoolExecutor(processes, "answers")
        self._counts: Counter[str] = Counter()
        self._lock = threading.Lock()

    def verify(self, response: str, answer: str) -> Verdict:
        """Judges one response against the reference answer."""
        return self.verify_many([(response, answer)])[0]

    def verify_many(self, pairs: Sequence[tuple[str, str]]) -> list[Verdict]:
        """Judges pairs of response and reference answer, equal ones once."""
        cut_out = functools.partial(final_answer, thinking_opened=self._thinking_opened)
        said = [(cut_out(response), tidy(answer)) for response, answer in pairs]
        verdicts = {pair: _at_once(*pair) for pair in said}
        asked = [(a, r) for (a, r), verdict in verdicts.items() if a is not None and not verdict]
        each = map if len(asked) < 2 else self._threads.map
        verdicts |= dict(zip(asked, each(self._judge, asked), strict=True))
        found = [verdict for pair in said if (verdict := verdicts[pair])]
        with self._lock:
            self._counts.update(verdict.outcome for verdict in found)
        return found

    def final_answer(self, response: str) -> str:
        """What a response says at its end, for a vote: equal strings are equal answers, and "" is
        none."""
        return canonical(final_answer(response, thinking_opened=self._thinking_opened) or "")

    def counts(self) -> dict[str, int]:
        """Answers judged so far, by outcome."""
        with self._lock:
            return dict(self._counts)

    def close(self) -> None:
        """Waits for the answers that are being judged, and ends the processes."""
        self._threads.shutdown()
        self._pool.close()

    def __enter__(self) -> "Answers":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _judge(self, pair: tuple[str, str]) -> Verdict:
        reply = self._pool.ask(pair)
        match reply:
            case {"reply": [outcome, reason]}:
                return Verdict(outcome, reason)
            case {"failed": "timeout"}:
                return Verdict("timeout", "the deadline passed")
        return Verdict("error", reply["detail"])


def _at_once(answer: str | None, reference: str) -> Verdict | None:
    """The verdict of what needs no judge; None for all else."""
    if answer is None:
        return Verdict("wrong", f"no final answer of at most {MAX_ANSWER} characters")
    if len(reference) > MAX_ANSWER:
        return Verdict("error", f"the reference is longer than {MAX_ANSWER} characters")
    if answer == reference:
        return Verdict("right", "the same text")
    a, r = number(answer), number(reference)
    if a is None or r is None:
        return None
    right = agree(a, r, decimal="." in answer + reference)
    return Verdict("right" if right else "wrong", "plain numbers")
