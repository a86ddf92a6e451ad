"""The responses to a benchmark, as they come: responses.jsonl.

The first line says what they are responses to, and of whom (see `describe`). Every other line is
one answered request, some samples of one prompt:

    prompt     id of the problem
    start      index of the first of these samples among the n of the problem
    tokens     a list of token ids for each sample, with the stop token if it has one
    logp       sum of the tokens' log-probabilities of each sample, at the sampling temperature
    finish     "stop" or "length" of each sample
    server     that sampled them
    seconds    wall-clock seconds since the line before, or since sampling began in this process

No sample comes twice; which of the n are missing follows from the file alone, and n may be raised.
"""

import hashlib
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from oapl_jax.evaluation.jsonl import Lines
from oapl_jax.model.config import ModelConfig
from oapl_jax.rollout import dataset as shards
from oapl_jax.rollout.sampler import Sampled, Sampling
from oapl_jax.structs import Prompt, Rollout

FORMAT = "oapl_jax responses 1"


def describe(
    prompts: Sequence[Prompt],
    *,
    benchmark: str,
    version: int,
    weights: str,
    sampler: str,
    seed: int,
    tokenizer: Any,
    model: ModelConfig,
    sampling: Sampling,
) -> dict[str, Any]:
    """What decides a response, JSON-able.

    Args:
      prompts: of all problems.
      benchmark: its name.
      version: of the policy.
      weights: checksum of the version's tensors.
      sampler: "local" or "fleet".
      seed: of the local sampler.
      tokenizer, model, sampling: as of rollout.dataset.describe.
    """
    known = shards.describe(
        task=prompts[0].task,
        tokenizer=tokenizer,
        model=model,
        sampling=sampling,
        group_size=0,
        made={},
    )
    del known["group_size"], known["made"]  # how many are asked for at a time decides nothing
    templated = json.dumps([[p.id, p.tokens.tolist()] for p in prompts])
    return {
        "format": FORMAT,
        "benchmark": benchmark,
        "problems": len(prompts),
        "prompts": hashlib.sha256(templated.encode()).hexdigest(),
        "version": version,
        "weights": weights,
        "sampler": sampler,
        "seed": seed,
        **known,
    }


class Responses:
    """What there is of the first n samples of each prompt: on disk, and its measures in memory.

    Args:
      path: of the file.
      about: see `describe`; what is there must be about the same.
      prompts: of all problems.
      n: samples wanted of each; others in the file stay there and do not count.

    Attributes:
      about: as above.
      there: bool[P, n], which samples there are.
      lengths: int64[P, n], tokens.
      logp: float64[P, n], nats.
      truncated: bool[P, n].
      seconds: float, wall-clock, that sampling took.

    Raises:
      UserError: see Lines; and if the file holds a sample twice or of another prompt.
    """

    def __init__(
        self, path: epath.Path, about: Mapping[str, Any], prompts: Sequence[Prompt], *, n: int
    ):
        self._rows = {prompt.id: row for row, prompt in enumerate(prompts)}
        shape = (len(prompts), n)
        self.there, self.truncated = np.zeros((2, *shape), bool)
        self.lengths, self.logp = np.zeros(shape, np.int64), np.zeros(shape)
        self.seconds = 0.0
        self._lines = Lines(path, about, replace=False)
        self.about = self._lines.about
        try:
            for number, line in enumerate(self._lines, 2):
                self._count(line, number)
        except BaseException:
            self.close()
            raise
        self._last = time.monotonic()

    def begin(self) -> None:
        """Sampling begins now."""
        self._last = time.monotonic()

    def append(self, start: int, sampled: Sampled) -> None:
        """Adds samples from index `start` on."""
        now = time.monotonic()
        line = {
            "prompt": sampled.prompt.id,
            "start": start,
            "tokens": [r.tokens.tolist() for r in sampled.rollouts],
            "logp": [float(r.behavior_logp.sum(dtype=np.float64)) for r in sampled.rollouts],
            "finish": [r.finish_reason for r in sampled.rollouts],
            "server": sampled.server,
            "seconds": round(now - self._last, 3),
        }
        self._last = now
        self._lines.append(line)
        self._count(line, None)

    def rollouts(self) -> Iterator[tuple[str, int, list[Rollout]]]:
        """(id of the prompt, start, samples) of each line that has some of the first n.

        The log-probabilities of single tokens are not on disk: they are NaN.
        """
        version = self.about["version"]
        for line in self._lines:
            if line["start"] < self.there.shape[1]:
                samples = [
                    Rollout(
                        tokens=np.array(tokens, np.int32),
                        behavior_logp=np.full(len(tokens), np.nan, np.float32),
                        policy_version=version,
                        finish_reason=finish,
                    )
                    for tokens, finish in zip(line["tokens"], line["finish"], strict=True)
                ]
                yield line["prompt"], line["start"], samples

    def close(self) -> None:
        self._lines.close()

    def _count(self, line: Mapping[str, Any], number: int | None) -> None:
        try:
            row, start, finish = self._rows[line["prompt"]], line["start"], line["finish"]
            lengths = [len(tokens) for tokens in line["tokens"]]
            columns = np.arange(start, start + len(lengths))
            fits = columns < self.there.shape[1]
            columns = columns[fits]
            if start < 0 or self.there[row, columns].any():
                raise ValueError(f"samples from {start} on are there already")
            self.lengths[row, columns] = np.array(lengths)[fits]
            self.logp[row, columns] = np.array(line["logp"], np.float64)[fits]
            self.truncated[row, columns] = (np.array(finish) == "length")[fits]
            self.there[row, columns] = True
            self.seconds += line["seconds"]
        except (LookupError, TypeError, ValueError) as error:
            raise self._lines.damaged(number, f"{error!r}") from error
