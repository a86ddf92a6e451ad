"""Answers: syntax trees, their parser and their equality; no text is evaluated.

Values stand in lists, sets, tuples, intervals and matrices, with names and units. Two forms are
compared part by part; values without parts are compared by sympy_equal.py.
"""

import re
from math import gcd
from typing import NamedTuple

from oapl_jax.rewards.math.judge.sympy_equal import (
    Unreadable,
    count_unknowns,
    is_constant,
    is_rounding,
    same_relation,
    same_value,
)
from oapl_jax.rewards.math.judge.text_answers import (
    HUNDREDTHS,
    REALS,
    Clock,
    clock,
    name,
    quantity,
    split_unit,
    text_answer,
)

MAX_DEPTH = 40  # of brackets
MAX_PARTS = 200
OPEN = {"(", "[", "{", r"\{", r"\begin"}
CLOSE = {")", "]", "}", r"\}", r"\end"}
TOKEN = re.compile(r"\\(?:[A-Za-z]+|.)|.", re.DOTALL)
BETWEEN = re.compile(r"\\text\s*\{\s*,?\s*(?:and|or)\s*\}|(?<![A-Za-z\\])(?:and|or)(?![A-Za-z])")
# Text that is no word.
HAS_PARTS = re.compile(rf"^[\s(+-]*(?:\.?\d|\\dollar)|[,\\=^]|{BETWEEN.pattern}")
STYLED = re.compile(r"\\text\s*(\{.*\})", re.DOTALL)
OR = re.compile(r"(?<![A-Za-z\\])or(?![A-Za-z])")
OUTWARD = re.compile(r"([\[\]])([^\[\]]+)([\[\]])")
MATRIX = re.compile(
    r"\\begin\{([pbBv]?matrix|array)\}(?:\{[lcr| ]*\})?((?:(?!\\end).)*)\\end\{\1\}", re.DOTALL
)
SYSTEM = re.compile(r"\\begin\{(cases|aligned|gathered)\}((?:&=|[^&])*)\\end\{\1\}", re.DOTALL)
THOUSANDS = re.compile(r"(?<![\d.,])\d{1,3}(?:,\d{3})+(?!\d|,\d)")
PLUS_MINUS = re.compile(r"\\(pm|mp)(?![A-Za-z])")
# Between a unit and the next number, as in "3 hours 20 minutes".
MEASURES = re.compile(r"(?<=[\d ])(?:(\\text\s*\{[^{}\d]+\}|(?<= )[A-Za-z]{1,}\.?)\s*)(?=\d)")
LETTERS = re.compile(r"[a-z](?: ?[a-z]){2,}")
BRACKETS = {"(": 1, "[": 1, r"\{": 1, ")": -1, "]": -1, r"\}": -1}
RELATIONS = {"<": "<", ">": ">", r"\le": "<=", r"\ge": ">="}
# Relations whose sides are compared one by one.
SYMBOLIC = {
    r"\subset", r"\subseteq", r"\supset", r"\supseteq", r"\mid", r"\nmid", r"\parallel", r"\perp",
    r"\cong", r"\sim", r"\to", r"\mapsto", r"\implies", r"\iff", r"\notin", r"\propto",
}  # fmt: skip
MIRROR = {r"\supset": r"\subset", r"\supseteq": r"\subseteq"}
SYMMETRIC = {r"\parallel", r"\perp", r"\cong", r"\sim", r"\iff"}
CONSTANTS = {r"\pi", "e"}
SIGNS = RELATIONS | {"=": "=", r"\neq": "!="}
MIRRORED = str.maketrans("<>", "><")


class Text(NamedTuple):
    text: str
    letters: bool = False  # bare small letters, which may be a product


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


class Rounded(NamedTuple):
    r"""An exact value and its decimal, as in \sqrt{2} \approx 1.41."""

    exact: "Form"
    decimal: "Form"
    text: str


class Matrix(NamedTuple):
    rows: tuple[tuple["Form", ...], ...]
    text: str


Form = Text | Value | Named | Parts | Rounded | Matrix | Clock


def parse_answer(text: str, depth: int = MAX_DEPTH) -> Form:
    """Parses a tidied answer; ValueError if it has too many parts or nests too deeply."""
    if not depth:
        raise ValueError("nested too deeply")
    text = _join_thousands(_bare(text))
    if ends := OUTWARD.fullmatch(text):  # ]0, 1] is (0, 1]
        text = {"]": "(", "[": "["}[ends[1]] + ends[2] + {"[": ")", "]": "]"}[ends[3]]
    if (inner := _styled(text)) and HAS_PARTS.search(inner):
        return parse_answer(inner, depth - 1)
    if system := SYSTEM.fullmatch(text):
        return parse_answer(re.sub(r"\\\\|\\cr", ", ", system[2].replace("&=", "=")), depth - 1)
    if time := clock(text):
        return time
    if not BETWEEN.search(text) and (said := text_answer(text)):
        if said in REALS:
            return Value(r"\mathbb{R}")
        return Text(said, letters=bool(LETTERS.fullmatch(text)))
    if (matrix := MATRIX.fullmatch(text)) and matrix[1] != "vmatrix":
        rows = [row for row in re.split(r"\\\\(?:\[[^]]*\])?|\\cr", matrix[2]) if row.strip()]
        return Matrix(tuple(_all(split(row, "&"), depth) for row in rows), text)
    if form := _list(text, depth) or _relation(text, depth):
        return form
    if len(parts := split(text, r"\cup")) > 1:
        return Parts(r"\cup", r"\cup", _all(parts, depth), text)
    if len(parts := split(text, r"\cap")) > 1 and all(map(name, parts)):
        return Parts(r"\cap", r"\cap", _all(parts, depth), text)
    tokens = TOKEN.findall(text)
    if tokens and tokens[0] in OPEN - {"{", r"\begin"} and _closes(tokens) == len(tokens) - 1:
        inside = _join_thousands("".join(tokens[1:-1]), in_brackets=True)
        builder = split(inside, r"\mid", "|", ":")
        if tokens[0] == r"\{" and len(builder) == 2 and name(builder[0]):  # {x | x > 0}
            return parse_answer(builder[1], depth - 1)
        parts = split(inside, ",", ";")
        if len(parts) > 1 or tokens[0] == r"\{":
            return Parts(tokens[0], tokens[-1], _flat(_all(parts, depth)), text)
        if tokens[0] == "(" and tokens[-1] == ")":
            return parse_answer(inside, depth - 1)
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


def _join_thousands(text: str, *, in_brackets: bool = False) -> str:
    """Drops the commas of 12,345 outside of round and square brackets and sets.

    In brackets (100,200) is a pair, but no part of one begins with 0, as in (1,000), and a comma
    without a blank is none between parts if others have one, as in (1,000, 2,000).
    """
    joins = not in_brackets or ", " in text or ";" in text
    parts, level = [""], 0
    for token in TOKEN.findall(text):
        if token in BRACKETS:
            level += BRACKETS[token]
            parts.append("")
        parts[-1] += token.replace(",", "\0") if level else token
    number = lambda m: m[0].replace(",", "") if joins or ",0" in m[0] else m[0]
    return "".join(THOUSANDS.sub(number, part) for part in parts).replace("\0", ",")


def _styled(text: str) -> str | None:
    r"""The content of \text{...} around all of a text."""
    if not (found := STYLED.fullmatch(text)):
        return None
    tokens = TOKEN.findall(found[1])
    return found[1][1:-1] if _closes(tokens) == len(tokens) - 1 else None


def _list(text: str, depth: int) -> Form | None:
    """A list without brackets: by commas, semicolons, "and" and "or"; None for no list."""
    either = OR.search(text)
    text = BETWEEN.sub(",", text)
    if text[:1].isdigit():
        text = MEASURES.sub(r"\1,", text)
    groups = [part for part in split(text, ";") if part.strip()]
    if len(groups) > 1 and any(len(split(group, ",")) > 1 for group in groups):
        return Parts("", "", tuple(_tuple(_all(split(g, ","), depth), g) for g in groups), text)
    parts = [part for part in split(text, ",", ";") if part.strip()]
    if len(parts) > 1:
        forms = _flat(_all(parts, depth))
        first, inner = forms[0], [f.form for f in forms if isinstance(f, Named)]
        names = [f.name for f in forms if isinstance(f, Named)]
        period = len(set(names))
        if either and period == 1 and len(inner) == len(forms):
            if all(isinstance(form, Parts) for form in inner):  # x < 1 or x > 2
                return Parts(r"\cup", r"\cup", tuple(inner), r"\cup".join(f.text for f in inner))
        elif isinstance(first, Named) and len(inner) == 1:  # x = 2, 3
            if r"\neq" in first.text:
                texts = [rf"{first.name} \neq {form.text}" for form in forms[1:]]
                forms = (first, *_all(texts, depth))
            else:
                forms = (first, *(Named(first.name, f, (), f.text) for f in forms[1:]))
        elif 1 < period < len(forms) and names == names[:period] * (len(forms) // period):
            rows = [forms[i : i + period] for i in range(0, len(forms), period)]  # p, q, p, q
            forms = tuple(_tuple(row, text) for row in rows)
        return Parts("", "", forms, text)
    return None


def _tuple(forms: tuple[Form, ...], text: str) -> Form:
    return forms[0] if len(forms) == 1 else Parts("(", ")", _flat(forms), text)


def _relation(text: str, depth: int) -> Form | None:
    r"""An equation with a name, or an inequality as its interval; None for neither."""
    exact, *rounded = split(text, r"\approx")
    if rounded and "=" not in rounded[-1]:
        decimal = parse_answer(rounded[-1], depth - 1)
        if not exact.strip():
            return decimal
        if "=" not in exact and exact.strip() not in CONSTANTS and (found := name(exact)):
            return Named(found, decimal, (), f"{exact} = {decimal.text}")  # x \approx 3.14
        form = parse_answer(exact, depth - 1)
        if isinstance(form, Named):
            return form._replace(form=Rounded(form.form, decimal, form.form.text))
        return Rounded(form, decimal, form.text)
    sides = split(text, "=")
    if len(sides) > 1:
        found = name(sides[0]) or quantity(sides[0])
        if not found or not all(side.strip() for side in sides):
            return Value(text, sides=tuple(sides))
        forms = _all(sides[1:], depth)
        names, last = found.split(","), forms[-1]
        is_tuple = sides[0].lstrip().startswith("(")
        if is_tuple and isinstance(last, Parts) and len(names) == len(last.parts):
            each = zip(names, last.parts, strict=True)  # (x, y) = (1, 2)
            parts = tuple(Named(n, f, (), f"{n} = {f.text}") for n, f in each)
            return Parts(last.left, last.right, parts, text)
        return Named(found, forms[-1], forms[:-1], text)
    sides = split(text, r"\neq")
    if len(sides) > 1 and not PLUS_MINUS.search(text):
        if len(sides) == 2 and (found := name(sides[0])):
            return Named(found, Value(rf"\mathbb{{R}} \setminus \{{{sides[1]}\}}"), (), text)
        return Value(text, sides=tuple(sides))
    sides = split(text, r"\in")
    if len(sides) == 2 and (found := name(sides[0])):
        return Named(found, parse_answer(sides[1], depth - 1), (), text)
    sides = split(text, *SYMBOLIC)
    if len(sides) == 2 and all(side.strip() for side in sides):
        sign = next(sign for sign in SYMBOLIC if len(split(text, sign)) == 2)
        if sign in MIRROR:
            sides, sign = sides[::-1], MIRROR[sign]
        return Parts(sign, sign, _all(sides, depth), text)
    sides = split(text, *RELATIONS)
    signs = _signs(text)
    if not 2 <= len(sides) == len(signs) + 1:
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
        return Value(text, sides=tuple(sides))
    left, right = "[" if "=" in signs[0] else "(", "]" if "=" in signs[1] else ")"
    interval = f"{left}{sides[0]}, {sides[2]}{right}"
    return Named(found, Parts(left, right, _all([sides[0], sides[2]], depth), interval), (), text)


def _signs(text: str) -> list[str]:
    return [SIGNS[token] for token in TOKEN.findall(text) if token in SIGNS]


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
            return answer.text == reference.text or _same_product(answer, reference)
        case (Parts() as form, other) | (other, Parts() as form) if _is_symbolic(form) and (
            not isinstance(other, Parts | Named)
        ):
            return False
        case Clock(), Clock():
            return answer.same(reference)
        case Named(), Named() if _same_name(answer.name, reference.name):
            return all(same_answer(a, reference.form) for a in (*answer.steps, answer.form))
        case Named() | Parts(left=""), Value(sides=(_, *_)) if equation := _product(answer):
            return _same_relations(equation, reference.text)
        case Value(sides=(_, *_)), Named() | Parts(left="") if equation := _product(reference):
            # x^2 = 4 is no solution for x.
            several = sum(map(count_unknowns, answer.sides)) > 1
            return several and _same_relations(answer.text, equation)
        case (Named(), Named() | Value(sides=(_, *_))) | (Value(sides=(_, *_)), Named()):
            comparable = _is_relation(answer) and _is_relation(reference)
            signs = _signs(answer.text) and _signs(reference.text)
            if comparable and signs and _same_relations(answer.text, reference.text):
                return True
            return _same_interval(answer, reference)
        case (Named(form=Parts()) as interval, Parts() as other) | (
            Parts() as other,
            Named(form=Parts()) as interval,
        ) if "=" not in _signs(interval.text) and any(isinstance(p, Named) for p in other.parts):
            return False  # 2 < x < 3 is not x = 2, y = 3
        case Named(), _:
            return all(same_answer(a, reference) for a in (*answer.steps, answer.form))
        case _, Named():
            return same_answer(answer, reference.form)
        case Rounded(), Rounded():
            return same_answer(answer.exact, reference.exact)
        case Rounded(), _:
            decimal = _is_rounding(answer) and same_answer(answer.decimal, reference)
            return same_answer(answer.exact, reference) or decimal
        case _, Rounded():
            decimal = _is_rounding(reference) and same_answer(answer, reference.decimal)
            return same_answer(answer, reference.exact) or decimal
        case Clock(), Value() if not answer.minute:  # 6 pm
            return same_value(answer.hour, reference.text)
        case Value(), Clock() if not reference.minute:
            return same_value(answer.text, reference.hour)
        case Clock(), _:
            return answer.is_ratio() and same_answer(_as_ratio(answer), reference)
        case _, Clock():  # a ratio is given in lowest terms, so 2:30 is none
            lowest = reference.is_ratio() and gcd(int(reference.hour), int(reference.minute)) == 1
            return lowest and same_answer(answer, _as_ratio(reference))
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
        case Text(letters=True), Value(unit="", sides=()):  # abc is a product beside a product
            return same_value(" ".join(answer.text), reference.text)
        case Value(unit="", sides=()), Text(letters=True):
            return same_value(answer.text, " ".join(reference.text))
        case Value(), Text():
            return answer.text.upper() == reference.text
        case (Text(), _) | (_, Text()):
            return False
        case (Value(sides=(_, *_)), Parts() | Matrix()) | (
            Parts() | Matrix(),
            Value(sides=(_, *_)),
        ):
            return _same_relations(answer.text, reference.text)
        case Parts(left=":", parts=(a, b)), Value():
            return same_value(rf"\frac{{{a.text}}}{{{b.text}}}", reference.text)
        case Value(), Parts(left=":", parts=(a, b)):
            return same_value(answer.text, rf"\frac{{{a.text}}}{{{b.text}}}")
        case Parts(left=""), Value():  # x = 3 or x = 6/2
            return all(same_answer(part, reference) for part in answer.parts)
        case (Parts(left=""), _) | (_, Parts(left="")):
            return False
    return same_value(answer.text, reference.text)


def _is_symbolic(form: Parts) -> bool:
    """True for relations, and for unions and intersections of names."""
    sets = form.left in (r"\cup", r"\cap") and all(name(part.text) for part in form.parts)
    return form.left in SYMBOLIC or sets


def _same_product(answer: Text, reference: Text) -> bool:
    """True for bca and abc: of two words with the same letters none is in alphabetical order."""
    letters = sorted(reference.text)
    ordered = "".join(letters) in (answer.text, reference.text) and len({*letters}) == len(letters)
    both = answer.letters and reference.letters
    return both and ordered and sorted(answer.text) == letters


def _product(form: Named | Parts) -> str:
    r"""The equation (y - a)(y - b) = 0 for y = \pm a or y = a, y = b; "" for other forms."""
    parts = form.parts if isinstance(form, Parts) else (form,)
    solved = [f for f in parts if isinstance(f, Named) and not f.steps and "=" in _signs(f.text)]
    if len(solved) < len(parts) or len({f.name for f in solved}) > 1:
        return ""
    pairs = [f.form.parts if isinstance(f.form, Parts) else (f.form,) for f in solved]
    values = [value for of_one in pairs for value in of_one]
    if len(values) < 2 or not all(isinstance(v, Value) and not v.sides for v in values):
        return ""
    return "".join(rf"({solved[0].name} - ({value.text}))" for value in values) + " = 0"


def _same_name(answer: str, reference: str) -> bool:
    """True for equal names; y is y(x), but f(x) is not f(t)."""
    if any("'" in name and re.search(r"\([^A-Za-z]", name) for name in (answer, reference)):
        return answer == reference  # y'(0) is no y'
    names = answer, reference
    with_arguments = [name for name in names if "(" in name]
    return answer == reference or (
        len(with_arguments) == 1 and len({name.partition("(")[0] for name in names}) == 1
    )


def _same_values(answer: Value, reference: Value) -> bool:
    a, r = answer.text, reference.text
    if answer.unit and reference.unit and answer.unit != reference.unit:
        units = (answer.unit, reference.unit)
        if not any(
            small in HUNDREDTHS and large in HUNDREDTHS[small]
            for small, large in (units, units[::-1])
        ):
            return False
        in_large = lambda v: rf"\frac{{{v.text}}}{{100}}" if v.unit in HUNDREDTHS else v.text
        return same_value(in_large(answer), in_large(reference))
    if (answer.percent and reference.unit) or (reference.percent and answer.unit):
        return answer.percent == reference.percent and same_value(a, r)  # a percent is a unit
    if answer.sides and reference.sides:
        return _same_relations(a, r)
    if answer.sides:  # 2 + 3 = 5: every side must be the answer
        return all(same_value(side, r) for side in answer.sides)
    if reference.sides:
        return _is_result(a, reference)
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


def _is_result(answer: str, reference: Value) -> bool:
    """True if an answer is the last side of 2^5 = 4 * 8 = 32, and not its first, the question."""
    first, last = reference.sides[0], reference.sides[-1]
    bare = lambda text: re.sub(r"[\s{}]", "", text)
    if set(_signs(reference.text)) != {"="} or bare(answer) == bare(first) != bare(last):
        return False
    return is_constant(first) and is_constant(last) and same_value(answer, last)


def _is_relation(form: Named | Value) -> bool:
    """False for names of sets, matrices and lists, and for x = 1 ± 2."""
    return isinstance(form, Value) or isinstance(form.form, Value) or "=" not in _signs(form.text)


def _same_interval(answer: Form, reference: Form) -> bool:
    """True for -3 < x < 3 and |x| < 3, of one unknown."""
    inside = [f.name for f in (answer, reference) if isinstance(f, Named)]
    texts = [f.form.text if isinstance(f, Named) else f.text for f in (answer, reference)]
    unknowns = set(re.findall(r"(?<![\\A-Za-z])[A-Za-z](?![A-Za-z])", " ".join(texts)))
    return unknowns == {*inside} and _same_relations(*texts)


def _is_rounding(pair: Rounded) -> bool:
    match pair:
        case Rounded(exact=Value(sides=()) as exact, decimal=Value() as decimal):
            return is_rounding(exact.text, decimal.text)
    return False


def _same_relations(answer: str, reference: str) -> bool:
    """True if two equations or inequalities, or chains of them, say the same."""
    found, expected = _links(answer), _links(reference)
    if not _signs(answer) or not _signs(reference):  # a set
        unequal = {"=", "!="}.isdisjoint(_signs(answer) + _signs(reference))
        return unequal and same_value(answer, reference)
    return 0 < len(found) == len(expected) and all(map(same_relation, found, expected))


def _links(text: str) -> list[tuple[str, str, str]]:
    """(left, sign, right) of each link of a chain a < b < c, from small to large, and (a, "=", c)
    of a = b = c; none if it is no chain or b is not c."""
    sides = split(text, *SIGNS)
    signs = _signs(text)
    if len(sides) != len(signs) + 1:
        return []
    if set(signs) == {"="}:
        try:
            steps = all(same_value(side, sides[-1]) for side in sides[1:-1])
        except Unreadable:
            return []
        return [(sides[0], "=", sides[-1])] if steps else []
    links = list(zip(sides, signs, sides[1:], strict=False))
    if not any(">" in sign for sign in signs):
        return links
    return [(b, sign.translate(MIRRORED), a) for a, sign, b in links[::-1]]


def _as_ratio(time: Clock) -> Parts:
    return Parts(":", ":", (Value(time.hour), Value(time.minute)), time.text)


def _same_parts(answer: Parts, reference: Parts) -> bool:
    a, r = list(answer.parts), list(reference.parts)
    kinds = {parts.left + parts.right for parts in (answer, reference)}
    bare = "" in kinds
    if len(kinds - {""}) > 1 or (bare and not kinds <= {"", "()", r"\{\}"}):
        return False  # [1, 2] is no list of 1 and 2
    if answer.left in SYMMETRIC:
        return _same_in_any_order(a, r)
    tuples = all(isinstance(part, Parts) and part.left == "(" for part in r)
    if reference.left == r"\{" or (tuples and kinds == {""}):
        return _covers(a, r) and _covers(r, a)  # a set
    if len(a) != len(r):
        return False
    # x = 1, y = 2 gives 1, 2 an order; x_1 = 1, x_2 = 2 gives none, but in a tuple.
    key = lambda name: name if "()" in kinds else name.split("_")[0]
    letters = lambda parts: {key(p.name) for p in parts if isinstance(p, Named)}
    named = [len(letters(parts)) > 1 for parts in (a, r)]
    if all(named) or (not any(named) and kinds <= {"", r"\{\}", r"\cup\cup", r"\cap\cap"}):
        return _same_in_any_order(a, r)
    if not any(named):
        return all(map(same_answer, a, r))
    # x = 1, y = 2 is the tuple of its names' alphabetical order, or the list of its own order.
    names, values = (answer, reference) if named[0] else (reference, answer)
    as_listed = (names.left, values.left) != ("", "(") and all(map(same_answer, a, r))
    if as_listed or names.left:
        return as_listed
    by_name = lambda parts: sorted(parts, key=lambda part: getattr(part, "name", ""))
    a, r = (by_name(x) if known else x for x, known in zip((a, r), named, strict=True))
    return all(map(same_answer, a, r))


def _covers(forms: list[Form], others: list[Form]) -> bool:
    return all(any(same_answer(form, other) for form in forms) for other in others)


def _same_in_any_order(answer: list[Form], reference: list[Form]) -> bool:
    left = list(answer)
    for part in reference:
        found = next((i for i, other in enumerate(left) if same_answer(other, part)), None)
        if found is None:
            return False
        left.pop(found)
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
