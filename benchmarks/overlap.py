"""Overlap of sampling and learning: wall time of a step over the larger of the two.

    JAX_PLATFORMS=cpu python benchmarks/overlap.py [--steps=96] [--rounds=3]

Runs the training loop of the default run with a sampler that waits instead of computing, as remote
servers do, which share no core with the learner. For each ratio of generation time to learning
time, the loop runs with rollout.overlap=True, and

    ratio = wall time of a step / max(time to learn a step, time to generate one)

where the time to learn comes from a run whose rollouts cost nothing, in turns with the others.
"""

import argparse
import queue
import statistics
import tempfile
import threading
import time
from unittest import mock

import numpy as np
from etils import epath
from results import keep, show

from configs import arithmetic
from oapl_jax import build, train
from oapl_jax.config import Config
from oapl_jax.rollout.sampler import Sampled
from oapl_jax.structs import Rollout
from oapl_jax.tracking.metrics import read_lines
from oapl_jax.tracking.progress import StopRequest

IN_FLIGHT = 64  # groups, the default of fleet.max_in_flight
TOKENS = 9  # of a response, the default run's mean length
SETTLED = 16  # first steps, which compile and fill the buffer, are excluded


class WaitingSampler:
    """Samples IN_FLIGHT groups at a time, each in `latency` seconds."""

    def __init__(self, latency: float):
        self._latency, self.version = latency, -1

    def versions(self):
        return {self.version}

    def refresh(self, version, path):
        self.version = version

    def generate(self, prompts, *, n, sampling):
        asked = queue.Queue(IN_FLIGHT)

        def ask():
            try:
                for prompt in prompts:
                    asked.put((time.monotonic() + self._latency, self.version, prompt))
            finally:
                asked.put(None)

        threading.Thread(target=ask, daemon=True).start()
        while entry := asked.get():
            done, version, prompt = entry
            time.sleep(max(done - time.monotonic(), 0))
            tokens = np.random.default_rng(prompt.stream_index).integers(
                2, 12, (n, TOKENS), np.int32
            )
            logp = np.full(TOKENS, -0.3, np.float32)
            rollouts = tuple(Rollout(row, logp, version, "length") for row in tokens)
            yield Sampled(prompt, rollouts, "waiting", self._latency)

    def metrics(self):
        return {}

    def close(self):
        pass


def seconds_a_step(steps: int, generate: float) -> float:
    """Median wall time of a gradient step whose groups take `generate` seconds to sample."""
    config = arithmetic.get_config()
    with config.unlocked():
        config.num_steps, config.warmup.num_steps = steps, 0
        config.evaluation.every, config.checkpoint.every = 0, 10 * steps
        config.rollout.overlap, config.tracking.tensorboard = True, False
        config.rollout.max_zero_reward_groups = 0  # random tokens are never right
        config.buffer.mode, config.buffer.zero_variance = "keep_with_anchor", "keep"
    latency = generate * IN_FLIGHT / config.groups_per_step
    new_sampler = lambda run, *, seed, allow_older: WaitingSampler(latency)
    with tempfile.TemporaryDirectory() as directory:
        config.data.data_dir = f"{directory}/data"
        workdir = epath.Path(directory) / "run"
        workdir.mkdir()
        with mock.patch.object(build.Run, "open_sampler", new_sampler):
            train.run(Config.from_dict(config.to_dict()), workdir, StopRequest())
        times = [line["rl_seconds"] for line in read_lines(workdir / "metrics.jsonl")]
    return (times[-1] - times[SETTLED]) / (len(times) - 1 - SETTLED)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=96)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    ratios: dict[float, list[float]] = {0.5: [], 1.0: [], 2.0: []}
    for _ in range(args.rounds):
        learn = seconds_a_step(args.steps, 0.0)
        for share, found in ratios.items():
            found.append(seconds_a_step(args.steps, share * learn) / max(learn, share * learn))
    lines = [
        {
            "generation / learning": share,
            "wall / max(generation, learning)": round(statistics.median(found), 3),
            "of the rounds": ", ".join(f"{ratio:.3f}" for ratio in found),
        }
        for share, found in ratios.items()
    ]
    show(lines)
    keep(lines)


if __name__ == "__main__":
    main()
