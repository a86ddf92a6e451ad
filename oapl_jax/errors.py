"""Exceptions that end a command with a one-line message and an exit code."""

import sys
from collections.abc import Callable


class UserError(Exception):
    """A mistake in the configuration or in the files that it names.

    The message is one sentence or two: what is wrong, which setting says so, and the remedy.
    """

    exit_code = 2


class RunError(Exception):
    """A run that can't go on although its configuration is sound."""

    exit_code = 1


class FleetLost(RunError):
    """No server was ready to sample for too long; the same command resumes from the checkpoint."""

    exit_code = 3


class HostLost(RunError):
    """Another host of the run died, hangs or was late; the same command resumes."""

    exit_code = 4


class NotFinite(RunError):
    """Loss or gradient was not finite in too many steps in a row."""


class NoReward(RunError):
    """All rewards were 0 in too many consecutive groups; the message shows the last responses."""


def one_line(error: Exception) -> str:
    """An exception's class and the first line of its message."""
    return f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"


def exit_with_code(main: Callable[[], None]) -> None:
    """Runs a command: an error of this file ends it with its code, as one line."""
    try:
        main()
    except (UserError, RunError) as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(error.exit_code)
