"""Crash-safe files: atomic write, fsync while writing, checksums, manifests, prefetch."""

import os
import threading

import numpy as np
import pytest
import xxhash
from disks import no_file_larger_than
from etils import epath

from oapl_jax import files
from oapl_jax.errors import UserError, one_line


@pytest.mark.parametrize("write", [files.write_file, files.write_atomically])
def test_parts_are_written_end_to_end_and_hashed(tmp_path, write):
    parts = [b"abc", b"", np.arange(5, dtype=np.uint8).data, b"z"]
    path = epath.Path(tmp_path / "file")
    entry = write(path, iter(parts))
    content = b"abc\x00\x01\x02\x03\x04z"
    assert path.read_bytes() == content
    assert entry == files.file_entry(path)
    assert entry == {"bytes": 9, "xxh128": xxhash.xxh3_128_hexdigest(content)}
    assert write(path, []) == {"bytes": 0, "xxh128": "99aa06d3014798d86001c324468d497f"}
    assert files.checksum(path) == "99aa06d3014798d86001c324468d497f"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_a_failed_write_keeps_the_old_content(tmp_path):
    def parts():
        yield b"half"
        raise OSError("the disk is full")

    files.write_atomically(tmp_path / "file", [b"old"])
    with pytest.raises(OSError, match="full"):
        files.write_atomically(tmp_path / "file", parts())
    assert (tmp_path / "file").read_bytes() == b"old"
    files.write_atomically(tmp_path / "file", [b"new"])
    assert (tmp_path / "file").read_bytes() == b"new"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_a_full_disk_names_the_file_at_the_close_too(tmp_path):
    """The close writes what the buffer still holds."""
    path = epath.Path(tmp_path / "ledger.jsonl")
    lines = files.JsonLines(path, exclusive=False)
    with no_file_larger_than(10):
        for write in (lambda: lines.append({"event": "request"}), lines.close):
            with pytest.raises(OSError, match="File too large") as caught:
                write()
            assert caught.value.filename == str(path)


def test_a_directory_of_a_flag(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert files.flag_directory("to", "a/../b") == files.flag_directory("to", "~/b")
    assert os.fspath(files.flag_directory("to", "gs://a/b")) == "gs://a/b"
    for value in ("", "a*", "[a]", "a?", "~/a\\b"):
        with pytest.raises(UserError, match="--to"):
            files.flag_directory("to", value)


def test_of_two_processes_that_write_at_once_the_last_stays(tmp_path):
    def parts():
        yield b"mine"
        files.write_atomically(tmp_path / "file", [b"the other's"])
        assert (tmp_path / "file").read_bytes() == b"the other's"
        yield b", whole"

    files.write_atomically(tmp_path / "file", parts())
    assert (tmp_path / "file").read_bytes() == b"mine, whole"


def test_fsync_starts_before_the_last_part_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "SYNC_EVERY", 4)
    synced, fsync = [], os.fsync

    def note(descriptor):
        synced.append(os.fstat(descriptor).st_size)
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", note)

    def parts():
        for _ in range(5):
            yield bytes(4)
            while not synced:  # until the sync of the first part begins
                threading.Event().wait(0.001)

    files.write_file(epath.Path(tmp_path / "file"), parts())
    assert (synced[0], synced[-1]) == (4, 20)


def test_a_failed_fsync_in_the_background_raises(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "SYNC_EVERY", 1)
    real, fails = os.fsync, iter([True, False, False, False])

    def fsync(descriptor):
        if next(fails):
            raise OSError("the disk is gone")
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(OSError, match="the disk is gone"):
        files.write_file(epath.Path(tmp_path / "file"), [b"a", b"b"])


@pytest.mark.parametrize("content", [b"ac", b"abc", None])
def test_a_file_that_differs_from_its_manifest_entry_is_refused(tmp_path, content):
    directory = epath.Path(tmp_path)
    write = lambda name: {**files.write_file(directory / name, [name.encode()]), "more": 1}
    entries = {name: write(name) for name in ("a", "ab")}
    files.check_files(directory, entries, remedy="")
    (directory / "ab").unlink() if content is None else (directory / "ab").write_bytes(content)
    with pytest.raises(UserError, match=r"\bab\b.*copy it"):
        files.check_files(directory, entries, remedy="copy it")


@pytest.mark.parametrize("text", [None, "", "[]", "3", '{"b": 1}'])
def test_a_json_file_without_the_fields_is_refused(tmp_path, text):
    path = epath.Path(tmp_path / "manifest.json")
    path.write_text('{"a": 1, "b": 2}')
    assert files.read_json(path, ["a"], remedy="") == {"a": 1}
    path.unlink() if text is None else path.write_text(text)
    with pytest.raises(UserError, match=r"manifest.json .*; copy it"):
        files.read_json(path, ["a"], remedy="copy it")


def test_prefetched_results_come_in_order_and_within_the_budget():
    live, most, lock = 0, 0, threading.Lock()

    def make(cost):
        nonlocal live, most
        with lock:
            live += cost
            most = max(most, live)
        return cost

    costs = [3, 1, 1, 9, 2, 2, 2, 2, 5, 1]
    found = []
    for cost in files.prefetch(make, costs, cost=lambda cost: cost, budget=6):
        found.append(cost)
        with lock:
            live -= cost  # asked for: no longer ahead
    assert found == costs
    assert 6 >= most - 9 >= 0  # the 9 alone


def test_prefetch_raises_in_the_caller_and_closing_ends_its_threads():
    threads = threading.active_count()
    results = files.prefetch(lambda x: 1 / x, [1, 2, 0, 4], cost=lambda x: 1, budget=2)
    assert [next(results), next(results)] == [1, 0.5]
    with pytest.raises(ZeroDivisionError):
        next(results)
    unfinished = files.prefetch(lambda x: x, range(100), cost=lambda x: 1, budget=2)
    assert next(unfinished) == 0
    unfinished.close()
    assert threading.active_count() == threads


def test_an_error_is_one_line():
    assert one_line(ValueError("first\nsecond")) == "ValueError: first"
    assert one_line(OSError()) == "OSError: "


def test_a_code_digest_ignores_comments_docstrings_and_layout(tmp_path):
    def digest(source):
        (tmp_path / "module.py").write_text(source)
        return files.code_digest([tmp_path / "module.py"])

    plain = digest("def f(x):\n    return x + 1\n")
    assert digest('"""A."""\n\ndef f(x):  # b\n    "C."\n    return (\n  x + 1)\n') == plain
    assert digest("def f(x):\n    return x + 2\n") != plain
