"""The curator network: prompt tokens -> one logit, with a state and a step over the mesh."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from oapl_jax.curriculum.utility import surrogate
from oapl_jax.model.config import ModelConfig
from oapl_jax.model.sharding import parameter_shardings
from oapl_jax.model.transformer import Transformer
from oapl_jax.structs import Leaf, Prompt


class Curator(nn.Module):
    """The policy's decoder with a scalar head on the last token of a prompt.

    The head begins at zero: all prompts are equal until one has shown its use.
    """

    config: ModelConfig
    dtype: jnp.dtype
    remat: str

    @nn.compact
    def __call__(self, tokens: jax.Array, segments: jax.Array) -> jax.Array:
        """int32[B, P] tokens, int32[B, P] segments (1, and 0 behind the prompt) -> float32[B]."""
        decoder = Transformer(self.config, self.dtype, self.remat, name="decoder")
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
        hidden: Any = decoder(tokens, positions, segments)
        last = jnp.maximum(jnp.sum(segments, axis=1) - 1, 0)
        state = jnp.take_along_axis(hidden, last[:, None, None], axis=1)[:, 0]
        score = self.param("score", nn.initializers.zeros, (self.config.hidden_size,), jnp.float32)
        return state.astype(jnp.float32) @ score


@flax.struct.dataclass
class CuratorState:
    params: Any  # float32 masters: {"decoder": as the policy's, "score": [D]}
    opt_state: Any
    skipped: Leaf  # int32[], steps whose loss or gradient was not finite


def new_state(params: Any, optimizer: optax.GradientTransformation) -> CuratorState:
    return CuratorState(params, optimizer.init(params), jnp.zeros((), jnp.int32))


def init_params(model: Curator, key: jax.Array) -> Any:
    blank = jnp.zeros((1, 2), jnp.int32)
    return model.init(key, blank, blank)["params"]


def state_shardings(
    model: Curator, optimizer: optax.GradientTransformation, mesh: Mesh
) -> CuratorState:
    """The decoder lies as the policy's does, moments beside it; the head is everywhere, as a norm's
    scale is."""
    params = jax.eval_shape(functools.partial(init_params, model), jax.random.key(0))
    everywhere = NamedSharding(mesh, P())
    placed = {"decoder": parameter_shardings(params["decoder"], mesh), "score": everywhere}
    shapes = jax.eval_shape(functools.partial(new_state, optimizer=optimizer), params)
    moments = optax.tree_utils.tree_map_params(
        optimizer,
        lambda _, s: s,
        shapes.opt_state,
        placed,
        transform_non_params=lambda _: everywhere,
    )
    return CuratorState(placed, moments, everywhere)


def init_state(
    model: Curator, optimizer: optax.GradientTransformation, mesh: Mesh, start: Any | int
) -> CuratorState:
    """A state in its sharding, from a decoder's parameters or from the seed of fresh ones."""
    shardings = state_shardings(model, optimizer, mesh)
    if isinstance(start, int):
        make = lambda key: new_state(init_params(model, key), optimizer)
        return jax.jit(make, out_shardings=shardings)(jax.random.key(start))
    params = {"decoder": start, "score": jnp.zeros(model.config.hidden_size, jnp.float32)}
    params = jax.device_put(params, shardings.params)
    return jax.jit(functools.partial(new_state, optimizer=optimizer), out_shardings=shardings)(
        params
    )


def make_step(
    model: Curator,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    *,
    rows: int,
    temperature: float,
    clip: float,
) -> Callable[..., tuple[CuratorState, dict[str, jax.Array]]]:
    """Compiles (state, tokens[C, P], segments[C, P], log_p[C], utility[C], count) -> (state,
    metrics): one gradient step on the surrogate (utility.py).

    Only `rows` prompts are held for the backward pass at a time. If loss or gradient is not finite,
    nothing changes but the count.
    """

    def step(state: CuratorState, tokens, segments, log_p, utility, count):
        def loss_fn(params):
            logits = score(params, tokens, segments, model=model, rows=rows)
            return surrogate(
                logits, log_p, utility, count=count, temperature=temperature, clip=clip
            )

        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            (loss, metrics), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params)
            grad_norm = optax.tree.norm(grads)
            finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
            updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
            keep = functools.partial(jax.tree.map, lambda new, old: jnp.where(finite, new, old))
            new = CuratorState(
                params=keep(optax.apply_updates(state.params, updates), state.params),
                opt_state=keep(opt_state, state.opt_state),
                skipped=state.skipped + 1 - finite.astype(jnp.int32),
            )
        metrics = {**metrics, "loss": loss, "grad_norm": grad_norm, "skipped": new.skipped}
        return new, metrics

    shardings = state_shardings(model, optimizer, mesh)
    everywhere = NamedSharding(mesh, P())
    return jax.jit(
        step,
        in_shardings=(shardings, *([everywhere] * 5)),
        out_shardings=(shardings, everywhere),
    )


def score(
    params: Any, tokens: jax.Array, segments: jax.Array, *, model: Curator, rows: int
) -> jax.Array:
    """float32[C], the logits of int32[C, P] prompts, `rows` at a time."""
    portions = lambda x: x.reshape(-1, rows, x.shape[-1])
    one = jax.checkpoint(lambda portion: model.apply({"params": params}, *portion))
    return jax.lax.map(one, (portions(tokens), portions(segments))).reshape(-1)


def make_scorer(model: Curator, *, rows: int) -> Callable[[Any, Any, Any], jax.Array]:
    """Compiles (params, tokens[C, P], segments[C, P]) -> logits[C].

    It runs where the parameters are: one device, so that the worker's thread may ask while the
    learner computes (two programs with collectives, started by two threads, could wait for each
    other for ever).
    """
    return jax.jit(functools.partial(score, model=model, rows=rows))


def padded(prompts: Sequence[Prompt], *, width: int, rows: int) -> tuple[np.ndarray, np.ndarray]:
    """int32[C, width] tokens and segments, C rounded up to a multiple of `rows` by empty ones."""
    tokens, segments = np.zeros((2, len(prompts) + -len(prompts) % rows, width), np.int32)
    for row, prompt in enumerate(prompts):
        tokens[row, : len(prompt.tokens)] = prompt.tokens
        segments[row, : len(prompt.tokens)] = 1
    return tokens, segments
