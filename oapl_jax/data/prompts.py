"""Prompts from records: an endless shuffled stream for training, all of a split for evaluation.

Both drop and count a record whose prompt exceeds the limit or is refused by the chat template.
"""

import dataclasses
import datetime
import functools
import json
import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from oapl_jax.data.records import Record
from oapl_jax.errors import UserError, one_line
from oapl_jax.model.tokenizer import omits_last, render_chat
from oapl_jax.structs import Prompt

log = logging.getLogger(__name__)

LOGGED = 5  # reasons of unusable records that are logged


class UnusableRecord(UserError):
    """A record that makes no prompt; `reason` is equal for all records of one fault."""

    def __init__(self, record: Record, reason: str, remedy: str):
        super().__init__(f"prompt {record.id} is {reason}; {remedy}")
        self.reason = reason


@dataclasses.dataclass(frozen=True)
class PromptTemplate:
    """Turns records of one task into prompts.

    Attributes:
      tokenizer: has a chat template.
      task: name of the verifier.
      max_prompt_tokens: longer templated prompts are dropped.
      instruction: appended to the last message; "" for none.
      keep_metadata: whether prompts carry the metadata of their records, for a reward function.
      now: time that the chat template prints; None for the clock's.
    """

    tokenizer: Any
    _: dataclasses.KW_ONLY
    task: str
    max_prompt_tokens: int
    instruction: str
    keep_metadata: bool = False
    now: datetime.datetime | None = None
    # By the roles of a conversation: whether the chat template omits the last message.
    _omitted: dict[tuple[str, ...], bool] = dataclasses.field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    def prompt(self, record: Record, stream_index: int) -> Prompt | None:
        """Makes a prompt of a record; None if it is unusable, UserError for another task."""
        try:
            return self.make_prompt(record, stream_index)
        except UnusableRecord:
            return None

    def make_prompt(self, record: Record, stream_index: int) -> Prompt:
        """Templates and tokenizes a record.

        Raises:
          UnusableRecord: for a prompt that is too long, and for messages that the chat template or
            the tokenizer refuses, or of which it omits the question.
          UserError: for a record of another task.
        """
        if record.task != self.task:
            raise UserError(
                f"record {record.id} is of task {record.task}, but data.task is {self.task}"
            )
        chat = [dict(message) for message in record.messages]
        if self.instruction:
            chat[-1]["content"] += f"\n\n{self.instruction}"
        roles = tuple(message["role"] for message in chat)
        try:
            tokens = render_chat(self.tokenizer, chat, tokenize=True, now=self.now)
            if roles not in self._omitted:
                self._omitted[roles] = omits_last(self.tokenizer, chat)
        except Exception as error:  # a template is a program of the model's and raises anything
            reason = f"refused by the chat template or the tokenizer ({one_line(error)})"
            raise UnusableRecord(record, reason, "correct its messages") from error
        if self._omitted[roles] or not len(tokens):
            reason = f"without its question: the chat template omits the last of {', '.join(roles)}"
            raise UnusableRecord(record, reason, "correct its messages")
        if len(tokens) > self.max_prompt_tokens:
            reason = f"longer than data.max_prompt_tokens ({self.max_prompt_tokens})"
            raise UnusableRecord(record, reason, "raise it")
        tokens = np.asarray(tokens, np.int32)
        # As JSON: an integer of a table may exceed what msgpack holds.
        metadata = json.dumps(record.metadata) if self.keep_metadata else ""
        of_record = (record.question, record.answer, self.task, metadata)
        return Prompt(record.id, stream_index, tokens, *of_record)


class PromptStream(Iterator[Prompt]):
    """Endless prompts; each epoch is a permutation of the source, seeded by [seed, epoch].

    Stream index i is position i % size of epoch i // size, the same on all hosts: a prompt is a
    pure function of (seed, stream index). Host h of H takes the indices h, h + H, h + 2H, ..; an
    index whose record is unusable is skipped.

    Args:
      source: records with random access.
      host, hosts: index and number of the processes that share the stream.

    Raises:
      UserError: while iterating, for a prompt of another task, or if every record is unusable.
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
        self.dropped = 0  # unusable records of this host
        self._logged: set[str] = set()  # reasons

    def __next__(self) -> Prompt:
        unusable = None
        for _ in range(len(self._source)):
            index = self._round * self._hosts + self._host
            record = self._record(index)
            try:
                prompt = self._template.make_prompt(record, index)
                self._round += 1
                return prompt
            except UnusableRecord as error:
                unusable = error
            self._round += 1
            self.dropped += 1
            if unusable.reason not in self._logged and len(self._logged) < LOGGED:
                self._logged.add(unusable.reason)
                log.warning("%s; such prompts are dropped and counted", unusable)
        size = len(self._source)
        raise UserError(f"none of the {size} prompts of the stream is usable: {unusable}")

    def at(self, stream_index: int) -> Prompt:
        """Returns the prompt of a stream index, of any host, without advancing.

        Raises:
          UserError: if the record is of another task or unusable.
        """
        return self._template.make_prompt(self._record(stream_index), stream_index)

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
    """Makes prompts of all usable records, in order.

    Raises:
      UserError: for a prompt of another task, or if no record is usable.
    """
    prompts, reasons = [], Counter[str]()
    for i, record in enumerate(source):
        try:
            prompts.append(template.make_prompt(record, i))
        except UnusableRecord as unusable:
            reasons[unusable.reason] += 1
    if reasons:
        parts = [f"{count} {reason}" for reason, count in reasons.most_common(LOGGED)]
        message = f"{reasons.total()} of {len(source)} prompts can't be used ({'; '.join(parts)})"
        if not prompts:
            raise UserError(f"{message}; correct the records, the limit or the chat template")
        log.warning("%s and are dropped", message)
    return prompts


def response_text(tokenizer: Any, tokens: np.ndarray) -> str:
    """Decodes a response for the reward functions, without special tokens."""
    return tokenizer.decode(
        np.asarray(tokens).tolist(), skip_special_tokens=True, clean_up_tokenization_spaces=False
    )
