"""Attention and its gradient by row length, at a fixed number of tokens.

    python benchmarks/attention.py [--tokens=32768] [--rounds=3]

Compares the CPU's blockwise kernel with plain attention, which holds all weights: seconds, and
megabytes of temporaries that XLA plans. Both are timed in turns; the fastest round counts. Above
4 GB plain attention is compiled but not run. `packed` rows hold sequences of 512 tokens, `whole`
rows a single sequence. Four query heads share two key heads of 64.
"""

import argparse
import time
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from results import keep, show

from oapl_jax.model.attention import masked_attention
from oapl_jax.model.blockwise_attention import blockwise_attention, visible

LENGTHS = (64, 256, 1024, 2048, 4096, 8192, 16384, 32768)
HEADS, KV_HEADS, DIM = 4, 2, 64
SEQUENCE = 512
LIMIT = 4 << 30  # bytes of temporaries above which a program is not run


def blockwise(query, key, value, segments):
    return blockwise_attention(query, key, value, segments, segments, jnp.arange(query.shape[1]))


def plain(query, key, value, segments):
    slots = jnp.arange(query.shape[1])
    return masked_attention(query, key, value, visible(segments, segments, slots, slots))


def gradients(attention, query, key, value, segments):
    total = lambda *given: jnp.sum(jnp.square(attention(*given, segments)))
    return jax.grad(total, argnums=(0, 1, 2))(query, key, value)


def measure(length: int, packed: bool, tokens: int, rounds: int) -> dict[str, float | str]:
    rng, rows = np.random.default_rng(0), tokens // length
    draw = lambda heads: jnp.asarray(rng.normal(0, 1, (rows, length, heads, DIM)), jnp.float32)
    sequence = SEQUENCE if packed else length
    segments = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32) // sequence, (rows, length))
    given = draw(HEADS), draw(KV_HEADS), draw(KV_HEADS), segments
    programs = {
        name: jax.jit(partial(gradients, attention)).lower(*given).compile()
        for name, attention in (("blockwise", blockwise), ("plain", plain))
    }
    analyses: dict[str, Any] = {name: p.memory_analysis() for name, p in programs.items()}
    temporaries = {name: found.temp_size_in_bytes for name, found in analyses.items()}
    run = [name for name in programs if temporaries[name] < LIMIT]
    seconds: dict[str, list[float]] = {name: [] for name in run}
    for _ in range(rounds + 1):  # the first one warms up
        for name in run:
            started = time.perf_counter()
            jax.block_until_ready(programs[name](*given))
            seconds[name].append(time.perf_counter() - started)
    best = {name: min(times[1:]) for name, times in seconds.items()}
    line: dict[str, float | str] = {"length": length, "rows": "packed" if packed else "whole"}
    for name in programs:
        line[f"{name} s"] = round(best[name], 3) if name in best else "-"
    line["s ratio"] = round(best["plain"] / best["blockwise"], 1) if "plain" in best else "-"
    for name, size in temporaries.items():
        line[f"{name} MB"] = round(size / 2**20)
    line["MB ratio"] = round(temporaries["plain"] / temporaries["blockwise"], 1)
    return line


def main() -> None:
    parser = argparse.ArgumentParser(description="Attention against the length of rows.")
    parser.add_argument("--tokens", type=int, default=32768)
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    lines = [
        measure(length, packed, given.tokens, given.rounds)
        for length in LENGTHS
        for packed in (False, True)
        if length <= given.tokens and not (packed and length <= SEQUENCE)
    ]
    show(lines)
    keep(lines)


if __name__ == "__main__":
    main()
