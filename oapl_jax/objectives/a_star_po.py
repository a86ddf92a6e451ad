"""A*-PO: OAPL's predecessor, whose anchor is a fixed reference policy.

"Accelerating RL for LLM reasoning with optimal advantage regression", arXiv 2505.20686. OAPL's two
functions, where `behavior_logp` is the reference's (`denominator = "reference"`).
"""

from jaxtyping import Array, Float

from oapl_jax.objectives import oapl


def advantage(reward: Float[Array, " G"], *, beta1: float) -> Float[Array, " G"]:
    """A_i = r_i - V^,  V^ = beta1 log( (1/G) sum_j exp(r_j / beta1) ).

    The paper samples the group of V^ from the reference, once, before training. Here it is the
    group that trains: V^ is the reference's as long as that policy is the one that samples, and
    too high by what the policy has learned afterwards, which shifts all responses of a prompt
    alike.
    """
    return oapl.advantage(reward, beta1=beta1)


def loss(
    logp: Float[Array, "G T"],
    behavior_logp: Float[Array, "G T"],
    advantage: Float[Array, " G"],
    mask: Float[Array, "G T"],
    *,
    beta2: float,
) -> tuple[Float[Array, " G"], dict[str, Float[Array, " G"]]]:
    """L_i = ( beta2 [log pi(y_i|x) - log pi_ref(y_i|x)] - A_i )^2.

    Args:
      logp, advantage, mask: as in objectives/oapl.py.
      behavior_logp: of each response token under the reference policy.
      beta2: strength of the anchor, above 0, in units of reward per nat.
    """
    return oapl.loss(logp, behavior_logp, advantage, mask, beta2=beta2)
