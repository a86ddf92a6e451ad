"""Reading JSON, JSON Lines and Parquet; damaged and missing files."""

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
def test_every_format_gives_the_same_rows_with_the_requested_columns(name, tmp_path):
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
        ("x.jsonl", lines([*ROWS, {"a": 4}]), r"row 4 of .*x\.jsonl"),
        ("x.jsonl", lines() + b'{"a": 1', r"row 4 of .*x\.jsonl"),
        ("x.jsonl", b"[1]\n", r"row 1 of .*x\.jsonl"),
        ("x.jsonl.gz", gzip.compress(lines(), mtime=0)[:-12], r"x\.jsonl\.gz"),
        ("x.jsonl.gz", lines(), r"x\.jsonl\.gz"),
        ("x.jsonl", b'{"a": "\xff", "b": 1}\n', r"x\.jsonl"),
        ("x.parquet", b"PAR1 and no more", r"x\.parquet"),
        ("x.parquet", b"version https://git-lfs.github.com/spec/v1\noid", "git lfs pull"),
        ("x.jsonl", b"version https://git-lfs.github.com/spec/v1\noid", "git lfs pull"),
    ],
)
def test_an_unreadable_file_is_named(name, content, message, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        read(tmp_path / name)


def test_an_empty_file_has_no_rows_and_a_missing_column_is_named(tmp_path):
    (tmp_path / "x.json").write_bytes(b"")
    assert read(tmp_path / "x.json") == []
    write_parquet(tmp_path / "x.parquet")
    with pytest.raises(UserError, match=r"c, d .*a, b, unread"):
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
    ("path", "patterns", "setting"),
    [
        ("nowhere", ["*"], r"data\.sets\.x\.path=.*nowhere"),
        ("", [], r"data\.sets\.x\.files"),
        ("a.txt", ["*"], r"data\.sets\.x\.files"),
        ("", ["*.parquet"], r"data\.sets\.x\.files"),
        ("", ["*"], r"a\.txt .*data\.sets\.x\.files"),
    ],
)
def test_missing_or_unknown_files_are_named(path, patterns, setting, tmp_path):
    (tmp_path / "a.txt").write_text("")
    with pytest.raises(UserError, match=setting):
        find_files(str(tmp_path / path), patterns, setting="data.sets.x")
