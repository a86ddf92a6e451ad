"""The embedded tasks as a TFDS data set (array_record, no TensorFlow), split by content.

The hash of a problem's content alone says which split it belongs to, so a problem of a test split
is in no training split, whatever the sizes, settings and seeds of the two data sets.
"""

import dataclasses
import json
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import tensorflow_datasets as tfds

from oapl_jax.data.records import Record, Split, build, features, load, settings_name, to_row
from oapl_jax.data.synthetic import tasks
from oapl_jax.errors import UserError

SHARES = {"train": 8, "validation": 1, "test": 1}  # of the space of problems, in tenths
PATIENCE = 5000  # draws without a new record for a split that still wants some


@dataclasses.dataclass(eq=False, kw_only=True)
class ReasoningConfig(tfds.core.BuilderConfig):
    """What decides the content of one data set; `generator` goes to the task's generator."""

    task: str
    generator: Mapping[str, Any]
    sizes: Mapping[str, int]
    seed: int


class Reasoning(tfds.core.GeneratorBasedBuilder):
    """Records of one task in the splits train, validation and test."""

    VERSION = tfds.core.Version("1.2.0")
    RELEASE_NOTES: ClassVar = {
        "1.0.0": "Splits by content: train 8/10, validation 1/10, test 1/10.",
        "1.1.0": "chain_sum keeps problems whose running totals are within 0 and 99.",
        "1.2.0": "Messages instead of a question; source and difficulty.",
    }

    def _info(self) -> tfds.core.DatasetInfo:
        return self.dataset_info_from_configs(
            features=features(),
            description="Procedurally generated problems with answers that a program can verify.",
            homepage="https://github.com/open-thought/reasoning-gym",
        )

    def _split_generators(self, dl_manager):
        config = self.builder_config
        assert isinstance(config, ReasoningConfig)
        stream = tasks.records(config.task, seed=config.seed, settings=config.generator)
        return {
            split: self._generate_examples(chosen)
            for split, chosen in draw_splits(stream, sizes=config.sizes).items()
        }

    def _generate_examples(self, chosen: list[Record]):
        for record in chosen:
            yield record.id, to_row(record)


def draw_splits(stream: Iterator[Record], *, sizes: Mapping[str, int]) -> dict[str, list[Record]]:
    """The first `sizes[split]` distinct records of the stream for each split.

    Raises:
      UserError: if the stream stops bringing new problems before every split is full.
    """
    chosen: dict[str, list[Record]] = {split: [] for split in sizes}
    seen: set[str] = set()
    misses = 0
    while any(len(chosen[split]) < size for split, size in sizes.items()):
        record = next(stream)
        split = split_of(record.id)
        if record.id not in seen and len(chosen[split]) < sizes[split]:
            seen.add(record.id)
            chosen[split].append(record)
            misses = 0
            continue
        misses += 1
        if misses == PATIENCE:
            split = next(s for s in sizes if len(chosen[s]) < sizes[s])
            raise UserError(
                f"data.{split}_size is {sizes[split]} but task {record.task} has hardly more than "
                f"{len(chosen[split])} distinct {split} problems under data.generator; lower "
                f"data.{split}_size or widen data.generator"
            )
    return chosen


def split_of(record_id: str) -> str:
    """The split to which the content with this id belongs, for good."""
    place = int(record_id, 16) * sum(SHARES.values()) >> 4 * len(record_id)
    for split, share in SHARES.items():
        place -= share
        if place < 0:
            return split
    raise AssertionError("the shares cover all places")


def prepare(
    *,
    task: str,
    data_dir: str,
    train_size: int,
    validation_size: int,
    test_size: int,
    generator: Mapping[str, Any],
    seed: int,
) -> tfds.core.DatasetBuilder:
    """Builds the data set unless it stands complete in `data_dir`, and opens it.

    Different settings have different directories.

    Raises:
      UserError: for an unknown task, an empty split, a task too small for the sizes, or remains.
    """
    sizes = {"train": train_size, "validation": validation_size, "test": test_size}
    for split, size in sizes.items():
        if size < 1:
            raise UserError(f"data.{split}_size is {size}; every split needs at least one record")
    content = {"task": task, "generator": dict(generator), "sizes": sizes, "seed": seed}
    config = ReasoningConfig(
        name=settings_name(task, content), description=json.dumps(content), **content
    )
    return build(Reasoning, config, data_dir=data_dir)


def open_splits(**settings: Any) -> dict[str, Split]:
    """The records of train, validation and test; the arguments are those of `prepare`."""
    builder = prepare(**settings)
    return {split: load(builder, split=split) for split in SHARES}
