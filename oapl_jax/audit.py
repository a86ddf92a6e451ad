"""Does the training set hold problems of the evaluation? Exact after normalisation, and 13-grams.

    python -m oapl_jax.audit --config=configs/competition_math.py --workdir=runs/audit

Compares the training split with all other data of the configuration, its benchmarks among them,
prints a table, and writes audit.json into the workdir. Exit code 0: nothing found; 1: something; 2:
a mistake in a setting.

A shared 13-gram need not be a shared problem (contests use set phrases), so the share of a
problem's 13-grams that training problems hold is reported with it.
"""

import dataclasses
import json
import re
import sys
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from absl import flags

from oapl_jax.data.prompts import PROMPT_SETTINGS
from oapl_jax.data.public import releases
from oapl_jax.data.records import Joined, Record
from oapl_jax.data.synthetic import reasoning
from oapl_jax.data.synthetic.tasks import TASKS
from oapl_jax.errors import UserError, exit_with_code

N = 13  # words, as in arXiv 2005.14165, appendix C
SHOWN = 100  # characters of a problem that was found
# What sets formulas off or spaces them, and changes nothing that is asked.
LATEX = re.compile(r"\\(?:left|right|displaystyle|q?quad)(?![a-z])|\\[,;:!>()\[\] ]|[$~]")


@dataclasses.dataclass
class Problem:
    """A problem of the evaluation, and where it was found.

    Attributes:
      id, source, text: of the record.
      grams: its number of different 13-grams; 0 if it has fewer than 13 words.
      exact: id of an equal training problem, by source.
      shared: its 13-grams that training problems hold, by source.
      nearest: by source, the training problem that shares the most.
    """

    id: str
    source: str
    text: str
    grams: int
    exact: dict[str, str] = dataclasses.field(default_factory=dict)
    shared: dict[str, set[int]] = dataclasses.field(default_factory=dict)
    nearest: dict[str, tuple[int, str]] = dataclasses.field(default_factory=dict)


def audit(train: Iterable[Record], evaluation: Iterable[Record]) -> dict[str, Any]:
    """Looks for the problems of the evaluation among the training problems.

    Returns:
      JSON-able: "train": problems by source. "evaluation": by source "problems", "short" (without a
      13-gram), "exact" and "ngram" (problems found in each way, by training source), and "found":
      for each found problem its "id", "text", "train_source", "train_id" of an equal problem or
      else of the one that shares the most, whether "exact", and "share" of its 13-grams found.
    """
    problems: list[Problem] = []
    by_text: dict[str, list[Problem]] = defaultdict(list)
    by_gram: dict[int, list[Problem]] = defaultdict(list)
    for record in evaluation:
        text = normalized(record.question)
        grams = ngrams(text)
        problem = Problem(record.id, record.source, record.question[:SHOWN], len(grams))
        problems.append(problem)
        by_text["".join(text.split())].append(problem)
        for gram in grams:
            by_gram[gram].append(problem)
    sizes: dict[str, int] = defaultdict(int)
    for record in train:
        sizes[record.source] += 1
        text = normalized(record.question)
        for problem in by_text.get("".join(text.split()), ()):
            problem.exact.setdefault(record.source, record.id)
        _note_grams(record, ngrams(text), by_gram)
    sources = dict.fromkeys(problem.source for problem in problems)
    return {
        "train": dict(sizes),
        "evaluation": {
            source: _summary([p for p in problems if p.source == source], list(sizes))
            for source in sources
        },
    }


def _note_grams(
    record: Record, grams: Iterable[int], by_gram: Mapping[int, Sequence[Problem]]
) -> None:
    hits: dict[int, tuple[Problem, set[int]]] = {}
    for gram in grams:
        for problem in by_gram.get(gram, ()):
            hits.setdefault(id(problem), (problem, set()))[1].add(gram)
    for problem, shared in hits.values():
        problem.shared.setdefault(record.source, set()).update(shared)
        best = problem.nearest.get(record.source, (0, ""))
        problem.nearest[record.source] = max(best, (len(shared), record.id), key=lambda b: b[0])


def _summary(problems: Sequence[Problem], sources: Sequence[str]) -> dict[str, Any]:
    found = [
        {
            "id": problem.id,
            "text": problem.text,
            "train_source": source,
            "train_id": problem.exact.get(source) or problem.nearest[source][1],
            "exact": source in problem.exact,
            "share": round(len(problem.shared.get(source, ())) / max(problem.grams, 1), 3),
        }
        for problem in problems
        for source in sources
        if source in problem.exact or source in problem.shared
    ]
    return {
        "problems": len(problems),
        "short": sum(not problem.grams for problem in problems),
        "exact": {s: sum(s in problem.exact for problem in problems) for s in sources},
        "ngram": {s: sum(s in problem.shared for problem in problems) for s in sources},
        "found": found,
    }


def normalized(text: str) -> str:
    """Without differences of case, Unicode form, white space and the marks around formulas."""
    text = unicodedata.normalize("NFKC", text).casefold()
    return " ".join(LATEX.sub(" ", text).split())


def ngrams(text: str) -> set[int]:
    """Hashes of the runs of 13 words of a normalised text; symbols between words do not count."""
    words = re.findall(r"\w+", text)
    return {hash(tuple(words[i : i + N])) for i in range(len(words) - N + 1)}


def table(result: Mapping[str, Any]) -> str:
    """A plain-text table: a row for each pair of an evaluation and a training source."""
    head = ("evaluation", "problems", "short", "train", "problems", "exact", "13-gram")
    rows: list[tuple[str, ...]] = [head]
    for name, part in result["evaluation"].items():
        for source, size in result["train"].items():
            counts = (part["exact"][source], part["ngram"][source])
            row = (name, part["problems"], part["short"], source, size, *counts)
            rows.append(tuple(map(str, row)))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i in (0, 3) else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )


def found(result: Mapping[str, Any]) -> bool:
    return any(part["found"] for part in result["evaluation"].values())


def rows_table(reports: Mapping[str, releases.Report]) -> str:
    """What became of the rows of each release."""
    return "\n".join(f"{name}: {report}" for name, report in reports.items())


def sections(
    sets: Mapping[str, Any], benchmarks: Mapping[str, Any]
) -> dict[str, tuple[str, Mapping[str, Any]]]:
    """Name of a data set -> the section of the configuration that has it, and what that holds.

    Raises:
      UserError: for two data sets of one name.
    """
    for name in sets.keys() & benchmarks.keys():
        if sets[name] != benchmarks[name]:
            raise UserError(
                f"data.sets.{name} and config.benchmarks.{name} are not the same; rename one"
            )
    found: dict[str, tuple[str, Mapping[str, Any]]] = {}
    for section, holds in (("config.benchmarks", benchmarks), ("data.sets", sets)):
        found |= dict.fromkeys(holds, (section, holds))
    return found


def main() -> None:
    from oapl_jax.launch import read_command_line  # stands above the rooms of the data

    against = flags.DEFINE_list("against", [], "data sets to look for; all but train by default")
    config, workdir = read_command_line()
    data = {k: v for k, v in config.data.to_dict().items() if k not in PROMPT_SETTINGS}
    result: dict[str, Any]
    if data["task"] in TASKS:
        splits = reasoning.open_splits(**data)
        result = audit(splits["train"], Joined([splits["validation"], splits["test"]]))
    else:
        train = list(data["train"])
        found_in = sections(data["sets"], config.benchmarks.to_dict())
        others = against.value or [name for name in found_in if name not in train]
        opened, reports = {}, {}
        for name in (*train, *others):
            if name not in found_in:
                raise UserError(f"{name!r} is not one of data.sets or config.benchmarks")
            section, sets = found_in[name]
            how: dict[str, Any] = dict(section=section, data_dir=data["data_dir"])
            opened[name] = releases.open_set(name, sets=sets, **how)
            reports[name] = releases.report_of(releases.prepare(name, **how, **sets[name]))
        result = audit(Joined([opened[n] for n in train]), Joined([opened[n] for n in others]))
        result["rows"] = {name: report.to_json() for name, report in reports.items()}
        print(rows_table(reports), end="\n\n")
    print(table(result))
    workdir.mkdir(parents=True, exist_ok=True)
    (workdir / "audit.json").write_text(json.dumps(result, indent=1, ensure_ascii=False))
    print(f"what was found stands in {workdir / 'audit.json'}")
    if found(result):
        sys.exit(1)


if __name__ == "__main__":
    exit_with_code(main)
