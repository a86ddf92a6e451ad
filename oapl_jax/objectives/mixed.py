"""Mixed: the likelihood of verified answers beside a reinforcement term, for hybrid training.

As VAPO's loss of positive examples, arXiv 2504.05118. A likelihood is a policy gradient with
advantage 1 for imitated responses, else 0, so this is a mixture of advantages. The loss is GRPO's;
with proximal = "learner" and correction = "none" it is exactly the weighted sum of a negative
log-likelihood and REINFORCE. A correction reweights both.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float

from oapl_jax.objectives import advantages
from oapl_jax.objectives.annotations import Finite, NonNegative


def advantage(
    reward: Float[Array, " G"],
    *,
    estimator: advantages.Estimator,
    reinforcement_weight: NonNegative,
    likelihood_weight: NonNegative,
    verified_reward: Finite,
) -> Float[Array, " G"]:
    """A_i = reinforcement_weight A'_i + likelihood_weight 1[r_i >= verified_reward].

    A group of verified answers alone has A' = 0 and is still imitated.

    Args:
      estimator: of A', see advantages.py.
      verified_reward: the least reward of a verified answer.
    """
    verified = (reward >= verified_reward).astype(jnp.float32)
    reinforced = advantages.advantage(reward, estimator=estimator)
    return reinforcement_weight * reinforced + likelihood_weight * verified
