"""The Grader: rewards of responses by the verifier of the prompt's task."""

import threading

from transformers import PreTrainedTokenizerBase

from oapl_jax.config import RewardsConfig
from oapl_jax.data.prompts import response_text
from oapl_jax.rewards.code.verifier import CodeVerifier
from oapl_jax.rewards.documents.verifier import DocumentVerifier
from oapl_jax.rewards.math.verifier import MathVerifier
from oapl_jax.rewards.tasks import FINAL_ANSWERS, VERIFIERS
from oapl_jax.structs import Prompt, Rollout

OPENED = {"math": MathVerifier, "code": CodeVerifier, "documents": DocumentVerifier}


class Grader:
    """Decodes responses and asks the task's verifier, which its first prompt opens; thread-safe.

    Rewards are within 0 and 1, and 1 is a right response; only documents have others between.
    A response that was cut off gets 0 and is trained as a negative: there is no overlong masking
    (the code released with arXiv 2602.19362).
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, config: RewardsConfig):
        self._tokenizer, self._config = tokenizer, config
        self._opened: dict[str, MathVerifier | CodeVerifier | DocumentVerifier] = {}
        self._lock = threading.Lock()

    def reward(self, prompt: Prompt, rollout: Rollout) -> float:
        if rollout.finish_reason == "length":
            return 0.0
        text = response_text(self._tokenizer, rollout.tokens)
        if prompt.task in VERIFIERS:
            return VERIFIERS[prompt.task](text, prompt.answer)
        return self._verifier(prompt.task).verify(text, prompt.answer).reward

    def final_answer(self, prompt: Prompt, rollout: Rollout) -> str:
        """The final answer of a response for a vote; of code its program, of documents all text."""
        text = response_text(self._tokenizer, rollout.tokens)
        if prompt.task in FINAL_ANSWERS:
            return FINAL_ANSWERS[prompt.task](text)
        return self._verifier(prompt.task).final_answer(text)

    def metrics(self) -> dict[str, float]:
        """Counts of verdicts so far, of the opened verifiers."""
        return {
            f"rewards/{task}/{outcome}": count
            for task, verifier in self._opened.items()
            for outcome, count in verifier.counts().items()
        }

    def close(self) -> None:
        for verifier in self._opened.values():
            verifier.close()

    def _verifier(self, task: str) -> MathVerifier | CodeVerifier | DocumentVerifier:
        with self._lock:
            if task not in self._opened:
                self._opened[task] = OPENED[task](getattr(self._config, task))
            return self._opened[task]
