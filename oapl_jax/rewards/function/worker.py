"""A process of the pool: calls a user's reward function for each frame of standard input.

    python -m oapl_jax.rewards.function.worker MODULE:FUNCTION SECONDS MEMORY_BYTES

After an empty frame when the module is imported, each frame is JSON, [record, response], and so is
the reply, see `call`. It needs the standard library only, besides what the user's module imports.
"""

import contextlib
import importlib
import json
import math
import os
import resource
import signal
import sys
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from oapl_jax.rewards.worker_process import MAX_FRAME_BYTES, frame, read_frame

GRACE_SECONDS = 5.0  # past the deadline until SIGALRM ends a process that nobody reads any more
MAX_TRACEBACK = 16_000  # characters
LARGEST = 3.4e38  # of a float32


def import_module(name: str) -> ModuleType:
    """Imports a module as `python -m` would: from the working directory first."""
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    return importlib.import_module(name)


def call(
    function: Callable[[dict[str, Any], str], Any], record: dict[str, Any], response: str
) -> dict[str, Any]:
    """Calls a reward function.

    Returns:
      {"parts": {name: number}}, where a single number has the name ""; or, if it raised or returned
      anything else, {"error": class, "message": text, "where": file and line, "traceback": text}.
    """
    try:
        value = function(record, response)
        parts = value if isinstance(value, Mapping) else {"": value}
        if not parts:
            raise TypeError("a reward function returned a dict without parts")
        numbers = {str(name): number(part) for name, part in parts.items()}
        number(math.fsum(numbers.values()))
        return {"parts": numbers}
    except (Exception, SystemExit) as error:
        return failure(error)


def number(value: Any) -> float:
    """A part of a reward as a float; TypeError or ValueError for a value that is none."""
    if not hasattr(value, "__float__"):  # which neither a text nor None has
        kind = type(value).__name__
        raise TypeError(f"a reward must be a number or a dict of named numbers, not a {kind}")
    converted = float(value)
    if not math.isfinite(converted) or abs(converted) > LARGEST:
        raise ValueError(f"a reward must be a finite float32, not {converted}")
    return converted


def failure(error: BaseException) -> dict[str, Any]:
    """An exception as a reply; "where" is the innermost line, but for this package and imports."""
    ours = (str(Path(__file__).parent), importlib.__file__, "<frozen")
    frames = traceback.extract_tb(error.__traceback__)
    frames = [frame for frame in frames if not frame.filename.startswith(ours)]
    text = "".join(traceback.format_exception(error))
    return {
        "error": type(error).__name__,
        "message": next(iter(str(error).splitlines()), "")[:500],
        "where": f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else "",
        "traceback": text[-MAX_TRACEBACK:],
    }


def limit_memory(memory_bytes: int) -> None:
    """Limits the address space to what the imports have taken, and so much more."""
    with contextlib.suppress(OSError, ValueError):  # systems without /proc, or with a lower limit
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = pages * resource.getpagesize() + memory_bytes
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def main() -> None:
    name, seconds, memory_bytes = sys.argv[1], float(sys.argv[2]), int(sys.argv[3])
    # The function may print and read: that must not reach the frames.
    with os.fdopen(os.dup(0), "rb") as requests, os.fdopen(os.dup(1), "wb") as replies:
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(2, 1)
        module, _, attribute = name.partition(":")
        function = getattr(import_module(module), attribute)
        limit_memory(memory_bytes)
        replies.write(frame(b""))
        replies.flush()
        while (content := read_frame(requests)) is not None:
            # If the parent was killed, this ends a call that does not end.
            signal.setitimer(signal.ITIMER_REAL, seconds + GRACE_SECONDS)
            reply = json.dumps(call(function, *json.loads(content))).encode()
            if len(reply) > MAX_FRAME_BYTES:
                too_long = ValueError(
                    f"a reward of {len(reply)} bytes; name fewer or shorter parts"
                )
                reply = json.dumps(failure(too_long)).encode()
            replies.write(frame(reply))
            replies.flush()
            signal.setitimer(signal.ITIMER_REAL, 0)


if __name__ == "__main__":
    main()
