"""Throughput of the sandbox of programs, and the cost of its parts.

    python benchmarks/programs.py [--parallel=2] [--programs=100] [--tests=15]

A program is a short right answer, so the sandbox itself is timed: starting one (an interpreter, its
isolation, the modules that a checker has), running one test in it (a fork), and ending it; then the
whole path, with the thread pool.
"""

import argparse
import dataclasses
import itertools
import json
import resource
import statistics
import time

from results import keep

from oapl_jax.config import CodeRewardConfig
from oapl_jax.data.public.programs import Problem
from oapl_jax.rewards.code.sandbox import Sandbox, find_bwrap
from oapl_jax.rewards.code.verifier import CodeVerifier

CONFIG = CodeRewardConfig(
    allow_unsafe=False,
    parallel=2,
    seconds_per_test=60.0,
    memory_bytes=1 << 30,
    processes=8,
    output_bytes=1 << 20,
    temporary_bytes=1 << 24,
    max_tests=0,
    thinking_opened=False,
    packages=(),
    prelude="livecodebench",
    start_seconds=60.0,
    cache_entries=1,
)
CODE = "n = int(input())\nprint(sum(i * i for i in range(n)))"


def time_sandbox(bwrap: str, rounds: int, tests: int) -> dict[str, float]:
    """Median milliseconds to start a sandbox, to run a test and to end it, one at a time."""
    started, ran, ended = [], [], []
    for _ in range(rounds):
        times = [time.perf_counter()]
        sandbox = Sandbox(bwrap, CONFIG)
        times.append(time.perf_counter())
        sandbox.load_program(kind="stdin", name="", code=CODE)
        for _ in range(tests):
            assert sandbox.run_test("100")[0] == 0
        times.append(time.perf_counter())
        sandbox.close()
        times.append(time.perf_counter())
        spans = [b - a for a, b in itertools.pairwise(times)]
        started.append(spans[0])
        ran.append(spans[1] / tests)
        ended.append(spans[2])
    named = {"start_ms": started, "test_ms": ran, "end_ms": ended}
    return {name: round(1000 * statistics.median(values), 2) for name, values in named.items()}


def time_verifier(parallel: int, programs: int, tests: int) -> dict[str, float]:
    """Programs and tests a second through `verify_many`, and CPU milliseconds of a program.

    The CPU time is that of all processes of the sandboxes; unlike the rates, it hardly depends on
    the load of the machine.
    """
    verifier = CodeVerifier(dataclasses.replace(CONFIG, parallel=parallel))
    pairs = tuple((str(n), str(sum(i * i for i in range(n)))) for n in range(tests))
    problem = Problem("stdin", "", pairs)
    answers = [(f"```python\n{CODE}\n# {i}\n```", problem) for i in range(programs)]
    verifier.verify_many(answers[:parallel])
    begun, spent = time.perf_counter(), cpu_seconds()
    verdicts = verifier.verify_many(answers)
    seconds, spent = time.perf_counter() - begun, cpu_seconds() - spent
    assert all(verdict.outcome == "passed" for verdict in verdicts)
    verifier.close()
    return {
        "programs_per_second": round(programs / seconds, 1),
        "tests_per_second": round(programs * tests / seconds, 1),
        "cpu_ms_per_program": round(1000 * spent / programs, 1),
    }


def cpu_seconds() -> float:
    """CPU time of the processes that this one has waited for, and of theirs."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--parallel", type=int, default=2)
    parser.add_argument("--programs", type=int, default=100)
    parser.add_argument("--tests", type=int, default=15)
    args = parser.parse_args()
    bwrap = find_bwrap(CONFIG)
    result = {"bwrap": bwrap, "parallel": args.parallel, "tests": args.tests}
    result |= time_sandbox(bwrap, 20, args.tests)
    result |= time_verifier(args.parallel, args.programs, args.tests)
    print(json.dumps(result, indent=1))
    keep(result)


if __name__ == "__main__":
    main()
