"""Tokens a second of learner and sampler, as fractions of this machine's matrix-product peak.

    python benchmarks/throughput.py [--rounds=3]

Peak and programs are timed in turns in one run, since a shared machine drifts; the median counts.
Work is counted by formula: 2 FLOP for each multiplication of a weight or of attention, three times
that for a learner step (the recomputation of logits in the backward pass is not counted as work).
"""

import argparse
import time

import jax
import jax.numpy as jnp
import numpy as np
from results import keep, show

from oapl_jax.config import LearnerConfig
from oapl_jax.learner import packing, train_step
from oapl_jax.learner.optimizer import make_optimizer
from oapl_jax.model.config import ModelConfig
from oapl_jax.model.sharding import make_mesh
from oapl_jax.model.transformer import Transformer
from oapl_jax.objectives import bind
from oapl_jax.rollout.local_sampler import LocalSampler
from oapl_jax.rollout.sampler import Sampling
from oapl_jax.structs import Group, Prompt, Rollout

COMMON = {
    "model_type": "qwen3",
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
}
# Name -> sizes, prompt and response tokens, row length, chunk of the log-probs.
CASES = {
    "default (0.1M)": (
        dict(hidden_size=64, intermediate_size=192, num_hidden_layers=2, num_attention_heads=4)
        | dict(num_key_value_heads=2, head_dim=16, vocab_size=16),
        (8, 9, 64, 64),
    ),
    "small (11M)": (
        dict(hidden_size=256, intermediate_size=768, num_hidden_layers=4, num_attention_heads=4)
        | dict(num_key_value_heads=2, head_dim=64, vocab_size=32000),
        (64, 192, 256, 32),
    ),
}
GROUPS, GROUP_SIZE = 8, 8
PRODUCT = jax.jit(lambda x: x @ x)


def forward_flops(config: ModelConfig, tokens: int, context: float, head_tokens: int) -> float:
    """FLOP of a forward pass over `tokens` with a mean context, logits for `head_tokens`."""
    heads = config.num_heads * config.head_dim
    keys = 2 * config.num_kv_heads * config.head_dim
    layer = config.hidden_size * (2 * heads + keys + 3 * config.intermediate_size)
    attention = 2 * heads * context
    head = config.hidden_size * config.vocab_size
    return 2 * (config.num_layers * (layer + attention) * tokens + head * head_tokens)


def matrix_peak() -> float:
    """FLOP/s of one float32 product of 2048 x 2048 matrices."""
    a = jnp.ones((2048, 2048))
    PRODUCT(a).block_until_ready()
    return 2 * 2048**3 / seconds(lambda: PRODUCT(a))


def seconds(run) -> float:
    start = time.perf_counter()
    jax.block_until_ready(run())
    return time.perf_counter() - start


def measure(name: str, rounds: int) -> dict[str, float | str]:
    sizes, (prompt_length, length, row_length, chunk) = CASES[name]
    config = ModelConfig.from_hf({**COMMON, **sizes}, source=name)
    model = Transformer(config, jnp.float32, "none")
    mesh = make_mesh(data=1, fsdp=-1, context=1, tensor=1)
    optimizer = make_optimizer(
        learning_rate=1e-4,
        warmup_steps=0,
        final_fraction=1.0,
        num_steps=10,
        b1=0.9,
        b2=0.95,
        eps=1e-8,
        weight_decay=0.0,
        max_grad_norm=1.0,
        mu_dtype="float32",
    )
    state = train_step.init_state(model, optimizer, mesh, 0)
    rng = np.random.default_rng(0)
    draw = lambda n: rng.integers(2, config.vocab_size, n).astype(np.int32)
    prompts = [Prompt(str(i), i, draw(prompt_length), "", "", "") for i in range(GROUPS)]
    rollout = lambda: Rollout(draw(length), np.full(length, -1.0, np.float32), 0, "stop")
    groups = [
        Group(p, tuple(rollout() for _ in range(GROUP_SIZE)), np.arange(GROUP_SIZE) % 2.0)
        for p in prompts
    ]
    objective = bind("oapl", {"beta1": 1.0, "beta2": 0.1})
    layout = LearnerConfig(
        micro_batches=1, row_length=row_length, rows_multiple=8, logp_chunk=chunk
    )
    batch = packing.build_batch(
        groups,
        objective,
        layout,
        aggregation="sequence",
        step=0,
        max_prompt_tokens=prompt_length,
        max_response_tokens=length,
    )
    batch = packing.to_mesh(batch, train_step.batch_shardings(mesh))
    step = train_step.make_train_step(
        model,
        objective,
        optimizer,
        mesh,
        temperature=1.0,
        logp_chunk=chunk,
        kl_weight=0.0,
        ess_power=0.0,
        to_reference=False,
    )
    sampler = LocalSampler(
        config,
        mesh,
        dtype="float32",
        stop_ids=(config.vocab_size,),  # no token: every response has its full length
        seed=0,
        max_sequences=GROUPS * GROUP_SIZE,
        max_prompt_tokens=prompt_length,
        prompt_multiple=8,
        tokens_per_round=16,
    )
    sampler.set_params(0, jax.tree.map(jnp.copy, state.params))
    sampling = Sampling(temperature=1.0, top_p=1.0, top_k=0, max_response_tokens=length)

    def learn():
        nonlocal state
        state, metrics = step(state, batch)
        return metrics

    sequences = GROUPS * GROUP_SIZE
    tokens, responses = sequences * (prompt_length + length), sequences * length
    context = (prompt_length + length) / 2
    learned = 3 * forward_flops(config, tokens, context, responses)
    prefill = forward_flops(config, GROUPS * prompt_length, prompt_length / 2, GROUPS)
    sampled = prefill + forward_flops(config, responses, prompt_length + length / 2, responses)
    sample = lambda: list(sampler.generate(prompts, n=GROUP_SIZE, sampling=sampling))
    for run in (learn, sample):
        seconds(run)  # compiles
    rows = []
    for _ in range(rounds):
        peak, learning, sampling_time = matrix_peak(), seconds(learn), seconds(sample)
        rows.append(
            (
                tokens / learning,
                learned / learning / peak,
                responses / sampling_time,
                sampled / sampling_time / peak,
                peak / 1e9,
            )
        )
    learner_rate, learner_share, sampler_rate, sampler_share, peak = np.median(rows, axis=0)
    return {
        "model": name,
        "learner tokens/s": round(learner_rate),
        "learner share of peak": round(learner_share, 3),
        "sampler tokens/s": round(sampler_rate),
        "sampler share of peak": round(sampler_share, 3),
        "peak GFLOP/s": round(peak, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    lines = [measure(name, parser.parse_args().rounds) for name in CASES]
    show(lines)
    keep(lines)


if __name__ == "__main__":
    main()
