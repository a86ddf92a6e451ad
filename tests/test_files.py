"""Files written in one go: what is in them, what is said of them, what is made ahead."""

import os
import threading

import numpy as np
import pytest
import xxhash
from etils import epath

from oapl_jax import files
from oapl_jax.files import ahead, one_line, write_file


def test_parts_are_written_end_to_end_and_summed(tmp_path):
    parts = [b"abc", b"", np.arange(5, dtype=np.uint8).data, b"z"]
    said = write_file(epath.Path(tmp_path / "file"), iter(parts))
    content = b"abc\x00\x01\x02\x03\x04z"
    assert (tmp_path / "file").read_bytes() == content
    assert said == {"bytes": 9, "xxh128": xxhash.xxh3_128_hexdigest(content)}
    assert write_file(epath.Path(tmp_path / "empty"), []) == {
        "bytes": 0,
        "xxh128": "99aa06d3014798d86001c324468d497f",
    }


def test_the_disk_takes_parts_before_the_last_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "SYNC_EVERY", 4)
    on_disk, fsync = [], os.fsync

    def note(descriptor):
        on_disk.append(os.fstat(descriptor).st_size)
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", note)

    def parts():
        for _ in range(5):
            yield bytes(4)
            while not on_disk:  # until the sync of the first part begins
                threading.Event().wait(0.001)

    write_file(epath.Path(tmp_path / "file"), parts())
    assert on_disk[0] == 4
    assert on_disk[-1] == 20


def test_a_failed_sync_is_not_lost(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "SYNC_EVERY", 1)
    real, fails = os.fsync, iter([True, False, False, False])

    def fsync(descriptor):
        if next(fails):
            raise OSError("the disk is gone")
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(OSError, match="the disk is gone"):
        write_file(epath.Path(tmp_path / "file"), [b"a", b"b"])


def test_results_come_in_order_and_no_dearer_than_the_room():
    live, most, lock = 0, 0, threading.Lock()

    def make(cost):
        nonlocal live, most
        with lock:
            live += cost
            most = max(most, live)
        return cost

    costs = [3, 1, 1, 9, 2, 2, 2, 2, 5, 1]
    found = []
    for cost in ahead(make, costs, cost=lambda cost: cost, room=6):
        found.append(cost)
        with lock:
            live -= cost  # asked for: no longer ahead
    assert found == costs
    assert 6 >= most - 9 >= 0  # the 9 alone


def test_a_failure_comes_to_the_caller_and_closing_ends_the_threads():
    threads = threading.active_count()
    results = ahead(lambda x: 1 / x, [1, 2, 0, 4], cost=lambda x: 1, room=2)
    assert [next(results), next(results)] == [1, 0.5]
    with pytest.raises(ZeroDivisionError):
        next(results)
    unfinished = ahead(lambda x: x, range(100), cost=lambda x: 1, room=2)
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
