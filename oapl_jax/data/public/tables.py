"""Rows of JSON, JSON Lines and Parquet files, local or in a bucket (gs://)."""

import gzip
import hashlib
import itertools
import json
import zlib
from collections.abc import Iterator, Sequence
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq
from etils import epath

from oapl_jax.errors import UserError

Row = dict[str, Any]
SUFFIXES = (".parquet", ".jsonl", ".jsonl.gz", ".json", ".json.gz")
LFS_POINTER = b"version https://git-lfs"
HASHED = 2**26  # bytes; of a larger file only the size counts
PARQUET_ROWS = 64  # read at a time; rows of tests may have megabytes


def find_files(path: str, patterns: Sequence[str], *, setting: str) -> list[epath.Path]:
    """The files that a data set consists of.

    Args:
      path: a file, or a directory.
      patterns: globs below the directory, each of which finds something; none for a file.
      setting: whose `path` and `files` these are, named in errors.

    Raises:
      UserError: if something is missing, or no reader knows a file's suffix.
    """
    root = epath.Path(path)
    if not root.exists():
        raise UserError(
            f"{setting}.path={path} does not exist; docs/data.md says how to obtain the data set"
        )
    if root.is_dir() != bool(patterns):
        what = "is a directory; name its files" if root.is_dir() else "is a file; leave out"
        raise UserError(f"{setting}.path={path} {what} in {setting}.files")
    found = [] if patterns else [root]
    for pattern in patterns:
        matches = sorted(root.glob(pattern))
        if not matches:
            raise UserError(
                f"{setting}.files: no file matches {pattern} in {path}; docs/data.md says how the "
                "data set is laid out"
            )
        found += matches
    for file in found:
        if not file.name.endswith(SUFFIXES):
            raise UserError(f"{file} is none of {', '.join(SUFFIXES)}; correct {setting}.files")
    return found


def fingerprint(file: epath.Path) -> list[Any]:
    """Name, size and, of a file that is not large, the hash of what it holds."""
    size = file.stat().length
    content = hashlib.sha256(file.read_bytes()).hexdigest() if size <= HASHED else ""
    return [file.name, size, content]


def read_rows(file: epath.Path, required: Sequence[str], optional: Sequence[str]) -> Iterator[Row]:
    """The rows of one file, with the required columns and those of the optional that it has.

    Raises:
      UserError: for a file that can't be read, or a row without a required column.
    """
    try:
        with file.open("rb") as stream:
            if stream.read(len(LFS_POINTER)) == LFS_POINTER:
                raise UserError(f"{file} is a Git LFS pointer, not data; run git lfs pull there")
            stream.seek(0)
            if file.name.endswith(".parquet"):
                yield from _parquet(file, stream, required, optional)
            elif file.name.endswith(".gz"):
                with gzip.open(stream) as unpacked:
                    yield from _json(file, unpacked, required, optional)
            else:
                yield from _json(file, stream, required, optional)
    except (pa.ArrowInvalid, EOFError, gzip.BadGzipFile, zlib.error, UnicodeDecodeError) as error:
        raise UserError(f"{file} is damaged ({error}); obtain it again") from error


def _parquet(file: epath.Path, stream: Any, required: Any, optional: Any) -> Iterator[Row]:
    table = pq.ParquetFile(stream)
    _check(file, 1, table.schema_arrow.names, required)
    columns = [c for c in (*required, *optional) if c in table.schema_arrow.names]
    for batch in table.iter_batches(batch_size=PARQUET_ROWS, columns=columns):
        yield from batch.to_pylist()


def _json(file: epath.Path, stream: Any, required: Any, optional: Any) -> Iterator[Row]:
    wanted = {*required, *optional}
    for number, row in enumerate(_objects(file, stream), 1):
        if not isinstance(row, dict):
            raise UserError(f"row {number} of {file} is not an object of named columns")
        _check(file, number, row, required)
        yield {name: value for name, value in row.items() if name in wanted}


def _objects(file: epath.Path, stream: IO[bytes]) -> Iterator[Any]:
    """The elements of a JSON list, or one object a line; either may be in a .json file."""
    lines = (line for line in stream if line.strip())
    first = next(lines, b"")
    if first.lstrip().startswith(b"["):
        yield from _parsed(file, 1, first + b"".join(lines))
    else:
        for number, line in enumerate(itertools.chain([first] if first else [], lines), 1):
            yield _parsed(file, number, line)


def _parsed(file: epath.Path, number: int, text: bytes) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"row {number} of {file} is not JSON ({error}); obtain it again") from error


def _check(file: epath.Path, number: int, columns: Any, required: Sequence[str]) -> None:
    missing = [name for name in required if name not in columns]
    if missing:
        raise UserError(
            f"row {number} of {file} has no column {', '.join(missing)} (has: "
            f"{', '.join(map(str, columns))}); it is another data set, or another release of it"
        )
