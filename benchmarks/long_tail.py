"""The embedded sampler's tokens/s on recorded, long-tailed lengths over those on equal lengths.

    python benchmarks/long_tail.py [--rounds=1] [--slots=16] [--groups=32]

Continuous batching (the sampler) beside static batches, which decode until their longest response
ends. Responses have the recorded lengths of benchmarks/packing.py, whichever tokens are sampled, in
the recorded order; or all of them the mean length. The four are timed in turns, since a shared
machine drifts; the median of the rounds counts.
"""

import argparse
import functools
import json
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from recorded import FILE, GROUP_SIZE, WIDTH, compiled_seconds, sample_lengths
from results import keep, show

from oapl_jax.learner.train_step import init_params
from oapl_jax.model.config import ModelConfig
from oapl_jax.model.sharding import make_mesh
from oapl_jax.model.transformer import Transformer, empty_cache, head, logits
from oapl_jax.rollout.local_sampler import LocalSampler
from oapl_jax.rollout.sampler import Sampling
from oapl_jax.rollout.token_sampling import sample_tokens
from oapl_jax.structs import Prompt

SIZES = {
    "model_type": "qwen3",
    "vocab_size": 4096,
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 1024,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "tie_word_embeddings": True,
}
MODEL = Transformer(ModelConfig.from_hf(SIZES, source=__file__), jnp.float32, "none")
SAMPLING = Sampling(temperature=1.0, top_p=1.0, top_k=0, max_response_tokens=640)


@functools.partial(jax.jit, static_argnames="places")
def static_batch(params, tokens, segments, keys, limits, *, places: int):
    """Decodes GROUP_SIZE responses to each left-padded prompt until the longest one ends."""
    (batch, width), rows = tokens.shape, len(keys)
    matrix = head(params, MODEL.config)
    lengths = jnp.sum(segments, axis=1)
    positions = jnp.maximum(jnp.arange(width)[None] - (width - lengths)[:, None], 0)
    apply: Any = functools.partial(MODEL.apply, {"params": params})
    cache = empty_cache(MODEL.config, batch, width + places, MODEL.dtype)
    hidden, cache = apply(tokens, positions, segments, cache)
    cache = cache.replace(
        key=jnp.repeat(cache.key, GROUP_SIZE, axis=1),
        value=jnp.repeat(cache.value, GROUP_SIZE, axis=1),
        segments=jnp.repeat(cache.segments, GROUP_SIZE, axis=0),
    )
    starts, ones = jnp.repeat(lengths, GROUP_SIZE), jnp.ones((rows, 1), jnp.int32)

    def one_token(state):
        t, hidden, cache, out = state
        row_keys = jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys, t)
        chosen, _ = sample_tokens(row_keys, logits(hidden, matrix))
        column = chosen[:, None].astype(jnp.int32)
        out = jax.lax.dynamic_update_slice(out, column, (0, t))
        hidden, cache = apply(column, (starts + t)[:, None], ones, cache)
        return t + 1, hidden[:, 0], cache, out

    hidden = jnp.repeat(hidden[:, -1], GROUP_SIZE, axis=0)
    state = 0, hidden, cache, jnp.zeros((rows, places), jnp.int32)
    return jax.lax.while_loop(lambda state: state[0] < limits.max(), one_token, state)[3]


def static(params: Any, prompts: Sequence[Prompt], lengths: np.ndarray, slots: int) -> None:
    at_once = slots // GROUP_SIZE
    for start in range(0, len(prompts), at_once):
        tokens, segments = np.zeros((2, at_once, WIDTH), np.int32)
        for row, prompt in enumerate(prompts[start : start + at_once]):
            tokens[row, WIDTH - len(prompt.tokens) :] = prompt.tokens
            segments[row, WIDTH - len(prompt.tokens) :] = 1
        limits = lengths[start : start + at_once].reshape(-1)
        keys = jax.random.split(jax.random.key(start), slots)
        places = SAMPLING.max_response_tokens
        jax.device_get(static_batch(params, tokens, segments, keys, limits, places=places))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--slots", type=int, default=16)
    parser.add_argument("--groups", type=int, default=32, help="of 8 recorded responses")
    given = parser.parse_args()
    recorded = json.loads(FILE.read_text())
    lengths = np.array(recorded["response"]).reshape(-1, GROUP_SIZE)[: given.groups]
    rng = np.random.default_rng(0)
    draw = lambda length: rng.integers(2, SIZES["vocab_size"], length).astype(np.int32)
    prompts = [
        Prompt(str(i), i, draw(length), "", "", "")
        for i, length in enumerate(recorded["prompt"][::GROUP_SIZE][: given.groups])
    ]
    params = jax.jit(lambda key: init_params(MODEL, key))(jax.random.key(0))
    sampler = LocalSampler(
        MODEL.config,
        make_mesh(data=1, fsdp=-1, tensor=1),
        dtype="float32",
        stop_ids=(SIZES["vocab_size"],),  # no token
        seed=0,
        max_sequences=given.slots,
        max_prompt_tokens=WIDTH,
        prompt_multiple=WIDTH,
        tokens_per_round=16,
    )
    sampler.set_params(0, params)
    ways = {
        "continuous": functools.partial(sample_lengths, sampler, prompts, sampling=SAMPLING),
        "static": functools.partial(static, params, prompts, slots=given.slots),
    }
    kinds = {"equal": np.full_like(lengths, round(lengths.mean())), "recorded": lengths}
    taken = {(way, kind): [] for way in ways for kind in kinds}
    for run in ways.values():  # compiles: shorter responses would need fewer programs
        run(lengths=lengths)
    for _ in range(given.rounds):
        for way, kind in taken:
            run = functools.partial(ways[way], lengths=kinds[kind])
            taken[way, kind].append(compiled_seconds(run))
    lines = []
    for way in ways:
        rate = {kind: kinds[kind].sum() / np.median(taken[way, kind]) for kind in kinds}
        lines.append(
            {
                "batches": way,
                "tokens/s, equal lengths": round(rate["equal"]),
                "tokens/s, recorded lengths": round(rate["recorded"]),
                "recorded / equal": round(rate["recorded"] / rate["equal"], 3),
            }
        )
    show(lines)
    keep(lines)


if __name__ == "__main__":
    main()
