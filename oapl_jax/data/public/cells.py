"""Cells of outside tables, made parts of records; what can't be is refused with a reason."""

import hashlib
import unicodedata
from collections.abc import Mapping
from typing import Any

from oapl_jax.data.records import Messages, Record, user


class Unfit(Exception):
    """A row of which no record can be made; the message is the reason, the same for all alike."""


def asked(question: Any) -> Messages:
    """The conversation that consists of a cell."""
    if not text(question):
        raise Unfit("no problem")
    return user(text(question))


def conversation(cell: Any) -> Messages:
    """A list of messages of role and content.

    Raises:
      Unfit: for anything else.
    """
    if not isinstance(cell, list) or not cell:
        raise Unfit("messages that are not a list")
    messages = []
    for message in cell:
        known = message if isinstance(message, Mapping) else {}
        role, content = text(known.get("role")), text(known.get("content"))
        if not role or not content:
            raise Unfit("a message without role or content")
        messages.append({"role": role, "content": content})
    return tuple(messages)


def answered(
    messages: Messages, answer: Any, *, task: str, difficulty: str, metadata: dict[str, Any]
) -> Record:
    """A record of a conversation and the answer to it, without its source.

    Raises:
      Unfit: if there is no answer.
    """
    if not text(answer):
        raise Unfit("no answer")
    return Record(
        id=content_id(task, messages),
        messages=messages,
        answer=text(answer),
        task=task,
        metadata=metadata,
        difficulty=difficulty,
    )


def text(value: Any) -> str:
    """A cell as text: numbers are written out, what is missing is empty.

    Raises:
      Unfit: for anything else.
    """
    if value is None:
        return ""
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise Unfit("a cell is neither text nor a number")
    return str(value).strip()


def content_id(task: str, messages: Messages) -> str:
    """16 hexadecimal digits; equal for conversations that differ in white space alone."""
    words = [task]
    for message in messages:
        words += [message["role"], *unicodedata.normalize("NFKC", message["content"]).split()]
    return hashlib.sha256(" ".join(words).encode()).hexdigest()[:16]
