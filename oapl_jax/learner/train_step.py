"""The learner: (state, batch) -> (state, metrics), compiled once over a mesh.

It knows neither files nor prompts nor samplers.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from oapl_jax.model.logprobs import token_logp
from oapl_jax.model.sharding import ROWS, parameter_shardings
from oapl_jax.model.transformer import Transformer, head
from oapl_jax.objectives import Objective
from oapl_jax.objectives.reference import reference_kl
from oapl_jax.objectives.sample_size import effective_share
from oapl_jax.structs import Batch, Leaf


@flax.struct.dataclass
class TrainState:
    step: Leaf  # int32[], gradient steps tried, skipped ones included
    params: Any  # float32 masters
    opt_state: Any
    skipped: Leaf  # int32[], steps whose loss or gradient was not finite
    skipped_in_a_row: Leaf  # int32[]


def new_state(params: Any, optimizer: optax.GradientTransformation) -> TrainState:
    # One array each: donated buffers must not be shared.
    step, skipped, in_a_row = (jnp.zeros((), jnp.int32) for _ in range(3))
    return TrainState(step, params, optimizer.init(params), skipped, in_a_row)


def init_params(model: Transformer, key: jax.Array) -> Any:
    """Fresh float32 parameters; call it under jit (un-jitted initialisation takes many seconds)."""
    blank = jnp.zeros((1, 2), jnp.int32)
    return model.init(key, blank, blank, blank)["params"]


def state_shardings(
    model: Transformer, optimizer: optax.GradientTransformation, mesh: Mesh
) -> TrainState:
    """Where each array of a TrainState lives; moments lie beside their parameters."""
    params = jax.eval_shape(functools.partial(init_params, model), jax.random.key(0))
    placed = parameter_shardings(params, mesh)
    shapes = jax.eval_shape(functools.partial(new_state, optimizer=optimizer), params)
    everywhere = NamedSharding(mesh, P())
    moments = optax.tree_utils.tree_map_params(
        optimizer,
        lambda _, s: s,
        shapes.opt_state,
        placed,
        transform_non_params=lambda _: everywhere,
    )
    return TrainState(everywhere, placed, moments, everywhere, everywhere)


def batch_shardings(mesh: Mesh) -> Batch:
    """Rows are split over data and fsdp, their places over context; the rest is everywhere."""
    rows, everywhere = NamedSharding(mesh, P(None, *ROWS, "context")), NamedSharding(mesh, P())
    return Batch(rows, rows, rows, *([everywhere] * 8))


def init_state(
    model: Transformer, optimizer: optax.GradientTransformation, mesh: Mesh, params: Any | int
) -> TrainState:
    """A state at step 0, in its sharding, from parameters or from the seed of fresh ones."""
    shardings = state_shardings(model, optimizer, mesh)
    if isinstance(params, int):
        make = lambda key: new_state(init_params(model, key), optimizer)
        return jax.jit(make, out_shardings=shardings)(jax.random.key(params))
    params = jax.device_put(params, shardings.params)
    return jax.jit(functools.partial(new_state, optimizer=optimizer), out_shardings=shardings)(
        params
    )


def response_logp(
    params: Any, batch: Batch, m: Any, *, model: Transformer, temperature: float, chunk: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Log-probability and entropy [S, C] of the response tokens in micro-batch m, 0 elsewhere; and
    bool[S], the responses that lie there."""
    take = functools.partial(jax.lax.dynamic_index_in_dim, index=m, keepdims=False)
    tokens, positions, segments = map(take, (batch.tokens, batch.positions, batch.segments))
    hidden: Any = model.apply({"params": params}, tokens, positions, segments)
    places = batch.where - m * tokens.size
    here = (batch.mask > 0) & (places >= 0) & (places < tokens.size)
    before = jnp.where(here, places - 1, tokens.size)  # the state before a token predicts it
    wanted = jnp.zeros(tokens.size, bool).at[before].set(True, mode="drop")
    logp, entropy = token_logp(
        hidden,
        head(params, model.config),
        jnp.roll(tokens, -1, axis=1),
        wanted.reshape(tokens.shape),
        temperature=temperature,
        chunk=chunk,
    )
    unpack = lambda x: x.reshape(-1).at[before].get(mode="fill", fill_value=0.0)
    return unpack(logp), unpack(entropy), jnp.any(here, axis=-1)


def micro_batches_used(batch: Batch) -> jax.Array:
    return jnp.max(batch.where) // math.prod(batch.tokens.shape[1:]) + 1


def padding(batch: Batch) -> jax.Array:
    """The share of the places that a step computes which hold no token."""
    places = micro_batches_used(batch) * math.prod(batch.tokens.shape[1:])
    return 1 - jnp.sum(batch.segments > 0) / places


def over_micro_batches(of_one: Callable[[Any], Any], batch: Batch) -> Any:
    """The sum of of_one(m) over the micro-batches that hold anything."""
    most = batch.tokens.shape[0]
    if most == 1:
        return of_one(0)
    start = jax.tree.map(jnp.zeros_like, jax.eval_shape(of_one, 0))
    visit = lambda m, total: jax.tree.map(jnp.add, total, of_one(m))
    with jax.named_scope(f"at_most_{most}"):  # the bound is data, see model/logprobs.py
        return jax.lax.fori_loop(0, micro_batches_used(batch), visit, start)


def summarize(loss: jax.Array, metrics: dict[str, jax.Array], batch: Batch) -> dict[str, jax.Array]:
    """Scalars from per-sequence [S] arrays; not-a-number where a set of sequences is empty."""
    right = batch.reward > 0
    mean = lambda x, where: jnp.sum(jnp.where(where, x, 0)) / jnp.sum(where)
    out = {"loss": loss}
    for name, value in metrics.items():
        out[name] = jnp.mean(value)
        if name in ("residual", "log_ratio"):
            for side, where in (("right", right), ("wrong", ~right)):
                out[f"{name}/{side}"] = average = mean(value, where)
                out[f"{name}/{side}_std"] = jnp.sqrt(mean(jnp.square(value - average), where))
    if "target_log_ratio" in metrics:
        # Least squares through the origin of the log-ratio on A / beta2: 1 at the fixed point.
        target = metrics["target_log_ratio"]
        out["log_ratio/slope"] = jnp.sum(metrics["log_ratio"] * target) / jnp.sum(
            jnp.square(target)
        )
    return out


def make_train_step(
    model: Transformer,
    objective: Objective,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    *,
    temperature: float,
    logp_chunk: int,
    kl_weight: float,
    ess_power: float,
    to_reference: bool,
) -> Callable[[TrainState, Batch], tuple[TrainState, dict[str, jax.Array]]]:
    """Compiles one gradient step; the old state's buffers are given to the new one.

    The gradient is the sum over micro-batches of sum_i weight_i L_i, so a split batch gives the
    whole batch's gradient. A step whose loss, gradient norm or scale by `ess_power` is not finite
    changes nothing but the counts.

    Args:
      temperature, logp_chunk: as in `token_logp`.
      kl_weight: of KL(pi || pi_ref), which is added to the loss of each sequence; 0 adds nothing.
      ess_power: the update is multiplied by (ESS / B)^ess_power: 0 leaves it, 1/2 is VCPO's for
        Adam (objectives/sample_size.py).
      to_reference: whether the objective compares with the reference policy in the place of the
        behavior policy. KL and ESS are those of the behavior policy all the same: the drift.
    """

    def micro_loss(params, batch: Batch, m):
        logp, entropy, mine = response_logp(
            params, batch, m, model=model, temperature=temperature, chunk=logp_chunk
        )
        anchor = batch.reference_logp if to_reference else batch.behavior_logp
        # Those of other micro-batches are as if they were at it; below, nothing of them counts.
        logp = jnp.where(mine[:, None], logp, anchor)
        losses, metrics = objective.loss(logp, anchor, batch.advantage, batch.mask)
        if kl_weight:
            kl = reference_kl(logp, batch.behavior_logp, batch.reference_logp, batch.mask)
            losses, metrics = losses + kl_weight * kl, {**metrics, "reference_kl": kl}
        # KL(pi_lag || pi) from pi_lag's samples in the form whose terms are never negative (k3).
        gap = jnp.where(batch.mask > 0, logp - batch.behavior_logp, 0.0)
        tokens = jnp.sum(batch.mask, axis=-1)
        per_sequence = {
            "kl": jnp.sum(jnp.expm1(jnp.clip(gap, max=20.0)) - gap, axis=-1) / tokens,
            "entropy": jnp.sum(entropy * batch.mask, axis=-1) / tokens,
            "log_weight": jnp.sum(gap, axis=-1),
            **metrics,
        }
        count = lambda x: jnp.where(mine, x, 0)
        return jnp.sum(count(batch.weight * losses)), jax.tree.map(count, per_sequence)

    def step(state: TrainState, batch: Batch):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            with_gradient = jax.value_and_grad(micro_loss, has_aux=True)
            (loss, per_sequence), grads = over_micro_batches(
                functools.partial(with_gradient, state.params, batch), batch
            )
            grad_norm = optax.tree.norm(grads)
            share = effective_share(per_sequence.pop("log_weight"))
            scale = share**ess_power
            finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm) & jnp.isfinite(scale)
            updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
            updates = jax.tree.map(lambda u: u * scale, updates)
            params = optax.apply_updates(state.params, updates)
            keep = functools.partial(jax.tree.map, lambda new, old: jnp.where(finite, new, old))
            bad = 1 - finite.astype(jnp.int32)
            new_state = TrainState(
                step=state.step + 1,
                params=keep(params, state.params),
                opt_state=keep(opt_state, state.opt_state),
                skipped=state.skipped + bad,
                skipped_in_a_row=(state.skipped_in_a_row + 1) * bad,
            )
            metrics = summarize(loss, per_sequence, batch)
            metrics["grad_norm"] = grad_norm
            metrics["ess"] = share
            metrics["padding"] = padding(batch)
            metrics["skipped"] = new_state.skipped
            metrics["skipped_in_a_row"] = new_state.skipped_in_a_row
        return new_state, metrics

    shardings = state_shardings(model, optimizer, mesh)
    everywhere = NamedSharding(mesh, P())
    return jax.jit(
        step,
        in_shardings=(shardings, batch_shardings(mesh)),
        out_shardings=(shardings, everywhere),
        donate_argnums=0,
    )


def make_logp_step(
    model: Transformer, mesh: Mesh, *, temperature: float, logp_chunk: int
) -> Callable[[Any, Batch], jax.Array]:
    """Compiles params, batch -> float32[S, C] log-probs, for `denominator = learner`."""

    def logp(params, batch: Batch):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            one = functools.partial(
                response_logp, params, batch, model=model, temperature=temperature, chunk=logp_chunk
            )
            return over_micro_batches(lambda m: one(m)[0], batch)

    return jax.jit(logp, out_shardings=NamedSharding(mesh, P()))
