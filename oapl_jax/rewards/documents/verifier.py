"""The verifier of structured documents: four terms and their sum, after FireRed-OCR.

    R = l_syntax r_syntax + l_closure r_closure + l_table r_table + l_text r_text

arXiv 2603.01840 states neither the weights l nor the constants of the terms: ours stand in
configs/common.py. It warns of output that is valid but empty: so a part of the reference that the
response lacks counts as wrong, no term rises above the reference's own, and a response without any
text gets the minimum of every term.
"""

import functools
import threading
from collections import Counter
from collections.abc import Mapping
from typing import NamedTuple

from rapidfuzz.distance import Levenshtein

from oapl_jax.config import DocumentRewardConfig
from oapl_jax.errors import UserError
from oapl_jax.rewards.documents.markup import Document, read_document

# Range of each term.
RANGES = {"syntax": (-1.0, 1.0), "closure": (-1.0, 0.0), "table": (0.0, 1.0), "text": (-1.0, 0.0)}
LEAST = {name: low for name, (low, _) in RANGES.items()}
# The responses to one prompt share a reference.
_read_reference = functools.lru_cache(maxsize=1024)(read_document)


def syntax_term(response: Document, reference: Document, *, plain: float) -> float:
    """Scores formulas: valid LaTeX, as rich in commands as the reference's; within -1 and 1.

        r_syntax = 1 / max(n, n_ref) sum over formulas and missing ones of
                       -1                        if it can't be parsed, is empty or missing
                       1 - (1 - p) (1 - min(1, C / C_ref))    otherwise

    with n formulas, of which the valid ones have C commands; 1 if n = n_ref = 0; p is `plain`.
    Counting commands, up to the reference's number, is our choice: the paper says no more of a
    valid formula's score than "based on complexity".
    """
    most = max(len(response.formulas), len(reference.formulas))
    if not most:
        return 1.0
    valid = [f.commands for f in response.formulas if f.commands is not None]
    wanted = sum(f.commands or 0 for f in reference.formulas)
    richness = min(1.0, sum(valid) / wanted) if wanted else 1.0
    score = 1 - (1 - plain) * (1 - richness)
    return (len(valid) * score - (most - len(valid))) / most


def closure_term(response: Document, *, per_tag: float) -> float:
    """Scores closed tags, within -1 and 0.

        r_closure = -min(1, c n_open)

    with n_open tags of HTML or marks of Markdown without their other half; c is `per_tag`.
    """
    return -min(1.0, per_tag * response.open_tags)


def table_term(response: Document, reference: Document) -> float:
    """Scores rectangular and complete tables, within 0 and 1.

        r_table = 1 / max(n, n_ref) sum over tables of [all rows have as many columns, it ends, and
                                                        some cell holds text]

    and 1 if n = n_ref = 0. For one table this is arXiv 2603.01840; the mean is our choice.
    """
    most = max(len(response.tables), len(reference.tables))
    return sum(t.complete and not t.ragged for t in response.tables) / most if most else 1.0


def text_term(response: Document, reference: Document) -> float:
    """Distance of the text, with its cells, from the reference's; within -1 and 0.

    r_text = -Levenshtein(text, text_ref) / max(|text|, |text_ref|)
    """
    return -Levenshtein.normalized_distance(response.text, reference.text)


def normalized_sum(terms: Mapping[str, float], weights: Mapping[str, float]) -> float:
    """The weighted sum as a share of its range: (R - R_min) / (R_max - R_min), R = sum_k l_k r_k;
    exactly 1 if every term that has a weight is at its upper bound, as the reference's are."""
    missing = sum(weights[name] * (high - terms[name]) for name, (_, high) in RANGES.items())
    return 1 - missing / sum(weights[name] * (high - low) for name, (low, high) in RANGES.items())


class DocumentVerdict(NamedTuple):
    """The reward of a document, within 0 and 1 (1: right), its four terms, and its faults:
    "unclosed" (a tag), "ragged" (a table), "invalid" (a formula that can't be parsed, is empty or
    is missing), "empty" (no text) and "long" (not read at all)."""

    reward: float
    terms: Mapping[str, float]
    faults: tuple[str, ...]


class DocumentVerifier:
    """Grades documents; every method is thread-safe, and no response makes one raise."""

    def __init__(self, config: DocumentRewardConfig):
        self._config, self._weights = config, dict(config.weights)
        if not sum(self._weights.values()) > 0:
            raise UserError("rewards.documents.weights are all 0; set one above 0")
        self._counts: Counter[str] = Counter()
        self._lock = threading.Lock()

    def verify(self, response: str, answer: str) -> DocumentVerdict:
        verdict = self._verify(response, answer)
        with self._lock:
            self._counts.update(("graded", *verdict.faults, *(["right"] * (verdict.reward == 1))))
        return verdict

    def extract(self, response: str) -> str:
        """The document of a response: all of it."""
        return response

    final_answer = extract

    def counts(self) -> dict[str, int]:
        with self._lock:
            return dict(self._counts)

    def close(self) -> None:
        pass

    def _verify(self, response: str, answer: str) -> DocumentVerdict:
        if len(response) > self._config.max_characters:
            return DocumentVerdict(0.0, LEAST, ("long",))
        found, wanted = read_document(response), _read_reference(answer)
        faults = {
            "unclosed": found.open_tags > 0,
            "ragged": any(t.ragged for t in found.tables),
            "invalid": len(found.formulas) < len(wanted.formulas)
            or any(f.commands is None for f in found.formulas),
            "empty": not found.text.strip(),
        }
        terms = {
            "syntax": syntax_term(found, wanted, plain=self._config.plain_formula),
            "closure": closure_term(found, per_tag=self._config.per_open_tag),
            "table": table_term(found, wanted),
            "text": text_term(found, wanted),
        }
        terms = LEAST if faults["empty"] else terms
        reward = normalized_sum(terms, self._weights)
        return DocumentVerdict(reward, terms, tuple(name for name, has in faults.items() if has))
