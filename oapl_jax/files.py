"""Crash-safe files, local or in an object store: atomic write, JSON lines, checksums, manifests.

A manifest is a JSON file with an entry for each file beside it: {"bytes": size, "xxh128":
hexadecimal XXH3 digest of 128 bits, as of xxh128sum}.
"""

import ast
import collections
import contextlib
import fcntl
import hashlib
import json
import math
import mmap
import os
import time
import uuid
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import xxhash
from etils import epath

from oapl_jax.errors import RunError, UserError

READERS = 4
SYNC_EVERY = 64 << 20  # bytes written before the next fsync starts
DELETION = 0.2  # seconds in which a directory that is being deleted loses a file

encode_json = json.JSONEncoder(separators=(",", ":"), allow_nan=False).encode
X = TypeVar("X")
Y = TypeVar("Y")


def is_local(path: epath.PathLike) -> bool:
    """False for an object store: no page cache to flush, and a rename is a copy."""
    return "://" not in os.fspath(path)


def absolute(path: epath.PathLike) -> epath.Path:
    """Makes a local path absolute, `~` included; epath's own `resolve` takes gs:// for a local
    name."""
    return epath.Path(os.path.abspath(os.path.expanduser(path)) if is_local(path) else path)


def flag_directory(flag: str, value: str) -> epath.Path:
    """The absolute path that a flag gives; UserError for none, or one that Orbax can't use."""
    if not value:
        raise UserError(f"--{flag} is empty; give a directory, such as --{flag}=runs/a")
    path = absolute(value)
    if found := sorted(set("*?[]\\") & set(os.fspath(path))):
        raise UserError(
            f"--{flag}={path} has {' '.join(found)}, which Orbax takes for a pattern; choose "
            "another name"
        )
    return path


@contextlib.contextmanager
def naming(path: epath.PathLike) -> Iterator[None]:
    """Adds the file's name to an OSError that lacks one, as of a write to a full disk."""
    try:
        yield
    except OSError as error:
        if error.errno and not error.filename:
            error.filename = os.fspath(path)
        raise


def write_file(path: epath.Path, parts: Iterable[bytes | memoryview]) -> dict[str, Any]:
    """Writes parts end to end, flushes them to disk, and returns the file's manifest entry."""
    digest, size, unsynced, local = xxhash.xxh3_128(), 0, 0, is_local(path)
    syncing: Future[None] = Future()
    syncing.set_result(None)
    with naming(path), ThreadPoolExecutor(1) as thread, path.open("wb") as file:
        for part in parts:
            digest.update(part)
            file.write(part)
            size, unsynced = size + len(part), unsynced + len(part)
            # Otherwise the disk would idle until the end, and the last fsync take all the time.
            if local and unsynced >= SYNC_EVERY and syncing.done():
                syncing.result()  # raises if that fsync failed
                file.flush()
                syncing, unsynced = thread.submit(os.fsync, file.fileno()), 0
        if local:
            syncing.result()
            file.flush()
            os.fsync(file.fileno())
    return {"bytes": size, "xxh128": digest.hexdigest()}


def write_atomically(path: epath.PathLike, parts: Iterable[bytes | memoryview]) -> dict[str, Any]:
    """Replaces a file: readers, even after a crash, see the old content or the new, not a part.

    Of several processes that write at once, the last one's content stays.
    """
    path = epath.Path(path)
    if not is_local(path):  # an object appears when its upload is complete
        return write_file(path, parts)
    temporary = path.parent / f"{path.name}.{uuid.uuid4().hex}.tmp"
    try:
        entry = write_file(temporary, parts)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    fsync(path.parent)
    return entry


def fsync(path: epath.PathLike) -> None:
    """Flushes a local file's content, or a local directory's names, to disk."""
    if is_local(path):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def checksum(path: epath.Path) -> str:
    """XXH3 (128 bits) of a file, hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, xxhash.xxh3_128).hexdigest()  # pyright: ignore


def file_entry(path: epath.Path) -> dict[str, Any]:
    """The manifest entry of a file that is already written: {"bytes", "xxh128"}."""
    return {"bytes": path.stat().length, "xxh128": checksum(path)}


def read_json(path: epath.Path, fields: Iterable[str], *, remedy: str) -> dict[str, Any]:
    """Reads fields of a JSON object; raises a UserError, ending with `remedy`, if it lacks one."""
    try:
        document = json.loads(path.read_text())
        return {field: document[field] for field in fields}
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise UserError(f"{path} is missing or damaged; {remedy}") from error


def check_files(
    directory: epath.Path,
    files: Mapping[str, Mapping[str, Any]],
    *,
    remedy: str,
    checksums: bool = True,
) -> None:
    """Raises a UserError, ending with `remedy`, for the first of `damaged_files`."""
    for name in damaged_files(directory, files, checksums=checksums):
        raise UserError(f"{directory / name} is missing or damaged; {remedy}")


def damaged_files(
    directory: epath.Path, files: Mapping[str, Mapping[str, Any]], *, checksums: bool = True
) -> Iterator[str]:
    """Yields the names of files that lack the values of their manifest entries.

    Without `checksums` sizes alone are compared.
    """
    values = file_entry if checksums else lambda path: {"bytes": path.stat().length}
    for name, entry in files.items():
        path = directory / name
        if not path.exists() or not values(path).items() <= entry.items():
            yield name


def is_deleted(directory: epath.Path) -> bool:
    """True if a directory is gone, or another process is deleting it: its files become fewer."""
    files = math.inf
    while directory.exists():
        with contextlib.suppress(FileNotFoundError):  # deleted while they are listed
            now = sum(len(names) for _, _, names in directory.walk())
            if now >= files:
                return False
            files = now
        time.sleep(DELETION)
    return True


class JsonLines:
    """An append-only local file of JSON objects, one a line, that survives a kill.

    Opening removes last lines that a kill has cut or a crash of the machine has left as NUL bytes;
    `exclusive` locks the file until `close`.
    `append` flushes each line to the operating system; `sync` brings them to the disk. `size` is
    in bytes. Raises a UserError for an object store, or if another process has locked the file.
    """

    def __init__(self, path: epath.Path, *, exclusive: bool):
        if not is_local(path):
            raise UserError(f"{path} can't be appended to; name a local directory")
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = open(path, "a+b")  # noqa: SIM115
        try:
            if exclusive:
                lock(self._file.fileno(), path)
            self.truncate(self._end_of_last_line())
        except BaseException:
            self._file.close()
            raise

    def append(self, line: Mapping[str, Any]) -> None:
        """Writes one line; raises a RunError for a number that is not finite."""
        try:
            text = encode_json(line)
        except ValueError as error:
            raise RunError(f"a number for {self.path} is not finite: {line}") from error
        content = text.encode() + b"\n"
        with naming(self.path):
            self._file.write(content)
            self._file.flush()
        self.size += len(content)

    def sync(self) -> None:
        with naming(self.path):
            os.fsync(self._file.fileno())

    def truncate(self, size: int) -> None:
        """Drops everything after the first `size` bytes."""
        with naming(self.path):
            self._file.truncate(size)
        self.size = size

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return read_json_lines(self.path)

    def close(self) -> None:
        with naming(self.path):  # it writes what a full disk has refused
            self._file.close()

    def _end_of_last_line(self) -> int:
        if not self._file.seek(0, os.SEEK_END):
            return 0
        with mmap.mmap(self._file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            end = content.rfind(b"\n") + 1
            while end:
                start = content.rfind(b"\n", 0, end - 1) + 1
                if content.find(b"\0", start, end) < 0:
                    break
                end = start
            return end


def read_json_lines(path: epath.Path) -> Iterator[dict[str, Any]]:
    """Yields the whole lines of a file; raises a UserError for one that is no JSON object."""
    with open(path, "rb") as file:
        for number, text in enumerate(file, 1):
            if not text.endswith(b"\n"):
                return  # cut by a kill, or being written now
            try:
                line = json.loads(text)
            except ValueError:
                line = None
            if not isinstance(line, dict):
                raise UserError(f"line {number} of {path} is damaged; restore a whole copy")
            yield line


def lock(descriptor: int, path: epath.Path) -> None:
    """Locks an open file until it is closed; raises a UserError if another process has."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise UserError(f"another process is writing {path}; wait until it has ended") from error


def code_digest(paths: Iterable[Path]) -> str:
    """SHA-256 of Python sources that ignores comments, docstrings and layout.

    Each file adds its name and its syntax tree, which depends on the version of Python.
    """
    digest = hashlib.sha256()
    for path in paths:
        tree = ast.parse(path.read_text())
        for node in ast.walk(tree):
            match getattr(node, "body", None):
                case [ast.Expr(ast.Constant(str())), *rest]:
                    node.body = rest  # pyright: ignore[reportAttributeAccessIssue]
        digest.update(f"{path.name}\n{ast.dump(tree)}\n".encode())
    return digest.hexdigest()


def prefetch(
    make: Callable[[X], Y], items: Iterable[X], *, cost: Callable[[X], int], budget: int
) -> Generator[Y, None, None]:
    """Yields `make(item)` in order, while threads make the next ones.

    `budget` bounds the summed cost of results made ahead; a result that costs more is made alone.
    """
    pending: collections.deque[tuple[int, Future[Y]]] = collections.deque()
    spent = 0
    with ThreadPoolExecutor(READERS) as threads:
        for item in items:
            while pending and spent + cost(item) > budget:
                price, result = pending.popleft()
                spent -= price
                yield result.result()
            pending.append((cost(item), threads.submit(make, item)))
            spent += cost(item)
        while pending:
            yield pending.popleft()[1].result()
