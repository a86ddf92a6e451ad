"""Public data sets as TFDS data sets (array_record), built from files that the user has.

Nothing is downloaded: docs/data.md says how to obtain each release and describes its layout. A row
that is no problem is dropped; the metadata of the data set counts dropped rows by reason.
"""

import dataclasses
import json
import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

import tensorflow_datasets as tfds
from etils import epath

from oapl_jax.config import PublicDataConfig, ReleaseConfig
from oapl_jax.data.public import tables
from oapl_jax.data.public.readers import Reader, choose_reader
from oapl_jax.data.records import (
    Concatenated,
    Record,
    config_name,
    features,
    load_split,
    prepare_builder,
    to_row,
)
from oapl_jax.errors import UserError

log = logging.getLogger(__name__)

SPLIT = "whole"  # a release's own splits are separate files, and so separate data sets


@dataclasses.dataclass(eq=False, kw_only=True)
class ReleaseBuilderConfig(tfds.core.BuilderConfig):
    """Everything that determines the content of one data set."""

    setting: str
    reader: Reader
    files: Sequence[epath.Path]
    fingerprints: Sequence[Sequence[Any]]
    rows: int
    part: tuple[int, int]


class Release(tfds.core.GeneratorBasedBuilder):
    """The records of one release in one split."""

    VERSION = tfds.core.Version("1.2.0")
    RELEASE_NOTES: ClassVar = {
        "1.0.0": "The first.",
        "1.1.0": "DeepCoder's first solution.",
        "1.2.0": "Rows without a problem are counted as `dropped`.",
    }

    def _info(self) -> tfds.core.DatasetInfo:
        return self.dataset_info_from_configs(
            features=features(),
            description="Problems with verifiable answers, from a public release.",
            metadata=tfds.core.MetadataDict(),
        )

    def _split_generators(self, dl_manager):
        return {SPLIT: self._generate_examples()}

    def _generate_examples(self):
        config = self.builder_config
        assert isinstance(config, ReleaseBuilderConfig)
        report = Report()
        for record in records(config, report):
            yield record.id, to_row(record)
        report.check(config)
        assert isinstance(self.info.metadata, dict)
        self.info.metadata.update(report.to_json(), files=config.fingerprints)


@dataclasses.dataclass
class Report:
    """Counts of rows; `examples` are the first row numbers, from 0, dropped for each reason."""

    rows: int = 0
    kept: int = 0
    dropped: Counter[str] = dataclasses.field(default_factory=Counter)
    examples: dict[str, list[int]] = dataclasses.field(default_factory=dict)

    def drop(self, reason: str) -> None:
        self.dropped[reason] += 1
        if self.dropped[reason] <= 5:
            self.examples.setdefault(reason, []).append(self.rows - 1)

    def check(self, config: ReleaseBuilderConfig) -> None:
        if config.rows and self.rows != config.rows:
            raise UserError(
                f"{config.setting}: the files hold {self.rows} rows, and {config.setting}.rows is "
                f"{config.rows}; obtain them again, or set rows to what this release has (0: any)"
            )
        if not self.kept:
            raise UserError(f"{config.setting}: no row is a valid problem ({self})")

    def to_json(self) -> dict[str, Any]:
        return {**vars(self), "dropped": dict(self.dropped)}

    def __str__(self) -> str:
        reasons = ", ".join(f"{count} {reason}" for reason, count in self.dropped.most_common())
        return f"{self.rows} rows, {self.kept} kept" + (f"; dropped: {reasons}" if reasons else "")


def records(config: ReleaseBuilderConfig, report: Report) -> Iterator[Record]:
    """Reads the distinct records of a release's files and fills the report."""
    seen: set[str] = set()
    for file in config.files:
        for row in tables.read_rows(file, config.reader.required, config.reader.optional):
            report.rows += 1
            try:
                record = config.reader.record(row)
                "".join(to_row(record).values()).encode()
            except tables.InvalidRow as error:
                report.drop(str(error))
                continue
            except UnicodeEncodeError:
                report.drop("text that is not Unicode")
                continue
            if not config.part[0] <= percentile(record.id) < config.part[1]:
                report.drop("outside of part")
            elif record.id in seen:
                report.drop("repeats an earlier problem")
            else:
                seen.add(record.id)
                report.kept += 1
                yield dataclasses.replace(record, source=config.setting.rpartition(".")[2])


def percentile(record_id: str) -> int:
    """Fixed position of a content in the space of all contents, 0 to 99."""
    return int(record_id, 16) * 100 >> 4 * len(record_id)


def prepare(
    name: str, release: ReleaseConfig, *, section: str, data_dir: str
) -> tfds.core.DatasetBuilder:
    """Builds a data set unless it is complete in `data_dir`, and opens it.

    Other settings or other files make another data set; see `tables.fingerprint`. Parts (0, 95) and
    (95, 100) of the same files have no problem in common.

    Args:
      name: of the data set, and the `source` of its records.
      release: its settings.
      section: of the configuration that holds them, for errors.
      data_dir: directory of prepared data sets.

    Raises:
      UserError: for files that are missing, damaged or of another release.
    """
    setting = f"{section}.{name}"
    reader = choose_reader(release.kind, release.options, setting=setting)
    low, high = release.part
    if not 0 <= low < high <= 100:
        raise UserError(
            f"{setting}.part={release.part} must be two rising numbers within 0 and 100"
        )
    found = tables.find_files(release.path, release.files, setting=setting)
    content = {
        "kind": release.kind,
        "options": dict(release.options),
        "part": [low, high],
        "rows": release.rows,
        "files": list(map(tables.fingerprint, found)),
    }
    config = ReleaseBuilderConfig(
        name=config_name(name, json.loads(json.dumps(content, default=dict))),
        description=f"{name}, {release.kind}",
        setting=setting,
        reader=reader,
        files=found,
        fingerprints=content["files"],
        rows=release.rows,
        part=(low, high),
    )
    fresh = not (epath.Path(data_dir) / Release.name / str(config.name)).exists()
    builder = prepare_builder(Release, config, data_dir=data_dir)
    report = report_of(builder)
    if fresh:
        log.log(logging.WARNING if report.dropped else logging.INFO, "%s: %s", name, report)
    return builder


def report_of(builder: tfds.core.DatasetBuilder) -> Report:
    """Reads the report of a prepared data set."""
    stored: Any = builder.info.metadata
    fields: dict[str, Any] = {name: stored[name] for name in ("rows", "kept", "examples")}
    return Report(**fields, dropped=Counter(stored["dropped"]))


def open_set(
    name: str, sets: Mapping[str, ReleaseConfig], *, section: str, data_dir: str
) -> Sequence[Record]:
    """Opens one data set of a section of the configuration; prepares it if needed.

    Raises:
      UserError: for an unknown name; and errors of `prepare`.
    """
    if name not in sets:
        raise UserError(f"{name!r} is not one of {section}: {', '.join(sets)}")
    return load_split(prepare(name, sets[name], section=section, data_dir=data_dir), SPLIT)


def open_splits(config: PublicDataConfig) -> dict[str, Sequence[Record]]:
    """Opens train, validation and test, each of one or more data sets.

    Raises:
      UserError: for a split without data sets, a data set of another task, and errors of
        `open_set`.
    """
    splits = {}
    for split in ("train", "validation", "test"):
        names, parts = getattr(config, split), []
        if not names:
            raise UserError(f"data.{split} names no data set; name one of {', '.join(config.sets)}")
        for name in names:
            part = open_set(name, config.sets, section="data.sets", data_dir=config.data_dir)
            if part[0].task != config.task:
                raise UserError(
                    f"data.sets.{name} is of task {part[0].task}, and data.task={config.task}"
                )
            parts.append(part)
        splits[split] = parts[0] if len(parts) == 1 else Concatenated(parts)
    return splits
