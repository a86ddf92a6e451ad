"""The reward self-check: grades known responses on the path of every response, before sampling.

    record -> chat template -> prompt;  text -> tokens -> Grader: decode, extraction, verifier

A right response without the full reward of 1, or a wrong one with it, ends the run with one
sentence, where otherwise a thousand rewards of 0 would have shown the same hours later.
"""

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
from oapl_jax.rewards.grader import Grader
from oapl_jax.structs import Rollout

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


def check_rewards(
    grader: Grader,
    tokenizer: Any,
    records: Iterable[Record],
    *,
    task: str,
    max_prompt_tokens: int,
    instruction: str,
) -> None:
    """Grades known responses to the known problems of the task and to the first records.

    Where the chat template leaves a prompt inside a thinking part, each response first ends it. A
    right answer in a thinking part that never ends must get no reward, nor one that was cut off.

    Args:
      records: of the training split, all of `task`; the first that fit are taken.

    Raises:
      UserError: naming the first response whose reward is wrong.
    """
    template = functools.partial(
        make_prompt, tokenizer=tokenizer, stream_index=0, task=task, instruction=instruction
    )
    cases: list[Any] = []
    for (question, answer), right, wrong in KNOWN.get(task, ()):
        record = Record("self-check", user(question), answer, task, {})
        cases.append((template(record, max_prompt_tokens=1 << 30), right, wrong))
    said = [tokenizer.decode(prompt.tokens) for prompt, _, _ in cases]
    opened = any(text.rfind("<think>") > text.rfind("</think>") for text in said)
    fitting = ((template(r, max_prompt_tokens=max_prompt_tokens), r) for r in records)
    fitting = itertools.islice(((prompt, r) for prompt, r in fitting if prompt), CHECKED)
    cases += [(prompt, *known_responses(record)) for prompt, record in fitting]
    for prompt, right, wrong in cases:
        for text, kind, finish_reason in trials(right, wrong, thinks=task in KNOWN, opened=opened):
            tokens = tokenizer.encode(text, add_special_tokens=False)
            tokens = np.array([*tokens, tokenizer.eos_token_id], np.int32)
            logp = np.zeros(len(tokens), np.float32)
            paid = grader.reward(prompt, Rollout(tokens, logp, 0, finish_reason)) >= 1
            if paid != (kind == "right"):
                where = "inside" if opened else "outside"
                raise UserError(
                    f"the reward self-check failed: to {prompt.text[:SHOWN]!r} the response "
                    f"{text[:SHOWN]!r} is {kind} and got {'' if paid else 'no '}full reward; "
                    f"look at config.rewards and the tokenizer (its chat template leaves a prompt "
                    f"{where} a thinking part, as rewards.*.thinking_opened must say)"
                )


def trials(
    right: Sequence[str], wrong: Sequence[str], *, thinks: bool, opened: bool
) -> Iterator[tuple[str, str, str]]:
    """Responses, their kinds (only "right" must get full reward), and how they finished.

    Args:
      right, wrong: responses without any thinking.
      thinks, opened: the verifier knows of thinking parts; the prompt ends inside one.
    """
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
