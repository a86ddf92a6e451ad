"""The verifier of programs: 1 if a response's program passes every test of its problem, else 0.

The program runs in a sandbox that gets inputs and never an expected output; outputs are compared
here. So there is nothing inside to patch, read or skip: only right outputs are rewarded.
"""

import dataclasses
import hashlib
import threading
import warnings
from collections import Counter, OrderedDict
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing

from oapl_jax.config import CodeRewardConfig
from oapl_jax.errors import RunError, UserError
from oapl_jax.rewards.code.problems import (
    Problem,
    choose_tests,
    extract_code,
    parse_problem,
    same_output,
    same_value,
)
from oapl_jax.rewards.code.sandbox import NoSandbox, Sandbox, find_bwrap
from oapl_jax.rewards.worker_process import Ended, Late

FOLDER_BYTES = 1 << 16  # of a temporary folder, beside the input
CPU_LIMIT = -24  # exit code of a program that its CPU limit ended (SIGXCPU)


@dataclasses.dataclass(frozen=True)
class CodeVerdict:
    """The outcome of a program.

    Attributes:
      outcome: "passed"; "failed" (a wrong output), "timeout" or "error" (it raised, was killed or
        exceeded a limit) at a test; "no_code" (the response holds no program).
      test: index, in the record, of the test at which it stopped, if any.
    """

    outcome: str
    test: int | None = None

    @property
    def reward(self) -> float:
        return float(self.outcome == "passed")


class CodeVerifier:
    """Grades programs, several at a time; every method is thread-safe.

    Verdicts are remembered by content; no timeouts, which the machine may have caused.

    Raises:
      UserError: if this machine can't isolate a program and `allow_unsafe` is not set. With it,
        programs can read, and write, every file that this user can.
    """

    def __init__(self, config: CodeRewardConfig):
        self._config = config
        self.bwrap = self._find_bwrap()
        self._pool = ThreadPoolExecutor(config.parallel, thread_name_prefix="programs")
        self._lock = threading.Lock()
        self._verdicts: OrderedDict[bytes, CodeVerdict] = OrderedDict()
        self._counts: Counter[str] = Counter()

    def verify(self, response: str, answer: str) -> CodeVerdict:
        """Runs a response's program on the tests in a record's `answer`.

        Raises:
          UserError: if the tests can't be read, or one does not fit into the limits.
          RunError: if no sandbox starts; the program is not to blame, and gets no reward of 0.
        """
        return self.verify_many([(response, parse_problem(answer))])[0]

    def verify_many(self, pairs: Iterable[tuple[str, Problem]]) -> list[CodeVerdict]:
        """Verdicts on pairs of response and problem; errors as in `verify`."""
        running = [self._pool.submit(self._verify, *pair) for pair in pairs]
        return [future.result() for future in running]

    def final_answer(self, response: str) -> str:
        """The program of a response, for a vote; "" if it has none."""
        return extract_code(response, thinking_opened=self._config.thinking_opened) or ""

    def counts(self) -> dict[str, int]:
        """Verdicts by outcome; of these `cached`; `tests` that ran; `left_out` by max_tests."""
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
        code = extract_code(response, thinking_opened=self._config.thinking_opened)
        if code is None:
            return self._count(CodeVerdict("no_code"))
        self._check_fits(problem)
        key = hashlib.sha256(problem.digest + code.encode(errors="surrogatepass")).digest()
        with self._lock:
            known = self._verdicts.get(key)
            if known is not None:
                self._verdicts.move_to_end(key)
        if known is not None:
            return self._count(known, cached=1)
        chosen = choose_tests(problem, self._config.max_tests)
        try:
            verdict, ran = self._run_tests(code, problem, chosen)
        except NoSandbox as failure:
            raise RunError(f"the sandbox of a program did not work: {failure}") from failure
        if verdict.outcome != "timeout":
            with self._lock:
                self._verdicts[key] = verdict
                if len(self._verdicts) > self._config.cache_entries:
                    self._verdicts.popitem(last=False)
        return self._count(verdict, tests=ran, left_out=len(problem.tests) - len(chosen))

    def _check_fits(self, problem: Problem) -> None:
        longest_input, longest_output = problem.sizes
        needs = {
            "temporary_bytes": longest_input + FOLDER_BYTES,
            "output_bytes": longest_output + 1,
        }
        for name, needed in needs.items():
            if needed > (limit := getattr(self._config, name)):
                raise UserError(
                    f"rewards.code.{name}={limit} is too small for a test of the data; raise it to "
                    f"{needed}"
                )

    def _run_tests(self, code: str, problem: Problem, chosen: list[int]) -> tuple[CodeVerdict, int]:
        """Runs the chosen tests up to the first that is not passed; how many ran."""
        agree = {"stdin": same_output, "call": same_value}[problem.kind]
        with closing(Sandbox(self.bwrap, self._config)) as sandbox:
            for ran, index in enumerate(chosen, 1):
                given, expected = problem.tests[index]
                try:
                    if ran == 1:
                        sandbox.load_program(kind=problem.kind, name=problem.name, code=code)
                    status, output = sandbox.run_test(given)
                except Late:
                    return CodeVerdict("timeout", index), ran
                except Ended:
                    return CodeVerdict("error", index), ran
                if status == CPU_LIMIT:
                    return CodeVerdict("timeout", index), ran
                if status or len(output) >= self._config.output_bytes:
                    return CodeVerdict("error", index), ran
                if not agree(output.decode(errors="replace"), expected):
                    return CodeVerdict("failed", index), ran
        return CodeVerdict("passed"), len(chosen)

    def _count(self, verdict: CodeVerdict, **more: int) -> CodeVerdict:
        with self._lock:
            self._counts.update({verdict.outcome: 1, **more})
        return verdict
