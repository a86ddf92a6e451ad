"""The Grader: rewards of responses by the verifier of the prompt's task; and its self-check.

The self-check grades known responses on the path of every response, before any sampling:

    record -> chat template -> prompt;  text -> tokens -> Grader: decode, extraction, verifier

A right response without the full reward of 1, or a wrong one with it, ends the run.
"""

import copy
import dataclasses
import itertools
import threading
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from oapl_jax.config import RewardsConfig
from oapl_jax.data.prompts import PromptTemplate, response_text
from oapl_jax.data.records import Record, user
from oapl_jax.data.synthetic.demonstrations import solution
from oapl_jax.data.synthetic.tasks import TASKS
from oapl_jax.errors import UserError
from oapl_jax.rewards.code.verifier import CodeVerifier
from oapl_jax.rewards.documents.verifier import DocumentVerifier
from oapl_jax.rewards.function.verifier import FunctionVerifier, PartMeans
from oapl_jax.rewards.math.verifier import MathVerifier
from oapl_jax.rewards.tasks import FINAL_ANSWERS, VERIFIERS
from oapl_jax.rewards.verdicts import TRUNCATED, Verdict, explain
from oapl_jax.structs import Prompt, Rollout

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

OPENED = {"math": MathVerifier, "code": CodeVerifier, "documents": DocumentVerifier}
CHECKED = 2  # records of the data, beside the known problems
SHOWN = 200  # characters of a response in the sentence
PRINTS = "```python\na, b = map(int, input().split())\nprint(a + b)\n```"
RETURNS = "```python\ndef add(a, b):\n    return a + b\n```"
HALF = ("What is one half?", r"\frac{1}{2}")
SUM = (
    "Read two integers and print their sum.",
    '{"kind": "stdin", "name": "", "tests": [["3 4\\n", "7\\n"], ["-1 1\\n", "0\\n"]]}',
)
ADD = (
    "Write a function add(a, b) that adds two integers.",
    '{"kind": "call", "name": "add", "tests": [["3\\n4", "7"], ["-1\\n1", "0"]]}',
)
# Problems of each task, as question and answer, with right responses and wrong ones.
KNOWN: dict[str, Sequence[tuple[tuple[str, str], Sequence[str], Sequence[str]]]] = {
    "math": (
        (HALF, (r"\boxed{\frac{1}{2}}", "So the answer is $0.5$."), (r"\boxed{2}", "I see.\n\n?")),
    ),
    "code": (
        (SUM, (PRINTS,), (PRINTS.replace("+", "-"), PRINTS.replace("```", ""))),
        (ADD, (RETURNS,), (RETURNS.replace("+", "-"), PRINTS)),
    ),
}
# A wrong response to any problem of a task, beside the empty one.
NEVER = {"math": (r"\boxed{\text{no answer}}",), "code": ("```python\nraise ValueError\n```",)}


class Grade(NamedTuple):
    """The reward of a response, and how its verifier came to it; see rewards/verdicts.py."""

    reward: float
    extracted: str  # the final answer; "" if there is none
    verdict: str
    reason: str


class Grader:
    """Decodes responses and asks the reward function of the configuration, or the task's verifier,
    which its first prompt opens; thread-safe.

    Rewards of verifiers are within 0 and 1, and 1 is a right response; only documents have others
    between. A reward function may give any number, and from 1 on a response is right.
    A response that was cut off gets 0 and is trained as a negative: there is no overlong masking
    (the code released with arXiv 2602.19362).

    Attributes:
      function: the reward function; None without one.
      parts: means of the named parts of its rewards.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", config: RewardsConfig):
        self._tokenizer, self._config = tokenizer, config
        self._opened: dict[str, MathVerifier | CodeVerifier | DocumentVerifier] = {}
        self._lock = threading.Lock()
        self.function, self.parts = None, PartMeans()
        if config.function:
            self.function = FunctionVerifier(config.function, config.function_pool)

    def apart(self) -> "Grader":
        """This grader with means of parts of its own, for evaluations beside training."""
        other = copy.copy(self)
        other.parts = PartMeans()
        return other

    def reward(self, prompt: Prompt, rollout: Rollout) -> float:
        if rollout.finish_reason == "length":
            return 0.0
        verdict = self._verdict(prompt, rollout)
        return verdict if isinstance(verdict, float | int) else verdict.reward

    def grade(self, prompt: Prompt, rollout: Rollout) -> Grade:
        """The reward, as `reward` gives it, with the final answer, the verdict and its reason."""
        extracted = self.final_answer(prompt, rollout)
        if rollout.finish_reason == "length":
            return Grade(0.0, extracted, "wrong", TRUNCATED)
        verdict = self._verdict(prompt, rollout)
        if isinstance(verdict, float | int):  # of a generator of problems
            right, reason = explain(verdict)
            if verdict < 1:
                reason = f"{extracted or 'no answer'} is not accepted, {prompt.answer} is"
            return Grade(verdict, extracted, right, reason)
        return Grade(verdict.reward, extracted, *explain(verdict))

    def final_answer(self, prompt: Prompt, rollout: Rollout) -> str:
        """The final answer of a response for a vote; of code its program, of documents all text."""
        text = response_text(self._tokenizer, rollout.tokens)
        if self.function:
            return self.function.final_answer(text)
        if prompt.task in FINAL_ANSWERS:
            return FINAL_ANSWERS[prompt.task](text)
        return self._verifier(prompt.task).final_answer(text)

    def metrics(self) -> dict[str, float]:
        """Counts of verdicts so far, of the reward function or the opened verifiers."""
        judges = {"function": self.function} if self.function else self._opened
        return {
            f"rewards/{task}/{outcome}": count
            for task, verifier in judges.items()
            for outcome, count in verifier.counts().items()
        }

    def part_means(self) -> dict[str, float]:
        """Means of the named parts of rewards since the last call."""
        return {f"part/{name}": mean for name, mean in self.parts.take().items()}

    def close(self) -> None:
        if self.function:
            self.function.close()
        for verifier in self._opened.values():
            verifier.close()

    def _verdict(self, prompt: Prompt, rollout: Rollout) -> Verdict:
        text = response_text(self._tokenizer, rollout.tokens)
        if self.function:
            verdict = self.function.verify(prompt, text)
            self.parts.add(verdict.parts)
            return verdict
        if prompt.task in VERIFIERS:
            return VERIFIERS[prompt.task](text, prompt.answer)
        return self._verifier(prompt.task).verify(text, prompt.answer)

    def _verifier(self, task: str) -> MathVerifier | CodeVerifier | DocumentVerifier:
        with self._lock:
            if task not in self._opened:
                self._opened[task] = OPENED[task](getattr(self._config, task))
            return self._opened[task]


def check_rewards(grader: Grader, template: PromptTemplate, records: Sequence[Record]) -> None:
    """Grades known responses to the known problems of a task and to its first records that fit.

    Where the chat template leaves a prompt inside a thinking part, each response first ends it. A
    right answer in a thinking part that never ends must get no reward, nor one that was cut off.
    UserError names the first response whose reward is wrong, or the first record if none is usable.
    Of a reward function no right response is known: a call of it must succeed.
    """
    tokenizer, task = template.tokenizer, template.task
    unlimited = dataclasses.replace(template, max_prompt_tokens=1 << 30)
    cases: list[Any] = []
    for (question, answer), right, wrong in KNOWN.get(task, ()):
        record = Record("self-check", user(question), answer, task, {})
        cases.append((unlimited.make_prompt(record, 0), right, wrong))
    said = [tokenizer.decode(prompt.tokens) for prompt, _, _ in cases]
    opened = any(text.rfind("<think>") > text.rfind("</think>") for text in said)
    fitting = ((prompt, r) for r in records if (prompt := template.prompt(r, 0)))
    fitting = list(itertools.islice(fitting, CHECKED))
    if records and not fitting:
        template.make_prompt(records[0], 0)  # raises the reason
    if grader.function:
        check_function(grader.function, [prompt for prompt, _ in fitting])
        return
    cases += [(prompt, *known_responses(record)) for prompt, record in fitting]
    for prompt, right, wrong in cases:
        for text, kind, finish_reason in trials(right, wrong, thinks=task in KNOWN, opened=opened):
            tokens = tokenizer.encode(text, add_special_tokens=False)
            tokens = np.array([*tokens, tokenizer.eos_token_id], np.int32)
            logp = np.zeros(len(tokens), np.float32)
            rewarded = grader.reward(prompt, Rollout(tokens, logp, 0, finish_reason)) >= 1
            if rewarded != (kind == "right"):
                where = "inside" if opened else "outside"
                raise UserError(
                    f"the reward self-check failed: to {prompt.text[:SHOWN]!r} the response "
                    f"{text[:SHOWN]!r} is {kind} and got {'' if rewarded else 'no '}full reward; "
                    f"look at config.rewards and the tokenizer (its chat template leaves a prompt "
                    f"{where} a thinking part, as rewards.*.thinking_opened must say)"
                )


def check_function(function: FunctionVerifier, prompts: Sequence[Prompt]) -> None:
    """Calls a reward function for the answers of prompts, and for empty responses; UserError if
    all calls fail."""
    responses = [(prompt, text) for prompt in prompts for text in (prompt.answer, "")]
    verdicts = [function.verify(prompt, text) for prompt, text in responses]
    if verdicts and all(verdict.outcome in ("error", "timeout") for verdict in verdicts):
        raise UserError(
            f"the reward self-check failed: rewards.function={function.name} gave no reward to any "
            f"of {len(verdicts)} responses ({verdicts[0].reason}); correct it"
        )


def trials(
    right: Sequence[str], wrong: Sequence[str], *, thinks: bool, opened: bool
) -> Iterator[tuple[str, str, str]]:
    """Responses, their kinds (only "right" must get full reward), and how they finished; `thinks`:
    the verifier knows of thinking parts; `opened`: the prompt ends inside one."""
    end = "I see.\n</think>\n\n" if opened else ""
    yield from ((end + text, "right", "stop") for text in right)
    yield from ((end + text, "wrong", "stop") for text in wrong)
    for text in right[:1]:
        yield end + text, "right but cut off", "length"
        if thinks:
            begin = "" if opened else "<think>\n"
            yield f"{begin}I see.\n</think>\n\n{text}", "right", "stop"
            yield begin + text, "right but still in the thinking part", "stop"


def known_responses(record: Record) -> tuple[Sequence[str], Sequence[str]]:
    """Right responses to a record of the data, if any is known for sure, and wrong ones."""
    if record.task in TASKS:
        return (solution(record),), (f"{solution(record)}1", "")
    # A release's own programs are not all right, and so no standard.
    right = (solution(record),) if record.task == "math" else ()
    return right, ("", *NEVER.get(record.task, ()))
