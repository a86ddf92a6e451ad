"""Probe: fixed rows of tokens with the learner's log-probs, published with each version.

A server that loaded a version is checked against them.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from oapl_jax.config import LearnerConfig
from oapl_jax.errors import NotFinite
from oapl_jax.learner import packing, train_step
from oapl_jax.model.transformer import Transformer
from oapl_jax.objectives import bind
from oapl_jax.structs import Batch, Group, Prompt, Rollout

ROWS, LENGTH = 4, 33


def probe_batch(vocab_size: int, layout: LearnerConfig) -> tuple[Batch, np.ndarray]:
    """Draws tokens, int32[4, <= 33], the same in every process; returns them packed, and as is."""
    shape = ROWS, min(LENGTH, layout.row_length)
    tokens = np.random.default_rng(0).integers(0, vocab_size, shape).astype(np.int32)
    blank = np.zeros(tokens.shape[1] - 1, np.float32)
    groups = [
        Group(
            Prompt(f"probe {i}", i, row[:1], "", "", ""),
            (Rollout(row[1:], blank, 0, "length"),),
            np.zeros(1, np.float32),
        )
        for i, row in enumerate(tokens)
    ]
    batch = packing.build_batch(
        groups,
        bind("sft", {}),  # only its log-probs are used, neither advantage nor loss
        dataclasses.replace(layout, micro_batches=1),
        aggregation="sequence",
        step=0,
        max_prompt_tokens=1,
        max_response_tokens=len(blank),
    )
    return batch, tokens


def make_probe(
    model: Transformer, mesh: Mesh, layout: LearnerConfig
) -> Callable[[Any], dict[str, Any]]:
    """Compiles params -> {"tokens": [[id]], "logp": [[float]]}, a JSON-able probe.

    `logp` is at temperature 1, and has no element for a row's first token. Raises NotFinite if it
    is not finite.
    """
    batch, tokens = probe_batch(model.config.vocab_size, layout)
    settings: Any = dict(temperature=1.0, logp_chunk=layout.logp_chunk)
    logp_step = train_step.make_logp_step(model, mesh, **settings)
    placed = packing.to_mesh(batch, train_step.batch_shardings(mesh))

    def probe(params: Any) -> dict[str, Any]:
        logp = np.asarray(jax.device_get(logp_step(params, placed)))
        if not np.all(np.isfinite(logp)):
            raise NotFinite(
                "the policy's log-probs are not finite, so its weights are neither saved nor "
                "published; lower optim.learning_rate, or start from an earlier checkpoint step"
            )
        return {"tokens": tokens.tolist(), "logp": logp.astype(float).tolist()}

    return probe
