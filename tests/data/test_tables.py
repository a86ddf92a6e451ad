"""Reading JSON, JSON Lines and Parquet; damaged and missing files."""

import codecs
import gzip
import json
from decimal import Decimal

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from etils import epath

from oapl_jax.data.public import tables
from oapl_jax.data.public.tables import InvalidRow, cell_text, find_files, fingerprint, read_rows
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
    "spaced.json": lambda path: path.write_text("\n " + json.dumps(ROWS, indent=1)),
    "lines.json": lambda path: path.write_bytes(lines()),
    "x.json.gz": lambda path: path.write_bytes(gzip.compress(json.dumps(ROWS).encode())),
    "x.parquet": write_parquet,
    "marked.jsonl": lambda path: path.write_bytes(codecs.BOM_UTF8 + lines()),
    "marked.json": lambda path: path.write_bytes(codecs.BOM_UTF8 + json.dumps(ROWS).encode()),
    "indented.json": lambda path: path.write_text(json.dumps(ROWS, indent=1), "utf-8-sig"),
    "windows.jsonl": lambda path: path.write_bytes(lines().replace(b"\n", b"\r\n")),
    "returns.jsonl": lambda path: path.write_bytes(lines().replace(b"\n", b"\r")),
    "unended.jsonl": lambda path: path.write_bytes(lines().rstrip()),
    **{
        f"{encoding}.jsonl": lambda path: path.write_text(lines().decode(), path.stem)
        for encoding in ("utf-16", "utf-16-le", "utf-16-be", "utf-32")
    },
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
        ("x.jsonl", b'{"a": "\x92", "b": 1}\n', r"x\.jsonl"),
        ("x.jsonl", lines() + b"\0\0\0\0\n", r"row 4 of .*x\.jsonl"),
        ("x.jsonl", b'{"a": 1, "b": 2}{"a": 1, "b": 2}\n', r"row 1 of .*x\.jsonl"),
        ("x.jsonl", b'{"a": 1, "b": 2,}\n', r"row 1 of .*x\.jsonl"),
        ("x.jsonl", b"<!DOCTYPE html>\n", r"row 1 of .*x\.jsonl"),
        ("x.jsonl", b"PK\x03\x04\xbc\xff", r"x\.jsonl"),
        ("x.json", json.dumps({"data": ROWS}, indent=1).encode(), r"x\.json .*a, b.*has: data"),
        ("x.json", json.dumps(ROWS).encode()[:-5], r"x\.json "),
        ("x.json", b"[" * 100_000, r"x\.json "),
        ("x.json", b'[{"a": 1, "b": 1' + b"0" * 60_000 + b"}]", r"x\.json "),
        ("x.jsonl.gz", gzip.compress(lines(), mtime=0)[:-8] + bytes(8), r"x\.jsonl\.gz"),
        ("x.parquet", b"PAR1 and no more", r"x\.parquet"),
        ("x.parquet", b"", r"x\.parquet"),
        ("x.parquet", b"version https://git-lfs.github.com/spec/v1\noid", "git lfs pull"),
        ("x.jsonl", b"version https://git-lfs.github.com/spec/v1\noid", "git lfs pull"),
    ],
)
def test_an_unreadable_file_is_named(name, content, message, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        read(tmp_path / name)


@pytest.mark.parametrize("compression", ["snappy", "zstd", "gzip", "none"])
@pytest.mark.parametrize("flipped", [(300, 500), (-200, -60), (500, None)])
def test_a_damaged_page_or_footer_is_refused_by_the_name_of_its_file(
    compression, flipped, tmp_path
):
    table = pa.table({"a": [f"What is {i}? " + "x" * (i % 50) for i in range(500)]})
    pq.write_table(table, tmp_path / "x.parquet", compression=compression, use_dictionary=False)
    content = bytearray((tmp_path / "x.parquet").read_bytes())
    for i in range(*slice(*flipped).indices(len(content))):
        content[i] ^= 0xFF
    (tmp_path / "x.parquet").write_bytes(content)
    with pytest.raises(UserError, match=r"x\.parquet") as refused:
        read(tmp_path / "x.parquet", ("a",))
    assert "\n" not in str(refused.value)


def test_a_parquet_file_with_fewer_rows_than_its_footer_counts_is_refused(tmp_path, monkeypatch):
    write_parquet(tmp_path / "x.parquet")
    monkeypatch.setattr(pq.ParquetFile, "iter_batches", lambda *_, **__: iter(()))
    with pytest.raises(UserError, match=r"x\.parquet"):
        read(tmp_path / "x.parquet")


def test_a_file_that_the_system_does_not_read_is_named(tmp_path):
    (tmp_path / "x.jsonl").mkdir()
    for use in (fingerprint, read):
        with pytest.raises(UserError, match=r"x\.jsonl"):
            use(epath.Path(tmp_path / "x.jsonl"))


def test_a_line_that_python_cannot_hold_leaves_the_others(tmp_path):
    long, deep = '"b": 1' + "0" * 60_000, '"c": ' + "[" * 100_000 + "]" * 100_000
    text = "".join(f'{{"a": {i}, {more}}}\n' for i, more in enumerate(('"b": 1', long, deep)))
    (tmp_path / "x.jsonl").write_text(text + '{"a": 3, "b": 1' + "0" * 40_000 + "}\n")
    first, *invalid, last = read(tmp_path / "x.jsonl")
    assert (first, last) == ({"a": 0, "b": 1}, {"a": 3, "b": 10**40_000})
    assert [type(row) for row in invalid] == [InvalidRow] * 2


def test_bytes_of_a_parquet_file_are_text(tmp_path):
    columns = {"a": pa.array([b"\xc3\xa4", b"\xff", None]), "b": pa.array([[b"x"], [], None])}
    pq.write_table(pa.table(columns), tmp_path / "x.parquet")
    (first, second, third) = read(tmp_path / "x.parquet")
    assert (first, third) == ({"a": "ä", "b": ["x"]}, {"a": None, "b": None})
    with pytest.raises(UnicodeEncodeError):  # by which the row is dropped
        second["a"].encode()


@pytest.mark.parametrize(
    ("cell", "text"),
    [
        *((" a\n", "a"), (7, "7"), (-0.5, "-0.5"), (8.0, "8.0"), (10**5000, "1" + "0" * 5000)),
        *((1e22, "1" + "0" * 22 + ".0"), (1e-7, "0.0000001")),
        *((Decimal("1.00"), "1.00"), (Decimal("1E+3"), "1000")),
        *((None, ""), (float("nan"), ""), ("", "")),
    ],
)
def test_a_cell_is_written_out_and_empty_if_it_is_missing(cell, text):
    assert cell_text(cell) == text


@pytest.mark.parametrize("cell", [True, float("inf"), Decimal("NaN"), ["a"], {}, (1,)])
def test_other_cells_are_invalid(cell):
    with pytest.raises(InvalidRow):
        cell_text(cell)


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
