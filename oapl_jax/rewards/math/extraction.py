r"""Extraction of a response's final answer, in one spelling. Linear in the response's length.

The answer stands in \boxed{...} (the last one), or after "####", "answer is" or "answer:", or the
response is one short line. Thinking does not count: only the text after `</think>`.
"""

# ruff: noqa: RUF001  (letters that look like others are this file's business)

import re
from fractions import Fraction

from oapl_jax.rewards.math.judge.text_answers import number

MAX_TAIL = 50_000  # characters at the end of a response where its answer is looked for
MAX_ANSWER = 1_000  # characters of an answer
MAX_LINE = 200  # characters of a response that is nothing but its answer

BOX = re.compile(
    r"\\(?:boxed|fbox)\s*(?P<brace>\{)|(?P<escape>\\[\\{}])|(?P<open>\{)|(?P<close>\})"
)
BARE_BOX = re.compile(r"\\boxed\s*([0-9]+(?:\.[0-9]+)?|[A-Za-z])(?![A-Za-z])")
BETWEEN_BOXES = re.compile(
    r"[\s$]*(?:\\[()\]\[])?\s*(?:,|;|,?\s*\\?(?:text\{)?\s*(?:and|or)\s*\}?)[\s$]*"
    r"(?:\\[()\]\[])?\s*"
)
STATED = re.compile(
    r"####\s*(?P<hashes>[^\n]+)"
    r"|\banswer\b(?:[^\n.:=]{0,80}?\b(?:is|are)\b[ \t]*:?|\**[ \t]*[:=]|\**[ \t]*\n)"
    r"[\s*]*(?P<words>[^\n]+)",
    re.IGNORECASE,
)
FRACTION = re.compile(
    r"(-?) ?(?:\\frac ?\{ ?)?([0-9]{1,40}) ?(?:/|\} ?\{) ?([0-9]{1,40}) ?\}?", re.ASCII
)
SENTENCE_END = re.compile(r"\.(?=\s|$)|(?<=\$)[,;]? (?=(?!and |or )[a-z]{2,} )")

# Different spellings of one meaning. Order matters: a command before its prefix.
SYMBOLS = {
    "−": "-", "–": "-", "—": "-", "×": r"\times ", "·": r"\cdot ", "÷": "/", "±": r"\pm ",
    "π": r"\pi ", "θ": r"\theta ", "α": r"\alpha ", "β": r"\beta ", "∞": r"\infty ",
    "≤": r"\le ", "≥": r"\ge ", "≠": r"\neq ", "≈": r"\approx ", "∈": r"\in ", "∪": r"\cup ",
    "∅": r"\emptyset ", "ℝ": r"\mathbb{R}", "°": r"^\circ ", "²": "^{2}", "³": "^{3}",
    "½": r"\frac{1}{2}", "¼": r"\frac{1}{4}", "¾": r"\frac{3}{4}", "％": "%", "，": ",",
    "（": "(", "）": ")", "“": '"', "”": '"', "’": "'", "\u00a0": " ", "\u202f": " ", "\u2009": " ",
}  # fmt: skip
COMMANDS = {
    "leq": r"\le ", "leqslant": r"\le ", "geq": r"\ge ", "geqslant": r"\ge ", "ne": r"\neq ",
    "thickapprox": r"\approx ", "simeq": r"\approx ", "degree": r"^\circ ", "degrees": r"^\circ ",
    "varnothing": r"\emptyset ", "langle": "(", "rangle": ")", "lt": "<", "gt": ">", "equiv": "=",
}  # fmt: skip
REWRITES = tuple(
    (re.compile(pattern), by)
    for pattern, by in (
        (r"√\s*\(([^()]*)\)", r"\\sqrt{\1}"),
        (r"√\s*([0-9]+|[A-Za-z])", r"\\sqrt{\1}"),
        (r"(?<!\\)\\[\[\]()]", " "),
        (r"\\\$", r" \\dollar "), (r"\$", " "),
        (r"(?<=[0-9])\\[,!;: ]\s*(?=[0-9]{3})", ""),
        (r"(?<=[0-9])\{,\}(?=[0-9]{3})", ""),
        (r"(?<=[0-9]),(?:\\[!,;:]\s*|\{\})(?=[0-9]{3})", ","),
        (r"(?<!\\)\\[,!;: ~]|~|\\q?quad(?![A-Za-z])", " "),
        (r"\\(?:left|right|[bB]igg?[lrm]?)(?![A-Za-z])\.?", ""),
        (r"\\(?:displaystyle|textstyle|limits|mathstrut)(?![A-Za-z])", ""),
        (r"\\[lr]brace(?![A-Za-z])", lambda m: r"\{" if m[0] == r"\lbrace" else r"\}"),
        (r"\\[dtc]frac(?![A-Za-z])", r"\\frac"),
        (r"\\(?:mathbf|boldsymbol|bm)\s*\{\s*([A-Za-z])\s*\}", r" \1 "),
        (r"\\(?:mathrm|mathbf|mathit|mathsf|boldsymbol|bm|textbf|textit|textrm|textsf|textnormal|mbox"
         r"|emph)(?=\s*\{)", r"\\text"),
        (r"\{\\(?:rm|bf|it)\s+([^{}]*)\}", r"\\text{\1}"),
        (r"\\(?:rm|bf|it)(?![A-Za-z])", " "),
        (r"\{([^{}]*)\\choose(?![A-Za-z])([^{}]*)\}", r"\\binom{\1}{\2}"),
        (r"\\([A-Za-z]+)", lambda m: COMMANDS.get(m[1]) or m[0]),
        (r"\^\s*\{\s*\\circ\s*\}", r"^\\circ "),
        (r"\\colon(?![A-Za-z])|\{:\}|\\text\s*\{\s*to\s*\}", ":"),
        (r"\\pmod\s*\{?\s*([0-9A-Za-z]+)\s*\}?|\(\s*(?:\\text\s*\{)?\s*mod\s*\}?\s*([0-9A-Za-z]+)\s*\)",
         lambda m: rf"\pmod{{{m[1] or m[2]}}}"),
        (r"\\%|\\text\s*\{\s*(?:percent|pct)\s*\}|\b(?:percent|pct)\b", "%"),
        (r"<=", r"\\le "), (r">=", r"\\ge "), (r"!=", r"\\neq "),
        (r"\*\*(?=[0-9({-])", "^"),
        (r"^[*_]+|[*_]+$", ""),
        (r"\s+", " "),
    )
)  # fmt: skip


def after_thinking(response: str, *, thinking_opened: bool) -> str | None:
    """The text after the thinking part; None if that part never ends.

    `thinking_opened`: the prompt ends inside it, as the chat template itself writes `<think>`.
    """
    _, end, visible = response.rpartition("</think>")
    return None if "<think>" in visible or (thinking_opened and not end) else visible


def final_answer(response: str, *, thinking_opened: bool) -> str | None:
    """The final answer of a response, tidied; None if it has none."""
    visible = after_thinking(response, thinking_opened=thinking_opened)
    if visible is None:
        return None
    visible = visible[-MAX_TAIL:]
    found = _boxed(visible)
    if found is None:
        found = _stated(visible)
    if found is None:
        found = visible.strip()
        if "\n" in found or len(found) > MAX_LINE:
            return None
    if len(found) > MAX_ANSWER or len(found := tidy(found)) > MAX_ANSWER:
        return None
    return found or None


def canonical(answer: str) -> str:
    """One spelling of an answer, for a vote: a number is a fraction; of the rest, blanks go."""
    fraction = FRACTION.fullmatch(answer)
    if fraction and int(fraction[3]):
        return str(Fraction(int(fraction[1] + fraction[2]), int(fraction[3])))
    value = number(answer)
    return str(value) if value is not None else "".join(answer.split())


def tidy(answer: str) -> str:
    """Rewrites an answer into the spelling that the judge reads."""
    if number(plain := answer.strip(" \n$").removesuffix(".")) is not None:
        return plain
    for symbol, by in SYMBOLS.items():
        answer = answer.replace(symbol, by)
    answer = re.sub(r"\\(?:boxed|fbox)(?![A-Za-z])", "", answer)
    for pattern, by in REWRITES:
        answer = pattern.sub(by, answer)
    answer = answer.strip(" ")
    while answer.endswith((".", ",", ";", "\\\\")) and not answer.endswith((r"\,", r"\;")):
        answer = answer[: -2 if answer.endswith("\\\\") else -1].strip()
    return answer


def _boxed(text: str) -> str | None:
    r"""Content of the last complete \boxed{}, and boxes joined to it by a comma, "and" or "or"."""
    boxes: list[tuple[int, int, str]] = []
    opened: list[tuple[int, int] | None] = []
    for token in BOX.finditer(text):
        if token["brace"]:
            opened.append((token.start(), token.end()))
        elif token["open"]:
            opened.append(None)
        elif token["close"] and opened and (box := opened.pop()):
            while boxes and boxes[-1][0] > box[0]:  # inside this one
                boxes.pop()
            boxes.append((box[0], token.end(), text[box[1] : token.start()]))
    if not boxes:
        bare = BARE_BOX.findall(text)
        return bare[-1] if bare else None
    parts = [boxes[-1][2]]
    for (_, end, content), (start, _, _) in zip(boxes[-2::-1], boxes[:0:-1], strict=True):
        if start - end > 40 or not BETWEEN_BOXES.fullmatch(text[end:start]):
            break
        parts.insert(0, content)
    return ", ".join(parts) if any(part.strip() for part in parts) else None


def _stated(text: str) -> str | None:
    """The text after the last "####", "answer is" or "answer:"."""
    stated = list(STATED.finditer(text))
    if not stated:
        return None
    found = stated[-1]
    if found["hashes"]:
        return found["hashes"].strip()
    return SENTENCE_END.split(found["words"].strip(" *:"), maxsplit=1)[0].strip(" *")
