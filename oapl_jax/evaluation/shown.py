"""Responses for people: sampled from a split, graded, and printed with verdict and reason."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence

from oapl_jax.evaluation.in_memory import in_order
from oapl_jax.rewards.grader import Grade
from oapl_jax.rollout.sampler import Sampler, Sampling
from oapl_jax.structs import Prompt, Rollout

MAX_REFERENCE = 500  # characters; the tests of a program have megabytes


@dataclasses.dataclass(frozen=True)
class Graded:
    """A response and its grade."""

    prompt: Prompt
    rollout: Rollout
    grade: Grade

    def format(self, text: str) -> str:
        """A block of lines, a name and a value each; `text` is the response's."""
        reference, cut = self.prompt.answer, MAX_REFERENCE
        if len(reference) > cut:
            reference = f"{reference[:cut]} .. ({len(reference)} characters)"
        values = {
            "prompt": self.prompt.text,
            "reference": reference,
            "response": text,
            "extracted": self.grade.extracted,
            "verdict": f"{self.grade.verdict}, reward {self.grade.reward:g}",
            "why": self.grade.reason,
            "tokens": f"{len(self.rollout.tokens)}, finished by {self.rollout.finish_reason}",
        }
        lines = (f"  {name:<11}{_indented(value)}".rstrip() for name, value in values.items())
        return "\n".join(lines) + "\n"


def grade_responses(
    sampler: Sampler,
    prompts: Sequence[Prompt],
    grade: Callable[[Prompt, Rollout], Grade],
    sampling: Sampling,
    *,
    at_once: int,
) -> Iterator[Graded]:
    """Samples one response to each prompt, in their order, `at_once` prompts at a time."""
    for start in range(0, len(prompts), at_once):
        some = prompts[start : start + at_once]
        sampled = in_order(sampler, some, n=1, sampling=sampling)
        for prompt, (rollout,) in zip(some, sampled, strict=True):
            yield Graded(prompt, rollout, grade(prompt, rollout))


def _indented(text: str) -> str:
    return text.replace("\n", "\n" + 13 * " ")
