"""Decoder configuration, read from and written to a checkpoint's config.json."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from oapl_jax.errors import UserError

ARCHITECTURES = {name.lower(): f"{name}ForCausalLM" for name in ("Qwen3", "Qwen2", "Llama")}
FULL = {"full_attention"}  # layer types that the decoder has
ROPE_TYPES = ("default", "llama3", "yarn")
# Field -> key of config.json, where both have the same value.
KEYS = {
    "model_type": "model_type",
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "max_positions": "max_position_embeddings",
    "rms_norm_eps": "rms_norm_eps",
}


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Sizes and features of the decoder.

    `rope` has the keys of config.json (with rope_type and rope_theta) in sorted, hashable pairs.
    """

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_positions: int
    rms_norm_eps: float
    rope: tuple[tuple[str, Any], ...]
    tie_embeddings: bool
    qk_norm: bool
    qkv_bias: bool
    output_bias: bool
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    pad_token_id: int | None

    @classmethod
    def from_hf(cls, config: Mapping[str, Any], *, source: str) -> "ModelConfig":
        """Reads a config.json; a UserError names `source` and each feature the decoder lacks."""
        rope = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
        rope["rope_type"] = rope.pop("type", None) or rope.get("rope_type") or "default"
        _check_supported(config, rope, source)
        fields = {field: config[key] for field, key in KEYS.items()}
        model_type, heads = fields["model_type"], fields["num_heads"]
        bias = config.get("attention_bias", False)
        eos = config.get("eos_token_id")
        eos_ids = eos if isinstance(eos, list | tuple) else () if eos is None else (eos,)
        rope.setdefault("rope_theta", config.get("rope_theta", 10000.0))
        if rope["rope_type"] != "default":
            rope.setdefault("original_max_position_embeddings", fields["max_positions"])
        default_dim = 128 if model_type == "qwen3" else fields["hidden_size"] // heads
        return cls(
            **fields,
            num_kv_heads=config.get("num_key_value_heads") or heads,
            head_dim=config.get("head_dim") or default_dim,
            rope=tuple(sorted(rope.items())),
            tie_embeddings=config.get("tie_word_embeddings", False),
            qk_norm=model_type == "qwen3",
            qkv_bias=model_type == "qwen2" or bias,
            output_bias=model_type != "qwen2" and bias,
            bos_token_id=config.get("bos_token_id"),
            eos_token_ids=tuple(eos_ids),
            pad_token_id=config.get("pad_token_id"),
        )

    def to_hf(self, *, dtype: str) -> dict[str, Any]:
        """Content of the config.json of an exported checkpoint with tensors of `dtype`."""
        rope, eos = dict(self.rope), list(self.eos_token_ids)
        config = {
            "architectures": [ARCHITECTURES[self.model_type]],
            **{key: getattr(self, field) for field, key in KEYS.items()},
            "num_key_value_heads": self.num_kv_heads,
            "head_dim": self.head_dim,
            "hidden_act": "silu",
            "rope_theta": rope["rope_theta"],
            "rope_parameters": rope,
            "tie_word_embeddings": self.tie_embeddings,
            "bos_token_id": self.bos_token_id,
            "eos_token_id": eos if len(eos) > 1 else eos[0] if eos else None,
            "pad_token_id": self.pad_token_id,
            "dtype": dtype,
            "torch_dtype": dtype,
        }
        if rope["rope_type"] != "default":  # the spelling of readers older than `rope_parameters`
            config["rope_scaling"] = {k: v for k, v in rope.items() if k != "rope_theta"}
        if self.model_type != "qwen2":
            config["attention_bias"] = self.output_bias
        return config


def _check_supported(config: Mapping[str, Any], rope: Mapping[str, Any], source: str) -> None:
    partial = rope.get("partial_rotary_factor") or config.get("partial_rotary_factor") or 1
    experts = config.get("num_experts") or config.get("num_local_experts")
    sliding = config.get("use_sliding_window") or {*(config.get("layer_types") or ())} - FULL
    checks = {
        f"model_type={config.get('model_type')!r}": config.get("model_type") not in ARCHITECTURES,
        "mixture of experts (num_experts)": bool(experts),
        "sliding-window attention (use_sliding_window, layer_types)": bool(sliding),
        f"rope_type={rope['rope_type']!r}": rope["rope_type"] not in ROPE_TYPES,
        "partial_rotary_factor": partial != 1,
        f"hidden_act={config.get('hidden_act')!r}": config.get("hidden_act", "silu") != "silu",
        "mlp_bias": bool(config.get("mlp_bias")),
        "quantization_config": bool(config.get("quantization_config")),
    }
    lacking = [name for name, found in checks.items() if found]
    if lacking:
        raise UserError(
            f"{source} needs {', '.join(lacking)}, which the decoder lacks; it supports "
            f"{', '.join(ARCHITECTURES)} with full attention and rope types {', '.join(ROPE_TYPES)}"
        )
