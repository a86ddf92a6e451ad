"""Actor-curator's mathematics (arXiv 2602.20532): what a prompt was good for, and the surrogate."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from oapl_jax.objectives.advantages import advantage
from oapl_jax.structs import Group

MAX_LOG_RATIO = 20.0  # of a token, on average; beyond it exp overflows before anything is learnt


def utility(group: Group, logp: Float[np.ndarray, "G C"]) -> float:
    """How much an update improved the policy on a group's prompt.

    By the performance-difference identity J(pi') - J(pi) = E_{y ~ pi'} A^pi(x, y), estimated from
    the old rollouts, with the ratio of the two policies taken a token (as GSPO takes it):

        U(x) = mean_i s_i A_i,    s_i = exp( mean_t log pi'(y_t) - log pi_lag(y_t) )

    where A is GRPO's advantage and pi_lag the policy that sampled: with lag, U is what the learner
    has gained since then. It is exactly 0 if all rewards are equal.

    Args:
      group: the rollouts and their rewards.
      logp: log-probs of their tokens by the learner after the step, one row a rollout.
    """
    a = np.asarray(advantage(jnp.asarray(group.reward), estimator="grpo"), np.float64)
    gaps = [
        np.mean(row[: len(r.tokens)].astype(np.float64) - r.behavior_logp)
        for row, r in zip(logp, group.rollouts, strict=True)
    ]
    return float(np.mean(np.exp(np.clip(gaps, -MAX_LOG_RATIO, MAX_LOG_RATIO)) * a))


def surrogate(
    logits: Float[Array, " S"],
    log_p: Float[Array, " S"],
    utility: Float[Array, " S"],
    *,
    temperature: float,
    clip: float,
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """The clipped policy-improvement loss of the curator, to be minimised:

        L = -mean_{x in S} min( rho U, clip(rho, 1 - eps, 1 + eps) U ),
        rho(x) = p(x) / p_old(x),  p = softmax_S(logits / temperature),  p_old = softmax_S(log_p)

    Both probabilities are normalised over S, the prompts that were sampled: a quotient of numbers
    with different normalisers would not be 1 where nothing has changed. At rho = 1 the gradient by
    a logit is (p(x) sum U - U(x)) / (|S| temperature): it rests where p is proportional to U.

    Args:
      logits: the curator's, now.
      log_p: recorded when each prompt was drawn; an equal constant on all changes nothing.
      utility: U.
      temperature: as when they were drawn.
      clip: eps.

    Returns:
      The loss, and metrics: the share of prompts whose term is clipped.
    """
    log_ratio = jax.nn.log_softmax(logits / temperature) - jax.nn.log_softmax(log_p)
    ratio = jnp.exp(log_ratio)
    clipped = jnp.clip(ratio, 1 - clip, 1 + clip)
    terms = jnp.minimum(ratio * utility, clipped * utility)
    return -jnp.mean(terms), {"clip_fraction": jnp.mean(terms < ratio * utility)}
