r"""The verifier of mathematical answers: does a response's final answer equal the reference?

A response is hostile until proven otherwise: its answer is extracted here in linear time, plain
numbers are compared here, and all else goes to judge processes that a deadline kills. A late answer
is an outcome of its own: its reward is 0, and it is not called wrong.
"""

import functools
import threading
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Literal, NamedTuple

from oapl_jax.config import MathRewardConfig
from oapl_jax.rewards.math.extraction import MAX_ANSWER, canonical, final_answer, tidy
from oapl_jax.rewards.math.judge.text_answers import agree, number
from oapl_jax.rewards.math.judge_pool import JudgePool


class MathVerdict(NamedTuple):
    """The outcome of an answer, and its reason for people and logs. "wrong" is also a missing or
    unreadable answer; at an "error" the reference can't be read, or the judge lacked memory."""

    outcome: Literal["right", "wrong", "timeout", "error"]
    reason: str

    @property
    def reward(self) -> float:
        return float(self.outcome == "right")


class MathVerifier:
    """Judges answers in a pool of processes; every method is thread-safe."""

    def __init__(self, config: MathRewardConfig):
        self._extract = functools.partial(final_answer, thinking_opened=config.thinking_opened)
        self._pool = JudgePool(config)
        self._threads = ThreadPoolExecutor(config.processes, "answers")
        self._counts: Counter[str] = Counter()
        self._lock = threading.Lock()

    def verify(self, response: str, answer: str) -> MathVerdict:
        return self.verify_many([(response, answer)])[0]

    def verify_many(self, pairs: Sequence[tuple[str, str]]) -> list[MathVerdict]:
        """Judges pairs of response and reference answer, equal ones once."""
        extracted = [(self._extract(response), tidy(answer)) for response, answer in pairs]
        verdicts = {pair: compare_plain(*pair) for pair in extracted}
        left = [(a, r) for (a, r), verdict in verdicts.items() if a is not None and not verdict]
        each = map if len(left) < 2 else self._threads.map
        verdicts |= dict(zip(left, each(self._ask_judge, left), strict=True))
        found = [verdict for pair in extracted if (verdict := verdicts[pair])]
        with self._lock:
            self._counts.update(verdict.outcome for verdict in found)
        return found

    def final_answer(self, response: str) -> str:
        """A response's final answer for a vote: equal strings are equal answers; "" is none."""
        return canonical(self._extract(response) or "")

    def counts(self) -> dict[str, int]:
        with self._lock:
            return dict(self._counts)

    def close(self) -> None:
        """Waits for the answers that are being judged, and ends the processes."""
        self._threads.shutdown()
        self._pool.close()

    def _ask_judge(self, pair: tuple[str, str]) -> MathVerdict:
        reply = self._pool.ask(pair)
        if "reply" in reply:
            return MathVerdict(*reply["reply"])
        if reply["failed"] == "timeout":
            return MathVerdict("timeout", "the deadline passed")
        return MathVerdict("error", reply["detail"])


def compare_plain(answer: str | None, reference: str) -> MathVerdict | None:
    """Compares missing, equal and plainly numeric answers; None if the judge has to decide."""
    if answer is None:
        return MathVerdict("wrong", f"no final answer of at most {MAX_ANSWER} characters")
    if len(reference) > MAX_ANSWER:
        return MathVerdict("error", f"the reference is longer than {MAX_ANSWER} characters")
    if answer == reference:
        return MathVerdict("right", "the same text")
    a, r = number(answer), number(reference)
    if a is None or r is None:
        return None
    right = agree(a, r, decimal="." in answer + reference)
    return MathVerdict("right" if right else "wrong", "plain numbers")
