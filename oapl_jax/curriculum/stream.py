"""The stream of prompts that the worker samples: all of them, or a choice by a prompt scorer."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from oapl_jax.data.prompts import PromptStream
from oapl_jax.structs import Group, Prompt


class PromptScorer:
    """Base class of curricula: scores candidate prompts, and learns from sampled groups.

    Every method but `awake` and `rescores` is called with the buffer's lock held: by the worker's
    thread at a choice, by the learner's when it trains and saves. The base class itself is the
    uniform curriculum: never awake, ignores all events.
    """

    awake: bool = False  # True if prompts are chosen; else every prompt of the stream is sampled
    rescores: bool = False  # True if `trained` needs log-probs by the updated learner

    def logits(self, prompts: Sequence[Prompt]) -> np.ndarray:
        """float[C]: prompts are chosen by the softmax of these."""
        return np.zeros(len(prompts))

    def picked(self, candidates: Sequence[Prompt], log_p: np.ndarray, chosen: np.ndarray) -> None:
        """Receives a choice: of C candidates, with float64[C] log_p, the indices `chosen`."""

    def ended(self, group: Group) -> None:
        """Receives the rewards of a group."""

    def trained(self, groups: Sequence[Group], logp: np.ndarray | None) -> None:
        """Receives a gradient step of the learner.

        Args:
          groups: of the step.
          logp: float32[S, C], log-probs of all their responses' tokens by the learner after the
            step, a row each in the order of the groups; None unless `rescores`.
        """

    def metrics(self) -> dict[str, float]:
        return {}

    def state(self, alive: set[int]) -> dict[str, Any]:
        """JSON-able; may forget stream indices that are not `alive`."""
        return {}

    def arrays(self) -> Any | None:
        """Arrays on the mesh, saved beside `state`; None if there are none."""
        return None

    def restore(
        self, state: dict[str, Any], read: Callable[[Any], Any], at: Callable[[int], Prompt]
    ) -> None:
        """Continues at `state` and `arrays`.

        Args:
          state: of `state`.
          read: abstract arrays (shapes and shardings of `arrays`) -> the saved ones.
          at: stream index -> prompt.
        """


def log_softmax(logits: Float[np.ndarray, " C"]) -> Float[np.ndarray, " C"]:
    """log softmax in float64."""
    shifted = np.asarray(logits, np.float64) - np.max(logits)
    return shifted - np.log(np.sum(np.exp(shifted)))


def nucleus_size(log_p: Float[np.ndarray, " C"], top_p: float) -> int:
    """The most candidates, by probability, whose sum is at most `top_p`; at least one."""
    mass = np.cumsum(np.sort(np.exp(log_p))[::-1])
    return max(int(np.sum(mass <= top_p)), 1)


def choose(
    log_p: Float[np.ndarray, " C"], count: int, *, top_p: float, rng: np.random.Generator
) -> tuple[Int[np.ndarray, " count"], int]:
    """Samples `count` of C candidates without replacement (arXiv 2602.20532).

    With n the size of the nucleus of mass `top_p`, m = min(n, count) are sampled one after the
    other by p, each from the remaining ones; the others uniformly from the rest. The more p is
    concentrated, the more samples go to exploration.

    Returns:
      Indices in ascending order, and m.
    """
    by_p = min(nucleus_size(log_p, top_p), count)
    # The largest m of log p + Gumbel noise are m samples without replacement (arXiv 1903.06059).
    order = np.argsort(-(log_p + rng.gumbel(size=len(log_p))))
    explored = rng.permutation(order[by_p:])[: count - by_p]
    return np.sort(np.concatenate([order[:by_p], explored])), by_p


class Curriculum(Iterator[Prompt]):
    """Chooses `picks` of the next `candidates` prompts of a stream, again and again.

    A chosen prompt keeps its stream index; the others are skipped, and come again in another epoch.
    While the scorer is not awake this is the stream itself.

    Random numbers of a choice follow from `seed` and the first candidate's stream index; for
    `top_p` see `choose`.
    """

    def __init__(
        self,
        prompts: PromptStream,
        scorer: PromptScorer,
        *,
        candidates: int,
        picks: int,
        top_p: float,
        seed: int,
    ):
        self.scorer = scorer
        self._prompts, self._candidates, self._picks = prompts, candidates, picks
        self._top_p, self._seed = top_p, seed
        self._chosen: list[Prompt] = []  # and not yet taken
        self._latest: dict[str, float] = {}  # metrics of the latest choice

    def __next__(self) -> Prompt:
        if not self._chosen:
            self._chosen = self._choose() if self.scorer.awake else [next(self._prompts)]
        return self._chosen.pop(0)

    def _choose(self) -> list[Prompt]:
        candidates = [next(self._prompts) for _ in range(self._candidates)]
        log_p = log_softmax(self.scorer.logits(candidates))
        rng = np.random.default_rng([self._seed, candidates[0].stream_index, 1])
        chosen, by_p = choose(log_p, self._picks, top_p=self._top_p, rng=rng)
        self.scorer.picked(candidates, log_p, chosen)
        entropy = -np.sum(np.exp(log_p) * log_p)
        self._latest = {
            "curriculum/chosen": by_p / self._picks,
            "curriculum/effective_share": float(np.exp(entropy) / self._candidates),
        }
        return [candidates[i] for i in chosen]

    def at(self, stream_index: int) -> Prompt:
        return self._prompts.at(stream_index)

    @property
    def dropped(self) -> int:
        """Prompts of the stream that are too long."""
        return self._prompts.dropped

    def metrics(self) -> dict[str, float]:
        awake = {"curriculum/awake": float(self.scorer.awake)} if self._latest else {}
        return {**awake, **self._latest, **self.scorer.metrics()}

    def state(self) -> dict[str, Any]:
        """JSON-able position in the stream and pending choice, without the scorer's own state."""
        chosen = [prompt.stream_index for prompt in self._chosen]
        return {"stream": self._prompts.state(), "chosen": chosen, "latest": dict(self._latest)}

    def restore(self, state: dict[str, Any]) -> None:
        """Continues at `state`; raises as `PromptStream.restore` does."""
        self._prompts.restore(state["stream"])
        self._chosen = [self.at(index) for index in state["chosen"]]
        self._latest = dict(state["latest"])
