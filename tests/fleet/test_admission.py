"""What a server must be before it samples: its own words, its files, its log-probs."""

import asyncio
import dataclasses
import json
import re

import aiohttp
import numpy as np
import pytest
from etils import epath
from fault_server import MODEL, STOP, VOCAB, FaultServer

from oapl_jax.errors import UserError
from oapl_jax.fleet.admission import (
    Terms,
    allowed_gap,
    check_prompt,
    compare,
    compare_files,
    examine,
    warnings_of,
)
from oapl_jax.fleet.client import Server
from oapl_jax.fleet.failures import ServerError
from oapl_jax.rollout.sampler import Sampling
from oapl_jax.structs import Prompt


class Tokenizer:
    """Letters of a vocabulary in which letter `i` has id `i`, as the fault server's."""

    shift = 0

    def decode(self, ids, *, skip_special_tokens):
        return "".join(chr(64 + i) for i in ids)

    def encode(self, text, *, add_special_tokens):
        return [(ord(letter) + self.shift) % VOCAB for letter in text]


TERMS = Terms(
    model_config=MODEL,
    tokenizer=Tokenizer(),
    stop_ids=(STOP,),
    sampling=Sampling(1.0, 1.0, 0, 40),
    max_prompt_tokens=20,
    dtype="float32",
    probe_gap={"float32": 1e-3, "bfloat16": 0.1},
)
# What SGLang 0.5.23 says of itself, as far as it is looked at.
INFO = {
    "model_type": "llama",
    "max_model_len": 64,
    "dtype": "float32",
    "quantization": None,
    "kv_cache_dtype": "auto",
    "speculative_algorithm": None,
    "preferred_sampling_params": None,
    "watermark_default_enabled": False,
    "watermark_enforce_all": False,
    "json_model_override_args": "{}",
}


def test_a_server_as_it_should_be():
    assert compare(INFO, TERMS) == ([], [])
    assert compare({**INFO, "dtype": "auto"}, TERMS) == ([], [])
    assert compare({**INFO, "max_model_len": 62}, TERMS) == ([], [])
    same = {"temperature": 1.0, "top_k": -1}
    assert compare({**INFO, "preferred_sampling_params": same}, TERMS) == ([], [])


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"model_type": "qwen3"}, "its model_type is 'qwen3', the learner's 'llama'"),
        ({"max_model_len": 61}, "its context length is 61 tokens; .* need 62"),
        ({"preferred_sampling_params": {"min_p": 0.1}}, "has min_p=0.1"),
        ({"preferred_sampling_params": {"repetition_penalty": 1.1}}, "has repetition_penalty=1.1"),
        ({"preferred_sampling_params": {"logit_bias": {"3": 1}}}, "has logit_bias="),
        ({"preferred_sampling_params": {"temperature": 0.6}}, "has temperature=0.6"),
        ({"watermark_default_enabled": True}, "watermark_default_enabled changes what is drawn"),
        ({"watermark_enforce_all": True}, "watermark_enforce_all changes what is drawn"),
    ],
)
def test_a_server_that_is_refused_by_its_own_words(changes, why):
    (refusal,), warnings = compare({**INFO, **changes}, TERMS)
    assert not warnings
    assert re.search(why, refusal)


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"dtype": "bfloat16"}, "computes in bfloat16; versions are published in float32"),
        ({"dtype": "half"}, "computes in float16"),
        ({"quantization": "fp8"}, "its quantization is 'fp8'"),
        ({"speculative_algorithm": "EAGLE"}, "its speculative_algorithm is 'EAGLE'"),
        ({"kv_cache_dtype": "fp8_e5m2"}, "its kv_cache_dtype is 'fp8_e5m2'"),
        ({"json_model_override_args": '{"rope_theta": 1}'}, "its model is changed by"),
        ({"max_model_len": None}, "its context length can't be compared"),
    ],
)
def test_a_server_with_a_warning(changes, why):
    refusals, (warning,) = compare({**INFO, **changes}, TERMS)
    assert not refusals
    assert re.search(why, warning)


def test_prompts_need_room_too():
    """With short responses it is the longest prompt that decides."""
    terms = dataclasses.replace(TERMS, sampling=Sampling(1.0, 1.0, 0, 2))
    assert compare({**INFO, "max_model_len": 27}, terms) == ([], [])
    (refusal,), _ = compare({**INFO, "max_model_len": 26}, terms)
    assert "need 27" in refusal


# Its files


@pytest.fixture
def model(tmp_path):
    """Writes a model directory with a config.json changed so, and says what is compared."""

    def write(changes=(), generation=None):
        config = {**MODEL.to_hf(dtype="float32"), **dict(changes)}
        (tmp_path / "config.json").write_text(json.dumps(config))
        if generation is not None:
            (tmp_path / "generation_config.json").write_text(json.dumps(generation))
        return compare_files({"model_path": str(tmp_path)}, TERMS)

    return write


def test_the_files_of_a_server_as_it_should_be(model):
    assert model() == ([], [])
    assert model({"max_position_embeddings": 999, "pad_token_id": 3}) == ([], [])
    assert model(generation={"eos_token_id": [STOP], "temperature": 0.6}) == ([], [])


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"vocab_size": 33}, "its model has vocab_size=33, the learner's 32"),
        ({"hidden_size": 64}, "its model has hidden_size=64, the learner's 32"),
        ({"num_hidden_layers": 3}, "its model has num_layers=3, the learner's 2"),
        ({"rms_norm_eps": 1e-5}, "its model has rms_norm_eps=1e-05"),
        ({"rope_parameters": {"rope_theta": 5.0}}, "its model has rope="),
        ({"tie_word_embeddings": True}, "its model has tie_embeddings=True"),
        ({"model_type": "gpt2"}, "asks for model_type='gpt2'"),
        ({"eos_token_id": [STOP, 5]}, r"ends responses at tokens \[1, 5\], this run only at \[1\]"),
    ],
)
def test_files_that_are_refused(model, changes, why):
    (refusal, *_), warnings = model(changes)
    assert not warnings
    assert re.search(why, refusal)


def test_ends_of_the_generation_config_count_too(model):
    (refusal,), _ = model(generation={"eos_token_id": 6})
    assert "ends responses at tokens [1, 6]" in refusal


@pytest.mark.parametrize("content", [None, "", "{", "[]"])
def test_files_that_can_not_be_read_are_named(tmp_path, content):
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    refusals, (warning,) = compare_files({"model_path": str(tmp_path)}, TERMS)
    assert not refusals
    assert f"sizes can't be compared: {tmp_path}/config.json" in warning


# Everything, asked of a server


@pytest.fixture
def server(tmp_path):
    one = FaultServer(epath.Path(tmp_path))
    one.information = dict(INFO, skip_tokenizer_init=True)
    del one.information["model_type"], one.information["max_model_len"]  # other routes say these
    yield one
    one.close()


def found(server, terms=TERMS):
    async def run():
        async with aiohttp.ClientSession() as session:
            deadlines = dict(connect_deadline=5.0, answer_deadline=5.0)
            return await examine(Server(session, server.url, **deadlines), terms)

    return asyncio.run(run())


def test_a_server_that_meets_the_terms(server):
    contract = found(server)
    assert (contract.refusals, contract.warnings, contract.dtype) == ((), (), "float32")
    for temperature in (0.0, 0.5):
        sampling = dataclasses.replace(TERMS.sampling, temperature=temperature)
        assert found(server, dataclasses.replace(TERMS, sampling=sampling)).refusals == ()


def test_the_gap_allowed_is_that_of_the_coarsest_dtype(server):
    gaps = TERMS.probe_gap
    assert allowed_gap(gaps, "float32", "float32", "float32") == 1e-3
    assert allowed_gap(gaps, "auto", "float32") == 1e-3
    for place in range(3):
        for coarse in ("bfloat16", "float16"):
            dtypes = ["float32"] * 3
            dtypes[place] = coarse
            assert allowed_gap(gaps, *dtypes) == 0.1
    server.information["dtype"] = "half"
    assert found(server).dtype == "float16"


def test_a_server_that_refuses_to_sample(server):
    server.plan = lambda call: "400" if call == "generate" else ""
    assert "it does not sample: " in found(server).refusals[0]


def test_a_server_whose_log_probs_contradict_themselves(server):
    server.plan = lambda call: "stale" if call == "score" else ""
    assert "its log-probs of sampled tokens differ by 0.01 nats" in found(server).refusals[0]


def test_a_server_that_ignores_the_temperature(server):
    """As SGLang does when it is told to return log-probs from before the temperature."""
    cold = dataclasses.replace(TERMS, sampling=Sampling(0.5, 1.0, 0, 40))
    assert found(server, cold).refusals == ()
    honest = server._sample
    server._sample = lambda body, *of: honest(
        {**body, "sampling_params": {**body["sampling_params"], "temperature": 1.0}}, *of
    )
    assert (
        "those at temperature 1 although rollout.temperature=0.5" in found(server, cold).refusals[0]
    )


def test_a_server_with_a_tokenizer(server):
    server.information["skip_tokenizer_init"] = False
    assert found(server).refusals == ()
    other = Tokenizer()
    other.shift = 1
    (refusal,) = found(server, dataclasses.replace(TERMS, tokenizer=other)).refusals
    assert "its tokenizer encodes a text otherwise" in refusal


@pytest.mark.parametrize("fault", ["nan", "few", "truncated", "500", "no_logp"])
def test_a_server_that_talks_nonsense_is_no_matter_of_terms(server, fault):
    server.plan = lambda call: fault if call == "generate" else ""
    with pytest.raises(ServerError):
        found(server)


# The run's own side


def test_settings_that_the_learner_can_not_reproduce():
    assert warnings_of(Sampling(0.7, 1.0, 0, 4)) == []
    (warning,) = warnings_of(Sampling(1.0, 0.95, 0, 4))
    assert warning.startswith("rollout.top_p=0.95 draws from fewer tokens than")
    assert len(warnings_of(Sampling(1.0, 0.95, 20, 4))) == 2


def test_prompts():
    def check(*tokens):
        prompt = Prompt("q7", 0, np.array(tokens, np.int32), "", "", "")
        check_prompt(prompt, vocab_size=VOCAB, max_tokens=3)

    check(0)
    check(0, VOCAB - 1, 5)
    with pytest.raises(UserError, match=f"prompt q7 holds token id {VOCAB}"):
        check(0, VOCAB)
    with pytest.raises(UserError, match="prompt q7 holds token id -3"):
        check(-3)
    for tokens in ((), (1, 2, 3, 4)):
        with pytest.raises(UserError, match=f"prompt q7 has {len(tokens)} tokens"):
            check(*tokens)
