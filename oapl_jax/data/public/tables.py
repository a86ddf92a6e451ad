"""Rows of JSON, JSON Lines and Parquet files, local or in a bucket (gs://), and their cells."""

import contextlib
import gzip
import hashlib
import io
import itertools
import json
import math
import sys
import unicodedata
import zlib
from collections.abc import Iterator, Mapping, Sequence
from decimal import Decimal
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from etils import epath

from oapl_jax.data.records import Messages, Record, user
from oapl_jax.errors import UserError

Row = dict[str, Any]
SUFFIXES = (".parquet", ".jsonl", ".jsonl.gz", ".json", ".json.gz")
LFS_POINTER = b"version https://git-lfs"
HASHED = 2**26  # bytes; the fingerprint of a larger file is its size
PARQUET_ROWS = 64  # read at a time; rows of tests may have megabytes
MAX_DIGITS = 50_000  # of an integer: LiveCodeBench's limit, above Python's default of 4,300
sys.set_int_max_str_digits(MAX_DIGITS)


class InvalidRow(Exception):
    """A row that is no problem; the message is the reason, equal for all rows of one fault."""


# Files


def find_files(path: str, patterns: Sequence[str], *, setting: str) -> list[epath.Path]:
    """Finds the files of a data set, which section `setting` of the configuration describes.

    Args:
      path: a file, or a directory.
      patterns: globs below the directory, each of which must match; none for a file.

    Raises:
      UserError: for a missing file, or an unknown suffix.
    """
    root = epath.Path(path)
    if not root.exists():
        raise UserError(
            f"{setting}.path={path} does not exist; docs/data.md says how to obtain the data set"
        )
    if root.is_dir() != bool(patterns):
        remedy = "is a directory; name its files" if root.is_dir() else "is a file; name none"
        raise UserError(f"{setting}.path={path} {remedy} in {setting}.files")
    found = [] if patterns else [root]
    for pattern in patterns:
        matches = sorted(root.glob(pattern))
        if not matches:
            raise UserError(
                f"{setting}.files: no file matches {pattern} in {path}; docs/data.md describes the "
                "layout of the data set"
            )
        found += matches
    for file in found:
        if not file.name.endswith(SUFFIXES):
            named = setting + ".files" * bool(patterns)
            raise UserError(f"{file} is none of {', '.join(SUFFIXES)}; correct {named}")
    return found


@contextlib.contextmanager
def readable(file: epath.Path) -> Iterator[None]:
    """Raises a UserError naming the file for one that is damaged or can't be read."""
    try:
        yield
    except UnicodeDecodeError as error:
        fault = f"{file} holds bytes that are no text ({error})"
        raise UserError(f"{fault}; convert it to UTF-8, or obtain it again") from error
    except (OSError, pa.ArrowException, EOFError, OverflowError, zlib.error) as error:
        number = getattr(error, "errno", None)  # of the system; the decoders' OSErrors have none
        fault, reason = "damaged" if number is None else "unreadable", " ".join(str(error).split())
        raise UserError(f"{file} is {fault} ({reason}); obtain it again") from error


def fingerprint(file: epath.Path) -> list[Any]:
    """Name, size and, unless the file is large, SHA-256 of the content."""
    with readable(file):
        size = file.stat().length
        content = hashlib.sha256(file.read_bytes()).hexdigest() if size <= HASHED else ""
    return [file.name, size, content]


def read_rows(
    file: epath.Path, required: Sequence[str], optional: Sequence[str] | None
) -> Iterator[Row | InvalidRow]:
    """Reads the required and, where present, the optional columns of a file, row by row; all
    columns if `optional` is None.

    A line of JSON that Python can't hold is an InvalidRow.

    Raises:
      UserError: for a damaged file, or a row without a required column.
    """
    number, remedy = 0, "it is another data set, or another release of it"
    if optional is None:
        remedy = "name its columns, for example with --config.data.columns.problem=prompt"
    with readable(file), file.open("rb") as stream:
        if stream.read(len(LFS_POINTER)) == LFS_POINTER:
            raise UserError(f"{file} is a Git LFS pointer, not data; run git lfs pull there")
        stream.seek(0)
        if file.name.endswith(".parquet"):
            rows = _parquet_rows(stream, required, optional)
        else:
            packed = file.name.endswith(".gz")
            rows = _json_rows(gzip.GzipFile(fileobj=stream) if packed else stream, file)
        for number, row in enumerate(rows, 1):
            if isinstance(row, InvalidRow):
                yield row
                continue
            if not isinstance(row, dict):
                raise UserError(f"row {number} of {file} is not an object of named columns")
            if missing := [name for name in required if name not in row]:
                raise UserError(
                    f"row {number} of {file} has no column {', '.join(missing)} (has: "
                    f"{', '.join(row)}); {remedy}"
                )
            names = row if optional is None else (*required, *optional)
            yield {name: row[name] for name in names if name in row}


def _parquet_rows(
    stream: Any, required: Sequence[str], optional: Sequence[str] | None
) -> Iterator[dict[str, Any]]:
    table = pq.ParquetFile(stream, page_checksum_verification=True)
    names = table.schema_arrow.names
    # If a required one is missing, all of them, so that the error can list them.
    columns = None
    if optional is not None and {*required} <= {*names}:
        columns = [c for c in names if c in (*required, *optional)]
    left = table.metadata.num_rows
    for batch in table.iter_batches(batch_size=PARQUET_ROWS, columns=columns):
        yield from map(_decoded, batch.to_pylist())
        left -= len(batch)
    if left:
        raise pa.ArrowInvalid(f"its footer counts {table.metadata.num_rows} rows, {left} too many")


def _decoded(cell: Any) -> Any:
    """Text of the bytes in a Parquet cell: some writers do not mark text as such."""
    if isinstance(cell, bytes):
        return cell.decode(errors="surrogateescape")
    if isinstance(cell, list):
        return list(map(_decoded, cell))
    return {k: _decoded(v) for k, v in cell.items()} if isinstance(cell, dict) else cell


def _json_rows(stream: Any, file: epath.Path) -> Iterator[Any]:
    """Parses a JSON list, or one object a line; a .json file may hold either."""
    encoding = json.detect_encoding(stream.read(4))  # UTF-8, -16 or -32, with a mark or without
    stream.seek(0)
    lines = (line for line in io.TextIOWrapper(stream, encoding) if line.strip())
    first = next(lines, "")
    if first.lstrip().startswith("[") or first.strip() == "{":
        try:
            whole = parse_json(first + "".join(lines))
        except (InvalidRow, json.JSONDecodeError) as error:
            raise UserError(f"{file} is not JSON ({error}); obtain it again") from error
        yield from whole if isinstance(whole, list) else [whole]
        return
    for number, line in enumerate(itertools.chain([first] if first else [], lines), 1):
        try:
            yield parse_json(line)
        except InvalidRow as error:
            yield error
        except json.JSONDecodeError as error:
            fault = f"row {number} of {file} is not JSON ({error})"
            raise UserError(f"{fault}; obtain it again") from error


# Cells


def parse_json(text: str) -> Any:
    """Parses JSON; InvalidRow for a value that Python can't hold, JSONDecodeError for no JSON."""
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        raise
    except ValueError as error:
        raise InvalidRow(f"an integer of more than {MAX_DIGITS:,} digits") from error
    except RecursionError as error:
        raise InvalidRow("JSON that is nested too deeply") from error


def cell_text(value: Any) -> str:
    """Text of a cell, stripped; numbers are written out; None and NaN, which tables have for a
    missing value, are ""; InvalidRow for other types."""
    match value:
        case None:
            return ""
        case str():
            return value.strip()
        case float() if math.isnan(value):
            return ""
        case float() if math.isfinite(value):
            return np.format_float_positional(value, trim="0")  # without an exponent
        case Decimal() if value.is_finite():
            return f"{value:f}"
        case int() if not isinstance(value, bool):
            return str(value)
    raise InvalidRow("a cell is neither text nor a number")


def question_messages(cell: Any) -> Messages:
    """A conversation of the question in a cell."""
    if not cell_text(cell):
        raise InvalidRow("no problem")
    return user(cell_text(cell))


def cell_messages(cell: Any) -> Messages:
    """A conversation from a cell that holds a list of {"role": .., "content": ..}."""
    if not isinstance(cell, list) or not cell:
        raise InvalidRow("messages that are not a list")
    messages = []
    for message in cell:
        fields = message if isinstance(message, Mapping) else {}
        role, content = cell_text(fields.get("role")), cell_text(fields.get("content"))
        if not role or not content:
            raise InvalidRow("a message without role or content")
        messages.append({"role": role, "content": content})
    return tuple(messages)


def text_or_json(value: Any) -> str:
    """Text of a cell; JSON of a list or any other value that is neither text nor a number."""
    try:
        return cell_text(value)
    except InvalidRow:
        return json.dumps(value, ensure_ascii=False, default=str)


def make_record(
    task: str,
    messages: Messages,
    answer: Any,
    *,
    difficulty: Any = "",
    metadata: dict[str, Any] | None = None,
) -> Record:
    """A record without its source; InvalidRow if there is no answer."""
    if not cell_text(answer):
        raise InvalidRow("no answer")
    return Record(
        id=messages_id(task, messages),
        messages=messages,
        answer=cell_text(answer),
        task=task,
        metadata=metadata or {},
        difficulty=cell_text(difficulty),
    )


def messages_id(task: str, messages: Messages) -> str:
    """16 hexadecimal digits, equal for conversations that differ in white space alone."""
    words = [task]
    for message in messages:
        words += [message["role"], *unicodedata.normalize("NFKC", message["content"]).split()]
    return hashlib.sha256(" ".join(words).encode()).hexdigest()[:16]
