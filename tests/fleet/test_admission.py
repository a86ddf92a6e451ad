"""Admission of a server by its description, its files, its tokenizer and its log-probs."""

import dataclasses
import itertools
import json

import aiohttp
import pytest
from etils import epath
from fault_server import MODEL, STOP, VOCAB
from fleets import always
from small_models import random_params

from oapl_jax.config import ProbeTolerance
from oapl_jax.fleet import admission
from oapl_jax.fleet.admission import Requirements
from oapl_jax.fleet.client import SGLangClient
from oapl_jax.model import hf
from oapl_jax.model.policy import open_policy
from oapl_jax.model.tokenizer import make_character_tokenizer
from oapl_jax.rollout.sampler import Sampling


class Tokenizer:
    """Letter `i` has id `i`, as in the fault server."""

    def __init__(self, shift=0):
        self.shift = shift

    def decode(self, ids, *, skip_special_tokens):
        return "".join(chr(64 + i) for i in ids)

    def encode(self, text, *, add_special_tokens):
        return [(ord(letter) + self.shift) % VOCAB for letter in text]


KIND = dict(model_config=MODEL, tokenizer=Tokenizer(), stop_ids=(STOP,), dtype="float32")
LIMITS = dict(max_prompt_tokens=20, probe_tolerance=ProbeTolerance(float32=1e-3, bfloat16=0.1))
REQUIREMENTS = Requirements(sampling=Sampling(1.0, 1.0, 0, 40), **KIND, **LIMITS)
# The compared part of what SGLang 0.5.23 reports.
PREFERRED = dict(min_p=0.1, repetition_penalty=1.1, logit_bias={"3": 1}, temperature=0.6)
WATERMARKS = ("watermark_default_enabled", "watermark_enforce_all")
UNUSED = ("quantization", "speculative_algorithm", "preferred_sampling_params")
INFO = {
    **dict(model_type="llama", max_model_len=64, dtype="float32", kv_cache_dtype="auto"),
    **dict.fromkeys(UNUSED),
    **dict.fromkeys(WATERMARKS, False),
    "json_model_override_args": "{}",
}


@pytest.mark.parametrize(
    ("changes", "refused", "warned"),
    [
        ({}, None, None),
        ({"dtype": "auto"}, None, None),
        ({"max_model_len": 62}, None, None),
        ({"preferred_sampling_params": {"temperature": 1.0, "top_k": -1}}, None, None),
        ({"model_type": "qwen3"}, "model_type", None),
        ({"max_model_len": 61}, "max_prompt_tokens", None),
        *(({"preferred_sampling_params": {k: v}}, k, None) for k, v in PREFERRED.items()),
        *(({name: True}, name, None) for name in WATERMARKS),
        ({"dtype": "bfloat16"}, None, "bfloat16"),
        ({"dtype": "half"}, None, "float16"),
        ({"quantization": "fp8"}, None, "quantization"),
        ({"speculative_algorithm": "EAGLE"}, None, "speculative_algorithm"),
        ({"kv_cache_dtype": "fp8_e5m2"}, None, "kv_cache_dtype"),
        ({"json_model_override_args": '{"rope_theta": 1}'}, None, "rope_theta"),
        ({"max_model_len": None}, None, "max_model_len"),
    ],
)
def test_compare_info(changes, refused, warned):
    for sentences, name in zip(
        admission.compare_info({**INFO, **changes}, REQUIREMENTS), (refused, warned), strict=True
    ):
        assert len(sentences) == bool(name)
        assert all(name in sentence for sentence in sentences)


def test_the_context_has_room_for_prompts_with_short_responses():
    requirements = dataclasses.replace(REQUIREMENTS, sampling=Sampling(1.0, 1.0, 0, 2))
    assert admission.compare_info({**INFO, "max_model_len": 27}, requirements) == ([], [])
    assert admission.compare_info({**INFO, "max_model_len": 26}, requirements)[0]


@pytest.mark.parametrize(
    ("changes", "generation", "refused"),
    [
        ({}, None, None),
        ({"max_position_embeddings": 999, "pad_token_id": 3}, None, None),
        ({}, {"eos_token_id": [STOP], "temperature": 0.6}, None),
        ({"vocab_size": 33}, None, "vocab_size=33"),
        ({"hidden_size": 64}, None, "hidden_size=64"),
        ({"num_hidden_layers": 3}, None, "num_layers=3"),
        ({"rms_norm_eps": 1e-5}, None, "rms_norm_eps=1e-05"),
        ({"rope_parameters": {"rope_theta": 5.0}}, None, "rope="),
        ({"tie_word_embeddings": True}, None, "tie_embeddings=True"),
        ({"model_type": "gpt2"}, None, "gpt2"),
        ({"eos_token_id": [STOP, 5]}, None, "[5]"),
        ({}, {"eos_token_id": 6}, "[6]"),
        ({"eos_token_id": 7}, {"eos_token_id": [6, 8]}, "[6, 7, 8]"),
        ({"eos_token_id": None}, {"eos_token_id": None}, None),
        ({"rope_scaling": {"type": "yarn", "factor": 2.0}}, None, "rope="),
        ({"logit_scale": 2.0}, None, "logit_scale"),
    ],
)
def test_compare_files(tmp_path, changes, generation, refused):
    config = {**MODEL.to_hf(dtype="float32"), **changes}
    (tmp_path / "config.json").write_text(json.dumps(config))
    if generation is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    refusals, warnings = admission.compare_files({"model_path": str(tmp_path)}, REQUIREMENTS)
    assert not warnings
    assert refused in refusals[0] if refused else not refusals


@pytest.mark.parametrize("file", [hf.CONFIG, hf.GENERATION])
@pytest.mark.parametrize("content", [None, "", "{", "[]"])
def test_unreadable_files_are_a_warning(tmp_path, content, file):
    files = {hf.CONFIG: json.dumps(MODEL.to_hf(dtype="float32")), hf.GENERATION: "{}"}
    for name, text in {**files, file: content}.items():
        if text is not None:
            (tmp_path / name).write_text(text)
    refusals, warnings = admission.compare_files({"model_path": str(tmp_path)}, REQUIREMENTS)
    assert not refusals
    expected = [] if (file, content) == (hf.GENERATION, None) else [f"{tmp_path}/{file}"]
    assert len(warnings) == len(expected)
    assert all(path in warning for path, warning in zip(expected, warnings, strict=True))


@pytest.mark.parametrize("where", ["model", "version"])
def test_a_server_started_from_the_runs_own_model_is_admitted(tmp_path, where):
    """Its generation_config.json lists more stop ids than its config.json, as Llama 3's."""
    model = tmp_path / "model"
    content = MODEL.to_hf(dtype="float32") | {"vocab_size": 64, "eos_token_id": 1}
    tokenizer = make_character_tokenizer("0123456789", model)
    (model / hf.CONFIG).write_text(json.dumps(content))
    (model / hf.GENERATION).write_text(json.dumps({"eos_token_id": [1, 5, 9]}))
    start = lambda path: open_policy(
        epath.Path(tmp_path / "run"), path=str(path), architecture={}, characters=""
    )
    policy = start(model)
    version = tmp_path / "version"
    settings = dict(dtype="float32", max_shard_bytes=1 << 30)
    hf.save_params(random_params(policy.config, 0), policy.config, version, **settings)
    own = dict(model_config=policy.config, tokenizer=tokenizer, stop_ids=policy.stop_ids)
    requirements = dataclasses.replace(REQUIREMENTS, **own)
    server = {"model_path": str(tmp_path / where)}
    assert policy.stop_ids == (1, 5, 9)
    assert admission.compare_files(server, requirements) == ([], [])
    # Of another run, whose model does not list them.
    (model / hf.GENERATION).unlink()
    fewer = dataclasses.replace(requirements, stop_ids=start(model).stop_ids)
    refusals, _ = admission.compare_files({"model_path": str(version)}, fewer)
    assert [("[5, 9]" in refusal, str(version) in refusal) for refusal in refusals] == [
        (True, True)
    ]


@pytest.fixture
def server(toy_servers):
    (server,) = toy_servers(1)
    server.information = dict(INFO, skip_tokenizer_init=True)
    del server.information["model_type"], server.information["max_model_len"]  # of other routes
    return server


async def check(server, temperature=1.0, tokenizer=REQUIREMENTS.tokenizer):
    sampling = dataclasses.replace(REQUIREMENTS.sampling, temperature=temperature)
    requirements = dataclasses.replace(REQUIREMENTS, sampling=sampling, tokenizer=tokenizer)
    async with aiohttp.ClientSession() as session:
        client = SGLangClient(session, server.url, connect_deadline=5.0, deadline=5.0)
        return await admission.check_server(client, await client.info(), requirements)


@pytest.mark.parametrize("temperature", [1.0, 0.0, 0.5])
async def test_a_server_that_meets_the_requirements(server, temperature):
    assert await check(server, temperature) == ([], [])


async def test_a_server_whose_log_probs_differ_from_its_own(server):
    server.plan = always("score", "stale")
    (refusal,), _ = await check(server)
    assert "fleet.probe_tolerance" in refusal


async def test_a_server_that_ignores_the_temperature(server):
    """SGLang does with SGLANG_RETURN_ORIGINAL_LOGPROB."""
    server.forced_sampling = {"temperature": 1.0}
    (refusal,), _ = await check(server, 0.5)
    assert "rollout.temperature=0.5" in refusal


async def test_a_server_with_a_tokenizer(server):
    server.information["skip_tokenizer_init"] = False
    assert await check(server) == ([], [])
    (refusal,), _ = await check(server, tokenizer=Tokenizer(shift=1))
    assert "tokenizer" in refusal


def test_the_coarsest_dtype_decides_the_tolerance():
    tolerance = REQUIREMENTS.tolerance
    assert tolerance("float32", "float32", "float32") == tolerance("auto", "float32") == 1e-3
    for coarse in ("bfloat16", "float16"):
        assert all(tolerance(*d) == 0.1 for d in itertools.permutations(("float32", coarse)))
    assert admission.dtype_of({"dtype": "half"}) == "float16"


@pytest.mark.parametrize(
    ("top_p", "top_k", "names"),
    [(1.0, 0, []), (0.95, 0, ["top_p"]), (0.95, 20, ["top_p", "top_k"])],
)
def test_sampling_warnings(top_p, top_k, names):
    warnings = admission.sampling_warnings(Sampling(1.0, top_p, top_k, 4))
    assert len(warnings) == len(names)
    assert all(f"rollout.{n}=" in w for n, w in zip(names, warnings, strict=True))
