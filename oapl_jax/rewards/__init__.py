"""Rewards: what a response is worth, by the verifier of the prompt's task."""

import threading
from collections.abc import Mapping
from typing import Any

from oapl_jax.data.prompts import response_text
from oapl_jax.rewards.code.problems import extract, parse_problem
from oapl_jax.rewards.code.programs import Programs
from oapl_jax.rewards.documents.documents import Documents
from oapl_jax.rewards.math.answers import Answers
from oapl_jax.rewards.tasks import FINAL_ANSWERS, VERIFIERS
from oapl_jax.structs import Prompt, Rollout

TASKS = (*VERIFIERS, "math", "code", "documents")


class Grader:
    """Turns token ids into text, and asks the verifier of the task. Any thread.

    Rewards are within 0 and 1, and 1 is a right response: documents alone have others between.
    A response that was cut off gets 0 and is trained as a negative: there is no overlong masking
    (the code released with arXiv 2602.19362).

    Args:
      tokenizer: of the policy.
      math: keyword arguments of Answers, opened for the first prompt of task "math".
      code: keyword arguments of Programs, opened for the first prompt of task "code".
      documents: keyword arguments of Documents, opened for the first prompt of task "documents".
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        math: Mapping[str, Any],
        code: Mapping[str, Any],
        documents: Mapping[str, Any],
    ):
        self._tokenizer = tokenizer
        self._settings = {"math": math, "code": code, "documents": documents}
        self._opened: dict[str, Answers | Programs | Documents] = {}
        self._lock = threading.Lock()

    def reward(self, prompt: Prompt, rollout: Rollout) -> float:
        if rollout.finish_reason == "length":
            return 0.0
        text = response_text(self._tokenizer, rollout.tokens)
        if prompt.task == "math":
            return self._answers.verify(text, prompt.answer).reward
        if prompt.task == "code":
            return self._programs.grade(text, parse_problem(prompt.answer)).reward
        if prompt.task == "documents":
            return self._documents.grade(text, prompt.answer).reward
        return VERIFIERS[prompt.task](text, prompt.answer)

    def final_answer(self, prompt: Prompt, rollout: Rollout) -> str:
        """What a response says at its end, for a vote; of programs and documents, all text."""
        text = response_text(self._tokenizer, rollout.tokens)
        if prompt.task == "math":
            return self._answers.final_answer(text)
        if prompt.task == "code":
            return extract(text, thinking_opened=self._settings["code"]["thinking_opened"]) or ""
        if prompt.task == "documents":
            return text
        return FINAL_ANSWERS[prompt.task](text)

    def metrics(self) -> dict[str, float]:
        """Verdicts so far, of the verifiers that were opened."""
        return {
            f"rewards/{task}/{outcome}": count
            for task, verifier in self._opened.items()
            for outcome, count in verifier.counts().items()
        }

    def close(self) -> None:
        for verifier in self._opened.values():
            verifier.close()

    @property
    def _answers(self) -> Answers:
        return self._open("math", Answers)

    @property
    def _programs(self) -> Programs:
        return self._open("code", Programs)

    @property
    def _documents(self) -> Documents:
        return self._open("documents", Documents)

    def _open(self, task: str, make: Any) -> Any:
        with self._lock:
            if task not in self._opened:
                self._opened[task] = make(**self._settings[task])
            return self._opened[task]
