"""The curator of actor-curator (arXiv 2602.20532): network, utility, surrogate, gradient step."""

from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from oapl_jax.learner.train_step import TrainState, finite_update, state_shardings
from oapl_jax.model.transformer import Transformer
from oapl_jax.objectives.advantages import advantage
from oapl_jax.objectives.ratios import bounded_exp
from oapl_jax.structs import Group, Prompt

MAX_LOG_RATIO = 20.0  # mean of a response's tokens; above it exp overflows long before learning


def utility(group: Group, logp: Float[np.ndarray, "G C"]) -> float:
    """Improvement of the policy on a group's prompt by an update.

    By the performance-difference identity J(pi') - J(pi) = E_{y ~ pi'} A^pi(x, y), estimated from
    the old rollouts, with the ratio of the two policies taken a token (as in GSPO):

        U(x) = mean_i s_i A_i,    s_i = exp( mean_t log pi'(y_t) - log pi_lag(y_t) )

    where A is GRPO's advantage and pi_lag the behavior policy: with lag, U is the learner's gain
    since the group was sampled. It is exactly 0 if all rewards are equal.

    Args:
      group: the rollouts and their rewards.
      logp: log-probs of their tokens by the learner after the step, a row for each rollout.
    """
    a = np.asarray(advantage(jnp.asarray(group.reward), estimator="grpo"), np.float64)
    gaps = [
        np.mean(row[: len(r.tokens)].astype(np.float64) - r.behavior_logp)
        for row, r in zip(logp, group.rollouts, strict=True)
    ]
    return float(np.mean(np.exp(np.clip(gaps, -MAX_LOG_RATIO, MAX_LOG_RATIO)) * a))


def surrogate(
    logits: Float[Array, " C"],
    log_p: Float[Array, " C"],
    utility: Float[Array, " C"],
    *,
    count: Int[Array, ""] | int,
    temperature: float,
    clip: float,
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """The clipped policy-improvement loss of the curator, to be minimized:

        L = -1/k sum_{x in S} min( rho U, clip(rho, 1 - eps, 1 + eps) U ),  rho(x) = p(x) / p_old(x)

    Both probabilities are normalized over the same C candidates, of which the k in S were sampled:
    p = softmax(logits / tau), and p_old is that of the choice. With different normalizers
    the ratio of an unchanged curator would not be 1; with S alone as the normalizer, candidates
    outside of S would not lose probability to useful ones. At rho = 1 the gradient by a logit is
    (p(x) sum U - U(x)) / (k tau). Where U < 0 the term is not clipped above rho = 1, as in
    PPO; beyond rho = e^20 it has no gradient.

    Args:
      logits: of the current curator.
      log_p: log p_old; -inf where there is no candidate.
      utility: U; 0 outside of S, and where unknown.
      count, temperature, clip: k, tau of the choice, and eps.

    Returns:
      The loss, and metrics: share of the prompts with a utility whose term is clipped.
    """
    real = jnp.isfinite(log_p)
    log_ratio = jax.nn.log_softmax(logits / temperature, where=real) - log_p
    ratio = bounded_exp(jnp.where(real, log_ratio, 0.0))  # inf times a utility of 0 is no number
    terms = jnp.minimum(ratio * utility, jnp.clip(ratio, 1 - clip, 1 + clip) * utility)
    clipped = jnp.sum(terms < ratio * utility) / jnp.sum(utility != 0)
    return -jnp.sum(terms) / count, {"clip_fraction": clipped}


class Curator(Transformer):
    """The policy's decoder with a scalar head, `score`, on the last token of a prompt.

    The head is initialized to zero: all prompts are equal until one has a utility.
    """

    @nn.compact
    def __call__(self, tokens: jax.Array, positions: jax.Array, segments: jax.Array) -> jax.Array:
        """int32[B, P] tokens, positions, segments (1; 0 in the padding) -> float32[B]."""
        hidden: Any = super().__call__(tokens, positions, segments)
        last = jnp.maximum(jnp.sum(segments, axis=1) - 1, 0)
        state = jnp.take_along_axis(hidden, last[:, None, None], axis=1)[:, 0]
        score = self.param("score", nn.initializers.zeros, (self.config.hidden_size,), jnp.float32)
        return state.astype(jnp.float32) @ score


def make_step(
    model: Curator,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    *,
    rows: int,
    temperature: float,
    clip: float,
) -> Callable[..., tuple[TrainState, dict[str, jax.Array]]]:
    """Compiles (state, tokens[C, P], segments[C, P], log_p[C], utility[C], count) -> (state,
    metrics): one gradient step on the surrogate.

    Activations of `rows` prompts at a time are kept for the backward pass. If loss, gradient or
    update is not finite, only the counts change.
    """

    def step(state: TrainState, tokens, segments, log_p, utility, count):
        def loss_fn(params):
            logits = score(params, tokens, segments, model=model, rows=rows)
            return surrogate(
                logits, log_p, utility, count=count, temperature=temperature, clip=clip
            )

        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            (loss, metrics), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params)
            grad_norm = optax.tree.norm(grads)
            *new, finite = finite_update(optimizer, grads, state.opt_state, state.params, scale=1.0)
            finite &= jnp.isfinite(loss) & jnp.isfinite(grad_norm)
            params, opt_state = jax.tree.map(
                lambda x, old: jnp.where(finite, x, old), new, [state.params, state.opt_state]
            )
            bad = 1 - finite.astype(jnp.int32)
            in_a_row = (state.skipped_in_a_row + 1) * bad
            new = TrainState(state.step + 1, params, opt_state, state.skipped + bad, in_a_row)
        metrics |= {"loss": loss, "grad_norm": grad_norm, "skipped": new.skipped}
        return new, metrics

    shardings, replicated = state_shardings(model, optimizer, mesh), NamedSharding(mesh, P())
    return jax.jit(
        step,
        in_shardings=(shardings, *([replicated] * 5)),
        out_shardings=(shardings, replicated),
    )


def score(
    params: Any, tokens: jax.Array, segments: jax.Array, *, model: Curator, rows: int
) -> jax.Array:
    """float32[C] logits of int32[C, P] prompts, `rows` at a time."""
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
    portions = [x.reshape(-1, rows, x.shape[-1]) for x in (tokens, positions, segments)]
    one = jax.checkpoint(lambda portion: model.apply({"params": params}, *portion))
    return jax.lax.map(one, portions).reshape(-1)


def make_score(model: Curator, mesh: Mesh, *, rows: int) -> Callable[..., jax.Array]:
    """Compiled `score` of parameters on the learner's mesh."""

    def on_mesh(params, tokens, segments):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return score(params, tokens, segments, model=model, rows=rows)

    return jax.jit(on_mesh, out_shardings=NamedSharding(mesh, P()))


def pad_prompts(
    prompts: Sequence[Prompt], *, width: int, rows: int
) -> tuple[np.ndarray, np.ndarray]:
    """int32[C, width] tokens and segments; C is padded to a multiple of `rows`."""
    tokens, segments = np.zeros((2, len(prompts) + -len(prompts) % rows, width), np.int32)
    for row, prompt in enumerate(prompts):
        tokens[row, : len(prompt.tokens)] = prompt.tokens
        segments[row, : len(prompt.tokens)] = 1
    return tokens, segments
