"""Answers: syntax trees, their parser and their equality; no text is evaluated.

Values stand in lists, sets, tuples, intervals and matrices, with names and units. Two forms are
compared part by part; values without parts are compared by sympy_equal.py.
"""

import re
from typing import NamedTuple

from oapl_jax.rewards.math.judge.sympy_equal import same_value
from oapl_jax.rewards.math.judge.text_answers import TEXT, name, split_unit, text_answer

MAX_DEPTH = 40  # of brackets
MAX_PARTS = 200
OPEN = {"(", "[", "{", r"\{", r"\begin"}
CLOSE = {")", "]", "}", r"\}", r"\end"}
TOKEN = re.compile(r"\\(?:[A-Za-z]+|.)|.", re.DOTALL)
BETWEEN = re.compile(r"\\text\s*\{\s*,?\s*(?:and|or)\s*\}|(?<![A-Za-z\\])(?:and|or)(?![A-Za-z])")
HAS_PARTS = re.compile(rf"^\s*(?:\d|\\dollar)|,|{BETWEEN.pattern}")  # text that is no word
OR = re.compile(r"(?<![A-Za-z\\])or(?![A-Za-z])")
OUTWARD = re.compile(r"([\[\]])([^\[\]]+)([\[\]])")
MATRIX = re.compile(r"\\begin\{([pbBv]?matrix|array)\}(?:\{[lcr| ]*\})?(.*)\\end\{\1\}", re.DOTALL)
THOUSANDS = re.compile(r"[+-]?\d{1,3}(?:,\d{3})+(?!\d)")
PLUS_MINUS = re.compile(r"\\(pm|mp)(?![A-Za-z])")
RELATIONS = {"<": "<", ">": ">", r"\le": "<=", r"\ge": ">="}
MIRRORED = str.maketrans("<>", "><")


class Text(NamedTuple):
    text: str


class Value(NamedTuple):
    """Mathematics without parts; `unit` follows a number; `sides` are those of an equation."""

    text: str
    unit: str = ""
    percent: bool = False
    sides: tuple[str, ...] = ()


class Named(NamedTuple):
    """`name = form`, with the `steps` between them, as in x = 6/2 = 3."""

    name: str
    form: "Form"
    steps: tuple["Form", ...]
    text: str


class Parts(NamedTuple):
    r"""Parts in brackets; "" on both sides for a bare list, "\cup" for a union, ":" for a ratio."""

    left: str
    right: str
    parts: tuple["Form", ...]
    text: str


class Matrix(NamedTuple):
    rows: tuple[tuple["Form", ...], ...]
    text: str


Form = Text | Value | Named | Parts | Matrix


def parse_answer(text: str, depth: int = MAX_DEPTH) -> Form:
    """Parses a tidied answer; ValueError if it has too many parts or nests too deeply."""
    if not depth:
        raise ValueError("nested too deeply")
    text = _bare(text)
    if ends := OUTWARD.fullmatch(text):  # ]0, 1] is (0, 1]
        text = {"]": "(", "[": "["}[ends[1]] + ends[2] + {"[": ")", "]": "]"}[ends[3]]
    if (inner := TEXT.fullmatch(text)) and HAS_PARTS.search(inner[1]):
        return parse_answer(inner[1], depth - 1)
    if not BETWEEN.search(text) and (said := text_answer(text)):
        return Text(said)
    if (matrix := MATRIX.fullmatch(text)) and matrix[1] != "vmatrix":
        rows = [row for row in re.split(r"\\\\(?:\[[^]]*\])?|\\cr", matrix[2]) if row.strip()]
        return Matrix(tuple(_all(split(row, "&"), depth) for row in rows), text)
    if form := _list(text, depth) or _relation(text, depth):
        return form
    if len(parts := split(text, r"\cup")) > 1:
        return Parts(r"\cup", r"\cup", _all(parts, depth), text)
    tokens = TOKEN.findall(text)
    if tokens and tokens[0] in OPEN - {"{", r"\begin"} and _closes(tokens) == len(tokens) - 1:
        inside = "".join(tokens[1:-1])
        builder = split(inside, r"\mid", "|", ":")
        if tokens[0] == r"\{" and len(builder) == 2 and name(builder[0]):  # {x | x > 0}
            return parse_answer(builder[1], depth - 1)
        parts = split(inside, ",", ";")
        if len(parts) > 1 or tokens[0] == r"\{":
            return Parts(tokens[0], tokens[-1], _flat(_all(parts, depth)), text)
    if PLUS_MINUS.search(text):
        upper, lower = (
            PLUS_MINUS.sub(lambda m, plus=plus: "+" if m[1] == plus else "-", text)
            for plus in ("pm", "mp")
        )
        return Parts("", "", _all([upper, lower], depth), text)
    if len(parts := split(text, ":")) > 1:
        return Parts(":", ":", _all(parts, depth), text)
    return Value(*split_unit(text))


def split(text: str, *separators: str) -> list[str]:
    """The parts of a text between separators that stand in no brackets or environments."""
    parts, level, last = [""], 0, ""
    for token in TOKEN.findall(text):
        level += (token in OPEN) - (token in CLOSE)
        if token in separators and not level and not (token == "=" and last in "<>!" and last):
            parts.append("")
        else:
            parts[-1] += token
        last = token
    if len(parts) > MAX_PARTS:
        raise ValueError("too many parts")
    return parts


def _all(texts: list[str], depth: int) -> tuple[Form, ...]:
    return tuple(parse_answer(text, depth - 1) for text in texts if text.strip())


def _flat(forms: tuple[Form, ...]) -> tuple[Form, ...]:
    """Replaces a pair such as 1 ± 2 by its two values."""
    pairs = (f.parts if isinstance(f, Parts) and not f.left else (f,) for f in forms)
    return tuple(form for pair in pairs for form in pair)


def _list(text: str, depth: int) -> Form | None:
    """A list without brackets: by commas, semicolons, "and" and "or"; None for no list."""
    either = OR.search(text)
    text = BETWEEN.sub(",", text)
    if (number := THOUSANDS.match(text)) and len(split(text[number.end() :], ",", ";")) == 1:
        return parse_answer(text[: number.end()].replace(",", "") + text[number.end() :], depth - 1)
    parts = [part for part in split(text, ",", ";") if part.strip()]
    if len(parts) > 1:
        forms = _flat(_all(parts, depth))
        first, inner = forms[0], [f.form for f in forms if isinstance(f, Named)]
        one_name = len({f.name for f in forms if isinstance(f, Named)}) == 1
        if either and one_name and len(inner) == len(forms):
            if all(isinstance(form, Parts) for form in inner):  # x < 1 or x > 2
                return Parts(r"\cup", r"\cup", tuple(inner), text)
        elif isinstance(first, Named) and len(inner) == 1:  # x = 2, 3
            forms = (first, *(Named(first.name, f, (), f.text) for f in forms[1:]))
        return Parts("", "", forms, text)
    return None


def _relation(text: str, depth: int) -> Form | None:
    r"""An equation with a name, or an inequality as its interval; None for neither."""
    sides = split(text, r"\approx")
    if len(sides) == 2 and "=" not in sides[1]:  # the exact side counts
        return parse_answer(sides[0] if sides[0].strip() else sides[1], depth - 1)
    sides = split(text, "=")
    if len(sides) > 1:
        if not (found := name(sides[0])) or not all(side.strip() for side in sides):
            return Value(text, sides=tuple(sides))
        forms = _all(sides[1:], depth)
        return Named(found, forms[-1], forms[:-1], text)
    sides = split(text, r"\in")
    if len(sides) == 2 and (found := name(sides[0])):
        return Named(found, parse_answer(sides[1], depth - 1), (), text)
    sides = split(text, *RELATIONS)
    signs = [RELATIONS[token] for token in TOKEN.findall(text) if token in RELATIONS]
    if len(sides) != len(signs) + 1:
        return None
    if len(sides) == 2 and (found := name(sides[0])):  # x < 2
        sides, signs = [sides[1], sides[0]], [signs[0].translate(MIRRORED)]
    if len(sides) == 2 and (found := name(sides[1])):  # 2 > x
        above = "<" in signs[0]
        sides = [sides[0], sides[1], r"\infty"] if above else [r"-\infty", sides[1], sides[0]]
        signs = [signs[0], "<"] if above else ["<", signs[0].translate(MIRRORED)]
    elif len(sides) == 3 and (found := name(sides[1])) and signs[0][0] == signs[1][0]:
        if ">" in signs[0]:
            sides, signs = sides[::-1], [sign.translate(MIRRORED) for sign in signs[::-1]]
    else:
        return None
    left, right = "[" if "=" in signs[0] else "(", "]" if "=" in signs[1] else ")"
    return Named(found, Parts(left, right, _all([sides[0], sides[2]], depth), text), (), text)


def _bare(text: str) -> str:
    """Strips white space and the braces that enclose the entire text."""
    text = text.strip()
    while text.startswith("{") and _closes(TOKEN.findall(text)) == len(TOKEN.findall(text)) - 1:
        text = text[1:-1].strip()
    return text


def _closes(tokens: list[str]) -> int:
    """Index of the bracket that closes the first, of whatever kind, as in [1, 2); -1 for none."""
    level = 0
    for i, token in enumerate(tokens):
        level += (token in OPEN) - (token in CLOSE)
        if not level:
            return i
    return -1


def same_answer(answer: Form, reference: Form) -> bool:
    match answer, reference:
        case Text(), Text():
            return answer.text == reference.text
        case Named(), Named() if answer.name == reference.name:
            return all(same_answer(a, reference.form) for a in (*answer.steps, answer.form))
        case (Named(), Named() | Value(sides=(_, *_))) | (Value(sides=(_, *_)), Named()):
            return same_value(answer.text, reference.text)
        case Named(), _:
            return all(same_answer(a, reference) for a in (*answer.steps, answer.form))
        case _, Named():
            return same_answer(answer, reference.form)
        case Value(), Value():
            return _same_values(answer, reference)
        case Parts(), Parts():
            if ":" in (answer.left, reference.left):
                return _same_ratios(answer, reference)
            return _same_parts(answer, reference)
        case Matrix(), Matrix():
            return len(answer.rows) == len(reference.rows) and all(
                len(a) == len(r) and all(map(same_answer, a, r))
                for a, r in zip(answer.rows, reference.rows, strict=True)
            )
        case (Matrix(), Parts(left="(")) | (Parts(left="("), Matrix()):
            a, r = _vector(answer), _vector(reference)
            return len(a) == len(r) and all(map(same_answer, a, r))
        case Value(), Text():
            return answer.text.upper() == reference.text
        case (Text(), _) | (_, Text()):
            return False
        case Parts(left=":", parts=(a, b)), Value():
            return same_value(rf"\frac{{{a.text}}}{{{b.text}}}", reference.text)
        case Value(), Parts(left=":", parts=(a, b)):
            return same_value(answer.text, rf"\frac{{{a.text}}}{{{b.text}}}")
        case (Parts(left=""), _) | (_, Parts(left="")):
            return False
    return same_value(answer.text, reference.text)


def _same_values(answer: Value, reference: Value) -> bool:
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


def _same_parts(answer: Parts, reference: Parts) -> bool:
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
        return all(map(same_answer, a, r))
    for part in r:
        found = next((i for i, other in enumerate(a) if same_answer(other, part)), None)
        if found is None:
            return False
        a.pop(found)
    return True


def _same_ratios(answer: Parts, reference: Parts) -> bool:
    """True if a : b : c and r : s : t are proportional."""
    a, r = ([part.text for part in parts.parts] for parts in (answer, reference))
    if answer.left != reference.left or len(a) != len(r):
        return False
    zeros = [[same_value(x, "0") for x in parts] for parts in (a, r)]
    if zeros[0] != zeros[1] or all(zeros[1]):
        return zeros[0] == zeros[1]
    first = zeros[1].index(False)
    over = lambda parts, i: rf"\frac{{{parts[i]}}}{{{parts[first]}}}"
    return all(same_value(over(a, i), over(r, i)) for i in range(len(a)))


def _vector(form: Matrix | Parts) -> tuple[Form, ...]:
    """Entries of a tuple, or of a matrix with one row or one column."""
    rows = form.rows if isinstance(form, Matrix) else (form.parts,)
    if len(rows) == 1:
        return rows[0]
    return tuple(row[0] for row in rows) if all(len(row) == 1 for row in rows) else ()
