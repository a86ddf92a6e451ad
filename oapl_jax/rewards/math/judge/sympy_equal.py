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
REWRITES = tuple(
    (re.compile(pattern), by)
    for pattern, by in (
        (r"\\text\s*\{\s*([A-Za-z])\s*\}", r" \1 "),
        (r"(?<![A-Za-z0-9])sqrt\s*\(([^()]*)\)", r"\\sqrt{\1}"),
        (r"\\infinity", r"\\infty"),
        (r"\\lg(?![A-Za-z])", r"\\log"),
        (r"(\d+|[A-Za-z])!(?=\s*\^)", r"(\1!)"),
        (r"(?<=\d)[eE]([+-]?\d+)(?![\d.])", r" \\cdot 10^{\1}"),
        # One character without braces is an argument, too.
        (r"\\frac\s*(\d)\s*(\d)", r"\\frac{\1}{\2}"),
        (r"\\frac\s*([A-Za-z\d])\s*(?=\{)", r"\\frac{\1}"),
        (r"(\\frac\s*\{[^{}]*\})\s*([A-Za-z\d])", r"\1{\2}"),
        (r"\\sqrt\s*([A-Za-z\d])", r"\\sqrt{\1}"),
        (r"\\sqrt\s*(\\pi)", r"\\sqrt{\1}"),
        (r"\^\s*([+-]\s*\d+)", r"^{\1}"),
        (r"\^\s*\(([^()]*)\)", r"^{(\1)}"),
        (r"(\d+(?:\.\d+)?)\s*\^\\circ", r"(\1 \\cdot \\pi / 180)"),
        # 2 1/2 and 2\frac{1}{2} are sums; a sign in front holds for both.
        (r"(?<![\d.}^_])(\d+)\s*\\frac\s*\{(\d+)\}\s*\{(\d+)\}", r"(\1+\\frac{\2}{\3})"),
        (r"(?<![\d.}^_/])(\d+) (\d+)/(\d+)(?![\d.])", r"(\1+\\frac{\2}{\3})"),
    )
)  # fmt: skip
# The only text that sympy may turn into code: its own arithmetic of exponents.
GENERATED = re.compile(
    r"def monomial_[a-z]+\([ABk, ]+\):\n"
    r"(?:[\s(),=+*<>:-]|\b(?:[ABk]|[abr][0-9]+|0|if|else|return|None)\b)+"
)
REPEATING = re.compile(r"(\d*)\.(\d*)(?:\\(?:overline|bar|dot)\s*\{?(\d+)\}?|\((\d+)\))")
BASED = re.compile(r"([0-9A-F]+)_\{?(?:\\text\{)?(\d{1,2}|[a-z]+)\}{0,2}")


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


def same_value(answer: str, reference: str) -> bool:
    """True if two expressions or equations are equal; Unreadable for a bad reference."""
    if answer.replace(" ", "") == reference.replace(" ", ""):
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
    verdict = _compare_numerically(found, expected, decimal="." in answer + reference)
    if verdict is None:
        return verify([expected], [found], timeout_seconds=None, raise_on_error=True)
    return verdict


@functools.lru_cache(maxsize=256)  # the responses to one prompt share its reference
def _parse_latex(text: str) -> Any:
    text = REPEATING.sub(_repeating, text)
    text = FUNCTION.sub(r"\\\1 ", text)
    for pattern, by in REWRITES:
        text = pattern.sub(by, text)
    try:
        found = _Reader(is_real=True, config=READING).parse(text)
    except MemoryError:
        raise
    except Exception as error:  # the grammar raises Exception itself
        raise Unreadable(text[:80]) from error
    if not isinstance(found, sympy.Basic | sympy.MatrixBase):
        raise Unreadable(text[:80])
    counts = found.has(sympy.Sum, sympy.Product, sympy.Integral)  # i may count there
    return found if counts else found.xreplace({sympy.Symbol("i", real=True): sympy.I})


def _compare_numerically(found: Any, expected: Any, *, decimal: bool) -> bool | None:
    """Equality of two expressions as far as numbers decide it; None if they don't."""
    if isinstance(found, sympy.Eq) and isinstance(expected, sympy.Eq):
        return _same_equations(found, expected) or None
    if not (isinstance(found, sympy.Expr) and isinstance(expected, sympy.Expr)):
        return None
    symbols = sorted(found.free_symbols | expected.free_symbols, key=str)
    rng = random.Random(0)
    at: dict[Any, Any] = {symbol: sympy.Rational(rng.randint(100, 999), 409) for symbol in symbols}
    a, r = (side.subs({s: at[s] for s in side.free_symbols}).doit() for side in (found, expected))
    if a.is_Rational and r.is_Rational:
        right = agree(_fraction(a), _fraction(r), decimal=decimal)
        return right if not symbols or not right else None
    sizes = [abs(side.evalf(15)) for side in (a, r)]
    if not all(size.is_number and size.is_comparable and size.is_finite for size in sizes):
        return None
    size = max(sizes)
    digits = DIGITS + max(0, min(MAX_DIGITS, int(sympy.log(size + 1, 10).evalf(5))))
    a, r = a.evalf(digits), r.evalf(digits)
    difference = abs(a - r)
    if decimal and not symbols and a.is_real and r.is_real:
        return agree(_fraction(a), _fraction(r), decimal=True)
    if difference > DIFFERENT * size:
        return False if size > EQUAL else None
    return True if not symbols and difference < EQUAL * min(size, 1) else None


def _same_equations(found: Any, expected: Any) -> bool:
    """True if one equation is a multiple of the other, as x + y = 2 and 2x + 2y = 4 are."""
    sides = (found.lhs, found.rhs, expected.lhs, expected.rhs)
    if not all(isinstance(side, sympy.Expr) for side in sides):  # a set
        return False
    ratio = sympy.cancel((found.lhs - found.rhs) / (expected.lhs - expected.rhs))
    return bool(ratio.is_number and ratio.is_finite and ratio.is_zero is False)


def _fraction(value: sympy.Expr) -> Fraction:
    exact = value if value.is_Rational else sympy.Rational(str(value))
    return Fraction(int(exact.p), int(exact.q))  # type: ignore[attr-defined]


def _repeating(match: re.Match) -> str:
    r"""0.1\overline{6} or 0.1(6) as a fraction."""
    whole, head, tail = match[1], match[2], match[3] or match[4]
    value = int((whole or "0") + head + tail) - int((whole or "0") + head)
    return rf"\frac{{{value}}}{{{(10 ** len(tail) - 1) * 10 ** len(head)}}}"
