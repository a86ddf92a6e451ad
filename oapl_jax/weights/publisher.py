"""Publisher: Orbax steps -> immutable version directories that samplers load.

A version `v000016` is a Hugging Face checkpoint (safetensors, config.json, tokenizer files), a
model card (README.md), a probe (probe.json) and a manifest with the size and checksum of each
file. It is written to a temporary directory, flushed, renamed, and committed by a marker last:
readers see a whole version or none. One process at a time may write below a directory, any number
may read.
"""

import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Mapping
from typing import Any

import orbax.checkpoint as ocp
import tensorstore as ts
from etils import epath

from oapl_jax.errors import RunError, UserError, one_line
from oapl_jax.files import (
    check_files,
    damaged_files,
    fsync,
    is_deleted,
    is_local,
    read_json,
    write_file,
)
from oapl_jax.model import hf
from oapl_jax.model.config import ModelConfig

MANIFEST, COMMITTED, PROBE, CARD = "manifest.json", "COMMITTED", "probe.json", "README.md"
MANIFEST_FIELDS = ("version", "parent", "config_hash", "dtype", "files")
PROBE_FIELDS = ("tokens", "logp", "dtype")
MAX_SHARD_BYTES = 5 * 10**9
REMEDY = "publish it again, or start from another checkpoint step"


def version_path(directory: epath.Path, version: int) -> epath.Path:
    return directory / f"v{version:06d}"


def published_versions(directory: epath.Path) -> list[int]:
    """Lists the committed versions, oldest first."""
    paths = directory.glob("v[0-9]*") if directory.exists() else ()
    return sorted(int(path.name[1:]) for path in paths if (path / COMMITTED).exists())


def config_hash(config: Mapping[str, Any]) -> str:
    """SHA-256 of a configuration, equal for the live one and the one saved as JSON."""
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()


def publish(
    source: epath.Path,
    config: ModelConfig,
    *,
    version: int,
    directory: epath.Path,
    tokenizer: Any,
    dtype: str,
    config_hash: str,
    card: str = "",
) -> epath.Path:
    """Writes a version, unless it is committed already; returns its directory.

    Tensors are streamed: host memory stays below two of the largest and 1 GB.

    Args:
      source: a finished Orbax step with `params` and `probe`, saved by any number of hosts.
      version: the learner's step.
      tokenizer: of transformers; its files are published with the weights.
      dtype: of the tensors in the files, a key of hf.EXPORT_DTYPES.
      config_hash: of the run's configuration, for the manifest.
      card: Markdown of the version's README.md; "" for none.

    Raises a UserError if the step is missing, unfinished, or of another model, and a RunError if
    the disk fails; the version is then whole or absent, and other versions are unchanged.
    """
    target = version_path(directory, version)
    # An object store renames by copying one object after the other: as slow as writing, and not
    # atomic. So there files are written in place, and the marker alone commits: one object.
    temporary = directory / f"{target.name}.writing" if is_local(directory) else target
    _remove_uncommitted(temporary, target)  # left by a killed run
    if target.exists():
        return target
    params, probe = open_params(source), load_probe(source)
    try:
        temporary.mkdir(parents=True)
        files = hf.save_params(
            params, config, temporary, dtype=dtype, max_shard_bytes=MAX_SHARD_BYTES
        )
        with tempfile.TemporaryDirectory() as local:
            tokenizer.save_pretrained(local)
            for path in sorted(epath.Path(local).iterdir()):
                files[path.name] = write_file(temporary / path.name, [path.read_bytes()])
        if card:
            files[CARD] = write_file(temporary / CARD, [card.encode()])
        files[PROBE] = write_file(temporary / PROBE, [json.dumps(probe).encode()])
        parent = f"{source.parent.name}/{source.name}"
        manifest = dict(version=version, parent=parent, config_hash=config_hash, dtype=dtype)
        text = json.dumps(manifest | {"files": files}, indent=1)
        write_file(temporary / MANIFEST, [text.encode()])
        fsync(temporary)
        if temporary != target:
            temporary.rename(target)
        write_file(target / COMMITTED, [])
        fsync(target)
        fsync(directory)
        return target
    except (OSError, ValueError) as error:
        with contextlib.suppress(OSError):
            _remove_uncommitted(temporary, target)
        if isinstance(error, OSError):
            raise RunError(
                f"version {version} could not be written below {directory} ({one_line(error)}); "
                "free space or mend the directory, then start again"
            ) from error
        if is_deleted(source):
            raise _missing(source) from error
        raise UserError(
            f"Orbax step {source} can't be published as this {config.model_type} "
            f"({one_line(error)}); name a step of a run with this model"
        ) from error


def check_version(path: epath.Path) -> None:
    """Raises a UserError unless a version is committed and all files have their checksums."""
    if not path.exists():
        raise UserError(f"version directory {path} is missing; {REMEDY}")
    if not (path / COMMITTED).exists():
        raise UserError(f"version directory {path} is incomplete (no {COMMITTED}); {REMEDY}")
    check_files(path, read_manifest(path)["files"], remedy=REMEDY)


def repair(path: epath.Path, publish_below: Callable[[epath.Path], Any]) -> list[str]:
    """Replaces the damaged files of a committed version; returns their names.

    `publish_below` publishes the version once more, below another directory. Raises a UserError if
    it can't, or makes files that differ from the manifest; the version then stays damaged.
    """
    files = read_manifest(path)["files"]
    damaged = list(damaged_files(path, files))
    if damaged:
        aside = path.parent / f"{path.name}.repair"  # after a kill, `collect` removes it
        aside.mkdir(exist_ok=True)
        try:
            publish_below(aside)
            check_files(aside / path.name, {n: files[n] for n in damaged}, remedy=REMEDY)
            for name in damaged:
                (aside / path.name / name).replace(path / name)
            fsync(path)
        finally:
            aside.rmtree()
    return damaged


def read_manifest(path: epath.Path) -> dict[str, Any]:
    """Reads a version's manifest: "version" (learner step), "parent" (Orbax step, relative to the
    workdir), "config_hash", "dtype", and "files": name -> {"bytes", "xxh128"}."""
    return read_json(path / MANIFEST, MANIFEST_FIELDS, remedy=REMEDY)


def read_probe(path: epath.Path) -> dict[str, Any]:
    """Reads a version's probe: "tokens" ([[id]]), "logp" (log-probability at temperature 1 of each
    token of a row but the first, given those before it) and "dtype" of the computation."""
    return read_json(path / PROBE, PROBE_FIELDS, remedy=REMEDY)


def collect(directory: epath.Path, *, keep: set[int]) -> list[int]:
    """Deletes uncommitted directories and, marker first, versions not in `keep`; returns these."""
    deleted = [version for version in published_versions(directory) if version not in keep]
    for version in deleted:
        (version_path(directory, version) / COMMITTED).unlink()
    _remove_uncommitted(*directory.glob("v[0-9]*"))
    return deleted


def _remove_uncommitted(*paths: epath.Path) -> None:
    for path in paths:
        if path.exists() and not (path / COMMITTED).exists():
            path.rmtree()


# Orbax steps, opened without restoring them


def finished_steps(directory: epath.Path) -> list[int]:
    """Lists the finished Orbax steps below a directory, oldest first."""
    return sorted(ocp.utils.checkpoint_steps(directory))


def _missing(source: epath.Path) -> UserError:
    have = [str(step) for step in finished_steps(source.parent) if str(step) != source.name]
    return UserError(
        f"{source} is no finished Orbax step, or was deleted meanwhile (have: "
        f"{', '.join(have) or 'none'}); name one that is"
    )


def open_params(source: epath.Path) -> dict[str, ts.TensorStore]:
    """Opens the arrays of a step's item `params`, by path; raises a UserError if it can't."""
    if not source.name.isdigit() or int(source.name) not in finished_steps(source.parent):
        raise _missing(source)
    place = f"{os.fspath(source)}/params/"
    base = {"driver": "file", "path": place} if is_local(source) else place
    context = ts.Context()
    try:
        store = ts.KvStore.open({"driver": "ocdbt", "base": base}, context=context).result()
        opening = {}
        for key in store.list().result():
            if key.endswith(b"/.zarray"):
                name = key.decode().removesuffix("/.zarray")
                spec = {
                    "driver": "zarr",
                    "kvstore": {"driver": "ocdbt", "base": base, "path": f"{name}/"},
                    "fill_missing_data_reads": False,  # a lost chunk must not read as zeros
                }
                path = name.replace(".", "/")
                opening[path] = ts.open(spec, context=context, read=True, open=True)
        return {path: array.result() for path, array in opening.items()}
    except ValueError as error:
        if is_deleted(source):
            raise _missing(source) from error
        raise UserError(
            f"the parameters of Orbax step {source} can't be read ({one_line(error)}); publish "
            "another step"
        ) from error


def load_probe(source: epath.Path) -> dict[str, Any]:
    """Reads a step's item `probe`; raises a UserError if the step has none."""
    try:
        return dict(ocp.JsonCheckpointHandler().restore(source / "probe"))
    except (OSError, ValueError) as error:
        if is_deleted(source):
            raise _missing(source) from error
        raise UserError(
            f"Orbax step {source} has no readable probe ({one_line(error)}); publish a step that "
            "has one"
        ) from error
