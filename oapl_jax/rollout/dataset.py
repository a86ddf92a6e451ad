"""Recorded groups: on disk, as a stream, and the resumable pipeline that samples them.

A dataset is a directory of array_record files and one manifest. A record is one group (see
structs.encode_groups). `manifest.json` has:

    format            FORMAT
    about             identity of the groups: task; sha256 of the tokenizer's vocabulary; sizes of
                      the model; sampling; how the dataset was made
    weights           policy version -> xxh128 of the manifest.json of that published version
    shards            file name -> bytes; xxh128; policy versions; "samples", [stream index, number
                      of rollouts] of each record; longest prompt and response, in tokens;
                      wall-clock seconds since the shard before

A shard is written to a temporary file, synced, renamed (in a bucket: uploaded), and then named in
the manifest, which is replaced atomically: a kill leaves each shard whole or absent. A file that
the manifest does not name does not count.
"""

import bisect
import contextlib
import functools
import hashlib
import itertools
import json
import os
import tempfile
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import KW_ONLY, dataclass, replace
from typing import Any

import numpy as np
from array_record.python.array_record_data_source import ArrayRecordDataSource
from array_record.python.array_record_module import ArrayRecordWriter
from etils import epath

from oapl_jax import files
from oapl_jax.data.prompts import permutation
from oapl_jax.errors import RunError, UserError
from oapl_jax.model.config import ModelConfig
from oapl_jax.rollout.ledger import Ledger
from oapl_jax.rollout.sampler import Sampled, Sampler, Sampling
from oapl_jax.structs import Group, Prompt, Rollout, decode_groups, encode_groups

FORMAT = "oapl_jax rollouts 3"
MANIFEST = "manifest.json"
REMEDY = "copy the dataset again, or record another with oapl_jax.record"


def identity(
    *, task: str, tokenizer: Any, model: ModelConfig, sampling: Sampling, **made: Any
) -> dict[str, Any]:
    """Identifies responses by task, tokenizer, model and sampling: the "about" of a manifest.

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
    """Appends shards to a dataset; one process at a time, which a lock holds on a local disk alone.

    Args:
      about: see `identity`; must be that of the shards that the directory holds.
      groups_per_shard, seconds_per_shard: `add` writes a shard after so many groups, or so long
        after the one before.
      weights_digest: policy version -> xxh128 of the manifest of its weights.
      decode: token ids -> the text that is stored beside them; None for no text.

    Raises a UserError if the directory holds a dataset of another identity or format, or another
    process writes it.
    """

    def __init__(
        self,
        directory: epath.Path,
        about: Mapping[str, Any],
        *,
        groups_per_shard: int,
        weights_digest: Callable[[int], str],
        seconds_per_shard: float = float("inf"),
        decode: Callable[[np.ndarray], str] | None = None,
    ):
        self.groups_per_shard, self._seconds_per_shard = groups_per_shard, seconds_per_shard
        self._directory, self._digest = directory, functools.cache(weights_digest)
        self._pending: list[Group] = []
        self._decode = decode
        directory.mkdir(parents=True, exist_ok=True)
        self._closing = contextlib.ExitStack()
        try:
            if files.is_local(directory):
                lock = self._closing.enter_context(open(directory / "lock", "ab"))  # noqa: SIM115
                files.lock(lock.fileno(), directory)
            about = json.loads(json.dumps(about))  # as the manifest gives it back: tuples are lists
            self._manifest = {"format": FORMAT, "about": about, "weights": {}, "shards": {}}
            if (directory / MANIFEST).exists():
                self._manifest = read_manifest(directory)
                if differing := differences(about, self._manifest["about"], about):
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
        self._started = time.monotonic()

    def add(self, group: Group) -> None:
        """Keeps a group for the next shard, which is written if it is full or late."""
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
        self._closing.close()

    def _write_shard(self, groups: Sequence[Group]) -> None:
        path = self._directory / f"groups-{len(self._manifest['shards']):05d}.array_record"
        with files.made_locally(path) as aside:
            writer = ArrayRecordWriter(os.fspath(aside), "group_size:1")
            for group in groups:
                writer.write(encode_groups([group], self._decode))
            writer.close()
            entry = files.file_entry(aside)
        versions, now = sorted({g.policy_version for g in groups}), time.monotonic()
        self._manifest["weights"] |= {str(v): self._digest(v) for v in versions}
        self._manifest["shards"][path.name] = {
            **entry,
            "versions": versions,
            "samples": [[g.prompt.stream_index, len(g.rollouts)] for g in groups],
            "longest_prompt": max(len(g.prompt.tokens) for g in groups),
            "longest_response": max(len(r.tokens) for g in groups for r in g.rollouts),
            "seconds": round(now - self._started, 3),
        }
        self._save_manifest()
        self._started = now

    def _save_manifest(self) -> None:
        content = json.dumps(self._manifest, indent=1).encode()
        files.write_atomically(self._directory / MANIFEST, [content])

    def _remove_strays(self) -> None:
        for path in self._directory.glob("groups-*"):
            if path.name not in self._manifest["shards"]:
                path.unlink()


class Dataset(Sequence[Group]):
    """Reads a dataset: its groups in the order in which they were written, by index.

    The shards of a dataset in a bucket are fetched to a temporary directory.

    Args:
      checksums: False is for a look at a few groups: the sizes of shards alone are compared, and of
        a bucket those shards alone are fetched that a group is read from. What is read is still
        checked by array_record's own hashes.

    Raises a UserError if the manifest or a shard is missing or damaged, or there is no shard.
    """

    def __init__(self, directory: epath.Path, *, checksums: bool = True):
        self.directory, self.manifest = directory, read_manifest(directory)
        shards = dict(sorted(self.manifest["shards"].items(), key=lambda item: _index(item[0])))
        if not shards:
            raise UserError(f"{directory} holds no rollouts yet; {REMEDY}")
        self._shards, self._place = shards, directory
        self._ends = list(itertools.accumulate(len(e["samples"]) for e in shards.values()))
        self._records: dict[str, ArrayRecordDataSource] = {}  # of the shards that were read
        local = files.is_local(directory)
        if not local:
            self._copy = tempfile.TemporaryDirectory()  # removed with this object
            self._place = epath.Path(self._copy.name)
        if local or not checksums:
            files.check_files(directory, shards, remedy=REMEDY, checksums=checksums)
        else:
            files.fetch(directory, shards, self._place, remedy=REMEDY)

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> Group:  # pyright: ignore[reportIncompatibleMethodOverride]
        if not 0 <= index < len(self):
            raise IndexError(f"group {index} of {len(self)}")
        shard = bisect.bisect_right(self._ends, index)
        try:
            records = self._open(list(self._shards)[shard])
            (group,) = decode_groups(records[index - self._ends[shard] + len(records)])
        except RuntimeError as error:  # of array_record
            raise UserError(f"{self.directory} is damaged ({error}); {REMEDY}") from error
        return group

    def _open(self, name: str) -> ArrayRecordDataSource:
        if name not in self._records:
            path = self._place / name
            if not path.exists():
                files.fetch(self.directory, {name: self._shards[name]}, self._place, remedy=REMEDY)
            source = ArrayRecordDataSource([os.fspath(path)], {"max_parallelism": "0"})
            self._records[name] = source
        return self._records[name]

    @property
    def versions(self) -> list[int]:
        return sorted(map(int, self.manifest["weights"]))

    def check(self, about: Mapping[str, Any], *, max_prompt_tokens: int) -> None:
        """Raises a UserError if a run of this `identity` and prompt limit can't train on it."""
        keys = ("task", "tokenizer", "model", "temperature", "group_size")
        if differing := differences(about, self.manifest["about"], keys):
            raise UserError(
                f"the rollouts in {self.directory} (rollout.dataset) do not fit this run "
                f"({differing}); set that back, or name another dataset"
            )
        limits = {
            "prompt": ("data.max_prompt_tokens", max_prompt_tokens),
            "response": ("rollout.max_response_tokens", about["max_response_tokens"]),
        }
        for part, (setting, limit) in limits.items():
            longest = max(e[f"longest_{part}"] for e in self.manifest["shards"].values())
            if longest > limit:
                raise UserError(
                    f"{self.directory} (rollout.dataset) has a {part} of {longest} tokens, more "
                    f"than {setting} ({limit}); raise it"
                )

    def close(self) -> None:
        for records in self._records.values():
            records.__exit__(None, None, None)  # array_record has no `close`


@dataclass(eq=False)
class RecordedStream:
    """Streams groups from a dataset. Position p holds a pure function of (seed, p).

    Lag is the learner's step minus the version. An offline round starts from the weights that
    sampled the dataset and counts its steps from 0, so that these weights are its version 0.
    """

    dataset: Dataset
    _: KW_ONLY
    # "shuffled": endless, each epoch a permutation drawn from [seed, epoch]; "recorded": as in the
    # dataset, once.
    order: str
    seed: int
    policy_version: int | None  # of the groups in this run; None for the recorded one
    # Checkpoint directory that this run starts from, if any; with `policy_version`, a published
    # version must be the one that sampled the dataset.
    start: epath.Path | None
    drop_zero_variance: bool  # whether groups with equal rewards are skipped (see `counts`)
    ledger: Ledger  # records each group, as sampled by the server "dataset"

    def __post_init__(self):
        if self.policy_version is not None:
            self._check_start()
        self._position, self.counts = 0, Counter[str]()

    def at(self, position: int) -> Group:
        """Returns a group; its stream index becomes -1 - `position`, which no live one has."""
        epoch, index = divmod(position, len(self.dataset))
        if self.order == "shuffled":
            index = int(permutation(self.seed, epoch, len(self.dataset))[index])
        elif epoch:
            raise RunError(
                f"all {len(self.dataset)} groups of {self.dataset.directory} are used up; lower "
                "num_steps, or set rollout.dataset_order='shuffled'"
            )
        group = self.dataset[index]
        version = group.policy_version if self.policy_version is None else self.policy_version
        rollouts = tuple(replace(rollout, policy_version=version) for rollout in group.rollouts)
        return Group(replace(group.prompt, stream_index=-1 - position), rollouts, group.reward)

    def take(self, count: int, step: int) -> list[Group]:
        """Takes the next `count` groups, for the gradient step at `step`.

        Raises a UserError for a version that the learner has yet to reach, and a RunError if the
        dataset ends or all its groups have equal rewards.
        """
        seen, taken, skipped = [], [], 0  # skipped since the last taken
        while len(taken) < count:
            group = self.at(self._position + len(seen))
            if group.policy_version > step:
                raise UserError(
                    f"{self.dataset.directory} has groups of version {group.policy_version}, "
                    f"newer than the learner at step {step}; set rollout.dataset_version=0, or "
                    "rollout.dataset_order='recorded' to replay a run"
                )
            drop = self.drop_zero_variance and group.zero_variance
            skipped = skipped + 1 if drop else 0
            if skipped == len(self.dataset):
                raise RunError(
                    f"every group of {self.dataset.directory} has equal rewards; record another "
                    "dataset, or keep them (buffer.zero_variance)"
                )
            seen.append((group, "zero_variance" if drop else "trained"))
            if not drop:
                taken.append(group)
        self._position += len(seen)
        self.counts.update(taken=count, zero_variance=len(seen) - count)
        for group, end in seen:
            sampled = Sampled(group.prompt, group.rollouts, "dataset", 0.0)
            self.ledger.request(group.prompt, len(group.rollouts))
            self.ledger.sampled(sampled, group.reward)
            self.ledger.end(group, end, step if end == "trained" else None)
        return taken

    def state(self) -> dict[str, Any]:
        """State for a checkpoint, JSON-able."""
        return {
            "position": self._position,
            "seed": self.seed,
            "order": self.order,
            "manifest": files.checksum(self.dataset.directory / MANIFEST),
            "counts": dict(self.counts),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Continues from a state; raises a UserError for another dataset, order or seed."""
        mine = self.state() | {"position": state["position"], "counts": state["counts"]}
        if mine != state:
            raise UserError(
                f"the checkpoint's recorded stream ({state}) is not the configured one ({mine}); "
                "restore rollout.dataset, rollout.dataset_order and the seed, or start a new run"
            )
        self._position, self.counts = state["position"], Counter(state["counts"])

    def _check_start(self) -> None:
        """Raises a UserError if the dataset was sampled from other weights than those of `start`.

        A checkpoint without a publisher's manifest can't be told apart.
        """
        weights, directory = self.dataset.manifest["weights"], self.dataset.directory
        if len(weights) > 1:
            raise UserError(
                f"{directory} was sampled from versions {self.dataset.versions}, so it can't be of "
                "one; set rollout.dataset_version=-1, to take the recorded versions"
            )
        manifest = self.start / MANIFEST if self.start else None
        if manifest and manifest.exists() and files.checksum(manifest) not in weights.values():
            raise UserError(
                f"model.path={self.start} did not sample {directory}; start from the version that "
                "did (in its directory weights), or set rollout.dataset_version=-1"
            )


def read_manifest(directory: epath.Path) -> dict[str, Any]:
    """Raises a UserError if the manifest is missing, damaged or of another format."""
    path = directory / MANIFEST
    found = files.read_json(path, ["format"], remedy=REMEDY)["format"]
    if found != FORMAT:
        raise UserError(f"{path} is of format {found!r}, not {FORMAT!r}; record the dataset again")
    return files.read_json(path, ["format", "about", "weights", "shards"], remedy=REMEDY)


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
    """Samples and rewards the missing responses, up to n a prompt.

    Samples from index s on of the i-th of P prompts are a group with stream index s P + i: no two
    samples share random numbers, whatever was sampled before and in whatever portions.

    Args:
      reward: called in threads, for `reward_threads` groups at a time.
      version: of the policy; groups of another one are not taken.
      at_once: the most responses of a group.
      note: takes each rewarded group, and may raise.
      progress: called after each shard with the number of responses on disk.

    Raises a RunError if some could not be sampled; the others are kept.
    """
    requests = missing(stored(writer.samples, len(prompts), n), at_once)
    lost = sum(count for _, _, count in requests)
    on_disk = lambda: sum(count for _, count in writer.samples)
    told, rewarding = on_disk(), deque[Future[Group]]()

    def rewarded(sampled: Sampled) -> Group:
        rewards = [reward(sampled.prompt, rollout) for rollout in sampled.rollouts]
        return Group(sampled.prompt, sampled.rollouts, np.array(rewards, np.float32))

    def add_rewarded(most: int) -> None:
        """Adds the groups whose rewards are done, and waits until at most `most` are not."""
        nonlocal told
        while len(rewarding) > most or (rewarding and rewarding[0].done()):
            try:
                group = rewarding.popleft().result()
                note(group)
            except BaseException:
                rewarding.clear()  # so that the first failure ends it
                raise
            writer.add(group)
            if (done := on_disk()) > told:
                progress(told := done)

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
    if (done := on_disk()) > told:
        progress(done)
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
