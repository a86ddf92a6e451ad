"""Public data sets as TFDS data sets (array_record), built from files that the user has.

Nothing is downloaded: docs/data.md says how to obtain each release and describes its layout. A row
that is no problem is dropped; the metadata of the data set counts dropped rows by reason.
"""

import dataclasses
import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import tensorflow_datasets as tfds
from etils import epath

from oapl_jax.config import PublicDataConfig, ReleaseConfig
from oapl_jax.data.public import tables
from oapl_jax.data.public.readers import Reader, choose_reader
from oapl_jax.data.records import (
    Concatenated,
    Record,
    load_split,
    position,
    prepare_records,
    to_row,
)
from oapl_jax.errors import UserError

log = logging.getLogger(__name__)

SPLIT = "whole"  # a release's own splits are separate files, and so separate data sets


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

    def check(self, *, setting: str, rows: int, files: Sequence[epath.Path]) -> None:
        if rows and self.rows != rows:
            raise UserError(
                f"{setting}: the files hold {self.rows} rows, and {setting}.rows is {rows}; obtain "
                "them again, or set rows to what this release has (0: any)"
            )
        if not self.kept:
            names = ", ".join(map(str, files))
            raise UserError(f"{setting}: no row of {names} is a valid problem ({self})")

    def to_json(self) -> dict[str, Any]:
        return {**vars(self), "dropped": dict(self.dropped)}

    def __str__(self) -> str:
        reasons = ", ".join(f"{count} {reason}" for reason, count in self.dropped.most_common())
        return f"{self.rows} rows, {self.kept} kept" + (f"; dropped: {reasons}" if reasons else "")


def records(
    files: Sequence[epath.Path], reader: Reader, part: Sequence[int], report: Report
) -> Iterator[Record]:
    """Reads the distinct records of files, within a part, and fills the report."""
    seen: set[str] = set()
    for file in files:
        for row in tables.read_rows(file, reader.required, reader.optional):
            report.rows += 1
            try:
                if isinstance(row, tables.InvalidRow):
                    raise row
                record = reader.record(row)
                "".join(to_row(record).values()).encode()
            except tables.InvalidRow as error:
                report.drop(str(error))
                continue
            except UnicodeEncodeError:
                report.drop("text that is not Unicode")
                continue
            if not part[0] <= position(record.id, 100) < part[1]:
                report.drop("outside of part")
            elif record.id in seen:
                report.drop("repeats an earlier problem")
            else:
                seen.add(record.id)
                report.kept += 1
                yield record


def prepare(
    name: str, release: ReleaseConfig, *, section: str, data_dir: str
) -> tfds.core.DatasetBuilder:
    """Builds data set `name` of a configuration's `section` unless it is complete, and opens it.

    Other settings or other files make another data set; see `tables.fingerprint`. Parts (0, 95) and
    (95, 100) of the same files have no problem in common.

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
    fingerprints, report = list(map(tables.fingerprint, found)), Report()
    content = {key: release[key] for key in ("kind", "options", "part", "rows")}

    def whole() -> Iterator[Record]:
        for record in records(found, reader, release.part, report):
            yield dataclasses.replace(record, source=name)
        report.check(setting=setting, rows=release.rows, files=found)

    builder = prepare_records(
        name,
        content | {"files": fingerprints},
        lambda: {SPLIT: whole()},
        metadata=lambda: report.to_json() | {"files": fingerprints},
        data_dir=data_dir,
    )
    if report.rows:  # built now
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
    """Opens a data set, prepared if needed; UserError for an unknown name, or of `prepare`."""
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
        if not (names := config[split]):
            raise UserError(f"data.{split} names no data set; name one of {', '.join(config.sets)}")
        opened = [
            open_set(name, config.sets, section="data.sets", data_dir=config.data_dir)
            for name in names
        ]
        for name, part in zip(names, opened, strict=True):
            if (task := part[0].task) != config.task:
                raise UserError(f"data.sets.{name} is of task {task}, and data.task={config.task}")
        splits[split] = opened[0] if len(opened) == 1 else Concatenated(opened)
    return splits
