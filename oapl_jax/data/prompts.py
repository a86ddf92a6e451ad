"""Prompts from a data set: endless and shuffled for training, in order for evaluation.

A prompt whose templated tokens exceed the limit is left out and counted, in both alike.
"""

import functools
import logging
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from oapl_jax.data.records import Messages, Record
from oapl_jax.errors import UserError
from oapl_jax.structs import Prompt

log = logging.getLogger(__name__)

PROMPT_SETTINGS = ("max_prompt_tokens", "instruction")  # of config.data; the rest opens the records


class Prompts(Iterator[Prompt]):
    """Endless prompts: each epoch is a permutation of the source, drawn from [seed, epoch].

    The draws 0, 1, 2, .. are places in the epochs, one after the other, the same for all hosts: a
    prompt is a pure function of (seed, draw). Host h of H takes the draws h, h + H, h + 2H, ..; a
    draw whose prompt is too long is passed over.

    Args:
      source: records with random access.
      tokenizer: has a chat template.
      task: name of the verifier; every record must be of this task.
      seed: of the permutations.
      max_prompt_tokens: the longest templated prompt that is allowed.
      instruction: stands below the question, "" for none.
      host, hosts: index and number of the processes that share the stream.

    Raises:
      UserError: while iterating, for a prompt of another task, or if every prompt is too long.
    """

    def __init__(
        self,
        source: Sequence[Record],
        tokenizer: Any,
        *,
        task: str,
        seed: int,
        max_prompt_tokens: int,
        instruction: str,
        host: int,
        hosts: int,
    ):
        if not len(source):
            raise UserError("the prompt source is empty; raise data.train_size")
        if not 0 <= host < hosts:
            raise ValueError(f"host {host} is not one of {hosts}")
        self._source = source
        self._make = functools.partial(
            make_prompt,
            tokenizer=tokenizer,
            task=task,
            max_prompt_tokens=max_prompt_tokens,
            instruction=instruction,
        )
        self._max_prompt_tokens = max_prompt_tokens
        self._seed, self._host, self._hosts = seed, host, hosts
        self._round = 0  # of one draw for each host
        self._left_out = 0

    @property
    def left_out(self) -> int:
        """Draws of this host that were passed over, because their prompts are too long."""
        return self._left_out

    def __next__(self) -> Prompt:
        for _ in range(len(self._source)):
            draw = self._round * self._hosts + self._host
            record = self._record(draw)
            prompt = self._make(record, stream_index=draw)
            self._round += 1
            if prompt is not None:
                return prompt
            if not self._left_out:
                log.warning(
                    "prompt %s is longer than data.max_prompt_tokens (%d); such prompts are left "
                    "out and counted",
                    record.id,
                    self._max_prompt_tokens,
                )
            self._left_out += 1
        raise UserError(
            f"{len(self._source)} prompts in a row, as many as there are, are longer than "
            f"data.max_prompt_tokens ({self._max_prompt_tokens}); raise it"
        )

    def at(self, draw: int) -> Prompt:
        """The prompt of one draw, of this host or another; the stream stays where it is.

        Raises:
          UserError: if the prompt is of another task or too long.
        """
        record = self._record(draw)
        prompt = self._make(record, stream_index=draw)
        if prompt is None:
            raise UserError(
                f"prompt {record.id} (draw {draw}) has more tokens than data.max_prompt_tokens "
                f"({self._max_prompt_tokens}); raise it"
            )
        return prompt

    def state(self) -> dict[str, Any]:
        """What `restore` needs to continue exactly here, JSON-able.

        "draw" begins the next round of draws. It is the same on all hosts that have taken equally
        many, and they may then be another number after `restore`.
        """
        draw = self._round * self._hosts
        return {
            "stream_index": draw,
            "seed": self._seed,
            "size": len(self._source),
            "next_id": self._record(draw).id,
            "left_out": self._left_out,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Continues where `state` was taken.

        With another number of hosts the stream continues with the first round that begins at or
        before the state's: up to `hosts` - 1 prompts come a second time, and none is omitted.

        Raises:
          UserError: if the seed or the data differ from those of the state: the rest of the epoch
            would repeat some prompts and omit others.
        """
        mine = self.state() | {
            "stream_index": state["stream_index"],
            "next_id": self._record(state["stream_index"]).id,
            "left_out": state["left_out"],
        }
        if mine != state:
            raise UserError(
                f"the checkpoint's prompt stream ({state}) is not the configured one ({mine}); "
                "restore data.* and the seed, or start a new run"
            )
        self._round, self._left_out = state["stream_index"] // self._hosts, state["left_out"]

    def _record(self, draw: int) -> Record:
        epoch, place = divmod(draw, len(self._source))
        return self._source[int(permutation(self._seed, epoch, len(self._source))[place])]


@functools.lru_cache(maxsize=4)
def permutation(seed: int, epoch: int, size: int) -> np.ndarray:
    """int64[size], the order of one epoch."""
    return np.random.default_rng([seed, epoch]).permutation(size)


def all_prompts(
    source: Sequence[Record],
    tokenizer: Any,
    *,
    task: str,
    max_prompt_tokens: int,
    limit: int | None,
    instruction: str,
) -> list[Prompt]:
    """Every record of the source in order, or the first `limit`; `draw` counts the records.

    Raises:
      UserError: for a prompt of another task, a limit beyond the source, or if none fits.
    """
    if limit is not None and not 0 < limit <= len(source):
        raise UserError(f"{limit} prompts are asked of a split of {len(source)} records")
    size = len(source) if limit is None else limit
    made = [
        make_prompt(
            source[i],
            stream_index=i,
            tokenizer=tokenizer,
            task=task,
            max_prompt_tokens=max_prompt_tokens,
            instruction=instruction,
        )
        for i in range(size)
    ]
    fitting = [prompt for prompt in made if prompt is not None]
    if len(fitting) < size:
        left_out = f"{size - len(fitting)} of {size} prompts are longer than "
        left_out += f"data.max_prompt_tokens ({max_prompt_tokens})"
        if not fitting:
            raise UserError(f"{left_out}; raise it")
        log.warning("%s and are left out", left_out)
    return fitting


def make_prompt(
    record: Record,
    tokenizer: Any,
    *,
    stream_index: int,
    task: str,
    max_prompt_tokens: int,
    instruction: str,
) -> Prompt | None:
    """The templated and tokenized prompt of one record; None if it is too long.

    Raises:
      UserError: if the record is of another task.
    """
    if record.task != task:
        raise UserError(f"record {record.id} is of task {record.task}, but data.task is {task}")
    tokens = tokenizer.apply_chat_template(
        instructed(record.messages, instruction),
        add_generation_prompt=True,
        tokenize=True,
        return_dict=False,  # transformers 5 returns a BatchEncoding otherwise
    )
    if len(tokens) > max_prompt_tokens:
        return None
    return Prompt(
        id=record.id,
        stream_index=stream_index,
        tokens=np.asarray(tokens, np.int32),
        text=record.question,
        answer=record.answer,
        task=task,
    )


def instructed(messages: Messages, instruction: str) -> list[dict[str, str]]:
    """The messages with the instruction below the last one."""
    chat = [dict(message) for message in messages]
    if instruction:
        chat[-1]["content"] += f"\n\n{instruction}"
    return chat


def response_text(tokenizer: Any, tokens: np.ndarray) -> str:
    """The text of a response as the reward functions see it, without special tokens."""
    return tokenizer.decode(
        np.asarray(tokens).tolist(), skip_special_tokens=True, clean_up_tokenization_spaces=False
    )
