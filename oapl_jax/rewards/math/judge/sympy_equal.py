r"""Equality of two values: exact numbers, a numerical check, then math-verify on LaTeX.

No text is evaluated: LaTeX is read by a grammar (latex2sympy2_extended), never by sympy's
parse_expr or sympify, which call eval; math-verify's reader of plain expressions is not used.
"""

import functools
import random
import re
from fractions import Fraction
from typing import Any

import sympy
import sympy.integrals.manualintegrate  # here, since loading these compiles text of their own
import sympy.physics.units
import sympy.series.formal
from latex2sympy2_extended.latex2sympy2 import ConversionConfig, _Latex2Sympy
from math_verify import verify

from oapl_jax.rewards.math.judge.text_answers import agree, number

DIGITS, MAX_DIGITS = 50, 10_000
EQUAL, DIFFERENT = sympy.Float("1e-40", DIGITS), sympy.Float("1e-9", DIGITS)
READING = ConversionConfig(lowercase_symbols=False)
FUNCTION = re.compile(
    r"(?<![\\A-Za-z])(arcsin|arccos|arctan|sinh|cosh|tanh|sin|cos|tan|cot|sec|csc|log|ln"
    r"|exp|pi|theta|alpha|beta|infinity|infty)(?![a-z])"
)
NAME = r"(?:[A-Za-z](?:_\w|_\{\w+\})?|\\(?:alpha|beta|theta|phi|psi|rho|varphi)(?![a-z]))"
DIFFERENTIAL = r"(?:d|\\partial)\s*(?:\^\s*\{?\s*\d\s*\}?\s*)?"
# y', y'(0), \frac{dy}{dx}, \frac{\partial^2 f}{\partial x \partial y}: each is an unknown
DERIVATIVE = re.compile(
    rf"{NAME}\s*(?:'+|\^\s*\{{?\s*(?:\\prime\s*)+\}}?|\^\s*\{{\(\d\)\}})\s*(?:\([^()]*\))?"
    rf"|\\frac\s*\{{\s*{DIFFERENTIAL}{NAME}\s*(?:\([^()]*\))?\s*\}}"
    rf"\s*\{{\s*(?:{DIFFERENTIAL}{NAME}\s*(?:\^\s*\{{?\s*\d\s*\}}?\s*)?)+\}}"
)
# \angle ABC, P(A | B), 1 + 2 + \dots + n: no products of letters
NAMED = re.compile(
    r"\\(?:angle|triangle|measuredangle|overrightarrow|widehat|square|odot)\s*\{?\s*[A-Z]{2,4}'*\s*\}?"
    r"|(?:(?<![A-Za-z\\])P|\\Pr)\s*\([^()|]*(?:\||\\mid)[^()]*\)|\\dots(?![A-Za-z])"
)
PRIMED = re.compile(rf"(?P<of>{NAME})\s*(?P<order>'+)(?:\(\s*(?P<by>[A-Za-z])\s*\))?")
LEIBNIZ = re.compile(
    rf"\\frac\s*\{{\s*d\s*(?:\^\s*\{{?\s*(?P<order>\d)\s*\}}?\s*)?(?P<of>{NAME})"
    rf"\s*(?:\(\s*[A-Za-z]\s*\))?\s*\}}"
    rf"\s*\{{\s*d\s*(?P<by>{NAME})\s*(?:\^\s*\{{?\s*(?P<times>\d)\s*\}}?\s*)?\}}"
)
REWRITES = tuple(
    (re.compile(pattern), by)
    for pattern, by in (
        (r"\\text\s*\{\s*([A-Za-z])\s*\}", r" \1 "),
        (r"(?<![A-Za-z0-9])sqrt\s*\(([^()]*)\)", r"\\sqrt{\1}"),
        (r"\\infinity", r"\\infty"),
        (r"\\(max|min|gcd|lcm)\s*\\\{([^{}]*)\\\}", r"\\\1(\2)"),
        (r"\\lg(?![A-Za-z])", r"\\log"),
        (r"(\d+|[A-Za-z])!(?=\s*\^)", r"(\1!)"),
        (r"(?<=\d)[eE]([+-]?\d+)(?![\d.])", r" \\cdot 10^{\1}"),
        (r"\^\s*([+-]\s*\d+)", r"^{\1}"),
        (r"\^\s*\(([^()]*)\)", r"^{(\1)}"),
        (r"(\d+(?:\.\d+)?)\s*\^\\circ", r"(\1 \\cdot \\pi / 180)"),
        # 2 1/2 and 2\frac{1}{2} are sums; a sign in front holds for both.
        (r"(?<![\d.}^_])(\d+)\s*\\frac\s*\{(\d+)\}\s*\{(\d+)\}", r"(\1+\\frac{\2}{\3})"),
        (r"(?<![\d.}^_/])(\d+) (\d+)/(\d+)(?![\d.])",
         lambda m: rf"({m[1]}+\frac{{{m[2]}}}{{{m[3]}}})" if int(m[2]) < int(m[3]) else m[0]),
    )
)  # fmt: skip
# The only texts that may turn into code, of names that no answer chooses: sympy's arithmetic of
# exponents, and mpmath's hypergeometric series for the types of its parameters.
GENERATED = re.compile(
    r"def monomial_[a-z]+\([ABk, ]+\):\n"
    r"(?:[\s(),=+*<>:-]|\b(?:[ABk]|[abr][0-9]+|0|if|else|return|None)\b)+"
    r"|def hypsum_\d+_\d+_[ZQRC]*_[ZQRC]*_[RC]\([a-z, _*]+\):\n(?:[\s\[\](),.=+*/<>:-]"
    r"|'(?:maxterms|n|Hypergeometric series converges too slowly. Try increasing maxterms.)'"
    r"|\b(?:\d+|[AB](?:INT|P|Q|REAL|CRE|CIM)_\d+|[SPZ](?:RE|IM)|_mp[qfc]_|__re|__im|re|im|one|magn?"
    r"|MAX|HIGH|LOW|MPZ_ONE|MPZ_ZERO|[xy](?:sign|m|e|bc)|[abnz]|wp|mul|div|coeffs|offset|p_mag"
    r"|magnitude_check|epsshift|prec|kwargs|get|abs|max|xrange|bitcount|from_man_exp|if|elif|else"
    r"|for|in|and|not|break|raise|return|True|False|ZeroDivisionError|NoConvergence)\b)+"
)
# cis x is cos x + i sin x; its argument ends with a bracket, or at a sign.
CIS = re.compile(r"\\cis\s*(\((?:[^()]|\([^()]*\))*\)|(?:\{[^{}]*\}|[^-+=(){},])+)")
BLANK = re.compile(r"(?<!\d) +| +(?!\d)")
DIGITS_APART = re.compile(r"(?<![\d.^_])\d[\d.]*\s+\d")
REPEATING = re.compile(r"(\d*)\.(\d*)(?:\\(?:overline|bar|dot)\s*\{?(\d+)\}?|\((\d+)\))")
BASED = re.compile(r"([0-9A-F]+)_\{?(?:\\text\{)?(\d{1,2}|[a-z]+)\}{0,2}")


SERIES = (sympy.Sum, sympy.Product, sympy.Integral)


ARGUMENTS = {r"\frac": 2, r"\binom": 2, r"\sqrt": 1, "^": 1}
TOKEN = re.compile(r"\s+|\\(?:[A-Za-z]+|.)|.", re.DOTALL)


class Unreadable(Exception):
    """A text that is no LaTeX mathematics."""


class _Reader(_Latex2Sympy):
    """LaTeX reader with exact decimals (its own calls eval on the digits, by sympy.Number) and with
    2(3) as a product (its own takes it for the mixed number 2 + 3)."""

    def parse_number(self, text: str) -> Any:
        value = Fraction(text.replace(",", ""))
        return sympy.Rational(value.numerator, value.denominator)

    def convert_postfix_list(self, arr: list, i: int = 0) -> Any:
        first = self.convert_postfix(arr[i])
        if i + 1 == len(arr):
            return first
        rest = self.convert_postfix_list(arr, i + 1)
        if isinstance(first, list):  # d/dx
            return sympy.Derivative(rest, first[0])
        if isinstance(first, sympy.MatrixBase) or isinstance(rest, sympy.MatrixBase):
            return self.mat_mul_flat(first, rest)
        return self.mul_flat(first, rest)


def with_same_derivatives(answer: str, reference: str) -> tuple[str, str]:
    """Writes dy/dx and y'(x) as y' if one text has primes, the other quotients by one variable."""
    for text, other in ((answer, reference), (reference, answer)):
        quotients = list(LEIBNIZ.finditer(text))
        by = {quotient["by"] for quotient in quotients}
        whole = all(quotient["order"] == quotient["times"] for quotient in quotients)
        if len(by) != 1 or not whole or PRIMED.search(text) or LEIBNIZ.search(other):
            continue
        primed = LEIBNIZ.sub(lambda m: f" {m['of']}" + "'" * int(m["order"] or 1) + " ", text)
        drop = lambda m, by=by: m["of"] + m["order"] if m["by"] in (*by, None) else m[0]
        texts = {text: primed, other: PRIMED.sub(drop, other)}
        return texts[answer], texts[reference]
    return answer, reference


def same_value(answer: str, reference: str) -> bool:
    """True if two expressions are equal; Unreadable for a bad reference."""
    if BLANK.sub("", answer) == BLANK.sub("", reference):
        return True
    a, r = number(answer.strip()), number(reference.strip())
    if a is not None and r is not None:
        return agree(a, r, decimal="." in answer + reference)
    in_base, wanted = BASED.fullmatch(answer), BASED.fullmatch(reference)
    if in_base and wanted:
        return in_base.groups() == wanted.groups()
    if in_base or wanted:  # a base that is left out is the other's
        return (in_base or [0, answer])[1] == (wanted or [0, reference])[1]
    expected = _parse_latex(reference)
    try:
        found = _parse_latex(answer)
    except Unreadable:
        return False
    return _same(found, expected, decimal="." in answer + reference)


def same_relation(answer: tuple[str, str, str], reference: tuple[str, str, str]) -> bool:
    """True if two relations (left, one of = != < <=, right) say the same; Unreadable as above.

    One is a multiple of the other; or, of two equations in several unknowns, each unknown has the
    same real solutions. An equation without unknowns is a statement about its two sides.
    """
    expected = [_parse_latex(side) for side in reference[::2]]
    try:
        found = [_parse_latex(side) for side in answer[::2]]
    except Unreadable:
        return False
    sign = reference[1]
    if sign != answer[1]:
        return False
    unknowns = set().union(*(side.free_symbols for side in expected))
    if unknowns != set().union(*(side.free_symbols for side in found)):
        return False
    if not unknowns or not all(isinstance(side, sympy.Expr) for side in (*found, *expected)):
        decimal = "." in "".join(answer + reference)
        pairs = [found, found[::-1]] if sign in ("=", "!=") else [found]
        same = functools.partial(_same, decimal=decimal)
        return any(all(map(same, pair, expected)) for pair in pairs)
    try:
        differences = [sides[0] - sides[1] for sides in (found, expected)]
        if not all(sympy.expand(difference).free_symbols for difference in differences):
            # x + 1 = x says nothing of x.
            return all(_same(f, e, decimal=False) for f, e in zip(found, expected, strict=True))
        ratio = sympy.cancel(differences[0] / differences[1])
        if ratio.is_number and ratio.is_finite:
            return bool(ratio.is_positive if "<" in sign else ratio.is_zero is False)
        return sign == "=" and len(unknowns) > 1 and _same_solutions(differences, unknowns)
    except MemoryError:
        raise
    except Exception:  # sympy can't do it
        return False


def is_constant(text: str) -> bool:
    """True for an expression without unknowns; Unreadable for no expression."""
    return not _parse_latex(text).free_symbols


def is_rounding(exact: str, decimal: str) -> bool:
    """True for a constant and its value, rounded to the last digit of `decimal`."""
    rounded, value = number(decimal.strip()), _parse_latex(exact)
    if rounded is None or not isinstance(value, sympy.Expr):
        return False
    value = value.evalf(DIGITS)
    if not (value.is_number and value.is_real and value.is_finite):
        return False
    digits = len(decimal.strip().partition(".")[2])
    return abs(_fraction(value) - rounded) < Fraction(1, 2 * 10**digits)


def count_unknowns(text: str) -> int:
    """The number of unknowns of an expression; Unreadable for no expression."""
    return len(_parse_latex(text).free_symbols)


def _same_solutions(differences: list[sympy.Expr], unknowns: set[sympy.Symbol]) -> bool:
    for unknown in unknowns:
        found, expected = (sympy.solve(difference, unknown) for difference in differences)
        if not expected or len(found) != len(expected):
            return False
        if not all(any(_same(f, e, decimal=False) for f in found) for e in expected):
            return False
    return True


def _same(found: Any, expected: Any, *, decimal: bool) -> bool:
    """True if two objects of sympy are equal; what sympy can't compare is not."""
    try:
        verdict = _compare_numerically(found, expected, decimal=decimal)
        if verdict is not None:
            return verdict
        if any(isinstance(side, sympy.Basic) and side.has(*SERIES) for side in (found, expected)):
            found, expected = (_in_closed_form(side) for side in (found, expected))
            if found == expected or found.has(*SERIES) or expected.has(*SERIES):
                return found == expected
        as_sets = dict(allow_set_relation_comp=True)  # |x| < 3 is (-3, 3)
        return verify([expected], [found], timeout_seconds=None, raise_on_error=True, **as_sets)
    except MemoryError:
        raise
    except Exception:
        return False


def _in_closed_form(value: sympy.Basic) -> sympy.Basic:
    """A series or an integral in closed form, or with simplified terms and nameless indices."""
    return sympy.simplify(value.doit()).as_dummy()


@functools.lru_cache(maxsize=256)  # the responses to one prompt share its reference
def _parse_latex(text: str) -> Any:
    text = CIS.sub(r"e^{i \\cdot (\1)}", REPEATING.sub(_repeating, text))
    text = FUNCTION.sub(r"\\\1 ", DERIVATIVE.sub(_unknown, NAMED.sub(_unknown, text)))
    tokens = TOKEN.findall(text)[::-1]
    text = "".join(iter(lambda: _with_braces(tokens), ""))
    for pattern, by in REWRITES:
        text = pattern.sub(by, text)
    if DIGITS_APART.search(text):
        raise Unreadable(text[:80])
    try:
        found: Any = _Reader(is_real=True, config=READING).parse(text)
        if isinstance(found, sympy.MatrixBase):
            return found
        if found.has(*SERIES):  # i may count there
            return found.replace(lambda value: isinstance(value, SERIES), _with_terms)
        found = found.replace(_is_of_unknown, _as_unknown)
        return found.xreplace({sympy.Symbol("i", real=True): sympy.I})
    except MemoryError:
        raise
    except Exception as error:  # the grammar raises Exception itself
        raise Unreadable(text[:80]) from error


def _with_terms(series: Any) -> Any:
    """Makes a_{n-1} a function of the index n of a series."""
    terms, indices = {}, {str(limit[0]) for limit in series.limits}
    for symbol in series.function.free_symbols:
        name, _, index = symbol.name.partition("_")
        if indices & {*re.findall(r"[A-Za-z]+", index)}:
            place = _parse_latex(index.strip("{}")).xreplace(
                {sympy.I: sympy.Symbol("i", real=True)}
            )
            terms[symbol] = sympy.Function(name)(place)
    return series.xreplace(terms)


def _is_of_unknown(value: sympy.Basic) -> bool:
    return isinstance(value, sympy.Derivative) and not (
        set(value.variables) <= value.expr.free_symbols
    )


def _as_unknown(value: sympy.Derivative) -> sympy.Symbol:
    """A derivative of an unknown function, which sympy takes for a constant's."""
    return sympy.Symbol(f"d({value.expr})/d({value.variables})", real=True)


def _compare_numerically(found: Any, expected: Any, *, decimal: bool) -> bool | None:
    """Equality of two expressions as far as numbers decide it; None if they don't."""
    if not (isinstance(found, sympy.Expr) and isinstance(expected, sympy.Expr)):
        return None
    unknowns = sorted(found.free_symbols | expected.free_symbols, key=str)
    series = found.atoms(sympy.Sum, sympy.Product) | expected.atoms(sympy.Sum, sympy.Product)
    bounds = {bound for one in series for limit in one.limits for bound in limit[1:]}
    counts = {symbol for bound in bounds for symbol in bound.free_symbols}
    # A series with x converges near 0, and one to n has an integer there. Complex exponentials
    # agree or differ at any few points.
    decisive = bool(series) or any(side.has(sympy.I) for side in (found, expected))
    scale, rng = (2003 if series else 409), random.Random(0)
    verdicts = set()
    for n in (5, 4, 7) if decisive and unknowns else (5,):
        signed = scale if series or n != 4 else -scale
        at = {s: sympy.Rational(rng.randint(100, 999), signed) for s in unknowns}
        at |= {s: n + 2 * i for i, s in enumerate(sorted(counts, key=str))}
        a, r = (side.subs({s: at[s] for s in side.free_symbols}) for side in (found, expected))
        verdicts.add(_compare_numbers(a.doit(), r.doit(), decimal=decimal and not unknowns))
    if verdicts == {True}:
        return True if decisive or not unknowns else None
    return False if False in verdicts else None


def _compare_numbers(a: Any, r: Any, *, decimal: bool) -> bool | None:
    if any(side.has(sympy.Sum, sympy.Product) for side in (a, r)):
        return None  # evalf would compile their terms
    if a.is_Rational and r.is_Rational:
        return agree(_fraction(a), _fraction(r), decimal=decimal)
    sizes = [abs(side.evalf(15)) for side in (a, r)]
    if not all(size.is_number and size.is_comparable and size.is_finite for size in sizes):
        return None
    size = max(sizes)
    digits = DIGITS + max(0, min(MAX_DIGITS, int(sympy.log(size + 1, 10).evalf(5))))
    a, r = a.evalf(digits), r.evalf(digits)
    difference = abs(a - r)
    if decimal and a.is_real and r.is_real:
        return agree(_fraction(a), _fraction(r), decimal=True)
    if difference > DIFFERENT * size:
        return False if size > EQUAL else None
    return True if difference < EQUAL * min(size, 1) else None


def _fraction(value: sympy.Expr) -> Fraction:
    exact = value if value.is_Rational else sympy.Rational(str(value))
    return Fraction(int(exact.p), int(exact.q))  # type: ignore[attr-defined]


def _with_braces(tokens: list[str]) -> str:
    r"""Takes the last token with its arguments and puts these in braces: \frac\pi2, \sqrt2."""
    token = tokens.pop() if tokens else ""
    if token == "{":
        while tokens and tokens[-1] != "}":
            token += _with_braces(tokens)
        return token + (tokens.pop() if tokens else "")
    if token == r"\sqrt" and tokens and tokens[-1] == "[" and "]" in tokens:
        while not token.endswith("]"):
            token += tokens.pop()
    for _ in range(ARGUMENTS.get(token.partition("[")[0], 0)):
        while tokens and tokens[-1].isspace():
            tokens.pop()
        following = tokens[-1] if tokens else ""
        if re.match(r"\\(?!circ)[A-Za-z]", following) or (token != "^" and following.isalnum()):
            token += "{" + _with_braces(tokens) + "}"
        elif following == "{":
            token += _with_braces(tokens)
    return token


def _unknown(match: re.Match) -> str:
    """A derivative of an unknown function, or a name, as a symbol that spells it in letters."""
    spelled = re.sub(r"\s|[{}]", "", match[0]).replace(r"^\prime", "'").replace(r"\prime", "'")
    spelled = spelled.replace(r"\mid", "|")
    spelled = re.sub(r"\^\((\d)\)", lambda m: "'" * int(m[1]), spelled)
    if spelled.startswith(r"\angle"):  # ABC is CBA
        corners = spelled.removeprefix(r"\angle")
        spelled = r"\angle" + min(corners, corners[::-1])
    return f" D_{{{''.join(chr(97 + int(digit, 16)) for digit in spelled.encode().hex())}}} "


def _repeating(match: re.Match) -> str:
    r"""0.1\overline{6} or 0.1(6) as a fraction."""
    whole, head, tail = match[1], match[2], match[3] or match[4]
    value = int((whole or "0") + head + tail) - int((whole or "0") + head)
    return rf"\frac{{{value}}}{{{(10 ** len(tail) - 1) * 10 ** len(head)}}}"
