"""The reward self-check: before anything is sampled, known responses go the way of every response.

    record -> chat template -> prompt;  text -> tokens -> Grader: decode, extraction, verifier

A right one that is not paid in full, with 1, or a wrong one that is, ends the run with one
sentence, where a thousand rewards of 0 would have told the same hours later.
"""

import dataclasses
import functools
import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from oapl_jax.data.prompts import make_prompt
from oapl_jax.data.records import Record, user
from oapl_jax.data.synthetic.demonstrations import solution
from oapl_jax.data.synthetic.tasks import TASKS
from oapl_jax.errors import UserError
from oapl_jax.rewards import Grader
from oapl_jax.structs import Prompt, Rollout

CHECKED = 2  # records of the data, beside the known problems
SHOWN = 200  # characters of a response in the sentence

# Problems of each task with responses that are right, and responses that are not.
HALF = Record("self-check", user("What is one half?"), r"\frac{1}{2}", "math", {})
SUM = Record(
    "self-check",
    user("Read two integers and print their sum."),
    '{"kind": "stdin", "name": "", "tests": [["3 4\\n", "7\\n"], ["-1 1\\n", "0\\n"]]}',
    "code",
    {},
)
CALL = Record(
    "self-check",
    user("Write a function add(a, b) that adds two integers."),
    '{"kind": "call", "name": "add", "tests": [["3\\n4", "7"], ["-1\\n1", "0"]]}',
    "code",
    {},
)
PRINTS = "```python\na, b = map(int, input().split())\nprint(a + b)\n```"
RETURNS = "```python\ndef add(a, b):\n    return a + b\n```"
KNOWN: dict[str, Sequence[tuple[Record, Sequence[str], Sequence[str]]]] = {
    "math": (
        (HALF, (r"\boxed{\frac{1}{2}}", "So the answer is $0.5$."), (r"\boxed{2}", "I see.\n\n?")),
    ),
    "code": (
        (SUM, (PRINTS,), (PRINTS.replace("+", "-"), PRINTS.replace("```", ""))),
        (CALL, (RETURNS,), (RETURNS.replace("+", "-"), PRINTS)),
    ),
}
# What is wrong as a response to any problem of a task, beside none at all.
NEVER = {"math": (r"\boxed{\text{no answer}}",), "code": ("```python\nraise ValueError\n```",)}


def check_rewards(
    grader: Grader,
    tokenizer: Any,
    records: Iterable[Record],
    *,
    task: str,
    max_prompt_tokens: int,
    instruction: str,
) -> None:
    """Grades known responses: to the known problems of the task, and to the first records.

    Where the chat template leaves a prompt inside a thinking part, each response first ends it. A
    right answer in a thinking part that never ends must not be paid, nor one that was cut off.

    Args:
      grader: of the run.
      tokenizer: of the policy.
      records: of the training split; the first that fit are taken.
      task: of the records.
      max_prompt_tokens, instruction: as for prompts.

    Raises:
      UserError: naming the first response whose reward is not what it must be.
    """
    template = functools.partial(
        make_prompt, tokenizer=tokenizer, stream_index=0, task=task, instruction=instruction
    )
    known = KNOWN.get(task, ())
    asked: list[Any] = [template(record, max_prompt_tokens=1 << 30) for record, *_ in known]
    opened = any(ends_thinking(tokenizer, prompt) for prompt in asked)
    own = ((template(r, max_prompt_tokens=max_prompt_tokens), r) for r in records)
    own: Any = itertools.islice(((p, r) for p, r in own if p), CHECKED)
    cases = [(p, right, wrong) for p, (_, right, wrong) in zip(asked, known, strict=True)]
    cases += [(prompt, *of_record(record)) for prompt, record in own]
    for prompt, right, wrong in cases:
        for trial in trials(right, wrong, thinks=task in KNOWN, opened=opened):
            tokens = tokenizer.encode(trial.text, add_special_tokens=False)
            tokens = np.array([*tokens, tokenizer.eos_token_id], np.int32)
            logp = np.zeros(len(tokens), np.float32)
            paid = grader.reward(prompt, Rollout(tokens, logp, 0, trial.finish_reason)) >= 1
            if paid != (trial.kind == "right"):
                where = "inside" if opened else "outside"
                raise UserError(
                    f"the reward self-check failed: to {prompt.text[:SHOWN]!r} the response "
                    f"{trial.text[:SHOWN]!r} is {trial.kind} and was {'' if paid else 'not '}paid; "
                    f"look at config.rewards and the tokenizer (its chat template leaves a prompt "
                    f"{where} a thinking part, as rewards.*.thinking_opened must say)"
                )


@dataclasses.dataclass(frozen=True)
class Trial:
    """A response, what `kind` it is (only "right" must be paid), and how it ended."""

    text: str
    kind: str
    finish_reason: str = "stop"


def trials(
    right: Sequence[str], wrong: Sequence[str], *, thinks: bool, opened: bool
) -> Iterator[Trial]:
    """What must be paid and what must not.

    Args:
      right, wrong: responses without any thinking.
      thinks: whether the task's verifier knows of thinking parts.
      opened: whether the prompt ends inside one.
    """
    end = "I see.\n</think>\n\n" if opened else ""
    yield from (Trial(end + text, "right") for text in right)
    yield from (Trial(end + text, "wrong") for text in wrong)
    for text in right[:1]:
        yield Trial(end + text, "right but cut off", "length")
        if thinks:
            begin = "" if opened else "<think>\n"
            yield Trial(f"{begin}I see.\n</think>\n\n{text}", "right")
            yield Trial(begin + text, "right but still a thought")


def of_record(record: Record) -> tuple[Sequence[str], Sequence[str]]:
    """Responses to a record of the data: right ones, if any is known for sure, and wrong ones."""
    if record.task in TASKS:
        right = solution(record)
        return (right,), (f"{right}1", "")
    # A release's own programs are not all right, and so no standard.
    right = (solution(record),) if record.task == "math" else ()
    return right, ("", *NEVER.get(record.task, ()))


def ends_thinking(tokenizer: Any, prompt: Prompt) -> bool:
    """Whether the template's last words open a thinking part."""
    text = tokenizer.decode(prompt.tokens)
    return text.rfind("<think>") > text.rfind("</think>")
