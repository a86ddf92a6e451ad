"""What the responses to a benchmark are worth: grades.jsonl.

The first line says what decides a grade (see `describe`); a file that was graded otherwise is begun
anew. Every other line grades a line of responses.jsonl:

    prompt, start    of that line
    logp             its sums, by which other responses in the same place are told apart
    reward           of each sample
    answer           what each sample says at its end, for the vote
    verdicts         the verifier's counts since the line before, or since grading began
    seconds          wall-clock, likewise
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
from oapl_jax.evaluation.jsonl import Lines
from oapl_jax.evaluation.responses import Responses
from oapl_jax.structs import Prompt, Rollout

FORMAT = "oapl_jax grades 1"
# Those that have a say in rewards.
LIBRARIES = ("latex2sympy2_extended", "math-verify", "pylatexenc", "rapidfuzz", "sympy")
# Settings that decide how fast a grade comes and not what it is.
SPEED = {
    "math": ("processes", "recycle_after"),
    "code": ("parallel", "start_seconds", "cache_entries"),
    "documents": (),
}

# (prompt, responses) -> their rewards, and their final answers.
Judge = Callable[[Prompt, Sequence[Rollout]], tuple[Sequence[float], Sequence[str]]]


def describe(prompts: Sequence[Prompt], settings: Mapping[str, Any]) -> dict[str, Any]:
    """What decides the grade of a given response, JSON-able: the reference answers, the sources,
    libraries and settings of the rewards.

    Args:
      prompts: of all problems, of one task.
      settings: by task, of the verifiers that have some.
    """
    task = prompts[0].task
    own = settings[task] if task in SPEED else {}  # the embedded tasks have none
    sources = hashlib.sha256()
    root = Path(rewards.__file__).parent
    for path in sorted(root.rglob("*.py")):
        sources.update(f"{path.relative_to(root)}\n".encode() + path.read_bytes())
    answers = json.dumps(sorted([p.id, p.task, p.answer] for p in prompts))
    return {
        "format": FORMAT,
        "answers": hashlib.sha256(answers.encode()).hexdigest(),
        "grader": sources.hexdigest(),
        "libraries": {name: metadata.version(name) for name in LIBRARIES},
        "settings": {k: v for k, v in own.items() if k not in SPEED[task]},
    }


class Grades:
    """The grades of the first n samples of each prompt: on disk, and in memory.

    Args:
      path: of the file.
      about: see `describe`.
      prompts: of all problems.
      responses: that are to be graded.

    Attributes:
      about: as above.
      there: bool[P, n], which samples are graded.
      correct: bool[P, n], whether the reward is 1.
      answers: for each prompt and sample.
      verdicts: the verifier's counts of all that was graded.
      seconds: float, wall-clock, that grading took.

    Raises:
      UserError: see Lines; and for a damaged line.
    """

    def __init__(
        self,
        path: epath.Path,
        about: Mapping[str, Any],
        prompts: Sequence[Prompt],
        responses: Responses,
    ):
        self._logp = responses.logp
        self._rows = {prompt.id: row for row, prompt in enumerate(prompts)}
        self.there, self.correct = np.zeros((2, *responses.there.shape), bool)
        self.answers = [[""] * self.there.shape[1] for _ in prompts]
        self.verdicts: Counter[str] = Counter()
        self.seconds, self._last = 0.0, time.monotonic()
        self._lines = Lines(path, about, replace=True)
        self.about = self._lines.about
        try:
            for number, line in enumerate(self._lines, 2):
                self._count(line, number)
        except BaseException:
            self.close()
            raise

    def fill(
        self,
        responses: Responses,
        prompts: Sequence[Prompt],
        judge: Judge,
        counts: Callable[[], Mapping[str, float]],
        *,
        threads: int,
        progress: Callable[[int], None],
    ) -> None:
        """Grades what is not graded yet.

        Args:
          responses: as above.
          prompts: of all problems.
          judge: called in threads.
          counts: the verifier's, since it was opened.
          threads: requests graded at a time.
          progress: hears how many samples are graded.
        """
        self._last, before = time.monotonic(), Counter(counts())
        by_id = {prompt.id: prompt for prompt in prompts}
        with ThreadPoolExecutor(threads, thread_name_prefix="grade") as graders:
            grading: deque[tuple[str, int, Future]] = deque()

            def settle(until: int) -> None:
                nonlocal before
                while len(grading) > until:
                    prompt_id, start, graded = grading.popleft()
                    rewards, answers = graded.result()
                    after = Counter(counts())
                    self._append(prompt_id, start, rewards, answers, after - before)
                    before = after
                    progress(int(self.there.sum()))

            for prompt_id, start, rollouts in responses.rollouts():
                here = self.there[self._rows[prompt_id], start : start + len(rollouts)]
                if not here.all():
                    asked = graders.submit(judge, by_id[prompt_id], rollouts)
                    grading.append((prompt_id, start, asked))
                    settle(until=2 * threads)
            settle(until=0)

    def close(self) -> None:
        self._lines.close()

    def _append(
        self,
        prompt_id: str,
        start: int,
        reward: Sequence[float],
        answer: Sequence[str],
        verdicts: Mapping[str, float],
    ) -> None:
        now = time.monotonic()
        logp = self._logp[self._rows[prompt_id], start : start + len(reward)]
        line = {
            "prompt": prompt_id,
            "start": start,
            "logp": logp.tolist(),
            "reward": [float(r) for r in reward[: len(logp)]],
            "answer": list(answer[: len(logp)]),
            "verdicts": dict(verdicts),
            "seconds": round(now - self._last, 3),
        }
        self._last = now
        self._lines.append(line)
        self._count(line, None)

    def _count(self, line: Mapping[str, Any], number: int | None) -> None:
        try:
            row, start = self._rows[line["prompt"]], line["start"]
            logp = self._logp[row, start : start + len(line["logp"])]
            if line["logp"][: len(logp)] != logp.tolist():
                return  # of responses that were deleted
            for column in range(start, start + len(logp)):
                self.correct[row, column] = line["reward"][column - start] >= 1
                self.answers[row][column] = line["answer"][column - start]
                self.there[row, column] = True
            self.verdicts.update(line["verdicts"])
            self.seconds += line["seconds"]
        except (LookupError, TypeError, ValueError) as error:
            raise self._lines.damaged(number, f"{error!r}") from error
