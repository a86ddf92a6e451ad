"""Lag policy: which learner steps are published, and which version serves.

Lag is the learner's step minus the version that a rollout was sampled from. The policy is a
function of the step (and the seed) without state, so a resumed run keeps its phase.
"""

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class LagPolicy:
    """Decides which steps publish a version and which version samples each step's rollouts.

    mode: "window": publish every `steps` steps and serve that version until the next, so lag runs
      from 0 to steps - 1 (arXiv 2602.19362, algorithm 1). "fixed": publish every step, serve the
      version `steps` behind. "uniform": publish every step, serve a version drawn uniformly from
      0 to `steps` behind, anew each step, with `seed`.
    """

    mode: str
    steps: int
    seed: int

    def publishes(self, step: int) -> bool:
        """True if the learner's weights before gradient step `step` become a version."""
        return self.mode != "window" or step % self.steps == 0

    def serves(self, step: int) -> int:
        """Version that samples the rollouts for gradient step `step`."""
        if self.mode == "window":
            return step - step % self.steps
        oldest = max(step - self.steps, 0)
        if self.mode == "fixed":
            return oldest
        return int(np.random.default_rng([self.seed, step]).integers(oldest, step + 1))

    def needs(self, step: int) -> set[int]:
        """Versions published up to `step` that may serve at `step` or later."""
        if self.mode == "window":
            return {self.serves(step)}
        return set(range(max(step - self.steps, 0), step + 1))
