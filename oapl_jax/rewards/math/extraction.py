r"""Extraction of a response's final answer, in one spelling. Linear in the response's length.

The answer stands in \boxed{...} (the last one), or after "####", "answer is" or "answer:", or the
response is one short line: the answer itself, or a sentence that states it as its last formula, as
"So $x = 5$." A sentence that denies or doubts has none. Boxes and formulas joined by a comma, "and"
or "or" are one answer. Thinking does not count: only the text after `</think>`.
"""

# ruff: noqa: RUF001  (letters that look like others are this file's business)

import re
from collections.abc import Sequence
from fractions import Fraction
from typing import NamedTuple

from oapl_jax.rewards.math.judge.text_answers import number

MAX_TAIL = 50_000  # characters at the end of a response where its answer is looked for
MAX_ANSWER = 1_000  # characters of an answer
MAX_LINE = 200  # characters of a response that is nothing but its answer

BOX = re.compile(
    r"\\\\?(?:boxed|fbox)\s*(?P<brace>\{)|(?P<escape>\\[\\{}])|(?P<open>\{)|(?P<close>\})"
)
BARE_BOX = re.compile(r"\\boxed\s*([0-9]+(?:\.[0-9]+)?|[A-Za-z])(?![A-Za-z])")
FORMULA = re.compile(
    r"(?<!\\)\$(?P<dollar>[^$\n]+)\$|\\\((?P<round>.+?)\\\)|\\\[(?P<square>.+?)\\\]"
)
MAX_GAP = 70  # characters between two boxes that are one answer
LAYOUT = re.compile(r"\\[()\[\],;:! ]|\\q?quad(?![A-Za-z])|\\(?:text|mathrm)\s*\{|[${}*&~\s]|\\\\")
# Punctuation alone; "and", after a few words about the first box and before the name of the second;
# an alternative; a condition of the first.
JOINED = re.compile(
    r"[.,;]?(?:(?: (?!(?:no|not|wait|but|so|then|thus|is|are|was|were|we|gives?|yields?|which)\b)"
    r"[\w()^]+){0,4},?[ (-]*(?:and|or|&|\\(?:lor|vee|land|wedge)(?![A-Za-z]))"
    r"(?: (?:also|maybe|perhaps|possibly|even|else))?"
    r"| (?:(?:al)?though|but|yet)"
    r"| \(?(?:else|vs\.?|versus|perhaps|maybe|possibly|alternatively|otherwise|instead)"
    r"|(?: \(?but)?(?: (?:it|that|this|the answer))? (?:can|could|might|may)(?: also| instead)? be"
    r"| \(?(?:if|when|for|unless)\b[^.]*(?:[,;)]| and| or)"
    r")?[^\w\\>]*(?: ?[A-Za-z\\]\w*(?:\([^()]*\))? ?=)?",
    re.IGNORECASE,
)
LEAD = re.compile(
    r"####|\banswer\b(?:[^\n.:=]{0,80}?\b(?:is|are)\b[ \t]*:?"
    r"(?:[ \t]*\b(?:therefore|thus|hence|simply|just|exactly|indeed|given by|equal to)\b)?"
    r"|\**[ \t]*[:=]|\**[ \t]*\n|[ \t]*(?=\$|\\[(\[]))[\s*]*",
    re.IGNORECASE,
)
BLOCK = re.compile(r"\s*(?:\$\$(?P<dollars>.+?)\$\$|\\\[(?P<square>.+?)\\\])", re.DOTALL)
COMMENT = re.compile(
    r"(?:in)?correct\b|right\b|wrong\b|not\b|as follows|below|above", re.IGNORECASE
)
NEGATION = r"(?:(?:not|no|never|neither|nor|hardly|cannot)\b|\w+n['’]t\b)"
WRONG = r"(?:wrong|incorrect|false|mistaken|impossible)"
# "I don't think that the", "if my", "a wrong": before "answer is".
DENIED = re.compile(
    rf"(?:\b{NEGATION}(?: (?:think|believe|say|claim|know|sure|certain|convinced|true|the case))*"
    rf"(?: that| if| whether)?|\b{WRONG}|\b(?:if|whether|unless|suppose|assume|imagine)(?: that)?"
    r"|(?<!no )(?<!without )\bdoubt(?: that| if| whether)?)"
    r"(?: (?:the|my|our|this|your|an?|its|one|final|correct|right|true|possible))* ?$",
    re.IGNORECASE,
)
# "is wrong", "can't be right": behind a formula.
REJECTED = re.compile(
    r"[,;]?(?: (?:which|that|is|are|was|were|would|must|can|could|seems|looks|be))*(?: \w+ly)? "
    rf"(?:{WRONG}|{NEGATION} (?:be )?(?:\w+ly )?(?:right|correct|true|possible|the answer))",
    re.IGNORECASE,
)
# The words before and behind the formula of a response that is one line.
STATES = re.compile(
    r"(?:.*\b(?:is|are|be|has|have|get|find|obtain|conclude|equals?|gives?|yields?|that|to|takes?"
    r"|therefore|thus|hence|so|say|think|believe)|.*:|answer),? ?(?:=|exactly|only|about)? ?",
    re.IGNORECASE,
)
BEHIND = re.compile(
    r"(?: (?:is|are) (?:the|our|my) (?:\w+ ){0,2}(?:answers?|solutions?|results?)"
    r"| (?P<unit>[A-Za-z]+(?: [A-Za-z]+)?))?[.!]?"
)
UNCERTAIN = re.compile(
    rf"\b{NEGATION}|\b{WRONG}\b|\b(?:if|whether|unless|suppose|assume|doubt|than|guess|except|too"
    r"|maybe|perhaps|might|could|may)\b|\?",
    re.IGNORECASE,
)
PERIOD = re.compile(r"\.(?=\s|$)")
# "The largest n is 34": the answer of a sentence is its end.
STATEMENT = re.compile(
    r"[A-Za-z]{2,} .*\b(?:is|are|was|equals|equal to|has|have|had|needs?|costs?|takes?|gets?|makes?"
    r"|earns?|pays?|spends?)\b\s*:?\s*(?:equal to |exactly )?(?P<end>\S.*)"
)
EXPLAINED = re.compile(
    r"(?<=\$)[,;]? (?=(?!and |or )[a-z]{2,} )|(?<=[\w)}%$])[,;]? (?=(?:since|because|given"
    r"|which|as (?:desired|required|needed|expected|claimed|above))\b)"
)
FRACTION = re.compile(
    r"(-?) ?(?:\\frac ?\{ ?)?([0-9]{1,40}) ?(?:/|\} ?\{) ?([0-9]{1,40}) ?\}?", re.ASCII
)

# Different spellings of one meaning. Order matters: a command before its prefix.
SYMBOLS = {
    "−": "-", "–": "-", "—": "-", "×": r"\times ", "·": r"\cdot ", "÷": "/", "±": r"\pm ",
    "π": r"\pi ", "θ": r"\theta ", "α": r"\alpha ", "β": r"\beta ", "∞": r"\infty ",
    "≤": r"\le ", "≥": r"\ge ", "≠": r"\neq ", "≈": r"\approx ", "∈": r"\in ", "∪": r"\cup ",
    "∅": r"\emptyset ", "£": r"\pounds ", "€": r"\euro ", "¥": r"\yen ", "₹": r"\rupee ",
    "¢": " cents",
    "ℝ": r"\mathbb{R}", "°": r"^\circ ", "²": "^{2}", "³": "^{3}", "…": r"\dots ",
    "½": r"\frac{1}{2}", "¼": r"\frac{1}{4}", "¾": r"\frac{3}{4}", "％": "%", "，": ",",
    "（": "(", "）": ")", "“": '"', "”": '"', "’": "'", "\u00a0": " ", "\u202f": " ", "\u2009": " ",
}  # fmt: skip
COMMANDS = {
    "leq": r"\le ", "leqslant": r"\le ", "geq": r"\ge ", "geqslant": r"\ge ", "ne": r"\neq ",
    "approxeq": r"\approx ", "doteq": r"\approx ", "thickapprox": r"\approx ",
    "simeq": r"\approx ", "degree": r"^\circ ", "degrees": r"^\circ ",
    "varnothing": r"\emptyset ", "langle": "(", "rangle": ")", "lt": "<", "gt": ">", "equiv": "=",
    "rightarrow": r"\to ", "longrightarrow": r"\to ", "Rightarrow": r"\implies ",
    "Leftrightarrow": r"\iff ", "leftrightarrow": r"\iff ", "ldots": r"\dots ",
    "cdots": r"\dots ", "dotsc": r"\dots ", "dotsb": r"\dots ",
}  # fmt: skip
# Codes of currencies before an amount.
CODES = {
    "Rs": r"\rupee ",
    "INR": r"\rupee ",
    "USD": r"\dollar ",
    "EUR": r"\euro ",
    "GBP": r"\pounds ",
}
CODE = "|".join(CODES)
WORDS = r"\\text\s*\{([^{}\d]+)\}"
REWRITES = tuple(
    (re.compile(pattern), by)
    for pattern, by in (
        (r"√\s*\(([^()]*)\)", r"\\sqrt{\1}"),
        (r"√\s*([0-9]+|[A-Za-z])", r"\\sqrt{\1}"),
        (r"(?<!\\)\\[\[\]()]", " "),
        (r"\\(?:text|mathrm)\s*\{\s*\\\$\s*\}|\\(?:text|math)dollar(?![A-Za-z])|\\\$",
         r" \\dollar "),
        (r"\$", " "),
        (r"\.{3,}", r"\\dots "),
        (r"\\mathbb\s*([A-Z])(?![A-Za-z])", r"\\mathbb{\1}"),
        (r"^\\sim(?=[\s\d-])|\\text\s*\{\s*(?:approximately|approx\.?|about|roughly)\s*\}"
         r"|(?<![A-Za-z\\])(?:approximately|approx\.?|about|roughly)(?![A-Za-z])", r"\\approx "),
        (r"\\(?:text|math)sterling(?![A-Za-z])", r" \\pounds "),
        (r"(?<=[0-9])\\[,!;: ]\s*(?=[0-9]{3})", ""),
        (r"(?<=[0-9])\s*\{\s*,\s*\}\s*(?=[0-9]{3})", ""),
        (r"(?<=[0-9]),(?:\\[!,;:]\s*|\{\})(?=[0-9]{3})", ","),
        (r"(?<!\\)\\[,!;: ~]|~|\\q?quad(?![A-Za-z])", " "),
        (r"\\(?:left|right|[bB]igg?[lrm]?)(?![A-Za-z])\.?", ""),
        (r"\\(?:displaystyle|textstyle|limits|mathstrut)(?![A-Za-z])", ""),
        (r"\\[lr]brace(?![A-Za-z])", lambda m: r"\{" if m[0] == r"\lbrace" else r"\}"),
        (r"\\[dtc]frac(?![A-Za-z])", r"\\frac"),
        (r"\\[dt]binom(?![A-Za-z])", r"\\binom"),
        (r"\\(?:mathbf|boldsymbol|bm)\s*\{\s*([A-Za-z])\s*\}", r" \1 "),
        (r"\\(?:mathrm|mathbf|mathit|mathsf|boldsymbol|bm|textbf|textit|textrm|textsf|textnormal|mbox"
         r"|emph|underline)(?=\s*\{)", r"\\text"),
        (r"\\text\s*\{\s*([+-]?\d[\d,]*(?:\.\d+)?)\s*\}", r" \1 "),
        (r"\{\\(?:rm|bf|it)\s+([^{}]*)\}", r"\\text{\1}"),
        (rf"(?:\\text\s*\{{\s*({CODE})\.?\s*\}}|(?<![A-Za-z\\])({CODE})(?![A-Za-z]))\.?\s*(?=\d)",
         lambda m: CODES[m[1] or m[2]]),
        (r"(?:\\text\s*\{\s*US\s*\}|(?<![A-Za-z\\])US)\s*(?=\\dollar)", ""),
        (r"(?<=\d)\s*/-(?!\s*\w)", ""),  # behind rupees
        (r"(?<=\\rupee )\s*\d{1,2}(?:,\d\d)+,\d{3}(?![\d,])", lambda m: m[0].replace(",", "")),
        (r"\\(?:text|math)?cents?(?:sign)?(?![A-Za-z])", " cents "),
        (r"\\cis(?![A-Za-z])|(?:\\operatorname\*?|\\text)\s*\{\s*cis\s*\}|(?<![A-Za-z\\])cis(?![a-z])",
         r"\\cis "),
        # Units in pieces: m/s, kg m, "hours and".
        (rf"\\frac\s*\{{\s*{WORDS}\s*\}}\s*\{{\s*{WORDS}(\^\d)?\s*\}}", r"\\text{\1/\2}\3"),
        (rf"{WORDS}(?:\^\{{?(\d)\}}?)?\s*/\s*{WORDS}", r"\\text{\1\2/\3}"),
        (rf"{WORDS}\s*\\(?:cdot|times)\s*{WORDS}", r"\\text{\1 \2}"),
        (r"\\text\s*\{([^{}]*\w) (and|or) *\}", r"\\text{\1}\\text{ \2 }"),
        (r"\\(?:rm|bf|it)(?![A-Za-z])", " "),
        (r"\{([^{}]*)\\choose(?![A-Za-z])([^{}]*)\}", r"\\binom{\1}{\2}"),
        (r"\\([A-Za-z]+)", lambda m: COMMANDS.get(m[1]) or m[0]),
        (r"\^\s*\{\s*\\circ\s*\}", r"^\\circ "),
        (r"\\colon(?![A-Za-z])|\\text\s*\{\s*(?:to|:)\s*\}|\{:\}", ":"),
        (r"^([^{}]*)\\choose(?![A-Za-z])([^{}]*)$", r"\\binom{\1}{\2}"),
        (r"\\not\s*=", r"\\neq "),
        (r"\\text\s*\{\s*d\s*\}(?=\s*[A-Za-z\\^])", "d "),
        # Derivatives: y^{\prime}, \dot{y}, dy/dx.
        (r"\^\s*(?:\{\s*((?:\\prime\s*)+)\}|(\\prime)(?![A-Za-z]))",
         lambda m: "'" * (m[1] or m[2]).count("prime")),
        (r"\\dot\s*(?:\{\s*([A-Za-z]|\\[a-z]+)\s*\}|([A-Za-z])(?![A-Za-z]))",
         lambda m: rf"\frac{{d{m[1] or m[2]}}}{{dt}}"),
        (r"\\ddot\s*(?:\{\s*([A-Za-z]|\\[a-z]+)\s*\}|([A-Za-z])(?![A-Za-z]))",
         lambda m: rf"\frac{{d^2{m[1] or m[2]}}}{{dt^2}}"),
        (r"(?<![A-Za-z\\])d(\^\{?\d\}?)? ?([A-Za-z]) ?/ ?d ?([A-Za-z])(\^\{?\d\}?)?(?![A-Za-z])",
         lambda m: rf"\frac{{d{m[1] or ''}{m[2]}}}{{d{m[3]}{m[4] or ''}}}"),
        (r"\\pmod\s*\{?\s*([0-9A-Za-z]+)\s*\}?|\(\s*(?:\\text\s*\{)?\s*mod\s*\}?\s*([0-9A-Za-z]+)\s*\)",
         lambda m: rf"\pmod{{{m[1] or m[2]}}}"),
        (r"\\%|\\text\s*\{\s*(?:percent(?:age)?|pct)\s*\}|\b(?:percent(?:age)?|pct)\b", "%"),
        (r"<=", r"\\le "), (r">=", r"\\ge "), (r"!=", r"\\neq "),
        (r"\*\*(?=[0-9({-])", "^"),
        (r"^[*_]+|[*_]+$", ""),
        (r"\s+", " "),
        (r"(?<![\d.,])(\d{1,3})((?: \d{3})+)(?!\d)", lambda m: m[0].replace(" ", "")),
    )
)  # fmt: skip


class Found(NamedTuple):
    """A box or a formula, from `start` to `end` of a text."""

    start: int
    end: int
    content: str


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
        found = _last_formula(found) or found
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
    if r"\begin" not in answer:
        answer = re.sub(r"\\\\(?=[A-Za-z{}])", r"\\", answer)  # escaped twice
    answer = re.sub(r"\\(?:boxed|fbox)(?![A-Za-z])", "", answer)
    for pattern, by in REWRITES:
        answer = pattern.sub(by, answer)
    answer = answer.strip(" ")
    while answer.endswith((".", ",", ";", "\\\\")) and not answer.endswith((r"\,", r"\;")):
        answer = answer[: -2 if answer.endswith("\\\\") else -1].strip()
    return answer


def _boxed(text: str) -> str | None:
    r"""Content of the last complete \boxed{}, and boxes joined to it by a comma, "and" or "or"."""
    boxes: list[Found] = []
    opened: list[tuple[int, int] | None] = []
    for token in BOX.finditer(text):
        if token["brace"]:
            opened.append((token.start(), token.end()))
        elif token["open"]:
            opened.append(None)
        elif token["close"] and opened and (box := opened.pop()):
            while boxes and boxes[-1].start > box[0]:  # inside this one
                boxes.pop()
            boxes.append(Found(box[0], token.end(), text[box[1] : token.start()]))
    if not boxes:
        bare = BARE_BOX.findall(text)
        return bare[-1] if bare else None
    return _as_list(_joined(boxes, text))


def _joined(found: Sequence[Found], text: str) -> Sequence[Found]:
    """The last of some boxes or formulas, and those before that are joined to it."""
    first = len(found) - 1
    while first and _is_gap(text[found[first - 1].end : found[first].start]):
        first -= 1
    return found[first:]


def _is_gap(text: str) -> bool:
    """True for text between two boxes that are one answer."""
    gap = re.sub(r"\s+", " ", LAYOUT.sub(" ", text[: MAX_GAP + 1])).rstrip()
    return len(text) <= MAX_GAP and bool(JOINED.fullmatch(re.sub(r"^ (?=[.,;])", "", gap)))


def _as_list(found: Sequence[Found]) -> str | None:
    """Contents of boxes or formulas, each once; None if all are empty."""
    parts = dict.fromkeys(one.content.strip() for one in found)
    return ", ".join(parts) if any(parts) else None


def _last_formula(line: str) -> str | None:
    """The last formula of a sentence that states it, and formulas joined to it."""
    formulas = [Found(f.start(), f.end(), f[f.lastgroup or 0]) for f in FORMULA.finditer(line)]
    if not formulas or UNCERTAIN.search(FORMULA.sub(" ", line)):
        return None
    found = _joined(formulas, line)
    behind = BEHIND.fullmatch(line, found[-1].end)
    if not behind or not STATES.fullmatch(line, 0, found[0].start):
        return None
    answer, unit = _as_list(found), behind["unit"]
    return rf"{answer} \text{{ {unit}}}" if unit else answer


def _stated(text: str) -> str | None:
    """The text after the last "####", "answer is" or "answer:" that is no comment on an answer."""
    for lead in reversed(list(LEAD.finditer(text))):
        clause = re.split(r"[.,;:!?\n]", text[max(0, lead.start() - MAX_GAP) : lead.start()])[-1]
        if COMMENT.match(text, lead.end()) or DENIED.search(clause):
            continue
        if block := BLOCK.match(text, lead.end()):
            return block[block.lastgroup or 0].strip()
        line = text[lead.end() :].partition("\n")[0].strip()
        if lead[0].startswith("#"):
            return line or None
        found = PERIOD.split(line.strip(" *:"), maxsplit=1)[0]
        if statement := STATEMENT.fullmatch(found):
            found = statement["end"]
        answer = EXPLAINED.split(found, maxsplit=1)[0]
        if REJECTED.match(found, len(answer)):
            continue
        return answer.strip(' *"') or None
    return None
