"""The learner: (state, batch) -> (state, metrics), compiled once over a mesh.

It knows neither files nor prompts nor samplers. `make_train_step` is the gradient step: the forward
pass of each micro-batch (`response_logp`), the objective's loss, the optimizer's update.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from oapl_jax.model import lora
from oapl_jax.model.logprobs import token_logp
from oapl_jax.model.sharding import ROWS, parameter_shardings, serving_dtype
from oapl_jax.model.transformer import Transformer, head
from oapl_jax.objectives import Objective
from oapl_jax.objectives.ratios import effective_share, reference_kl
from oapl_jax.structs import Batch, Leaf


@flax.struct.dataclass
class TrainState:
    step: Leaf  # int32[], gradient steps tried, skipped ones included
    params: Any  # float32 masters; of a model with LoRA the adapters alone
    opt_state: Any
    skipped: Leaf  # int32[], steps whose loss, gradient or update was not finite
    skipped_in_a_row: Leaf  # int32[]


def new_state(params: Any, optimizer: optax.GradientTransformation) -> TrainState:
    # One array each: donated buffers must not be shared.
    step, skipped, in_a_row = (jnp.zeros((), jnp.int32) for _ in range(3))
    return TrainState(step, params, optimizer.init(params), skipped, in_a_row)


def init_params(model: Transformer, key: jax.Array) -> Any:
    """Fresh float32 parameters to train: of a model with LoRA the adapters alone.

    Call it under jit (un-jitted initialisation takes many seconds).
    """
    blank = jnp.zeros((1, 2), jnp.int32)
    params = model.init(key, blank, blank, blank)["params"]
    return lora.adapters_of(params) if model.lora else params


@functools.cache
def abstract_params(model: Transformer) -> Any:
    """Shapes and dtypes of fresh parameters."""
    return jax.eval_shape(functools.partial(init_params, model), jax.random.key(0))


def abstract_frozen(model: Transformer, mesh: Mesh) -> Any:
    """Shapes, dtypes and shardings of the weights under a model's adapters; {} without LoRA."""
    if not model.lora:
        return {}
    plain: Any = Transformer(model.config, model.dtype, model.remat)
    params = abstract_params(plain)

    def place(path: Any, leaf: Any, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
        dtype = serving_dtype(path[-1].key, lora.FROZEN_DTYPE)
        return jax.ShapeDtypeStruct(leaf.shape, dtype, sharding=sharding)

    return jax.tree_util.tree_map_with_path(place, params, parameter_shardings(params, mesh))


def abstract_state(
    model: Transformer, optimizer: optax.GradientTransformation, mesh: Mesh
) -> TrainState:
    """Shapes, dtypes and shardings: moments as their parameters, the rest replicated."""
    params = abstract_params(model)  # pyright: ignore[reportArgumentType]
    state = jax.eval_shape(functools.partial(new_state, optimizer=optimizer), params)
    sharded, replicated = parameter_shardings(params, mesh), NamedSharding(mesh, P())
    of_param, of_other = (lambda _, sharding: sharding), (lambda _: replicated)
    moments = optax.tree_utils.tree_map_params(
        optimizer, of_param, state.opt_state, sharded, transform_non_params=of_other
    )
    shardings = TrainState(replicated, sharded, moments, replicated, replicated)
    place = lambda leaf, s: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=s)
    return jax.tree.map(place, state, shardings)


def state_shardings(*parts: Any) -> TrainState:
    """Shardings of `abstract_state(*parts)`."""
    return jax.tree.map(lambda leaf: leaf.sharding, abstract_state(*parts))


def batch_shardings(mesh: Mesh) -> Batch:
    """Shardings of a Batch: rows over data and fsdp, tokens over context; the rest replicated."""
    rows, replicated = NamedSharding(mesh, P(None, *ROWS, "context")), NamedSharding(mesh, P())
    return Batch(rows, rows, rows, *([replicated] * 8))


def make_init(
    model: Transformer, optimizer: optax.GradientTransformation, mesh: Mesh, *, fresh: bool
) -> Callable[[Any], TrainState]:
    """Compiles parameters, or the key of `fresh` ones -> a sharded state at step 0."""
    make = lambda given: new_state(init_params(model, given) if fresh else given, optimizer)
    return jax.jit(make, out_shardings=state_shardings(model, optimizer, mesh))


def init_state(
    model: Transformer, optimizer: optax.GradientTransformation, mesh: Mesh, params: Any | int
) -> TrainState:
    """A sharded state at step 0, from parameters or from the seed of fresh ones."""
    if isinstance(params, int):
        return make_init(model, optimizer, mesh, fresh=True)(jax.random.key(params))
    placed = jax.device_put(params, parameter_shardings(params, mesh))
    return make_init(model, optimizer, mesh, fresh=False)(placed)


def response_logp(
    params: Any, batch: Batch, m: Any, *, model: Transformer, temperature: float, chunk: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Forward pass of micro-batch m, unpacked from rows to responses.

    Returns log-probability and entropy [S, C] of the response tokens in this micro-batch, 0
    elsewhere; and bool[S], the responses that are in it.
    """
    of_m = functools.partial(jax.lax.dynamic_index_in_dim, index=m, keepdims=False)
    tokens, positions, segments = map(of_m, (batch.tokens, batch.positions, batch.segments))
    hidden: Any = model.apply({"params": params}, tokens, positions, segments)
    index = batch.token_index - m * tokens.size
    inside = (batch.mask > 0) & (index >= 0) & (index < tokens.size)
    before = jnp.where(inside, index - 1, tokens.size)  # the state before a token predicts it
    wanted = jnp.zeros(tokens.size, bool).at[before].set(True, mode="drop")
    logp, entropy = token_logp(
        hidden,
        head(params, model.config),
        jnp.roll(tokens, -1, axis=1),
        wanted.reshape(tokens.shape),
        temperature=temperature,
        chunk=chunk,
        frozen_head=model.lora is not None,
    )
    unpack = lambda x: x.reshape(-1).at[before].get(mode="fill", fill_value=0.0)
    return unpack(logp), unpack(entropy), jnp.any(inside, axis=-1)


def micro_batches_used(batch: Batch) -> jax.Array:
    """The number of micro-batches that hold a response; they are filled in order."""
    return jnp.max(batch.token_index) // math.prod(batch.tokens.shape[1:]) + 1


def padding(batch: Batch) -> jax.Array:
    """Fraction of padding among the tokens that a step computes."""
    computed = micro_batches_used(batch) * math.prod(batch.tokens.shape[1:])
    return 1 - jnp.sum(batch.segments > 0) / computed


def sum_micro_batches(function: Callable[[Any], Any], batch: Batch) -> Any:
    """The sum of function(m) over the micro-batches that are not empty."""
    most = batch.tokens.shape[0]
    if most == 1:
        return function(0)
    function = jax.jit(function, inline=True)  # which eval_shape and the loop trace once
    start = jax.tree.map(jnp.zeros_like, jax.eval_shape(function, jnp.int32(0)))
    add = lambda m, total: jax.tree.map(jnp.add, total, function(m))
    with jax.named_scope(f"at_most_{most}"):  # the bound is data, see model/logprobs.py
        return jax.lax.fori_loop(0, micro_batches_used(batch), add, start)


def summarize(loss: jax.Array, metrics: dict[str, jax.Array], batch: Batch) -> dict[str, jax.Array]:
    """Scalars from per-sequence [S] arrays; nan for the mean of an empty set of sequences."""
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
        # Least squares through the origin of the log-ratio on its target: 1 at the fixed point.
        target = metrics["target_log_ratio"]
        product = jnp.sum(metrics["log_ratio"] * target)
        out["log_ratio/slope"] = product / jnp.sum(jnp.square(target))
    return out


def response_values(per_sequence: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """The per-sequence [S] metrics that the run report shows of single responses.

    `log_ratio` is to the objective's anchor, or else to the policy that sampled; regressions have
    `residual` and `target` too.
    """
    names = {"residual": "residual", "target_log_ratio": "target"}
    found = {name: per_sequence[key] for key, name in names.items() if key in per_sequence}
    return {"log_ratio": per_sequence.get("log_ratio", per_sequence["log_weight"]), **found}


def drift(logp: jax.Array, entropy: jax.Array, batch: Batch) -> dict[str, jax.Array]:
    """Per-sequence [S] metrics: KL(pi_lag || pi) a token, entropy a token, log of the weight.

    The KL is from pi_lag's samples, by its non-negative estimate (k3).
    """
    gap = jnp.where(batch.mask > 0, logp - batch.behavior_logp, 0.0)
    tokens = jnp.sum(batch.mask, axis=-1)
    return {
        "kl": jnp.sum(jnp.expm1(jnp.clip(gap, max=20.0)) - gap, axis=-1) / tokens,
        "entropy": jnp.sum(entropy * batch.mask, axis=-1) / tokens,
        "log_weight": jnp.sum(gap, axis=-1),
    }


def finite_update(
    optimizer: optax.GradientTransformation, grads: Any, opt_state: Any, params: Any, *, scale: Any
) -> tuple[Any, Any, jax.Array]:
    """Updates parameters and optimizer state; bool[], True if all of them are finite.

    The update is computed twice, once for the check alone, since a donated state can be replaced in
    place only when it is known whether the update is taken. The barrier keeps the two apart. With
    AdamW in float32 on a CPU, both take 13 ns a parameter, as one update with its check does, and 9
    bytes of temporary memory a parameter instead of 14.
    """

    def update(grads: Any, opt_state: Any, params: Any) -> tuple[Any, Any]:
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, jax.tree.map(lambda u: u * scale, updates)), opt_state

    given = (grads, opt_state, params)
    finite = [jnp.all(jnp.isfinite(x)) for x in jax.tree.leaves(update(*given))]
    finite, given = jax.lax.optimization_barrier((jnp.all(jnp.stack(finite)), given))
    return *update(*given), finite


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
    return_logp: bool = False,
) -> Callable[..., tuple[TrainState, dict[str, jax.Array]]]:
    """Compiles one gradient step, of (state, batch) or, with LoRA, (state, batch, frozen weights).

    It donates the old state's buffers to the new state, and never the frozen weights.

    The metrics are scalars but "responses", the arrays of `response_values`. The gradient is the
    sum over micro-batches of sum_i weight_i L_i, so a split batch gives the whole batch's gradient.
    If the loss, the gradient norm, the scale by `ess_power`, or a parameter
    or moment after the update is not finite, the step changes only its counts.

    Args (`temperature` and `logp_chunk` are those of `token_logp`):
      kl_weight: of KL(pi || pi_ref), which is added to the loss of each sequence; 0 adds nothing.
      ess_power: the update is multiplied by (ESS / B)^ess_power (objectives/ratios.py).
      to_reference: replaces the behavior policy by the reference policy in the objective. KL and
        ESS remain those of the behavior policy: the drift.
      return_logp: adds to "responses" the log-probs [S, C] before the update, on every host.
    """

    def micro_batch_loss(params: Any, frozen: Any, batch: Batch, m: Any):
        whole = lora.join(frozen, params) if frozen else params
        logp, entropy, mine = response_logp(
            whole, batch, m, model=model, temperature=temperature, chunk=logp_chunk
        )
        anchor = batch.reference_logp if to_reference else batch.behavior_logp
        # Sequences outside this micro-batch get ratio 1 and are masked out below.
        logp = jnp.where(mine[:, None], logp, anchor)
        losses, metrics = objective.loss(logp, anchor, batch.advantage, batch.mask)
        if kl_weight:
            kl = reference_kl(logp, batch.behavior_logp, batch.reference_logp, batch.mask)
            losses, metrics = losses + kl_weight * kl, {**metrics, "reference_kl": kl}
        per_sequence = {**drift(logp, entropy, batch), **metrics}
        keep_mine = lambda x: jnp.where(mine, x, 0)
        per_token = {"logp": jnp.where(mine[:, None], logp, 0)} if return_logp else {}
        sums = jax.tree.map(keep_mine, per_sequence), per_token
        return jnp.sum(keep_mine(batch.weight * losses)), sums

    def train_step(state: TrainState, batch: Batch, frozen: Any = None):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            gradient = jax.value_and_grad(micro_batch_loss, has_aux=True)
            (loss, (per_sequence, per_token)), grads = sum_micro_batches(
                functools.partial(gradient, state.params, frozen, batch), batch
            )
            grad_norm = optax.tree.norm(grads)
            responses = response_values(per_sequence) | per_token
            ess = effective_share(per_sequence.pop("log_weight"))
            scale = ess**ess_power
            params, opt_state, finite = finite_update(
                optimizer, grads, state.opt_state, state.params, scale=scale
            )
            finite &= jnp.isfinite(loss) & jnp.isfinite(grad_norm)
            if_finite = functools.partial(jax.tree.map, lambda x, old: jnp.where(finite, x, old))
            bad = 1 - finite.astype(jnp.int32)
            new = TrainState(
                step=state.step + 1,
                params=if_finite(params, state.params),
                opt_state=if_finite(opt_state, state.opt_state),
                skipped=state.skipped + bad,
                skipped_in_a_row=(state.skipped_in_a_row + 1) * bad,
            )
            metrics = {
                **summarize(loss, per_sequence, batch),
                "grad_norm": grad_norm,
                "ess": ess,
                "padding": padding(batch),
                "skipped": new.skipped,
                "skipped_in_a_row": new.skipped_in_a_row,
                "responses": responses,
            }
        return new, metrics

    shardings = state_shardings(model, optimizer, mesh)
    frozen = jax.tree.map(lambda leaf: leaf.sharding, abstract_frozen(model, mesh))
    return jax.jit(
        train_step,
        in_shardings=(shardings, batch_shardings(mesh), *([frozen] if frozen else [])),
        out_shardings=(shardings, NamedSharding(mesh, P())),
        donate_argnums=0,
    )


def make_logp_step(
    model: Transformer, mesh: Mesh, *, temperature: float, logp_chunk: int
) -> Callable[[Any, Batch], jax.Array]:
    """Compiles params, batch -> float32[S, C], the log-probs of the response tokens."""

    def logp_step(params: Any, batch: Batch):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            settings: Any = dict(model=model, temperature=temperature, chunk=logp_chunk)
            logp = lambda m: response_logp(params, batch, m, **settings)[0]
            return sum_micro_batches(logp, batch)

    return jax.jit(logp_step, out_shardings=NamedSharding(mesh, P()))


def recompute_logps(
    batch: Batch,
    logp_step: Callable[[Any, Batch], jax.Array],
    *,
    step: int,
    reference: Any | None = None,
    load_version: Callable[[int], Any] | None = None,
) -> Batch:
    """Replaces log-probs of a batch on the mesh by those of the learner's forward pass.

    Args:
      step: learner step of the batch, to which its lag refers.
      reference: parameters of the reference policy, if the objective or the KL needs them.
      load_version: version -> parameters, to recompute the behavior policy's log-probs from each
        rollout's version (`objective.denominator="learner"`).
    """
    if reference is not None:
        batch = dataclasses.replace(batch, reference_logp=logp_step(reference, batch))
    if load_version is None:
        return batch
    behavior_logp = batch.behavior_logp
    for lag in np.unique(jax.device_get(batch.lag)):
        logp = logp_step(load_version(step - int(lag)), batch)
        behavior_logp = jnp.where((batch.lag == lag)[:, None], logp, behavior_logp)
    return dataclasses.replace(batch, behavior_logp=behavior_logp)
