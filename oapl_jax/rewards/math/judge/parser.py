"""Parser of answers: lists, relations, brackets, matrices; no text is evaluated."""

import re

from oapl_jax.rewards.math.judge.answer_ast import Form, Matrix, Named, Parts, Text, Value
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


def parse_answer(text: str, depth: int = MAX_DEPTH) -> Form:
    """Parses a tidied answer; every text has a form.

    Raises:
      ValueError: if brackets are nested too deeply or there are too many parts.
    """
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
    """With the two values of 1 ± 2 in the place of their pair."""
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
    """Without blanks and without braces around all of it."""
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
