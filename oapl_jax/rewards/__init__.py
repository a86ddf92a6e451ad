"""Rewards: what a response is worth, by the verifier of the prompt's task."""

from typing import Any

from oapl_jax.data.prompts import response_text
from oapl_jax.rewards.tasks import FINAL_ANSWERS, VERIFIERS
from oapl_jax.structs import Prompt, Rollout


class Grader:
    """Turns token ids into text, and asks the verifier of the task.

    A response that was cut off gets 0 and is trained as a negative: there is no overlong masking
    (the code released with arXiv 2602.19362).
    """

    def __init__(self, tokenizer: Any):
        self._tokenizer = tokenizer

    def reward(self, prompt: Prompt, rollout: Rollout) -> float:
        if rollout.finish_reason == "length":
            return 0.0
        return VERIFIERS[prompt.task](response_text(self._tokenizer, rollout.tokens), prompt.answer)

    def final_answer(self, prompt: Prompt, rollout: Rollout) -> str:
        return FINAL_ANSWERS[prompt.task](response_text(self._tokenizer, rollout.tokens))
