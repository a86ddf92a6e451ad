"""Searches the training set for problems of the evaluation: exact matches and shared 13-grams.

    python -m oapl_jax.audit --config=configs/competition_math.py --workdir=runs/audit

Compares the training split with all other data sets of the configuration, its benchmarks included,
prints a table, and writes audit.json into the workdir. Exit code 0: no overlap; 1: overlap; 2: an
invalid setting.
"""

import json
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from absl import flags

from oapl_jax.config import PublicDataConfig, ReleaseConfig
from oapl_jax.data import overlap
from oapl_jax.data.public import releases
from oapl_jax.data.records import Concatenated, load_split
from oapl_jax.data.splits import open_splits
from oapl_jax.errors import UserError, exit_with_code
from oapl_jax.files import write_atomically
from oapl_jax.launch import read_command_line


def audit_releases(
    data: PublicDataConfig, benchmarks: Mapping[str, ReleaseConfig], against: Sequence[str]
) -> dict[str, Any]:
    """Compares public data sets; `against` names the evaluation's, all others if empty."""
    section_of = sections(data.sets, benchmarks)
    others = list(against) or [name for name in section_of if name not in data.train]
    opened, reports = {}, {}
    for name in (*data.train, *others):
        if name not in section_of:
            raise UserError(f"{name!r} is not one of data.sets or config.benchmarks")
        section, sets = section_of[name]
        builder = releases.prepare(name, sets[name], section=section, data_dir=data.data_dir)
        opened[name] = load_split(builder, releases.SPLIT)
        reports[name] = releases.report_of(builder)
        print(f"{name}: {reports[name]}")
    result = overlap.find_overlap(
        Concatenated([opened[name] for name in data.train]),
        Concatenated([opened[name] for name in others]),
    )
    return result | {"rows": {name: report.to_json() for name, report in reports.items()}}


def sections(
    sets: Mapping[str, Any], benchmarks: Mapping[str, Any]
) -> dict[str, tuple[str, Mapping[str, Any]]]:
    """Maps each data set to its section of the configuration and that section's content; UserError
    if both sections have a data set of one name that differs."""
    for name in sets.keys() & benchmarks.keys():
        if sets[name] != benchmarks[name]:
            raise UserError(f"data.sets.{name} and config.benchmarks.{name} differ; rename one")
    found: dict[str, tuple[str, Mapping[str, Any]]] = {}
    for section, content in (("config.benchmarks", benchmarks), ("data.sets", sets)):
        found |= dict.fromkeys(content, (section, content))
    return found


def main() -> None:
    against = flags.DEFINE_list("against", [], "data sets to search for; default: all but train")
    config, workdir = read_command_line()
    if isinstance(config.data, PublicDataConfig):
        result = audit_releases(config.data, config.benchmarks, against.value)
    else:
        splits = open_splits(config.data)
        evaluation = Concatenated([splits["validation"], splits["test"]])
        result = overlap.find_overlap(splits["train"], evaluation)
    print(f"\n{overlap.format_table(result)}")
    workdir.mkdir(parents=True, exist_ok=True)
    content = json.dumps(result, indent=1, ensure_ascii=False).encode()
    write_atomically(workdir / "audit.json", [content])
    print(f"details: {workdir / 'audit.json'}")
    if any(part["found"] for part in result["evaluation"].values()):
        sys.exit(1)


if __name__ == "__main__":
    exit_with_code(main)
