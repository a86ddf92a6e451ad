"""Throughput of the math verifier, and the cost of hostile answers, as JSON.

    python benchmarks/answers.py [--processes=2] [--seconds=2]

No number or expression is judged twice. A hostile answer is judged alone; its cost is the time to
its verdict and to that of the honest answer after it.
"""

import argparse
import dataclasses
import json
import random
import time
from contextlib import closing

from results import keep

from oapl_jax.config import MathRewardConfig
from oapl_jax.rewards.math.verifier import MathVerifier

PLAIN, EXPRESSIONS = 20_000, 400
HOSTILE = {
    "tower": r"9^{9^{9^{9}}}",
    "factorial": r"(10^{9})!",
    "binomial": r"\binom{10^{9}}{5\cdot 10^{8}}",
    "exponent": "1e999999999",
    "sum": r"\sum_{n=1}^{10^{9}} n^{n}",
    "radicals": r"\sqrt{2+" * 60 + "2" + "}" * 60,
    "brackets": "(" * 450 + "1" + ")" * 450,
    "megabyte": "1+" * 500_000,
}


def plain(rng: random.Random) -> tuple[str, str]:
    """A response with a number at its end, right in half of the cases; and the reference."""
    value = rng.randint(-(10**6), 10**6) / rng.choice((1, 4, 100))
    said = value if rng.random() < 0.5 else value + 1
    return f"{'We count the cases. ' * 100}So it is $\\boxed{{{said:,g}}}$.", f"{value:g}"


def expression(rng: random.Random) -> tuple[str, str]:
    """Another spelling of a reference, right in half of the cases; and the reference."""
    a, b, c = (rng.randint(2, 999) for _ in range(3))
    wrong = rng.randint(0, 1)
    said, reference = rng.choice(
        (
            (rf"\frac{{{a + wrong}\sqrt{{{b}}}}}{{{c}}}", rf"\frac{{{a * b}}}{{{c}\sqrt{{{b}}}}}"),
            (rf"{a}x^{{2}} + {a * b + wrong}x", rf"{a}x(x+{b})"),
            (rf"\left[{a}, {b + wrong}\right)", rf"[{a}, {b})"),
            (rf"({b + wrong}, \frac{{{a}}}{{{c}}})", rf"({b}, {a}/{c})"),
            (rf"x = \frac{{{a}\pi}}{{{b + wrong}}}", rf"\frac{{{a}}}{{{b}}}\pi"),
        )
    )
    return rf"Hence \(\boxed{{{said}}}\).", reference


def throughput(verifier: MathVerifier, pairs: list[tuple[str, str]]) -> dict[str, float]:
    """Answers a second, and answers a second of this process's own CPU time."""
    start, cpu = time.perf_counter(), time.process_time()
    verifier.verify_many(pairs)
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    return {
        "answers/s": round(len(pairs) / seconds),
        "answers/s of own CPU": round(len(pairs) / cpu),
    }


def cost(verifier: MathVerifier, text: str) -> dict[str, float | str]:
    start = time.perf_counter()
    verdict = verifier.verify(rf"\boxed{{{text}}}", "7")
    judged = time.perf_counter()
    next_verdict = verifier.verify(r"\boxed{\frac{\sqrt{8}}{2}}", r"\sqrt{2}")
    assert next_verdict.outcome == "right"
    return {
        "outcome": verdict.outcome,
        "seconds": round(judged - start, 3),
        "seconds of the next": round(time.perf_counter() - judged, 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=2.0)
    args = parser.parse_args()
    rng = random.Random(0)
    config = MathRewardConfig(
        processes=args.processes,
        seconds=args.seconds,
        recycle_after=1000,
        memory_bytes=1 << 30,
        thinking_opened=False,
    )
    with closing(MathVerifier(config)) as verifier:
        verifier.verify_many([expression(rng) for _ in range(20)])  # the processes start
        result = {
            "processes": args.processes,
            "plain numbers": throughput(verifier, [plain(rng) for _ in range(PLAIN)]),
            "expressions": throughput(verifier, [expression(rng) for _ in range(EXPRESSIONS)]),
        }
    with closing(MathVerifier(dataclasses.replace(config, processes=1))) as verifier:
        verifier.verify(r"\boxed{\sqrt{2}}", "2")
        result["hostile"] = {name: cost(verifier, text) for name, text in HOSTILE.items()}
    print(json.dumps(result, indent=1))
    keep(result)


if __name__ == "__main__":
    main()
