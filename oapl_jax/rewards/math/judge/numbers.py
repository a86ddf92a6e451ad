"""Plain numbers, and when two numbers are the same answer."""

import re
from fractions import Fraction

NUMBER = re.compile(
    r"[+-]? ?(?:[0-9]{1,40}(?:\.[0-9]{1,40})?|[0-9]{1,3}(?:,[0-9]{3}){1,12}(?:\.[0-9]{1,40})?"
    r"|\.[0-9]{1,40})",
    re.ASCII,
)
# A decimal stands for a value to six places (as in math-verify), and to six digits if it is small.
ABSOLUTE, RELATIVE = Fraction(5, 10**7), Fraction(2, 10**6)


def number(text: str) -> Fraction | None:
    """The value of digits with an optional sign, thousands separators and decimals; else None."""
    if not NUMBER.fullmatch(text):
        return None
    return Fraction(text.replace(",", "").replace(" ", ""))


def agree(answer: Fraction, reference: Fraction, *, decimal: bool) -> bool:
    """Whether two numbers are the same answer; `decimal` if one was written as a decimal."""
    if answer == reference:
        return True
    difference, size = abs(answer - reference), max(abs(answer), abs(reference))
    return decimal and difference <= ABSOLUTE and difference <= RELATIVE * size
