"""Exceptions that end a command with a one-line message and an exit code."""

import errno
import os
import signal
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
    """Weights are not finite, or loss, gradient or update were not in too many steps in a row."""


class NoReward(RunError):
    """All rewards were 0 in too many consecutive groups; the message shows the last responses."""


def one_line(error: BaseException) -> str:
    """An exception's class and the first line of its message."""
    return f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"


def reason(error: BaseException) -> str:
    """`one_line`, or the words of the operating system if a library has put them into a longer
    message, as TensorStore does on a full disk."""
    words = (os.strerror(number) for number in SYSTEM_ERRORS)
    return next((text for text in words if text in str(error)), one_line(error))


# Errors of the operating system -> exit code, and the remedy that follows its sentence.
SYSTEM_ERRORS = {
    errno.ENOSPC: (1, "free space there and start again; what was saved stays"),
    errno.EDQUOT: (1, "raise the quota and start again; what was saved stays"),
    errno.EFBIG: (1, "raise the limit (ulimit -f) and start again; what was saved stays"),
    errno.EMFILE: (1, "raise the limit (ulimit -n) and start again; what was saved stays"),
    errno.EIO: (1, "see the machine's log; what was saved before stays"),
    errno.ESTALE: (1, "mount it again and start again; what was saved stays"),
    errno.ENOENT: (2, "put it back, or name another place"),
    errno.ELOOP: (2, "name a place without links in a circle"),
    errno.EACCES: (2, "give this user access, or name another place"),
    errno.EPERM: (2, "give this user access, or name another place"),
    errno.EROFS: (2, "name a place that can be written"),
    errno.ENOTDIR: (2, "a part of it is a file; name another place"),
    errno.EISDIR: (2, "it is a directory; name a file"),
    errno.EEXIST: (2, "remove it, or name another place"),
    errno.ENAMETOOLONG: (2, "choose a shorter name"),
}

FULL = errno.ENOSPC, errno.EDQUOT, errno.EFBIG  # array_record and TensorStore raise no OSError


def sentence(error: BaseException) -> tuple[int, str] | None:
    """Exit code and sentence of an error with a known remedy; None for a fault of the program."""
    if isinstance(error, UserError | RunError):
        return error.exit_code, str(error)
    if isinstance(error, OSError) and error.errno in SYSTEM_ERRORS:
        code, remedy = SYSTEM_ERRORS[error.errno]
        place = os.fsdecode(error.filename) if error.filename else "the output"
        return code, f"{place}: {error.strerror}; {remedy}"
    for number in FULL:
        if os.strerror(number) in str(error):  # with the file, in the words of a library
            code, remedy = SYSTEM_ERRORS[number]
            return code, f"{one_line(error)}; {remedy}"
    return None


def exit_with_code(main: Callable[[], None]) -> None:
    """Runs a command: an error with a known remedy ends it with its code, as one line."""
    try:
        main()
        if sys.stdout:
            sys.stdout.flush()
    except BrokenPipeError:  # as of `| head`: nobody reads on
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        sys.exit(128 + signal.SIGPIPE)
    except Exception as error:
        found = sentence(error)
        if found is None:
            raise
        print(f"error: {found[1]}", file=sys.stderr, flush=True)
        sys.exit(found[0])
