"""Benchmarks: n responses to each problem, graded and measured.

prompts -> dataset.fill -> responses/ -> Grades.fill -> grades.jsonl -> measure -> result.json
"""

import hashlib
import json
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
from etils import epath

from oapl_jax import rewards
from oapl_jax.data.public import programs
from oapl_jax.errors import UserError
from oapl_jax.evaluation.estimators import intervals, maj_at_n, pass_curve
from oapl_jax.files import JsonLines, code_digest, is_local
from oapl_jax.rewards.function.verifier import source_files
from oapl_jax.rewards.grader import Grade
from oapl_jax.rollout.dataset import Dataset
from oapl_jax.structs import Prompt, Rollout

FORMAT = "oapl_jax evaluation 1"
GRADES_FORMAT = "oapl_jax grades 3"
# Libraries that decide rewards.
LIBRARIES = ("latex2sympy2_extended", "math-verify", "pylatexenc", "rapidfuzz", "sympy")
# Settings of the verifiers that decide speed and not rewards.
SPEED = {
    "math": ("processes", "recycle_after"),
    "code": ("parallel", "start_seconds", "cache_entries"),
    "documents": (),
}

# (prompt, responses) -> their texts, and their grades.
Judge = Callable[[Prompt, Sequence[Rollout]], tuple[Sequence[str], Sequence[Grade]]]


def grader_identity(prompts: Sequence[Prompt], settings: Mapping[str, Any]) -> dict[str, Any]:
    """Identifies the grader, JSON-able: reference answers; code, libraries and settings of rewards.

    All prompts are of one task; `settings` has those of the verifiers by task, and "function" for
    a reward function, whose module is part of the code.
    """
    task, function = prompts[0].task, settings.get("function", "")
    own = settings[task] if task in SPEED else {}  # the synthetic tasks have none
    code = [Path(programs.__file__), *Path(rewards.__file__).parent.rglob("*.py")]
    if function:
        own = {"function": function}
        code += source_files(function)
    answers = json.dumps(sorted([p.id, p.task, p.answer, p.metadata] for p in prompts))
    about = {
        "format": GRADES_FORMAT,
        "answers": hashlib.sha256(answers.encode()).hexdigest(),
        "grader": code_digest(sorted(code)),
        "libraries": {name: metadata.version(name) for name in LIBRARIES},
        "settings": {k: v for k, v in own.items() if k not in SPEED.get(task, ())},
    }
    return json.loads(json.dumps(about))


class Samples:
    """Measures of the first n responses to each of P prompts, read from a dataset of `fill`."""

    def __init__(self, dataset: Dataset, *, prompts: int, n: int):
        self.lengths = np.zeros((prompts, n), np.int64)  # tokens
        self.logp = np.zeros((prompts, n))  # log-probability of the response, nats
        self.truncated = np.zeros((prompts, n), bool)
        # Of sampling, summed over all starts.
        self.seconds = sum(shard["seconds"] for shard in dataset.manifest["shards"].values())
        for group in dataset:
            start, row = divmod(group.prompt.stream_index, prompts)
            for column, rollout in enumerate(group.rollouts[: max(n - start, 0)], start):
                self.lengths[row, column] = len(rollout.tokens)
                self.logp[row, column] = rollout.behavior_logp.sum(dtype=np.float64)
                self.truncated[row, column] = rollout.finish_reason == "length"


class Grades:
    """Grades of the first n responses to each of P prompts, in memory and in a JSON lines file.

    The first line identifies the grader; the file of another grader is overwritten. Every other
    line grades one group of responses:

        prompt, start    id of the problem, and index of the group's first response
        logp             log-probability of each response, by which new responses in the same place
                         are noticed
        question         text of the problem
        response         text of each response, without special tokens
        reward, answer, verdict, reason
                         of each response, see rewards.grader.Grade
        verdicts         the verifier's counts since the line before, or since grading began
        seconds          wall-clock, likewise

    Args:
      about: see `grader_identity`.
      logp: float64[P, n], of the responses.

    Attributes:
      graded, correct: bool[P, n]; a response is correct if its reward is 1.
      answers: final answer, for each prompt and response.
      verdicts, seconds: as in the file, summed.

    Raises:
      UserError: for a damaged line, or if another process grades.
    """

    def __init__(
        self,
        path: epath.Path,
        about: Mapping[str, Any],
        prompts: Sequence[Prompt],
        logp: np.ndarray,
    ):
        self.about, self._prompts, self._logp = dict(about), prompts, logp
        self._rows = {prompt.id: row for row, prompt in enumerate(prompts)}
        self.graded, self.correct = np.zeros((2, *logp.shape), bool)
        self.answers = [[""] * logp.shape[1] for _ in prompts]
        self.verdicts, self.seconds = Counter[str](), 0.0
        # In a bucket the caller holds a lease on the directory.
        self._lines = JsonLines(path, exclusive=is_local(path))
        try:
            lines = iter(self._lines)
            if next(lines, None) == self.about:
                for number, line in enumerate(lines, 2):
                    self._count(line, number)
            else:
                self._lines.truncate(0)
                self._lines.append(self.about)
        except BaseException:
            self.close()
            raise

    def fill(
        self,
        dataset: Dataset,
        judge: Judge,
        counts: Callable[[], Mapping[str, float]],
        *,
        threads: int,
        progress: Callable[[int], None],
    ) -> None:
        """Grades the responses that have no grade yet, `threads` groups at a time.

        `counts` are the verifier's since it was opened; `progress` takes the number graded.
        """
        last, before = time.monotonic(), Counter(counts())
        grading: deque[tuple[int, int, Future]] = deque()

        def append_graded(most: int) -> None:
            nonlocal last, before
            while len(grading) > most:
                row, start, future = grading.popleft()
                texts, graded = future.result()
                now, after = time.monotonic(), Counter(counts())
                logp = self._logp[row, start : start + len(graded)].tolist()
                graded = graded[: len(logp)]
                line = {
                    "prompt": self._prompts[row].id,
                    "question": self._prompts[row].text,
                    "start": start,
                    "response": list(texts[: len(logp)]),
                    "reward": [float(grade.reward) for grade in graded],
                    "answer": [grade.extracted for grade in graded],
                    "verdict": [grade.verdict for grade in graded],
                    "reason": [grade.reason for grade in graded],
                    "logp": logp,
                    "verdicts": dict(after - before),
                    "seconds": round(now - last, 3),
                }
                last, before = now, after
                self._lines.append(line)
                self._count(line, 0)
                progress(int(self.graded.sum()))

        with ThreadPoolExecutor(threads, thread_name_prefix="grade") as graders:
            for group in dataset:
                start, row = divmod(group.prompt.stream_index, len(self._prompts))
                if not self.graded[row, start : start + len(group.rollouts)].all():
                    future = graders.submit(judge, self._prompts[row], group.rollouts)
                    grading.append((row, start, future))
                    append_graded(most=2 * threads)
            append_graded(most=0)

    def close(self) -> None:
        self._lines.close()

    def _count(self, line: Mapping[str, Any], number: int) -> None:
        try:
            row, start = self._rows[line["prompt"]], line["start"]
            logp = self._logp[row, start : start + len(line["logp"])].tolist()
            if line["logp"][: len(logp)] != logp:
                return  # the grade of responses that were deleted
            for column in range(start, start + len(logp)):
                self.correct[row, column] = line["reward"][column - start] >= 1
                self.answers[row][column] = line["answer"][column - start]
                self.graded[row, column] = True
            self.verdicts.update(line["verdicts"])
            self.seconds += line["seconds"]
        except (LookupError, TypeError, ValueError) as error:
            raise UserError(
                f"line {number} of {self._lines.path} is damaged ({error!r}); delete the file"
            ) from error


def measure(
    prompts: Sequence[Prompt],
    samples: Samples,
    grades: Grades,
    *,
    about: Mapping[str, Any],
    dropped: int,
    resamples: int,
    seed: int,
) -> dict[str, Any]:
    """Computes the result of graded responses, JSON-able; docs/evaluation.md defines each number.

    `about` identifies the responses; `dropped` counts problems whose prompts are too long.
    """
    problems, n = samples.lengths.shape
    correct, tokens = grades.correct.sum(axis=1), samples.lengths.sum(axis=1)
    votes = zip(grades.answers, grades.correct.astype(float).tolist(), strict=True)
    majority = np.array([maj_at_n(answers, right) for answers, right in votes])

    def value(of_problem: np.ndarray, weights: np.ndarray | None = None) -> dict[str, Any]:
        """The mean over problems, or a ratio of sums, of one number a problem or of a curve."""
        columns = of_problem.reshape(problems, -1).astype(np.float64)
        by = np.ones((problems, 1)) if weights is None else weights[:, None]
        low, high = intervals(columns, by, resamples=resamples, seed=seed)
        found = {"value": columns.sum(axis=0) / by.sum(axis=0), "low": low, "high": high}
        return {k: v.tolist() if of_problem.ndim == 2 else float(v[0]) for k, v in found.items()}

    return {
        "format": FORMAT,
        "about": dict(about),
        "graded": grades.about,
        "problems": problems,
        "left_out": dropped,
        "samples": n,
        "pass@k": value(np.array([pass_curve(n, int(c)) for c in correct])),
        "avg@n": value(correct / n),
        "maj@n": value(majority),
        "length": value(tokens / n),
        "truncated": value(samples.truncated.mean(axis=1)),
        "entropy": value(-samples.logp.sum(axis=1), tokens),
        "verdicts": dict(grades.verdicts),
        "bootstrap": {"resamples": resamples, "seed": seed},
        "seconds": {"sampling": round(samples.seconds, 3), "grading": round(grades.seconds, 3)},
        "per_problem": [
            {
                "id": prompt.id,
                "correct": int(correct[row]),
                "majority": float(majority[row]),
                "tokens": int(tokens[row]),
                "truncated": int(samples.truncated[row].sum()),
                "logp": float(samples.logp[row].sum()),
            }
            for row, prompt in enumerate(prompts)
        ],
    }
