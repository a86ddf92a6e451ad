"""Crash-safe files, local or in an object store: atomic write, logs, checksums, manifests.

A log is append-only: a growing file on a disk, numbered segments in an object store.

Importing this module configures gcsfs for the process: several processes use one bucket.

A manifest is a JSON file with an entry for each file beside it: {"bytes": size, "xxh128":
hexadecimal XXH3 digest of 128 bits, as of xxh128sum}.
"""

import ast
import bisect
import collections
import contextlib
import fcntl
import functools
import hashlib
import itertools
import json
import math
import mmap
import os
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import fsspec
import fsspec.config
import xxhash
from etils import epath

from oapl_jax.errors import RunError, UserError, one_line

# A listing that was cached would hide what another process has added or deleted. And the variant of
# gcsfs that knows hierarchical buckets asks for the kind of each, with credentials of its own.
fsspec.config.conf.setdefault("gcs", {}).setdefault("use_listings_cache", False)
os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")

READERS = 4
SYNC_EVERY = 64 << 20  # bytes written before the next fsync starts
PART_BYTES = 16 << 20  # of a file that is copied or read in parts
UPLOAD_EVERY = 5.0  # seconds between two uploads of a log's last segment
SEGMENT_BYTES = 4 << 20  # at which the next segment begins
EPOCH_DIGITS, OFFSET_DIGITS = 6, 15  # in the name of a segment
HEAD_BYTES = 64  # of a log: identifies it
WEIGHTS = (".safetensors", ".zst")  # ends of names of large files, which few readers need
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


def local_place(path: epath.PathLike) -> epath.Path:
    """Local scratch path for a remote path, below the directory of temporary files; a process that
    resumes on this machine finds it again.

    Raises a UserError if another user has made its directory, whose content would be believed.
    """
    root = Path(tempfile.gettempdir()) / f"oapl_jax-{os.getuid()}"
    with contextlib.suppress(OSError):  # a full disk, or none: the caller's writes say so
        root.mkdir(mode=0o700, exist_ok=True)
    if root.is_symlink() or (root.exists() and root.stat().st_uid != os.getuid()):
        raise UserError(f"{root} is not yours; set TMPDIR to a directory that is")
    return epath.Path(root) / hashlib.sha256(os.fspath(path).encode()).hexdigest()[:16]


def check_reachable(path: epath.Path, *, of: str) -> None:
    """Raises a UserError, naming the setting `of`, for a bucket that can't be read.

    Only objects below `path` are listed: an account may be limited to them.
    """
    if is_local(path):
        return
    scheme = os.fspath(path).partition("://")[0]
    package = "the extra gcs (pip install --editable '.[gcs]')"
    package = package if scheme == "gs" else f"fsspec's package for {scheme}://"
    try:
        store, key = fsspec.url_to_fs(os.fspath(path))
        store.find(key, maxdepth=1)  # `exists` would take every error for a missing object
    except Exception as error:  # the libraries of stores name no closed set
        raise UserError(
            f"{of}={path} can't be reached ({one_line(error)}); install {package}, log in to the "
            "cloud, and name a bucket that exists"
        ) from error


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
    if not is_local(path):  # an object appears when its upload ends, by an error of `parts` too
        return write_file(path, [b"".join(parts)])
    temporary = path.parent / f"{path.name}.{uuid.uuid4().hex}.tmp"
    try:
        entry = write_file(temporary, parts)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    fsync(path.parent)
    return entry


def create(path: epath.PathLike, content: bytes) -> None:
    """Writes a file that must not exist; of several processes that do so at once, one succeeds.

    Raises FileExistsError for the others.
    """
    if is_local(path):
        with naming(path), open(path, "xb") as file:
            file.write(content)
    else:
        store, key = fsspec.url_to_fs(os.fspath(path))
        store.pipe_file(key, content, mode="create")


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


def read_json(
    path: epath.Path, fields: Iterable[str], *, optional: Iterable[str] = (), remedy: str
) -> dict[str, Any]:
    """Reads fields of a JSON object; raises a UserError, ending with `remedy`, if it lacks one
    that is not optional."""
    try:
        document = json.loads(path.read_text())
        found = {field: document[field] for field in optional if field in document}
        return {field: document[field] for field in fields} | found
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


def read_parts(path: epath.Path) -> Iterator[bytes]:
    """Yields the content of a file in parts; those of an object are read several at a time."""
    size = path.stat().length
    if is_local(path):
        with path.open("rb") as file:
            while part := file.read(PART_BYTES):
                yield part
        return
    store, key = fsspec.url_to_fs(os.fspath(path))
    yield from prefetch(
        lambda start: store.cat_file(key, start=start, end=min(start + PART_BYTES, size)),
        range(0, size, PART_BYTES),
        cost=lambda _: PART_BYTES,
        budget=READERS * PART_BYTES,
    )


def fetch(
    directory: epath.Path,
    files: Mapping[str, Mapping[str, Any]],
    to: epath.Path,
    *,
    remedy: str,
) -> None:
    """Copies files into the directory `to`, flushed to its disk, by their manifest entries.

    Raises a UserError, ending with `remedy`, for one that is missing or differs from its entry.
    """
    for name, entry in files.items():
        path = directory / name
        found = _copy(directory, name, to) if path.exists() else {}
        if not found or not found.items() <= entry.items():
            raise UserError(f"{path} is missing or damaged; {remedy}")


def _copy(directory: epath.Path, name: str, to: epath.Path) -> dict[str, Any]:
    """Copies a file into the directory `to`; returns its manifest entry.

    Raises a UserError for a name, as of a manifest, that leaves the directory.
    """
    if not Path(to, name).resolve().is_relative_to(Path(to).resolve()):
        raise UserError(f"{directory} names a file outside of it, {name!r}; restore a whole copy")
    (to / name).parent.mkdir(parents=True, exist_ok=True)
    return write_file(to / name, read_parts(directory / name))


@contextlib.contextmanager
def made_locally(path: epath.Path) -> Iterator[epath.Path]:
    """Yields a local place for a file that the body writes; then it appears at `path`, whole."""
    with tempfile.TemporaryDirectory() as temporary:
        local = is_local(path)
        aside = path.parent / f"{path.name}.tmp" if local else epath.Path(temporary) / path.name
        yield aside
        if local:
            fsync(aside)
            aside.replace(path)
        else:
            write_file(path, read_parts(aside))


@contextlib.contextmanager
def local_copy(
    directory: epath.Path, names: Iterable[str] | None = None, *, keep: bool = False
) -> Iterator[epath.Path]:
    """The directory itself if it is local, else one with copies of its files, within the body.

    `names` chooses the files of the copy; None for all but weights. With `keep` the copy stays
    until the process ends or another one is kept, and is used again.
    """
    if is_local(directory):
        yield directory
        return
    if names is None:
        found = list(directory.iterdir()) if directory.exists() else []
        names = [p.name for p in found if p.suffix not in WEIGHTS and not p.is_dir()]
    make = _kept_copy if keep else _kept_copy.__wrapped__
    temporary = make(directory, tuple(names))
    try:
        yield epath.Path(temporary.name)
    finally:
        if not keep:
            temporary.cleanup()


@functools.lru_cache(maxsize=1)
def _kept_copy(directory: epath.Path, names: tuple[str, ...]) -> "tempfile.TemporaryDirectory[str]":
    temporary = tempfile.TemporaryDirectory()  # deleted with the last reference
    for name in names:
        _copy(directory, name, epath.Path(temporary.name))
    return temporary


class GrowingFile:
    """An append-only local file, which other processes may read meanwhile.

    Opening removes last lines that a kill has cut or a crash of the machine has left as NUL bytes;
    `exclusive` locks the file until `close`. `append` hands bytes to the operating system, so that
    a kill loses none; `sync` brings them to the disk. `size` is in bytes.
    """

    def __init__(self, path: epath.Path, *, exclusive: bool = False):
        self._path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = open(path, "a+b")  # noqa: SIM115
        try:
            if exclusive:
                lock(self._file.fileno(), path)
            self.truncate(self._end_of_last_line())
        except BaseException:
            self._file.close()
            raise

    def append(self, content: bytes) -> None:
        with naming(self._path):
            self._file.write(content)
            self._file.flush()
        self.size += len(content)

    def sync(self) -> None:
        with naming(self._path):
            os.fsync(self._file.fileno())

    def truncate(self, size: int) -> None:
        """Drops everything after the first `size` bytes."""
        with naming(self._path):
            self._file.truncate(size)
        self.size = size

    def close(self) -> None:
        with naming(self._path):  # it writes what a full disk has refused
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


class Segments:
    """Append-only bytes in an object store, whose objects can't grow: numbered segments.

    A thread uploads the last segment as a whole, every `UPLOAD_EVERY` seconds if it has grown: a
    loss of the machine loses the appends since then. A kill loses none: a local file, the spool,
    has the last segment too, which the next process on this machine uploads. `sync` uploads it and
    begins another one, so that nothing that a checkpoint knows of is written again. An upload that
    failed is repeated; `sync` raises a RunError for it.

    A segment's name is `prefix`, an epoch and the offset of its first byte. Opening and `truncate`
    begin an epoch, from whose first offset on earlier epochs do not count: a process that was taken
    for dead and still writes changes nothing. One process at a time may open.

    Args:
      directory: of the segments; a file of this name, as of a run moved from a disk, becomes the
        first one.
      prefix: of their names, if they share the directory with other files; without lines, and
        with no spool.
    """

    def __init__(self, directory: epath.Path, prefix: str = ""):
        self._directory, self._prefix = directory, prefix
        if not prefix and directory.exists() and not directory.is_dir():
            write_atomically(self._path(_Segment(0, 0)), [directory.read_bytes()])
            directory.unlink()
        self._spool = None if prefix else local_place(f"{os.fspath(directory)}.segment")
        if self._spool and self._spool.exists():
            with contextlib.suppress(ValueError):  # another file than `_write_spool` makes
                self._recover(self._spool.read_bytes())
        self.size = _end_of_segments(directory, prefix)
        self._head = self._read_head()
        self._last, self._uploaded = bytearray(), 0  # the last segment, and its length in the store
        self._changing, self._uploading = threading.Lock(), threading.Lock()
        self._begin_epoch()
        self._closed, self._wake = False, threading.Event()
        self._thread = threading.Thread(target=self._upload_often, daemon=True, name="segments")
        self._thread.start()

    def append(self, content: bytes) -> None:
        with self._changing:
            if not self.size:
                self._head = content[:HEAD_BYTES]
                self._write_spool(b"", begin=True)
            self._write_spool(content)
            self._last += content
            self.size += len(content)
            full = len(self._last) >= SEGMENT_BYTES
        if full:
            self._wake.set()

    def sync(self) -> None:
        try:
            self._upload(begin_another=True)
        except Exception as error:  # the libraries of stores name no closed set
            raise RunError(
                f"{self._path(self._segment)} can't be written ({one_line(error)}); see the "
                "store and its credentials, then start again: what was saved stays"
            ) from error

    def truncate(self, size: int) -> None:
        """Drops everything after the first `size` bytes."""
        self.sync()
        if size == self.size:
            return
        with self._uploading, self._changing:
            self.size, self._head = size, self._head[:size]
            self._begin_epoch()
            for segment in _all_segments(self._directory, self._prefix):
                if segment.epoch < self._segment.epoch and segment.start >= size:
                    self._path(segment).unlink()

    def close(self) -> None:
        self._closed = True
        self._wake.set()
        self._thread.join()
        self.sync()
        if self._spool:
            self._spool.unlink(missing_ok=True)

    def _path(self, segment: "_Segment") -> epath.Path:
        return self._directory / f"{self._prefix}{segment}"

    def _begin_epoch(self) -> None:
        """Creates the first segment of an epoch of this process, empty, at the end of the log."""
        epochs = [segment.epoch for segment in _all_segments(self._directory, self._prefix)]
        for epoch in itertools.count(max(epochs, default=0) + 1):
            self._segment = _Segment(epoch, self.size)
            with contextlib.suppress(FileExistsError):  # also if a client repeats its request
                create(self._path(self._segment), b"")
                break
        self._write_spool(b"", begin=True)

    def _upload_often(self) -> None:
        while not self._closed:
            self._wake.wait(UPLOAD_EVERY)
            self._wake.clear()
            with contextlib.suppress(Exception):  # the next upload, or `sync`, tries again
                self._upload(begin_another=len(self._last) >= SEGMENT_BYTES)

    def _upload(self, *, begin_another: bool) -> None:
        with self._uploading:  # in order: an older state must not replace a newer one
            with self._changing:
                content = bytes(self._last)
            if len(content) > self._uploaded:
                write_atomically(self._path(self._segment), [content])
                self._uploaded = len(content)
            if begin_another and content:
                with self._changing:
                    start = self._segment.start + len(content)
                    self._segment = _Segment(self._segment.epoch, start)
                    del self._last[: len(content)]
                    self._uploaded = 0
                    self._write_spool(bytes(self._last), begin=True)

    def _write_spool(self, content: bytes, *, begin: bool = False) -> None:
        """Appends to the spool, or begins it again: a line with the name of the last segment and
        the head of the log, then that segment.

        After a failed write there is none until it begins again: a line may be torn.
        """
        if not self._spool or not (begin or self._spool.exists()):
            return
        try:
            with self._spool.open("wb" if begin else "ab") as file:
                file.write(f"{self._segment} {self._head.hex()}\n".encode() * begin + content)
        except OSError:
            with contextlib.suppress(OSError):
                self._spool.unlink(missing_ok=True)

    def _recover(self, spool: bytes) -> None:
        """Uploads the last segment of a process that was killed, if no other has written since."""
        header, _, content = spool.partition(b"\n")
        name, _, head = header.decode().partition(" ")
        content = content[: content.rfind(b"\n") + 1]
        segment, found = _Segment.parse(name), _segments(self._directory)
        if not segment or not head:
            return
        path, uploaded, stored = self._path(segment), b"", self._read_head()
        if begun := path.exists():
            uploaded = path.read_bytes()
        if not (stored.startswith(bytes.fromhex(head)) if stored else begun):
            return  # another log, whose name this one has now
        at_the_end = segment.start + len(uploaded) == _end_of_segments(self._directory)
        newest = bool(found) and found[-1].epoch == segment.epoch
        if at_the_end and newest and content.startswith(uploaded) and len(content) > len(uploaded):
            write_atomically(path, [content])

    def _read_head(self) -> bytes:
        """The first bytes of the log; b"" for none."""
        parts = () if self._prefix else read_log(self._directory)
        return next(iter(parts), b"")[:HEAD_BYTES]


class _Segment(NamedTuple):
    """Name of a segment: epochs begin with opening, `start` is the offset of the first byte."""

    epoch: int
    start: int

    def __str__(self) -> str:
        return f"{self.epoch:0{EPOCH_DIGITS}d}.{self.start:0{OFFSET_DIGITS}d}"

    @classmethod
    def parse(cls, name: str) -> "_Segment | None":
        """The segment of a name, which may be another file's."""
        epoch, _, start = name.partition(".")
        whole = len(epoch) == EPOCH_DIGITS and len(start) == OFFSET_DIGITS
        return cls(int(epoch), int(start)) if whole and f"{epoch}{start}".isdigit() else None


def _all_segments(directory: epath.Path, prefix: str = "") -> list[_Segment]:
    """Segments below a directory, by epoch and offset."""
    names = [path.name for path in directory.iterdir()] if directory.exists() else []
    found = [_Segment.parse(n.removeprefix(prefix)) for n in names if n.startswith(prefix)]
    return sorted(segment for segment in found if segment)


def _segments(directory: epath.Path, prefix: str = "") -> list[_Segment]:
    """Segments that count, by offset: of an epoch those before all later epochs."""
    counting: list[_Segment] = []
    newest_first = reversed(_all_segments(directory, prefix))
    for _, group in itertools.groupby(newest_first, key=lambda segment: segment.epoch):
        end = counting[-1].start if counting else math.inf
        counting += [segment for segment in group if segment.start < end]
    return counting[::-1]


def _end_of_segments(directory: epath.Path, prefix: str = "") -> int:
    found = _segments(directory, prefix)
    return found[-1].start + (directory / f"{prefix}{found[-1]}").stat().length if found else 0


def open_log(path: epath.Path, *, exclusive: bool = False) -> GrowingFile | Segments:
    """Opens append-only bytes: a growing file on a disk, segments below `path` in a bucket.

    A directory of segments that was copied from a bucket to a disk goes on as one. A store has no
    locks, so `exclusive` is for a file; a lease (weights/lease.py) keeps others from a bucket.
    """
    if is_local(path) and not path.is_dir():
        return GrowingFile(path, exclusive=exclusive)
    if exclusive:
        raise UserError(f"{path} is not a file on a disk and can't be locked; name one that is")
    return Segments(path)


def read_log(path: epath.Path, *, last: int | None = None) -> Iterator[bytes]:
    """Yields the content of a log in parts: all, or from a line among the `last` bytes on.

    Raises a UserError if a segment is missing.
    """
    if not path.is_dir() and (is_local(path) or path.exists()):
        with path.open("rb") as file:
            if last is not None and (start := file.seek(0, os.SEEK_END) - last) > 0:
                file.seek(start - 1)
                file.readline()
            elif last is not None:
                file.seek(0)
            while part := file.read(PART_BYTES):
                yield part
        return
    found = _segments(path)
    if last is not None:
        first = bisect.bisect_right([s.start for s in found], _end_of_segments(path) - last) - 1
        found = found[max(first, 0) :]
    contents = prefetch(
        lambda segment: (path / str(segment)).read_bytes(),
        found,
        cost=lambda _: SEGMENT_BYTES,
        budget=READERS * SEGMENT_BYTES,
    )
    at = found[0].start if last is not None and found else 0
    for segment, next_one, content in itertools.zip_longest(found, found[1:], contents):
        if segment.start != at:
            raise UserError(f"{path} lacks its bytes {at} to {segment.start}; restore a whole copy")
        # An epoch may begin within a segment of an earlier one.
        content = content[: next_one.start - at] if next_one else content
        at += len(content)
        yield content


def log_state(path: epath.Path) -> str:
    """Changes whenever a log does; "-" for none."""
    if not path.exists():
        return "-"
    if path.is_dir():
        return f"{_end_of_segments(path)} {_all_segments(path)[-1:]}"
    stat = path.stat()
    return f"{stat.length}.{stat.mtime}"


class JsonLines:
    """A log of JSON objects, one a line, that survives a kill; see `GrowingFile` and `Segments`.

    `size` is in bytes. Raises a UserError if another process has locked the file.
    """

    def __init__(self, path: epath.Path, *, exclusive: bool):
        self.path, self._log = path, open_log(path, exclusive=exclusive)
        self.sync, self.truncate, self.close = self._log.sync, self._log.truncate, self._log.close

    @property
    def size(self) -> int:
        return self._log.size

    def append(self, line: Mapping[str, Any]) -> None:
        """Writes one line; raises a RunError for a number that is not finite."""
        try:
            text = encode_json(line)
        except ValueError as error:
            raise RunError(f"a number for {self.path} is not finite: {line}") from error
        self._log.append(text.encode() + b"\n")

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return read_json_lines(self.path)


def whole_lines(parts: Iterable[bytes]) -> Iterator[bytes]:
    """Yields the lines of parts, but a last one that a kill has cut or that is being written."""
    rest = b""
    for part in parts:
        lines = (rest + part).splitlines(keepends=True)
        rest = b"" if not lines or lines[-1].endswith(b"\n") else lines.pop()
        yield from lines


def read_json_lines(path: epath.Path) -> Iterator[dict[str, Any]]:
    """Yields the whole lines of a log; raises a UserError for one that is no JSON object."""
    for number, text in enumerate(whole_lines(read_log(path)), 1):
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
