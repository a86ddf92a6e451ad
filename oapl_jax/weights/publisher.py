"""Orbax steps -> immutable version directories that samplers load.

    python -m oapl_jax.weights.publisher --from=WORKDIR --step=N --to=DIR [--dtype=bfloat16]

A version `v000016` is a Hugging Face checkpoint (safetensors, config.json, tokenizer files), a
probe (probe.json) and a manifest with the size and checksum of each file. It is written aside,
synced, renamed, and committed by a marker last: a reader sees a whole version or none. One process
at a time writes below a directory; any number may read.
"""

import contextlib
import hashlib
import json
import os
import sys
import tempfile
from collections.abc import Mapping
from typing import Any

from absl import flags
from etils import epath

from oapl_jax.errors import RunError, UserError, exit_with_code, one_line
from oapl_jax.files import absolute, check_files, fsync, is_local, read_json, write_file
from oapl_jax.model import export, hf
from oapl_jax.model.config import ModelConfig
from oapl_jax.model.steps import load_probe, open_params, steps_of
from oapl_jax.model.tokenizer import check_tokenizer, load_tokenizer

MANIFEST, COMMITTED, PROBE = "manifest.json", "COMMITTED", "probe.json"
STEPS = ("weights", "checkpoints")  # where a workdir keeps Orbax steps that hold parameters
MANIFEST_FIELDS = ("version", "parent", "config_hash", "dtype", "files")
MAX_SHARD_BYTES = 5 * 10**9
REMEDY = "publish it again, or start from another checkpoint step"


def version_path(directory: epath.Path, version: int) -> epath.Path:
    return directory / f"v{version:06d}"


def published_versions(directory: epath.Path) -> list[int]:
    """The committed versions, oldest first."""
    if not directory.exists():
        return []
    return sorted(
        int(path.name[1:]) for path in directory.glob("v[0-9]*") if (path / COMMITTED).exists()
    )


def config_hash(config: Mapping[str, Any]) -> str:
    """sha256 of a configuration, the same for the one that runs and the one that it saved."""
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
) -> epath.Path:
    """Writes version `version` below `directory`, unless it stands there whole.

    Tensors go one by one from Orbax's files into the version's: host memory stays below two of the
    largest and 1 GB.

    Args:
      source: a finished Orbax step, `.../weights/16` or `.../checkpoints/16`, that holds `params`
        and `probe`. It may have been saved by many hosts, on any mesh.
      config: sizes of the parameters.
      version: the learner's step.
      directory: of all versions.
      tokenizer: anything with `save_pretrained(directory)`; its files go with the weights.
      dtype: "float32" or "bfloat16", of the tensors in the files.
      config_hash: of the run's configuration, for the manifest.

    Returns:
      The version's directory.

    Raises:
      UserError: if the step is not there, not finished, or not of this model.
      RunError: if the disk is full or fails; the version is then whole or absent, and other
        versions are as they were.
    """
    target = version_path(directory, version)
    # An object store renames by copying one object after the other: as slow as writing, and no more
    # at once. So there files are written where they will stay, and the marker alone commits: one
    # object, there or not.
    aside = directory / f"{target.name}.writing" if is_local(directory) else target
    _sweep(aside, target)  # what a run left that was killed before its commit
    if target.exists():
        return target
    params, probe = open_params(source), load_probe(source)
    try:
        aside.mkdir(parents=True)
        files = export.save_params(
            params, config, aside, dtype=dtype, max_shard_bytes=MAX_SHARD_BYTES
        )
        with tempfile.TemporaryDirectory() as local:
            tokenizer.save_pretrained(local)
            for path in sorted(epath.Path(local).iterdir()):
                files[path.name] = write_file(aside / path.name, [path.read_bytes()])
        files[PROBE] = write_file(aside / PROBE, [json.dumps(probe).encode()])
        manifest = {
            "version": version,
            "parent": f"{source.parent.name}/{source.name}",
            "config_hash": config_hash,
            "dtype": dtype,
            "files": files,
        }
        write_file(aside / MANIFEST, [json.dumps(manifest, indent=1).encode()])
        fsync(aside)
        if aside != target:
            aside.rename(target)
        write_file(target / COMMITTED, [])
        fsync(target)
        fsync(directory)
    except (OSError, ValueError) as error:
        with contextlib.suppress(OSError):
            _sweep(aside, target)
        if isinstance(error, OSError):
            raise RunError(
                f"version {version} could not be written below {directory} ({one_line(error)}); "
                "free space or mend the directory, then start again"
            ) from error
        raise UserError(
            f"Orbax step {source} can't be published as this {config.model_type} "
            f"({one_line(error)}); name a step of a run with this model"
        ) from error
    return target


def check_version(path: epath.Path) -> None:
    """Refuses a version that is missing, half-written or damaged.

    Raises:
      UserError: naming the directory, what is wrong with it, and the remedy.
    """
    if not path.exists():
        raise UserError(f"version directory {path} is missing; {REMEDY}")
    if not (path / COMMITTED).exists():
        raise UserError(
            f"version directory {path} was not written to its end (no {COMMITTED}); {REMEDY}"
        )
    check_files(path, read_manifest(path)["files"], remedy=REMEDY)


def read_manifest(path: epath.Path) -> dict[str, Any]:
    """What a version says of itself.

    Returns:
      "version" (learner step), "parent" (Orbax step, relative to the workdir), "config_hash",
      "dtype", and "files": name -> {"bytes", "xxh128"}.

    Raises:
      UserError: if the manifest can't be read.
    """
    return read_json(path / MANIFEST, MANIFEST_FIELDS, remedy=REMEDY)


def read_probe(path: epath.Path) -> dict[str, Any]:
    """Rows of tokens and what the learner's parameters of this version say of them.

    Returns:
      "tokens" ([[id]]), "logp" (log-probability at temperature 1 of each token of a row but the
      first, given those before it) and "dtype" of the computation.

    Raises:
      UserError: if the probe can't be read.
    """
    return read_json(path / PROBE, ("tokens", "logp", "dtype"), remedy=REMEDY)


def collect(directory: epath.Path, *, keep: set[int]) -> list[int]:
    """Deletes the versions not in `keep`, marker first, and returns them.

    What a killed run left without a marker goes too.
    """
    gone = [version for version in published_versions(directory) if version not in keep]
    for version in gone:
        (version_path(directory, version) / COMMITTED).unlink()
    _sweep(*directory.glob("v[0-9]*"))
    return gone


def _sweep(*paths: epath.Path) -> None:
    """Removes what has no marker."""
    for path in paths:
        if path.exists() and not (path / COMMITTED).exists():
            path.rmtree()


def main() -> None:
    values = flags.FlagValues()  # its own: other rooms define flags of the same names
    flags.DEFINE_string("from", None, "workdir of the run", flag_values=values)
    flags.DEFINE_integer("step", None, "Orbax step to publish", flag_values=values)
    flags.DEFINE_string("to", None, "directory of versions", flag_values=values)
    choices = list(export.EXPORT_DTYPES)
    flags.DEFINE_enum("dtype", None, choices, "the run's publish_dtype", flag_values=values)
    try:
        values(sys.argv)
    except flags.Error as error:
        raise UserError(f"{one_line(error)} (--from, --step, --to, --dtype)") from error
    given: dict[str, Any] = {name: values[name].value for name in values}
    missing = [f"--{name}" for name in ("from", "step", "to") if given[name] is None]
    if missing:
        raise UserError(f"{', '.join(missing)} missing; say what to publish, and where to")
    workdir, directory = absolute(given["from"]), absolute(given["to"])
    print(publish_step(workdir, given["step"], directory, dtype=given["dtype"]))


def publish_step(
    workdir: epath.Path, step: int, directory: epath.Path, *, dtype: str | None
) -> epath.Path:
    """Publishes a step of a run by hand, with the model and tokenizer that the run has.

    Raises:
      UserError: if there is no such run or step, or the version stands already.
    """
    if not (workdir / "config.json").exists():
        raise UserError(f"--from={workdir} is no workdir (no config.json); name one that trained")
    saved = json.loads((workdir / "config.json").read_text())
    steps = {name: steps_of(workdir / name) for name in STEPS}
    holding = [name for name, have in steps.items() if step in have]
    if not holding:
        have = "; ".join(f"{name}: {', '.join(map(str, s)) or 'none'}" for name, s in steps.items())
        raise UserError(f"--step={step} is not in {workdir} (have {have}); choose one of those")
    if step in published_versions(directory):
        path = version_path(directory, step)
        raise UserError(f"{path} stands already; delete it, or give another directory --to")
    model = epath.Path(saved["model"]["path"]) if saved["model"]["path"] else workdir / "model"
    config = hf.load_config(model)
    with tempfile.TemporaryDirectory() as local:  # a tokenizer knows local directories only
        for path in model.iterdir():
            if not path.name.endswith(".safetensors"):
                path.copy(epath.Path(local) / path.name)
        tokenizer = load_tokenizer(local)
    check_tokenizer(tokenizer, config, source=os.fspath(model))
    return publish(
        workdir / holding[0] / str(step),
        config,
        version=step,
        directory=directory,
        tokenizer=tokenizer,
        dtype=dtype or saved["publish_dtype"],
        config_hash=config_hash(saved),
    )


if __name__ == "__main__":
    exit_with_code(main)
