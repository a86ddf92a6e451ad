"""Programs and tests a second that the sandbox grades, and where the time goes.

    python benchmarks/programs.py [--parallel=2] [--programs=100] [--tests=15]

A program is a short right answer, so what is timed is the sandbox: to start one (an interpreter,
its walls, the modules that a checker has), to run one test in it (a fork), and to end it. The whole
path, with the thread pool, is timed for each way that this machine has.
"""

import argparse
import dataclasses
import itertools
import json
import resource
import statistics
import time

from results import keep

from oapl_jax.rewards.code import sandbox
from oapl_jax.rewards.code.launch import Limits
from oapl_jax.rewards.code.problems import Problem
from oapl_jax.rewards.code.programs import Programs

LIMITS = Limits(
    seconds_per_test=60.0,
    memory_bytes=1 << 30,
    processes=8,
    output_bytes=1 << 20,
    temporary_bytes=1 << 24,
)
START_SECONDS = 60.0
CODE = "n = int(input())\nprint(sum(i * i for i in range(n)))"


def parts(way: str, rounds: int, tests: int) -> dict[str, float]:
    """Median milliseconds to start a sandbox, to run a test and to end it, one at a time."""
    started, ran, ended = [], [], []
    for _ in range(rounds):
        times = [time.perf_counter()]
        box = sandbox.Sandbox(way, LIMITS, packages=(), start_seconds=START_SECONDS)
        times.append(time.perf_counter())
        box.load(kind="stdin", name="", code=CODE)
        for _ in range(tests):
            assert box.run("100")[0] == 0
        times.append(time.perf_counter())
        box.close()
        times.append(time.perf_counter())
        spans = [b - a for a, b in itertools.pairwise(times)]
        started.append(spans[0])
        ran.append(spans[1] / tests)
        ended.append(spans[2])
    named = {"start_ms": started, "test_ms": ran, "end_ms": ended}
    return {name: round(1000 * statistics.median(values), 2) for name, values in named.items()}


def whole(way: str, parallel: int, programs: int, tests: int) -> dict[str, float]:
    """Programs and tests a second through `grade_all`, and what a program costs of a core.

    The cost is that of all processes of the sandboxes; unlike the rates, it hardly depends on what
    else the machine does.
    """
    grader = Programs(
        isolation=way,
        allow_unsafe=False,
        parallel=parallel,
        max_tests=0,
        thinking_opened=False,
        cache_entries=1,
        packages=(),
        start_seconds=START_SECONDS,
        **dataclasses.asdict(LIMITS),
    )
    pairs = tuple((str(n), str(sum(i * i for i in range(n)))) for n in range(tests))
    problem = Problem("stdin", "", pairs)
    answers = [(f"```python\n{CODE}\n# {i}\n```", problem) for i in range(programs)]
    grader.grade_all(answers[:parallel])
    begun, spent = time.perf_counter(), cpu_seconds()
    verdicts = grader.grade_all(answers)
    seconds, spent = time.perf_counter() - begun, cpu_seconds() - spent
    assert all(verdict.outcome == "passed" for verdict in verdicts)
    grader.close()
    return {
        "programs_per_second": round(programs / seconds, 1),
        "tests_per_second": round(programs * tests / seconds, 1),
        "cpu_ms_per_program": round(1000 * spent / programs, 1),
    }


def cpu_seconds() -> float:
    """Of the processes that this one has waited for, and of theirs."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--parallel", type=int, default=2)
    parser.add_argument("--programs", type=int, default=100)
    parser.add_argument("--tests", type=int, default=15)
    settings = parser.parse_args()
    ways = sandbox.available(LIMITS, packages=(), start_seconds=START_SECONDS)
    results = [
        {"way": way, "parallel": settings.parallel, "tests": settings.tests}
        | parts(way, 20, settings.tests)
        | whole(way, settings.parallel, settings.programs, settings.tests)
        for way in ways
    ]
    print(json.dumps(results, indent=1))
    keep(results)


if __name__ == "__main__":
    main()
