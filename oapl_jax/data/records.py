"""Problem records, the one format of every data set, stored by TFDS (array_record).

synthetic/tasks.py and public/releases.py make records; `Split` reads them by index.
"""

import contextlib
import dataclasses
import functools
import hashlib
import io
import json
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import tensorflow_datasets as tfds
from absl import logging as absl_logging
from etils import epath
from tensorflow_datasets.proto import tf_example_pb2

from oapl_jax.errors import RunError, UserError, one_line, sentence

log = logging.getLogger(__name__)

IN_MEMORY = 2**28  # bytes; a smaller split is read into memory, a larger one record by record
Messages = tuple[Mapping[str, str], ...]


@dataclasses.dataclass(frozen=True)
class Record:
    """One problem.

    Attributes:
      id: 16 hexadecimal digits, a hash of the task and the content; stable across runs and
        settings.
      messages: conversation that ends with the problem, {"role": .., "content": ..} each.
      answer: reference for the verifier of the task; for programs, tests as JSON.
      task: name of the verifier.
      metadata: JSON-able.
      source: name of the data set.
      difficulty: as graded by the source; "" if it is not.
    """

    id: str
    messages: Messages
    answer: str
    task: str
    metadata: dict[str, Any]
    source: str = ""
    difficulty: str = ""

    @property
    def question(self) -> str:
        """Content of the last message."""
        return self.messages[-1]["content"]


def user(question: str) -> Messages:
    """A conversation of one user message."""
    return ({"role": "user", "content": question},)


FIELDS = tuple(field.name for field in dataclasses.fields(Record))
JSON_FIELDS = ("messages", "metadata")


def to_row(record: Record) -> dict[str, str]:
    """Fields of a record for TFDS: every field is text, `JSON_FIELDS` are JSON."""
    row = {name: getattr(record, name) for name in FIELDS}
    # Metadata as a table has it may hold dates, say.
    encode = functools.partial(json.dumps, ensure_ascii=False, default=str)
    return row | {name: encode(row[name]) for name in JSON_FIELDS}


def position(record_id: str, parts: int) -> int:
    """Fixed position of a content in the space of all contents, in 0..parts - 1."""
    return int(record_id, 16) * parts >> 4 * len(record_id)


def from_bytes(stored: bytes) -> Record:
    """Decodes a tf.train.Example; TFDS's own decoder takes several times as long."""
    example = tf_example_pb2.Example  # pyright: ignore[reportAttributeAccessIssue]
    feature = example.FromString(stored).features.feature
    row: dict[str, Any] = {name: feature[name].bytes_list.value[0].decode() for name in FIELDS}
    row["messages"] = tuple(json.loads(row["messages"]))
    row["metadata"] = json.loads(row["metadata"])
    return Record(**row)


class Split(Sequence[Record]):
    """Random access to the records of one split."""

    def __init__(self, stored: Sequence[bytes], directory: epath.PathLike):
        self._stored, self._directory = stored, directory

    def __len__(self) -> int:
        return len(self._stored)

    def __getitem__(self, index):
        index = range(len(self))[index]  # raises IndexError at the end; array_record does not
        with _damage_named(self._directory):
            return from_bytes(self._stored[index])


class Concatenated(Sequence[Record]):
    """Several splits, one after the other."""

    def __init__(self, parts: Sequence[Sequence[Record]]):
        self._parts = parts

    def __len__(self) -> int:
        return sum(map(len, self._parts))

    def __getitem__(self, index):
        index = range(len(self))[index]
        for part in self._parts:
            if index < len(part):
                return part[index]
            index -= len(part)
        raise AssertionError("unreachable: the range is as long as the parts")


class Subset(Sequence[Record]):
    """The records of a split at given positions."""

    def __init__(self, whole: Sequence[Record], positions: Sequence[int]):
        self._whole, self._positions = whole, positions

    def __len__(self) -> int:
        return len(self._positions)

    def __getitem__(self, index):
        return self._whole[self._positions[index]]


def load_split(builder: tfds.core.DatasetBuilder, split: str) -> Split:
    """Opens a split of a prepared builder; UserError names the directory of a damaged one."""
    raw = tfds.decode.DeserializeMethod.RAW_BYTES
    with _damage_named(builder.data_path):
        stored: Any = builder.as_data_source(split=split, deserialize_method=raw)  # pyright: ignore[reportCallIssue]
        if builder.info.splits[split].num_bytes <= IN_MEMORY:
            stored = stored.__getitems__(range(len(stored)))
    return Split(stored, builder.data_path)


@dataclasses.dataclass(eq=False, kw_only=True)
class ProblemsConfig(tfds.core.BuilderConfig):
    """Content of one data set; see `prepare_records`."""

    splits: Callable[[], Mapping[str, Iterable[Record]]]
    metadata: Callable[[], Mapping[str, Any]]


class Problems(tfds.core.GeneratorBasedBuilder):
    """Writes the records of a data set by split."""

    VERSION = tfds.core.Version("1.3.0")

    def _info(self) -> tfds.core.DatasetInfo:
        return self.dataset_info_from_configs(
            features=tfds.features.FeaturesDict({name: tfds.features.Text() for name in FIELDS}),
            description="Problems with answers that a program can verify.",
            metadata=tfds.core.MetadataDict(),
        )

    def _split_generators(self, dl_manager):
        splits = self.builder_config.splits().items()  # pyright: ignore
        return {split: self._generate_examples(found) for split, found in splits}

    def _generate_examples(self, found: Iterable[Record]):
        for record in found:
            yield record.id, to_row(record)
        self.info.metadata.update(self.builder_config.metadata())  # pyright: ignore


def prepare_records(
    name: str,
    settings: Mapping[str, Any],
    splits: Callable[[], Mapping[str, Iterable[Record]]],
    *,
    metadata: Callable[[], Mapping[str, Any]] = dict,
    data_dir: str,
) -> tfds.core.DatasetBuilder:
    """Builds a data set unless it is complete in `data_dir`, and opens it.

    Data sets of other settings stand side by side. TFDS writes into an `incomplete.*` directory and
    renames it at the end, so an interrupted build leaves no data set.

    Args:
      name: of the data set.
      settings: JSON-able, all that determines its content.
      splits: opens the records of each split.
      metadata: JSON-able, stored with the data set once its records are written.

    Raises:
      UserError: for a directory in a bucket, which array_record can neither write nor read, or one
        that can't be written; for a partial or damaged data set; and any error of `splits`.
      RunError: if writing fails, as on a full disk.
    """
    text = json.dumps(settings, sort_keys=True, default=dict)
    config = ProblemsConfig(
        name=f"{name}-{hashlib.sha256(text.encode()).hexdigest()[:12]}",
        description=text,
        splits=splits,
        metadata=metadata,
    )
    if "://" in data_dir:
        raise UserError(
            f"data.data_dir={data_dir} is in an object store, and array_record reads local files "
            "only; name a local directory (or mount the bucket)"
        )
    directory = epath.Path(data_dir) / Problems.name / str(config.name) / str(Problems.VERSION)
    complete = directory / "dataset_info.json"
    if directory.exists() and not complete.exists():
        raise UserError(f"{directory} holds a partial data set; delete it to build it again")
    if not complete.exists():
        tfds.disable_progress_bar()
        try:
            with _quiet():
                builder = Problems(data_dir=data_dir, config=config, file_format="array_record")
                builder.download_and_prepare()
        except (OSError, RuntimeError) as error:  # of TFDS and of array_record
            # Two processes may build at once; the results are equal, and the later rename fails.
            if not complete.exists():
                place = f"data.data_dir={data_dir}"
                fault = f"{name} can't be written below {place} ({one_line(error)})"
                found = sentence(error)
                kind = UserError if found and found[0] == UserError.exit_code else RunError
                raise kind(f"{fault}; free space there, or name another directory") from error
            log.info("%s was built by another process meanwhile", directory)
    with _damage_named(directory):
        return tfds.builder_from_directory(directory)


@contextlib.contextmanager
def _damage_named(directory: epath.PathLike) -> Iterator[None]:
    """Raises a UserError naming the directory of a prepared data set that can't be read."""
    try:
        yield
    except Exception as error:  # TFDS and array_record name no closed set for damaged files
        fault = f"{directory} is damaged ({one_line(error)})"
        raise UserError(f"{fault}; delete it, and it is built again") from error


@contextlib.contextmanager
def _quiet():
    """Silences TFDS, which announces downloads that do not happen and warns of our configs."""
    level = absl_logging.get_verbosity()
    absl_logging.set_verbosity(absl_logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        absl_logging.set_verbosity(level)
