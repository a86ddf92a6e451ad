"""Runs oapl_jax.train, and exits with code 75 if the run was stopped before its end.

A stopped run saves and exits with code 0, like a completed one, but only a completed run writes
result.json, from one worker. A watch must restart the stopped run only.
"""

import pathlib
import runpy
import sys
import time
from typing import Any

LOOKS, EVERY = 45, 2.0  # polls, seconds; NFS may show a new file to other machines after a minute


def place(path: str) -> Any:
    """The path of a file, on the share or in a bucket."""
    if "://" not in path:
        return pathlib.Path(path)
    from etils import epath  # here: with a share, no package is needed

    return epath.Path(path)


def written(file: Any) -> int | None:
    """Changes when the file does."""
    if not file.exists():
        return None
    stat = file.stat()
    return getattr(stat, "st_mtime_ns", None) or stat.mtime


if __name__ == "__main__":
    (workdir,) = [word.partition("=")[2] for word in sys.argv if word.startswith("--workdir=")]
    result = place(workdir) / "result.json"
    before = written(result)
    runpy.run_module("oapl_jax.train", run_name="__main__", alter_sys=True)
    for _ in range(LOOKS):
        if written(result) != before:
            sys.exit()
        time.sleep(EVERY)
    print("the run was stopped before its end", file=sys.stderr)
    sys.exit(75)
