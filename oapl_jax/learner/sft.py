"""The supervised stage before RL: a fresh tiny model learns to answer from noisy demonstrations."""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
import optax
from jax.sharding import Mesh

from oapl_jax.learner import packing as batching
from oapl_jax.learner import train_step as learner
from oapl_jax.model.transformer import Transformer
from oapl_jax.objectives import bind
from oapl_jax.objectives.aggregation import sequence_weights
from oapl_jax.structs import Group


def warm_up(
    model: Transformer,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    demonstrations: Iterator[Group],
    *,
    params: Any | int,
    num_steps: int,
    batch_size: int,
    micro_batches: int,
    row_length: int,
    rows_multiple: int,
    logp_chunk: int,
    max_prompt_tokens: int,
    max_response_tokens: int,
    log: Callable[[int, dict[str, float]], None],
) -> Any:
    """Trains parameters by maximum likelihood, averaged over tokens.

    Args:
      model, optimizer, mesh: as for the learner.
      demonstrations: groups of one "rollout" each, the demonstrated response, with reward 1.
      params: to start from, or the seed of fresh ones.
      num_steps: gradient steps.
      batch_size: demonstrations a step.
      micro_batches, row_length, rows_multiple, logp_chunk: as for the learner.
      max_prompt_tokens, max_response_tokens: of a demonstration.
      log: called with the step and its loss (nats a token).

    Returns:
      The parameters, in the learner's sharding.
    """
    state = learner.init_state(model, optimizer, mesh, params)
    step_fn = learner.make_train_step(
        model,
        bind("sft"),
        optimizer,
        mesh,
        temperature=1.0,
        logp_chunk=logp_chunk,
        kl_weight=0.0,
        ess_power=0.0,
        to_reference=False,
    )
    shardings = learner.batch_shardings(mesh)
    for step in range(num_steps):
        groups = [next(demonstrations) for _ in range(batch_size)]
        lengths = np.array([len(g.rollouts[0].tokens) for g in groups])
        batch = batching.make_batch(
            groups,
            [g.reward for g in groups],
            sequence_weights(lengths, "token", constant_length=1),
            step=0,
            micro_batches=micro_batches,
            row_length=row_length,
            rows_multiple=rows_multiple,
            max_prompt_tokens=max_prompt_tokens,
            max_response_tokens=max_response_tokens,
            together=1,
        )
        state, metrics = step_fn(state, batching.to_mesh(batch, shardings))
        log(step + 1, {"loss": float(jax.device_get(metrics["loss"]))})
    return state.params
