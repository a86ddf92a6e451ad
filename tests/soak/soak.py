"""Soak test: a run on a fleet under random faults, and what must hold afterwards, as a table.

    make soak [MINUTES=60]

It needs Linux with user namespaces (or root), a C compiler, iproute2 and `make sglang`. The last
fifth of the time is without faults. The seed of the faults is printed; their moments are not
repeatable. The exit code is 1 if a property does not hold. Logs stay below --directory.
"""

import argparse
import pathlib
import random
import shutil
import sys
import time
from collections import Counter
from collections.abc import Callable

import checks
from faults import FAULTS
from places import enter_namespaces
from scene import Scene

PAUSE = 2.0, 12.0  # seconds between two faults
CALM = 0.2  # of the time, at the end


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=60.0, help="of faults and calm")
    parser.add_argument("--seed", type=int, default=random.randrange(10**6), help="of the faults")
    parser.add_argument("--directory", default="runs/soak", help="is replaced")
    given = parser.parse_args()
    enter_namespaces()
    directory = pathlib.Path(given.directory).absolute()
    shutil.rmtree(directory, ignore_errors=True)
    scene, started = Scene(directory, given.seed), time.monotonic()

    def log(text: str) -> None:
        print(f"{time.monotonic() - started:6.0f} s  {text}", flush=True)

    log(f"soak of {given.minutes:g} minutes with --seed={given.seed}; logs: {scene.logs}")
    try:
        scene.start()
        log("both servers sample")
        happened = disturb(scene, 60 * given.minutes * (1 - CALM), log)
        scene.wait_for_step()
        scene.wait(scene.all_ready, "the return of both servers")
        log("calm")
        since = time.monotonic()
        scene.watch(60 * given.minutes * CALM)
        log("stop")
        scene.stop()
    finally:
        scene.save()
    rows = [
        checks.Row("faults", ", ".join(f"{n} {name}" for name, n in happened.items()), True),
        checks.nothing_runs(),
        checks.ledger(scene),
        checks.groups(scene),
        checks.rounds(scene),
        checks.evaluations(scene),
        *checks.levels(scene, since),
        checks.tidy(scene),
        *checks.ends(scene),
    ]
    print("| property | found | holds |\n|---|---|---|")
    for row in rows:
        print(f"| {row.property} | {row.found} | {'yes' if row.holds else '**no**'} |")
    sys.exit(not all(row.holds for row in rows))


def disturb(scene: Scene, seconds: float, log: Callable[[str], None]) -> Counter[str]:
    """Commits faults one after the other, each kind once before any comes again, and at least once.

    The next one comes soon, or, every second time, after the trainer has made a step.
    """
    until, happened, left = time.monotonic() + seconds, Counter(), []
    while time.monotonic() < until or len(happened) < len(FAULTS):
        left = left or scene.random.sample(sorted(FAULTS), len(FAULTS))
        name = left.pop()
        log(name)
        happened[name] += 1
        for wait in FAULTS[name](scene):
            scene.watch(wait)
        scene.watch(scene.random.uniform(*PAUSE))
        if scene.random.random() < 0.5:
            scene.wait_for_step()
    return happened


if __name__ == "__main__":
    main()
