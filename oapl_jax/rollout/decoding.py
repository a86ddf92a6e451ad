"""Compiled programs of the embedded sampler: prefill, placement, and decoding of its slots.

A slot is a row of one KV cache that holds one response after another. The cache is a ring: at every
step all rows write the same place of it, and a prompt enters a free row with its last token at the
place before. So a token costs one update of the cache, whatever the lengths of its neighbours.

All programs run in the context of the sampler's mesh; their outputs have fixed shardings, so that
one program's output never makes another one compile again.
"""

import functools
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from oapl_jax.model.config import ModelConfig
from oapl_jax.model.sharding import ROWS, constrain
from oapl_jax.model.transformer import Cache, Transformer, empty_cache, head, logits
from oapl_jax.rollout.token_sampling import greedy_tokens, mask_top_k_top_p, sample_tokens

KEYS_VALUES = P(None, *ROWS, "tensor")  # [layers, B, kv_heads, S, head_dim]
EVERYWHERE = P(("data", "fsdp", "tensor"))  # rows over all devices, for whole logits of a row
CACHE = Cache(key=KEYS_VALUES, value=KEYS_VALUES, segments=ROWS, slot=P())  # pyright: ignore


@flax.struct.dataclass
class Slots:
    """B rows that are decoded together."""

    cache: Cache  # of S places, a ring
    hidden: Float[Array, "B D"]  # predicts the next token
    positions: Int[Array, " B"]  # of the next token in its sequence
    keys: PRNGKeyArray  # [B], of the response
    counts: Int[Array, " B"]  # tokens of the response so far
    limits: Int[Array, " B"]  # most tokens of the response
    active: Bool[Array, " B"]  # false in free rows and after the last token


@flax.struct.dataclass
class Prefilled:
    """Keys and values of U left-padded prompts of W tokens."""

    cache: Cache
    hidden: Float[Array, "U D"]
    lengths: Int[Array, " U"]


SLOTS: Any = Slots(CACHE, *[ROWS] * 6)  # pyright: ignore[reportArgumentType]
PREFILLED: Any = Prefilled(CACHE, ROWS, ROWS)  # pyright: ignore[reportArgumentType]


@functools.partial(
    jax.jit, static_argnames=("config", "rows", "places", "dtype"), out_shardings=SLOTS
)
def empty_slots(config: ModelConfig, rows: int, places: int, dtype: jnp.dtype) -> Slots:
    integers = jnp.zeros(rows, jnp.int32)
    keys = jax.random.split(jax.random.key(0), rows)
    hidden = jnp.zeros((rows, config.hidden_size), dtype)
    cache = empty_cache(config, rows, places, dtype)
    return Slots(cache, hidden, integers, keys, integers, integers, integers > 0)


@functools.partial(jax.jit, static_argnames="model", out_shardings=PREFILLED)
def prefill(
    params: Any, tokens: Int[Array, "U W"], segments: Int[Array, "U W"], *, model: Transformer
) -> Prefilled:
    """Computes left-padded prompts; segments are 1 on their tokens and 0 on padding."""
    prompts, width = tokens.shape
    lengths = jnp.sum(segments, axis=1)
    positions = jnp.maximum(jnp.arange(width)[None] - (width - lengths)[:, None], 0)
    cache = empty_cache(model.config, prompts, width, model.dtype)
    hidden, cache = _apply(model, params, tokens, positions, segments, cache)
    return Prefilled(cache, hidden[:, -1], lengths)


@functools.partial(jax.jit, donate_argnames="slots", out_shardings=SLOTS)
def place(
    slots: Slots,
    prefilled: Prefilled,
    source: Int[Array, " B"],
    stream_indices: Int[Array, " B"],
    samples: Int[Array, " B"],
    limits: Int[Array, " B"],
    seed: PRNGKeyArray,
) -> Slots:
    """Begins a response in each row whose `source` names a row of `prefilled`; -1 leaves the row.

    `seed`, the prompt's stream index and the sample's index name the random numbers of a response.
    """
    width, places = prefilled.cache.key.shape[3], slots.cache.key.shape[3]
    new, source = source >= 0, jnp.maximum(source, 0)
    # The prompt's column that belongs to each place of the ring; negative where none does.
    columns = (jnp.arange(places) - slots.cache.slot) % places - (places - width)
    inside, columns = columns >= 0, jnp.maximum(columns, 0)

    def entered(layer: Any, cache: jax.Array, prompts: jax.Array) -> jax.Array:
        old = jax.lax.dynamic_index_in_dim(cache, layer, keepdims=False)
        theirs = jax.lax.dynamic_index_in_dim(prompts, layer, keepdims=False)
        theirs = constrain(theirs, P(None, "tensor"))[source][:, :, columns]
        mask = new[:, None, None, None] & inside[:, None]
        return jax.lax.dynamic_update_index_in_dim(cache, jnp.where(mask, theirs, old), layer, 0)

    def of_layer(layer, keys_values):
        key, value = keys_values
        return (
            entered(layer, key, prefilled.cache.key),
            entered(layer, value, prefilled.cache.value),
        )

    layers = len(slots.cache.key)
    key, value = jax.lax.fori_loop(0, layers, of_layer, (slots.cache.key, slots.cache.value))
    segments = jnp.where(inside, prefilled.cache.segments[source][:, columns], 0)
    segments = jnp.where(new[:, None], segments, slots.cache.segments)
    fold = jax.vmap(lambda i, j: jax.random.fold_in(jax.random.fold_in(seed, i), j))
    return Slots(
        Cache(key, value, segments, slots.cache.slot),
        jnp.where(new[:, None], prefilled.hidden[source], slots.hidden),
        jnp.where(new, prefilled.lengths[source], slots.positions),
        jnp.where(new, fold(stream_indices, samples), slots.keys),
        jnp.where(new, 0, slots.counts),
        jnp.where(new, limits, slots.limits),
        new | slots.active,
    )


@functools.partial(
    jax.jit,
    static_argnames=("model", "top_k", "stop_ids", "steps"),
    donate_argnames="slots",
    out_shardings=(SLOTS, ROWS, ROWS),
)
def decode(
    params: Any,
    slots: Slots,
    until: Int[Array, ""],
    temperature: Float[Array, ""] | None,
    top_p: Float[Array, ""] | None,
    *,
    model: Transformer,
    top_k: int,
    stop_ids: tuple[int, ...],
    steps: int,
) -> tuple[Slots, Int[Array, "B steps"], Float[Array, "B steps"]]:
    """Samples up to `steps` tokens in every active row, fewer once at most `until` are active.

    A temperature of None is greedy, and a top_p of None is no top-p. Returns the slots, the tokens,
    and their log-probs; a row's own ones are the first, as many as its count grew.
    """
    matrix = head(params, model.config).astype(model.dtype)
    stops, rows = jnp.asarray(stop_ids, jnp.int32), len(slots.active)

    def next_token(hidden, keys, counts):
        scores = constrain(logits(hidden, matrix), EVERYWHERE)
        if temperature is None:
            return greedy_tokens(scores)
        scores = scores / temperature
        keys = jax.vmap(jax.random.fold_in)(keys, counts)
        if top_p is None and not top_k:
            return sample_tokens(keys, scores)
        # Log-probs are over the whole vocabulary: top-p and top-k are not renormalised.
        logp = jax.nn.log_softmax(scores, axis=-1)
        chosen, _ = sample_tokens(keys, mask_top_k_top_p(logp, top_p, top_k))
        return chosen, jnp.take_along_axis(logp, chosen[:, None], axis=-1)[:, 0]

    def unfinished(state):
        step, slots, _, _ = state
        return (step < steps) & (jnp.sum(slots.active) > until)

    def one_token(state):
        step, slots, out_tokens, out_logp = state
        chosen, logp = next_token(slots.hidden, slots.keys, slots.counts)
        chosen = chosen[:, None].astype(jnp.int32)
        out_tokens = jax.lax.dynamic_update_slice(out_tokens, chosen, (0, step))
        out_logp = jax.lax.dynamic_update_slice(out_logp, logp[:, None], (0, step))
        counts = slots.counts + slots.active
        stopped = jnp.any(chosen == stops, axis=1)
        active = slots.active & ~stopped & (counts < slots.limits)
        segments, positions = active[:, None].astype(jnp.int32), slots.positions[:, None]
        hidden, cache = _apply(model, params, chosen, positions, segments, slots.cache)
        cache = cache.replace(slot=cache.slot % cache.segments.shape[1])
        after = slots.replace(
            cache=cache,
            hidden=hidden[:, 0],
            positions=slots.positions + 1,
            counts=counts,
            active=active,
        )
        return step + 1, jax.tree.map(constrain, after, SLOTS), out_tokens, out_logp

    out = jnp.zeros((rows, steps), jnp.int32), jnp.zeros((rows, steps), jnp.float32)
    with jax.named_scope(f"at_most_{steps}"):  # its end is data; planning/hlo.py reads the bound
        _, slots, out_tokens, out_logp = jax.lax.while_loop(unfinished, one_token, (0, slots, *out))
    return slots, out_tokens, out_logp


def _apply(model: Transformer, params: Any, *inputs: Any) -> Any:
    return model.apply({"params": params}, *inputs)
