"""Reading JSON, JSON Lines and Parquet, and refusing what is not what it should be."""

import gzip
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from etils import epath

from oapl_jax.data.public import tables
from oapl_jax.data.public.tables import find_files, read_rows
from oapl_jax.errors import UserError

ROWS = [{"a": 1, "b": "ä"}, {"a": 2, "b": "x\ny", "c": [1]}, {"a": 3, "b": None}]


def lines(rows=ROWS) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def read(file, required=("a", "b"), optional=()):
    return list(read_rows(epath.Path(file), required, optional))


def write_parquet(path):
    table = pa.table({"a": [1, 2, 3], "b": ["ä", "x\ny", None], "unread": ["u"] * 3})
    pq.write_table(table, path)


WRITERS = {
    "x.jsonl": lambda path: path.write_bytes(lines()),
    "blank.jsonl": lambda path: path.write_bytes(b"\n" + lines().replace(b"}\n", b"}\n \n")),
    "x.jsonl.gz": lambda path: path.write_bytes(gzip.compress(lines())),
    "x.json": lambda path: path.write_text(json.dumps(ROWS)),
    "indented.json": lambda path: path.write_text("\n " + json.dumps(ROWS, indent=1)),
    "lines.json": lambda path: path.write_bytes(lines()),
    "x.json.gz": lambda path: path.write_bytes(gzip.compress(json.dumps(ROWS).encode())),
    "x.parquet": write_parquet,
}


@pytest.mark.parametrize("name", WRITERS)
def test_every_format_gives_the_same_rows_and_only_the_columns_asked_for(name, tmp_path):
    WRITERS[name](tmp_path / name)
    assert read(tmp_path / name) == [{"a": r["a"], "b": r["b"]} for r in ROWS]
    assert read(tmp_path / name, ("b",), ("z",)) == [{"b": r["b"]} for r in ROWS]


def test_a_parquet_file_is_read_in_portions(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "PARQUET_ROWS", 2)
    write_parquet(tmp_path / "x.parquet")
    assert [row["a"] for row in read(tmp_path / "x.parquet")] == [1, 2, 3]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.jsonl", lines([*ROWS, {"a": 4}]), r"row 4 of .*x\.jsonl has no column b \(has: a\)"),
        ("x.jsonl", lines() + b'{"a": 1', r"row 4 of .* is not JSON"),
        ("x.jsonl", b"[1]\n", "row 1 of .* is not an object"),
        ("x.json", b"", None),
        ("x.jsonl.gz", gzip.compress(lines(), mtime=0)[:-12], "is damaged"),
        ("x.jsonl.gz", lines(), "is damaged"),
        ("x.jsonl", b'{"a": "\xff", "b": 1}\n', "is damaged"),
        ("x.parquet", b"PAR1 and no more", "is damaged"),
        ("x.parquet", b"version https://git-lfs.github.com/spec/v1\noid", "git lfs pull"),
        ("x.jsonl", b"version https://git-lfs.github.com/spec/v1\noid", "git lfs pull"),
    ],
)
def test_what_can_not_be_read_is_named(name, content, message, tmp_path):
    (tmp_path / name).write_bytes(content)
    if message is None:
        assert read(tmp_path / name) == []
        return
    with pytest.raises(UserError, match=message):
        read(tmp_path / name)


def test_a_parquet_file_without_a_column(tmp_path):
    write_parquet(tmp_path / "x.parquet")
    with pytest.raises(UserError, match=r"has no column c, d \(has: a, b, unread\)"):
        read(tmp_path / "x.parquet", ("a", "c", "d"))


def test_files_are_found_in_order(tmp_path):
    for name in ("b/2.jsonl", "b/1.jsonl", "a.parquet"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("")
    found = find_files(str(tmp_path), ["b/*.jsonl", "a.*"], setting="data.sets.x")
    assert [f.name for f in found] == ["1.jsonl", "2.jsonl", "a.parquet"]
    (one,) = find_files(str(tmp_path / "a.parquet"), [], setting="data.sets.x")
    assert one.name == "a.parquet"


@pytest.mark.parametrize(
    ("path", "patterns", "message"),
    [
        ("nowhere", ["*"], r"data\.sets\.x\.path=.*nowhere does not exist; docs/data\.md"),
        ("", [], r"is a directory; name its files in data\.sets\.x\.files"),
        ("a.txt", ["*"], "is a file; leave out"),
        ("", ["*.parquet"], r"no file matches \*\.parquet"),
        ("", ["*"], r"a\.txt is none of \.parquet"),
    ],
)
def test_missing_files_are_named(path, patterns, message, tmp_path):
    (tmp_path / "a.txt").write_text("")
    with pytest.raises(UserError, match=message):
        find_files(str(tmp_path / path), patterns, setting="data.sets.x")
