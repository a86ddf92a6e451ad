"""Judges pairs of answer and reference until standard input ends, see supervisor.py.

python -m oapl_jax.rewards.math.judge SECONDS RECYCLE_AFTER MEMORY_BYTES
"""

import logging
import sys

from oapl_jax.rewards.math.judge.answers import parse_answer, same_answer
from oapl_jax.rewards.math.judge.supervisor import supervise
from oapl_jax.rewards.math.judge.sympy_equal import GENERATED, Unreadable, with_same_derivatives


def judge_pair(pair: list[str]) -> list[str]:
    """["right" | "wrong" | "error", why] of a tidied answer and reference."""
    answer, reference = with_same_derivatives(*pair)
    try:
        expected = parse_answer(reference)
    except ValueError as error:
        return ["error", f"the reference can't be read: {error}"]
    try:
        right = same_answer(parse_answer(answer), expected)
        return ["right", "equal"] if right else ["wrong", f"differs from {reference}"[:200]]
    except Unreadable as error:
        return ["error", f"the reference can't be read: {error}"]
    except (ValueError, RecursionError) as error:
        return ["wrong", f"the answer can't be read: {error}"[:200]]


# The first answer of each kind is slow; a worker is forked from a process that has judged these.
WARMUP = (
    (r"\frac{\sqrt{3}}{2}", r"\frac{3}{2\sqrt{3}}"),
    (r"x^{2}+2x+1", r"(x+1)^2"),
    (r"\sin^2 x \cdot \pi", r"\frac{\pi (1-\cos 2x)}{2}"),
    (r"(1, 2] \cup \{3\}", r"(1, \infty)"),
    (r"\begin{pmatrix} 1 \\ a \end{pmatrix}", r"\begin{pmatrix} 1 \\ b \end{pmatrix}"),
    (r"\log_2 5 + e^{3}", r"\binom{5}{2} \cdot 3!"),
    (r"y = 2x+3", r"2x - y + 3 = 0"),
    (r"\int_0^1 f(x) dx", r"\int_0^2 f(x) dx"),
    (r"y = \frac{2}{x}", r"xy = 2"),
    (r"\sum_{k=0}^{\infty} x^k/k!", r"\sum_{n=1}^{\infty} \frac{1}{n^2}"),
    (r"a_{1} + |x|", r"3 \cdot 10^{-2} + 4i"),
)  # fmt: skip

if __name__ == "__main__":
    logging.disable()  # math-verify warns that it keeps no deadline; the supervisor does
    for pair in WARMUP:
        judge_pair(list(pair))
    supervise(
        judge_pair,
        generated=GENERATED,
        seconds=float(sys.argv[1]),
        recycle_after=int(sys.argv[2]),
        memory_bytes=int(sys.argv[3]),
    )
