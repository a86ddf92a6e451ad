"""Hugging Face checkpoints in: what a run starts from, one tensor streamed at a time."""

import contextlib
import functools
import json
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from flax.traverse_util import unflatten_dict
from jax.sharding import Mesh
from safetensors import SafetensorError, safe_open

from oapl_jax.errors import UserError
from oapl_jax.model.config import ModelConfig
from oapl_jax.model.layout import (
    INDEX,
    SINGLE,
    TABLE,
    Tensor,
    flatten,
    parameter_shapes,
    tensors_of,
)
from oapl_jax.model.sharding import parameter_shardings

IMPORT_DTYPES = ("F32", "BF16", "F16")


def load_config(directory: epath.PathLike) -> ModelConfig:
    """Reads a checkpoint's config.json.

    Raises:
      UserError: if it can't be read, lacks a field, or asks for what the decoder does not have.
    """
    path = epath.Path(directory) / "config.json"
    try:
        return ModelConfig.from_hf(json.loads(path.read_text()), source=str(path))
    except KeyError as error:
        raise UserError(f"{path} lacks {error}; is it the config.json of a decoder?") from error
    except (OSError, ValueError, AttributeError) as error:  # no file, no JSON, no JSON object
        raise UserError(f"{path} can't be read ({error}); name a checkpoint's directory") from error


def load_params(directory: epath.PathLike, config: ModelConfig, *, mesh: Mesh | None = None) -> Any:
    """Reads safetensors into a tree of float32 parameters, each device only its own part.

    Host memory beyond the result: the local parts of one (stacked) parameter, and one tensor.

    Args:
      directory: holds model.safetensors, or shards and their index; on a local or mounted disk.
      config: from `load_config`.
      mesh: where parameters go, by sharding.PARAMETER_RULES; None for the default device.

    Raises:
      UserError: lists every tensor that is unknown, missing, in several files, elsewhere than the
        index says, misshapen, or of a dtype not in IMPORT_DTYPES. With tied embeddings
        `lm_head.weight` may be there, as some checkpoints have it, if it equals the embedding.
    """
    tensors, shapes = tensors_of(config), parameter_shapes(config)
    shardings = dict.fromkeys(shapes, jnp.zeros(()).sharding)
    if mesh is not None:
        tree = parameter_shardings(unflatten_dict(shapes, sep="/"), mesh)
        shardings = flatten(tree)
    params = {}
    with contextlib.ExitStack() as stack:
        slices = _open(epath.Path(directory), tensors, stack)
        for path, leaf in shapes.items():
            mine = [tensor for tensor in tensors if tensor.path == path]
            read = functools.partial(_read, mine, slices, leaf.shape)
            params[path] = jax.make_array_from_callback(leaf.shape, shardings[path], read)
            # Transfers are asynchronous: without this, all parameters could pile up on the host.
            params[path].block_until_ready()
    return unflatten_dict(params, sep="/")


def _read(
    tensors: Sequence[Tensor], slices: Mapping[str, Any], shape: tuple[int, ...], index: Any
) -> np.ndarray:
    """The part of a parameter that one device holds (`index`), filled in tensor by tensor."""
    part = np.empty([len(range(n)[i]) for n, i in zip(shape, index, strict=True)], np.float32)
    slots = [part]
    if tensors[0].layer is not None:
        tensors, index, slots = tensors[index[0]], index[1:], list(part)
    for tensor, slot in zip(tensors, slots, strict=True):
        block = slices[tensor.name][index[::-1] if tensor.transposed else index]
        slot[...] = block.T if tensor.transposed else block
    return part


def _open(
    directory: epath.Path, tensors: Sequence[Tensor], stack: contextlib.ExitStack
) -> Mapping[str, Any]:
    """Opens the files on `stack`; returns name -> safetensors slice, with no name amiss."""
    files, weight_map = _files(directory)
    slices, places = {}, {}
    for file in files:
        try:
            opened = stack.enter_context(safe_open(directory / file, framework="numpy"))
        except (OSError, SafetensorError) as error:
            raise UserError(f"{directory / file} can't be read as safetensors: {error}") from error
        for name in opened.keys():  # noqa: SIM118 (it is no mapping)
            slices[name] = opened.get_slice(name)
            places.setdefault(name, []).append(file)

    shapes = {tensor.name: tensor.shape for tensor in tensors}
    head, embedding = (slices.get(TABLE[path]) for path in ("head", "embed/embedding"))
    tied = TABLE["head"] not in shapes
    if tied and head and embedding and np.array_equal(head[:], embedding[:]):
        del slices[TABLE["head"]]  # stored all the same
    known = {name: tensor for name, tensor in slices.items() if name in shapes}
    wrong = {
        "unknown": slices.keys() - shapes.keys(),
        "missing": shapes.keys() - slices.keys(),
        "in several files": [name for name, held in places.items() if len(held) > 1],
        "not where the index says": [
            name
            for name in (places | weight_map if weight_map else ())
            if weight_map.get(name) not in places.get(name, ())
        ],
        "misshapen": [
            f"{name} {tensor.get_shape()} instead of {list(shapes[name])}"
            for name, tensor in known.items()
            if tuple(tensor.get_shape()) != shapes[name]
        ],
        f"not {', '.join(IMPORT_DTYPES)}": [
            f"{name} {tensor.get_dtype()}"
            for name, tensor in known.items()
            if tensor.get_dtype() not in IMPORT_DTYPES
        ],
    }
    listed = [f"{what}: {', '.join(sorted(names))}" for what, names in wrong.items() if names]
    if listed:
        raise UserError(f"{directory} does not hold the configured model; {'; '.join(listed)}")
    return slices


def _files(directory: epath.Path) -> tuple[list[str], dict[str, str]]:
    """The checkpoint's files, and the index's tensor -> file (empty without an index)."""
    single, index = directory / SINGLE, directory / INDEX
    if single.exists() == index.exists():
        held = "both" if index.exists() else "none"
        raise UserError(f"{directory} must hold one of {SINGLE} and {INDEX}; it holds {held}")
    if single.exists():
        return [SINGLE], {}
    try:
        weight_map = dict(json.loads(index.read_text())["weight_map"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{index} has no readable weight_map ({error!r})") from error
    files = sorted(set(weight_map.values()))
    absent = [file for file in files if not (directory / file).exists()]
    if absent:
        raise UserError(f"{index} names files that don't exist: {', '.join(absent)}")
    return files, weight_map
