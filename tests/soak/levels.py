"""Memory and file handles of process groups, over time."""

import contextlib
import os
import pathlib
import statistics
import time
from collections import defaultdict
from collections.abc import Iterable
from typing import NamedTuple

from parts import Part

EVERY = 2.0  # seconds between two samples
PAGE = os.sysconf("SC_PAGE_SIZE")


class Sample(NamedTuple):
    time: float
    start: int  # number of the process, of all that the part was
    bytes: int  # resident
    handles: int


class Levels:
    """Samples of each part, by name."""

    def __init__(self):
        self._samples: dict[str, list[Sample]] = defaultdict(list)
        self._latest = 0.0

    def sample(self, parts: Iterable[Part]) -> None:
        """Takes a sample of the parts that run, if one is due."""
        now = time.monotonic()
        if now < self._latest + EVERY:
            return
        self._latest, sizes = now, sizes_of_groups()
        for part in parts:
            if part.process and part.process.group in sizes:
                size = sizes[part.process.group]
                self._samples[part.name].append(Sample(now, part.starts, *size))

    def rise(self, name: str, since: float) -> tuple[float, float] | None:
        """Growth of a part from the second to the last third of a time: MB, and handles.

        The first third is a process's warm-up. None if it did not run all that time.
        """
        samples = [sample for sample in self._samples[name] if sample.time > since]
        third = len(samples) // 3
        if third < 3 or len({sample.start for sample in samples}) > 1:
            return None
        early, late = samples[third : 2 * third], samples[2 * third :]
        # A save opens files for a moment, which the median leaves out.
        level = lambda of, field: statistics.median(getattr(sample, field) for sample in of)
        grown = lambda field: level(late, field) - level(early, field)
        return grown("bytes") / 1e6, grown("handles")


def sizes_of_groups() -> dict[int, tuple[int, int]]:
    """Resident bytes and open file handles of each process group."""
    found: dict[int, tuple[int, int]] = {}
    for path in pathlib.Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it ended meanwhile
            group = int((path / "stat").read_text().rpartition(")")[2].split()[2])
            resident = int((path / "statm").read_text().split()[1]) * PAGE
            handles = len(os.listdir(path / "fd"))
            before = found.get(group, (0, 0))
            found[group] = before[0] + resident, before[1] + handles
    return found
