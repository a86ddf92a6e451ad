"""Recorded groups on disk, and the resumable pipeline that samples n responses to each prompt.

A dataset is a directory of array_record files and one manifest. A record is one group (see
structs.encode_groups). `manifest.json` has:

    format            FORMAT
    about             identity of the groups: task; sha256 of the tokenizer's vocabulary; sizes of
                      the model; sampling; how the dataset was made
    weights           policy version -> xxh128 of the manifest.json of that published version
    shards            file name -> bytes; xxh128; policy versions; "samples", [stream index, number
                      of rollouts] of each record; longest prompt and response, in tokens;
                      wall-clock seconds since the shard before

A shard is written to a temporary file, synced, renamed, and then named in the manifest, which is
replaced atomically: a kill leaves each shard whole or absent. A file that the manifest does not
name does not count.
"""

import bisect
import functools
import hashlib
import json
import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter
from etils import epath

from oapl_jax.errors import RunError, UserError
from oapl_jax.files import (
    check_files,
    file_entry,
    fsync,
    is_local,
    lock,
    read_json,
    write_atomically,
)
from oapl_jax.model.config import ModelConfig
from oapl_jax.rollout.sampler import Sampled, Sampler, Sampling
from oapl_jax.structs import Group, Prompt, Rollout, decode_groups, encode_groups

FORMAT = "oapl_jax rollouts 3"
MANIFEST = "manifest.json"
REMEDY = "copy the dataset again, or record another with oapl_jax.record"


def identity(
    *, task: str, tokenizer: Any, model: ModelConfig, sampling: Sampling, **made: Any
) -> dict[str, Any]:
    """Describes what decides a response, JSON-able: the "about" of a manifest.

    The tokenizer counts by its vocabulary alone: recorded ids are never made from text again.
    `made` are further entries, such as `group_size`.
    """
    vocabulary = json.dumps([sorted(tokenizer.get_vocab().items()), tokenizer.eos_token_id])
    about = {
        "task": task,
        "tokenizer": hashlib.sha256(vocabulary.encode()).hexdigest(),
        "model": {k: v for k, v in model.to_hf(dtype="").items() if "dtype" not in k},
        **vars(sampling),
        **made,
    }
    return json.loads(json.dumps(about))


def differences(mine: Mapping[str, Any], theirs: Mapping[str, Any], keys: Iterable[str]) -> str:
    """Lists "key: theirs -> mine" for the keys whose values differ."""
    pairs = ((key, theirs.get(key), mine.get(key)) for key in keys)
    return "; ".join(f"{key}: {old} -> {new}" for key, old, new in pairs if old != new)


class DatasetWriter:
    """Appends shards to a dataset on a local disk; one process at a time.

    Args:
      about: see `identity`; must be that of the shards that the directory holds.
      groups_per_shard, seconds_per_shard: `add` writes a shard after so many groups, or so long
        after the one before.
      weights_digest: policy version -> xxh128 of the manifest of its weights.

    Raises:
      UserError: if the directory holds a dataset of another identity or format, or another process
        writes it.
    """

    def __init__(
        self,
        directory: epath.Path,
        about: Mapping[str, Any],
        *,
        groups_per_shard: int,
        weights_digest: Callable[[int], str],
        seconds_per_shard: float = float("inf"),
    ):
        if not is_local(directory):
            raise UserError(f"rollouts can't be written to {directory}; name a local directory")
        self.groups_per_shard, self._seconds_per_shard = groups_per_shard, seconds_per_shard
        self._directory, self._digest = directory, functools.cache(weights_digest)
        self._pending: list[Group] = []
        directory.mkdir(parents=True, exist_ok=True)
        self._lock = open(directory / "lock", "ab")  # noqa: SIM115
        try:
            lock(self._lock.fileno(), directory)
            about = json.loads(json.dumps(about))
            self._manifest = {"format": FORMAT, "about": about, "weights": {}, "shards": {}}
            if (directory / MANIFEST).exists():
                self._manifest = read_manifest(directory)
                differing = differences(about, self._manifest["about"], about)
                if differing:
                    raise UserError(
                        f"{directory} holds rollouts of another kind ({differing}); set that back, "
                        "or name another directory"
                    )
            self._remove_strays()
        except BaseException:
            self.close()
            raise
        self.start_clock()

    @property
    def samples(self) -> list[tuple[int, int]]:
        """(stream index, number of rollouts) of every group in a shard."""
        shards = self._manifest["shards"].values()
        return [(index, count) for entry in shards for index, count in entry["samples"]]

    def start_clock(self) -> None:
        """Starts the seconds of the next shard."""
        self._started = time.monotonic()

    def add(self, group: Group) -> None:
        """Keeps a group for the next shard, and writes that if it is full or late."""
        self._digest(group.policy_version)  # its weights may be gone when the shard is written
        self._pending.append(group)
        late = time.monotonic() - self._started >= self._seconds_per_shard
        if late or len(self._pending) == self.groups_per_shard:
            self.flush()

    def flush(self) -> int:
        """Writes the groups added since the last shard; returns the number of shards."""
        if self._pending:
            self._write_shard(self._pending)
            self._pending = []
        return len(self._manifest["shards"])

    def keep(self, count: int) -> None:
        """Goes back to the first `count` shards, those that a checkpoint knows."""
        shards = {k: v for k, v in self._manifest["shards"].items() if _index(k) < count}
        used = {str(version) for entry in shards.values() for version in entry["versions"]}
        weights = {k: v for k, v in self._manifest["weights"].items() if k in used}
        self._manifest |= {"shards": shards, "weights": weights}
        self._save_manifest()
        self._remove_strays()

    def close(self) -> None:
        self._lock.close()

    def _write_shard(self, groups: Sequence[Group]) -> None:
        path = self._directory / f"groups-{len(self._manifest['shards']):05d}.array_record"
        aside = self._directory / f"{path.name}.tmp"
        writer = ArrayRecordWriter(os.fspath(aside), "group_size:1")
        for group in groups:
            writer.write(encode_groups([group]))
        writer.close()
        fsync(aside)
        versions, now = sorted({g.policy_version for g in groups}), time.monotonic()
        self._manifest["weights"] |= {str(v): self._digest(v) for v in versions}
        self._manifest["shards"][path.name] = {
            **file_entry(aside),
            "versions": versions,
            "samples": [[g.prompt.stream_index, len(g.rollouts)] for g in groups],
            "longest_prompt": max(len(g.prompt.tokens) for g in groups),
            "longest_response": max(len(r.tokens) for g in groups for r in g.rollouts),
            "seconds": round(now - self._started, 3),
        }
        aside.rename(path)
        self._save_manifest()
        self._started = now

    def _save_manifest(self) -> None:
        content = json.dumps(self._manifest, indent=1).encode()
        write_atomically(self._directory / MANIFEST, [content])

    def _remove_strays(self) -> None:
        for path in self._directory.glob("groups-*"):
            if path.name not in self._manifest["shards"]:
                path.unlink()


class Dataset(Sequence[Group]):
    """Reads a dataset: its groups in the order in which they were written, by index.

    Raises:
      UserError: if the manifest or a shard is missing or damaged, or there is no shard.
    """

    def __init__(self, directory: epath.Path):
        self.directory, self.manifest = directory, read_manifest(directory)
        shards = dict(sorted(self.manifest["shards"].items(), key=lambda item: _index(item[0])))
        check_files(directory, shards, remedy=REMEDY)
        if not shards:
            raise UserError(f"{directory} holds no rollouts yet; {REMEDY}")
        options = "readahead_buffer_size:0,max_parallelism:0"  # random access
        self._readers = [ArrayRecordReader(os.fspath(directory / name), options) for name in shards]
        self._ends = np.cumsum([len(entry["samples"]) for entry in shards.values()]).tolist()

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> Group:  # pyright: ignore[reportIncompatibleMethodOverride]
        if not 0 <= index < len(self):
            raise IndexError(f"group {index} of {len(self)}")
        shard = bisect.bisect_right(self._ends, index)
        first = self._ends[shard - 1] if shard else 0
        (group,) = decode_groups(self._readers[shard].read([index - first])[0])
        return group

    @property
    def versions(self) -> list[int]:
        return sorted(map(int, self.manifest["weights"]))

    def check(self, about: Mapping[str, Any], *, max_prompt_tokens: int) -> None:
        """Raises a UserError if a run of this `identity` and prompt limit can't train on it."""
        keys = ("task", "tokenizer", "model", "temperature", "group_size")
        differing = differences(about, self.manifest["about"], keys)
        if differing:
            raise UserError(
                f"the rollouts in {self.directory} (rollout.dataset) do not fit this run "
                f"({differing}); set that back, or name another dataset"
            )
        for what, setting, limit in (
            ("prompt", "data.max_prompt_tokens", max_prompt_tokens),
            ("response", "rollout.max_response_tokens", about["max_response_tokens"]),
        ):
            longest = max(e[f"longest_{what}"] for e in self.manifest["shards"].values())
            if longest > limit:
                raise UserError(
                    f"{self.directory} (rollout.dataset) has a {what} of {longest} tokens, more "
                    f"than {setting} ({limit}); raise it"
                )

    def close(self) -> None:
        for reader in self._readers:
            reader.close()


def read_manifest(directory: epath.Path) -> dict[str, Any]:
    """Raises a UserError if the manifest is missing, damaged or of another format."""
    path = directory / MANIFEST
    found = read_json(path, ["format"], remedy=REMEDY)["format"]
    if found != FORMAT:
        raise UserError(f"{path} is of format {found!r}, not {FORMAT!r}; record the dataset again")
    return read_json(path, ["format", "about", "weights", "shards"], remedy=REMEDY)


def fill(
    writer: DatasetWriter,
    prompts: Sequence[Prompt],
    sampler: Sampler,
    reward: Callable[[Prompt, Rollout], float],
    *,
    version: int,
    n: int,
    at_once: int,
    sampling: Sampling,
    reward_threads: int,
    note: Callable[[Group], None],
    progress: Callable[[int], None],
) -> None:
    """Samples and rewards what is missing of n responses to each prompt.

    Samples from index s on of the i-th of P prompts are a group with stream index s P + i: no two
    samples share random numbers, whatever was sampled before and in whatever portions.

    Args:
      prompts: all prompts of the dataset.
      reward: called in threads, for `reward_threads` groups at a time.
      version: of the policy; groups of another one are not taken.
      at_once: the most responses of a group.
      note: takes each rewarded group, and may raise.
      progress: called after each shard with the number of responses on disk.

    Raises:
      RunError: if some could not be sampled; the others are kept.
    """

    def rewarded(sampled: Sampled) -> Group:
        rewards = [reward(sampled.prompt, rollout) for rollout in sampled.rollouts]
        return Group(sampled.prompt, sampled.rollouts, np.array(rewards, np.float32))

    def add_rewarded(most: int) -> None:
        """Adds the groups whose rewards are done, and waits until at most `most` are not."""
        while len(rewarding) > most or (rewarding and rewarding[0].done()):
            try:
                group = rewarding.popleft().result()
                note(group)
            except BaseException:
                rewarding.clear()  # so that the first failure ends it
                raise
            writer.add(group)
            tell()

    def tell() -> None:
        nonlocal told
        done = sum(count for _, count in writer.samples)
        if done > told:
            progress(told := done)

    requests = missing(stored(writer.samples, len(prompts), n), at_once)
    lost = sum(count for _, _, count in requests)
    told = sum(count for _, count in writer.samples)
    rewarding: deque[Future[Group]] = deque()
    writer.start_clock()
    try:
        with ThreadPoolExecutor(reward_threads, thread_name_prefix="reward") as threads:
            try:
                for size in sorted({count for _, _, count in requests}, reverse=True):
                    asked = [
                        replace(prompts[row], stream_index=start * len(prompts) + row)
                        for start, row, count in requests
                        if count == size
                    ]
                    for sampled in sampler.generate(asked, n=size, sampling=sampling):
                        if {rollout.policy_version for rollout in sampled.rollouts} == {version}:
                            rewarding.append(threads.submit(rewarded, sampled))
                            lost -= size
                        add_rewarded(most=2 * writer.groups_per_shard)
            finally:
                add_rewarded(most=0)
    finally:
        writer.flush()
    tell()
    if lost:
        raise RunError(
            f"{lost} of {n * len(prompts)} responses could not be sampled from version {version}; "
            "the same command samples them"
        )


def stored(samples: Iterable[tuple[int, int]], prompts: int, n: int) -> np.ndarray:
    """bool[prompts, n], the first n samples of each prompt that a dataset made by `fill` has."""
    there = np.zeros((prompts, n), bool)
    for index, count in samples:
        start, row = divmod(index, prompts)
        there[row, start : start + count] = True
    return there


def missing(there: np.ndarray, at_once: int) -> list[tuple[int, int, int]]:
    """Requests (start, row, count <= at_once) for what `stored` lacks, first samples first."""
    requests = []
    for row, of_prompt in enumerate(there):
        free = np.flatnonzero(~of_prompt)
        for run in np.split(free, np.flatnonzero(np.diff(free) > 1) + 1):
            for start in range(0, len(run), at_once):
                requests.append((int(run[start]), row, len(run[start : start + at_once])))
    return sorted(requests)


def _index(name: str) -> int:
    return int(name.split(".")[0].removeprefix("groups-"))
