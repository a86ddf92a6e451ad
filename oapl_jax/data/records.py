"""What every data set consists of: one kind of record, stored by TFDS (array_record).

Builders (reasoning.py, releases.py) make records; `Split` reads them back by index.
"""

import contextlib
import dataclasses
import hashlib
import io
import json
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import tensorflow_datasets as tfds
from absl import logging as absl_logging
from etils import epath
from tensorflow_datasets.proto import tf_example_pb2

from oapl_jax.errors import UserError

log = logging.getLogger(__name__)

IN_MEMORY = 2**28  # bytes; a smaller split is read at once, the records of a larger one singly
Messages = tuple[Mapping[str, str], ...]


@dataclasses.dataclass(frozen=True)
class Record:
    """One problem.

    Attributes:
      id: 16 hexadecimal digits, a hash of the task and of what makes two problems the same; stable
        across runs and settings.
      messages: the conversation that ends with the problem, {"role": .., "content": ..} each.
      answer: what the verifier of the task compares with; for programs, tests as JSON.
      task: name of the verifier.
      metadata: what else is known, JSON-able.
      source: name of the data set that the problem is from.
      difficulty: as its source grades it; "" if it does not.
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
        """What is asked: the last message."""
        return self.messages[-1]["content"]


def user(question: str) -> Messages:
    """The conversation that consists of one question."""
    return ({"role": "user", "content": question},)


FIELDS = tuple(field.name for field in dataclasses.fields(Record))
JSON_FIELDS = ("messages", "metadata")


def features() -> tfds.features.FeaturesDict:
    """How TFDS stores a record; `JSON_FIELDS` are texts of JSON."""
    return tfds.features.FeaturesDict({name: tfds.features.Text() for name in FIELDS})


def to_row(record: Record) -> dict[str, str]:
    row = {name: getattr(record, name) for name in FIELDS}
    return row | {name: json.dumps(row[name], ensure_ascii=False) for name in JSON_FIELDS}


def from_bytes(stored: bytes) -> Record:
    """A record from its tf.train.Example; TFDS's own decoder takes several times as long."""
    example = tf_example_pb2.Example  # pyright: ignore[reportAttributeAccessIssue]
    feature = example.FromString(stored).features.feature
    row: dict[str, Any] = {name: feature[name].bytes_list.value[0].decode() for name in FIELDS}
    row["messages"] = tuple(json.loads(row["messages"]))
    row["metadata"] = json.loads(row["metadata"])
    return Record(**row)


class Split(Sequence[Record]):
    """Random access to the records of one split."""

    def __init__(self, stored: Sequence[bytes]):
        self._stored = stored

    def __len__(self) -> int:
        return len(self._stored)

    def __getitem__(self, index):
        index = range(len(self))[index]  # IndexError at the end, which array_record does not raise
        return from_bytes(self._stored[index])


class Joined(Sequence[Record]):
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
        raise AssertionError("the range is as long as the parts")


def load(builder: tfds.core.DatasetBuilder, *, split: str) -> Split:
    """The records of a split of a prepared builder."""
    raw = tfds.decode.DeserializeMethod.RAW_BYTES
    stored: Any = builder.as_data_source(split=split, deserialize_method=raw)  # pyright: ignore[reportCallIssue]
    if builder.info.splits[split].num_bytes <= IN_MEMORY:
        stored = stored.__getitems__(range(len(stored)))
    return Split(stored)


def settings_name(name: str, settings: Mapping[str, Any]) -> str:
    """Different settings have different names, so that data sets stand side by side."""
    text = json.dumps(settings, sort_keys=True)
    return f"{name}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"


def build(
    builder: type[tfds.core.GeneratorBasedBuilder],
    config: tfds.core.BuilderConfig,
    *,
    data_dir: str,
) -> tfds.core.DatasetBuilder:
    """Builds a data set unless it stands complete in `data_dir`, and opens it.

    TFDS writes into an `incomplete.*` directory and renames it at the end, so an interrupted build
    leaves nothing that could be taken for a data set.

    Raises:
      UserError: for a directory in a bucket, which array_record can neither write nor read; for
        remains; and what the builder raises.
    """
    assert config.name is not None
    if "://" in data_dir:
        raise UserError(
            f"data.data_dir={data_dir} is in an object store, and array_record knows local files "
            "only; name a directory (a bucket can be mounted as one)"
        )
    directory = epath.Path(data_dir) / builder.name / config.name / str(builder.VERSION)
    complete = directory / "dataset_info.json"
    if directory.exists() and not complete.exists():
        raise UserError(f"{directory} holds half a data set; delete it, and it will be built anew")
    if not complete.exists():
        tfds.disable_progress_bar()
        try:
            with quiet():
                builder(
                    data_dir=data_dir, config=config, file_format="array_record"
                ).download_and_prepare()
        except OSError:
            # Two processes may build at once; what they build is equal, and the later rename fails.
            if not complete.exists():
                raise
            log.info("%s was built by another process meanwhile", directory)
    return tfds.builder_from_directory(directory)


@contextlib.contextmanager
def quiet():
    """TFDS announces downloads where there are none, and warns of configurations made here."""
    level = absl_logging.get_verbosity()
    absl_logging.set_verbosity(absl_logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        absl_logging.set_verbosity(level)
