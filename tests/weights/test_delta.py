"""Deltas of versions: bits, bases, chains, collection, repair; on a disk and in a bucket."""

import itertools
import pathlib
import shutil
import tempfile
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from bucket import emulated
from disks import no_file_larger_than
from etils import epath
from small_models import small_config

from oapl_jax.errors import UserError
from oapl_jax.files import checksum, write_file
from oapl_jax.model import hf
from oapl_jax.weights import delta, publisher, versions
from oapl_jax.weights.publisher import (
    check_version,
    checked_version,
    fetch_version,
    published_versions,
    version_path,
)

SIZE = 20_000  # numbers of a version
WEIGHTS, DELTA = "model.safetensors", "model.safetensors.xor.zst"
ADAPTER = "adapter/adapter_model.safetensors"


def weights_of(version: int, dtype: str = "bfloat16") -> bytes:
    """Random bits, of which each version changes a few low ones."""
    width = {"bfloat16": np.uint16, "float32": np.uint32}[dtype]
    bits = np.random.default_rng(0).integers(0, np.iinfo(width).max, SIZE, width)
    for step in range(1, version + 1):
        rng = np.random.default_rng(step)
        bits[rng.choice(SIZE, SIZE // 100)] ^= width(1)
    return bits.tobytes()


class Tokenizer:
    def save_pretrained(self, directory):
        (epath.Path(directory) / "tokenizer.json").write_text("{}")


@pytest.fixture(scope="module")
def bucket():
    with emulated("deltas") as bucket:
        yield bucket


@pytest.fixture(params=["disk", "bucket"])
def workdir(request, tmp_path, numbers=itertools.count()):  # noqa: B008
    if request.param == "disk":
        return epath.Path(tmp_path) / "run"
    return request.getfixturevalue("bucket") / str(next(numbers))


@pytest.fixture
def said(monkeypatch):
    lines: list[str] = []
    monkeypatch.setattr(versions, "log", lines.append)
    return lines


@pytest.fixture
def open_run(tmp_path, monkeypatch):
    """Opens the versions of a run whose weights follow from the step."""

    def save_params(params, config, directory, *, dtype, **_):
        (directory / ADAPTER).parent.mkdir(parents=True, exist_ok=True)
        weights = weights_of(params, dtype)
        contents = {WEIGHTS: weights, ADAPTER: weights, "config.json": b"{}"}
        return {name: write_file(directory / name, [text]) for name, text in contents.items()}

    monkeypatch.setattr(hf, "save_params", save_params)
    monkeypatch.setattr(publisher, "open_params", lambda source: int(source.name))
    monkeypatch.setattr(publisher, "load_probe", lambda source: {})
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    nothing: Any = None
    weights = SimpleNamespace(
        save=lambda step, params, probe: None,
        wait=lambda: None,
        path=lambda step: epath.Path("weights") / str(step),
        keep_only=lambda steps: None,
        close=lambda: None,
    )
    monkeypatch.setattr(versions, "Weights", lambda directory, *, deadline: weights)

    def opened(workdir, **settings):
        how: Any = dict(dtype="bfloat16", full_every=3, config={}, deadline=30.0)
        parts = small_config(), Tokenizer(), nothing, lambda params: {}
        return versions.Versions(workdir, *parts, **how | settings)

    return opened


def publish(run, *steps):
    for step in steps:
        run.publish(step, None)


def deltas(run):
    return [v for v in published_versions(run.directory) if hf.is_delta(run.path(v))]


def assert_holds(path, to, version):
    """A fetched copy is whole and has the version's bits."""
    copy = fetch_version(path, epath.Path(to))
    check_version(copy)
    for name in (WEIGHTS, ADAPTER):
        assert (copy / name).read_bytes() == weights_of(version)
    files = [p for p in pathlib.Path(copy).rglob("*") if p.is_file()]
    files = {str(p.relative_to(copy)) for p in files}
    marks = {publisher.MANIFEST, publisher.COMMITTED}
    assert files == marks | publisher.read_manifest(path)["files"].keys()


# The format


@pytest.mark.parametrize("size", [0, 1, 3, 4096, 4097, 10_001])
@pytest.mark.parametrize("itemsize", [2, 4])
def test_base_and_delta_give_the_bits(tmp_path, monkeypatch, size, itemsize):
    monkeypatch.setattr(delta, "PART_BYTES", 4096)
    rng = np.random.default_rng(size)
    file, base, stored = (epath.Path(tmp_path) / name for name in ("file", "base", "stored"))
    file.write_bytes(rng.bytes(size))
    base.write_bytes(rng.bytes(size))
    write_file(stored, delta.encode(file, base, itemsize=itemsize))
    decoded = b"".join(delta.decode(stored, base, itemsize=itemsize))
    assert decoded == file.read_bytes()


@pytest.mark.parametrize(("version", "most"), [(0, 0.001), (1, 0.02), (8, 0.08)])
def test_a_delta_is_as_small_as_the_changes_are_few(tmp_path, version, most):
    file, base = epath.Path(tmp_path) / "file", epath.Path(tmp_path) / "base"
    file.write_bytes(weights_of(version))
    base.write_bytes(weights_of(0))
    size = sum(map(len, delta.encode(file, base, itemsize=2)))
    assert size < most * file.stat().length + 64


def test_a_base_of_another_size_is_refused(tmp_path):
    file, base, stored = (epath.Path(tmp_path) / name for name in ("file", "base", "stored"))
    file.write_bytes(b"12345678")
    base.write_bytes(b"1234")
    with pytest.raises(delta.WrongBase, match="base"):
        list(delta.encode(file, base, itemsize=2))
    write_file(stored, delta.encode(base, base, itemsize=2))
    with pytest.raises(delta.WrongBase, match="stored"):
        list(delta.decode(stored, file, itemsize=2))


# Chains


def test_every_third_version_is_whole_and_each_comes_back(workdir, open_run, tmp_path, said):
    run = open_run(workdir)
    publish(run, 0, 2, 4, 6, 8)
    assert deltas(run) == [2, 4, 8]
    for number, version in enumerate((8, 4, 0, 2, 6)):  # of a delta the chain is fetched
        assert_holds(run.path(version), tmp_path / str(number), version)
        check_version(run.path(version))
        with checked_version(run.path(version)) as path:
            assert (path / WEIGHTS).read_bytes() == weights_of(version)
        assert len(list((tmp_path / str(number)).iterdir())) == 1
    stored = (run.path(2) / DELTA).stat().length
    assert stored < 0.05 * len(weights_of(2))
    assert not said
    run.close()
    assert not list((tmp_path / "temporary").glob("*/*"))


def test_a_resumed_run_goes_on_with_the_chain(workdir, open_run, tmp_path, said):
    publish(open_run(workdir), 0, 2)
    shutil.rmtree(tmp_path / "temporary")  # the run goes on on another machine
    (tmp_path / "temporary").mkdir()
    run = open_run(workdir)
    publish(run, 2, 4, 6)
    assert deltas(run) == [2, 4]
    assert_holds(run.path(4), tmp_path / "copies", 4)
    assert not said


@pytest.mark.parametrize(
    ("kept", "left"),
    [({8}, [6, 8]), ({6}, [6]), ({4}, [0, 2, 4]), ({2, 8}, [0, 2, 6, 8]), (set(), [])],
)
def test_versions_that_a_kept_one_needs_stay(tmp_path, open_run, kept, left):
    run = open_run(epath.Path(tmp_path) / "run")
    publish(run, 0, 2, 4, 6, 8)
    run.keep_only(kept)
    assert published_versions(run.directory) == left
    for version in left:
        check_version(run.path(version))


def test_one_without_deltas_has_none(tmp_path, open_run):
    run = open_run(epath.Path(tmp_path) / "run", full_every=1)
    publish(run, 0, 2, 4)
    assert deltas(run) == []
    run.keep_only({4})
    assert published_versions(run.directory) == [4]


# Bases that can't be used


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))


def republish(run):
    """Version 0 of a run that was killed and began with other weights."""
    run.path(0).rmtree()
    (other,) = run.directory.parent.glob("other")
    shutil.copytree(other, run.path(0))


DAMAGE = {
    "the delta": lambda run: flip(run.path(2) / DELTA),
    "no delta": lambda run: (run.path(2) / DELTA).unlink(),
    "the base": lambda run: flip(run.path(0) / WEIGHTS),
    "no base": lambda run: run.path(0).rmtree(),
    "an uncommitted base": lambda run: (run.path(0) / publisher.COMMITTED).unlink(),
    "another base": republish,
}


@pytest.fixture
def chain(tmp_path, open_run):
    """Versions 0, 2 and 4, and another version 0 beside them."""
    run = open_run(epath.Path(tmp_path) / "run")
    publish(run, 0, 2, 4)
    path = run.path(0)
    other = shutil.copytree(path, epath.Path(tmp_path) / "run" / "other")
    for name in (WEIGHTS, ADAPTER):
        (other / name).write_bytes(weights_of(9))
    manifest = (other / publisher.MANIFEST).read_text()
    before, after = checksum(path / WEIGHTS), checksum(other / WEIGHTS)
    (other / publisher.MANIFEST).write_text(manifest.replace(before, after))
    check_version(other)
    return run


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_chain_is_refused_and_leaves_nothing(chain, tmp_path, damage):
    DAMAGE[damage](chain)
    to = epath.Path(tmp_path) / "copies"
    for check in (check_version, lambda path: fetch_version(path, to)):
        with pytest.raises(UserError, match="v00000") as caught:
            check(chain.path(4))
        assert "\n" not in str(caught.value)
    assert not list(to.iterdir())


def test_a_delta_of_other_weights_is_refused(chain, tmp_path):
    """Base and delta have their checksums, and the result has not."""
    manifest = chain.path(2) / publisher.MANIFEST
    entry = publisher.read_manifest(chain.path(2))["files"][WEIGHTS]["xxh128"]
    manifest.write_text(manifest.read_text().replace(entry, entry[::-1]))
    with pytest.raises(UserError, match="safetensors"):
        fetch_version(chain.path(2), epath.Path(tmp_path) / "copies")


def test_a_copy_of_the_base_is_enough(chain, tmp_path):
    to, lines = epath.Path(tmp_path) / "copies", []
    base = fetch_version(chain.path(2), to, log=lines.append)
    assert any("v000000" in line for line in lines)  # the chain
    lines.clear()
    chain.path(0).rmtree()
    fetch_version(chain.path(4), to, log=lines.append)
    assert not lines
    assert base.exists()


def test_a_damaged_copy_of_the_base_is_fetched_again(chain, tmp_path):
    to, lines = epath.Path(tmp_path) / "copies", []
    flip(fetch_version(chain.path(2), to) / WEIGHTS)
    assert_holds(chain.path(4), tmp_path / "elsewhere", 4)
    copy = fetch_version(chain.path(4), to, log=lines.append)
    assert "v000002" in lines[0]
    assert (copy / WEIGHTS).read_bytes() == weights_of(4)


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_version_is_published_whole_if_its_base_can_not_be_used(
    tmp_path, open_run, chain, said, damage
):
    DAMAGE[damage](chain)
    shutil.rmtree(tmp_path / "temporary")
    (tmp_path / "temporary").mkdir()
    run = open_run(chain.directory.parent, full_every=9)
    publish(run, 6)
    assert "version 6 is published whole" in said[0]
    assert deltas(run)[-1] == 4
    check_version(run.path(6))


def test_a_version_of_another_dtype_is_whole(tmp_path, open_run, chain, said):
    run = open_run(chain.directory.parent, full_every=9, dtype="float32")
    publish(run, 6)
    assert deltas(run)[-1] == 4
    assert (run.path(6) / WEIGHTS).read_bytes() == weights_of(6, "float32")
    assert not said


@pytest.mark.parametrize("copied", [False, True])
def test_a_full_local_disk_ends_no_run_in_a_bucket(bucket, open_run, said, monkeypatch, copied):
    """With the base's copy there, the version itself does not fit."""
    monkeypatch.setattr(hf, "load_params", lambda path, *_, **how: path)
    run = open_run(bucket / f"full disk, {copied}")
    publish(run, 0)
    if copied:
        run.load(0)
    with no_file_larger_than(1000):
        publish(run, 2)
    assert "version 2 is published whole" in said[0]
    assert deltas(run) == []
    assert (run.path(2) / WEIGHTS).read_bytes() == weights_of(2)
    publish(run, 4)
    assert deltas(run) == [4]
    run.close()


def test_versions_that_are_loaded_at_each_step_are_fetched_once(bucket, open_run, monkeypatch):
    fetched, fetch = [], publisher.fetch
    note = lambda path, files, *_, **how: fetched.append(path.name) or fetch(path, files, *_, **how)
    monkeypatch.setattr(publisher, "fetch", note)
    monkeypatch.setattr(hf, "load_params", lambda path, *_, **how: (path / WEIGHTS).read_bytes())
    run = open_run(bucket / "loaded", full_every=1)
    publish(run, *range(6))
    for _ in range(3):
        for version in (1, 2, 3):
            assert run.load(version) == weights_of(version)
    assert sorted(set(fetched)) == ["v000001", "v000002", "v000003"]
    assert len(fetched) == 6  # each, and its manifest
    for version in range(6):
        run.load(version)
    assert len(list(run.copies.iterdir())) == versions.LOADED
    run.close()
    assert not run.copies.exists()


# Damaged versions of a run that resumes


@pytest.mark.parametrize("damage", DAMAGE)
def test_weights_replace_a_delta_that_can_not_be_read(chain, open_run, tmp_path, damage):
    """Orbax steps are left of versions 2 and 4 alone: what version 0 lost stays lost."""
    DAMAGE[damage](chain)
    run = open_run(chain.directory.parent)
    again = run.publish_step

    def publish_step(source, version, directory):
        if not version:
            raise UserError("version 0 has no Orbax step")
        return again(source, version, directory)

    run.publish_step = publish_step
    assert run.repair() == {2: [ADAPTER, WEIGHTS]}
    for version in (2, 4):
        check_version(run.path(version))
        assert_holds(run.path(version), tmp_path / "copies", version)
    assert deltas(run) == [4]
    run.keep_only({4})
    assert published_versions(run.directory) == [2, 4]


# Readers that take no deltas


def test_readers_of_checkpoints_name_the_delta(chain):
    path = chain.path(2)
    for load in (
        lambda: publisher.check_loadable(path),
        lambda: hf.load_params(path, small_config()),
    ):
        with pytest.raises(UserError, match=r"fleet\.fetch"):
            load()
    publisher.check_loadable(chain.path(0))
    assert version_path(chain.directory, 2) == path
