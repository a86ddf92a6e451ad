"""Searches the training set for problems of the evaluation: exact matches and shared 13-grams.

    python -m oapl_jax.audit --config=configs/competition_math.py --workdir=runs/audit

Compares the training split with all other data sets of the configuration, its benchmarks included,
prints a table, and writes audit.json into the workdir. Exit code 0: no overlap; 1: overlap; 2: an
invalid setting.
"""

import dataclasses
import json
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from absl import flags

from oapl_jax.data import overlap
from oapl_jax.data.prompts import PROMPT_SETTINGS
from oapl_jax.data.public import releases
from oapl_jax.data.records import Concatenated
from oapl_jax.data.synthetic import tasks
from oapl_jax.errors import UserError, exit_with_code
from oapl_jax.launch import read_command_line


def audit_releases(
    data: Mapping[str, Any], benchmarks: Mapping[str, Any], against: Sequence[str]
) -> dict[str, Any]:
    """Compares public data sets; `against` names the evaluation's, all others if empty."""
    train, section_of = list(data["train"]), sections(data["sets"], benchmarks)
    others = list(against) or [name for name in section_of if name not in train]
    opened, reports = {}, {}
    for name in (*train, *others):
        if name not in section_of:
            raise UserError(f"{name!r} is not one of data.sets or config.benchmarks")
        section, sets = section_of[name]
        where: dict[str, Any] = dict(section=section, data_dir=data["data_dir"])
        opened[name] = releases.open_set(name, sets=sets, **where)
        reports[name] = releases.report_of(releases.prepare(name, **where, **sets[name]))
        print(f"{name}: {reports[name]}")
    result = overlap.find_overlap(
        Concatenated([opened[name] for name in train]),
        Concatenated([opened[name] for name in others]),
    )
    return result | {"rows": {name: report.to_json() for name, report in reports.items()}}


def sections(
    sets: Mapping[str, Any], benchmarks: Mapping[str, Any]
) -> dict[str, tuple[str, Mapping[str, Any]]]:
    """Maps each data set to its section of the configuration and that section's content.

    Raises:
      UserError: if both sections have a data set of one name that differs.
    """
    for name in sets.keys() & benchmarks.keys():
        if sets[name] != benchmarks[name]:
            raise UserError(f"data.sets.{name} and config.benchmarks.{name} differ; rename one")
    benchmark = ("config.benchmarks", benchmarks)
    return dict.fromkeys(benchmarks, benchmark) | dict.fromkeys(sets, ("data.sets", sets))


def main() -> None:
    against = flags.DEFINE_list("against", [], "data sets to search for; default: all but train")
    config, workdir = read_command_line()
    data = {k: v for k, v in dataclasses.asdict(config.data).items() if k not in PROMPT_SETTINGS}
    if data["task"] in tasks.TASKS:
        splits = tasks.open_splits(**data)
        evaluation = Concatenated([splits["validation"], splits["test"]])
        result = overlap.find_overlap(splits["train"], evaluation)
    else:
        benchmarks = {name: dataclasses.asdict(s) for name, s in config.benchmarks.items()}
        result = audit_releases(data, benchmarks, against.value)
    print(f"\n{overlap.format_table(result)}")
    workdir.mkdir(parents=True, exist_ok=True)
    (workdir / "audit.json").write_text(json.dumps(result, indent=1, ensure_ascii=False))
    print(f"details: {workdir / 'audit.json'}")
    if any(part["found"] for part in result["evaluation"].values()):
        sys.exit(1)


if __name__ == "__main__":
    exit_with_code(main)
