"""Syntax trees of answers, and their equality.

Values stand in sets, tuples, intervals and matrices, with names and units. Two forms are compared
part by part; values without parts are left to `same_value`.
"""

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Text:
    text: str


@dataclass(frozen=True)
class Value:
    """Mathematics without parts; `unit` follows a number, or is ""; `sides` are those of an
    equation, or ()."""

    text: str
    unit: str = ""
    percent: bool = False
    sides: tuple[str, ...] = ()


@dataclass(frozen=True)
class Named:
    """`name = form`, with the `steps` between them, as in x = 6/2 = 3."""

    name: str
    form: "Form"
    steps: tuple["Form", ...]
    text: str


@dataclass(frozen=True)
class Parts:
    r"""Parts in brackets; "" on both sides for a bare list, "\cup" for a union, ":" for a ratio."""

    left: str
    right: str
    parts: tuple["Form", ...]
    text: str


@dataclass(frozen=True)
class Matrix:
    rows: tuple[tuple["Form", ...], ...]
    text: str


Form = Text | Value | Named | Parts | Matrix
SameValue = Callable[[str, str], bool]


def same_answer(answer: Form, reference: Form, same_value: SameValue) -> bool:
    """Whether an answer has the same meaning as the reference."""
    again = lambda a, r: same_answer(a, r, same_value)
    match answer, reference:
        case Text(), Text():
            return answer.text == reference.text
        case Named(), Named():
            if answer.name == reference.name:
                return all(again(a, reference.form) for a in (*answer.steps, answer.form))
            return same_value(answer.text, reference.text)
        case Named(), Value() if reference.sides:
            return same_value(answer.text, reference.text)
        case Named(), _:
            return all(again(a, reference) for a in (*answer.steps, answer.form))
        case Value(), Named() if answer.sides:
            return same_value(answer.text, reference.text)
        case _, Named():
            return again(answer, reference.form)
        case Value(), Value():
            return _same_values(answer, reference, same_value)
        case Parts(), Parts():
            if ":" in (answer.left, reference.left):
                return _same_ratios(answer, reference, same_value)
            return _same_parts(answer, reference, again)
        case Matrix(), Matrix():
            return len(answer.rows) == len(reference.rows) and all(
                len(a) == len(r) and all(map(again, a, r))
                for a, r in zip(answer.rows, reference.rows, strict=True)
            )
        case (Matrix(), Parts(left="(")) | (Parts(left="("), Matrix()):
            a, r = _vector(answer), _vector(reference)
            return len(a) == len(r) and all(map(again, a, r))
        case Value(), Text():
            return answer.text.upper() == reference.text
        case (Text(), _) | (_, Text()):
            return False
        case Parts(left=":", parts=(a, b)), Value():
            return same_value(rf"\frac{{{a.text}}}{{{b.text}}}", reference.text)
        case Value(), Parts(left=":", parts=(a, b)):
            return same_value(answer.text, rf"\frac{{{a.text}}}{{{b.text}}}")
        case Parts(left=""), _:
            return False
        case _, Parts(left=""):
            return False
    return same_value(answer.text, reference.text)


def _same_values(answer: Value, reference: Value, same_value: SameValue) -> bool:
    a, r = answer.text, reference.text
    if answer.unit and reference.unit and answer.unit != reference.unit:
        return False
    if answer.sides and not reference.sides:  # 2 + 3 = 5: every side must be the answer
        return all(same_value(side, r) for side in answer.sides)
    if same_value(a, r):
        return True
    # A percent sign is a unit that may be left out, and it is a factor.
    if answer.percent != reference.percent:
        hundredth = lambda value: rf"\frac{{{value.text}}}{{100}}" if value.percent else value.text
        return same_value(hundredth(answer), hundredth(reference))
    # So is a degree sign.
    if "°" in (answer.unit, reference.unit) and answer.unit != reference.unit:
        radians = lambda v: rf"\frac{{({v.text}) \pi}}{{180}}" if v.unit == "°" else v.text
        return same_value(radians(answer), radians(reference))
    return False


def _same_parts(answer: Parts, reference: Parts, again: Callable[[Form, Form], bool]) -> bool:
    a, r = list(answer.parts), list(reference.parts)
    kinds = {parts.left + parts.right for parts in (answer, reference)}
    bare = "" in kinds
    if len(kinds - {""}) > 1 or len(a) != len(r):
        return False
    if bare and not kinds <= {"", "()", r"\{\}"}:
        return False  # [1, 2] is no list of 1 and 2
    # x = 1, y = 2 gives 1, 2 an order; x_1 = 1, x_2 = 2 gives none.
    letters = lambda parts: {p.name.split("_")[0] for p in parts if isinstance(p, Named)}
    named = [len(letters(parts)) > 1 for parts in (a, r)]
    ordered = not kinds <= {"", r"\{\}", r"\cup\cup"} or named[0] != named[1]
    if ordered:
        return all(map(again, a, r))
    for part in r:
        found = next((i for i, other in enumerate(a) if again(other, part)), None)
        if found is None:
            return False
        a.pop(found)
    return True


def _same_ratios(answer: Parts, reference: Parts, same_value: SameValue) -> bool:
    """Whether a : b : c and r : s : t are proportional."""
    a, r = ([part.text for part in parts.parts] for parts in (answer, reference))
    if answer.left != reference.left or len(a) != len(r):
        return False
    zeros = [[same_value(x, "0") for x in parts] for parts in (a, r)]
    if zeros[0] != zeros[1] or all(zeros[1]):
        return zeros[0] == zeros[1]
    first = zeros[1].index(False)
    over = lambda parts, i: rf"\frac{{{parts[i]}}}{{{parts[first]}}}"
    return all(same_value(over(a, i), over(r, i)) for i in range(len(a)))


def _vector(form: Form) -> tuple[Form, ...]:
    """Entries of a tuple, or of a matrix with one row or one column."""
    if isinstance(form, Parts):
        return form.parts
    if not isinstance(form, Matrix):
        return ()
    if len(form.rows) == 1:
        return form.rows[0]
    return tuple(row[0] for row in form.rows) if all(len(r) == 1 for r in form.rows) else ()
