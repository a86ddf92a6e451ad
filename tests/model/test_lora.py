"""LoRA: parity with peft, PEFT directories, merging, and adapters on a mesh.

tests/golden/make.py wrote tests/golden/adapters with peft (`make parity`).
"""

import contextlib
import functools
import json
import math
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from bucket import emulated
from etils import epath
from flax.traverse_util import flatten_dict
from jax.sharding import PartitionSpec as P
from safetensors.numpy import load_file
from small_models import GOLDEN, assert_same, forward, golden_model, next_token_loss, small_mesh

from oapl_jax import files
from oapl_jax.config import LORA_TARGETS
from oapl_jax.errors import UserError
from oapl_jax.model import hf
from oapl_jax.model.lora import Lora, adapters_of, join, merge
from oapl_jax.model.sharding import parameter_shardings
from oapl_jax.model.transformer import Transformer

NAMES = ["llama_bias", "qwen3"]
ADAPTERS = GOLDEN / "adapters"
close = functools.partial(np.testing.assert_allclose, atol=1e-5, rtol=1e-5)


@functools.cache
def golden(name):
    with np.load(GOLDEN / name / "golden.npz") as file:
        tokens = file["tokens"]
    with np.load(ADAPTERS / name / "golden.npz") as file:
        return tokens, dict(file)


@functools.cache
def adapted(name):
    """Decoder config, sizes of the adapters, frozen weights and adapters."""
    config, (lora, _) = hf.load_config(GOLDEN / name), hf.read_adapter_config(ADAPTERS / name)
    frozen = hf.load_params(GOLDEN / name, config, dtype="bfloat16")
    return config, lora, frozen, hf.load_adapters(ADAPTERS / name, config, lora)


@pytest.fixture
def copy(tmp_path):
    """Copies committed adapters; their base is the committed checkpoint."""

    def made(name):
        directory = epath.Path(shutil.copytree(ADAPTERS / name, tmp_path / name))
        edit(directory, base_model_name_or_path=str(GOLDEN / name))
        return directory

    return made


def edit(directory, **changes):
    path = directory / hf.ADAPTER_CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


# Parity


def test_every_committed_adapter_is_tested():
    assert sorted(path.name for path in ADAPTERS.iterdir()) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_logits_and_gradients_equal_those_of_peft(name):
    config, lora, frozen, params = adapted(name)
    tokens, expected = golden(name)
    base = forward(config, frozen, tokens)
    assert np.abs(base - expected["logits"]).max() > 0.1
    close(forward(config, join(frozen, params), tokens, lora=lora), expected["logits"])

    loss = lambda params: next_token_loss(config, join(frozen, params), tokens, lora=lora)
    gradients = flatten_dict(jax.jit(jax.grad(loss))(params), sep="/")
    tensors = hf.tensors_of(config, lora)
    assert expected.keys() - {"logits"} == {tensor.name for tensor in tensors}
    for tensor in tensors:
        assert np.abs(expected[tensor.name]).max() > 1e-4
        close(gradients[tensor.path][tensor.layer].T, expected[tensor.name])


@pytest.mark.parametrize("name", NAMES)
def test_merged_weights_have_the_logits_of_peft(name, copy, tmp_path):
    config, lora, frozen, params = adapted(name)
    tokens, expected = golden(name)
    in_memory = jax.jit(functools.partial(merge, lora=lora, dtype=jnp.float32))(
        join(frozen, params)
    )
    on_disk = hf.load_params(copy(name), config)
    published = epath.Path(tmp_path / "merged")
    limits = dict(dtype="float32", max_shard_bytes=1 << 30)
    hf.Adapters(lora, str(GOLDEN / name), True).save(params, config, published, **limits)
    for merged in (in_memory, on_disk, hf.load_params(published, config)):
        assert jax.tree.structure(merged) == jax.tree.structure(frozen)
        close(forward(config, merged, tokens), expected["logits"])
    assert_same(on_disk, hf.load_params(published, config))


def test_a_base_in_a_bucket_is_copied_once(copy, tmp_path, monkeypatch):
    config, lora, _, params = adapted("qwen3")
    copied, read_parts = [], files.read_parts
    monkeypatch.setattr(files, "read_parts", lambda path: copied.append(path) or read_parts(path))
    limits = dict(dtype="float32", max_shard_bytes=1 << 30)
    with emulated("bases") as bucket:
        for path in (GOLDEN / "qwen3").iterdir():
            (bucket / "base" / path.name).write_bytes(path.read_bytes())
        directory = copy("qwen3")
        expected = hf.load_params(directory, config)
        edit(directory, base_model_name_or_path=str(bucket / "base"))
        for refresh in ("first", "second"):
            assert_same(hf.load_params(directory, config), expected)
            adapters = hf.Adapters(lora, str(bucket / "base"), True)
            adapters.save(params, config, epath.Path(tmp_path / refresh), **limits)
    assert len(copied) == len(list((GOLDEN / "qwen3").glob("*.safetensors")))


# Directories in PEFT format


@pytest.mark.parametrize("name", NAMES)
def test_adapters_are_written_as_peft_writes_them(name, tmp_path):
    config, lora, _, params = adapted(name)
    files = hf.save_adapters(params, config, lora, tmp_path, base="somewhere")
    assert sorted(files) == sorted(path.name for path in tmp_path.iterdir())
    found, expected = (load_file(d / hf.ADAPTER) for d in (tmp_path, ADAPTERS / name))
    assert_same(found, expected)
    ours, theirs = (
        json.loads((d / hf.ADAPTER_CONFIG).read_text()) for d in (tmp_path, ADAPTERS / name)
    )
    ours["target_modules"].sort()
    assert ours | {"base_model_name_or_path": name} == {key: theirs[key] for key in ours}
    assert hf.read_adapter_config(epath.Path(tmp_path)) == (lora, epath.Path("somewhere"))


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        (dict(peft_type="IA3"), "peft_type"),
        (dict(use_dora=True), "use_dora"),
        (dict(use_rslora=True), "use_rslora"),
        (dict(modules_to_save=["lm_head"]), "modules_to_save"),
        (dict(rank_pattern={"q_proj": 2}), "rank_pattern"),
        (dict(bias="all"), "bias"),
        (dict(target_modules="all-linear"), "target_modules"),
        (dict(target_modules=["q_proj", "lm_head"]), "target_modules"),
        (dict(target_modules=["q_proj"]), "missing|unknown"),
        (dict(r=7), "wrong shape"),
        (dict(base_model_name_or_path="/nowhere"), "/nowhere"),
    ],
)
def test_adapters_of_another_kind_or_size_are_refused(changes, name, copy):
    directory = copy("qwen3")
    edit(directory, **changes)
    with pytest.raises(UserError, match=name):
        hf.load_params(directory, hf.load_config(GOLDEN / "qwen3"))


@pytest.mark.parametrize("key", ["r", "lora_alpha", "target_modules", "base_model_name_or_path"])
def test_an_incomplete_adapter_config_is_refused(key, copy):
    directory = copy("qwen3")
    path = directory / hf.ADAPTER_CONFIG
    path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != key}))
    with pytest.raises(UserError, match=hf.ADAPTER_CONFIG):
        hf.read_adapter_config(directory)


# Parameters


def test_fresh_adapters_change_nothing_and_only_targets_have_one():
    config, whole = golden_model("llama_bias")
    lora = Lora(4, 8.0, ("k_proj", "up_proj"))
    model = Transformer(config, jnp.float32, "none", lora)
    blank = jnp.zeros((1, 2), jnp.int32)
    fresh = adapters_of(jax.jit(model.init)(jax.random.key(0), blank, blank, blank)["params"])
    flat = flatten_dict(fresh, sep="/")
    names = [f"layers/{module}/lora_{which}" for module in ("k", "up") for which in "ab"]
    assert sorted(flat) == sorted(names)
    assert flat["layers/up/lora_a"].shape == (2, 32, 4)
    assert flat["layers/k/lora_b"].shape == (2, 4, config.num_kv_heads * config.head_dim)
    for module in ("k", "up"):
        a = flat[f"layers/{module}/lora_a"]
        assert not np.any(flat[f"layers/{module}/lora_b"])
        assert 0.8 / math.sqrt(32) < np.abs(a).max() <= 1 / math.sqrt(32)  # uniform
    tokens = golden("llama_bias")[0]
    whole_too = join(whole, fresh)
    np.testing.assert_array_equal(
        forward(config, whole_too, tokens, lora=lora), forward(config, whole, tokens)
    )


def test_join_copies_nothing():
    _, _, frozen, params = adapted("qwen3")
    joined = flatten_dict(join(frozen, params))
    for part in (frozen, params):
        assert all(joined[path] is leaf for path, leaf in flatten_dict(part).items())
    for path, leaf in flatten_dict(frozen).items():
        assert leaf.dtype == ("float32" if path[-1] == "scale" else "bfloat16"), path


def test_frozen_weights_have_no_gradient_in_the_program():
    """No product of the backward pass has a kernel's shape, as those of all gradients do."""
    config, lora, frozen, params = adapted("qwen3")
    tokens = golden("qwen3")[0]
    loss = lambda params: next_token_loss(config, join(frozen, params), tokens, lora=lora)
    text = jax.jit(jax.grad(loss)).lower(params).compile().as_text()
    whole = lambda params: next_token_loss(config, params, tokens)
    wide = jax.tree.map(lambda x: x.astype(jnp.float32), frozen)
    all_of_them = jax.jit(jax.grad(whole)).lower(wide).compile().as_text()
    kernel = re.compile(r"= f32\[(32,48|48,32)\]\S* dot\(")  # of a layer's gate, up or down
    assert len(kernel.findall(all_of_them)) >= 3
    assert not kernel.findall(text)


# On a mesh


def test_adapters_have_their_axes():
    params = adapted("qwen3")[-1]
    mesh = small_mesh(data=2, fsdp=2, tensor=2)
    placed = flatten_dict(parameter_shardings(params, mesh), sep="/")
    specs = {path: sharding.spec for path, sharding in placed.items()}
    assert len(specs) == 2 * len(LORA_TARGETS)
    for module in ("q", "k", "v", "gate", "up"):
        assert specs[f"layers/{module}/lora_a"] == P(None, "fsdp", None)
        assert specs[f"layers/{module}/lora_b"] == P(None, None, "tensor")
    for module in ("o", "down"):
        assert specs[f"layers/{module}/lora_a"] == P(None, "tensor", None)
        assert specs[f"layers/{module}/lora_b"] == P(None, None, "fsdp")


@pytest.mark.parametrize("sizes", [dict(fsdp=8), dict(data=2, fsdp=2, tensor=2)])
def test_adapters_are_read_and_merged_on_a_mesh(sizes, copy):
    config, lora, _, params = adapted("qwen3")
    directory, mesh = copy("qwen3"), small_mesh(**sizes)
    assert_same(hf.load_adapters(directory, config, lora, mesh=mesh), params)
    merged = hf.load_params(directory, config, mesh=mesh)
    assert_same(merged, hf.load_params(directory, config))
    sharding = merged["layers"]["down"]["kernel"].sharding
    assert sharding.spec == P(None, "tensor", "fsdp")


def test_a_parameter_is_read_layer_by_layer(copy):
    config, directory = hf.load_config(GOLDEN / "qwen3"), copy("qwen3")
    whole = flatten_dict(hf.load_params(directory, config), sep="/")
    with contextlib.ExitStack() as stack:
        stored = hf.open_stored(directory, config, stack)
        assert {path: leaf.shape for path, leaf in stored.items()} == {
            path: leaf.shape for path, leaf in whole.items()
        }
        np.testing.assert_array_equal(stored["layers/q/kernel"][1], whole["layers/q/kernel"][1])
