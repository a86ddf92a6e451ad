"""What the TPU compiler says beside its results: lines on file descriptor 2 of the process."""

import contextlib
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence

# Warnings go to file descriptor 2; without it they go to a file below /tmp/tpu_logs. The TPU
# library reads it once, when it is loaded.
LEVEL = {"TPU_STDERR_LOG_LEVEL": "1", "TPU_MIN_LOG_LEVEL": "1"}
REPLICATED = "Involuntary full rematerialization"


@contextlib.contextmanager
def heard() -> Iterator[list[str]]:
    """A list that holds, once the block has ended, the lines that were written during it.

    They are the compiler's: C++ writes to the descriptor, whatever `sys.stderr` is.
    """
    lines: list[str] = []
    sys.stderr.flush()
    before = os.dup(2)
    with tempfile.TemporaryFile() as file:
        os.dup2(file.fileno(), 2)
        try:
            yield lines
        finally:
            sys.stderr.flush()
            os.dup2(before, 2)
            os.close(before)
            file.seek(0)
            lines += file.read().decode(errors="replace").splitlines()


def replicated(lines: Sequence[str]) -> int:
    """How many arrays the compiler reshards by replicating them whole on every chip, having found
    no other way."""
    return sum(REPLICATED in line for line in lines)
