"""Samples tokens of softmax(scores), or takes the likeliest ones; top-k and top-p masks."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

BLOCK = 128  # tokens of the vocabulary that are first sampled as one


def sample_tokens(
    keys: PRNGKeyArray, scores: Float[Array, "N V"]
) -> tuple[Int[Array, " N"], Float[Array, " N"]]:
    """Samples a token of softmax(scores) for each row; returns it and its log-prob, in float32.

    Two stages, P(token) = P(block) P(token | block), give an exact sample: random numbers, the
    dearest part, are needed for V / BLOCK + BLOCK entries instead of V.

    `keys` are one for each row; a score of -inf masks a token.
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
    inside_block = jax.vmap(jax.random.categorical)(inside, its_scores)
    score = jnp.take_along_axis(its_scores, inside_block[:, None], axis=-1)[:, 0]
    return block * BLOCK + inside_block, score - normaliser


def greedy_tokens(scores: Float[Array, "N V"]) -> tuple[Int[Array, " N"], Float[Array, " N"]]:
    """Takes the likeliest token of each row; returns it and its log-prob."""
    chosen = jnp.argmax(scores, axis=-1)
    score = jnp.take_along_axis(scores, chosen[:, None], axis=-1)[:, 0]
    return chosen, score - jax.nn.logsumexp(scores, axis=-1)


def mask_top_k_top_p(logp: jax.Array, top_p: jax.Array | None, top_k: int) -> jax.Array:
    """Sets normalised log-probs [N, V] outside top-k and then top-p to -inf.

    top_p, if any, keeps the smallest set that reaches it; the likeliest token always stays.
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
