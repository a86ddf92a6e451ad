"""Numbers and text in answers: names, units, choices, and words that are no mathematics."""

import re
from fractions import Fraction
from typing import NamedTuple

NUMBER = re.compile(
    r"[+-]? ?(?:[0-9]{1,40}(?:\.[0-9]{1,40})?|[0-9]{1,3}(?:,[0-9]{3}){1,12}(?:\.[0-9]{1,40})?"
    r"|\.[0-9]{1,40})",
    re.ASCII,
)
# A decimal stands for a value to six places (as in math-verify), and to six digits if it is small.
ABSOLUTE, RELATIVE = Fraction(5, 10**7), Fraction(2, 10**6)
TEXT = re.compile(r"\\text\s*\{([^{}]*)\}")
ARTICLE = re.compile(r"^\s*(?:[Aa]n?|[Tt]he)\s+(?=[A-Za-z]{3})")
EMPTY = {
    "nosolution", "nosolutions", "norealsolution", "norealsolutions", "nosolutionexists", "none",
    "nosuchnumbers", "emptyset", "theemptyset", r"\emptyset", r"\{\}",
}  # fmt: skip
# A, (a), B., C) 12: a letter without capitals may be a variable, unless it is in brackets.
CHOICE = re.compile(r"(?i:option|choice)?(?:\(?([A-HJ])(?:[).](?:[\\$A-Za-z0-9].*)?)?|\(([a-h])\))")
REALS = {
    "allrealnumbers", "allreals", "allrealvalues", "anyrealnumber", "everyrealnumber",
    "realnumbers", "setofallrealnumbers", "setofrealnumbers",
}  # fmt: skip
FUNCTIONS = {
    "sin", "cos", "tan", "cot", "sec", "csc", "arcsin", "arccos", "arctan", "log", "ln", "exp",
    "sqrt", "max", "min", "gcd", "lcm", "mod", "frac", "pi", "theta", "alpha", "beta", "inf",
    "infinity",
}  # fmt: skip
ANGLE_OF = re.compile(r"cis|sin|cos|tan|cot|sec|csc")
NAME_BREAKS = re.compile(
    r"[+*/<>&|!:-]|\^(?!\{?(?:-1|T|\\top)(?![A-Za-z0-9]))"
    r"|\\(?:cdot|times|frac|sqrt|pm|mp|div|sum|int|prod|log|ln|sin|cos|tan)(?![A-Za-z])"
)
# "Let x", "not x": no name.
DENIED = re.compile(
    r"n['\u2019]t\b|\b(?:no|[Nn](?:ot|ever|either)|[Ff]alse|[Ww]rong|[Ii]ncorrect|[Ii]f|[Uu]nless|[Ll]et"
    r"|[Ss]uppose|[Aa]ssume|than)\b"
)
DERIVATIVE = re.compile(r"\\frac\{d[A-Za-z]\}\{d[A-Za-z]\}")
HALVES = {"inthemorning": "am", "intheafternoon": "pm", "intheevening": "pm"}
TIMES = {"noon": "12:00pm", "midnight": "12:00am"}
HALF = r"([ap])\.?m\.?"
TIME = re.compile(
    rf"(\d{{1,3}})(?::([0-5]\d)(?::([0-5]\d))?(?:o'clock)?(?:{HALF})?|{HALF}|o'clock)"
)
# Other spellings of a unit; plurals lose their s before. "" is no unit.
UNITS = {
    "centimeter": "cm", "centimetre": "cm", "millimeter": "mm", "kilometer": "km",
    "kilometre": "km", "meter": "m", "metre": "m", "inch": "in", "inche": "in", "foot": "ft",
    "feet": "ft", "mile": "mi", "yard": "yd", "second": "s", "sec": "s", "minute": "min",
    "hour": "h", "hr": "h", "kilogram": "kg", "gram": "g", "pound": "lb", "ounce": "oz",
    "liter": "l", "litre": "l", "dollar": "$", "usd": "$", "euro": "€", "yen": "¥", "rupee": "₹",
    "degree": "°", "deg": "°", r"^\circ": "°", "year": "yr", "mph": "mi/h",
    "kph": "km/h", "kmh": "km/h", "milliliter": "ml", "millilitre": "ml", "milligram": "mg",
    "radian": "", "rad": "",
    "unit": "", "cent": "¢", "pence": "p", "paisa": "paise",
}  # fmt: skip
NO_UNITS = {
    "or",
    "nor",
    "not",
    "but",
    "if",
    "unless",
    "when",
}  # first words of what changes a number
UNIT_FUNCTIONS = {"min", "sec"}  # at the end of an answer they have no argument
HUNDREDTHS = {"¢": "$€", "p": "£", "paise": "₹"}  # of these
CURRENCIES = {r"\dollar": "$", r"\pounds": "£", r"\euro": "€", r"\yen": "¥", r"\rupee": "₹"}
POWERS = {"squared": "2", "square": "2", "sq": "2", "cubed": "3", "cubic": "3"}
SCALES = {"hundred": 2, "thousand": 3, "million": 6, "billion": 9, "trillion": 12}
CURRENCY = "|".join(map(re.escape, CURRENCIES))
POWER = r"\s*\^\s*\{?-?[123]\}?"
UNIT = re.compile(
    rf"(?<=[0-9}})!.a-z°%])\s*(?:\\text\s*\{{\s*(?P<text>[^{{}}]+)\}}(?P<text_power>{POWER})?"
    rf"|(?P<sign>\^\\circ|{CURRENCY})"
    # Without a blank, 5m is a product.
    r"|(?<=[0-9}) ])(?P<short>cm|mm|km|kg|mg|ft|in|lb|oz|mph|km/h|m/s|ml|min|hr|am|pm"
    r"|(?<= )[msghL])"
    rf"(?P<short_power>{POWER})?"
    rf"|(?<=[0-9}}) ]) (?P<words>[A-Za-z]{{3,}}[A-Za-z ./]*)(?P<words_power>{POWER})?)$"
)
ORDINAL = re.compile(r"(?<=[0-9])\s*(?:\^\s*)?\{?\s*(?:\\text\s*\{)?(?:st|nd|rd|th)\}{0,2}$")


def number(text: str) -> Fraction | None:
    """The value of digits with an optional sign, thousands separators and decimals; else None."""
    digits = text.replace(",", "").replace(" ", "")
    return Fraction(digits) if NUMBER.fullmatch(text) else None


def agree(answer: Fraction, reference: Fraction, *, decimal: bool) -> bool:
    """True if two numbers are the same answer; `decimal` if one was written as a decimal."""
    if answer == reference:
        return True
    difference, size = abs(answer - reference), max(abs(answer), abs(reference))
    return decimal and difference <= ABSOLUTE and difference <= RELATIVE * size


def text_answer(text: str) -> str | None:
    """One spelling of words without mathematics; None if there is mathematics."""
    words = ARTICLE.sub("", TEXT.sub(r" \1 ", text))
    inner = re.sub(r"\s+", "", words)
    if inner.lower() in EMPTY:
        return "∅"
    if choice := CHOICE.fullmatch(re.sub(r"[\s*]", "", TEXT.sub(r"\1", text))):
        return (choice[1] or choice[2]).upper()
    plain = re.sub(r"[^a-z]", "", inner.lower())
    if not re.fullmatch(r"[\"']?[A-Za-z][A-Za-z'.\"()/-]*", inner) or len(plain) < 2:
        return None
    if re.search(r"[A-Za-z]\(|[/-](?![A-Za-z]{3})", inner.rstrip(".")):  # f(x), a/b
        return None
    long = len(plain) > 2 or plain == "no"  # shorter ones are products
    return plain if TEXT.fullmatch(text) or (long and plain not in FUNCTIONS) else None


def name(text: str) -> str | None:
    r"""A left side of "=": x, f(x), a_1, \frac{dy}{dx}, \text{area}, (x, y); else None."""
    if DENIED.search(text):
        return None
    text = re.sub(r"\s+", "", TEXT.sub(r"\1", text))
    if DERIVATIVE.fullmatch(text):
        return text
    core = re.sub(r"_\{[^{}]*\}|_.|\{[^{}]*\}|(?<=.)\([^()]*\)|'", "", text)
    if core[:1].isdigit() or not re.search("[A-Za-z]", core) or NAME_BREAKS.search(core):
        return None
    return text.strip("()").replace("{", "").replace("}", "")


def quantity(text: str) -> str | None:
    r"""A left side of "=" that is a product or ratio of names: |AB|, A : B, \frac{a}{b}.

    An equation of a sum or of powers, as x + y = 1, is no value of its left side.
    """
    if DENIED.search(text):
        return None
    text = re.sub(r"\s+", "", TEXT.sub(r"\1", text))
    core = re.sub(r"_\{[^{}]*\}|_.|\\(?:cdot|frac|times|overline|text|angle|triangle)", "", text)
    return text if re.fullmatch(r"(?=.*[A-Za-z])[A-Za-z{}|:/()]+", core) else None


class Clock(NamedTuple):
    """A time of the day or of a clock, as 4:30 p.m.; `half` is "am", "pm" or ""."""

    hour: str
    minute: str
    second: str
    half: str
    text: str

    def same(self, other: "Clock") -> bool:
        """True if both say one time; am and pm, and zero minutes, may be left out."""
        if self.half and other.half:
            return self.in_seconds() == other.in_seconds()
        as_written = [tuple(int(x or 0) for x in time[:3]) for time in (self, other)]
        if as_written[0] == as_written[1]:
            return True
        return bool(self.half or other.half) and self.in_seconds() == other.in_seconds()

    def in_seconds(self) -> int:
        hour = int(self.hour)
        if self.half:
            hour = hour % 12 + 12 * (self.half == "pm")
        return hour * 3600 + int(self.minute or 0) * 60 + int(self.second or 0)

    def is_ratio(self) -> bool:
        return not (self.half or self.second) and self.minute[:1] not in ("", "0")


def clock(text: str) -> Clock | None:
    """Reads a time; None for anything else. 3:2 and 25:16 are ratios."""
    plain = re.sub(r"\\text|[\s{}]", "", text).lower().removeprefix("at")
    plain = re.sub("|".join(HALVES), lambda m: HALVES[m[0]], plain)
    plain = re.sub(r"(?:12(?::00)?)?(noon|midnight)", lambda m: TIMES[m[1]], plain)
    found = TIME.fullmatch(plain)
    if not found or (int(found[1]) > 24 and not (found[2] or "").startswith("0")):
        return None
    half = found[4] or found[5]
    return Clock(found[1], found[2] or "", found[3] or "", half + "m" if half else "", text)


def split_unit(text: str) -> tuple[str, str, bool]:
    """Splits "5 million cm^2" or "50%" into its number, its unit, and if it is a percentage."""
    text, scale, found_unit = ORDINAL.sub("", text.strip()), 0, ""
    if money := re.fullmatch(rf"([+-]?)\s*({CURRENCY})\s*(.*)", text):
        text, found_unit = money[1] + money[3], unit(money[2], "")
    while found := UNIT.search(text):
        said = (found["text"] or found["words"] or found["short"] or found["sign"]).lower().split()
        power = found["text_power"] or found["words_power"] or found["short_power"] or ""
        if not said or said[0] in NO_UNITS | FUNCTIONS - UNIT_FUNCTIONS:
            break
        if said[0] in UNIT_FUNCTIONS and len(said) > 1 and said[1] in FUNCTIONS:
            break
        if found["sign"] and ANGLE_OF.search(text):
            break
        text = text[: found.start()].rstrip()
        while said and said[0] in SCALES:
            scale += SCALES[said.pop(0)]
        found_unit = unit(" ".join(said), re.sub(r"[^-123]", "", power)) + found_unit
    percent = text.endswith("%")
    text = text.removesuffix("%").strip()
    return rf"{text} \cdot 10^{{{scale}}}" if scale else text, found_unit, percent


def unit(said: str, power: str) -> str:
    """One spelling of a unit, or of a quotient of units."""
    for word, by in POWERS.items():
        said, count = re.subn(rf"\b{word}\b\.?", "", said)
        power = by if count else power
    words = re.sub(r"\s*(?:/|\bper\b)\s*", "/", said).split()
    if power.startswith("-") and len(words) > 1:  # m s^{-1}
        words, power = ["".join(words[:-1]) + "/" + words[-1]], power.removeprefix("-")
        power = "" if power == "1" else power
    said = re.sub(r"\.+", "", "".join(words))
    if said != r"^\circ" and "^" in said:
        said, _, power = said.partition("^")
    parts = (CURRENCIES.get(part, part) for part in said.split("/"))
    said = "/".join(
        UNITS.get(p, UNITS.get(p.removesuffix("s"), p.removesuffix("s"))) for p in parts
    )
    return said + power if said else ""
