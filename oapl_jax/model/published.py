"""Published models by name: sizes to plan with, without having the checkpoint.

Each entry is a part of https://huggingface.co/REPOSITORY/blob/main/config.json.
"""

import os
from typing import Any

from oapl_jax.errors import UserError
from oapl_jax.model.config import ModelConfig

FAMILY = (
    *("model_type", "vocab_size", "max_position_embeddings"),
    *("rms_norm_eps", "rope_theta", "eos_token_id"),
)
SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")


def _family(*values: Any) -> dict[str, Any]:
    return dict(zip(FAMILY, values, strict=True), num_key_value_heads=8)


def _sizes(*values: int, tied: bool = False) -> dict[str, Any]:
    return dict(zip(SIZES, values, strict=True), tie_word_embeddings=tied)


QWEN3 = _family("qwen3", 151936, 40960, 1e-6, 1e6, 151645) | dict(head_dim=128)
QWEN3_4B = QWEN3 | _sizes(2560, 9728, 36, 32, tied=True)
R1_QWEN = _family("qwen2", 152064, 131072, 1e-5, 1e6, 151643)
LLAMA3_8B = _family("llama", 128256, 8192, 1e-5, 5e5, 128001) | _sizes(4096, 14336, 32, 32)
LLAMA31_ROPE = dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0)
LLAMA31_ROPE |= dict(original_max_position_embeddings=8192)
PUBLISHED: dict[str, dict[str, Any]] = {
    # Qwen/Qwen3-0.6B, -1.7B, -4B, -8B, -14B, -32B, and Qwen/Qwen3-4B-Thinking-2507.
    "qwen3-0.6b": QWEN3 | _sizes(1024, 3072, 28, 16, tied=True),
    "qwen3-1.7b": QWEN3 | _sizes(2048, 6144, 28, 16, tied=True),
    "qwen3-4b": QWEN3_4B,
    "qwen3-4b-thinking-2507": QWEN3_4B | dict(max_position_embeddings=262144, rope_theta=5e6),
    "qwen3-8b": QWEN3 | _sizes(4096, 12288, 36, 32),
    "qwen3-14b": QWEN3 | _sizes(5120, 17408, 40, 40),
    "qwen3-32b": QWEN3 | _sizes(5120, 25600, 64, 64),
    # deepseek-ai/DeepSeek-R1-Distill-Qwen-14B.
    "r1-distill-qwen-14b": R1_QWEN | _sizes(5120, 13824, 48, 40),
    # meta-llama/Meta-Llama-3-8B, meta-llama/Llama-3.1-8B: the latter has the longer context.
    "llama-3-8b": LLAMA3_8B,
    "llama-3.1-8b": LLAMA3_8B | dict(max_position_embeddings=131072, rope_scaling=LLAMA31_ROPE),
}
# Last parts of repositories that have a shorter name here.
REPOSITORIES = {
    "deepseek-r1-distill-qwen-14b": "r1-distill-qwen-14b",
    "meta-llama-3-8b": "llama-3-8b",
    "meta-llama-3.1-8b": "llama-3.1-8b",
}


def published(name: str) -> ModelConfig:
    """Sizes of a published model; raises a UserError for an unknown name."""
    if name not in PUBLISHED:
        raise UserError(f"model {name!r} is not known; choose one of {', '.join(PUBLISHED)}")
    return ModelConfig.from_hf(PUBLISHED[name], source=f"the published {name}")


def published_name(path: str) -> str:
    """The published model that a directory is named after; raises a UserError if there is none."""
    last = os.path.basename(path.rstrip("/")).lower()
    name = REPOSITORIES.get(last, last)
    if name not in PUBLISHED:
        names = "|".join(PUBLISHED)
        raise UserError(
            f"model.path={path} is not on this machine; give its sizes with --model={names}"
        )
    return name
