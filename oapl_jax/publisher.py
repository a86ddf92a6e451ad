"""Learner weights -> immutable version directories that samplers load.

A version `v000016` is a Hugging Face checkpoint (safetensors, config.json, tokenizer files) and a
manifest with the size and checksum of each file. It is written aside, synced, renamed, and
committed by a marker last: a reader sees a whole version or none.
"""

import hashlib
import json
import os
from typing import Any

from etils import epath

from oapl_jax.errors import UserError
from oapl_jax.models import hf
from oapl_jax.models.config import ModelConfig

MANIFEST, COMMITTED = "manifest.json", "COMMITTED"


def version_path(directory: epath.Path, version: int) -> epath.Path:
    return directory / f"v{version:06d}"


def published_versions(directory: epath.Path) -> list[int]:
    """The committed versions, oldest first."""
    if not directory.exists():
        return []
    return sorted(
        int(path.name[1:]) for path in directory.glob("v[0-9]*") if (path / COMMITTED).exists()
    )


def publish(
    params: Any,
    config: ModelConfig,
    *,
    version: int,
    directory: epath.Path,
    tokenizer: Any,
    dtype: str,
) -> epath.Path:
    """Writes version `version` below `directory`, unless it stands there whole.

    Args:
      params: the learner's parameters.
      config: their sizes.
      version: the learner's step.
      directory: of all versions.
      tokenizer: anything with `save_pretrained(directory)`; its files go with the weights.
      dtype: "float32" or "bfloat16", of the tensors in the files.

    Returns:
      The version's directory.
    """
    target = version_path(directory, version)
    aside = directory / f"{target.name}.writing"
    for leftover in (aside, target):  # of a run that was killed before its commit
        if leftover.exists() and not (leftover / COMMITTED).exists():
            leftover.rmtree()
    if not target.exists():
        aside.mkdir(parents=True)
        hf.save_params(params, config, aside, dtype=dtype, max_shard_bytes=5 * 10**9)
        tokenizer.save_pretrained(os.fspath(aside))
        files = {
            path.name: {"bytes": path.stat().length, "sha256": checksum(path)}
            for path in sorted(aside.iterdir())
        }
        manifest = {"version": version, "dtype": dtype, "files": files}
        (aside / MANIFEST).write_text(json.dumps(manifest, indent=1))
        for path in (*aside.iterdir(), aside):
            _sync(path)
        aside.rename(target)
        (target / COMMITTED).write_text("")
        for path in (target / COMMITTED, target, directory):
            _sync(path)
    return target


def check_version(path: epath.Path) -> None:
    """Refuses a version that is missing, half-written or damaged.

    Raises:
      UserError: naming the directory, what is wrong with it, and the remedy.
    """
    remedy = "publish it again, or start from another checkpoint step"
    if not path.exists():
        raise UserError(f"version directory {path} is missing; {remedy}")
    if not (path / COMMITTED).exists():
        raise UserError(
            f"version directory {path} was not written to its end (no {COMMITTED}); {remedy}"
        )
    try:
        files = json.loads((path / MANIFEST).read_text())["files"]
        sums = {name: entry["sha256"] for name, entry in files.items()}
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise UserError(
            f"{MANIFEST} in version directory {path} is missing or damaged; {remedy}"
        ) from error
    for name, expected in sums.items():
        if not (path / name).exists() or checksum(path / name) != expected:
            raise UserError(f"{name} in version directory {path} is missing or damaged; {remedy}")


def collect(directory: epath.Path, *, keep: set[int]) -> list[int]:
    """Deletes the versions not in `keep`, marker first, and returns them.

    What a killed run left without a marker goes too.
    """
    gone = [version for version in published_versions(directory) if version not in keep]
    for version in gone:
        (version_path(directory, version) / COMMITTED).unlink()
    for path in directory.glob("v[0-9]*"):
        if not (path / COMMITTED).exists():
            path.rmtree()
    return gone


def checksum(path: epath.Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 24):
            digest.update(block)
    return digest.hexdigest()


def _sync(path: epath.Path) -> None:
    if "://" in os.fspath(path):
        return  # an object store has no cache of ours to flush
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
