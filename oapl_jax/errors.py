"""The two ways in which a run ends on purpose, each with a sentence for its reader."""

import sys
from collections.abc import Callable


class UserError(Exception):
    """A mistake in the configuration or in the files that it names; the process exits with code 2.

    The message is one sentence or two: what is wrong, which setting says so, and the remedy.
    """


class RunError(Exception):
    """A run that can't go on although its configuration is sound; the process exits with code 1."""


def exit_with_code(main: Callable[[], None]) -> None:
    """Runs a command: a UserError ends it with code 2 and a RunError with 1, each as one line."""
    try:
        main()
    except UserError as error:
        sys.exit(_report(error, 2))
    except RunError as error:
        sys.exit(_report(error, 1))


def _report(error: BaseException, code: int) -> int:
    print(f"error: {error}", file=sys.stderr, flush=True)
    return code
