"""The ways in which a server fails what it was asked, each with a sentence for people."""

import json
from typing import Any


class ServerError(Exception):
    """A server did not do what it was asked: it is not there, late, or its answer is wrong."""


class Unreachable(ServerError):
    """There is nothing at the address, or the connection broke."""


class Refused(ServerError):
    """The server works, and said no."""


class Aborted(ServerError):
    """The server gave the group up before its end."""


class WrongVersion(ServerError):
    """The server holds another version than the one that it was told to hold."""


class Mixed(ServerError):
    """The responses of one group span two versions."""


class ProbeFailed(ServerError):
    """A server's log-probs are not those of the version that it says it holds."""


def short(content: Any) -> str:
    """What a server said, as far as a sentence has room for it."""
    text = content.decode(errors="replace") if isinstance(content, bytes) else json.dumps(content)
    return text if len(text) <= 300 else text[:300] + "..."
