"""Files written in one go: hashed and brought to the disk while their next part is made."""

import ast
import collections
import hashlib
import os
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import xxhash
from etils import epath

READERS = 4
SYNC_EVERY = 64 << 20  # bytes that wait before the disk begins to take them

X = TypeVar("X")
Y = TypeVar("Y")


def on_disk(path: epath.PathLike) -> bool:
    """False for an object store: it has no cache of ours to flush, and renames by copying."""
    return "://" not in os.fspath(path)


def absolute(path: epath.PathLike) -> epath.Path:
    """The same from any directory; epath's own `resolve` takes a bucket for a local name."""
    return epath.Path(os.path.abspath(path) if on_disk(path) else path)


def write_file(path: epath.Path, parts: Iterable[bytes | memoryview]) -> dict[str, Any]:
    """Writes parts end to end; when it returns, they are on the disk.

    Args:
      path: of the file, local or not.
      parts: bytes, or flat views of bytes.

    Returns:
      {"bytes": size, "xxh128": hexadecimal digest, as of xxh128sum}.

    Raises:
      OSError: if the disk is full or fails.
    """
    digest, size, waiting = xxhash.xxh3_128(), 0, 0
    local, syncing = on_disk(path), None
    with ThreadPoolExecutor(1) as thread, path.open("wb") as file:
        for part in parts:
            digest.update(part)
            file.write(part)
            size, waiting = size + len(part), waiting + len(part)
            # Else the disk would idle until the end, and then everything wait for it.
            if local and waiting >= SYNC_EVERY and (syncing is None or syncing.done()):
                if syncing:
                    syncing.result()
                file.flush()
                syncing, waiting = thread.submit(os.fsync, file.fileno()), 0
        if local:
            if syncing:
                syncing.result()
            file.flush()
            os.fsync(file.fileno())
    return {"bytes": size, "xxh128": digest.hexdigest()}


def ahead(
    make: Callable[[X], Y], items: Iterable[X], *, cost: Callable[[X], int], room: int
) -> Generator[Y, None, None]:
    """`make` of each item, in order; threads make the next ones while the caller has one.

    Args:
      make: called in threads.
      items: arguments of `make`.
      cost: of an item's result.
      room: the results that the caller has not asked for yet cost no more (or there is only one).
    """
    coming: collections.deque[tuple[int, Future[Y]]] = collections.deque()
    taken = 0
    with ThreadPoolExecutor(READERS) as threads:
        for item in items:
            while coming and taken + cost(item) > room:
                price, result = coming.popleft()
                taken -= price
                yield result.result()
            coming.append((cost(item), threads.submit(make, item)))
            taken += cost(item)
        while coming:
            yield coming.popleft()[1].result()


def sync_directory(path: epath.Path) -> None:
    """Brings the names in a directory to the disk."""
    if on_disk(path):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def code_digest(paths: Iterable[Path]) -> str:
    """SHA-256 of Python sources that ignores comments, docstrings and layout.

    Each file adds its name and its syntax tree, so the order of `paths` counts. Trees of different
    Python versions can differ.
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


def one_line(error: Exception) -> str:
    """The kind of an error and the first line of what it says."""
    return f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"
