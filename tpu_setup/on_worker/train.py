"""oapl_jax.train, but with code 75 if the run was stopped before its end.

A run that is told to stop saves and ends with code 0, like one that is done; but only the latter
writes result.json, from one worker. Who restarts what was preempted must tell the two apart.
"""

import pathlib
import runpy
import sys
import time

LOOKS, EVERY = 45, 2.0  # seconds; a share may show a new file to other machines after a minute


def written(file: pathlib.Path) -> int | None:
    return file.stat().st_mtime_ns if file.exists() else None


if __name__ == "__main__":
    (workdir,) = [word.partition("=")[2] for word in sys.argv if word.startswith("--workdir=")]
    result = pathlib.Path(workdir) / "result.json"
    before = written(result)
    runpy.run_module("oapl_jax.train", run_name="__main__", alter_sys=True)
    for _ in range(LOOKS):
        if written(result) != before:
            sys.exit()
        time.sleep(EVERY)
    print("the run was stopped before its end", file=sys.stderr)
    sys.exit(75)
