"""Publisher: versions are whole or absent after any crash; checks; collection; object stores.

Run as a program, this file publishes forever in a forked process, to be killed.
"""

import dataclasses
import functools
import itertools
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from typing import Any
from unittest import mock

import jax
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest
import tensorstore as ts
from bucket import emulated
from disks import no_file_larger_than
from etils import epath
from small_models import assert_same, random_params, small_config

from oapl_jax.config import save_config
from oapl_jax.errors import RunError, UserError, exit_with_code
from oapl_jax.files import file_entry, write_file
from oapl_jax.model import hf
from oapl_jax.model.policy import open_policy
from oapl_jax.model.sharding import make_mesh, parameter_shardings
from oapl_jax.publish import main
from oapl_jax.weights import checkpoint, publisher
from oapl_jax.weights.checkpoint import Weights
from oapl_jax.weights.publisher import COMMITTED, check_version, published_versions, version_path

STEPS = tempfile.TemporaryDirectory()  # removed when the process ends
PIPES: Any = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
SAID = {"tokens": [[3, 1, 2], [5, 5, 6]], "logp": [[-0.5, -1.25], [-3, -0.125]], "dtype": "float32"}


class Tokenizer:
    def save_pretrained(self, directory):
        (pathlib.Path(directory) / "tokenizer.json").write_text('{"a": 1}')


SMALL = small_config(intermediate_size=96)
LARGE = small_config(hidden_size=256, intermediate_size=768, head_dim=64)  # 6 MB


def save(workdir, step, params):
    """Saves an Orbax step to publish."""
    weights = Weights(epath.Path(workdir) / "weights", deadline=60.0)
    weights.save(step, params, SAID)
    weights.close()
    return weights.path(step)


@functools.cache
def orbax_step(seed, config=SMALL):
    return save(tempfile.mkdtemp(dir=STEPS.name), seed, random_params(config, seed))


def write(directory, version, seed=None, config=SMALL, source=None):
    """Publishes an Orbax step: `source`, or one of the parameters of `seed`."""
    source = source or orbax_step(version if seed is None else seed, config)
    settings = dict(tokenizer=Tokenizer(), dtype="float32", config_hash="c0ffee")
    return publisher.publish(
        source, config, version=version, directory=epath.Path(directory), **settings
    )


def assert_holds(path, seed, config=SMALL):
    """The version at `path` is whole and its weights are bit-equal."""
    check_version(path)
    assert hf.load_config(path) == config
    assert_same(hf.load_params(path, config), random_params(config, seed))


def files_below(directory):
    return {
        str(path.relative_to(directory)): (path.read_bytes(), path.stat().st_mtime_ns)
        for path in sorted(pathlib.Path(directory).rglob("*"))
        if path.is_file()
    }


# Whole versions


def test_a_published_version_is_whole_and_loads_bit_equal(tmp_path):
    path = write(tmp_path / "versions", 16)
    assert path == tmp_path / "versions" / "v000016" == version_path(epath.Path(path.parent), 16)
    assert published_versions(epath.Path(path.parent)) == [16]
    assert_holds(path, 16)
    assert (path / "tokenizer.json").read_text() == '{"a": 1}'
    assert [p.name for p in path.parent.iterdir()] == ["v000016"]
    assert publisher.read_probe(path) == SAID

    manifest = json.loads((path / publisher.MANIFEST).read_text())
    assert manifest == publisher.read_manifest(path)
    assert (manifest["version"], manifest["dtype"]) == (16, "float32")
    assert (manifest["parent"], manifest["config_hash"]) == ("weights/16", "c0ffee")
    probe, marks = publisher.PROBE, {publisher.MANIFEST, COMMITTED}
    assert set(manifest["files"]) == {hf.CONFIG, hf.GENERATION, hf.SINGLE, probe, "tokenizer.json"}
    assert {p.name for p in path.iterdir()} == marks | manifest["files"].keys()
    assert all(entry == file_entry(path / name) for name, entry in manifest["files"].items())

    before = files_below(tmp_path)
    assert write(tmp_path / "versions", 16, seed=99) == path  # it is never written again
    assert files_below(tmp_path) == before
    (path / probe).write_text('{"tokens": []}')
    with pytest.raises(UserError, match=probe):
        publisher.read_probe(path)


def test_a_step_saved_on_a_mesh_is_published_bit_equal_in_shards(tmp_path, monkeypatch):
    monkeypatch.setattr(publisher, "MAX_SHARD_BYTES", 10_000)
    mesh = make_mesh(data=1, fsdp=4, context=1, tensor=2)
    params = random_params(SMALL, 3)
    source = save(tmp_path, 3, jax.device_put(params, parameter_shardings(params, mesh)))
    kernel = publisher.open_params(source)["layers/gate/kernel"]
    assert kernel.chunk_layout.read_chunk.shape == (1, 8, 48)  # of (2, 32, 96): 4 by 2 devices
    path = write(tmp_path / "versions", 3, source=source)
    assert_holds(path, 3)
    shards = {p.name for p in path.glob("*.safetensors")}
    assert len(shards) > 3
    assert {*shards, hf.INDEX} < set(publisher.read_manifest(path)["files"])


def test_one_layer_is_in_memory_at_a_time(tmp_path, monkeypatch):
    """Memory grows by less than one of the 7 stacked parameters."""
    monkeypatch.setattr(hf, "READ_AHEAD", 1)
    sizes = dict(hidden_size=512, intermediate_size=1536, num_layers=12, vocab_size=64)
    config = dataclasses.replace(SMALL, head_dim=128, **sizes)
    stacked, layer = 12 * 512 * 1536 * 4, 512 * 1536 * 4
    write(tmp_path, 0, config=config)  # starts all threads
    before = resident("VmRSS")
    pathlib.Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    path = write(tmp_path, 1, seed=0, config=config)
    assert (path / "model.safetensors").stat().length > 4 * stacked
    assert resident("VmHWM") - before < 2 * layer + (24 << 20) < stacked


def resident(which):
    """Resident bytes of this process, now (VmRSS) or at the peak (VmHWM)."""
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(which))


# Steps that can't be published


def parameter_store(source):
    base = {"driver": "file", "path": f"{source}/params/"}
    return ts.KvStore.open({"driver": "ocdbt", "base": base}).result()


def lose_a_parameter(source):
    parameter_store(source).delete_range(ts.KvStore.KeyRange("layers.q.", "layers.q/")).result()


def lose_a_chunk(source):
    store = parameter_store(source)
    assert b"layers.q.kernel/1.0.0" in store.list().result()
    store.write("layers.q.kernel/1.0.0", None).result()


@pytest.mark.parametrize(
    ("damage", "what"),
    [
        (lambda source: source.rmtree(), r"\(have: none\)"),
        (lambda source: source.rename(f"{source}.orbax-checkpoint-tmp"), r"\(have: none\)"),
        (lambda source: (source / "probe").rmtree(), "probe"),
        (lambda source: (source / "params" / "manifest.ocdbt").unlink(), "llama"),
        (lambda source: (source / "params" / "manifest.ocdbt").write_bytes(b"junk"), "parameters"),
        (lose_a_parameter, "layers/q/kernel"),
        (lose_a_chunk, r"layers\.q\.kernel"),
        (None, "embed/embedding"),  # a step of another model
    ],
)
def test_a_step_that_can_not_be_published_is_an_error_and_leaves_nothing(tmp_path, damage, what):
    source = epath.Path(shutil.copytree(orbax_step(16).parent.parent, tmp_path / "run"))
    source, directory = source / "weights" / "16", tmp_path / "versions"
    directory.mkdir()
    if damage:
        damage(source)
    with pytest.raises(UserError, match=what) as caught:
        write(directory, 16, source=source, config=SMALL if damage else LARGE)
    assert str(source) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not list(directory.iterdir())


@pytest.mark.parametrize("reading", ["open_params", "load_probe"])
def test_a_step_that_is_deleted_while_it_is_read_is_not_called_another_model(
    tmp_path, monkeypatch, reading
):
    """A run deletes its older steps beside an evaluation of them, one file after the other."""
    source = epath.Path(shutil.copytree(orbax_step(16).parent.parent, tmp_path / "run"))
    source, directory = source / "weights" / "16", tmp_path / "versions"
    directory.mkdir()
    real, threads = getattr(publisher, reading), []

    def delete():
        for path in sorted(pathlib.Path(source).rglob("*"), reverse=True):
            path.unlink() if path.is_file() else path.rmdir()
            time.sleep(0.02)
        source.rmdir()

    def read(source):
        found = real(source)
        (source / "params").rmtree()
        threads.append(threading.Thread(target=delete))
        threads[-1].start()
        return found

    monkeypatch.setattr(publisher, reading, read)
    with pytest.raises(UserError, match=f"{source}.*deleted meanwhile"):
        write(directory, 16, source=source, config=SMALL)
    threads[0].join()
    assert not list(directory.iterdir())


# Damaged versions


def flip_a_bit(path):
    content = bytearray((path / "model.safetensors").read_bytes())
    content[len(content) // 2] ^= 1
    (path / "model.safetensors").write_bytes(bytes(content))


def substitute(name, old, new):
    return lambda path: (path / name).write_text((path / name).read_text().replace(old, new, 1))


@pytest.mark.parametrize(
    ("damage", "what"),
    [
        (shutil.rmtree, "v000016 is missing"),
        (flip_a_bit, "model.safetensors"),
        (substitute("config.json", "32", "33"), "config.json"),
        (lambda path: (path / "tokenizer.json").unlink(), "tokenizer.json"),
        (lambda path: (path / COMMITTED).unlink(), COMMITTED),
        (lambda path: (path / publisher.MANIFEST).unlink(), publisher.MANIFEST),
        (lambda path: (path / publisher.MANIFEST).write_text("{}"), publisher.MANIFEST),
        (substitute(publisher.MANIFEST, "xxh128", "xxh129"), "is missing or damaged"),
    ],
)
def test_a_damaged_version_is_an_error_that_names_it(tmp_path, damage, what):
    path = write(tmp_path, 16)
    check_version(path)
    damage(path)
    with pytest.raises(UserError, match=what) as caught:
        check_version(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("damage", "names"),
    [
        (lambda path: None, []),
        (flip_a_bit, ["model.safetensors"]),
        (substitute("config.json", "32", "33"), ["config.json"]),
        (lambda path: (path / "tokenizer.json").unlink(), ["tokenizer.json"]),
    ],
)
def test_damaged_files_are_restored_from_the_step_that_made_them(tmp_path, damage, names):
    path = write(tmp_path, 16)
    damage(path)
    kept = {n: v for n, v in files_below(tmp_path).items() if n.partition("/")[2] not in names}
    assert publisher.repair(path, lambda below: write(below, 16)) == names
    assert_holds(path, 16)
    assert files_below(tmp_path).items() >= kept.items()
    assert [p.name for p in path.parent.iterdir()] == ["v000016"]


@pytest.mark.parametrize(
    ("damage", "seed", "what"),
    [
        (flip_a_bit, 17, "model.safetensors"),  # weights of another run
        (lambda path: (path / publisher.MANIFEST).write_text("{}"), 16, publisher.MANIFEST),
    ],
)
def test_a_version_that_can_not_be_restored_stays_as_it_is(tmp_path, damage, seed, what):
    path = write(tmp_path, 16)
    damage(path)
    before = files_below(tmp_path)
    with pytest.raises(UserError, match=what):
        publisher.repair(path, lambda below: write(below, 16, seed))
    assert files_below(tmp_path) == before


# Collection


def test_collect_keeps_the_named_versions_and_deletes_uncommitted_ones(tmp_path):
    directory = epath.Path(tmp_path)
    for version in (1234567, 2, 0, 1):
        write(directory, version)
    assert published_versions(directory) == [0, 1, 2, 1234567]
    (directory / "v000002" / COMMITTED).unlink()
    (directory / "v000009.writing").mkdir()
    (directory / "v000009.writing" / "model.safetensors").write_text("half")
    (directory / "notes.txt").write_text("mine")
    assert publisher.collect(directory, keep={1, 2, 7}) == [0, 1234567]
    assert published_versions(directory) == [1]
    assert sorted(p.name for p in directory.iterdir()) == ["notes.txt", "v000001"]
    assert_holds(version_path(directory, 1), 1)
    assert publisher.collect(directory, keep={1}) == []
    assert publisher.collect(directory / "none", keep=set()) == []


def test_collect_deletes_the_marker_first(tmp_path, monkeypatch):
    write(tmp_path, 0)
    crash = mock.Mock(side_effect=KeyboardInterrupt)
    monkeypatch.setattr(type(epath.Path(tmp_path)), "rmtree", crash)
    with pytest.raises(KeyboardInterrupt):
        publisher.collect(epath.Path(tmp_path), keep=set())
    assert published_versions(epath.Path(tmp_path)) == []
    assert (tmp_path / "v000000" / "model.safetensors").exists()


# Failing disks


def test_a_full_disk_is_an_error_and_loses_nothing(tmp_path):
    directory, source = epath.Path(tmp_path / "versions"), orbax_step(0, LARGE)
    write(directory, 0, config=LARGE)
    before = files_below(directory), files_below(source)
    refused = pytest.raises(RunError, match=r"version 8 .* File too large")
    with no_file_larger_than(1 << 20), refused as caught:
        write(directory, 8, seed=0, config=LARGE)
    assert str(directory) in str(caught.value)
    assert (files_below(directory), files_below(source)) == before
    assert_holds(write(directory, 8, seed=0, config=LARGE), 0, LARGE)


@pytest.mark.parametrize("sync", range(10))
def test_a_failed_fsync_leaves_a_version_complete_or_absent(tmp_path, monkeypatch, sync):
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
    assert found == ([0] if sync < 7 else [0, 8])  # the last three come after the commit
    assert len(list(directory.iterdir())) == len(found)
    for version in found:
        assert_holds(version_path(directory, version), version)


# The command


@pytest.fixture
def workdir(tmp_path):
    """A run's workdir: Orbax step 8, and its model with a tokenizer."""
    workdir = epath.Path(tmp_path / "run")
    sizes = SMALL.to_hf(dtype="float32")
    policy = open_policy(workdir / "model", path="", architecture=sizes, characters="0123456789+=")
    save(workdir, 8, random_params(policy.config, 8))
    saved = {"model": {"path": ""}, "publish_dtype": "bfloat16", "num_steps": 9, "ks": (1, 2)}
    save_config(workdir, saved)
    return workdir


def command(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["publisher", *map(str, arguments)])
    exit_with_code(main)


def test_the_command_publishes_a_step(workdir, tmp_path, monkeypatch, capsys):
    config = hf.load_config(workdir / "model")
    command(monkeypatch, f"--from={workdir}", "--step=8", f"--to={tmp_path}/a")
    path = epath.Path(tmp_path / "a" / "v000008")
    assert capsys.readouterr().out == f"{path}\n"
    check_version(path)
    manifest = publisher.read_manifest(path)
    assert (manifest["parent"], manifest["dtype"]) == ("weights/8", "bfloat16")
    rounded = lambda x: x.astype(ml_dtypes.bfloat16).astype(np.float32)
    expected = jax.tree.map(rounded, random_params(config, 8))
    assert_same(hf.load_params(path, config), expected)
    saved = {"publish_dtype": "bfloat16", "num_steps": 9, "ks": [1, 2], "model": {"path": ""}}
    assert manifest["config_hash"] == publisher.config_hash(saved)
    assert manifest["config_hash"] != publisher.config_hash({**saved, "ks": [1, 3]})
    assert publisher.CARD in manifest["files"]

    (workdir / "weights").rename(workdir / "checkpoints")  # of which steps have checksums
    params = {"params": random_params(config, 8)}
    sums = {"probe": checkpoint.digest(SAID), **checkpoint.checksums(params)}
    path = workdir / "checkpoints" / "8" / "checksums"
    path.mkdir()
    ocp.JsonCheckpointHandler().save(path, args=ocp.args.JsonSave(sums))
    monkeypatch.chdir(tmp_path)
    command(monkeypatch, "--from=run", "--step=8", "--dtype=float32", "--to=b")
    path = epath.Path(tmp_path / "b" / "v000008")
    assert capsys.readouterr().out == f"{path}\n"
    assert publisher.read_manifest(path)["parent"] == "checkpoints/8"
    assert_holds(path, 8, config)


def test_mistakes_on_the_command_line_are_one_sentence(workdir, tmp_path, monkeypatch, capsys):
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
        ([source, "--to=", "--step=8"], "--to"),
        (["--from=", to, "--step=8"], "--from"),
        ([source, f"--to={tmp_path}/[a]", "--step=8"], "--to"),
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


# Object stores


@pytest.fixture(scope="module")
def bucket():
    with emulated("fleet") as bucket:
        yield bucket


@pytest.fixture
def store(bucket, runs=itertools.count()):  # noqa: B008
    """A new directory; a test's name is unfit, since [ and ] would be a pattern."""
    return bucket / f"run{next(runs)}"


def test_the_command_publishes_from_store_to_store(store, workdir, monkeypatch):
    config = hf.load_config(workdir / "model")
    save(store / "run", 8, random_params(config, 8))
    (store / "run" / "model").mkdir(parents=True)
    for name in ("config.json", *(f"model/{path.name}" for path in (workdir / "model").iterdir())):
        (store / "run" / name).write_bytes((workdir / name).read_bytes())
    command(monkeypatch, f"--from={store}/run", "--step=8", f"--to={store}/versions")
    path = version_path(store / "versions", 8)
    check_version(path)
    assert publisher.read_probe(path) == SAID
    assert {"tokenizer.json", "tokenizer_config.json"} < set(publisher.read_manifest(path)["files"])
    with pytest.raises(UserError, match=r"\(have: 8\)"):
        write(store / "versions", 9, source=store / "run" / "weights" / "9")


WATCHER = """
import sys
from etils import epath
from oapl_jax.weights import publisher
from oapl_jax.weights.publisher import check_version, published_versions, version_path

directory = epath.Path(sys.argv[1])
for line in sys.stdin:
    found = published_versions(directory)
    path = version_path(directory, 16)
    print(found, path.exists(), 16 in found and publisher.read_probe(path)["tokens"], flush=True)
"""


def test_a_reader_of_a_store_sees_versions_of_another_process(store):
    """Clients of object stores cache listings."""
    with subprocess.Popen([sys.executable, "-c", WATCHER, store / "versions"], **PIPES) as watcher:

        def look():
            print(file=watcher.stdin, flush=True)
            return watcher.stdout.readline()

        assert look() == "[] False False\n"
        write(store / "versions", 8)
        assert look() == "[8] False False\n"
        write(store / "versions", 16)
        assert look() == f"[8, 16] True {SAID['tokens']}\n"
        publisher.collect(store / "versions", keep={8})
        assert look() == "[8] False False\n"
        watcher.stdin.close()


# Crashes


def crash_at_line(count):
    """A tracer that raises at the `count`-th line that publisher.py executes."""
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

    def save_params(params, config, directory, **_):
        return {"model.safetensors": write_file(directory / "model.safetensors", [weights])}

    monkeypatch.setattr(hf, "save_params", save_params)
    monkeypatch.setattr(publisher, "open_params", lambda source: {})
    monkeypatch.setattr(publisher, "load_probe", lambda source: SAID)
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    directory = epath.Path(request.getfixturevalue(place)) / "versions"
    target = version_path(directory, 8)
    crashes, whole, tracing = 0, 0, sys.gettrace()
    while True:
        publisher.collect(directory, keep=set())
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
            with pytest.raises(UserError, match="v000008"):
                check_version(target)
        check_version(write(directory, 8))
        assert (target / "model.safetensors").read_bytes() == weights
        assert [path.name for path in directory.iterdir()] == ["v000008"]
    assert crashes > 25
    assert 0 < whole < crashes / 3  # nothing undoes a commit


def publish_forever(source, directory):
    for version in itertools.count():
        write(directory, version, config=LARGE, source=source)
        print("published", flush=True)
        publisher.collect(directory, keep={version - 1, version})


def fork_publishers():
    """For each directory on stdin, forks a process that publishes there until it is killed.

    Packages are imported once; JAX and TensorStore start their threads after the fork.
    """
    source = epath.Path(sys.argv[1])
    for line in sys.stdin:
        child = os.fork()
        if not child:
            print("child", os.getpid(), flush=True)
            publish_forever(source, epath.Path(line.strip()))
        os.waitpid(child, 0)
        print("dead", flush=True)


def fetch(path, directory):
    """Copies a version to the disk."""
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
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, __file__, source]
    with subprocess.Popen(command, env=environment, **PIPES) as publishers:
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
            publisher.collect(directory, keep={last})
            assert [path.name for path in directory.iterdir()] == [f"v{last:06d}"]
        publishers.stdin.close()
    # On disk most kills hit a half-written version; an object is there or not.
    assert halves or place == "store"


if __name__ == "__main__":
    fork_publishers()
