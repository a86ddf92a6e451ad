"""A benchmark: n samples of each of its problems, and what they say.

prompts -> sample -> responses.jsonl -> Grades.fill -> grades.jsonl -> measure -> result.json
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from oapl_jax.errors import RunError
from oapl_jax.evaluation.estimators import intervals, maj_at_n, pass_curve
from oapl_jax.evaluation.grades import Grades
from oapl_jax.evaluation.responses import Responses
from oapl_jax.rollout.sampler import Sampler, Sampling
from oapl_jax.structs import Prompt

FORMAT = "oapl_jax evaluation 1"


def sample(
    sampler: Sampler,
    prompts: Sequence[Prompt],
    responses: Responses,
    *,
    at_once: int,
    version: int,
    sampling: Sampling,
    progress: Callable[[int], None],
) -> None:
    """Samples what is missing of the n responses to each prompt.

    Samples from index s on of the i-th of P prompts are asked for as draw s P + i, so whatever was
    sampled before, in whatever portions, no two have the same random numbers.

    Args:
      sampler: holds the policy.
      prompts: of all problems.
      responses: those that there are; the others are added as they come.
      at_once: the most samples of a request.
      version: of the policy; samples of another one are not taken.
      sampling: how tokens are drawn.
      progress: hears how many samples there are.

    Raises:
      RunError: if some could not be sampled.
    """
    responses.begin()
    wanted = list(missing(responses.there, at_once))
    for count in sorted({count for _, _, count in wanted}, reverse=True):
        asked = {start * len(prompts) + row: (row, start) for start, row, c in wanted if c == count}
        redrawn = [replace(prompts[row], stream_index=draw) for draw, (row, _) in asked.items()]
        for sampled in sampler.generate(redrawn, n=count, sampling=sampling):
            if {rollout.policy_version for rollout in sampled.rollouts} == {version}:
                _, start = asked[sampled.prompt.stream_index]
                responses.append(start, sampled)
                progress(int(responses.there.sum()))
    lost = int((~responses.there).sum())
    if lost:
        raise RunError(
            f"{lost} of {responses.there.size} responses could not be sampled from version "
            f"{version}; the same command samples them"
        )


def missing(there: np.ndarray, at_once: int) -> Iterator[tuple[int, int, int]]:
    """(start, row, count) of the requests for what is not there, those of the first samples first.

    Args:
      there: bool[P, n].
      at_once: the largest count.
    """
    requests = []
    for row, of_prompt in enumerate(there):
        free = np.flatnonzero(~of_prompt)
        for run in np.split(free, np.flatnonzero(np.diff(free) > 1) + 1):
            for start in range(0, len(run), at_once):
                requests.append((int(run[start]), row, len(run[start : start + at_once])))
    return iter(sorted(requests))


def measure(
    prompts: Sequence[Prompt],
    responses: Responses,
    grades: Grades,
    *,
    left_out: int,
    resamples: int,
    seed: int,
) -> dict[str, Any]:
    """The result, once every sample is there and graded; JSON-able, see docs/evaluation.md.

    Args:
      prompts: of all problems.
      responses, grades: to them.
      left_out: problems of the benchmark whose prompts are too long.
      resamples, seed: of the bootstrap.
    """
    problems, n = responses.there.shape
    correct = grades.correct.sum(axis=1)
    majority = np.array(
        [
            maj_at_n(answers, right.astype(float).tolist())
            for answers, right in zip(grades.answers, grades.correct, strict=True)
        ]
    )

    def value(of_problem: np.ndarray, weights: np.ndarray | None = None) -> dict[str, Any]:
        """The mean over problems, or a ratio of sums, of one number a problem or of a curve."""
        columns = of_problem.reshape(problems, -1).astype(np.float64)
        by = np.ones((problems, 1)) if weights is None else weights[:, None]
        low, high = intervals(columns, by, resamples=resamples, seed=seed)
        found = {"value": columns.sum(axis=0) / by.sum(axis=0), "low": low, "high": high}
        return {k: v.tolist() if of_problem.ndim == 2 else float(v[0]) for k, v in found.items()}

    tokens = responses.lengths.sum(axis=1)
    return {
        "format": FORMAT,
        "about": responses.about,
        "graded": grades.about,
        "problems": problems,
        "left_out": left_out,
        "samples": n,
        "pass@k": value(np.array([pass_curve(n, int(c)) for c in correct])),
        "avg@n": value(correct / n),
        "maj@n": value(majority),
        "length": value(tokens / n),
        "truncated": value(responses.truncated.mean(axis=1)),
        "entropy": value(-responses.logp.sum(axis=1), tokens),
        "verdicts": dict(grades.verdicts),
        "bootstrap": {"resamples": resamples, "seed": seed},
        "seconds": {
            "sampling": round(responses.seconds, 3),
            "grading": round(grades.seconds, 3),
        },
        "per_problem": [
            {
                "id": prompt.id,
                "correct": int(correct[row]),
                "majority": float(majority[row]),
                "tokens": int(tokens[row]),
                "truncated": int(responses.truncated[row].sum()),
                "logp": float(responses.logp[row].sum()),
            }
            for row, prompt in enumerate(prompts)
        ],
    }
