"""The cost of the ledger: the events of the default run, as a share of the time that it takes.

    python benchmarks/ledger.py [--seconds=100]

The default run trains on 400 steps of 32 groups of 8 rollouts and takes about 100 seconds on two
cores. Checkpoints are left out: their five `position` calls wait for the disk, as they do.
"""

import argparse
import tempfile
import time

import numpy as np
from etils import epath
from results import keep

from oapl_jax.rollout.ledger import FILE, Ledger, LedgerReport
from oapl_jax.rollout.sampler import Sampled
from oapl_jax.structs import Group, Prompt, Rollout

STEPS, GROUPS, SIZE = 400, 32, 8


def main() -> None:
    parser = argparse.ArgumentParser(description="What the ledger costs.")
    parser.add_argument("--seconds", type=float, default=100.0, help="that the job takes")
    seconds = parser.parse_args().seconds
    rollouts = tuple(
        Rollout(np.zeros(12, np.int32), np.zeros(12, np.float32), 16, "stop") for _ in range(SIZE)
    )
    reward = np.array([0, 1] * (SIZE // 2), np.float32)
    with tempfile.TemporaryDirectory() as directory:
        path = epath.Path(directory) / FILE
        ledger = Ledger(path)
        started = time.perf_counter()
        for step in range(STEPS):
            groups = []
            for draw in range(step * GROUPS, (step + 1) * GROUPS):
                prompt = Prompt(f"train_{draw}", draw, np.zeros(1, np.int32), "", "", "")
                ledger.request(prompt, SIZE)
                groups.append(Group(prompt, rollouts, reward))
            for group in groups:
                ledger.sampled(Sampled(group.prompt, rollouts, "local", 0.1), reward)
            for group in groups:
                ledger.end(group, "trained", step)
        wrote = time.perf_counter() - started
        ledger.close()
        size = path.stat().length
        started = time.perf_counter()
        summary = LedgerReport(path).summary()
        read = time.perf_counter() - started
    assert summary["balanced"]
    assert summary["balance"]["trained"] == STEPS * GROUPS * SIZE
    events = 3 * STEPS * GROUPS
    print(
        f"{events} events, {size / 1e6:.1f} MB: {wrote:.2f} s, {wrote / events * 1e6:.1f} us each, "
        f"{wrote / seconds:.2%} of {seconds:.0f} s; read and summed in {read:.2f} s"
    )
    keep({"events": events, "MB": size / 1e6, "s": wrote, "of": seconds, "read s": read})


if __name__ == "__main__":
    main()
