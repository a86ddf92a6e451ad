"""Prompts from records: an endless shuffled stream for training, all of a split for evaluation.

Both drop a prompt whose templated tokens exceed the limit, and count it.
"""

import dataclasses
import functools
import logging
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from oapl_jax.data.records import Record
from oapl_jax.errors import UserError
from oapl_jax.structs import Prompt

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class PromptTemplate:
    """Turns records of one task into prompts.

    Attributes:
      tokenizer: has a chat template.
      task: name of the verifier.
      max_prompt_tokens: longer templated prompts are dropped.
      instruction: appended to the last message; "" for none.
    """

    tokenizer: Any
    _: dataclasses.KW_ONLY
    task: str
    max_prompt_tokens: int
    instruction: str

    def prompt(self, record: Record, stream_index: int) -> Prompt | None:
        """Templates and tokenizes a record; None if it is too long, UserError for another task."""
        if record.task != self.task:
            raise UserError(
                f"record {record.id} is of task {record.task}, but data.task is {self.task}"
            )
        chat = [dict(message) for message in record.messages]
        if self.instruction:
            chat[-1]["content"] += f"\n\n{self.instruction}"
        tokens = self.tokenizer.apply_chat_template(
            chat,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=False,  # transformers 5 returns a BatchEncoding otherwise
        )
        if len(tokens) > self.max_prompt_tokens:
            return None
        tokens = np.asarray(tokens, np.int32)
        return Prompt(record.id, stream_index, tokens, record.question, record.answer, self.task)

    def too_long(self, prompts: str) -> str:
        """The message about prompts that exceed the limit."""
        return f"{prompts} longer than data.max_prompt_tokens ({self.max_prompt_tokens})"


class PromptStream(Iterator[Prompt]):
    """Endless prompts; each epoch is a permutation of the source, seeded by [seed, epoch].

    Stream index i is position i % size of epoch i // size, the same on all hosts: a prompt is a
    pure function of (seed, stream index). Host h of H takes the indices h, h + H, h + 2H, ..; an
    index whose prompt is too long is skipped.

    Args:
      source: records with random access.
      host, hosts: index and number of the processes that share the stream.

    Raises:
      UserError: while iterating, for a prompt of another task, or if every prompt is too long.
    """

    def __init__(
        self,
        source: Sequence[Record],
        template: PromptTemplate,
        *,
        seed: int,
        host: int,
        hosts: int,
    ):
        if not len(source):
            raise UserError("the prompt source is empty; raise data.train_size")
        if not 0 <= host < hosts:
            raise ValueError(f"host {host} is not one of {hosts}")
        self._source, self._template = source, template
        self._seed, self._host, self._hosts = seed, host, hosts
        self._round = 0  # of one stream index for each host
        self.dropped = 0  # prompts of this host that are too long

    def __next__(self) -> Prompt:
        for _ in range(len(self._source)):
            index = self._round * self._hosts + self._host
            record = self._record(index)
            prompt = self._template.prompt(record, index)
            self._round += 1
            if prompt is not None:
                return prompt
            if not self.dropped:
                message = self._template.too_long(f"prompt {record.id} is")
                log.warning("%s; such prompts are dropped and counted", message)
            self.dropped += 1
        every = f"all {len(self._source)} prompts of the stream are"
        raise UserError(f"{self._template.too_long(every)}; raise it")

    def at(self, stream_index: int) -> Prompt:
        """Returns the prompt of a stream index, of any host, without advancing.

        Raises:
          UserError: if the prompt is of another task or too long.
        """
        record = self._record(stream_index)
        prompt = self._template.prompt(record, stream_index)
        if prompt is None:
            found = f"prompt {record.id} (stream index {stream_index}) is"
            raise UserError(f"{self._template.too_long(found)}; raise it")
        return prompt

    def state(self) -> dict[str, Any]:
        """JSON-able state for `restore`.

        "stream_index" begins the next round. It is equal on hosts that have taken equally many
        prompts; after `restore` their number may differ.
        """
        index = self._round * self._hosts
        return {"stream_index": index, **self._identity(index), "dropped": self.dropped}

    def restore(self, state: dict[str, Any]) -> None:
        """Continues at `state`.

        With another number of hosts the stream continues with the first round that begins at or
        before the state's index: up to `hosts` - 1 prompts repeat, and none is omitted.

        Raises:
          UserError: if seed or data differ from the state's: the rest of the epoch would repeat
            some prompts and omit others.
        """
        index = state["stream_index"]
        configured = self._identity(index)
        if any(state[name] != value for name, value in configured.items()):
            raise UserError(
                f"the checkpoint's prompt stream ({state}) is not the configured one "
                f"({configured}); restore data.* and the seed, or start a new run"
            )
        self._round, self.dropped = index // self._hosts, state["dropped"]

    def _identity(self, index: int) -> dict[str, Any]:
        size, next_id = len(self._source), self._record(index).id
        return {"seed": self._seed, "size": size, "next_id": next_id}

    def _record(self, stream_index: int) -> Record:
        size = len(self._source)
        epoch, position = divmod(stream_index, size)
        return self._source[int(permutation(self._seed, epoch, size)[position])]


@functools.lru_cache(maxsize=4)
def permutation(seed: int, epoch: int, size: int) -> np.ndarray:
    """Order of one epoch, int64[size]."""
    return np.random.default_rng([seed, epoch]).permutation(size)


def all_prompts(source: Sequence[Record], template: PromptTemplate) -> list[Prompt]:
    """Makes prompts of all records, in order, without those that are too long.

    Raises:
      UserError: for a prompt of another task, or if none fits.
    """
    made = (template.prompt(record, i) for i, record in enumerate(source))
    prompts = [prompt for prompt in made if prompt is not None]
    if len(prompts) < len(source):
        message = template.too_long(f"{len(source) - len(prompts)} of {len(source)} prompts are")
        if not prompts:
            raise UserError(f"{message}; raise it")
        log.warning("%s and are dropped", message)
    return prompts


def response_text(tokenizer: Any, tokens: np.ndarray) -> str:
    """Decodes a response for the reward functions, without special tokens."""
    return tokenizer.decode(
        np.asarray(tokens).tolist(), skip_special_tokens=True, clean_up_tokenization_spaces=False
    )
