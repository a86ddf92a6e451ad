"""Drawing a token from its logits, and the settings that forbid some of them."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

BLOCK = 128  # tokens of the vocabulary that are first drawn as one


def draw(
    keys: PRNGKeyArray, scores: Float[Array, "N V"]
) -> tuple[Int[Array, " N"], Float[Array, " N"]]:
    """One token of softmax(scores) for each row, and its log-probability, in float32.

    First a block of BLOCK tokens, by its share of the probability, then a token inside:
    P(token) = P(block) P(token | block), so it is an exact draw. Random numbers, which cost more
    than all else, are needed for V / BLOCK + BLOCK entries instead of V.

    Args:
      keys: [N], one for each row.
      scores: logits at the temperature of the draw; -inf forbids a token.
    """
    rows, size = scores.shape
    if size <= BLOCK:
        logp = jax.nn.log_softmax(scores, axis=-1)
        chosen = jax.vmap(jax.random.categorical)(keys, logp)
        return chosen, jnp.take_along_axis(logp, chosen[:, None], axis=-1)[:, 0]
    of_block, inside = jnp.moveaxis(jax.vmap(jax.random.split)(keys), 1, 0)
    padded = jnp.pad(scores, ((0, 0), (0, -size % BLOCK)), constant_values=-jnp.inf)
    blocks = padded.reshape(rows, -1, BLOCK)
    largest = jnp.max(scores, axis=-1)
    shares = jnp.log(jnp.sum(jnp.exp(blocks - largest[:, None, None]), axis=-1))
    normaliser = largest + jax.nn.logsumexp(shares, axis=-1)
    block = jax.vmap(jax.random.categorical)(of_block, shares)
    its_scores = jnp.take_along_axis(blocks, block[:, None, None], axis=1)[:, 0]
    place = jax.vmap(jax.random.categorical)(inside, its_scores)
    score = jnp.take_along_axis(its_scores, place[:, None], axis=-1)[:, 0]
    return block * BLOCK + place, score - normaliser


def best(scores: Float[Array, "N V"]) -> tuple[Int[Array, " N"], Float[Array, " N"]]:
    """The likeliest token of each row, and its log-probability."""
    chosen = jnp.argmax(scores, axis=-1)
    score = jnp.take_along_axis(scores, chosen[:, None], axis=-1)[:, 0]
    return chosen, score - jax.nn.logsumexp(scores, axis=-1)


def restrict(logp: jax.Array, top_p: jax.Array | None, top_k: int) -> jax.Array:
    """Sets the log-probabilities outside top-k and then top-p to -inf; the best token always stays.

    Args:
      logp: float32[N, V], normalised.
      top_p: probability to keep (the smallest set that reaches it), or None.
      top_k: number of tokens to keep, 0 for all.
    """
    if top_k:
        least = jax.lax.top_k(logp, min(top_k, logp.shape[-1]))[0][:, -1:]
        logp = jax.nn.log_softmax(jnp.where(logp >= least, logp, -jnp.inf), axis=-1)
    if top_p is not None:
        ordered = -jnp.sort(-logp, axis=-1)
        before = jnp.cumsum(jnp.exp(ordered), axis=-1) - jnp.exp(ordered)
        least = jnp.min(jnp.where(before < top_p, ordered, jnp.inf), axis=-1, keepdims=True)
        logp = jnp.where(logp >= least, logp, -jnp.inf)
    return logp
