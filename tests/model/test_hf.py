"""Hugging Face checkpoints: parity with transformers, round trips, sharded loading, errors.

tests/golden/make.py wrote the checkpoints and transformers' logits for them (`make parity`).
"""

import dataclasses
import functools
import json
import pathlib
import re
import shutil
import tracemalloc
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import tensorstore as ts
from etils import epath
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from small_models import GOLDEN, assert_same, forward, golden_model, random_params

from oapl_jax.errors import UserError
from oapl_jax.files import file_entry
from oapl_jax.model import hf
from oapl_jax.model.config import ModelConfig
from oapl_jax.model.sharding import ROWS, make_mesh, parameter_shardings

LLAMAS = ["llama", "llama_bias", "llama_llama3", "llama_tied", "llama_yarn"]
EDITS = json.loads((GOLDEN / "edits.json").read_text())
NAMES = [*LLAMAS, "qwen2", "qwen2_tied", "qwen3", "qwen3_tied", "qwen3_yarn"]


@functools.cache
def golden(name):
    with np.load(GOLDEN / name / "golden.npz") as file:
        return file["tokens"], file["logits"]


compiled = jax.jit(forward, static_argnums=0)


def tensors_on_disk(directory):
    files = sorted(directory.glob("*.safetensors"))
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def save(params, config, directory, dtype="float32", max_shard_bytes=1 << 30):
    return hf.save_params(params, config, directory, dtype=dtype, max_shard_bytes=max_shard_bytes)


@pytest.fixture
def copy(tmp_path):
    """Copies a committed checkpoint, to be damaged."""
    return lambda name: pathlib.Path(shutil.copytree(GOLDEN / name, tmp_path / name))


# Parity


def test_every_committed_checkpoint_is_tested():
    assert sorted(path.parent.name for path in GOLDEN.glob("*/golden.npz")) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_logits_equal_those_of_transformers(name):
    config, params = golden_model(name)
    tokens, expected = golden(name)
    assert expected.std() > 1  # flat logits would agree by themselves
    np.testing.assert_allclose(compiled(config, params, tokens), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", EDITS)
def test_logits_of_an_edited_config_equal_those_of_transformers(name):
    checkpoint, edit = EDITS[name]["checkpoint"], EDITS[name]["edit"]
    content = json.loads((GOLDEN / checkpoint / "config.json").read_text()) | edit
    before, params = golden_model(checkpoint)
    config = ModelConfig.from_hf(content, source=name)
    tokens = golden(checkpoint)[0][:1]
    with np.load(GOLDEN / "edits.npz") as file:
        expected = file[name]
    np.testing.assert_allclose(compiled(config, params, tokens), expected, atol=1e-4, rtol=0)
    assert np.abs(compiled(before, params, tokens) - expected).max() > 0.1


@pytest.mark.parametrize("name", ["llama_llama3", "llama_yarn", "qwen3_yarn"])
def test_rope_scaling_changes_the_logits(name):
    config, params = golden_model(name)
    tokens, expected = golden(name)
    plain = dataclasses.replace(config, rope=(("rope_theta", 100.0), ("rope_type", "default")))
    assert np.abs(compiled(plain, params, tokens) - expected).max() > 0.1


# The table and round trips


def test_every_row_of_the_table_is_used_and_a_parameter_without_one_raises(monkeypatch):
    used = {t.path for name in NAMES for t in hf.tensors_of(hf.load_config(GOLDEN / name))}
    assert used == set(hf.TABLE)
    monkeypatch.delitem(hf.TABLE, "layers/o/bias")
    with pytest.raises(KeyError, match="layers/o/bias"):
        hf.tensors_of(hf.load_config(GOLDEN / "llama_bias"))


@pytest.mark.parametrize("name", NAMES)
def test_the_table_covers_the_files_and_export_and_import_are_bit_equal(name, tmp_path):
    config, params = golden_model(name)
    stored = tensors_on_disk(GOLDEN / name)
    found = sorted((tensor.name, tensor.shape) for tensor in hf.tensors_of(config))
    assert found == sorted((k, v.shape) for k, v in stored.items())
    save(params, config, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {hf.CONFIG, hf.GENERATION, hf.SINGLE}
    assert hf.load_config(tmp_path) == config
    assert_same(hf.load_params(tmp_path, config), params)
    assert_same(tensors_on_disk(tmp_path), stored)
    with safe_open(tmp_path / "model.safetensors", framework="numpy") as opened:
        assert opened.metadata() == {"format": "pt"}


@pytest.mark.parametrize(("ids", "written"), [((), None), ((2,), 2), ((2, 5), [2, 5])])
def test_stop_ids_are_exported_in_both_files(ids, written, tmp_path):
    config, params = golden_model("qwen3")
    config = dataclasses.replace(config, eos_token_ids=ids)
    save(params, config, tmp_path)
    for name in (hf.CONFIG, hf.GENERATION):
        assert json.loads((tmp_path / name).read_text())["eos_token_id"] == written
    assert hf.load_config(tmp_path) == config


def test_small_shards_hold_the_same_tensors(tmp_path):
    config, params = golden_model("qwen3")
    limit = 7000  # the embedding (8 KiB) is larger, some tensors fit together
    entries = save(params, config, tmp_path, max_shard_bytes=limit)
    assert entries == {path.name: file_entry(path) for path in epath.Path(tmp_path).iterdir()}
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    shards = {path.name: load_file(path) for path in tmp_path.glob("*.safetensors")}
    sizes = {file: sum(t.nbytes for t in tensors.values()) for file, tensors in shards.items()}
    assert index["weight_map"] == {name: file for file in shards for name in shards[file]}
    assert index["metadata"]["total_size"] == sum(sizes.values())
    assert min(len(tensors) for tensors in shards.values()) == 1
    assert max(len(tensors) for tensors in shards.values()) > 1
    for file, tensors in shards.items():
        assert file.endswith(f"-of-{len(shards):05d}.safetensors")
        assert sizes[file] <= limit or len(tensors) == 1
    assert_same(hf.load_params(tmp_path, config), params)


def test_a_bfloat16_export_rounds_and_loads(tmp_path):
    config, params = golden_model("llama_bias")
    save(params, config, tmp_path, "bfloat16", max_shard_bytes=10_000)
    assert {t.dtype for t in tensors_on_disk(tmp_path).values()} == {np.dtype(ml_dtypes.bfloat16)}
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "bfloat16"
    rounded = jax.tree.map(lambda x: x.astype(jnp.bfloat16).astype(jnp.float32), params)
    assert_same(hf.load_params(tmp_path, config), rounded)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_numpy_jax_and_tensorstore_arrays_are_written_equally(dtype, tmp_path):
    """Chunks that divide nothing evenly, and a tree or a mapping by path."""
    config, params = golden_model("qwen2")
    flat: Any = flatten_dict(params, sep="/")
    chunked = {}
    for path, leaf in flat.items():
        chunks = [max(1, n * 2 // 3) for n in leaf.shape]
        metadata = {"shape": leaf.shape, "chunks": chunks, "dtype": "<f4"}
        spec = {"driver": "zarr", "kvstore": "memory://", "metadata": metadata}
        chunked[path] = ts.open(spec, create=True).result()
        chunked[path][...] = np.asarray(leaf)
    kinds = {"jax": params, "numpy": jax.tree.map(np.asarray, params), "tensorstore": chunked}
    for kind, given in kinds.items():
        save(given, config, tmp_path / kind, dtype)
    assert len({(tmp_path / kind / hf.SINGLE).read_bytes() for kind in kinds}) == 1


def test_float16_files_load(copy):
    config, params = golden_model("qwen2")
    directory = copy("qwen2")
    damage(directory, lambda t: t.update({k: v.astype(np.float16) for k, v in t.items()}))
    expected = jax.tree.map(lambda x: x.astype(jnp.float16).astype(jnp.float32), params)
    assert_same(hf.load_params(directory, config), expected)


def test_a_head_of_more_digits_than_the_tied_embedding_is_a_copy(copy):
    """As after training in float32, of which the embedding alone was rounded."""
    directory = copy("qwen3_tied")
    config, _ = golden_model("qwen3_tied")

    def change(tensors):
        exact = tensors["model.embed_tokens.weight"].astype(np.float64)
        tensors["model.embed_tokens.weight"] = exact.astype(ml_dtypes.bfloat16)
        tensors["lm_head.weight"] = exact

    damage(directory, change)
    rounded = hf.load_params(directory, config)["embed"]["embedding"]
    exact = golden_model("qwen3_tied")[1]["embed"]["embedding"]
    assert_same(rounded, exact.astype(jnp.bfloat16).astype(jnp.float32))


@pytest.mark.parametrize("name", ["llama", "qwen3"])  # llama is in several files
def test_stored_rotary_frequencies_are_ignored(copy, name):
    directory = copy(name)
    file = max(path.name for path in directory.glob("*.safetensors"))
    names = [f"model.layers.{i}.self_attn.rotary_emb.inv_freq" for i in range(2)]
    stored = dict.fromkeys([*names, "model.rotary_emb.inv_freq"], np.ones(4, np.float64))
    damage(directory, lambda tensors: tensors.update(stored), file)
    if (index := directory / hf.INDEX).exists():
        content = json.loads(index.read_text())
        content["weight_map"] |= {"model.rotary_emb.inv_freq": "lost.safetensors"}
        index.write_text(json.dumps(content))
    config, expected = golden_model(name)
    assert_same(hf.load_params(directory, config), expected)


@pytest.mark.parametrize("name", ["llama", "qwen2_tied", "qwen3"])  # llama is in several files
def test_each_device_of_a_mesh_loads_its_part(name, tmp_path):
    config, expected = golden_model(name)
    mesh = make_mesh(data=2, fsdp=2, context=1, tensor=2)
    params = hf.load_params(GOLDEN / name, config, mesh=mesh)
    assert_same(params, expected)
    assert jax.tree.map(lambda leaf: leaf.sharding, params) == parameter_shardings(params, mesh)
    split = [x.addressable_shards[0].data.size * 4 == x.size for x in jax.tree.leaves(params)]
    assert sum(split) == {"llama": 9, "qwen2_tied": 8, "qwen3": 9}[name]  # matrices: fsdp x tensor

    tokens, _ = golden(name)
    tokens = np.concatenate([tokens, tokens[:, ::-1]])
    with jax.set_mesh(mesh):
        found = compiled(config, params, tokens)
    assert found.sharding.is_equivalent_to(NamedSharding(mesh, P(*ROWS, None, "tensor")), 3)
    np.testing.assert_allclose(found, compiled(config, expected, tokens), atol=2e-5)

    save(params, config, tmp_path)
    assert_same(hf.load_params(tmp_path, config), expected)


def test_loading_and_saving_hold_one_parameter_at_a_time(tmp_path, monkeypatch):
    """Saving needs two tensors beside the parameters, loading one beside the result."""
    monkeypatch.setattr(hf, "READ_AHEAD", 1)  # no more than the largest tensor
    sizes = dict(hidden_size=256, intermediate_size=768, num_layers=8)
    config = dataclasses.replace(golden_model("llama")[0], **sizes)
    params = random_params(config, 0)
    everything = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    kernel = params["layers"]["gate"]["kernel"]
    stacked, tensor = kernel.nbytes, kernel[0].nbytes
    slack = 300_000
    assert tensor + slack < stacked  # or holding all layers of a parameter twice would go unseen

    def peak(work):
        tracemalloc.start()
        result = work()
        memory = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return memory, result

    assert peak(lambda: save(params, config, tmp_path))[0] < 2 * tensor + slack
    mesh = make_mesh(data=1, fsdp=4, context=1, tensor=2)
    memory, loaded = peak(lambda: hf.load_params(tmp_path, config, mesh=mesh))
    # On CPU devices some results are host arrays that tracemalloc counts, so at most all of them.
    assert memory < everything + tensor + slack
    assert_same(loaded, params)


# Errors


def damage(directory, change, file="model.safetensors"):
    tensors = load_file(directory / file)
    change(tensors)
    save_file(tensors, directory / file)


def refused(directory, config=None):
    with pytest.raises(UserError) as error:
        hf.load_params(directory, config or hf.load_config(directory))
    return str(error.value)


def test_all_wrong_tensors_are_listed_at_once(copy):
    directory, layer = copy("qwen3"), "model.layers.{}.{}".format

    def change(tensors):
        del tensors["model.norm.weight"], tensors[layer(1, "self_attn.q_norm.weight")]
        tensors[layer(2, "mlp.up_proj.weight")] = np.zeros((48, 32), np.float32)
        kernel = layer(0, "mlp.down_proj.weight")
        tensors[kernel] = np.ascontiguousarray(tensors[kernel].T)
        tensors["lm_head.weight"] = tensors["lm_head.weight"].astype(np.int8)

    damage(directory, change)
    message = refused(directory)
    assert message.startswith(str(directory))
    assert f"unknown: {layer(2, 'mlp.up_proj.weight')};" in message
    assert f"missing: {layer(1, 'self_attn.q_norm.weight')}, model.norm.weight;" in message
    assert f"{layer(0, 'mlp.down_proj.weight')} [48, 32] instead of [32, 48]" in message
    assert "lm_head.weight I8" in message


def test_duplicates_and_a_wrong_index_are_listed(copy):
    directory = copy("llama")
    index = json.loads((directory / hf.INDEX).read_text())
    names = index["weight_map"]
    first, last = min(names.values()), max(names.values())
    stray = load_file(directory / first)
    damage(directory, lambda tensors: tensors.update(stray), last)
    for name in stray:
        assert name in refused(directory).partition("in several files: ")[2]

    shutil.copy(GOLDEN / "llama" / last, directory / last)
    moved, dropped = sorted(names)[0], sorted(names)[-1]
    names[moved] = next(file for file in sorted(set(names.values())) if file != names[moved])
    del names[dropped]
    names["model.nowhere.weight"] = last
    (directory / hf.INDEX).write_text(json.dumps(index))
    found = refused(directory).partition("not where the index says: ")[2]
    assert found == ", ".join(sorted([moved, dropped, "model.nowhere.weight"]))


def test_missing_broken_and_ambiguous_files_are_named(copy):
    directory = copy("llama")
    part = min(directory.glob("*.safetensors"))
    part.unlink()
    assert str(part) in refused(directory)
    (directory / hf.INDEX).write_text('{"metadata": {}}')
    assert "weight_map" in refused(directory)
    (directory / hf.INDEX).unlink()
    assert "holds none" in refused(directory)

    directory = copy("qwen3")
    whole = (directory / hf.SINGLE).read_bytes()
    (directory / hf.SINGLE).write_bytes(whole[:-100])  # as an interrupted copy leaves it
    assert str(directory / hf.SINGLE) in refused(directory)
    (directory / hf.INDEX).write_text("{}")
    assert "holds both" in refused(directory)


def test_a_stored_head_must_equal_the_embedding_it_is_tied_to(copy):
    directory = copy("qwen3_tied")
    embedding = load_file(directory / hf.SINGLE)["model.embed_tokens.weight"]
    damage(directory, lambda tensors: tensors.update({"lm_head.weight": embedding}))
    config, expected = golden_model("qwen3_tied")
    assert_same(hf.load_params(directory, config), expected)

    for narrow in (np.float16, ml_dtypes.bfloat16):
        rounded = embedding.astype(narrow)
        damage(directory, lambda tensors, x=rounded: tensors.update({"lm_head.weight": x}))
        assert_same(hf.load_params(directory, config), expected)

    other = embedding.copy()
    other[-1, -1] += 1
    damage(directory, lambda tensors: tensors.update({"lm_head.weight": other}))
    assert "unknown: lm_head.weight" in refused(directory)
    assert "missing: lm_head.weight" in refused(
        GOLDEN / "qwen3_tied", dataclasses.replace(config, tie_embeddings=False)
    )


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize(
    "name", ["model.embed_tokens.weight", "model.layers.1.mlp.up_proj.weight", "lm_head.weight"]
)
def test_a_tensor_with_a_value_that_is_not_finite_is_named(copy, name, dtype, value):
    directory = copy("qwen3")

    def change(tensors):
        tensors[name] = tensors[name].astype(dtype)
        tensors[name][-1, -1] = value

    damage(directory, change)
    message = refused(directory)
    assert name in message
    assert str(directory) in message
    mesh = make_mesh(data=2, fsdp=2, context=1, tensor=2)
    with pytest.raises(UserError, match=re.escape(name)):
        hf.load_params(directory, golden_model("qwen3")[0], mesh=mesh)


def test_an_invalid_export_writes_nothing(tmp_path):
    config, params = golden_model("qwen2")
    flat: dict[str, Any] = {**flatten_dict(params, sep="/")}
    del flat["layers/k/bias"]
    flat["layers/extra/kernel"] = np.zeros((2, 3))
    flat["final_norm/scale"] = np.zeros(7)
    with pytest.raises(ValueError, match="qwen2") as error:
        save(unflatten_dict(flat, sep="/"), config, tmp_path / "out")
    for path in ("layers/k/bias None", "layers/extra/kernel (2, 3)", "final_norm/scale (7,)"):
        assert path in str(error.value)
    assert not (tmp_path / "out").exists()
    save(params, config, tmp_path / "out")
    with pytest.raises(UserError, match="out"):
        save(params, config, tmp_path / "out")


def test_each_device_reads_only_its_part(monkeypatch):
    """Over all devices, each element of a kernel is read once."""
    config, _ = golden_model("qwen3")
    parts, read = [], hf._read
    monkeypatch.setattr(hf, "_read", lambda *args: parts.append(part := read(*args)) or part)
    hf.load_params(GOLDEN / "qwen3", config, mesh=make_mesh(data=1, fsdp=4, context=1, tensor=2))
    kernels = [t for t in hf.tensors_of(config) if t.path.endswith("kernel")]
    assert sum(p.size for p in parts if p.ndim == 3) == sum(np.prod(t.shape) for t in kernels)
