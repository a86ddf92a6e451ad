"""Public data sets as TFDS data sets (array_record, no TensorFlow), from files that the user has.

Nothing is fetched: docs/data.md says how to obtain each release and how its files lie. A row of
which no record can be made is left out; how many rows, and why, stands in the data set's metadata.
"""

import dataclasses
import json
import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

import tensorflow_datasets as tfds
from etils import epath

from oapl_jax.data.public import tables
from oapl_jax.data.public.cells import Unfit
from oapl_jax.data.public.kinds import Kind, choose_kind
from oapl_jax.data.records import Joined, Record, build, features, load, settings_name, to_row
from oapl_jax.errors import UserError

log = logging.getLogger(__name__)

SPLIT = "whole"  # a release's own splits are other files, and so other data sets


@dataclasses.dataclass(eq=False, kw_only=True)
class ReleaseConfig(tfds.core.BuilderConfig):
    """What decides the content of one data set."""

    setting: str
    kind: Kind
    files: Sequence[epath.Path]
    fingerprints: Sequence[Sequence[Any]]
    rows: int
    part: tuple[int, int]


class Release(tfds.core.GeneratorBasedBuilder):
    """The records of one release in one split."""

    VERSION = tfds.core.Version("1.1.0")
    RELEASE_NOTES: ClassVar = {"1.0.0": "The first.", "1.1.0": "DeepCoder's first solution."}

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
        assert isinstance(config, ReleaseConfig)
        report = Report()
        for record in records(config, report):
            yield record.id, to_row(record)
        report.check(config)
        assert isinstance(self.info.metadata, dict)
        self.info.metadata.update(report.to_json(), files=config.fingerprints)


@dataclasses.dataclass
class Report:
    """What became of the rows; `examples` are the first few numbers of rows, from 0, of each reason
    to leave one out."""

    rows: int = 0
    kept: int = 0
    left_out: Counter[str] = dataclasses.field(default_factory=Counter)
    examples: dict[str, list[int]] = dataclasses.field(default_factory=dict)

    def leave_out(self, reason: str) -> None:
        self.left_out[reason] += 1
        if self.left_out[reason] <= 5:
            self.examples.setdefault(reason, []).append(self.rows - 1)

    def check(self, config: ReleaseConfig) -> None:
        if config.rows and self.rows != config.rows:
            raise UserError(
                f"{config.setting}: the files hold {self.rows} rows, and {config.setting}.rows is "
                f"{config.rows}; obtain them again, or set rows to what this release has (0: any)"
            )
        if not self.kept:
            raise UserError(f"{config.setting}: no row is fit to be a problem ({self})")

    def to_json(self) -> dict[str, Any]:
        return {**vars(self), "left_out": dict(self.left_out)}

    def __str__(self) -> str:
        reasons = ", ".join(f"{count} {reason}" for reason, count in self.left_out.most_common())
        return f"{self.rows} rows, {self.kept} kept" + (f"; left out: {reasons}" if reasons else "")


def records(config: ReleaseConfig, report: Report) -> Iterator[Record]:
    """The distinct records of a release's files; the report is filled meanwhile."""
    seen: set[str] = set()
    for file in config.files:
        for row in tables.read_rows(file, config.kind.required, config.kind.optional):
            report.rows += 1
            try:
                record = config.kind.record(row)
                "".join(to_row(record).values()).encode()
            except Unfit as unfit:
                report.leave_out(str(unfit))
                continue
            except UnicodeEncodeError:
                report.leave_out("text that is not Unicode")
                continue
            if not config.part[0] <= percentile(record.id) < config.part[1]:
                report.leave_out("outside of part")
            elif record.id in seen:
                report.leave_out("repeats an earlier problem")
            else:
                seen.add(record.id)
                report.kept += 1
                yield dataclasses.replace(record, source=config.setting.rpartition(".")[2])


def percentile(record_id: str) -> int:
    """0 to 99: the place of this content in the space of all, for good."""
    return int(record_id, 16) * 100 >> 4 * len(record_id)


def prepare(
    name: str,
    *,
    section: str,
    data_dir: str,
    kind: str,
    path: str,
    files: Sequence[str],
    rows: int,
    part: Sequence[int],
    options: Mapping[str, Any],
) -> tfds.core.DatasetBuilder:
    """Builds the data set unless it stands complete in `data_dir`, and opens it.

    Other settings or other files make another data set; `tables.fingerprint` tells files apart.

    Args:
      name: of the data set, and the `source` of its records.
      section: of the configuration that names it, for errors.
      data_dir: where prepared data sets stand.
      kind: see `choose_kind`.
      path: the release: a file, or a directory; local or gs://.
      files: globs below the directory; none for a file.
      rows: that the files must hold; 0 for any number.
      part: from and to, in hundredths of the space of all problems: (0, 95) and (95, 100) of the
        same files have no problem in common.
      options: of the kind.

    Raises:
      UserError: for files that are missing, damaged or of another release.
    """
    setting = f"{section}.{name}"
    chosen = choose_kind(kind, options, setting=setting)
    low, high = part
    if not 0 <= low < high <= 100:
        raise UserError(f"{setting}.part={tuple(part)} is not two numbers within 0 and 100")
    found = tables.find_files(path, files, setting=setting)
    content = {
        "kind": kind,
        "options": dict(options),
        "part": [low, high],
        "rows": rows,
        "files": list(map(tables.fingerprint, found)),
    }
    config = ReleaseConfig(
        name=settings_name(name, json.loads(json.dumps(content, default=dict))),
        description=f"{name}, {kind}",
        setting=setting,
        kind=chosen,
        files=found,
        fingerprints=content["files"],
        rows=rows,
        part=(low, high),
    )
    fresh = not (epath.Path(data_dir) / Release.name / str(config.name)).exists()
    builder = build(Release, config, data_dir=data_dir)
    report = report_of(builder)
    if fresh:
        log.warning("%s: %s", name, report) if report.left_out else log.info("%s: %s", name, report)
    return builder


def report_of(builder: tfds.core.DatasetBuilder) -> Report:
    """What became of the rows of a prepared data set."""
    stored: Any = builder.info.metadata
    return Report(
        rows=stored["rows"],
        kept=stored["kept"],
        left_out=Counter(stored["left_out"]),
        examples=stored["examples"],
    )


def open_set(
    name: str, *, section: str, data_dir: str, sets: Mapping[str, Mapping[str, Any]]
) -> Sequence[Record]:
    """The records of one of the `sets`, which are that section of a configuration, prepared if need
    be.

    Raises:
      UserError: for a name that is not among them; and what `prepare` raises.
    """
    if name not in sets:
        raise UserError(f"{name!r} is not one of {section}: {', '.join(sets)}")
    try:
        builder = prepare(name, section=section, data_dir=data_dir, **sets[name])
    except TypeError as error:
        raise UserError(f"{section}.{name}: {error}") from error
    return load(builder, split=SPLIT)


def open_splits(
    *,
    task: str,
    data_dir: str,
    sets: Mapping[str, Mapping[str, Any]],
    train: Sequence[str],
    validation: Sequence[str],
    test: Sequence[str],
) -> dict[str, Sequence[Record]]:
    """The records of train, validation and test, each of one or more sets.

    Args:
      task: the verifier of all of them.
      data_dir: where prepared data sets stand.
      sets: by name, the arguments of `prepare`.
      train, validation, test: names of sets.

    Raises:
      UserError: for a split without sets, a set of another task, or what `open_set` raises.
    """
    splits = {"train": train, "validation": validation, "test": test}
    opened = {}
    for split, names in splits.items():
        if not names:
            raise UserError(f"data.{split} names no data set; name one of {', '.join(sets)}")
        parts = [
            open_set(name, section="data.sets", data_dir=data_dir, sets=sets) for name in names
        ]
        for name, part in zip(names, parts, strict=True):
            if part[0].task != task:
                raise UserError(f"data.sets.{name} is of task {part[0].task}, and data.task={task}")
        opened[split] = parts[0] if len(parts) == 1 else Joined(parts)
    return opened
