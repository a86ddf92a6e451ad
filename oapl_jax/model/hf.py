"""Hugging Face checkpoints: streaming import and export through one table of tensor names.

A directory of adapters in PEFT format names its base, and reads as the base with them merged.
"""

import contextlib
import dataclasses
import functools
import itertools
import json
import math
import struct
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from etils import epath
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh
from safetensors import SafetensorError, safe_open

from oapl_jax.config import LORA_TARGETS
from oapl_jax.errors import UserError, one_line
from oapl_jax.files import fsync, local_copy, prefetch, read_json, write_file
from oapl_jax.model import lora as adapters
from oapl_jax.model.config import ModelConfig, read_stop_ids
from oapl_jax.model.lora import Lora
from oapl_jax.model.sharding import parameter_shardings, serving_dtype
from oapl_jax.model.transformer import Transformer

CONFIG, GENERATION = "config.json", "generation_config.json"
SPECIAL_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
DELTA = ".xor.zst"  # ends the name of weights that a published version has as a delta
ADAPTER, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"
ADAPTER_DTYPE = "float32"  # of adapters in files
MERGED_BELOW = "adapter"  # directory of the adapters beside merged weights
ADAPTER_FIELDS = ("base_model_name_or_path", "r", "lora_alpha", "target_modules")
# Variants of adapters that another forward pass needs: false, null or empty.
ADAPTER_LACKING = (
    *("use_dora", "use_rslora", "fan_in_fan_out", "modules_to_save", "rank_pattern"),
    *("alpha_pattern", "layers_to_transform", "layer_replication", "trainable_token_indices"),
    *("lora_bias", "target_parameters", "use_qalora", "use_bdlora", "alora_invocation_tokens"),
)
IMPORT_DTYPES = ("F32", "BF16", "F16")
INV_FREQ = "rotary_emb.inv_freq"  # in the names of tensors of old checkpoints that are not weights
EXPORT_DTYPES = {"float32": ("F32", np.float32), "bfloat16": ("BF16", ml_dtypes.bfloat16)}
READ_AHEAD = 64 << 20  # bytes of tensors read while others are written
STRIP = 32  # rows converted at a time

# Parameter -> tensor. {layer} stands for one tensor per layer, stacked here on the leading axis.
# Kernels and the head are transposed: a torch Linear stores [out, in].
TABLE = {
    "embed/embedding": "model.embed_tokens.weight",
    "layers/attention_norm/scale": "model.layers.{layer}.input_layernorm.weight",
    "layers/q/kernel": "model.layers.{layer}.self_attn.q_proj.weight",
    "layers/q/bias": "model.layers.{layer}.self_attn.q_proj.bias",
    "layers/q_norm/scale": "model.layers.{layer}.self_attn.q_norm.weight",
    "layers/k/kernel": "model.layers.{layer}.self_attn.k_proj.weight",
    "layers/k/bias": "model.layers.{layer}.self_attn.k_proj.bias",
    "layers/k_norm/scale": "model.layers.{layer}.self_attn.k_norm.weight",
    "layers/v/kernel": "model.layers.{layer}.self_attn.v_proj.weight",
    "layers/v/bias": "model.layers.{layer}.self_attn.v_proj.bias",
    "layers/o/kernel": "model.layers.{layer}.self_attn.o_proj.weight",
    "layers/o/bias": "model.layers.{layer}.self_attn.o_proj.bias",
    "layers/mlp_norm/scale": "model.layers.{layer}.post_attention_layernorm.weight",
    "layers/gate/kernel": "model.layers.{layer}.mlp.gate_proj.weight",
    "layers/up/kernel": "model.layers.{layer}.mlp.up_proj.weight",
    "layers/down/kernel": "model.layers.{layer}.mlp.down_proj.weight",
    "final_norm/scale": "model.norm.weight",
    "head": "lm_head.weight",
}


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A tensor of a checkpoint, and the parameter (or layer of a stacked one) that it holds."""

    name: str
    shape: tuple[int, ...]
    path: str
    layer: int | None
    transposed: bool


def tensor_name(path: str) -> str:
    """Name of a parameter's tensor; raises a KeyError for a parameter that TABLE lacks."""
    if path.endswith(adapters.ADAPTERS):
        module, _, name = path.rpartition("/")
        linear = tensor_name(f"{module}/kernel").removesuffix("weight")
        return f"base_model.model.{linear}lora_{name[-1].upper()}.weight"
    if path not in TABLE:
        raise KeyError(f"no row names parameter {path!r}; add one to TABLE")
    return TABLE[path]


def tensors_of(config: ModelConfig, lora: Lora | None = None) -> list[Tensor]:
    """Tensors of a model's checkpoint, or of its adapters; raises as `tensor_name`."""
    tensors = []
    for path, leaf in parameter_shapes(config, lora).items():
        name = tensor_name(path)
        stacked = "{layer}" in name
        transposed = path == "head" or path.endswith(("/kernel", *adapters.ADAPTERS))
        shape = leaf.shape[1:] if stacked else leaf.shape
        shape = shape[::-1] if transposed else shape
        for layer in range(config.num_layers) if stacked else (None,):
            tensors.append(Tensor(name.format(layer=layer), shape, path, layer, transposed))
    return tensors


def parameter_count(config: ModelConfig, lora: Lora | None = None) -> int:
    """Numbers in a model's checkpoint, or in its adapters."""
    return sum(math.prod(tensor.shape) for tensor in tensors_of(config, lora))


def parameter_shapes(
    config: ModelConfig, lora: Lora | None = None
) -> dict[str, jax.ShapeDtypeStruct]:
    """Path -> shape of every parameter, or of every adapter, from the initializer."""
    return _shapes(config, lora)


@functools.cache
def _shapes(config: ModelConfig, lora: Lora | None) -> dict[str, jax.ShapeDtypeStruct]:
    model = Transformer(config, jnp.float32, "none", lora)
    token = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    params = jax.eval_shape(model.init, jax.random.key(0), token, token, token)["params"]
    return _flatten(adapters.adapters_of(params) if lora else params)


def is_delta(directory: epath.Path) -> bool:
    """True for a published version that has deltas of weights in the place of weights."""
    stored = [path.name.removesuffix(DELTA) for path in directory.glob(f"*{DELTA}")]
    return not all((directory / name).exists() for name in stored)


def load_config(directory: epath.PathLike) -> ModelConfig:
    """Reads config.json, and stop ids of generation_config.json; see `read_config`.

    Raises:
      UserError: also for files that can't be read.
    """
    try:
        return read_config(directory)
    except (OSError, ValueError) as error:
        remedy = "name the directory of a decoder's checkpoint"
        raise UserError(f"{directory} can't be read ({one_line(error)}); {remedy}") from error


def read_config(directory: epath.PathLike) -> ModelConfig:
    """Reads config.json, and further stop ids of generation_config.json if there is one.

    Raises:
      OSError, ValueError: for a file that is missing or no JSON object.
      UserError: for a model that the decoder can't compute, or values that are impossible.
    """
    path, generation = (epath.Path(directory) / name for name in (CONFIG, GENERATION))
    config = ModelConfig.from_hf(_read_object(path), source=str(path))
    if not generation.exists():
        return config
    more = read_stop_ids(_read_object(generation), source=str(generation))
    return dataclasses.replace(
        config, eos_token_ids=tuple(dict.fromkeys((*config.eos_token_ids, *more)))
    )


def _read_object(path: epath.Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: {one_line(error)}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds no JSON object")
    return content


def load_params(
    directory: epath.PathLike,
    config: ModelConfig,
    *,
    mesh: Mesh | None = None,
    dtype: str = "float32",
) -> Any:
    """Reads safetensors into a tree of parameters; each device reads only its own part.

    Host memory beyond the result: the local parts of one (stacked) parameter, and one tensor.
    They are float32, or for weights that are not trained in `dtype` (see `serving_dtype`).
    The files of a bucket are copied to a local disk first; without a mesh, the parameters go to the
    default device. Adapters are merged into their base. Frequencies (INV_FREQ) and, with tied
    embeddings, a copy in `lm_head.weight` are ignored.
    Raises a UserError that lists every tensor that is unknown, missing, misplaced, of a wrong
    shape or dtype, or that names the first one that is not finite.
    """
    shapes = parameter_shapes(config)
    with contextlib.ExitStack() as stack:
        stored = open_stored(epath.Path(directory), config, stack)
        return _place(stored, shapes, mesh, dtype)


def _place(stored: Mapping[str, "Stored"], shapes: Any, mesh: Mesh | None, dtype: str) -> Any:
    shardings = dict.fromkeys(shapes, jnp.zeros(()).sharding)
    if mesh is not None:
        shardings = _flatten(parameter_shardings(unflatten_dict(shapes, sep="/"), mesh))
    params = {}
    for path, leaf in shapes.items():
        served = serving_dtype(path, dtype)
        read = lambda index, of=stored[path], to=served: of[index].astype(to, copy=False)
        params[path] = jax.make_array_from_callback(leaf.shape, shardings[path], read)
        # Transfers are asynchronous: without this, all parameters could pile up on the host.
        params[path].block_until_ready()
    return unflatten_dict(params, sep="/")


@dataclasses.dataclass(frozen=True)
class Stored:
    """A parameter in files, read where it is indexed, as float32."""

    shape: tuple[int, ...]
    read: Callable[[tuple[slice, ...]], np.ndarray]

    def __getitem__(self, index: Any) -> np.ndarray:
        """Reads the part at slices, or a layer at an integer."""
        if isinstance(index, int):
            return self.read((slice(index, index + 1), *[slice(None)] * (len(self.shape) - 1)))[0]
        return self.read(index)


def open_stored(
    directory: epath.Path, config: ModelConfig, stack: contextlib.ExitStack, *, keep: bool = False
) -> dict[str, Stored]:
    """Opens the parameters of a checkpoint, or of adapters merged into their base, on `stack`.

    A checkpoint in a bucket is copied, with `keep` once a process: the base of adapters is.
    """
    if (directory / ADAPTER_CONFIG).exists():
        lora, base = read_adapter_config(directory)
        trained = _open_tensors(directory, config, lora, stack)
        return merge_stored(open_stored(base, config, stack, keep=True), trained, lora)
    return _open_tensors(directory, config, None, stack, keep=keep)


def merge_stored(
    base: Mapping[str, Stored], trained: Mapping[str, Any], lora: Lora
) -> dict[str, Stored]:
    """Adds adapters to a base, which is rounded as the learner holds it."""

    def merged(path: str, leaf: Stored) -> Stored:
        names = [path.replace("kernel", name) for name in adapters.ADAPTERS]
        a, b = (trained.get(name) for name in names)

        def read(index: tuple[slice, ...]) -> np.ndarray:
            part = leaf[index].astype(serving_dtype(path, adapters.FROZEN_DTYPE)).astype(np.float32)
            if a is not None and b is not None:
                rows, columns = index[1:]
                for layer, target in zip(range(leaf.shape[0])[index[0]], part, strict=True):
                    left, right = (np.asarray(x[layer], np.float32) for x in (a, b))
                    target += lora.scale * (left[rows] @ right[:, columns])
            return part

        return Stored(leaf.shape, read)

    return {path: merged(path, leaf) for path, leaf in base.items()}


def _open_tensors(
    directory: epath.Path,
    config: ModelConfig,
    lora: Lora | None,
    stack: contextlib.ExitStack,
    *,
    keep: bool = False,
) -> dict[str, Stored]:
    tensors, stored = tensors_of(config, lora), {}
    slices = _open(directory, tensors, stack, keep=keep)
    for path, leaf in parameter_shapes(config, lora).items():
        of_path = [tensor for tensor in tensors if tensor.path == path]
        read = functools.partial(_read, directory, of_path, slices, leaf.shape)
        stored[path] = Stored(leaf.shape, read)
    return stored


def save_params(
    params: Any, config: ModelConfig, directory: epath.PathLike, *, dtype: str, max_shard_bytes: int
) -> dict[str, dict[str, Any]]:
    """Writes a checkpoint that transformers and SGLang load: safetensors first, config.json last.

    generation_config.json, where both read the ids that end a response, has those of config.json.
    Tensors are read while others are written. Host memory beyond the parameters: the larger of two
    of the largest tensor and READ_AHEAD, and the buffers of a few block reads. Returns file name ->
    manifest entry; all files are on disk.

    Args:
      params: a tree (or mapping by path) of numpy, addressable jax, or open TensorStore arrays.
      dtype: of the tensors, a key of EXPORT_DTYPES.
      max_shard_bytes: bound on a file; a larger tensor has a file of its own.

    Raises a UserError for a directory already in use, and a ValueError if the parameters are not
    the model's (listing the differences) or on other hosts.
    """
    directory = epath.Path(directory)
    if directory.exists() and any(directory.glob("*.safetensors*")):
        raise UserError(f"{directory} already holds safetensors; export to a directory of its own")
    flat = _check(params, config, None)
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
    document = config.to_hf(dtype=dtype)
    documents = {GENERATION: {key: document[key] for key in SPECIAL_TOKENS}, CONFIG: document}
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        documents = {INDEX: index, **documents}
    for file, document in documents.items():
        text = json.dumps(document, indent=2) + "\n"
        written[file] = write_file(directory / file, [text.encode()])
    return written


def save_adapters(
    params: Any,
    config: ModelConfig,
    lora: Lora,
    directory: epath.PathLike,
    *,
    base: str,
) -> dict[str, dict[str, Any]]:
    """Writes adapters in PEFT format, in ADAPTER_DTYPE; as `save_params`.

    `base` is the directory of the frozen weights, which readers merge them into.
    """
    directory, flat = epath.Path(directory), _check(params, config, lora)
    directory.mkdir(parents=True, exist_ok=True)
    written = {ADAPTER: _write(directory / ADAPTER, tensors_of(config, lora), flat, ADAPTER_DTYPE)}
    document = dict(
        peft_type="LORA",
        task_type="CAUSAL_LM",
        base_model_name_or_path=base,
        r=lora.rank,
        lora_alpha=lora.alpha,
        target_modules=list(lora.targets),
        lora_dropout=0.0,
        bias="none",
        inference_mode=True,
    )
    text = json.dumps(document, indent=2) + "\n"
    written[ADAPTER_CONFIG] = write_file(directory / ADAPTER_CONFIG, [text.encode()])
    return written


@dataclasses.dataclass(frozen=True)
class Adapters:
    """Adapters of a run, as they are published."""

    lora: Lora
    base: str  # directory of the frozen weights
    merged: bool  # publish merged weights, and the adapters in a directory below

    def save(
        self,
        params: Any,
        config: ModelConfig,
        directory: epath.Path,
        *,
        dtype: str,
        max_shard_bytes: int,
    ) -> dict[str, dict[str, Any]]:
        """As `save_params`, which tensors of the base pass one by one."""
        below = directory / MERGED_BELOW if self.merged else directory
        written = save_adapters(params, config, self.lora, below, base=self.base)
        if not self.merged:
            return written
        fsync(below)
        with contextlib.ExitStack() as stack:
            base = open_stored(epath.Path(self.base), config, stack, keep=True)
            whole = merge_stored(base, _flatten(params), self.lora)
            limits: Any = dict(dtype=dtype, max_shard_bytes=max_shard_bytes)
            files = save_params(whole, config, directory, **limits)
        return files | {f"{MERGED_BELOW}/{name}": entry for name, entry in written.items()}

    def load(self, directory: epath.Path, config: ModelConfig, *, mesh: Mesh) -> Any:
        """Reads the adapters of a published version."""
        below = directory / MERGED_BELOW
        found = below if (below / ADAPTER_CONFIG).exists() else directory
        return load_adapters(found, config, self.lora, mesh=mesh)


def load_adapters(
    directory: epath.PathLike, config: ModelConfig, lora: Lora, *, mesh: Mesh | None = None
) -> Any:
    """Reads adapters in PEFT format into a tree of float32 parameters; raises as `load_params`."""
    with contextlib.ExitStack() as stack:
        stored = _open_tensors(epath.Path(directory), config, lora, stack)
        return _place(stored, parameter_shapes(config, lora), mesh, "float32")


def read_adapter_config(directory: epath.Path) -> tuple[Lora, epath.Path]:
    """Reads adapter_config.json: sizes of the adapters, and the directory of their base.

    Raises:
      UserError: for a file that is damaged, or adapters of another kind.
    """
    path = directory / ADAPTER_CONFIG
    read_json(path, ADAPTER_FIELDS, remedy="restore a whole copy of the adapters")
    found = _read_object(path)
    lacking = [key for key in ADAPTER_LACKING if found.get(key)]
    lacking += ["peft_type"] * (found.get("peft_type") != "LORA")
    lacking += ["bias"] * (found.get("bias", "none") != "none")
    targets = found["target_modules"]
    if not isinstance(targets, list) or not {*targets} <= {*LORA_TARGETS}:
        lacking.append("target_modules")
    if lacking:
        named = ", ".join(f"{key}={found.get(key)!r:.60}" for key in lacking)
        raise UserError(
            f"{path} has {named}, which the decoder lacks; it supports LoRA without bias, one rank "
            f"for all of {', '.join(LORA_TARGETS)}"
        )
    base = epath.Path(found["base_model_name_or_path"])
    return Lora(found["r"], float(found["lora_alpha"]), tuple(targets)), base


def _check(params: Any, config: ModelConfig, lora: Lora | None) -> dict[str, Any]:
    """Path -> array; raises a ValueError unless they are all of the model's, on this host."""
    flat = _flatten(params)
    given = {path: tuple(np.shape(leaf)) for path, leaf in flat.items()}
    expected = {path: leaf.shape for path, leaf in parameter_shapes(config, lora).items()}
    wrong = [p for p in sorted(given | expected) if given.get(p) != expected.get(p)]
    if wrong:
        differences = ", ".join(f"{p} {given.get(p)} instead of {expected.get(p)}" for p in wrong)
        raise ValueError(f"not the parameters of this {config.model_type}: {differences}")
    if any(isinstance(x, jax.Array) and not x.is_fully_addressable for x in flat.values()):
        raise ValueError("some parameters lie on other hosts; gather them before the export")
    return flat


def _read(
    directory: epath.PathLike,
    tensors: Sequence[Tensor],
    slices: Mapping[str, Any],
    shape: tuple[int, ...],
    index: Any,
) -> np.ndarray:
    """Reads the part `index` of a parameter, tensor by tensor."""
    part = np.empty([len(range(n)[i]) for n, i in zip(shape, index, strict=True)], np.float32)
    targets = [part]
    if tensors[0].layer is not None:
        tensors, index, targets = tensors[index[0]], index[1:], list(part)
    for tensor, target in zip(tensors, targets, strict=True):
        block = slices[tensor.name][index[::-1] if tensor.transposed else index]
        target[...] = block.T if tensor.transposed else block
        # NaN passes through both; np.isfinite would need another array of this size.
        if not np.isfinite((target.min(), target.max())).all():
            raise UserError(
                f"tensor {tensor.name} in {directory} has values that are NaN or infinite; restore "
                "a whole copy, or start from other weights"
            )
    return part


def _is_copy(head: Any, embedding: Any) -> bool:
    """True for a head that equals the embedding, or was rounded from it or before it."""
    if not {head.get_dtype(), embedding.get_dtype()} <= {*IMPORT_DTYPES, "F64"}:
        return False
    one, other = head[:], embedding[:]
    with np.errstate(over="ignore"):
        return any(
            np.array_equal(one.astype(dtype, copy=False), other.astype(dtype, copy=False))
            for dtype in {one.dtype, other.dtype}
        )


def _open(
    directory: epath.Path, tensors: Sequence[Tensor], stack: contextlib.ExitStack, *, keep: bool
) -> Mapping[str, Any]:
    """Opens the files on `stack` and checks all tensors; returns name -> safetensors slice.

    See `local_copy` for `keep`.
    """
    files, weight_map = _files(directory)
    slices, places = {}, {}
    # safetensors reads no bucket.
    local = stack.enter_context(local_copy(directory, files, keep=keep))
    for file in files:
        try:
            opened = stack.enter_context(safe_open(local / file, framework="numpy"))
        except (OSError, SafetensorError) as error:
            raise UserError(f"{directory / file} can't be read as safetensors: {error}") from error
        for name in opened.keys():  # noqa: SIM118 (it is no mapping)
            if INV_FREQ not in name:
                slices[name] = opened.get_slice(name)
                places.setdefault(name, []).append(file)

    shapes = {tensor.name: tensor.shape for tensor in tensors}
    head, embedding = (slices.get(TABLE[path]) for path in ("head", "embed/embedding"))
    tied = TABLE["head"] not in shapes
    if tied and head and embedding and _is_copy(head, embedding):
        del slices[TABLE["head"]]
    indexed = places | weight_map if weight_map else {}
    misplaced = [name for name in indexed if weight_map.get(name) not in places.get(name, ())]
    shaped, typed = [], []
    for name in shapes.keys() & slices:
        shape, dtype = slices[name].get_shape(), slices[name].get_dtype()
        if tuple(shape) != shapes[name]:
            shaped.append(f"{name} {shape} instead of {list(shapes[name])}")
        if dtype not in IMPORT_DTYPES:
            typed.append(f"{name} {dtype}")
    wrong = {
        "unknown": slices.keys() - shapes.keys(),
        "missing": shapes.keys() - slices.keys(),
        "in several files": [name for name, held in places.items() if len(held) > 1],
        "not where the index says": misplaced,
        "wrong shape": shaped,
        f"not {', '.join(IMPORT_DTYPES)}": typed,
    }
    listed = [f"{what}: {', '.join(sorted(names))}" for what, names in wrong.items() if names]
    if listed:
        raise UserError(f"{directory} does not hold the configured model; {'; '.join(listed)}")
    return slices


def _files(directory: epath.Path) -> tuple[list[str], dict[str, str]]:
    """The checkpoint's files, and the index's tensor -> file (empty without an index)."""
    if is_delta(directory):
        raise UserError(
            f"{directory} has the weights as a delta of an older version; make a whole copy with "
            "oapl_jax.fleet.fetch --version (docs/serving.md)"
        )
    if (directory / ADAPTER_CONFIG).exists():
        return [ADAPTER], {}
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
    weight_map = {name: file for name, file in weight_map.items() if INV_FREQ not in name}
    return sorted(set(weight_map.values())), weight_map


def _write(
    path: epath.Path, shard: Sequence[Tensor], flat: Mapping[str, Any], dtype: str
) -> dict[str, Any]:
    """Writes one file, tensor by tensor; safetensors' own writer wants all of them in memory."""
    # The format: 8 bytes of header length, a JSON header, then the tensors end to end.
    code, numpy_dtype = EXPORT_DTYPES[dtype]
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in shard:
        start, end = end, end + _bytes(tensor, dtype)
        header[tensor.name] = {"dtype": code, "shape": tensor.shape, "data_offsets": [start, end]}
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)  # aligns the data

    parts = [(tensor, rows) for tensor in shard for rows in _rows(tensor, flat[tensor.path])]
    cost = lambda part: _bytes(part[0], dtype) * len(part[1]) // part[0].shape[0]
    blocks = prefetch(
        lambda part: _fetch(*part, flat[part[0].path], numpy_dtype),
        parts,
        cost=cost,
        budget=max(READ_AHEAD, *map(cost, parts)),
    )
    with contextlib.closing(blocks):  # stops the reading threads if writing fails
        return write_file(path, itertools.chain([struct.pack("<Q", len(encoded)), encoded], blocks))


def _bytes(tensor: Tensor, dtype: str) -> int:
    return math.prod(tensor.shape) * np.dtype(EXPORT_DTYPES[dtype][1]).itemsize


def _block(value: Any) -> tuple[int, ...]:
    """Shape of one read: TensorStore reads whole chunks."""
    layout = getattr(value, "chunk_layout", None)
    return layout.read_chunk.shape if layout else value.shape


def _rows(tensor: Tensor, leaf: Any) -> list[range]:
    """Splits a tensor's rows at block boundaries, so that each block is read once."""
    size, step = tensor.shape[0], _block(leaf)[-1 if tensor.transposed else -len(tensor.shape)]
    return [range(i, min(i + step, size)) for i in range(0, size, step)]


def _fetch(tensor: Tensor, rows: range, leaf: Any, dtype: Any) -> memoryview:
    """Reads rows of a tensor, block by block, as the bytes that the file stores."""
    value = leaf if tensor.layer is None else leaf[tensor.layer]
    out = np.empty((len(rows), *tensor.shape[1:]), dtype)
    view, axis = (out.T, -1) if tensor.transposed else (out, 0)
    cut = [
        [slice(i, min(i + b, n)) for i in range(0, n, b)]
        for n, b in zip(value.shape, _block(value), strict=True)
    ]
    cut[axis] = [slice(rows.start, rows.stop)]
    for index in itertools.product(*cut):
        within = list(index)
        within[axis] = slice(None)
        target, source = view[tuple(within)], np.asarray(value[index])
        # Strips that fit the cache are twice as fast; rounding each before the copy, four times.
        for i in range(0, len(source), STRIP):
            target[i : i + STRIP] = source[i : i + STRIP].astype(dtype, copy=False)
    return out.reshape(-1).view(np.uint8).data


def _flatten(tree: Any) -> dict[str, Any]:
    return dict(flatten_dict(tree, sep="/"))
