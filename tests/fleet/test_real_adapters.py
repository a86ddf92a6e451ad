"""LoRA adapters on a real SGLang server: two versions at once, a refresh that drains nothing."""

import concurrent.futures
import functools
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import Published
from flax.traverse_util import unflatten_dict
from fleets import CLOSE, assert_published, open_real_fleet, wait_until
from server_processes import Process, find_port, sglang_program
from small_models import small_mesh

from oapl_jax.config import LORA_TARGETS, LearnerConfig
from oapl_jax.model import hf
from oapl_jax.model.lora import Lora, join, merge
from oapl_jax.model.transformer import Transformer
from oapl_jax.structs import Prompt
from oapl_jax.weights.checkpoint import Weights
from oapl_jax.weights.probe import make_probe
from oapl_jax.weights.publisher import publish, read_manifest

LORA = Lora(4, 8.0, LORA_TARGETS)
PROMPT = [4, 11, 6, 12, 3, 14]


@pytest.fixture(scope="module")
def base(published):
    """A checkpoint in bfloat16, as the learner holds it."""
    directory, config = published.directory / "base", published.policy.config
    limits = dict(dtype="bfloat16", max_shard_bytes=1 << 30)
    hf.save_params(published.params[1], config, directory, **limits)
    return directory


@pytest.fixture(scope="module")
def adapted(published, base):
    """Versions 1, 2 and 3, each of adapters over the base; `params` are merged."""
    config, directory = published.policy.config, published.directory / "adapters"
    frozen = hf.load_params(base, config, dtype="bfloat16")
    model = Transformer(config, jnp.dtype("float32"), "none", LORA)
    layout = LearnerConfig(micro_batches=1, row_length=64, rows_multiple=1, logp_chunk=64)
    probe, weights = (
        make_probe(model, small_mesh(), layout),
        Weights(directory / "weights", deadline=60.0),
    )
    merged = jax.jit(functools.partial(merge, lora=LORA, dtype=jnp.float32))
    params = {}
    for version in (1, 2, 3):
        rng = np.random.default_rng(version)
        shapes = hf.parameter_shapes(config, LORA)
        draws = {p: 0.2 * rng.normal(size=s.shape).astype(np.float32) for p, s in shapes.items()}
        trained = jax.tree.map(jnp.asarray, unflatten_dict(draws, sep="/"))
        whole = join(frozen, trained)
        params[version] = jax.device_get(merged(whole))
        weights.save(version, trained, {**probe(whole), "dtype": "float32"})
        weights.wait()
        publish(
            weights.path(version),
            config,
            version=version,
            directory=directory,
            tokenizer=published.policy.tokenizer,
            dtype="float32",
            config_hash="",
            adapters=hf.Adapters(LORA, str(base), False),
        )
    weights.close()
    return Published(directory, published.policy, published.model, params)


@pytest.fixture(scope="module")
def server(base, tmp_path_factory):
    port = find_port()
    command = [*sglang_program("serve.py"), f"--model-path={base}", f"--port={port}"]
    command += ["--skip-tokenizer-init", "--enable-lora", f"--max-lora-rank={LORA.rank}"]
    command += ["--lora-target-modules", *LORA.targets]
    log = tmp_path_factory.mktemp("server") / "log"
    server = Process(f"SGLang with adapters on port {port}", command, port, log)
    try:
        server.wait_ready()
        yield server
    finally:
        server.kill()


def prompt(index):
    tokens = np.array(PROMPT[: 2 + index % 5], np.int32)
    return Prompt(f"p{index}", index, tokens, "", "", "chain_sum")


def name_of(adapted, version):
    checksum = read_manifest(adapted.path(version))["files"][hf.ADAPTER]["xxh128"]
    return f"v{version:06d}-{checksum[:12]}"


def request(name, length, **more):
    params = {"temperature": 1.0, "max_new_tokens": length, "ignore_eos": True}
    body = {"input_ids": PROMPT, "sampling_params": params, "return_logprob": True, **more}
    return body | {"lora_path": name}


def test_a_refresh_drains_nothing(server, adapted):
    settings = dict(allow_older=True, max_in_flight=2, adapters=LORA)
    fleet = open_real_fleet(adapted, [server.url], **settings)
    try:
        fleet.refresh(1, adapted.path(1))
        fleet.wait_ready(1)
        taker = fleet.take(map(prompt, range(16)))
        wait_until(lambda: taker.error or len(taker.taken) >= 2, "two groups", 120)
        fleet.refresh(2, adapted.path(2))
        taken = taker.result()
    finally:
        fleet.close()
    taken.assert_each_once(16)
    assert taken.versions == {1, 2}
    assert not taken.reasons
    assert fleet.counts()["aborted"] == 0
    assert_published(adapted, taken)


def test_a_load_waits_for_no_request_and_two_versions_run_at_once(server, adapted):
    for version in (1, 2):
        name, models = name_of(adapted, version), server.ask("/v1/models")["data"]
        if name not in {model["id"] for model in models}:
            body = {"lora_name": name, "lora_path": str(adapted.path(version))}
            server.ask("/load_lora_adapter", body)
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        long = request(name_of(adapted, 1), 1500)
        running = pool.submit(server.call, "/generate", long, timeout=300)
        time.sleep(0.5)
        body = {"lora_name": name_of(adapted, 3), "lora_path": str(adapted.path(3))}
        server.ask("/load_lora_adapter", body)
        short = {version: request(name_of(adapted, version), 8) for version in (2, 3)}
        answers = {version: server.ask("/generate", body) for version, body in short.items()}
        assert not running.done()
        status, answers[1] = running.result()
    assert status == 200
    for version, answer in answers.items():
        tokens = answer["output_ids"][:100]  # of the long one, what the learner's row holds
        found = [entry[0] for entry in answer["meta_info"]["output_token_logprobs"]][:100]
        expected = adapted.logp(version, PROMPT, tokens)
        np.testing.assert_allclose(found, expected, atol=CLOSE)
        assert answer["meta_info"]["weight_version"] == "default"  # that of the base


def test_a_name_that_was_never_loaded_is_refused(server):
    status, answer = server.call("/generate", request("v000009-0", 2))
    assert status == 400
    assert "v000009-0" in str(answer)
