"""Deltas: weights of a version as changes from those of the version before, compressed.

A delta is the XOR of a safetensors file with that of the base version, which has the same tensors:
a weight that has not changed is zero. The bytes of a part are sorted by their place in a number,
since sign and exponent seldom change, and compressed with zstd, one frame a part. The manifest
(publisher.py) has the checksums of delta, base and result.
"""

import os
from collections.abc import Iterator

import numpy as np
import pyarrow as pa
from etils import epath

from oapl_jax.errors import UserError
from oapl_jax.files import READERS, prefetch

PART_BYTES = 16 << 20  # of the format: a reader needs the writer's
LEVEL = 1  # of zstd


class WrongBase(UserError):
    """The version that a delta was made from is missing, damaged or another one."""


def encode(file: epath.Path, base: epath.Path, *, itemsize: int) -> Iterator[bytes]:
    """Yields the delta of a local file; raises WrongBase for a base of another size.

    `itemsize` is the bytes of a number.
    """
    if file.stat().length != base.stat().length:
        raise WrongBase(f"{base} is no base of {file}: their sizes differ")
    codec = pa.Codec("zstd", compression_level=LEVEL)

    def compress(parts: tuple[np.ndarray, np.ndarray]) -> bytes:
        changes = parts[0] ^ parts[1]
        return codec.compress(_by_place(changes, itemsize), asbytes=True)

    yield from prefetch(
        compress,
        zip(_parts(file), _parts(base), strict=True),
        cost=lambda _: 2 * PART_BYTES,
        budget=2 * READERS * PART_BYTES,
    )


def decode(delta: epath.Path, base: epath.Path, *, itemsize: int) -> Iterator[memoryview]:
    """Yields the file that a local delta was made from; raises WrongBase for a shorter delta."""
    with pa.input_stream(os.fspath(delta), compression="zstd") as changes:
        for part in _parts(base):
            read = np.frombuffer(changes.read(len(part)), np.uint8)
            if len(read) != len(part):
                raise WrongBase(f"{delta} is no delta of {base}: it is shorter")
            yield (_by_number(read, itemsize) ^ part).data


def _parts(path: epath.Path) -> Iterator[np.ndarray]:
    with path.open("rb") as file:
        while part := file.read(PART_BYTES):
            yield np.frombuffer(part, np.uint8)


def _by_place(data: np.ndarray, itemsize: int) -> np.ndarray:
    """All first bytes of the numbers, then all second ones, ...; the tail is left unsorted."""
    end = len(data) - len(data) % itemsize
    return np.concatenate([data[:end].reshape(-1, itemsize).T.reshape(-1), data[end:]])


def _by_number(data: np.ndarray, itemsize: int) -> np.ndarray:
    """Inverts `_by_place`."""
    end = len(data) - len(data) % itemsize
    return np.concatenate([data[:end].reshape(itemsize, -1).T.reshape(-1), data[end:]])
