"""Published models by name: sizes to plan with, without having the checkpoint.

Each entry is config.json of https://huggingface.co/REPOSITORY/blob/main/config.json, without what
has no bearing on sizes.
"""

import os
from typing import Any

from oapl_jax.errors import UserError
from oapl_jax.model.config import ModelConfig


def _decoder(
    kind: str,
    hidden: int,
    feed_forward: int,
    layers: int,
    heads: int,
    tied: bool,
    **rest: Any,
) -> dict[str, Any]:
    return dict(
        model_type=kind,
        hidden_size=hidden,
        intermediate_size=feed_forward,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=8,
        tie_word_embeddings=tied,
        **rest,
    )


QWEN3 = dict(
    head_dim=128,
    vocab_size=151936,
    max_position_embeddings=40960,
    rms_norm_eps=1e-6,
    rope_theta=1e6,
    eos_token_id=151645,
)
LLAMA3 = dict(
    vocab_size=128256,
    max_position_embeddings=8192,
    rms_norm_eps=1e-5,
    rope_theta=5e5,
    eos_token_id=128001,
)
LLAMA31_ROPE = dict(
    rope_type="llama3",
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=8192,
)
R1_QWEN = dict(
    vocab_size=152064,
    max_position_embeddings=131072,
    rms_norm_eps=1e-5,
    rope_theta=1e6,
    eos_token_id=151643,
)
PUBLISHED: dict[str, dict[str, Any]] = {
    # Qwen/Qwen3-0.6B, -1.7B, -4B, -8B, -14B, -32B, and Qwen/Qwen3-4B-Thinking-2507.
    "qwen3-0.6b": _decoder("qwen3", 1024, 3072, 28, 16, True, **QWEN3),
    "qwen3-1.7b": _decoder("qwen3", 2048, 6144, 28, 16, True, **QWEN3),
    "qwen3-4b": _decoder("qwen3", 2560, 9728, 36, 32, True, **QWEN3),
    "qwen3-4b-thinking-2507": _decoder("qwen3", 2560, 9728, 36, 32, True, **QWEN3)
    | dict(max_position_embeddings=262144, rope_theta=5e6),
    "qwen3-8b": _decoder("qwen3", 4096, 12288, 36, 32, False, **QWEN3),
    "qwen3-14b": _decoder("qwen3", 5120, 17408, 40, 40, False, **QWEN3),
    "qwen3-32b": _decoder("qwen3", 5120, 25600, 64, 64, False, **QWEN3),
    # deepseek-ai/DeepSeek-R1-Distill-Qwen-14B.
    "r1-distill-qwen-14b": _decoder("qwen2", 5120, 13824, 48, 40, False, **R1_QWEN),
    # meta-llama/Meta-Llama-3-8B, meta-llama/Llama-3.1-8B: the latter has the longer context.
    "llama-3-8b": _decoder("llama", 4096, 14336, 32, 32, False, **LLAMA3),
    "llama-3.1-8b": _decoder("llama", 4096, 14336, 32, 32, False, **LLAMA3)
    | dict(max_position_embeddings=131072, rope_scaling=LLAMA31_ROPE),
}
# Last parts of repositories that have a shorter name here.
REPOSITORIES = {
    "deepseek-r1-distill-qwen-14b": "r1-distill-qwen-14b",
    "meta-llama-3-8b": "llama-3-8b",
    "meta-llama-3.1-8b": "llama-3.1-8b",
}


def published(name: str) -> ModelConfig:
    """Sizes of a published model.

    Raises:
      UserError: for a name that is not in the table.
    """
    if name not in PUBLISHED:
        raise UserError(f"model {name!r} is not known; choose one of {', '.join(PUBLISHED)}")
    return ModelConfig.from_hf(PUBLISHED[name], source=f"the published {name}")


def published_name(path: str) -> str:
    """The published model that a checkpoint's directory is named after.

    Raises:
      UserError: if there is none.
    """
    last = os.path.basename(path.rstrip("/")).lower()
    name = REPOSITORIES.get(last, last)
    if name not in PUBLISHED:
        raise UserError(
            f"model.path={path} is not on this machine; give its sizes with --model="
            f"{'|'.join(PUBLISHED)}"
        )
    return name
