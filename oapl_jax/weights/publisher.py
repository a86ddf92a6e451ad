"""Publisher: Orbax steps -> immutable version directories that samplers load.

A version `v000016` is a Hugging Face checkpoint (safetensors, config.json, tokenizer files), a
model card (README.md), a probe (probe.json) and a manifest with the size and checksum of each
file. It is written to a temporary directory, flushed, renamed, and committed by a marker last:
readers see a whole version or none. One process at a time may write below a directory, any number
may read.

Instead of its weights a version may have their delta (delta.py) from the version before, its base,
which may have one itself: a chain that begins with a whole version. The manifest has the files of
the whole version, and so is the same for a copy that `fetch_version` has made of base and delta.
"""

import contextlib
import hashlib
import json
import os
import tempfile
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts
from etils import epath

from oapl_jax.errors import RunError, UserError, one_line
from oapl_jax.files import (
    check_files,
    checksum,
    damaged_files,
    fetch,
    fsync,
    is_deleted,
    is_local,
    read_json,
    read_parts,
    write_file,
)
from oapl_jax.model import hf
from oapl_jax.model.config import ModelConfig
from oapl_jax.model.tokenizer import save_tokenizer
from oapl_jax.weights import delta
from oapl_jax.weights.delta import WrongBase

MANIFEST, COMMITTED, PROBE, CARD = "manifest.json", "COMMITTED", "probe.json", "README.md"
MANIFEST_FIELDS = ("version", "parent", "config_hash", "dtype", "files")
DELTA = "delta"  # in the manifest of a version that was published as one
PROBE_FIELDS = ("tokens", "logp", "dtype")
FETCHING = ".fetching"  # ends the name of a copy that is being made or deleted
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
    adapters: hf.Adapters | None = None,
    base: epath.Path | None = None,
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
      adapters: of a step that holds adapters alone.
      base: local directory of a whole version, of which this one becomes a delta. The weights of a
        version in a bucket lie beside it meanwhile.

    Raises a UserError if the step is missing, unfinished, or of another model, or the base of
    another size, a RunError if the disk or store fails, and an OSError if the base's disk does; the
    version is then whole or absent, and other versions are unchanged.
    """
    target = version_path(directory, version)
    # An object store renames by copying one object after the other: as slow as writing, and not
    # atomic. So there files are written in place, and the marker alone commits: one object.
    temporary = directory / f"{target.name}.writing" if is_local(directory) else target
    whole = temporary if base is None or is_local(directory) else base.parent / "whole"
    _remove_uncommitted(whole, temporary, target)  # left by a killed run
    if target.exists():
        return target
    params, probe = open_params(source), load_probe(source)
    try:
        temporary.mkdir(parents=True)
        save = adapters.save if adapters else hf.save_params
        files = save(params, config, whole, dtype=dtype, max_shard_bytes=MAX_SHARD_BYTES)
        of_base = {DELTA: _store_delta(whole, base, temporary, files, dtype)} if base else {}
        files |= save_tokenizer(tokenizer, temporary)
        if card:
            files[CARD] = write_file(temporary / CARD, [card.encode()])
        files[PROBE] = write_file(temporary / PROBE, [json.dumps(probe).encode()])
        parent = f"{source.parent.name}/{source.name}"
        manifest = dict(version=version, parent=parent, config_hash=config_hash, dtype=dtype)
        text = json.dumps(manifest | {"files": files} | of_base, indent=1)
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
            _remove_uncommitted(whole, temporary, target)
        if isinstance(error, OSError):
            if whole != temporary and os.fspath(whole) in str(error.filename):
                raise  # of the local disk, which a whole version does not need
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


def _store_delta(
    whole: epath.Path, base: epath.Path, to: epath.Path, files: Mapping[str, Any], dtype: str
) -> dict[str, Any]:
    """Moves the files of a whole version, with the weights as deltas; returns the manifest's part
    about them."""
    deltas, itemsize = {}, _itemsize(dtype)
    for name in files:
        (to / name).parent.mkdir(parents=True, exist_ok=True)
        if name.endswith(".safetensors"):
            changes = delta.encode(whole / name, base / name, itemsize=itemsize)
            deltas[name] = write_file(to / f"{name}{hf.DELTA}", changes)
            (whole / name).unlink()
            fsync((to / name).parent)
        elif whole != to:
            write_file(to / name, read_parts(whole / name))
    if whole != to:
        whole.rmtree()
    mark = checksum(base / MANIFEST)
    return {"version": read_manifest(base)["version"], "manifest": mark, "files": deltas}


def _itemsize(dtype: str) -> int:
    return np.dtype(hf.EXPORT_DTYPES[dtype][1]).itemsize


def stored_files(path: epath.Path, manifest: Mapping[str, Any]) -> dict[str, Any]:
    """Manifest entries of the files that a version's directory has: of weights, or their deltas."""
    files = dict(manifest["files"])
    for name, entry in manifest.get(DELTA, {"files": {}})["files"].items():
        if not (path / name).exists():
            del files[name]
            files[f"{name}{hf.DELTA}"] = entry
    return files


def check_loadable(path: epath.Path) -> None:
    """Raises a UserError for a version directory that has deltas of weights."""
    if hf.is_delta(path):
        raise UserError(
            f"{path} is a delta of an older version, which no server loads; fetch a whole copy "
            "with oapl_jax.fleet.fetch (fleet.fetch_port), or set publish_full_every=1"
        )


def base_of(path: epath.Path) -> int | None:
    """The version that another one is a delta of; None if its own directory has all weights."""
    manifest = read_manifest(path)
    whole = stored_files(path, manifest).keys() == manifest["files"].keys()
    return None if whole else manifest[DELTA]["version"]


def base_for(
    directory: epath.Path, version: int, *, full_every: int, dtype: str
) -> epath.Path | None:
    """The newest older version, of which `version` is to be a delta; None if it is to be whole:
    the first, every `full_every`-th, and one of another dtype."""
    if full_every == 1:
        return None
    older = [other for other in published_versions(directory) if other < version]
    if not older or len(_with_bases(directory, older[-1:])) >= full_every:
        return None
    base = version_path(directory, older[-1])
    return base if read_manifest(base)["dtype"] == dtype else None


def _with_bases(directory: epath.Path, versions: Iterable[int]) -> set[int]:
    """Versions and those that they are deltas of, back to whole ones."""
    found: set[int] = set()
    todo = list(versions)
    while todo:
        version = todo.pop()
        found.add(version)
        with contextlib.suppress(UserError):  # not published, or unreadable: it needs no other
            base = base_of(version_path(directory, version))
            todo += [base] if base is not None and base not in found else []
    return found


def check_version(path: epath.Path) -> None:
    """Raises a UserError unless a version is committed and all files have their checksums, with
    those of the versions that it is a delta of.

    Of a version in a bucket the sizes are compared: a reader compares its copy (`fetch_version`).
    """
    if not path.exists():
        raise UserError(f"version directory {path} is missing; {REMEDY}")
    if not (path / COMMITTED).exists():
        raise UserError(f"version directory {path} is incomplete (no {COMMITTED}); {REMEDY}")
    manifest = read_manifest(path)
    files = stored_files(path, manifest)
    check_files(path, files, remedy=REMEDY, checksums=is_local(path))
    if files.keys() != manifest["files"].keys():
        check_version(_base_path(path, manifest))


def _base_path(path: epath.Path, manifest: Mapping[str, Any]) -> epath.Path:
    """Directory of the version that `path` is a delta of; WrongBase if another one is there."""
    base = version_path(path.parent, manifest[DELTA]["version"])
    marker = base / MANIFEST
    if not marker.exists() or checksum(marker) != manifest[DELTA]["manifest"]:
        raise WrongBase(
            f"{path} is a delta of version {manifest[DELTA]['version']}, and {base} is missing or "
            f"another version than that; {REMEDY}"
        )
    return base


def fetch_version(
    path: epath.Path, to: epath.Path, *, log: Callable[[str], None] = lambda text: None
) -> epath.Path:
    """Copies a committed version below the local directory `to`; returns the copy's directory.

    Its name has the checksum of the manifest: a killed run may publish a step again, with other
    weights. Each file is compared with its manifest entry; the copy appears whole, by a rename.
    Existing copies are reused. A delta is added to the copy of its base; if there is none
    below `to`, or a damaged one, the chain from the last whole version is fetched, with a line to
    `log`. Raises a UserError for a version that is incomplete, damaged, or changes meanwhile.
    """
    if not (path / COMMITTED).exists():
        raise UserError(f"version directory {path} is missing or incomplete; {REMEDY}")
    manifest, mark = read_manifest(path), checksum(path / MANIFEST)
    copy, stored = _copy_path(to, path, mark), stored_files(path, manifest)
    if not copy.exists():
        to.mkdir(parents=True, exist_ok=True)
        aside = to / f"{copy.name}.{uuid.uuid4().hex}{FETCHING}"
        aside.mkdir()
        try:
            fetch(path, stored, aside, remedy=REMEDY)
            if changed := manifest["files"].keys() - stored.keys():
                with _base_copy(path, manifest, to, log) as base:
                    for name in changed:
                        _add_delta(aside, name, base, manifest)
            about = {MANIFEST: {"bytes": (path / MANIFEST).stat().length, "xxh128": mark}}
            fetch(path, about, aside, remedy=REMEDY)
            write_file(aside / COMMITTED, [])
            for directory in {aside, *((aside / name).parent for name in manifest["files"])}:
                fsync(directory)
            try:
                aside.rename(copy)
            except OSError:
                if not copy.exists():  # else another process was faster
                    raise
            fsync(to)
        finally:
            if aside.exists():
                aside.rmtree()
    os.utime(copy)  # the last use, for `collect_fetched`
    return copy


def _copy_path(to: epath.Path, path: epath.Path, mark: str) -> epath.Path:
    return to / f"{path.name}-{mark[:12]}"


@contextlib.contextmanager
def _base_copy(
    path: epath.Path, manifest: Mapping[str, Any], to: epath.Path, log: Callable[[str], None]
) -> Iterator[epath.Path]:
    """Yields the checked copy of a delta's base below `to`; one that has to be fetched is deleted
    at the end, so that a chain needs room for two versions."""
    base = version_path(path.parent, manifest[DELTA]["version"])
    copy = _copy_path(to, base, manifest[DELTA]["manifest"])
    try:
        check_version(copy)
    except UserError:
        log(
            f"{to} has no whole copy of {base.name}, of which {path.name} is a delta: fetches the "
            "chain from the last whole version"
        )
        _delete_copy(copy)
        with checked_version(_base_path(path, manifest), to) as whole:
            yield whole
        _delete_copy(copy)
    else:
        os.utime(copy)
        yield copy


def _add_delta(
    directory: epath.Path, name: str, base: epath.Path, manifest: Mapping[str, Any]
) -> None:
    """Replaces a delta by the file that it stands for; a UserError if that differs from its
    manifest entry."""
    stored = directory / f"{name}{hf.DELTA}"
    content = delta.decode(stored, base / name, itemsize=_itemsize(manifest["dtype"]))
    if write_file(directory / name, content) != manifest["files"][name]:
        raise UserError(f"{stored} and {base} do not make the version's {name}; {REMEDY}")
    stored.unlink()


def _delete_copy(path: epath.Path) -> None:
    """Deletes a copy, which is whole or absent after a kill too."""
    if path.exists():
        aside = path.parent / f"{path.name}.{uuid.uuid4().hex}{FETCHING}"
        path.rename(aside)
        aside.rmtree()


@contextlib.contextmanager
def checked_version(path: epath.Path, copies: epath.Path | None = None) -> Iterator[epath.Path]:
    """Yields the directory of a whole version whose files have their checksums, or raises a
    UserError.

    Of a delta, or a version in a bucket, it is a local copy: within the body, or below `copies`.
    """
    if is_local(path) and not hf.is_delta(path):
        check_version(path)
        yield path
        return
    with tempfile.TemporaryDirectory() as local:
        yield fetch_version(path, copies or epath.Path(local))


def collect_fetched(to: epath.Path, *, keep: int) -> list[str]:
    """Deletes all but the `keep` last used copies of `fetch_version`; returns their names."""
    copies = [path for path in to.glob("v[0-9]*-*") if not path.name.endswith(FETCHING)]
    copies.sort(key=lambda path: os.stat(path).st_mtime_ns)
    deleted = copies[: max(len(copies) - keep, 0)]
    for path in deleted:
        _delete_copy(path)
    return [path.name for path in deleted]


def repair(path: epath.Path, publish_below: Callable[[epath.Path], Any]) -> list[str]:
    """Replaces the damaged files of a committed version; returns their names.

    Weights replace the deltas if one of these or their base is damaged. `publish_below` publishes
    the version once more, whole, below another directory. Raises a UserError if it can't, or makes
    files that differ from the manifest; the version then stays damaged.
    """
    manifest = read_manifest(path)
    files, stored = manifest["files"], stored_files(path, manifest)
    lost = {name.removesuffix(hf.DELTA) for name in damaged_files(path, stored)}
    if deltas := files.keys() - stored.keys():
        try:
            check_version(_base_path(path, manifest))
        except UserError:
            lost |= deltas
        lost |= deltas if lost & deltas else set()
    if damaged := sorted(lost):
        aside = path.parent / f"{path.name}.repair"  # after a kill, `collect` removes it
        aside.mkdir(exist_ok=True)
        try:
            publish_below(aside)
            check_files(aside / path.name, {n: files[n] for n in damaged}, remedy=REMEDY)
            for name in damaged:
                if is_local(path):
                    (aside / path.name / name).replace(path / name)
                else:  # an object appears when its upload is complete
                    write_file(path / name, read_parts(aside / path.name / name))
                (path / f"{name}{hf.DELTA}").unlink(missing_ok=True)
            fsync(path)
        finally:
            if aside.exists():  # a bucket has no empty directories
                aside.rmtree()
    return damaged


def read_manifest(path: epath.Path) -> dict[str, Any]:
    """Reads a version's manifest: "version" (learner step), "parent" (Orbax step, relative to the
    workdir), "config_hash", "dtype", and "files": name -> {"bytes", "xxh128"}. Of a delta also
    "delta": "version" and "manifest" (XXH3) of its base, and "files": weights -> the delta's entry.
    """
    return read_json(path / MANIFEST, MANIFEST_FIELDS, optional=[DELTA], remedy=REMEDY)


def read_probe(path: epath.Path) -> dict[str, Any]:
    """Reads a version's probe: "tokens" ([[id]]), "logp" (log-probability at temperature 1 of each
    token of a row but the first, given those before it) and "dtype" of the computation."""
    return read_json(path / PROBE, PROBE_FIELDS, remedy=REMEDY)


def collect(directory: epath.Path, *, keep: set[int]) -> list[int]:
    """Deletes uncommitted directories and, marker first, all versions but those in `keep` and the
    ones that they are deltas of; returns the deleted ones."""
    keep = _with_bases(directory, keep)
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
