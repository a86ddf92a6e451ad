"""Overlap of training and evaluation problems: equal after normalisation, or sharing 13-grams.

A shared 13-gram need not be a shared problem (contests use set phrases), so the share of a
problem's 13-grams found in training problems is reported with it.
"""

import dataclasses
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from oapl_jax.data.records import Record

N = 13  # words, as in arXiv 2005.14165, appendix C
SHOWN = 100  # characters of a problem in the report
# LaTeX delimiters and spacing, which change nothing about the problem.
LATEX = re.compile(r"\\(?:left|right|displaystyle|q?quad)(?![a-z])|\\[,;:!>()\[\] ]|[$~]")


@dataclasses.dataclass(eq=False)
class Problem:
    """An evaluation problem and its matches.

    Attributes:
      grams: number of its distinct 13-grams; 0 if it has fewer than 13 words.
      exact: training source -> id of an equal problem.
      shared: training source -> its 13-grams found there.
      nearest: training source -> (shared 13-grams, id) of the problem that shares the most.
    """

    record: Record
    grams: int
    exact: dict[str, str] = dataclasses.field(default_factory=dict)
    shared: dict[str, set[int]] = dataclasses.field(default_factory=lambda: defaultdict(set))
    nearest: dict[str, tuple[int, str]] = dataclasses.field(default_factory=dict)


def find_overlap(train: Iterable[Record], evaluation: Iterable[Record]) -> dict[str, Any]:
    """Searches the training problems for the evaluation's.

    Returns:
      JSON-able: "train": problems by source. "evaluation": by source "problems", "short" (without a
      13-gram), "exact" and "ngram" (problems found in each way, by training source), and "found":
      for each found problem its "id", "text", "train_source", "train_id" of an equal problem or
      else of the nearest one, "exact", and "share" of its 13-grams found.
    """
    problems: dict[str, list[Problem]] = defaultdict(list)
    by_text: dict[str, list[Problem]] = defaultdict(list)
    by_gram: dict[int, list[Problem]] = defaultdict(list)
    for record in evaluation:
        text = normalize(record.question)
        grams = ngrams(text)
        problem = Problem(record, len(grams))
        problems[record.source].append(problem)
        by_text["".join(text.split())].append(problem)
        for gram in grams:
            by_gram[gram].append(problem)
    sizes: Counter[str] = Counter()
    for record in train:
        source, text = record.source, normalize(record.question)
        sizes[source] += 1
        for problem in by_text.get("".join(text.split()), ()):
            problem.exact.setdefault(source, record.id)
        hits: dict[Problem, set[int]] = defaultdict(set)
        for gram in ngrams(text):
            for problem in by_gram.get(gram, ()):
                hits[problem].add(gram)
        for problem, shared in hits.items():
            problem.shared[source] |= shared
            if len(shared) > problem.nearest.get(source, (0, ""))[0]:
                problem.nearest[source] = (len(shared), record.id)
    parts = {source: _summarize(part, list(sizes)) for source, part in problems.items()}
    return {"train": dict(sizes), "evaluation": parts}


def _summarize(problems: Sequence[Problem], sources: Sequence[str]) -> dict[str, Any]:
    found = [
        {
            "id": problem.record.id,
            "text": problem.record.question[:SHOWN],
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


def normalize(text: str) -> str:
    """Folds case and Unicode forms; removes LaTeX delimiters and repeated white space."""
    text = unicodedata.normalize("NFKC", text).casefold()
    return " ".join(LATEX.sub(" ", text).split())


def ngrams(text: str) -> set[int]:
    """Hashes of all runs of 13 words of a normalized text; symbols between words are ignored."""
    words = re.findall(r"\w+", text)
    return {hash(tuple(words[i : i + N])) for i in range(len(words) - N + 1)}


def format_table(result: Mapping[str, Any]) -> str:
    """Plain-text table with a row for each pair of an evaluation and a training source."""
    rows = [("evaluation", "problems", "short", "train", "problems", "exact", "13-gram")]
    for name, part in result["evaluation"].items():
        for source, size in result["train"].items():
            counts = (part["exact"][source], part["ngram"][source])
            rows.append((name, part["problems"], part["short"], source, size, *counts))
    return "\n".join("{:<16}{:>9}{:>7}  {:<16}{:>9}{:>7}{:>9}".format(*row) for row in rows)
