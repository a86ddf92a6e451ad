"""Groups on disk: a directory of array_record files and one manifest, to be trained on later.

A record is one group; encoding.py lists its fields. `manifest.json` says where they come from:

    format            FORMAT
    about             task; sha256 of the tokenizer's vocabulary; sizes of the model; how tokens
                      were drawn; group_size; "made", by which command and from what
    weights           policy version -> xxh128 of the manifest.json of that published version
    shards            file name -> groups, policy versions, bytes, xxh128, and in tokens the longest
                      prompt and response

A shard is written aside, synced, renamed, and then named in the manifest, which is replaced as one:
a kill leaves each shard whole or absent. What the manifest does not name does not count.
"""

import bisect
import functools
import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter
from etils import epath

from oapl_jax.errors import UserError
from oapl_jax.files import checksum
from oapl_jax.model.config import ModelConfig
from oapl_jax.rollout.encoding import decode, encode
from oapl_jax.rollout.sampler import Sampling
from oapl_jax.structs import Group

FORMAT = "oapl_jax rollouts 2"
MANIFEST = "manifest.json"


def describe(
    *,
    task: str,
    tokenizer: Any,
    model: ModelConfig,
    sampling: Sampling,
    group_size: int,
    made: Mapping[str, Any],
) -> dict[str, Any]:
    """What a manifest says "about" its groups, JSON-able.

    The tokenizer counts by its vocabulary alone: recorded ids are never made from text again.
    """
    vocabulary = json.dumps([sorted(tokenizer.get_vocab().items()), tokenizer.eos_token_id])
    sizes = {k: v for k, v in model.to_hf(dtype="").items() if "dtype" not in k}
    about = {
        "task": task,
        "tokenizer": hashlib.sha256(vocabulary.encode()).hexdigest(),
        "model": sizes,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "max_response_tokens": sampling.max_response_tokens,
        "group_size": group_size,
        "made": dict(made),
    }
    return json.loads(json.dumps(about))


def differences(mine: Mapping[str, Any], theirs: Mapping[str, Any], keys: Sequence[str]) -> str:
    """ "key: theirs -> mine" of each of the keys whose values differ."""
    return "; ".join(f"{k}: {theirs[k]} -> {mine[k]}" for k in keys if mine[k] != theirs[k])


class ShardWriter:
    """Adds whole shards to a directory, which may hold some.

    Args:
      directory: on a local disk.
      about: see `describe`; what is there must be of the same.
      groups_per_shard: after so many `add` writes a shard by itself.
      identify: policy version -> xxh128 of the manifest of its weights.

    Raises:
      UserError: if the directory holds a set that is about something else.
    """

    def __init__(
        self,
        directory: epath.Path,
        about: dict[str, Any],
        *,
        groups_per_shard: int,
        identify: Callable[[int], str],
    ):
        if "://" in os.fspath(directory):
            raise UserError(f"rollouts can't be written to {directory}; name a local directory")
        self._directory, self._identify = directory, functools.cache(identify)
        self._groups_per_shard = groups_per_shard
        self._pending: list[Group] = []
        directory.mkdir(parents=True, exist_ok=True)
        if (directory / MANIFEST).exists():
            self._manifest = read_manifest(directory)
            differing = differences(about, self._manifest["about"], tuple(about))
            if differing:
                raise UserError(
                    f"{directory} holds rollouts of another kind ({differing}); set that back, or "
                    "name another directory"
                )
        else:
            self._manifest = {"format": FORMAT, "about": about, "weights": {}, "shards": {}}
        self._remove_strays()

    def indices(self) -> set[int]:
        """Of the shards that are there."""
        return {_index(name) for name in self._manifest["shards"]}

    def add(self, group: Group) -> None:
        """Keeps a group for the next shard."""
        self._identify(group.policy_version)  # its weights may be gone when the shard is written
        self._pending.append(group)
        if len(self._pending) == self._groups_per_shard:
            self.flush()

    def flush(self) -> int:
        """Writes what was added since; returns the number of shards, for `keep`."""
        if self._pending:
            self.write(len(self.indices()), self._pending)
            self._pending = []
        return len(self.indices())

    def keep(self, count: int) -> None:
        """Goes back to the first `count` shards, those that a checkpoint knows."""
        shards = {k: v for k, v in self._manifest["shards"].items() if _index(k) < count}
        used = {str(version) for entry in shards.values() for version in entry["versions"]}
        weights = {k: v for k, v in self._manifest["weights"].items() if k in used}
        self._manifest |= {"shards": shards, "weights": weights}
        self._save_manifest()
        self._remove_strays()

    def write(self, index: int, groups: Sequence[Group]) -> None:
        """Writes one whole shard."""
        path = self._directory / f"groups-{index:05d}.array_record"
        aside = self._directory / f"{path.name}.writing"
        writer = ArrayRecordWriter(os.fspath(aside), "group_size:1")
        for group in groups:
            writer.write(encode(group))
        writer.close()
        _sync(aside)
        versions = sorted({g.policy_version for g in groups})
        for version in versions:
            if str(version) not in self._manifest["weights"]:
                self._manifest["weights"][str(version)] = self._identify(version)
        self._manifest["shards"][path.name] = {
            "groups": len(groups),
            "versions": versions,
            "bytes": aside.stat().length,
            "xxh128": checksum(aside),
            "longest_prompt": max(len(g.prompt.tokens) for g in groups),
            "longest_response": max(len(r.tokens) for g in groups for r in g.rollouts),
        }
        aside.rename(path)
        self._save_manifest()

    def _save_manifest(self) -> None:
        aside = self._directory / f"{MANIFEST}.new"
        aside.write_text(json.dumps(self._manifest, indent=1))
        _sync(aside)
        aside.replace(self._directory / MANIFEST)
        _sync(self._directory)

    def _remove_strays(self) -> None:
        for path in self._directory.glob("groups-*"):
            if path.name not in self._manifest["shards"]:
                path.unlink()


class Shards(Sequence[Group]):
    """Reads a set: its groups in the order of shards and records, by index.

    Raises:
      UserError: if the manifest is missing or damaged, or a shard is.
    """

    def __init__(self, directory: epath.Path):
        self.directory, self.manifest = directory, read_manifest(directory)
        shards = dict(sorted(self.manifest["shards"].items(), key=lambda item: _index(item[0])))
        remedy = "copy the set again, or name another"
        for name, entry in shards.items():
            path = directory / name
            if not path.exists() or checksum(path) != entry["xxh128"]:
                raise UserError(f"{path} is missing or damaged; {remedy}")
        if not shards:
            raise UserError(f"{directory} holds no rollouts yet; {remedy}")
        at_random = "readahead_buffer_size:0,max_parallelism:0"
        self._readers = [ArrayRecordReader(os.fspath(directory / n), at_random) for n in shards]
        self._ends = np.cumsum([entry["groups"] for entry in shards.values()]).tolist()

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> Group:  # pyright: ignore[reportIncompatibleMethodOverride]
        if not 0 <= index < len(self):
            raise IndexError(f"group {index} of {len(self)}")
        shard = bisect.bisect_right(self._ends, index)
        first = self._ends[shard - 1] if shard else 0
        return decode(self._readers[shard].read([index - first])[0])

    @property
    def versions(self) -> list[int]:
        return sorted(map(int, self.manifest["weights"]))

    def check(self, about: Mapping[str, Any], *, max_prompt_tokens: int) -> None:
        """Refuses a set that a job can't train on.

        Args:
          about: the job's own (see `describe`); "max_response_tokens" is the most that fits.
          max_prompt_tokens: of the job.

        Raises:
          UserError: naming what differs.
        """
        keys = ("task", "tokenizer", "model", "temperature", "group_size")
        differing = differences(about, self.manifest["about"], keys)
        if differing:
            raise UserError(
                f"the rollouts in {self.directory} (rollout.dataset) are of another kind than this "
                f"job's ({differing}); set that back, or name another set"
            )
        entries = self.manifest["shards"].values()
        for what, setting, limit in (
            ("prompt", "data.max_prompt_tokens", max_prompt_tokens),
            ("response", "rollout.max_response_tokens", about["max_response_tokens"]),
        ):
            longest = max(entry[f"longest_{what}"] for entry in entries)
            if longest > limit:
                raise UserError(
                    f"{self.directory} (rollout.dataset) has a {what} of {longest} tokens, more "
                    f"than {setting} ({limit}); raise it"
                )

    def close(self) -> None:
        for reader in self._readers:
            reader.close()


def read_manifest(directory: epath.Path) -> dict[str, Any]:
    """Raises a UserError if it is missing, damaged or of another format."""
    path = directory / MANIFEST
    if not path.exists():
        raise UserError(f"{path} is missing; make a set with oapl_jax.record")
    try:
        manifest = json.loads(path.read_text())
        found = manifest["format"]
    except (ValueError, LookupError, TypeError) as error:
        raise UserError(f"{path} is damaged; copy the set again, or make another") from error
    if found != FORMAT:
        raise UserError(f"{path} is of format {found!r}, not {FORMAT!r}; make the set again")
    return manifest


def _index(name: str) -> int:
    return int(name.split(".")[0].removeprefix("groups-"))


def _sync(path: epath.Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
