"""Estimate by count for one GPU, for which no compiler is at hand: memory by kind, and bounds.

Temporaries that a compiler adds are not counted; SPARE is left for them.
"""

from collections.abc import Mapping
from typing import Any

from oapl_jax.model import hf
from oapl_jax.model.config import ModelConfig
from oapl_jax.planning.estimate import sampler_times
from oapl_jax.planning.hardware import GPUS, Gpu
from oapl_jax.planning.programs import GROWING, RunPrograms, per_chip, step_flops

SPARE = 0.1  # of the memory


def count(run: RunPrograms, name: str) -> dict[str, Any]:
    """Memory of a run on one GPU while it learns and while it samples, and bounds of both."""
    gpu, kept = GPUS[name], dict(run.kept)
    room, seconds = (1 - SPARE) * gpu.bytes, learner_seconds(run, gpu)
    memory = {"learning": kept | step_memory(run)}
    sampler: dict[str, Any] = {}
    for decoding in run.sampling()[:1]:
        kinds = memory["sampling"] = decoding.hbm
        slots, growing = run.sampler.slots, sum(kinds.get(kind, 0) for kind in GROWING)
        free = room - sum(kinds.values())
        sampler = {
            "mesh": dict(run.sampler.mesh.shape),
            "slots": slots,
            "places": run.sampler.places,
            "slots_that_fit": max(int(slots * (1 + free / growing)), 0),
            **sampler_times(run, 1, decoding_seconds(run, gpu), seconds),
        }
    return {
        "topology": name,
        "parameters": hf.parameter_count(run.model.config),
        "usable": room,
        "memory": memory,
        "fits": max(sum(kinds.values()) for kinds in memory.values()) <= room,
        "learning_seconds": seconds,
        "sampler": sampler,
        "not_planned": list(run.not_planned),
    }


def step_memory(run: RunPrograms) -> dict[str, int]:
    """Bytes that the train step makes: gradients, activations and one chunk of logits."""
    config, (micro_batches, rows, length) = run.model.config, run.longest.tokens.shape
    gradients = min(micro_batches, 2)  # their sum, and those of one micro-batch
    saved = config.num_layers * saved_numbers(config)[run.model.remat]
    itemsize = run.model.dtype.itemsize
    chunk = rows * min(run.learner.logp_chunk, length) * config.vocab_size
    return {
        "batch": per_chip(run.batch),
        "gradients": gradients * per_chip(run.state.params),
        "activations": itemsize * rows * length * (saved + saved_numbers(config)["none"]),
        "logits": 2 * 4 * chunk,  # and their gradient
    }


def saved_numbers(config: ModelConfig) -> Mapping[str, int]:
    """Numbers that a layer saves of a token for its backward pass, by rematerialization policy."""
    hidden, wide = config.hidden_size, config.intermediate_size
    inner, keys = config.num_heads * config.head_dim, 2 * config.num_kv_heads * config.head_dim
    attention = inner + 2 * config.num_heads
    products = inner + keys + hidden + 2 * wide
    return {
        "offload": 0,
        "full": hidden,
        "attention": hidden + attention,
        "dots": hidden + products,
        "none": 3 * hidden + attention + products + inner + keys + wide,
    }


def learner_seconds(run: RunPrograms, gpu: Gpu) -> float:
    """Least seconds of a gradient step: its products, with the forward pass that remat repeats."""
    frozen, lengths = bool(run.frozen), (run.max_prompt_tokens, run.rollout.max_response_tokens)
    flops = step_flops(run.model.config, run.sequences, *lengths, frozen=frozen)
    passes = 2 if frozen else 3
    return flops * (1 if run.model.remat == "none" else (passes + 1) / passes) / gpu.flops


def decoding_seconds(run: RunPrograms, gpu: Gpu) -> dict[str, dict[str, float]]:
    """Least seconds of the sampler's programs: a round reads version and cache for each token."""
    sampler = run.sampler
    count, cache = hf.parameter_count(run.model.config), per_chip(sampler.state)
    products = lambda tokens: 2 * count * tokens / gpu.flops
    read = (per_chip(sampler.params) + cache) / gpu.bandwidth
    token = max(read, products(sampler.slots))
    prompts = products(sampler.prompts * sampler.width)
    return {
        "decoding": {"seconds": sampler.steps * token},
        "prefill": {"seconds": prompts},
        "placement": {"seconds": 2 * per_chip(sampler.prefilled) / gpu.bandwidth},
    }
