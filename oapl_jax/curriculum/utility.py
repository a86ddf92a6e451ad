"""Actor-curator's mathematics (arXiv 2602.20532): what a prompt was good for, and the surrogate."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from oapl_jax.objectives.advantages import advantage
from oapl_jax.objectives.ratios import bounded_exp
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
    logits: Float[Array, " C"],
    log_p: Float[Array, " C"],
    utility: Float[Array, " C"],
    *,
    count: Int[Array, ""] | int,
    temperature: float,
    clip: float,
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """The clipped policy-improvement loss of the curator, to be minimised:

        L = -1/k sum_{x in S} min( rho U, clip(rho, 1 - eps, 1 + eps) U ),  rho(x) = p(x) / p_old(x)

    Both probabilities are normalised over the same C candidates, of which the k in S were sampled:
    p = softmax(logits / temperature), and p_old is what the choice was made with. A quotient of
    numbers with different normalisers would not be 1 where nothing has changed; and with S alone as
    the normaliser, candidates outside of S would not be held down where those in it are useful.
    At rho = 1 the gradient by a logit is (p(x) sum U - U(x)) / (k temperature). Where U < 0 the
    term is not clipped above rho = 1, as in PPO; beyond rho = e^20 it has no gradient.

    Args:
      logits: the curator's, now.
      log_p: log p_old; -inf where there is no candidate.
      utility: U; 0 outside of S, and for what is not known.
      count: k.
      temperature: as when they were drawn.
      clip: eps.

    Returns:
      The loss, and metrics: of the prompts with a utility, the share whose term is clipped.
    """
    real = jnp.isfinite(log_p)
    log_ratio = jax.nn.log_softmax(logits / temperature, where=real) - log_p
    ratio = bounded_exp(jnp.where(real, log_ratio, 0.0))  # inf times a utility of 0 is no number
    terms = jnp.minimum(ratio * utility, jnp.clip(ratio, 1 - clip, 1 + clip) * utility)
    clipped = jnp.sum(terms < ratio * utility) / jnp.sum(utility != 0)
    return -jnp.sum(terms) / count, {"clip_fraction": clipped}
