"""Published models by name: what is needed to plan for one without having its checkpoint.

Each entry is what the model's config.json on the Hugging Face hub says of sizes, at the address
https://huggingface.co/<repository>/blob/main/config.json.
"""

from typing import Any

from oapl_jax.errors import UserError
from oapl_jax.model.config import ModelConfig

QWEN3 = dict(
    model_type="qwen3",
    num_key_value_heads=8,
    head_dim=128,
    vocab_size=151936,
    max_position_embeddings=40960,
    rms_norm_eps=1e-6,
    rope_theta=1e6,
    eos_token_id=151645,
)
QWEN3_4B = dict(
    **QWEN3,
    hidden_size=2560,
    intermediate_size=9728,
    num_hidden_layers=36,
    num_attention_heads=32,
    tie_word_embeddings=True,
)
LLAMA3_8B = dict(
    model_type="llama",
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    vocab_size=128256,
    max_position_embeddings=8192,
    rms_norm_eps=1e-5,
    rope_theta=5e5,
    tie_word_embeddings=False,
    eos_token_id=128001,
)
LLAMA31_ROPE = dict(
    rope_type="llama3",
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=8192,
)

PUBLISHED: dict[str, dict[str, Any]] = {
    # Qwen/Qwen3-0.6B, -1.7B, -4B, -8B, -14B, -32B.
    "qwen3-0.6b": dict(
        **QWEN3,
        hidden_size=1024,
        intermediate_size=3072,
        num_hidden_layers=28,
        num_attention_heads=16,
        tie_word_embeddings=True,
    ),
    "qwen3-1.7b": dict(
        **QWEN3,
        hidden_size=2048,
        intermediate_size=6144,
        num_hidden_layers=28,
        num_attention_heads=16,
        tie_word_embeddings=True,
    ),
    "qwen3-4b": QWEN3_4B,
    # Qwen/Qwen3-4B-Thinking-2507.
    "qwen3-4b-thinking-2507": QWEN3_4B | dict(max_position_embeddings=262144, rope_theta=5e6),
    "qwen3-8b": dict(
        **QWEN3,
        hidden_size=4096,
        intermediate_size=12288,
        num_hidden_layers=36,
        num_attention_heads=32,
        tie_word_embeddings=False,
    ),
    "qwen3-14b": dict(
        **QWEN3,
        hidden_size=5120,
        intermediate_size=17408,
        num_hidden_layers=40,
        num_attention_heads=40,
        tie_word_embeddings=False,
    ),
    "qwen3-32b": dict(
        **QWEN3,
        hidden_size=5120,
        intermediate_size=25600,
        num_hidden_layers=64,
        num_attention_heads=64,
        tie_word_embeddings=False,
    ),
    # deepseek-ai/DeepSeek-R1-Distill-Qwen-14B.
    "r1-distill-qwen-14b": dict(
        model_type="qwen2",
        hidden_size=5120,
        intermediate_size=13824,
        num_hidden_layers=48,
        num_attention_heads=40,
        num_key_value_heads=8,
        vocab_size=152064,
        max_position_embeddings=131072,
        rms_norm_eps=1e-5,
        rope_theta=1e6,
        tie_word_embeddings=False,
        eos_token_id=151643,
    ),
    # meta-llama/Meta-Llama-3-8B, meta-llama/Llama-3.1-8B: the latter has the longer context.
    "llama-3-8b": LLAMA3_8B,
    "llama-3.1-8b": LLAMA3_8B | dict(max_position_embeddings=131072, rope_scaling=LLAMA31_ROPE),
}


def published(name: str) -> ModelConfig:
    """The sizes of a published model.

    Raises:
      UserError: for a name that is not in the table.
    """
    if name not in PUBLISHED:
        raise UserError(f"model {name!r} is not known; choose one of {', '.join(PUBLISHED)}")
    return ModelConfig.from_hf(PUBLISHED[name], source=f"the published {name}")
