"""Prompts from a data set: endless and shuffled for training, in order for evaluation."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from oapl_jax.data.tasks import Record
from oapl_jax.errors import UserError
from oapl_jax.structs import Prompt


class Prompts(Iterator[Prompt]):
    """Endless prompts: each epoch is a permutation of the source, drawn from [seed, epoch].

    Args:
      source: records with random access.
      tokenizer: has a chat template.
      task: name of the verifier; every record must be of this task.
      seed: of the permutations.
      max_prompt_tokens: the longest templated prompt that is allowed.

    Raises:
      UserError: while iterating, for a prompt that is too long or of another task.
    """

    def __init__(
        self,
        source: Sequence[Record],
        tokenizer: Any,
        *,
        task: str,
        seed: int,
        max_prompt_tokens: int,
    ):
        if not len(source):
            raise UserError("the prompt source is empty; raise data.train_size")
        self._source = source
        self._tokenizer = tokenizer
        self._task = task
        self._seed = seed
        self._max_prompt_tokens = max_prompt_tokens
        self._draw = 0
        self._epoch, self._order = -1, np.empty(0, np.int64)

    def __next__(self) -> Prompt:
        prompt = make_prompt(
            self._next_record(),
            self._tokenizer,
            draw=self._draw,
            task=self._task,
            max_prompt_tokens=self._max_prompt_tokens,
        )
        self._draw += 1
        return prompt

    def state(self) -> dict[str, Any]:
        """What `restore` needs to continue exactly here, JSON-able."""
        return {
            "draw": self._draw,
            "seed": self._seed,
            "size": len(self._source),
            "next_id": self._next_record().id,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Continues where `state` was taken.

        Raises:
          UserError: if the seed or the data differ from those of the state: the rest of the epoch
            would repeat some prompts and omit others.
        """
        self._draw = state["draw"]
        if self.state() != state:
            raise UserError(
                f"the checkpoint's prompt stream ({state}) is not the configured one "
                f"({self.state()}); restore data.* and the seed, or start a new run"
            )

    def _next_record(self) -> Record:
        epoch, position = divmod(self._draw, len(self._source))
        if epoch != self._epoch:
            self._order = np.random.default_rng([self._seed, epoch]).permutation(len(self._source))
            self._epoch = epoch
        return self._source[int(self._order[position])]


def all_prompts(
    source: Sequence[Record],
    tokenizer: Any,
    *,
    task: str,
    max_prompt_tokens: int,
    limit: int | None,
) -> list[Prompt]:
    """Every record of the source in order, or the first `limit`; `draw` counts them.

    Raises:
      UserError: for a prompt that is too long or of another task, or a limit beyond the source.
    """
    if limit is not None and not 0 < limit <= len(source):
        raise UserError(f"{limit} prompts are asked of a split of {len(source)} records")
    return [
        make_prompt(source[i], tokenizer, draw=i, task=task, max_prompt_tokens=max_prompt_tokens)
        for i in range(len(source) if limit is None else limit)
    ]


def make_prompt(
    record: Record, tokenizer: Any, *, draw: int, task: str, max_prompt_tokens: int
) -> Prompt:
    """The templated and tokenized prompt of one record."""
    if record.task != task:
        raise UserError(f"record {record.id} is of task {record.task}, but data.task is {task}")
    tokens = tokenizer.apply_chat_template(
        [{"role": "user", "content": record.question}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=False,  # transformers 5 returns a BatchEncoding otherwise
    )
    if len(tokens) > max_prompt_tokens:
        raise UserError(
            f"prompt {record.id} has {len(tokens)} tokens, more than data.max_prompt_tokens "
            f"({max_prompt_tokens}); raise data.max_prompt_tokens or leave the record out"
        )
    return Prompt(
        id=record.id,
        draw=draw,
        tokens=np.asarray(tokens, np.int32),
        text=record.question,
        answer=record.answer,
        task=task,
    )


def response_text(tokenizer: Any, tokens: np.ndarray) -> str:
    """The text of a response as the reward functions see it, without special tokens."""
    return tokenizer.decode(
        np.asarray(tokens).tolist(), skip_special_tokens=True, clean_up_tokenization_spaces=False
    )
