"""Settings of rewards, processes that their tests look for, and patience."""

import time
from dataclasses import replace
from pathlib import Path

from hostile import MARK

from configs import common
from oapl_jax.config import RewardsConfig

REWARDS = RewardsConfig.from_dict(common.rewards().to_dict(), "rewards")
LIMITS = dict(processes=8, output_bytes=1 << 20, temporary_bytes=1 << 24, packages=())
CODE = replace(REWARDS.code, seconds_per_test=30.0, cache_entries=100, **LIMITS)
MATH = replace(REWARDS.math, seconds=60.0)


def wait_until(condition, seconds=60.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come true"
        time.sleep(0.02)


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def marked():
    """Ids of the processes and threads of this machine that carry the mark of hostile.py."""
    found = []
    for comm in Path("/proc").glob("[0-9]*/task/*/comm"):
        try:
            if comm.read_text().strip() == MARK:
                found.append(int(comm.parent.name))
        except OSError:  # it has ended
            pass
    return found
