"""Crash-safe files: atomic write, fsync while writing, logs, checksums, manifests, prefetch."""

import itertools
import os
import random
import subprocess
import sys
import tempfile
import threading
from typing import Any

import numpy as np
import pytest
import xxhash
from bucket import emulated
from disks import no_file_larger_than
from etils import epath
from stores import wait_until

from oapl_jax import files
from oapl_jax.errors import RunError, UserError, one_line


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


def test_a_failed_write_keeps_the_old_content(tmp_path, bucket):
    def parts():
        yield b"half"
        raise OSError("the disk is full")

    for directory in (epath.Path(tmp_path), bucket / "atomically"):
        files.write_atomically(directory / "file", [b"old"])
        with pytest.raises(OSError, match="full"):
            files.write_atomically(directory / "file", parts())
        assert (directory / "file").read_bytes() == b"old"
        files.write_atomically(directory / "file", [b"new"])
        assert (directory / "file").read_bytes() == b"new"
        assert [p.name for p in directory.iterdir()] == ["file"]


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


# Logs: growing files on a disk, segments in a bucket


@pytest.fixture(scope="module")
def bucket():
    with emulated("logs") as bucket:
        yield bucket


@pytest.fixture
def place(request, bucket, tmp_path, numbers=itertools.count()):  # noqa: B008
    """The path of a new log, on a disk or in a bucket."""
    return epath.Path(tmp_path) / "log" if request.param == "disk" else bucket / f"{next(numbers)}"


@pytest.fixture(autouse=True)
def temporary(tmp_path_factory, monkeypatch):
    """A directory of temporary files for each test, as on a machine that has seen no other log."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path_factory.mktemp("temporary")))


on_disk_and_in_bucket = pytest.mark.parametrize("place", ["disk", "bucket"], indirect=True)


def read(path):
    return b"".join(files.read_log(path))


@on_disk_and_in_bucket
def test_a_log_grows_is_cut_and_goes_on(place, monkeypatch):
    monkeypatch.setattr(files, "SEGMENT_BYTES", 12)
    written, rng = b"", random.Random(3)
    for _ in range(6):  # each by a process of its own
        log = files.open_log(place)
        assert log.size == len(written)
        for _ in range(rng.randint(1, 5)):
            line = b"x" * rng.randint(0, 9) + b"\n"
            log.append(line)
            written += line
            if rng.random() < 0.5:
                log.sync()
                assert read(place) == written
        if rng.random() < 0.7:
            kept = rng.choice([0, len(written), written.index(b"\n") + 1, written.rindex(b"\n")])
            kept = written.rfind(b"\n", 0, kept) + 1
            log.truncate(kept)
            written = written[:kept]
        log.close()
        assert read(place) == written
    assert (files.log_state(place) == "-") == (place.exists() is False)


@on_disk_and_in_bucket
def test_the_end_of_a_log_is_read_from_a_line_on(place):
    log, lines = files.open_log(place), [b"%05d\n" % i for i in range(40)]
    for line in lines:
        log.append(line)
        if line.endswith(b"3\n"):
            log.sync()
    log.close()
    for last in (0, 1, 6, 7, 50, 200, 1000):
        found = b"".join(files.read_log(place, last=last))
        assert b"".join(lines).endswith(found)
        assert found[:6] in {b"", *lines}
        assert len(found) >= min(last - 5, 240)


def test_a_log_of_a_bucket_is_uploaded_meanwhile_and_synced_parts_stay(bucket, monkeypatch):
    monkeypatch.setattr(files, "UPLOAD_EVERY", 0.02)
    path = bucket / "meanwhile"
    log = files.open_log(path)
    log.append(b"1\n")
    wait_until(lambda: read(path) == b"1\n")  # without a sync: a kill now loses nothing
    log.append(b"2\n")
    wait_until(lambda: read(path) == b"1\n2\n")
    log.sync()
    log.append(b"3\n")
    wait_until(lambda: read(path) == b"1\n2\n3\n")
    assert [p.read_bytes() for p in sorted(path.iterdir())] == [b"1\n2\n", b"3\n"]
    log.close()


def test_a_store_that_fails_for_a_while_loses_no_line(bucket, monkeypatch):
    path = bucket / "failing"
    log = files.open_log(path)
    log.append(b"1\n")

    def fail(path, parts):
        raise ConnectionError("away")

    with monkeypatch.context() as patch:
        patch.setattr(files, "write_file", fail)
        with pytest.raises(RunError, match="failing"):
            log.sync()
        patch.setattr(files, "SEGMENT_BYTES", 6)
        for line in (b"2\n", b"3\n", b"4\n"):  # more than a segment: an upload is due at once
            log.append(line)
    log.close()
    assert read(path) == b"1\n2\n3\n4\n"


def test_a_full_segment_is_uploaded_by_a_thread_and_another_begins(bucket, monkeypatch):
    monkeypatch.setattr(files, "UPLOAD_EVERY", 1e6)
    monkeypatch.setattr(files, "SEGMENT_BYTES", 4)
    path = bucket / "full"
    log = files.open_log(path)
    log.append(b"1\n")
    assert read(path) == b""
    log.append(b"2\n")
    wait_until(lambda: read(path) == b"1\n2\n")
    log.append(b"3\n")
    log.close()
    assert [p.read_bytes() for p in sorted(path.iterdir())] == [b"1\n2\n", b"3\n"]


LOOKER = """
import sys
from etils import epath
from oapl_jax import files

path = epath.Path(sys.argv[1])
for _ in sys.stdin:
    content = b"".join(files.read_log(path)) if path.exists() else b""
    print(content, files.log_state(path), flush=True)
"""


def test_a_reader_of_a_store_sees_lines_of_another_process(bucket):
    """Clients of object stores cache listings."""
    path = bucket / "read"
    pipes: Any = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    with subprocess.Popen([sys.executable, "-c", LOOKER, os.fspath(path)], **pipes) as looker:

        def look():
            print(file=looker.stdin, flush=True)
            return looker.stdout.readline().rstrip().split(" ", 1)

        assert look() == ["b''", "-"]
        log, states = files.open_log(path), set()
        for content in (b"1\n", b"1\n2\n", b"1\n2\n3\n"):
            log.append(content[-2:])
            log.sync()
            found, state = look()
            assert found == repr(content)
            states.add(state)
        log.truncate(2)
        log.append(b"a\nb\n")
        log.close()
        found, state = look()
        assert found == repr(b"1\na\nb\n")
        assert len(states | {state}) == 4
        looker.stdin.close()


def test_a_process_that_was_taken_for_dead_changes_nothing(bucket, monkeypatch, tmp_path):
    """It stalled, another one took over, and it goes on until it finds its lease taken."""
    monkeypatch.setattr(files, "UPLOAD_EVERY", 1e6)
    path = bucket / "stalled"
    stalled = files.open_log(path)
    stalled.append(b"1\n")
    stalled.sync()
    stalled.append(b"2\n")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))  # of another machine
    other = files.open_log(path)
    stalled.sync()
    assert read(path) == b"1\n"
    other.append(b"3\n")
    stalled.append(b"4\n5\n6\n")
    stalled.sync()
    other.sync()
    other.append(b"7\n")
    assert read(path) == b"1\n3\n"
    other.close()
    stalled.close()
    assert read(path) == b"1\n3\n7\n"
    assert b"".join(files.read_log(path, last=3)) in (b"7\n", b"3\n7\n")
    log = files.open_log(path)
    assert log.size == 6
    log.close()


def test_a_spool_with_a_torn_line_is_not_taken(bucket, monkeypatch):
    """The disk of temporary files was full within a line."""
    monkeypatch.setattr(files, "UPLOAD_EVERY", 1e6)
    path = bucket / "torn"
    log = files.open_log(path)
    log.append(b"0\n")
    log.sync()
    log.append(b"1\n")
    (spool,) = places()
    with no_file_larger_than(spool.stat().length + 3):
        log.append(b"23456789\n")
    log.append(b"a\n")  # the disk has room again; `log` is killed now
    again = files.open_log(path)
    again.append(b"b\n")
    again.close()
    lines = [b"0\n", b"1\n", b"23456789\n", b"a\n", b"b\n"]
    assert set(read(path).splitlines(keepends=True)) <= {*lines}


def test_a_lock_needs_a_file_on_a_disk(bucket):
    with pytest.raises(UserError, match="locked"):
        files.open_log(bucket / "locked", exclusive=True)


def places():
    """What `local_place` has named, of all paths."""
    return list(epath.Path(tempfile.gettempdir(), f"oapl_jax-{os.getuid()}").iterdir())


def test_a_directory_of_temporary_files_that_is_not_ones_own_is_refused(monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / f"oapl_jax-{os.getuid()}").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="TMPDIR"):
        files.local_place("gs://bucket/run")


@pytest.mark.parametrize(
    ("since", "found"),
    [
        ("nothing", b"1\n2\n3\n4\n"),
        ("its first line", b"1\n2\n3\n4\n"),
        ("a cut line", b"1\n2\n3\n4\n"),
        ("an upload", b"1\n2\n3\n4\n"),
        ("another machine", b"1\n9\n4\n"),
        ("another log", b"9\n4\n"),
        ("no log", b"4\n"),
    ],
)
def test_the_next_process_uploads_the_lines_of_a_killed_one(
    bucket, monkeypatch, tmp_path, since, found
):
    monkeypatch.setattr(files, "UPLOAD_EVERY", 1e6)
    path = bucket / f"killed after {since}"
    killed = files.open_log(path)
    killed.append(b"1\n")
    if since != "its first line":
        killed.sync()
    killed.append(b"2\n")
    killed.append(b"3\n")
    if since == "a cut line":
        (spool,) = places()
        spool.write_bytes(spool.read_bytes() + b"4")
    elif since == "an upload":
        sorted(path.iterdir())[-1].write_bytes(b"1\n")
        (path / f"{1:06d}.{2:015d}").write_bytes(b"2\n")
    elif since == "another machine":
        with monkeypatch.context() as patch:
            patch.setattr(tempfile, "tempdir", str(tmp_path))
            other = files.open_log(path)
            other.append(b"9\n")
            other.close()
    elif since not in ("nothing", "its first line"):
        path.rmtree()
        if since == "another log":
            (path / f"{1:06d}.{0:015d}").write_bytes(b"9\n")
    log = files.open_log(path)
    log.append(b"4\n")
    log.close()
    assert read(path) == found
    assert not places()


def test_a_log_of_a_bucket_needs_no_temporary_file(bucket, monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "none"))
    log = files.open_log(bucket / "alone")
    log.append(b"1\n")
    log.close()
    assert read(bucket / "alone") == b"1\n"


def test_a_missing_segment_is_an_error(bucket):
    path = bucket / "gap"
    log = files.open_log(path)
    for line in (b"1\n", b"2\n", b"3\n"):
        log.append(line)
        log.sync()
    log.close()
    sorted(path.iterdir())[1].unlink()
    with pytest.raises(UserError, match="gap"):
        read(path)


def test_a_log_moves_between_disk_and_bucket(bucket, tmp_path):
    there, here = bucket / "moved", epath.Path(tmp_path) / "moved"
    here.write_bytes(b"1\n")
    there.write_bytes(here.read_bytes())  # as gcloud storage cp does
    log = files.open_log(there)
    log.append(b"2\n")
    log.close()
    assert read(there) == b"1\n2\n"
    here.unlink()
    here.mkdir()
    for path in there.iterdir():
        (here / path.name).write_bytes(path.read_bytes())
    assert read(here) == b"1\n2\n"
    log = files.open_log(here)
    log.append(b"3\n")
    log.close()
    assert read(here) == b"1\n2\n3\n"


def test_one_process_creates_a_file(bucket, tmp_path):
    for path in (bucket / "mine", epath.Path(tmp_path / "mine")):
        files.create(path, b"first")
        with pytest.raises(FileExistsError):
            files.create(path, b"second")
        assert path.read_bytes() == b"first"


def test_files_of_a_bucket_are_fetched_by_their_checksums(bucket, tmp_path, monkeypatch):
    monkeypatch.setattr(files, "PART_BYTES", 100)
    content, there, to = random.Random(0).randbytes(1234), bucket / "fetched", epath.Path(tmp_path)
    entries = {"a": files.write_file(there / "a", [content])}
    files.fetch(there, entries, to, remedy="again")
    assert (to / "a").read_bytes() == content
    with files.local_copy(there) as copy:
        assert (copy / "a").read_bytes() == content
    assert not copy.exists()
    with files.local_copy(there, ["a"], keep=True) as copy:
        pass
    with files.local_copy(there, ["a"], keep=True) as again:
        assert again == copy
        assert (again / "a").read_bytes() == content
    for damage in ({"a": {**entries["a"], "xxh128": "0"}}, {"b": entries["a"]}):
        with pytest.raises(UserError, match="again"):
            files.fetch(there, damage, to, remedy="again")


@pytest.mark.parametrize("name", ["../outside", "a/../../outside", "{tmp_path}/outside"])
def test_a_name_that_leaves_the_directory_is_refused(bucket, tmp_path, name):
    name = name.format(tmp_path=tmp_path)
    (bucket / "names" / "outside").write_bytes(b"content")
    to = epath.Path(tmp_path) / "to"
    for there in (bucket / "names" / "of", epath.Path(tmp_path)):
        (epath.Path(tmp_path) / "outside").unlink(missing_ok=True)
        with pytest.raises(UserError, match="outside"):
            files.fetch(there, {name: {"bytes": 7}}, to, remedy="again")
        assert not (epath.Path(tmp_path) / "outside").exists()
    with pytest.raises(UserError, match="outside"), files.local_copy(bucket / "names", [name]):
        pass


def test_a_bucket_that_is_missing_is_named(bucket):
    files.check_reachable(bucket / "any", of="--workdir")
    with pytest.raises(UserError, match="--workdir=gs://nobody/run"):
        files.check_reachable(epath.Path("gs://nobody/run"), of="--workdir")
    with pytest.raises(UserError, match="s3://") as caught:
        files.check_reachable(epath.Path("s3://nobody/run"), of="--workdir")
    assert "gcs" not in str(caught.value)


def test_a_kill_at_any_write_to_a_bucket_keeps_what_was_synced(bucket, monkeypatch):
    monkeypatch.setattr(files, "UPLOAD_EVERY", 1e6)
    left = 0

    def dies_at_the_end(original):
        def call(path, *arguments):
            nonlocal left
            if not left:
                raise KeyboardInterrupt
            left -= 1
            return original(path, *arguments)

        return call

    def use(path, kept):
        log = files.open_log(path)
        for line in (b"a\n", b"bb\n"):
            log.append(line)
        log.sync()
        kept.append(b"a\nbb\n")
        for line in (b"ccc\n", b"dddd\n"):
            log.append(line)
            log.sync()
            kept.append(kept[-1] + line)
        kept.append(b"a\n")
        log.truncate(2)
        log.append(b"e\n")
        log.sync()
        kept.append(b"a\ne\n")

    for writes in itertools.count():
        path, kept, killed = bucket / f"killed{writes}", [b""], False
        with monkeypatch.context() as patch:
            for of, name in ((files, "write_file"), (files, "create"), (type(bucket), "unlink")):
                patch.setattr(of, name, dies_at_the_end(getattr(of, name)))
            left = writes
            try:
                use(path, kept)
            except KeyboardInterrupt:
                killed = True
        content = read(path)
        assert content.startswith(kept[-1])
        states = (
            b"",
            b"a\n",
            b"a\nbb\n",
            b"a\nbb\nccc\n",
            b"a\nbb\nccc\ndddd\n",
            b"a\ne\n",
        )
        assert content in states
        again = files.open_log(path)  # with the lines that were not uploaded
        again.append(b"f\n")
        again.close()
        found = read(path)
        assert found.startswith(content)
        assert found.removesuffix(b"f\n") in states
        if not killed:
            break
    assert writes == 8  # three segments, two deleted, one after the cut, the beginnings of both
