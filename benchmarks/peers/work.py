"""The work of all contestants, and their reports.

Imports numpy alone, since each contestant runs in its own environment.
"""

import argparse
import json
import pathlib
import re
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

ARCHITECTURE = {
    "model_type": "qwen3",
    "architectures": ["Qwen3ForCausalLM"],
    "vocab_size": 32000,
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,  # Tunix's model has no other
    "tie_word_embeddings": True,
    "bos_token_id": None,
    "pad_token_id": 0,
    "eos_token_id": 1,
}
PAD, STOP = 0, 1  # neither is in a prompt or response of the batch
GROUPS, GROUP_SIZE = 8, 8
SEQUENCES = GROUPS * GROUP_SIZE
PROMPT, RESPONSE = 64, 192  # tokens
TOKENS, RESPONSE_TOKENS = SEQUENCES * (PROMPT + RESPONSE), SEQUENCES * RESPONSE
MICRO_BATCH = 8  # sequences, the faster choice of each peer
ADAM = dict(learning_rate=1e-4, b1=0.9, b2=0.999, eps=1e-8, max_grad_norm=1.0)  # no decay
CLIP = 0.2


class Rollouts(NamedTuple):
    prompts: np.ndarray  # int32[SEQUENCES, PROMPT], each GROUP_SIZE times
    responses: np.ndarray  # int32[SEQUENCES, RESPONSE]
    rewards: np.ndarray  # float32[SEQUENCES]
    advantages: np.ndarray  # float32[SEQUENCES], the reward less its group's mean


def make_rollouts() -> Rollouts:
    rng = np.random.default_rng(0)
    draw = lambda *shape: rng.integers(2, ARCHITECTURE["vocab_size"], shape).astype(np.int32)
    prompts, responses = np.repeat(draw(GROUPS, PROMPT), GROUP_SIZE, 0), draw(SEQUENCES, RESPONSE)
    rewards = rng.random((GROUPS, GROUP_SIZE)).astype(np.float32)
    advantages = rewards - rewards.mean(1, keepdims=True)
    return Rollouts(prompts, responses, rewards.reshape(-1), advantages.reshape(-1))


def gflop(*, learner: bool, head_on_prompts: bool = False) -> float:
    """2 FLOP for each multiplication by a weight or in attention; a learner step is three forward
    passes. With `head_on_prompts`, the nominal count, attention is a whole square, else causal."""
    sizes = ARCHITECTURE
    heads = sizes["num_attention_heads"] * sizes["head_dim"]
    keys = 2 * sizes["num_key_value_heads"] * sizes["head_dim"]
    layer = sizes["hidden_size"] * (2 * heads + keys + 3 * sizes["intermediate_size"])
    head = sizes["hidden_size"] * sizes["vocab_size"]
    length = PROMPT + RESPONSE
    context = length if head_on_prompts else length / 2
    places, predicted = TOKENS, TOKENS if head_on_prompts else RESPONSE_TOKENS
    if not learner:  # a prompt is read once for its group
        places = GROUPS * PROMPT + RESPONSE_TOKENS
    forward = sizes["num_hidden_layers"] * (layer + 2 * heads * context) * places + head * predicted
    return (3 if learner else 1) * 2 * forward / 1e9


def arguments() -> Any:
    parser = argparse.ArgumentParser()
    parser.add_argument("part")
    parser.add_argument("--model", help="a directory in Hugging Face format")
    parser.add_argument("--steps", type=int, default=1, help="timed steps, after one of warm-up")
    parser.add_argument("--rollouts", help="a sampler's tokens and log-probs, .npz")
    return parser.parse_args()


def seconds(run: Callable[[], object], times: int) -> list[float]:
    taken = []
    for _ in range(times):
        start = time.perf_counter()
        run()
        taken.append(time.perf_counter() - start)
    return taken


def peak_mb(pid: int | str = "self") -> float:
    """Peak memory of a process (VmHWM)."""
    status = pathlib.Path(f"/proc/{pid}/status").read_text()
    found = re.search(r"VmHWM:\s+(\d+) kB", status)
    return int(found[1]) / 1024 if found else 0.0


def report(**found: Any) -> None:
    """Prints the last line of a contestant's output, with its peak memory unless given."""
    plain = lambda x: x.tolist() if isinstance(x, np.ndarray) else float(x)
    print(json.dumps({"peak_mb": peak_mb(), **found}, default=plain), flush=True)


def run_learner(step: Callable[[], object], steps: int, logp: Any) -> None:
    """Times steps; with a function of the responses' log-probs, reports these around one step."""
    before = logp() if logp else None
    step()
    if logp:
        report(logp_before=before, logp_after=logp())
    else:
        report(seconds=seconds(step, steps))


def save_rollouts(path: str, tokens: Any, logp: Any) -> None:
    tokens, logp = np.asarray(tokens, np.int32), np.asarray(logp, np.float32)
    if tokens.shape != (SEQUENCES, RESPONSE) or logp.shape != tokens.shape:
        sys.exit(
            f"tokens {tokens.shape} and log-probs {logp.shape} do not have the requested shape"
        )
    np.savez(path, tokens=tokens, logp=logp)
