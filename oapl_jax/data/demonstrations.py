"""Demonstrations for the warm-up: what a noisy teacher answers to training prompts."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from oapl_jax.data.prompts import make_prompt
from oapl_jax.data.records import Record
from oapl_jax.data.tasks import TASKS
from oapl_jax.errors import UserError
from oapl_jax.structs import Group, Rollout


def demonstrations(
    source: Sequence[Record],
    tokenizer: Any,
    *,
    task: str,
    count: int,
    noise: float,
    seed: int,
    max_prompt_tokens: int,
    max_response_tokens: int,
    instruction: str,
) -> Iterator[Group]:
    """Endless groups of one demonstrated response each, with reward 1, in epochs of `count`.

    Args:
      source: records of the training split; the first `count` are demonstrated.
      tokenizer: as for prompts.
      task: key of TASKS.
      count: number of demonstrations.
      noise: probability that the teacher errs in a step.
      seed: of the teacher and of the order.
      max_prompt_tokens, max_response_tokens: limits, the stop token included.
      instruction: as for prompts.

    Raises:
      UserError: for a demonstration that is too long, or more demonstrations than records.
    """
    if not 0 < count <= len(source):
        raise UserError(
            f"warmup.demonstrations={count} is not within 1 and data.train_size={len(source)}"
        )
    rng = np.random.default_rng([seed, 1])
    groups = []
    for i in range(count):
        record = source[i]
        prompt = make_prompt(
            record,
            tokenizer,
            draw=i,
            task=task,
            max_prompt_tokens=max_prompt_tokens,
            instruction=instruction,
        )
        if prompt is None:
            raise UserError(
                f"the prompt of demonstration {record.id} has more tokens than "
                f"data.max_prompt_tokens ({max_prompt_tokens}); raise it"
            )
        text = TASKS[task].demonstration(record, rng, noise)
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
