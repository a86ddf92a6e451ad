"""Rewards of programs: 1 if a response's program passes every test of its problem, else 0.

The program runs in a sandbox (`sandbox.py`) that gets inputs and never an expected output; what
comes out is compared here. So there is nothing inside to patch, read or skip: a program is paid for
right outputs and for nothing else. How the tests of a problem are written: `problems.py`.
"""

import dataclasses
import hashlib
import threading
import warnings
from collections import Counter, OrderedDict
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from oapl_jax.errors import RunError, UserError
from oapl_jax.rewards.code import sandbox
from oapl_jax.rewards.code.launch import Limits, NoSandbox
from oapl_jax.rewards.code.problems import Problem, choose_tests, extract, same_output, same_value
from oapl_jax.rewards.code.sandbox import Ended, OutOfTime, Sandbox

FOLDER_BYTES = 1 << 16  # of a temporary folder, beside the input
CPU_LIMIT = -24  # exit code of a program that its CPU limit ended (SIGXCPU)


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What became of a program.

    Attributes:
      outcome: "passed"; "failed" (a wrong output), "timeout" or "error" (it raised, was killed or
        broke a limit) at a test; "no_code" (the response holds no program).
      test: index of the test at which it stopped, in the order of the record; None if there is
        none.
    """

    outcome: str
    test: int | None = None

    @property
    def reward(self) -> float:
        return float(self.outcome == "passed")


class Programs:
    """Grades programs, several at a time; `grade` may be called from any thread.

    Args:
      isolation: "bubblewrap", "namespaces", or "auto" for the first of them that works here.
      allow_unsafe: if neither works, run programs with limits and a syscall filter only: they can
        then read, and write, every file that this user can.
      parallel: programs that run at a time. Each needs a core, and `memory_bytes` at most.
      seconds_per_test: wall-clock seconds of a test (6 in DeepCoder, LiveCodeBench and OAPL).
      memory_bytes: address space of a program.
      processes: threads of a program, the main one included; it can't start processes.
      output_bytes: the most that a test may print or return.
      temporary_bytes: size of a program's temporary folder, which also holds its input.
      max_tests: the most tests a problem, then those with the longest inputs, as in DeepCoder's
        reward; 0 for all, as in OAPL's.
      thinking_opened: whether prompts end inside the thinking part, see `extract`.
      packages: installed packages that programs may import, for instance ("numpy",).
      start_seconds: deadline for a sandbox to be up.
      cache_entries: verdicts that are remembered by content. A timeout is not: it may have been
        the machine's fault.

    Raises:
      UserError: if this machine can't isolate a program and `allow_unsafe` does not say to go on.
    """

    def __init__(
        self,
        *,
        isolation: str,
        allow_unsafe: bool,
        parallel: int,
        seconds_per_test: float,
        memory_bytes: int,
        processes: int,
        output_bytes: int,
        temporary_bytes: int,
        max_tests: int,
        thinking_opened: bool,
        packages: tuple[str, ...],
        start_seconds: float,
        cache_entries: int,
    ):
        self._limits = Limits(
            seconds_per_test=seconds_per_test,
            memory_bytes=memory_bytes,
            processes=processes,
            output_bytes=output_bytes,
            temporary_bytes=temporary_bytes,
        )
        self._start: dict[str, Any] = dict(packages=tuple(packages), start_seconds=start_seconds)
        self._max_tests, self._cache_entries = max_tests, cache_entries
        self._thinking_opened = thinking_opened
        self.isolation = self._choose(isolation, allow_unsafe)
        self._settings = repr((self._limits, self._start, max_tests, self.isolation)).encode()
        self._pool = ThreadPoolExecutor(parallel, thread_name_prefix="programs")
        self._lock = threading.Lock()
        self._verdicts: OrderedDict[bytes, Verdict] = OrderedDict()
        self._counts: Counter[str] = Counter()

    def grade(self, response: str, problem: Problem) -> Verdict:
        """The verdict on the program in a response.

        Raises:
          UserError: if a test does not fit into the limits, so that no program could pass.
          RunError: if no sandbox comes up; the program is not to blame, and gets no reward of 0.
        """
        return self.grade_all([(response, problem)])[0]

    def grade_all(self, answers: Iterable[tuple[str, Problem]]) -> list[Verdict]:
        """The verdicts on pairs of response and problem, in their order; errors as in `grade`."""
        running = [self._pool.submit(self._grade, *answer) for answer in answers]
        return [future.result() for future in running]

    def counts(self) -> dict[str, int]:
        """Verdicts by outcome; of these `cached`; `tests` that ran; `left_out` by max_tests."""
        with self._lock:
            return dict(self._counts)

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)

    def _choose(self, isolation: str, allow_unsafe: bool) -> str:
        ways = sandbox.WAYS if isolation == "auto" else (isolation,)
        if not set(ways) <= set(sandbox.WAYS):
            choices = ", ".join(("auto", *sandbox.WAYS))
            raise UserError(f"isolation={isolation!r} is not one of {choices}")
        reasons = []
        for way in ways:
            reason = sandbox.hole(way, self._limits, **self._start)
            if not reason:
                return way
            reasons.append(f"{way}: {reason}")
        why = f"programs of the policy can't be isolated on this machine ({'; '.join(reasons)})"
        if not allow_unsafe:
            raise UserError(
                f"{why}; install bubblewrap or allow user namespaces, or set allow_unsafe=True to "
                "run them all the same, with all files of this user open to them"
            )
        warnings.warn(f"{why}; allow_unsafe=True runs them all the same", stacklevel=3)
        return "none"

    def _check_fits(self, problem: Problem) -> None:
        longest_input, longest_output = problem.sizes
        for name, needed in (
            ("temporary_bytes", longest_input + FOLDER_BYTES),
            ("output_bytes", longest_output + 1),
        ):
            has = getattr(self._limits, name)
            if needed > has:
                raise UserError(
                    f"{name}={has} is too small for a test of the data; raise it to {needed}"
                )

    def _grade(self, response: str, problem: Problem) -> Verdict:
        code = extract(response, thinking_opened=self._thinking_opened)
        if code is None:
            return self._count(Verdict("no_code"))
        self._check_fits(problem)
        parts = (self._settings, problem.digest, code.encode(errors="surrogatepass"))
        key = hashlib.sha256(b"".join(hashlib.sha256(part).digest() for part in parts)).digest()
        with self._lock:
            known = self._verdicts.get(key)
            if known is not None:
                self._verdicts.move_to_end(key)
        if known is not None:
            return self._count(known, cached=1)
        chosen = choose_tests(problem, self._max_tests)
        try:
            verdict, ran = self._run(code, problem, chosen)
        except NoSandbox as failure:
            raise RunError(
                f"a sandbox to grade a program in ({self.isolation}) did not work: {failure}"
            ) from failure
        if verdict.outcome != "timeout":
            with self._lock:
                self._verdicts[key] = verdict
                if len(self._verdicts) > self._cache_entries:
                    self._verdicts.popitem(last=False)
        return self._count(verdict, tests=ran, left_out=len(problem.tests) - len(chosen))

    def _run(self, code: str, problem: Problem, chosen: list[int]) -> tuple[Verdict, int]:
        """Runs the chosen tests up to the first that is not passed; how many ran."""
        agree = {"stdin": same_output, "call": same_value}[problem.kind]
        with Sandbox(self.isolation, self._limits, **self._start) as box:
            for ran, index in enumerate(chosen, 1):
                given, expected = problem.tests[index]
                try:
                    if ran == 1:
                        box.load(kind=problem.kind, name=problem.name, code=code)
                    status, output = box.run(given)
                except OutOfTime:
                    return Verdict("timeout", index), ran
                except Ended:
                    return Verdict("error", index), ran
                if status == CPU_LIMIT:
                    return Verdict("timeout", index), ran
                if status or len(output) >= self._limits.output_bytes:
                    return Verdict("error", index), ran
                if not agree(output.decode(errors="replace"), expected):
                    return Verdict("failed", index), ran
        return Verdict("passed"), len(chosen)

    def _count(self, verdict: Verdict, **more: int) -> Verdict:
        with self._lock:
            self._counts.update({verdict.outcome: 1, **more})
        return verdict
