"""Demonstrations for the warm-up: noisy responses to training prompts."""

import itertools
from collections.abc import Iterator, Sequence

import numpy as np

from oapl_jax.config import FUNCTION
from oapl_jax.data.prompts import PromptTemplate
from oapl_jax.data.records import Record
from oapl_jax.data.synthetic.tasks import TASKS
from oapl_jax.errors import UserError
from oapl_jax.structs import Group, Rollout


def demonstrations(
    source: Sequence[Record],
    template: PromptTemplate,
    *,
    count: int,
    noise: float,
    seed: int,
    max_response_tokens: int,
) -> Iterator[Group]:
    """Generates endless groups of one demonstration each, with reward 1, in epochs of `count`.

    Args:
      source: records of the training split.
      count: the first `count` with a solution and a prompt within the limit are demonstrated; 0:
        all of them.
      noise: probability of an error: in each step, for a task of TASKS; for other tasks the
        solution is replaced by another problem's.
      seed: of the noise and of the order.
      max_response_tokens: limit, with the stop token.

    Raises:
      UserError: for a demonstration that is too long, or more demonstrations than solutions.
    """
    tokenizer = template.tokenizer
    solved = ((template.prompt(r, i), r) for i, r in enumerate(source) if solution(r))
    chosen = list(itertools.islice(((p, r) for p, r in solved if p), count or None))
    count = count or max(len(chosen), 1)
    if len(chosen) < count:
        raise UserError(
            f"warmup.demonstrations={count}, but {len(chosen)} of the training problems have a "
            "solution, and a prompt within data.max_prompt_tokens; lower it"
        )
    rng = np.random.default_rng([seed, 1])
    groups = []
    for prompt, record in chosen:
        if template.task in TASKS:
            text = TASKS[template.task].demonstration(record, rng, noise)
        else:
            text = solution(chosen[rng.integers(count)][1] if rng.random() < noise else record)
        tokens = [*tokenizer.encode(text, add_special_tokens=False), tokenizer.eos_token_id]
        if len(tokens) > max_response_tokens:
            raise UserError(
                f"the demonstration {text!r} has {len(tokens)} tokens, more than "
                f"rollout.max_response_tokens={max_response_tokens}; raise it"
            )
        response = Rollout(np.array(tokens, np.int32), np.zeros(len(tokens), np.float32), 0, "stop")
        groups.append(Group(prompt, (response,), np.ones(1, np.float32)))
    while True:
        for i in rng.permutation(count):
            yield groups[i]


def solution(record: Record) -> str:
    """A correct response: by the task, a boxed final answer, the metadata's "solution" (a release's
    program, a column of one's own file), or the answer to a question of one's own; "" if none."""
    if record.task in TASKS:
        return TASKS[record.task].demonstration(record, np.random.default_rng(0), 0.0)
    if record.task == "math":
        return rf"\boxed{{{record.answer}}}"
    solved = record.metadata.get("solution")
    if record.task == FUNCTION and not solved:
        return record.answer
    return solved if isinstance(solved, str) else ""
