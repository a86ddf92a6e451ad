"""A whole learner step against the length of sequences, and the head against the vocabulary.

    python benchmarks/lengths.py [lengths vocabularies] [--tokens=32768] [--rounds=1]

Both at a fixed number of tokens: seconds (the fastest round), and the megabytes of temporaries
that XLA plans. `lengths`: a step of a model of 4 layers, rematerialised, from sequences of 1,024
tokens to one of 32,768. `vocabularies`: log-probs of an eighth as many tokens and their gradient,
by chunks of 64 places a row, beside log_softmax of all logits at once, which is run where it needs
less than 8 GB.
"""

import argparse
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from results import keep, show

from oapl_jax.config import LearnerConfig
from oapl_jax.learner import packing, train_step
from oapl_jax.learner.optimizer import make_optimizer
from oapl_jax.model.config import ModelConfig
from oapl_jax.model.logprobs import token_logp
from oapl_jax.model.sharding import make_mesh
from oapl_jax.model.transformer import Transformer, logits
from oapl_jax.objectives import bind
from oapl_jax.structs import Group, Prompt, Rollout

LENGTHS = (1024, 2048, 4096, 8192, 16384, 32768)
VOCABULARIES = (32_000, 64_000, 128_000, 256_000)
PROMPT = 128  # tokens
ROWS, CHUNK, HIDDEN = 8, 64, 256
LIMIT = 8 << 30  # bytes of temporaries that are still run
SIZES = {
    "model_type": "qwen3",
    "vocab_size": 4096,  # so that the layers show
    "hidden_size": HIDDEN,
    "intermediate_size": 768,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 65536,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "tie_word_embeddings": True,
}


def fastest(run, rounds: int) -> float:
    taken = []
    for _ in range(rounds):
        start = time.perf_counter()
        jax.block_until_ready(run())
        taken.append(time.perf_counter() - start)
    return min(taken)


def temporaries(program: Any) -> int:
    return program.memory_analysis().temp_size_in_bytes


def at_length(length: int, tokens: int, rounds: int) -> dict[str, float]:
    config = ModelConfig.from_hf(SIZES, source="benchmarks/lengths.py")
    model = Transformer(config, jnp.float32, "full")
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
    objective = bind("oapl", {"beta1": 1.0, "beta2": 0.1})
    rng, rows, response = np.random.default_rng(0), tokens // length, length - PROMPT
    draw = lambda n: rng.integers(2, config.vocab_size, n).astype(np.int32)
    groups = [
        Group(
            Prompt(str(i), i, draw(PROMPT), "", "", ""),
            (Rollout(draw(response), np.full(response, -8.0, np.float32), 0, "length"),),
            np.ones(1, np.float32),
        )
        for i in range(rows)
    ]
    chunk = max(2048 // rows, 64)
    layout = LearnerConfig(micro_batches=1, row_length=length, rows_multiple=1, logp_chunk=chunk)
    batch = packing.build_batch(
        groups,
        objective._replace(advantage=np.ones_like),  # of a group of one OAPL's is 0
        layout,
        aggregation="sequence",
        step=0,
        max_prompt_tokens=PROMPT,
        max_response_tokens=response,
    )
    batch = packing.to_mesh(batch, train_step.batch_shardings(mesh))
    state = train_step.init_state(model, optimizer, mesh, 0)
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
    program: Any = step.lower(state, batch).compile()  # pyright: ignore[reportFunctionMemberAccess]

    def run():
        nonlocal state
        state, metrics = program(state, batch)
        return metrics

    taken = fastest(run, rounds)
    return {
        "length": length,
        "sequences": rows,
        "s": round(taken, 1),
        "tokens/s": round(tokens / taken),
        "MB": round(temporaries(program) / 2**20),
    }


def whole(hidden, matrix, targets):
    table = jax.nn.log_softmax(logits(hidden, matrix), axis=-1)
    return jnp.take_along_axis(table, targets[..., None], axis=-1)[..., 0]


def chunked(hidden, matrix, targets):
    wanted = jnp.ones(targets.shape, bool)
    return token_logp(hidden, matrix, targets, wanted, temperature=1.0, chunk=CHUNK)[0]


def at_vocabulary(size: int, tokens: int, rounds: int) -> dict[str, float | str]:
    rng, length = np.random.default_rng(0), tokens // ROWS
    hidden = jnp.asarray(rng.normal(0, 1, (ROWS, length, HIDDEN)), jnp.float32)
    matrix = jnp.asarray(rng.normal(0, HIDDEN**-0.5, (HIDDEN, size)), jnp.float32)
    targets = jnp.asarray(rng.integers(0, size, (ROWS, length)), jnp.int32)
    line: dict[str, float | str] = {"vocabulary": size}
    for name, logp in (("chunked", chunked), ("whole", whole)):
        total = lambda hidden, matrix, logp=logp: jnp.sum(jnp.square(logp(hidden, matrix, targets)))
        program: Any = jax.jit(jax.value_and_grad(total, (0, 1))).lower(hidden, matrix).compile()
        small = temporaries(program) < LIMIT
        run = lambda program=program: program(hidden, matrix)
        line[f"{name} s"] = round(fastest(run, rounds), 1) if small else "-"
        line[f"{name} MB"] = round(temporaries(program) / 2**20)
    return line


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="*", default=["lengths", "vocabularies"])
    parser.add_argument("--tokens", type=int, default=32768)
    parser.add_argument("--rounds", type=int, default=1)
    given = parser.parse_args()
    found = {}
    if "lengths" in given.parts:
        lengths = [n for n in LENGTHS if n <= given.tokens]
        found["lengths"] = [at_length(n, given.tokens, given.rounds) for n in lengths]
    if "vocabularies" in given.parts:
        tokens = given.tokens // 8
        found["vocabularies"] = [at_vocabulary(n, tokens, given.rounds) for n in VOCABULARIES]
    for lines in found.values():
        show(lines)
    keep(found)


if __name__ == "__main__":
    main()
