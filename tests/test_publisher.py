"""Published versions: whole or absent, whatever happens to the writer; checked; collected.

Run as a program, this file publishes for ever in a forked process, to be killed.
"""

import functools
import itertools
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time
from typing import Any

import numpy as np
import pytest
from etils import epath
from flax.traverse_util import flatten_dict, unflatten_dict

from oapl_jax import publisher
from oapl_jax.errors import UserError
from oapl_jax.models import hf
from oapl_jax.models.config import ModelConfig
from oapl_jax.publisher import (
    COMMITTED,
    MANIFEST,
    check_version,
    collect,
    publish,
    published_versions,
    version_path,
)

KILLS = 4


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


SMALL = make_config()


def write(directory, version, seed=None, config=SMALL, dtype="float32"):
    return publish(
        make_params(config, version if seed is None else seed),
        config,
        version=version,
        directory=epath.Path(directory),
        tokenizer=Tokenizer(),
        dtype=dtype,
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
    assert (manifest["version"], manifest["dtype"]) == (16, "float32")
    assert set(manifest["files"]) == {"config.json", "model.safetensors", "tokenizer.json"}
    assert {p.name for p in path.iterdir()} == {*manifest["files"], MANIFEST, COMMITTED}
    for name, entry in manifest["files"].items():
        shown = subprocess.run(["sha256sum", path / name], capture_output=True, text=True)
        assert entry == {"bytes": (path / name).stat().st_size, "sha256": shown.stdout.split()[0]}


def test_bfloat16_halves_the_file(tmp_path):
    sizes = [
        (write(tmp_path / dtype, 0, dtype=dtype) / "model.safetensors").stat().length
        for dtype in ("float32", "bfloat16")
    ]
    assert 1.8 < sizes[0] / sizes[1] < 2
    check_version(epath.Path(tmp_path / "bfloat16" / "v000000"))


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


def empty_the_manifest(path):
    (path / MANIFEST).write_text("{}")


@pytest.mark.parametrize(
    ("damage", "what"),
    [
        (shutil.rmtree, "is missing"),
        (damage_weights, "model.safetensors .* damaged"),
        (damage_config, "config.json .* damaged"),
        (lose_a_file, "tokenizer.json .* is missing"),
        (lose_the_marker, "not written to its end"),
        (lose_the_manifest, f"{MANIFEST} .* missing or damaged"),
        (empty_the_manifest, f"{MANIFEST} .* missing or damaged"),
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


def test_a_crash_at_any_line_leaves_a_version_whole_or_absent(tmp_path, monkeypatch):
    weights = (write(tmp_path / "whole", 8) / "model.safetensors").read_bytes()

    def save_params(params, config, directory, **_):  # as the real one, but in no time
        (directory / "model.safetensors").write_bytes(weights)
        (directory / "config.json").write_text("{}")

    monkeypatch.setattr(hf, "save_params", save_params)
    directory = epath.Path(tmp_path / "versions")
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
            with pytest.raises(UserError, match=r"v000008 (is missing|was not written)"):
                check_version(target)
        check_version(write(directory, 8))
        assert (target / "model.safetensors").read_bytes() == weights
        assert [path.name for path in directory.iterdir()] == ["v000008"]
    assert crashes > 60
    assert 0 < whole < crashes / 3  # once the marker is there, nothing undoes it


LARGE = make_config(256)  # 6 MB


def publish_for_ever(directory):
    params = make_params(LARGE, 0)
    for version in itertools.count():
        publish(
            params,
            LARGE,
            version=version,
            directory=directory,
            tokenizer=Tokenizer(),
            dtype="float32",
        )
        print("published", flush=True)
        collect(directory, keep={version - 1, version})


def fork_publishers():
    """For each directory on stdin, forks a process that publishes there until it is killed.

    So packages are imported once; jax starts its threads behind the fork.
    """
    for line in sys.stdin:
        child = os.fork()
        if not child:
            print("child", os.getpid(), flush=True)
            publish_for_ever(epath.Path(line.strip()))
        os.waitpid(child, 0)
        print("dead", flush=True)


def test_a_killed_process_leaves_every_version_whole_or_absent(tmp_path):
    rng = np.random.default_rng()
    halves = 0
    with subprocess.Popen(
        [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as publishers:
        assert publishers.stdin
        assert publishers.stdout
        lines = iter(publishers.stdout)
        reply = lambda word: next(line for line in lines if line.startswith(word))
        for kill in range(KILLS):
            directory = epath.Path(tmp_path / str(kill))
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
                assert_holds(version_path(directory, version), 0, LARGE)
            whole = {version_path(directory, version).name for version in found}
            halves += len({path.name for path in directory.iterdir()} - whole)

            last = found[-1] + 1
            assert_holds(write(directory, last, seed=0, config=LARGE), 0, LARGE)
            collect(directory, keep={last})
            assert [path.name for path in directory.iterdir()] == [f"v{last:06d}"]
        publishers.stdin.close()
    assert halves  # most kills hit a version half-written


if __name__ == "__main__":
    fork_publishers()
