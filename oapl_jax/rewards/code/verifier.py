"""The verifier of programs: 1 if a response's program passes every test of its problem, else 0.

The program runs in a sandbox that gets inputs and never an expected output; outputs are compared
here. So there is nothing inside to patch, read or skip: only right outputs are rewarded.
"""

import hashlib
import json
import re
import threading
import warnings
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from decimal import Decimal, InvalidOperation
from typing import NamedTuple

from oapl_jax.config import CodeRewardConfig
from oapl_jax.data.public.programs import Problem, longest_tests, parse_problem
from oapl_jax.errors import RunError, UserError
from oapl_jax.rewards.code.sandbox import NoSandbox, Sandbox, find_bwrap
from oapl_jax.rewards.math.extraction import after_thinking
from oapl_jax.rewards.worker_process import Ended, Late

BLOCK = re.compile(r"```(?:\w+)?\n(.*?)```", re.DOTALL)
FOLDER_BYTES = 1 << 16  # of a temporary folder, beside the input
CPU_LIMIT = -24  # exit code of a program that its CPU limit ended (SIGXCPU)


def extract_code(response: str, *, thinking_opened: bool) -> str | None:
    """The last fenced block after the thinking part, as in arXiv 2602.19362's released code."""
    blocks = BLOCK.findall(after_thinking(response, thinking_opened=thinking_opened) or "")
    return blocks[-1].strip() if blocks else None


def same_output(printed: str, expected: str) -> bool:
    """True if two texts agree line by line, each stripped of white space.

    A line that differs must hold the same numbers: 1.50 is 1.5 and 1e3 is 1000, without tolerance.
    This is LiveCodeBench's rule (lcb_runner/evaluation/testing_util.py), as arXiv 2602.19362 has.
    """
    lines, wanted = ([s.strip() for s in t.strip().split("\n")] for t in (printed, expected))
    return len(lines) == len(wanted) and all(map(_same_line, lines, wanted))


def same_value(returned: str, expected: str) -> bool:
    """True if two JSON texts hold equal values in Python, without tolerance: LiveCodeBench's rule,
    but for tuples and integer keys inside of other values, which it takes for different."""
    try:
        return json.loads(returned) == json.loads(expected)
    except (ValueError, RecursionError):
        return False


def same_element(returned: str, expected: str) -> bool:
    """True if JSON texts hold a list of one element and a value equal to that element, without
    tolerance: TACO's releases wrap most expected values, and do not say which."""
    try:
        wanted = json.loads(expected)
        return isinstance(wanted, list) and [json.loads(returned)] == wanted
    except (ValueError, RecursionError):
        return False


# By kind of problem: the readings of an expected output, one of which must hold in every test.
READINGS = {"stdin": (same_output,), "call": (same_value,), "taco": (same_value, same_element)}


def _same_line(line: str, wanted: str) -> bool:
    if line == wanted:
        return True
    try:
        return [Decimal(part) for part in line.split()] == [Decimal(p) for p in wanted.split()]
    except InvalidOperation:
        return False


class CodeVerdict(NamedTuple):
    """The outcome of a program: "passed"; "failed" (a wrong output), "timeout" or "error" (it
    raised, was killed or exceeded a limit) at `test`, an index in the record; "no_code"."""

    outcome: str
    test: int | None = None

    @property
    def reward(self) -> float:
        return float(self.outcome == "passed")


class CodeVerifier:
    """Grades programs, several at a time; every method is thread-safe.

    Verdicts are cached by program and problem, except timeouts: a busy machine may cause one.
    UserError if this machine can't isolate a program and `allow_unsafe` is not set.
    """

    def __init__(self, config: CodeRewardConfig):
        self._config = config
        self.bwrap = self._find_bwrap()
        self._pool = ThreadPoolExecutor(config.parallel, thread_name_prefix="programs")
        self._lock = threading.Lock()
        self._verdicts: dict[bytes, CodeVerdict] = {}
        self._counts: Counter[str] = Counter()

    def verify(self, response: str, answer: str) -> CodeVerdict:
        """Runs a response's program on the tests in a record's `answer`; UserError if they can't be
        read or do not fit into the limits, RunError (and no reward of 0) if no sandbox starts."""
        return self.verify_many([(response, parse_problem(answer))])[0]

    def verify_many(self, pairs: Iterable[tuple[str, Problem]]) -> list[CodeVerdict]:
        running = [self._pool.submit(self._verify, *pair) for pair in pairs]
        return [future.result() for future in running]

    def extract(self, response: str) -> str | None:
        """The program of a response."""
        return extract_code(response, thinking_opened=self._config.thinking_opened)

    def final_answer(self, response: str) -> str:
        return self.extract(response) or ""

    def counts(self) -> dict[str, int]:
        """Verdicts by outcome; of these `cached`; `tests` run; tests `dropped` by max_tests."""
        with self._lock:
            return dict(self._counts)

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)

    def _find_bwrap(self) -> str | None:
        try:
            return find_bwrap(self._config)
        except NoSandbox as reason:
            why = f"programs of the policy can't be isolated on this machine ({reason})"
        if not self._config.allow_unsafe:
            raise UserError(
                f"{why}; allow user namespaces, or set rewards.code.allow_unsafe=True to run them "
                "all the same, with all files of this user open to them"
            )
        warnings.warn(f"{why}; allow_unsafe=True runs them all the same", stacklevel=3)
        return None

    def _verify(self, response: str, problem: Problem) -> CodeVerdict:
        code = self.extract(response)
        if code is None:
            return self._count(CodeVerdict("no_code"))
        room = {"temporary_bytes": FOLDER_BYTES, "output_bytes": 1}
        for (name, beside), longest in zip(room.items(), problem.sizes, strict=True):
            if longest + beside > (limit := getattr(self._config, name)):
                raise UserError(
                    f"rewards.code.{name}={limit} is too small for a test of the data; raise it to "
                    f"{longest + beside}"
                )
        key = hashlib.sha256(problem.digest + code.encode(errors="surrogatepass")).digest()
        with self._lock:
            if known := self._verdicts.pop(key, None):
                self._verdicts[key] = known  # the last that was used
        if known:
            return self._count(known, cached=1)
        chosen = longest_tests(problem.tests, self._config.max_tests)
        try:
            verdict, ran = self._run_tests(code, problem, chosen)
        except NoSandbox as failure:
            raise RunError(f"the sandbox of a program did not work: {failure}") from failure
        if verdict.outcome != "timeout":
            with self._lock:
                self._verdicts[key] = verdict
                if len(self._verdicts) > self._config.cache_entries:
                    del self._verdicts[next(iter(self._verdicts))]  # the longest unused
        return self._count(verdict, tests=ran, dropped=len(problem.tests) - len(chosen))

    def _run_tests(self, code: str, problem: Problem, chosen: list[int]) -> tuple[CodeVerdict, int]:
        """Runs the chosen tests up to the first that is not passed; how many ran."""
        readings = list(READINGS[problem.kind])
        with closing(Sandbox(self.bwrap, self._config)) as sandbox:
            for ran, index in enumerate(chosen, 1):
                given, expected = problem.tests[index]
                try:
                    if ran == 1:
                        sandbox.load_program(kind=problem.kind, name=problem.name, code=code)
                    status, output = sandbox.run_test(given)
                except Ended:
                    return CodeVerdict("error", index), ran
                except Late:
                    status, output = CPU_LIMIT, b""
                if status == CPU_LIMIT:
                    return CodeVerdict("timeout", index), ran
                if status or len(output) >= self._config.output_bytes:
                    return CodeVerdict("error", index), ran
                text = output.decode(errors="replace")
                readings = [same for same in readings if same(text, expected)]
                if not readings:
                    return CodeVerdict("failed", index), ran
        return CodeVerdict("passed"), len(chosen)

    def _count(self, verdict: CodeVerdict, **more: int) -> CodeVerdict:
        with self._lock:
            self._counts.update({verdict.outcome: 1, **more})
        return verdict
