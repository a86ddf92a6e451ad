"""config.json and generation_config.json: read as by transformers, or refused by name."""

import dataclasses
import functools
import json
import re

import pytest
from small_models import GOLDEN, SIZES, small_config
from transformers import LlamaConfig, Qwen2Config, Qwen3Config

from oapl_jax.errors import UserError
from oapl_jax.model import hf
from oapl_jax.model.config import KNOWN, ModelConfig

read = functools.partial(ModelConfig.from_hf, source="here")
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
LLAMA3 = {**YARN, "rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}
DEFAULT = {"rope_type": "default", "rope_theta": 100.0}


def config(**changes):
    return {"model_type": "llama", **SIZES, **changes}


def without(settings, *keys):
    return {key: value for key, value in settings.items() if key not in keys}


@pytest.mark.parametrize("kind", [LlamaConfig, Qwen2Config, Qwen3Config])
def test_every_key_that_transformers_writes_is_known(kind):
    written = kind(**SIZES).to_dict()
    assert {key for key in written if not key.endswith("_token_id")} <= KNOWN
    written |= {"temperature": 0.6, "sep_token_id": 3, "logit_scale": None}
    written |= {"_model_name_or_path": "a name"}  # of a model read from a GGUF file
    assert read(written).model_type == kind.model_type


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"model_type": "qwen3_moe", "num_experts": 8}, "model_type='qwen3_moe'"),
        ({"model_type": None}, "model_type=None"),
        ({"model_type": ["llama"]}, "model_type="),
        ({"num_experts": 8}, "num_experts=8"),
        ({"num_local_experts": 8}, "num_local_experts=8"),
        ({"use_sliding_window": True}, "use_sliding_window"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
        ({"layer_types": 3}, "layer_types=3"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
        ({"rope_parameters": {**DEFAULT, "partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ({"use_mrope": True}, "use_mrope"),
        ({"rope_interleaved": True}, "rope_interleaved"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config"),
        # Keys of other architectures, which would change the logits of this one too.
        ({"final_logit_softcapping": 30.0, "logit_scale": 0.25}, "logit_scale=0.25"),
        ({"is_causal": False}, "is_causal=False"),
        ({"auto_map": {"AutoModel": "x.Y"}}, "auto_map"),
        # Values.
        ({"hidden_size": None}, "hidden_size=None"),
        *(({"hidden_size": x}, "hidden_size=") for x in (0, -32, "32", 32.0, True, 10**30)),
        ({"num_key_value_heads": 3}, "num_key_value_heads=3"),
        ({"num_key_value_heads": 0}, "num_key_value_heads=0"),
        ({"head_dim": 7}, "head_dim=7"),
        ({"head_dim": None, "num_attention_heads": 64}, "head_dim=0"),
        *(({"rms_norm_eps": x}, "rms_norm_eps=") for x in (0, -1e-6, "1e-6", float("nan"))),
        ({"tie_word_embeddings": "true"}, "tie_word_embeddings='true'"),
        ({"attention_bias": 1}, "attention_bias=1"),
        ({"bos_token_id": [1]}, "bos_token_id="),
        *(({"eos_token_id": x}, "eos_token_id=") for x in (-1, "2", 2.0, [2, "3"], [[2]], True)),
    ],
)
def test_other_models_unknown_keys_and_impossible_values_are_named(changes, named):
    with pytest.raises(UserError, match=f"^here .*{re.escape(named)}"):
        read(config(**changes))


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        *(
            ({"rope_type": kind}, f"rope_type={kind!r}")
            for kind in ("linear", "dynamic", "longrope")
        ),
        ({"rope_type": None, "type": "yarn"}, "rope_type=None"),
        ({"type": "mrope", "mrope_section": [2, 1, 1]}, "rope_type='mrope'"),
        ({"rope_type": ["yarn"]}, "rope_type="),
        ({"type": "mrope", "rope_type": "default", "mrope_section": [2, 1, 1]}, "mrope_section="),
        ({**YARN, "attn_factor": 0.88}, "attn_factor=0.88"),
        ({**YARN, "low_freq_factor": 1.0}, "low_freq_factor=1.0"),
        ({"full_attention": DEFAULT}, "full_attention="),
        ({**DEFAULT, "sliding_attention": DEFAULT}, "sliding_attention="),
        ([], None),
        ("yarn", "rope_"),
        ([1], "rope_"),
        *((without(YARN, key), f"{key}=None") for key in ("factor",)),
        *((without(LLAMA3, key), f"{key}=None") for key in ("factor", "low_freq_factor")),
        (without(LLAMA3, "high_freq_factor"), "high_freq_factor=None"),
        *(({**YARN, "factor": x}, "factor=") for x in (None, 0, -2, "4", True, float("inf"))),
        *(({**LLAMA3, "high_freq_factor": x}, "high_freq_factor=") for x in (1.0, 0.5)),
        ({**YARN, "original_max_position_embeddings": None}, "original_max_position_embeddings="),
        *(({**YARN, "rope_theta": x}, "rope_theta=") for x in (None, 1, 0.5, "1e6", 10**400)),
        ({**YARN, "truncate": None}, "truncate=None"),
        ({**YARN, "beta_fast": "32"}, "beta_fast='32'"),
        ({**YARN, "attention_factor": -1.0}, "attention_factor=-1.0"),
    ],
)
@pytest.mark.parametrize("key", ["rope_parameters", "rope_scaling"])
def test_incomplete_unknown_and_nested_rope_settings_are_named(key, settings, named):
    if not named:
        assert read(config(**{key: settings})) == read(config())
        return
    with pytest.raises(UserError, match=f"^here .*{re.escape(named)}"):
        read(config(**{key: settings}))


def test_a_base_that_rope_scaling_replaces_is_logged(caplog):
    beside = dict(rope_parameters={**DEFAULT, "rope_theta": 5e6}, rope_scaling=YARN)
    assert dict(read(config(**beside)).rope) == {**YARN, "rope_theta": 10000.0}
    (record,) = caplog.records
    assert "rope_theta=5000000.0" in record.getMessage()
    assert "rope_theta=10000.0" in record.getMessage()
    assert dict(read(config(**beside, rope_theta=5e6)).rope) == {**YARN, "rope_theta": 5e6}
    assert len(caplog.records) == 1


@pytest.mark.parametrize(
    ("spelt", "rope"),
    [
        ({}, {"rope_type": "default", "rope_theta": 10000.0}),
        ({"rope_theta": 500}, {"rope_type": "default", "rope_theta": 500}),
        ({"rope_theta": 500, "rope_parameters": DEFAULT}, DEFAULT),
        ({"rope_parameters": {}, "rope_scaling": {}, "rope_theta": 100.0}, DEFAULT),
        ({"rope_parameters": DEFAULT, "original_max_position_embeddings": 9}, DEFAULT),
        ({"rope_scaling": YARN, "rope_theta": 9.0}, {**YARN, "rope_theta": 9.0}),
        (
            {"rope_parameters": DEFAULT, "rope_scaling": {**YARN, "type": "default"}},
            {**YARN, "rope_theta": 10000.0},
        ),
        (
            {"rope_scaling": {**YARN, "beta_fast": None, "rope_theta": 9.0}, "rope_theta": 8.0},
            {**YARN, "rope_theta": 9.0},
        ),
        (
            {
                "rope_parameters": {"type": "yarn", "factor": 4.0, "rope_theta": 9.0},
                "max_position_embeddings": 77,
            },
            {**YARN, "rope_theta": 9.0, "original_max_position_embeddings": 77},
        ),
        (
            {
                "rope_parameters": {**LLAMA3, "rope_theta": 9.0},
                "original_max_position_embeddings": 77,
            },
            {**LLAMA3, "rope_theta": 9.0, "original_max_position_embeddings": 77},
        ),
    ],
)
def test_rope_settings_have_the_precedence_of_transformers(spelt, rope):
    content = config(**spelt)
    assert dict(read(content).rope) == rope
    theirs = LlamaConfig(**json.loads(json.dumps(content)))
    theirs.standardize_rope_params()  # again, as before the angles are computed
    of_theirs = {k: v for k, v in theirs.rope_parameters.items() if k != "type" and v is not None}
    assert of_theirs == rope


def test_older_spellings_of_a_config_are_read():
    """Checkpoints from before transformers 5 have rope_theta and rope_scaling side by side."""
    new = json.loads((GOLDEN / "llama_llama3" / "config.json").read_text())
    old = without(new, "rope_parameters")
    rope = dict(new["rope_parameters"])
    old |= {"rope_theta": rope.pop("rope_theta")}
    old["rope_scaling"] = {"type": rope.pop("rope_type"), **rope}
    exported = read(new).to_hf(dtype="float32")
    assert read(old) == read(new) == read(exported)
    del exported["rope_parameters"]  # an old reader sees only this
    assert read(exported) == read(new)


@pytest.mark.parametrize(("model_type", "head_dim"), [("qwen2", 8), ("qwen3", 128)])
def test_defaults_are_those_of_transformers(model_type, head_dim):
    found = small_config(model_type, head_dim=None, num_key_value_heads=None)
    assert (found.tie_embeddings, found.head_dim, found.num_kv_heads) == (False, head_dim, 4)


# Files


@pytest.mark.parametrize("content", [None, "", "{", "[1]", '{"model_type": "llama"}', "\ufeff{}"])
@pytest.mark.parametrize("name", [hf.CONFIG, hf.GENERATION])
def test_an_unreadable_file_is_named(content, name, tmp_path):
    (tmp_path / hf.CONFIG).write_text(json.dumps(config()))
    (tmp_path / name).unlink(missing_ok=True)
    if content is not None:
        (tmp_path / name).write_text(content)
    if name == hf.GENERATION and (content is None or "llama" in content):
        assert hf.load_config(tmp_path) == read(config())
        return
    with pytest.raises(UserError, match=re.escape(name)):
        hf.load_config(tmp_path)


@pytest.mark.parametrize(
    ("of_model", "of_generation", "expected"),
    [
        (2, None, (2,)),
        (2, 2, (2,)),
        (None, 3, (3,)),
        (151645, [151645, 151643], (151645, 151643)),  # Qwen3
        (128001, [128001, 128009], (128001, 128009)),  # Llama 3
        ([1, 2], [3, 2], (1, 2, 3)),
        (None, None, ()),
        ([], [], ()),
    ],
)
def test_stop_ids_are_those_of_both_files(tmp_path, of_model, of_generation, expected):
    (tmp_path / hf.CONFIG).write_text(json.dumps(config(eos_token_id=of_model)))
    (tmp_path / hf.GENERATION).write_text(
        json.dumps({"eos_token_id": of_generation, "temperature": 0.6, "do_sample": True})
    )
    found = hf.load_config(tmp_path)
    assert found == dataclasses.replace(read(config()), eos_token_ids=expected)


@pytest.mark.parametrize("value", [-1, "2", [2, None], {"a": 1}, 0.5])
def test_impossible_stop_ids_are_named(tmp_path, value):
    (tmp_path / hf.CONFIG).write_text(json.dumps(config()))
    (tmp_path / hf.GENERATION).write_text(json.dumps({"eos_token_id": value}))
    with pytest.raises(UserError, match=re.escape(f"{hf.GENERATION} has eos_token_id=")):
        hf.load_config(tmp_path)
