"""The supervised stage before RL: a fresh tiny model learns to answer from noisy demonstrations."""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import optax
from jax.sharding import Mesh

from oapl_jax.config import LearnerConfig
from oapl_jax.learner import train_step
from oapl_jax.learner.packing import build_batch, to_mesh
from oapl_jax.model.transformer import Transformer
from oapl_jax.objectives import bind
from oapl_jax.structs import Group


def warm_up(
    model: Transformer,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    demonstrations: Iterator[Group],
    layout: LearnerConfig,
    *,
    params: Any | int,
    num_steps: int,
    batch_size: int,
    max_prompt_tokens: int,
    max_response_tokens: int,
    on_step: Callable[[int, dict[str, Any]], bool],
    frozen: Any = None,
) -> Any:
    """Trains parameters by maximum likelihood, averaged over tokens; returns them sharded.

    Args (the others are as for the learner):
      demonstrations: groups of one rollout each, the demonstrated response, with reward 1.
      params: initial parameters, or the seed of fresh ones.
      batch_size: demonstrations a step.
      on_step: called with the step and its metrics (loss: nats a token); True ends the stage.
      frozen: weights under the adapters of a model with LoRA.
    """
    objective = bind("sft", {})
    state = train_step.init_state(model, optimizer, mesh, params)
    step_fn = train_step.make_train_step(
        model,
        objective,
        optimizer,
        mesh,
        temperature=1.0,
        logp_chunk=layout.logp_chunk,
        kl_weight=0.0,
        ess_power=0.0,
        to_reference=False,
    )
    shardings = train_step.batch_shardings(mesh)
    for step in range(num_steps):
        batch = build_batch(
            [next(demonstrations) for _ in range(batch_size)],
            objective,
            layout,
            aggregation="token",
            step=0,
            max_prompt_tokens=max_prompt_tokens,
            max_response_tokens=max_response_tokens,
        )
        state, metrics = step_fn(state, to_mesh(batch, shardings), *([frozen] if frozen else []))
        if on_step(step + 1, jax.device_get(metrics)):
            break
    return state.params
