"""Published versions: from Orbax's files, whole or absent whatever happens to the writer; checked;
collected; on a disk and in an object store.

Run as a program, this file publishes for ever in a forked process, to be killed.
"""

import contextlib
import dataclasses
import functools
import itertools
import json
import os
import pathlib
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest
import tensorstore as ts
import xxhash
from bucket import emulated
from etils import epath
from flax.traverse_util import flatten_dict, unflatten_dict

from oapl_jax.errors import RunError, UserError, exit_with_code
from oapl_jax.files import write_file
from oapl_jax.model import hf
from oapl_jax.model.config import ModelConfig
from oapl_jax.model.policy import open_policy
from oapl_jax.model.sharding import make_mesh, parameter_shardings
from oapl_jax.publish import main
from oapl_jax.weights import publisher
from oapl_jax.weights.checkpoint import Weights, save_config
from oapl_jax.weights.publisher import (
    COMMITTED,
    MANIFEST,
    PROBE,
    check_version,
    collect,
    config_hash,
    open_params,
    publish,
    published_versions,
    read_manifest,
    read_probe,
    version_path,
)

STEPS = tempfile.TemporaryDirectory()  # removed when the process ends
SAID = {"tokens": [[3, 1, 2], [5, 5, 6]], "logp": [[-0.5, -1.25], [-3, -0.125]], "dtype": "float32"}


class Tokenizer:
    def save_pretrained(self, directory):
        (pathlib.Path(directory) / "tokenizer.json").write_text('{"a": 1}')


def make_config(hidden_size=32):
    sizes = dict(
        model_type="llama",
        vocab_size=32,
        hidden_size=hidden_size,
        intermediate_size=3 * hidden_size,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        rms_norm_eps=1e-6,
    )
    return ModelConfig.from_hf(sizes, source="test")


@functools.cache
def make_params(config, seed):
    rng = np.random.default_rng(seed)
    shapes = {}
    for tensor in hf.tensors_of(config):
        shape = tensor.shape[::-1] if tensor.transposed else tensor.shape
        shapes[tensor.path] = shape if tensor.layer is None else (config.num_layers, *shape)
    draw = lambda shape: rng.normal(size=shape).astype(np.float32)
    return unflatten_dict({path: draw(shape) for path, shape in shapes.items()}, sep="/")


SMALL, LARGE = make_config(), make_config(256)  # LARGE is 6 MB


@functools.cache
def orbax_step(seed, config=SMALL):
    """An Orbax step of these parameters, saved once."""
    root = epath.Path(tempfile.mkdtemp(dir=STEPS.name))
    weights = Weights(root / "weights")
    weights.save(seed, make_params(config, seed), SAID)
    weights.close()
    return weights.path(seed)


def write(directory, version, seed=None, config=SMALL, dtype="float32"):
    return publish(
        orbax_step(version if seed is None else seed, config),
        config,
        version=version,
        directory=epath.Path(directory),
        tokenizer=Tokenizer(),
        dtype=dtype,
        config_hash="c0ffee",
    )


def assert_holds(path, seed, config=SMALL):
    """The version at `path` is whole, and these are its weights, to the last bit."""
    check_version(path)
    assert hf.load_config(path) == config
    found: Any = flatten_dict(hf.load_params(path, config))
    expected = flatten_dict(make_params(config, seed))
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == np.float32
        np.testing.assert_array_equal(found[name], value)


def files_below(directory):
    return {
        str(path.relative_to(directory)): (path.read_bytes(), path.stat().st_mtime_ns)
        for path in sorted(pathlib.Path(directory).rglob("*"))
        if path.is_file()
    }


# A whole version


def test_a_published_version_is_whole_and_loads_to_the_last_bit(tmp_path):
    path = write(tmp_path / "versions", 16)
    assert path == tmp_path / "versions" / "v000016" == version_path(epath.Path(path.parent), 16)
    assert published_versions(epath.Path(path.parent)) == [16]
    assert_holds(path, 16)
    assert (path / "tokenizer.json").read_text() == '{"a": 1}'
    assert [p.name for p in path.parent.iterdir()] == ["v000016"]


def test_the_manifest_names_every_file_with_size_and_checksum(tmp_path):
    path = pathlib.Path(write(tmp_path, 16))
    manifest = json.loads((path / MANIFEST).read_text())
    assert manifest == read_manifest(epath.Path(path))
    assert (manifest["version"], manifest["dtype"]) == (16, "float32")
    assert (manifest["parent"], manifest["config_hash"]) == ("weights/16", "c0ffee")
    assert set(manifest["files"]) == {"config.json", "model.safetensors", PROBE, "tokenizer.json"}
    assert {p.name for p in path.iterdir()} == {*manifest["files"], MANIFEST, COMMITTED}
    for name, entry in manifest["files"].items():
        content = (path / name).read_bytes()
        assert entry == {"bytes": len(content), "xxh128": xxhash.xxh3_128_hexdigest(content)}


def test_the_probe_goes_with_the_version(tmp_path):
    path = write(tmp_path, 16)
    assert read_probe(path) == SAID
    (path / PROBE).write_text('{"tokens": []}')
    with pytest.raises(UserError, match=r"probe.json"):
        read_probe(path)


def test_large_models_are_split_and_every_shard_is_in_the_manifest(tmp_path, monkeypatch):
    monkeypatch.setattr(publisher, "MAX_SHARD_BYTES", 10_000)
    path = write(tmp_path, 16)
    assert_holds(path, 16)
    shards = sorted(p.name for p in path.glob("*.safetensors"))
    assert len(shards) > 3
    assert {*shards, hf.INDEX} < set(read_manifest(path)["files"])


def test_a_step_saved_on_a_mesh_is_published_to_the_last_bit(tmp_path):
    mesh = make_mesh(data=1, fsdp=4, context=1, tensor=2)
    params = make_params(SMALL, 3)
    placed = jax.device_put(params, parameter_shardings(params, mesh))
    weights = Weights(epath.Path(tmp_path / "weights"))
    weights.save(3, placed, SAID)
    weights.wait()
    kernel = open_params(weights.path(3))["layers/gate/kernel"]
    assert kernel.chunk_layout.read_chunk.shape == (1, 8, 48)  # of (2, 32, 96): 4 by 2 devices
    weights.close()
    arguments = dict(version=3, tokenizer=Tokenizer(), dtype="float32", config_hash="")
    directory = epath.Path(tmp_path / "versions")
    path = publish(weights.path(3), SMALL, directory=directory, **arguments)
    assert_holds(path, 3)


def test_bfloat16_halves_the_file(tmp_path):
    sizes = [
        (write(tmp_path / dtype, 0, dtype=dtype) / "model.safetensors").stat().length
        for dtype in ("float32", "bfloat16")
    ]
    assert 1.8 < sizes[0] / sizes[1] < 2
    path = epath.Path(tmp_path / "bfloat16" / "v000000")
    check_version(path)
    rounded = lambda x: x.astype(ml_dtypes.bfloat16).astype(np.float32)
    expected = jax.tree.map(rounded, make_params(SMALL, 0))
    jax.tree.map(np.testing.assert_array_equal, hf.load_params(path, SMALL), expected)


def test_one_layer_is_in_memory_at_a_time(tmp_path, monkeypatch):
    """Beside what the process held before: less than a stacked parameter, of which it reads 7."""
    monkeypatch.setattr(hf, "READ_AHEAD", 1)
    sizes = dict(hidden_size=512, intermediate_size=1536, num_layers=12, vocab_size=64)
    config = dataclasses.replace(SMALL, head_dim=128, **sizes)
    source = orbax_step(0, config)
    stacked, layer = 12 * 512 * 1536 * 4, 512 * 1536 * 4
    arguments = dict(tokenizer=Tokenizer(), dtype="float32", config_hash="")
    save = lambda version: publish(
        source, config, version=version, directory=epath.Path(tmp_path), **arguments
    )
    save(0)  # starts all threads
    before = resident("VmRSS")
    pathlib.Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    path = save(1)
    assert (path / "model.safetensors").stat().length > 4 * stacked
    assert resident("VmHWM") - before < 2 * layer + (24 << 20) < stacked


def resident(which):
    """Bytes of memory of this process, now (VmRSS) or at most (VmHWM)."""
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(which))


# A step that can't be published


def lose_the_step(source):
    source.rmtree()


def leave_unfinished(source):
    source.rename(source.parent / f"{source.name}.orbax-checkpoint-tmp")


def lose_the_probe(source):
    (source / "probe").rmtree()


def lose_the_parameters(source):
    (source / "params" / "manifest.ocdbt").unlink()


def damage_the_parameters(source):
    (source / "params" / "manifest.ocdbt").write_bytes(b"junk")


def lose_the_arrays(source):
    for path in (source / "params" / "ocdbt.process_0" / "d").iterdir():
        path.unlink()


def lose_a_parameter(source):
    base = {"driver": "file", "path": f"{source}/params/"}
    store = ts.KvStore.open({"driver": "ocdbt", "base": base}).result()
    store.delete_range(ts.KvStore.KeyRange("layers.q.", "layers.q/")).result()


def lose_a_chunk(source):
    base = {"driver": "file", "path": f"{source}/params/"}
    store = ts.KvStore.open({"driver": "ocdbt", "base": base}).result()
    assert b"layers.q.kernel/1.0.0" in store.list().result()
    store.write("layers.q.kernel/1.0.0", None).result()


@pytest.mark.parametrize(
    ("damage", "what"),
    [
        (lose_the_step, r"is no finished Orbax step \(have: none\)"),
        (leave_unfinished, r"is no finished Orbax step \(have: none\)"),
        (lose_the_probe, "has no readable probe"),
        (lose_the_parameters, "not the parameters of this llama"),
        (damage_the_parameters, "parameters of .* can't be read"),
        (lose_the_arrays, "can't be published"),
        (lose_a_parameter, r"layers/q/kernel None instead of \(2, 32, 32\)"),
        (lose_a_chunk, r"can't be published .*layers\.q\.kernel"),
    ],
)
def test_a_damaged_step_is_refused_and_leaves_nothing(tmp_path, damage, what):
    source = epath.Path(shutil.copytree(orbax_step(16).parent.parent, tmp_path / "run"))
    source = source / "weights" / "16"
    directory = epath.Path(tmp_path / "versions")
    directory.mkdir()
    damage(source)
    arguments = dict(version=16, tokenizer=Tokenizer(), dtype="float32", config_hash="")
    with pytest.raises(UserError, match=what) as caught:
        publish(source, SMALL, directory=directory, **arguments)
    assert str(source) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not list(directory.iterdir())


def test_the_step_of_another_model_is_refused(tmp_path):
    arguments = dict(version=16, tokenizer=Tokenizer(), dtype="float32", config_hash="")
    with pytest.raises(UserError, match=r"embed/embedding \(32, 32\) instead of \(32, 256\)"):
        publish(orbax_step(16), LARGE, directory=epath.Path(tmp_path), **arguments)
    assert not list(tmp_path.iterdir())


def test_versions_are_listed_oldest_first(tmp_path):
    assert published_versions(epath.Path(tmp_path / "none")) == []
    for version in (40, 8, 1234567):
        write(tmp_path, version)
    assert published_versions(epath.Path(tmp_path)) == [8, 40, 1234567]


def test_a_version_that_stands_is_never_written_again(tmp_path):
    path = write(tmp_path, 16)
    before = files_below(tmp_path)
    assert write(tmp_path, 16, seed=99) == path
    assert files_below(tmp_path) == before
    assert_holds(path, 16)


# A version that does not stand


def damage_weights(path):
    content = bytearray((path / "model.safetensors").read_bytes())
    content[len(content) // 2] ^= 1
    (path / "model.safetensors").write_bytes(bytes(content))


def damage_config(path):
    (path / "config.json").write_text((path / "config.json").read_text().replace("32", "33"))


def lose_a_file(path):
    (path / "tokenizer.json").unlink()


def lose_the_marker(path):
    (path / COMMITTED).unlink()


def lose_the_manifest(path):
    (path / MANIFEST).unlink()


def misspell_the_manifest(path):
    (path / MANIFEST).write_text((path / MANIFEST).read_text().replace("xxh128", "xxh129", 1))


def empty_the_manifest(path):
    (path / MANIFEST).write_text("{}")


@pytest.mark.parametrize(
    ("damage", "what"),
    [
        (shutil.rmtree, "is missing"),
        (damage_weights, "model.safetensors .* damaged"),
        (damage_config, "config.json .* damaged"),
        (lose_a_file, "tokenizer.json is missing"),
        (lose_the_marker, "is incomplete"),
        (lose_the_manifest, f"{MANIFEST} is missing or damaged"),
        (misspell_the_manifest, "missing or damaged"),
        (empty_the_manifest, f"{MANIFEST} is missing or damaged"),
    ],
)
def test_a_damaged_version_is_refused_by_its_directory(tmp_path, damage, what):
    path = write(tmp_path, 16)
    check_version(path)
    damage(path)
    with pytest.raises(UserError, match=what) as caught:
        check_version(path)
    assert str(path) in str(caught.value)
    assert "publish it again" in str(caught.value)


# Collection


def test_collect_keeps_what_is_named_and_sweeps_what_kills_left(tmp_path):
    directory = epath.Path(tmp_path)
    for version in range(4):
        write(directory, version)
    (directory / "v000002" / COMMITTED).unlink()
    (directory / "v000009.writing").mkdir()
    (directory / "v000009.writing" / "model.safetensors").write_text("half")
    (directory / "notes.txt").write_text("mine")
    assert collect(directory, keep={1, 2, 7}) == [0, 3]
    assert published_versions(directory) == [1]
    assert sorted(p.name for p in directory.iterdir()) == ["notes.txt", "v000001"]
    assert_holds(version_path(directory, 1), 1)
    assert collect(directory, keep={1}) == []
    assert collect(directory / "none", keep=set()) == []


def test_collection_takes_the_marker_first(tmp_path, monkeypatch):
    write(tmp_path, 0)

    def crash(path):
        raise KeyboardInterrupt

    monkeypatch.setattr(type(epath.Path(tmp_path)), "rmtree", crash)
    with pytest.raises(KeyboardInterrupt):
        collect(epath.Path(tmp_path), keep=set())
    assert published_versions(epath.Path(tmp_path)) == []
    assert (tmp_path / "v000000" / "model.safetensors").exists()


# A disk that fails


@contextlib.contextmanager
def no_file_larger_than(size):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_ends_the_run_and_loses_nothing(tmp_path):
    directory, source = epath.Path(tmp_path / "versions"), orbax_step(0, LARGE)
    write(directory, 0, config=LARGE)
    before = files_below(directory), files_below(source)
    with (
        no_file_larger_than(1 << 20),
        pytest.raises(RunError, match=r"version 8 could not .* File too large") as caught,
    ):
        write(directory, 8, seed=0, config=LARGE)
    assert str(directory) in str(caught.value)
    assert "free space" in str(caught.value)
    assert (files_below(directory), files_below(source)) == before
    assert_holds(write(directory, 8, seed=0, config=LARGE), 0, LARGE)


@pytest.mark.parametrize("sync", range(9))
def test_whichever_sync_fails_a_version_is_whole_or_absent(tmp_path, monkeypatch, sync):
    directory = epath.Path(tmp_path / "versions")
    write(directory, 0)
    left, fsync = sync, os.fsync

    def fail(descriptor):
        nonlocal left
        left -= 1
        if left < 0:
            raise OSError(5, "Input/output error")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(RunError, match="Input/output error"):
        write(directory, 8)
    monkeypatch.undo()
    found = published_versions(directory)
    assert found == ([0] if sync < 6 else [0, 8])  # the last three come after the commit
    assert len(list(directory.iterdir())) == len(found)
    for version in found:
        assert_holds(version_path(directory, version), version)


# By hand


@pytest.fixture
def workdir(tmp_path):
    """As a run leaves it: Orbax step 8 to publish, and its model with a tokenizer."""
    workdir = epath.Path(tmp_path / "run")
    sizes = SMALL.to_hf(dtype="float32")
    policy = open_policy(workdir / "model", path="", architecture=sizes, characters="0123456789+=")
    weights = Weights(workdir / "weights")
    weights.save(8, make_params(policy.config, 8), SAID)
    weights.close()
    save_config(workdir, {"model": {"path": ""}, "publish_dtype": "bfloat16", "ks": (1, 2)})
    return workdir


def command(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["publisher", *map(str, arguments)])
    exit_with_code(main)


def test_a_step_is_published_by_hand(workdir, tmp_path, monkeypatch, capsys):
    config = hf.load_config(workdir / "model")
    command(monkeypatch, f"--from={workdir}", "--step=8", f"--to={tmp_path}/a")
    path = epath.Path(tmp_path / "a" / "v000008")
    assert capsys.readouterr().out == f"{path}\n"
    check_version(path)
    manifest = read_manifest(path)
    assert (manifest["parent"], manifest["dtype"]) == ("weights/8", "bfloat16")
    assert {"tokenizer.json", "tokenizer_config.json"} < set(manifest["files"])
    saved = {"publish_dtype": "bfloat16", "ks": [1, 2], "model": {"path": ""}}
    assert manifest["config_hash"] == config_hash(saved) != config_hash({**saved, "ks": [1, 3]})

    (workdir / "weights").rename(workdir / "checkpoints")
    monkeypatch.chdir(tmp_path)
    command(monkeypatch, "--from=run", "--step=8", "--dtype=float32", "--to=b")
    path = epath.Path(tmp_path / "b" / "v000008")
    assert capsys.readouterr().out == f"{path}\n"
    assert read_manifest(path)["parent"] == "checkpoints/8"
    assert_holds(path, 8, config)


def test_a_mistake_on_the_command_line_is_one_sentence(workdir, tmp_path, monkeypatch, capsys):
    to, source = f"--to={tmp_path}/versions", f"--from={workdir}"
    command(monkeypatch, source, "--step=8", f"--to={tmp_path}/there")
    (tmp_path / "empty").mkdir()
    capsys.readouterr()
    for arguments, what in (
        ([], "--from, --step, --to missing"),
        ([source, to, "--step=x"], "--step"),
        ([source, to, "--step=8", "--dtype=int8"], "--dtype"),
        ([source, to, "--step=8", "--steps=9"], "'steps'"),
        ([f"--from={tmp_path}/none", to, "--step=8"], "no config.json"),
        ([f"--from={tmp_path}/empty", to, "--step=8"], "no config.json"),
        ([source, to, "--step=9"], "have weights: 8; checkpoints: none"),
        ([source, f"--to={tmp_path}/there", "--step=8"], "v000008 exists already"),
    ):
        with pytest.raises(SystemExit) as ended:
            command(monkeypatch, *arguments)
        assert ended.value.code == 2
        said = capsys.readouterr().err
        assert what in said
        assert said.startswith("error: ")
        assert said.count("\n") == 1
    assert not (tmp_path / "versions").exists()


def test_the_command_is_one():
    done = subprocess.run(
        [sys.executable, "-m", "oapl_jax.publish", "--step=8"],
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.splitlines()[-1].startswith("error: --from, --to missing")


# An object store


@pytest.fixture(scope="module")
def bucket():
    with emulated("fleet") as bucket:
        yield bucket


@pytest.fixture
def store(bucket):
    """A directory of its own; [ and ] of a test's name would be a pattern there."""
    return bucket / f"run{next(RUNS)}"


RUNS = itertools.count()


def test_from_store_to_store_the_same_bits(store):
    weights = Weights(store / "run" / "weights")
    weights.save(16, make_params(SMALL, 16), SAID)
    weights.close()
    arguments = dict(version=16, tokenizer=Tokenizer(), dtype="float32", config_hash="c0ffee")
    directory = store / "versions"
    path = publish(weights.path(16), SMALL, directory=directory, **arguments)
    assert os.fspath(path) == f"{directory}/v000016"
    assert published_versions(directory) == [16]
    check_version(path)
    assert read_probe(path) == SAID
    assert read_manifest(path)["parent"] == "weights/16"
    with pytest.raises(UserError, match=r"is no finished Orbax step \(have: 16\)"):
        publish(weights.path(17), SMALL, directory=directory, **{**arguments, "version": 17})
    publish(weights.path(16), SMALL, directory=directory, **{**arguments, "version": 17})
    assert collect(directory, keep={17}) == [16]
    assert published_versions(directory) == [17]


def test_a_step_is_published_by_hand_from_store_to_store(store, workdir, monkeypatch):
    weights = Weights(store / "run" / "weights")
    weights.save(8, make_params(hf.load_config(workdir / "model"), 8), SAID)
    weights.close()
    (store / "run" / "model").mkdir(parents=True)
    for name in ("config.json", *(f"model/{path.name}" for path in (workdir / "model").iterdir())):
        (store / "run" / name).write_bytes((workdir / name).read_bytes())
    command(monkeypatch, f"--from={store}/run", "--step=8", f"--to={store}/versions")
    path = version_path(store / "versions", 8)
    check_version(path)
    assert {"tokenizer.json", "tokenizer_config.json"} < set(read_manifest(path)["files"])


WATCHER = """
import sys
from etils import epath
from oapl_jax.weights.publisher import check_version, published_versions, read_probe, version_path

directory = epath.Path(sys.argv[1])
for line in sys.stdin:
    found = published_versions(directory)
    path = version_path(directory, 16)
    print(found, path.exists(), 16 in found and read_probe(path)["tokens"], flush=True)
"""


def test_a_reader_of_a_store_sees_what_another_process_published(store):
    """Clients of object stores like to remember what they listed."""
    with subprocess.Popen(
        [sys.executable, "-c", WATCHER, store / "versions"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as watcher:
        assert watcher.stdin
        assert watcher.stdout

        def look():
            print(file=watcher.stdin, flush=True)
            return watcher.stdout.readline()

        assert look() == "[] False False\n"
        write(store / "versions", 8)
        assert look() == "[8] False False\n"
        write(store / "versions", 16)
        assert look() == f"[8, 16] True {SAID['tokens']}\n"
        collect(store / "versions", keep={8})
        assert look() == "[8] False False\n"
        watcher.stdin.close()


# Crashes


def crash_at_line(count):
    """A tracer that raises at the line number `count` that publisher.py runs."""
    lines = 0

    def trace(frame, event, _):
        nonlocal lines
        if frame.f_code.co_filename != publisher.__file__:
            return None
        if event == "line":
            lines += 1
            if lines > count:
                raise KeyboardInterrupt
        return trace

    return trace


@pytest.mark.parametrize("place", ["tmp_path", "store"])
def test_a_crash_at_any_line_leaves_a_version_whole_or_absent(
    tmp_path, monkeypatch, place, request
):
    weights = (write(tmp_path / "whole", 8) / "model.safetensors").read_bytes()

    def save_params(params, config, directory, **_):  # as the real one, but in no time
        return {"model.safetensors": write_file(directory / "model.safetensors", [weights])}

    monkeypatch.setattr(hf, "save_params", save_params)
    monkeypatch.setattr(publisher, "open_params", lambda source: {})
    monkeypatch.setattr(publisher, "load_probe", lambda source: SAID)
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    directory = epath.Path(request.getfixturevalue(place)) / "versions"
    target = version_path(directory, 8)
    crashes, whole, tracing = 0, 0, sys.gettrace()
    while True:
        collect(directory, keep=set())
        sys.settrace(crash_at_line(crashes))
        try:
            write(directory, 8)
            break
        except KeyboardInterrupt:
            crashes += 1
        finally:
            sys.settrace(tracing)
        found = published_versions(directory)
        assert found in ([], [8])
        if found:
            check_version(target)
            whole += 1
        else:
            with pytest.raises(UserError, match=r"v000008 is (missing|incomplete)"):
                check_version(target)
        check_version(write(directory, 8))
        assert (target / "model.safetensors").read_bytes() == weights
        assert [path.name for path in directory.iterdir()] == ["v000008"]
    assert crashes > 25
    assert 0 < whole < crashes / 3  # once the marker is there, nothing undoes it


def publish_for_ever(source, directory):
    for version in itertools.count():
        publish(
            source,
            LARGE,
            version=version,
            directory=directory,
            tokenizer=Tokenizer(),
            dtype="float32",
            config_hash="",
        )
        print("published", flush=True)
        collect(directory, keep={version - 1, version})


def fork_publishers():
    """For each directory on stdin, forks a process that publishes there until it is killed.

    So packages are imported once; jax and TensorStore start their threads behind the fork.
    """
    source = epath.Path(sys.argv[1])
    for line in sys.stdin:
        child = os.fork()
        if not child:
            print("child", os.getpid(), flush=True)
            publish_for_ever(source, epath.Path(line.strip()))
        os.waitpid(child, 0)
        print("dead", flush=True)


def fetch(path, directory):
    """A copy on the disk, of a version in a store too."""
    copy = directory / "fetched" / path.parent.name / path.name
    copy.mkdir(parents=True)
    for file in path.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    return epath.Path(copy)


@pytest.mark.parametrize(("place", "kills"), [("tmp_path", 6), ("store", 2)])
def test_a_killed_process_leaves_every_version_whole_or_absent(tmp_path, place, kills, request):
    root = epath.Path(request.getfixturevalue(place))
    rng = np.random.default_rng(7)
    source, halves = orbax_step(0, LARGE), 0
    with subprocess.Popen(
        [sys.executable, __file__, source],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as publishers:
        assert publishers.stdin
        assert publishers.stdout
        lines = iter(publishers.stdout)
        reply = lambda word: next(line for line in lines if line.startswith(word))
        for kill in range(kills):
            directory = root / str(kill)
            print(directory, file=publishers.stdin, flush=True)
            child = int(reply("child").split()[1])
            reply("published")
            time.sleep(rng.uniform(0, 0.4))
            os.kill(child, signal.SIGKILL)
            reply("dead")

            found = published_versions(directory)
            assert 1 <= len(found) <= 3  # collect keeps two, and a third may be new
            assert found == list(range(found[0], found[-1] + 1))
            for version in found:
                check_version(version_path(directory, version))
                assert_holds(fetch(version_path(directory, version), tmp_path), 0, LARGE)
            whole = {version_path(directory, version).name for version in found}
            halves += len({path.name for path in directory.iterdir()} - whole)

            last = found[-1] + 1
            path = write(directory, last, seed=0, config=LARGE)
            assert_holds(fetch(path, tmp_path), 0, LARGE)
            collect(directory, keep={last})
            assert [path.name for path in directory.iterdir()] == [f"v{last:06d}"]
        publishers.stdin.close()
    # On the disk most kills hit a version half-written; in a store an object is there or not.
    assert halves or place == "store"


if __name__ == "__main__":
    fork_publishers()
