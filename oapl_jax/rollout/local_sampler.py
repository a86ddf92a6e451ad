"""The embedded sampler: batched decoding with a KV cache in one compiled program.

It has its own parameters, read from published versions, so its lag is as real as a fleet's.
"""

import functools
import itertools
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jaxtyping import Array, Float, Int, PRNGKeyArray

from oapl_jax.model import hf
from oapl_jax.model.config import ModelConfig
from oapl_jax.model.transformer import Transformer, empty_cache, head, logits
from oapl_jax.rollout.sampler import Sampled, Sampling
from oapl_jax.structs import Prompt, Rollout
from oapl_jax.weights.publisher import checked_version

BLOCK = 128  # tokens of the vocabulary that are first sampled as one


class LocalSampler:
    """A Sampler on this process's first device.

    Args:
      config: sizes of the model; published versions must have the same.
      seed: with a prompt's stream index and the sample's index it names the random numbers of a
        rollout, which depend neither on its batch nor on earlier samples.
      max_sequences: rollouts decoded at a time.
      prompt_multiple: prompts are padded to a multiple, so that few shapes are compiled.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        dtype: str,
        stop_ids: Sequence[int],
        seed: int,
        max_sequences: int,
        prompt_multiple: int,
    ):
        self._model = Transformer(config, jnp.dtype(dtype), remat="none")
        self._stop_ids, self._key = tuple(sorted(stop_ids)), jax.random.key(seed)
        self._max_sequences, self._prompt_multiple = max_sequences, prompt_multiple
        self._params: Any = None
        self.version = -1

    def refresh(self, version: int, path: epath.Path) -> None:
        with checked_version(path) as directory:
            self.set_params(version, hf.load_params(directory, self._model.config))

    def set_params(self, version: int, params: Any) -> None:
        """Takes parameters from memory: the learner's own, to be evaluated."""
        self._params = jax.device_put(params, jax.local_devices()[0])
        self.version = version

    def versions(self) -> set[int]:
        return {self.version}

    def metrics(self) -> dict[str, float]:
        return {}

    def close(self) -> None:
        """Does nothing: each batch of prompts is decoded synchronously, so none is in flight."""

    def generate(
        self, prompts: Iterable[Prompt], *, n: int, sampling: Sampling
    ) -> Iterator[Sampled]:
        """See Sampler. Prompts are taken in portions of max_sequences // n, the last one filled up;
        fewer prompts than that make one portion, filled up to a power of two.
        """
        prompts, portion = iter(prompts), max(self._max_sequences // n, 1)
        taken = list(itertools.islice(prompts, portion))
        portion = min(portion, 1 << max(len(taken) - 1, 0).bit_length())
        while taken:
            started = time.monotonic()
            groups = self._generate(taken, portion, n, sampling)
            seconds = time.monotonic() - started
            for prompt, rollouts in zip(taken, groups, strict=True):
                yield Sampled(prompt, tuple(rollouts), "local", seconds)
            taken = list(itertools.islice(prompts, portion))

    def _generate(
        self, prompts: Sequence[Prompt], portion: int, n: int, sampling: Sampling
    ) -> list[list[Rollout]]:
        longest = max(len(p.tokens) for p in prompts)
        width = longest + -longest % self._prompt_multiple
        filled = [*prompts, *[prompts[0]] * (portion - len(prompts))]
        tokens, segments = np.zeros((2, portion, width), np.int32)
        for row, prompt in enumerate(filled):
            tokens[row, width - len(prompt.tokens) :] = prompt.tokens
            segments[row, width - len(prompt.tokens) :] = 1
        stream_indices = np.repeat([p.stream_index for p in filled], n)
        out_tokens, out_logp, lengths, stopped = jax.device_get(
            decode(
                self._params,
                tokens,
                segments,
                _row_keys(self._key, stream_indices, np.tile(np.arange(n), portion)),
                np.float32(sampling.temperature) if sampling.temperature else None,
                np.float32(sampling.top_p) if sampling.top_p < 1 else None,
                model=self._model,
                n=n,
                top_k=sampling.top_k,
                max_tokens=sampling.max_response_tokens,
                stop_ids=self._stop_ids,
            )
        )

        def rollout(row: int) -> Rollout:
            tokens, logp = (of[row, : lengths[row]].copy() for of in (out_tokens, out_logp))
            return Rollout(tokens, logp, self.version, "stop" if stopped[row] else "length")

        return [[rollout(i * n + j) for j in range(n)] for i in range(len(prompts))]


@jax.jit
def _row_keys(key: jax.Array, stream_indices: jax.Array, samples: jax.Array) -> jax.Array:
    fold = lambda index, sample: jax.random.fold_in(jax.random.fold_in(key, index), sample)
    return jax.vmap(fold)(stream_indices, samples)


@functools.partial(jax.jit, static_argnames=("model", "n", "top_k", "max_tokens", "stop_ids"))
def decode(
    params,
    tokens,
    segments,
    keys,
    temperature,
    top_p,
    *,
    model: Transformer,
    n: int,
    top_k: int,
    max_tokens: int,
    stop_ids: tuple[int, ...],
):
    """Samples n responses to each of B left-padded prompts until all have stopped.

    Args:
      tokens, segments: int32[B, P]; segments are 1 on prompt tokens and 0 on padding.
      keys: one random key for each of the B * n rows.
      temperature, top_p: float32[]; None is greedy, and no top-p.

    Returns:
      tokens int32[B * n, max_tokens], their log-probs float32 of the same shape, lengths
      int32[B * n] (stop token included) and bool[B * n], whether a stop token was drawn.
    """
    (batch, width), rows = tokens.shape, len(tokens) * n
    matrix = head(params, model.config).astype(model.dtype)
    lengths = jnp.sum(segments, axis=1)
    positions = jnp.maximum(jnp.arange(width)[None] - (width - lengths)[:, None], 0)
    cache = empty_cache(model.config, batch, width + max_tokens, model.dtype)
    apply: Any = functools.partial(model.apply, {"params": params})
    hidden, cache = apply(tokens, positions, segments, cache)
    cache = cache.replace(  # the n samples of a prompt share its prefill
        key=jnp.repeat(cache.key, n, axis=1),
        value=jnp.repeat(cache.value, n, axis=1),
        segments=jnp.repeat(cache.segments, n, axis=0),
    )
    starts = jnp.repeat(lengths, n)
    stops = jnp.asarray(stop_ids, jnp.int32)

    def next_token(t, hidden):
        scores = logits(hidden, matrix)
        if temperature is None:
            return greedy_tokens(scores)
        scores = scores / temperature
        row_keys = jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys, t)
        if top_p is None and not top_k:
            return sample_tokens(row_keys, scores)
        # Log-probs are over the whole vocabulary: top-p and top-k are not renormalised.
        logp = jax.nn.log_softmax(scores, axis=-1)
        chosen, _ = sample_tokens(row_keys, mask_top_k_top_p(logp, top_p, top_k))
        return chosen, jnp.take_along_axis(logp, chosen[:, None], axis=-1)[:, 0]

    def unfinished(state):
        t, _, _, done, _, _, _ = state
        return (t < max_tokens) & ~jnp.all(done)

    def one_token(state):
        t, hidden, cache, done, lengths, out_tokens, out_logp = state
        chosen, logp = next_token(t, hidden)
        column = chosen[:, None].astype(jnp.int32)
        out_tokens = jax.lax.dynamic_update_slice(out_tokens, column, (0, t))
        out_logp = jax.lax.dynamic_update_slice(out_logp, logp[:, None], (0, t))
        lengths = lengths + ~done
        done = done | jnp.any(chosen[:, None] == stops, axis=1)
        ones = jnp.ones((rows, 1), jnp.int32)
        hidden, cache = apply(chosen[:, None], (starts + t)[:, None], ones, cache)
        return t + 1, hidden[:, 0], cache, done, lengths, out_tokens, out_logp

    state = (
        0,
        jnp.repeat(hidden[:, -1], n, axis=0),
        cache,
        jnp.zeros(rows, bool),
        jnp.zeros(rows, jnp.int32),
        jnp.zeros((rows, max_tokens), jnp.int32),
        jnp.zeros((rows, max_tokens), jnp.float32),
    )
    _, _, _, done, lengths, out_tokens, out_logp = jax.lax.while_loop(unfinished, one_token, state)
    return out_tokens, out_logp, lengths, done


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
