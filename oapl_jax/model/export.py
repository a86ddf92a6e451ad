"""Checkpoints out: what a fleet, or transformers, loads; one tensor streamed at a time."""

import contextlib
import itertools
import json
import math
import struct
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import ml_dtypes
import numpy as np
from etils import epath

from oapl_jax.errors import UserError
from oapl_jax.files import prefetch, write_file
from oapl_jax.model.config import ModelConfig
from oapl_jax.model.layout import INDEX, SINGLE, Tensor, flatten, parameter_shapes, tensors_of

EXPORT_DTYPES = {"float32": ("F32", np.float32), "bfloat16": ("BF16", ml_dtypes.bfloat16)}
READ_AHEAD, STRIP = 64 << 20, 32  # bytes; rows


def save_params(
    params: Any, config: ModelConfig, directory: epath.PathLike, *, dtype: str, max_shard_bytes: int
) -> dict[str, dict[str, Any]]:
    """Writes a checkpoint that transformers and SGLang load: safetensors first, config.json last.

    Tensors are read while others are written. Host memory beyond the parameters: two of the largest
    tensor (for small ones READ_AHEAD and one), and what reading takes for a few blocks.

    Args:
      params: a tree (or a mapping by path) of numpy arrays, jax arrays that this process can
        address, or open TensorStore arrays; of a stacked one, a layer at a time is read.
      config: their model.
      directory: made if need be; must not hold safetensors yet.
      dtype: of the tensors, a key of EXPORT_DTYPES.
      max_shard_bytes: of the tensors in one file; a tensor larger than that has a file of its own.

    Returns:
      File name -> {"bytes", "xxh128"} of what was written, and is on the disk.

    Raises:
      UserError: for an unknown dtype, a size that is not positive, or a directory already in use.
      ValueError: if the parameters are not those of the model, listing the differences, or lie on
        other hosts.
    """
    directory = epath.Path(directory)
    if dtype not in EXPORT_DTYPES:
        raise UserError(f"can't export dtype {dtype!r}; choose one of {', '.join(EXPORT_DTYPES)}")
    if max_shard_bytes < 1:
        raise UserError(f"max_shard_bytes={max_shard_bytes} must be positive")
    if directory.exists() and any(directory.glob("*.safetensors*")):
        raise UserError(f"{directory} already holds safetensors; export to a directory of its own")
    flat = flatten(params)
    given = {path: tuple(np.shape(leaf)) for path, leaf in flat.items()}
    wanted = {path: leaf.shape for path, leaf in parameter_shapes(config).items()}
    wrong = [p for p in sorted(given | wanted) if given.get(p) != wanted.get(p)]
    if wrong:
        differences = ", ".join(f"{p} {given.get(p)} instead of {wanted.get(p)}" for p in wrong)
        raise ValueError(f"not the parameters of this {config.model_type}: {differences}")

    if any(isinstance(x, jax.Array) and not x.is_fully_addressable for x in flat.values()):
        raise ValueError("some parameters lie on other hosts; gather them before the export")

    shards: list[list[Tensor]] = []
    left, total = 0, 0
    for tensor in tensors_of(config):
        size = _bytes(tensor, dtype)
        if size > left:
            shards.append([])
            left = max_shard_bytes
        shards[-1].append(tensor)
        left, total = left - size, total + size
    directory.mkdir(parents=True, exist_ok=True)
    written, weight_map = {}, {}
    for i, shard in enumerate(shards, start=1):
        file = SINGLE if len(shards) == 1 else f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        written[file] = _write(directory / file, shard, flat, dtype)
        weight_map |= {tensor.name: file for tensor in shard}
    documents = {"config.json": config.to_hf(dtype=dtype)}
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        documents = {INDEX: index, **documents}
    for file, document in documents.items():
        text = json.dumps(document, indent=2) + "\n"
        written[file] = write_file(directory / file, [text.encode()])
    return written


def _bytes(tensor: Tensor, dtype: str) -> int:
    return math.prod(tensor.shape) * np.dtype(EXPORT_DTYPES[dtype][1]).itemsize


def _write(
    path: epath.Path, shard: Sequence[Tensor], flat: Mapping[str, Any], dtype: str
) -> dict[str, Any]:
    """Writes one file: 8 bytes of header length, a JSON header, then the tensors end to end.

    By hand, since safetensors' own writer wants all tensors of a file in memory.
    """
    code, numpy_dtype = EXPORT_DTYPES[dtype]
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in shard:
        start, end = end, end + _bytes(tensor, dtype)
        header[tensor.name] = {"dtype": code, "shape": tensor.shape, "data_offsets": [start, end]}
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)  # aligns the data

    head = struct.pack("<Q", len(encoded)) + encoded
    parts = [(tensor, rows) for tensor in shard for rows in _rows(tensor, flat[tensor.path])]
    cost = lambda part: _bytes(part[0], dtype) * len(part[1]) // part[0].shape[0]
    read = prefetch(
        lambda part: _fetch(*part, flat[part[0].path], numpy_dtype),
        parts,
        cost=cost,
        budget=max(READ_AHEAD, *map(cost, parts)),
    )
    with contextlib.closing(read):  # even if writing fails, no thread reads on
        return write_file(path, itertools.chain([head], read))


def _block(value: Any) -> tuple[int, ...]:
    """The shape of what is read at a time: TensorStore reads whole chunks."""
    layout = getattr(value, "chunk_layout", None)
    return layout.read_chunk.shape if layout else value.shape


def _rows(tensor: Tensor, leaf: Any) -> list[range]:
    """The rows of a tensor in parts of whole blocks, so that each block is read once."""
    size, step = tensor.shape[0], _block(leaf)[-1 if tensor.transposed else -len(tensor.shape)]
    return [range(i, min(i + step, size)) for i in range(0, size, step)]


def _fetch(tensor: Tensor, rows: range, leaf: Any, dtype: Any) -> memoryview:
    """The bytes of some rows as a file has them; beside them, one block is held at a time."""
    value = leaf if tensor.layer is None else leaf[tensor.layer]
    out = np.empty((len(rows), *tensor.shape[1:]), dtype)
    place, axis = (out.T, -1) if tensor.transposed else (out, 0)
    cut = [
        [slice(i, min(i + b, n)) for i in range(0, n, b)]
        for n, b in zip(value.shape, _block(value), strict=True)
    ]
    cut[axis] = [slice(rows.start, rows.stop)]
    for index in itertools.product(*cut):
        within = list(index)
        within[axis] = slice(None)
        target, source = place[tuple(within)], np.asarray(value[index])
        # Twice as fast by strips that fit the cache, and as much again if each is rounded before.
        for i in range(0, len(source), STRIP):
            target[i : i + STRIP] = source[i : i + STRIP].astype(dtype, copy=False)
    return out.reshape(-1).view(np.uint8).data
