"""Decoder configuration, read from and written to a checkpoint's config.json.

Keys mean what they mean to transformers. An unknown key is refused by name, since a model that
needs it has other logits than this decoder.
"""

import dataclasses
import logging
import sys
from collections.abc import Iterable, Mapping
from typing import Any

from oapl_jax.errors import UserError

log = logging.getLogger(__name__)

ARCHITECTURES = {name.lower(): f"{name}ForCausalLM" for name in ("Qwen3", "Qwen2", "Llama")}
ORIGINAL = "original_max_position_embeddings"
# Rope type -> numbers that it needs beside the base, and settings that it may have.
ROPE_TYPES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "default": ((), ()),
    "llama3": (("factor", "low_freq_factor", "high_freq_factor", ORIGINAL), ()),
    "yarn": (
        ("factor", ORIGINAL),
        ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"),
    ),
}
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
SWITCHES = ("attention_bias", "tie_word_embeddings")
# Features that the decoder lacks: false, 0 or empty.
LACKING = (
    *("add_cross_attention", "is_encoder_decoder", "mlp_bias", "num_experts", "num_local_experts"),
    *("per_layer_config", "pruned_heads", "quantization_config", "rope_interleaved", "use_mrope"),
    "use_sliding_window",
)
# Keys that are read or, beside all that end in _token_id, change no logits.
KNOWN = frozenset((*KEYS.values(), *SWITCHES, *LACKING)) | frozenset(
    f"""
    num_key_value_heads head_dim hidden_act layer_types partial_rotary_factor rope_parameters
    rope_scaling rope_theta {ORIGINAL} _attn_implementation _attn_implementation_autoset
    _commit_hash _flash_attn_2_enabled _model_name_or_path _name_or_path architectures
    attention_dropout attn_implementation chunk_size_feed_forward dtype finetuning_task
    gradient_checkpointing id2label initializer_range is_decoder is_llama_config label2id
    max_sequence_length max_window_layers model_max_length name_or_path num_labels output_attentions
    output_hidden_states prefix pretraining_tp problem_type return_dict sliding_window
    task_specific_params tf_legacy_loss tie_encoder_decoder tokenizer_class torch_dtype torchscript
    transformers.js_config transformers_version unsloth_fixed unsloth_version use_bfloat16 use_cache
    use_return_dict

    assistant_confidence_threshold assistant_lookbehind bad_words_ids begin_suppress_tokens
    diversity_penalty do_sample early_stopping encoder_no_repeat_ngram_size
    encoder_repetition_penalty epsilon_cutoff eta_cutoff exponential_decay_length_penalty
    length_penalty max_length max_new_tokens min_length no_repeat_ngram_size num_assistant_tokens
    num_assistant_tokens_schedule num_beam_groups num_beams num_return_sequences output_scores
    remove_invalid_values repetition_penalty return_dict_in_generate suppress_tokens
    target_lookbehind temperature top_k top_p typical_p
    """.split()  # the last paragraph: defaults of sampling, written by transformers 4
)


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
        """Reads a config.json.

        Raises:
          UserError: naming `source` and the keys, for features that the decoder lacks, unknown
            keys, and values that are missing or impossible.
        """
        _check_features(config, source)
        config = {**dict.fromkeys(SWITCHES, False), **config}
        _check_values(config, source)
        model_type, heads = config["model_type"], config["num_attention_heads"]
        default_dim = 128 if model_type == "qwen3" else config["hidden_size"] // heads
        kv_heads = _given(config, "num_key_value_heads", heads)
        head_dim, bias = _given(config, "head_dim", default_dim), config["attention_bias"]
        if heads % kv_heads or head_dim % 2 or not head_dim:
            raise UserError(
                f"{source} has num_attention_heads={heads}, num_key_value_heads={kv_heads} and "
                f"head_dim={head_dim}; the first must be a multiple of the second, the last of 2"
            )
        return cls(
            **{field: config[key] for field, key in KEYS.items()},
            num_kv_heads=kv_heads,
            head_dim=head_dim,
            rope=tuple(sorted(_read_rope(config, source).items())),
            tie_embeddings=config["tie_word_embeddings"],
            qk_norm=model_type == "qwen3",
            qkv_bias=model_type == "qwen2" or bias,
            output_bias=model_type != "qwen2" and bias,
            bos_token_id=config.get("bos_token_id"),
            eos_token_ids=read_stop_ids(config, source=source),
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


def read_stop_ids(config: Mapping[str, Any], *, source: str) -> tuple[int, ...]:
    """Reads eos_token_id of a config.json or generation_config.json: an id, a list or null.

    Raises:
      UserError: naming `source`, for anything else.
    """
    given = config.get("eos_token_id")
    ids = given if isinstance(given, list | tuple) else () if given is None else (given,)
    if not all(_is_integer(i) and i >= 0 for i in ids):
        raise UserError(f"{source} has eos_token_id={given!r}; name a token id, or a list of them")
    return tuple(dict.fromkeys(ids))


def _given(config: Mapping[str, Any], key: str, default: Any) -> Any:
    return default if config.get(key) is None else config[key]


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_positive(value: Any) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and 0 < value <= sys.float_info.max


def _listed(config: Mapping[str, Any], keys: Iterable[str]) -> str:
    return ", ".join(f"{key}={config.get(key)!r:.60}" for key in sorted(keys))


def _check_features(config: Mapping[str, Any], source: str) -> None:
    """Raises a UserError for a model that the decoder can't compute, and for unknown keys."""
    lacking = [key for key in LACKING if config.get(key)]
    lacking += ["hidden_act"] * (_given(config, "hidden_act", "silu") not in ("silu", "swish"))
    types = _given(config, "layer_types", [])
    full = isinstance(types, list | tuple) and all(kind == "full_attention" for kind in types)
    lacking += ["layer_types"] * (not full)
    if config.get("model_type") not in tuple(ARCHITECTURES):
        lacking = ["model_type"]  # keys mean what they mean to that model
    if lacking:
        raise UserError(
            f"{source} needs {_listed(config, lacking)}, which the decoder lacks; it supports "
            f"{', '.join(ARCHITECTURES)} with full attention and rope types {', '.join(ROPE_TYPES)}"
        )
    given = {key for key, value in config.items() if value is not None}
    unknown = [key for key in given - KNOWN if not key.endswith("_token_id")]
    if unknown:
        raise UserError(
            f"{source} has unknown keys, {_listed(config, unknown)}; delete those that change "
            "neither weights nor logits: the decoder can't compute a model that needs the others"
        )


def _check_values(config: Mapping[str, Any], source: str) -> None:
    """Raises a UserError for missing and impossible values."""
    positive = lambda value: _is_integer(value) and 0 < value < 2**31
    kinds = {
        "a positive integer": (positive, {*KEYS.values()} - {"model_type", "rms_norm_eps"}),
        "a positive integer or null": (
            lambda value: value is None or positive(value),
            {"num_key_value_heads", "head_dim"},
        ),
        "a positive number": (_is_positive, {"rms_norm_eps"}),
        "true or false": (lambda value: isinstance(value, bool), {*SWITCHES}),
        "a token id or null": (
            lambda value: value is None or _is_integer(value),
            {"bos_token_id", "pad_token_id"},
        ),
    }
    for kind, (valid, keys) in kinds.items():
        if wrong := [key for key in keys if not valid(config.get(key))]:
            raise UserError(f"{source} has {_listed(config, wrong)}; each must be {kind}")


def _read_rope(config: Mapping[str, Any], source: str) -> dict[str, Any]:
    """Reads the rotary settings in the order of transformers.

    `rope_scaling` replaces `rope_parameters`, `rope_type` goes before `type`, and
    original_max_position_embeddings of the top level before that of the settings.
    """
    name = "rope_scaling" if config.get("rope_scaling") else "rope_parameters"
    given, other = (config.get(key) or {} for key in (name, "rope_parameters"))
    if not isinstance(given, Mapping) or not isinstance(other, Mapping):
        raise UserError(f"{source} has {_listed(config, [name])}; write an object or null")
    rope: dict[str, Any] = {"rope_theta": config.get("rope_theta", 10000.0), **given}
    kind = rope.setdefault("rope_type", rope.get("type", "default"))
    rope.pop("type", None)
    partial = rope.pop("partial_rotary_factor", config.get("partial_rotary_factor"))
    if kind not in tuple(ROPE_TYPES) or partial not in (None, 1):
        raise UserError(
            f"{source} needs rope_type={kind!r} with partial_rotary_factor={partial!r}, which the "
            f"decoder lacks; it supports {', '.join(ROPE_TYPES)}, without a partial factor"
        )
    if other.get("rope_theta", rope["rope_theta"]) != rope["rope_theta"]:
        log.warning(
            "%s has %s in rope_parameters, which rope_scaling replaces by settings with %s, as in "
            "transformers; write the base into rope_scaling if that is not meant",
            source,
            *(_listed(settings, ["rope_theta"]) for settings in (other, rope)),
        )
    needed, optional = ROPE_TYPES[kind]
    if ORIGINAL in needed:
        length = rope.get(ORIGINAL, config["max_position_embeddings"])
        rope[ORIGINAL] = config.get(ORIGINAL, length)
    needed = ("rope_theta", *needed)
    rope = {k: v for k, v in rope.items() if v is not None or k in (*needed, "truncate")}
    if unknown := rope.keys() - {"rope_type", *needed, *optional}:
        raise UserError(
            f"{source} has {_listed(rope, unknown)} in {name}, unknown to rope_type={kind!r}; "
            "write one set of settings for all layers, without these"
        )
    numbers = {*needed, *rope} - {"rope_type", "truncate"}
    wrong = [key for key in numbers if not _is_positive(rope.get(key))]
    wrong += ["truncate"] * (not isinstance(rope.get("truncate", True), bool))
    if not wrong and rope["rope_theta"] <= 1:
        wrong = ["rope_theta"]
    if not wrong and kind == "llama3" and rope["high_freq_factor"] <= rope["low_freq_factor"]:
        wrong = ["high_freq_factor", "low_freq_factor"]
    if wrong:
        raise UserError(
            f"{source} has {_listed(rope, wrong)} in {name}; rope_type={kind!r} needs positive "
            "numbers, rope_theta above 1, and high_freq_factor above low_freq_factor"
        )
    return rope
