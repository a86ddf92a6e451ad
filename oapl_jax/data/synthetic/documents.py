r"""Made documents: tables and formulas by a plain description, to be written as HTML and LaTeX.

    ab|c/d|sqrt(x)=      <table><tr><td>ab</td><td>c</td></tr><tr><td>d</td><td>$\sqrt{x}$</td>..
    frac(pow(b,2),a)=    $\frac{b^{2}}{a}$

A description has a slash between rows and a bar between cells; a formula is the name of a function
with its arguments. Noisy demonstrations omit closing tags, braces and whole cells.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from oapl_jax.data.records import Record
from oapl_jax.errors import UserError

LETTERS = "abcdefghijklmnopqrstuvwxyz"
DIGITS = "123456789"
# Function -> LaTeX before, between and behind its arguments.
FUNCTIONS = {
    "frac": (r"\frac{", "}{", "}"),
    "sqrt": (r"\sqrt{", "}"),
    "pow": ("", "^{", "}"),
    "sub": ("", "_{", "}"),
}
CHARACTERS = "".join(dict.fromkeys(LETTERS + DIGITS + "(),|/=<>$^_{}\\"))


@dataclasses.dataclass(frozen=True, kw_only=True)
class DocumentGenerator:
    """Endless items by index, each {"metadata": {"rows": ..}} or {"metadata": {"formula": ..}}.

    "rows" are lists of cells, "formula" is a formula that stands alone; a cell is a word or
    {"formula": ..}. An item is a function of seed and index; items of two seeds are unrelated.

    Attributes:
      max_letters: of a word.
      formulas_alone: share of the items that are a formula.
      formulas_in_tables: share of the tables with one cell that is a formula of one function.
      max_depth: of functions in a formula that stands alone.

    Raises:
      UserError: for empty ranges, or shares outside [0, 1].
    """

    seed: int
    min_rows: int
    max_rows: int
    min_columns: int
    max_columns: int
    max_letters: int
    formulas_alone: float
    formulas_in_tables: float
    max_depth: int

    def __post_init__(self) -> None:
        least = dict(
            min_rows=1, max_rows=self.min_rows, min_columns=1, max_columns=self.min_columns
        )
        for name, bound in (least | dict(max_letters=1, max_depth=1)).items():
            if (value := getattr(self, name)) < bound:
                raise UserError(f"data.generator.{name}={value} must be at least {bound}")
        for name in ("formulas_alone", "formulas_in_tables"):
            if not 0 <= (share := getattr(self, name)) <= 1:
                raise UserError(f"data.generator.{name}={share} must lie within 0 and 1")

    def __getitem__(self, index: int) -> dict[str, Any]:
        rng = np.random.default_rng([self.seed, index])
        if rng.random() < self.formulas_alone:
            return {"metadata": {"formula": _formula(rng, int(rng.integers(self.max_depth)) + 1)}}
        rows = rng.integers(self.min_rows, self.max_rows + 1)
        columns = rng.integers(self.min_columns, self.max_columns + 1)
        cells: list[Any] = [self._word(rng) for _ in range(rows * columns)]
        if rng.random() < self.formulas_in_tables:
            cells[rng.integers(len(cells))] = {"formula": _formula(rng, 1)}
        return {
            "metadata": {"rows": [cells[i : i + columns] for i in range(0, len(cells), columns)]}
        }

    def _word(self, rng: np.random.Generator) -> str:
        return "".join(rng.choice([*LETTERS], int(rng.integers(self.max_letters)) + 1))


def _formula(rng: np.random.Generator, depth: int) -> Any:
    """[function, argument, ..]; arguments are letters, digits or functions up to that depth."""
    name = str(rng.choice([*FUNCTIONS]))
    letter, digit = str(rng.choice([*LETTERS])), str(rng.choice([*DIGITS]))
    if name in ("pow", "sub"):
        return [name, letter, digit]
    deeper = lambda: _formula(rng, depth - 1) if depth > 1 else str(rng.choice([*LETTERS]))
    return [name, deeper()] if name == "sqrt" else [name, deeper(), letter]


def question(metadata: Mapping[str, Any]) -> str:
    """The plain description."""
    if "formula" in metadata:
        return f"{_describe(metadata['formula'])}="
    cell = lambda c: _describe(c if isinstance(c, str) else c["formula"])
    return "/".join("|".join(map(cell, row)) for row in metadata["rows"]) + "="


def _describe(formula: Any) -> str:
    if isinstance(formula, str):
        return formula
    name, *arguments = formula
    return f"{name}({','.join(map(_describe, arguments))})"


def answer(metadata: Mapping[str, Any]) -> str:
    """The document: HTML with its formulas in LaTeX."""
    return _render(metadata, lambda: False)


def demonstration(record: Record, rng: np.random.Generator, noise: float) -> str:
    """The document without each closing tag, closing brace and cell, with probability `noise`."""
    return _render(record.metadata, lambda: rng.random() < noise)


def _render(metadata: Mapping[str, Any], omit: Callable[[], bool]) -> str:
    if "formula" in metadata:
        return f"${_latex(metadata['formula'], omit)}$"

    def tag(name: str, content: str) -> str:
        return f"<{name}>{content}" + ("" if omit() else f"</{name}>")

    def cell(content: Any) -> str:
        if omit():
            return ""
        return tag("td", content if isinstance(content, str) else _render(content, omit))

    rows = ("".join(map(cell, row)) for row in metadata["rows"])
    return tag("table", "".join(tag("tr", row) for row in rows))


def _latex(formula: Any, omit: Callable[[], bool]) -> str:
    if isinstance(formula, str):
        return formula
    name, *arguments = formula
    begin, *between, end = FUNCTIONS[name]
    parts = [_latex(argument, omit) for argument in arguments]
    inner = parts[0] + "".join(b + p for b, p in zip(between, parts[1:], strict=True))
    return begin + inner + ("" if omit() else end)
