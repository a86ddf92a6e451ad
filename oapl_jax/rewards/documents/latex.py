r"""Formulas: validity as LaTeX, and the number of commands.

pylatexenc parses strictly: groups, environments and arguments must be complete. It knows no
mathematics, so the other errors that stop a LaTeX run are looked for among its nodes: unknown
names, two scripts in one place, \left without \right, & outside of a table. Nothing is expanded.
"""

import functools
import re
from collections.abc import Iterable, Iterator
from typing import Any

from pylatexenc import latex2text, latexwalker
from pylatexenc.latexwalker import LatexWalker, LatexWalkerParseError
from pylatexenc.macrospec import EnvironmentSpec, MacroSpec, MacroStandardArgsParser

MAX_FORMULA = 2048  # characters
MAX_DEPTH = 32  # of brackets and environments; Python's stack has room for some hundred
CLOSES = {r"\end": r"\begin", r"\)": r"\(", r"\]": r"\[", "}": "{", "]": "["}
BRACKET = re.compile(r"\\(?:begin|end)\b|\\[\s\S]|[{}\[\]]")
VISIBLE = ""  # stands for a symbol among names of commands
SPACES = frozenset((*",;:!> ", "quad", "qquad", "hspace", "phantom", "label"))

# pylatexenc has the names of LaTeX's symbols; it lacks these, here by the arguments they take.
SYMBOLS = ("latex-base", "advanced-symbols")
NO_FORMULA = frozenset(("include", "input", "today"))
COMMANDS = {
    "": r"left right middle big Big bigg Bigg bigl bigr Bigl Bigr biggl biggr Biggl Biggr bigm "
    r"Bigm displaystyle textstyle scriptstyle limits nolimits bmod mod neg triangle Re Im iff "
    r"implies det gcd deg dim ker arg Pr hom lg cot sec csc coth hline nonumber notag | >",
    "{": "operatorname boldsymbol bm phantom pmod substack tag label boxed cline text textbf "
    "textit textrm textsf texttt mbox overline underline overbrace underbrace overleftarrow "
    "overrightarrow widehat widetilde",
    "{{": "frac dfrac tfrac cfrac binom dbinom tbinom stackrel overset underset",
    "[{": "xleftarrow xrightarrow",
    "*{": "hspace",
    "*[": "\\",
}
ENVIRONMENTS = {
    "": "matrix pmatrix bmatrix Bmatrix vmatrix Vmatrix smallmatrix cases aligned gathered split "
    "align align* gather gather* equation equation* multline multline*",
    "[{": "array",
    "{": "alignedat",
}


@functools.lru_cache(maxsize=4096)
def count_commands(formula: str) -> int | None:
    """The number of commands, scripts and environments in any text that stands between dollars;
    None for no formula, or nothing to see."""
    if len(formula) > MAX_FORMULA or depth(formula) > MAX_DEPTH:
        return None
    walker = LatexWalker(formula, latex_context=latex_names()[0], tolerant_parsing=False)
    try:
        state: Any = walker.make_parsing_state(in_math_mode=True)
        nodes, start, length = walker.get_latex_nodes(parsing_state=state)
        names = list(_names(nodes, in_table=False))
    except (LatexWalkerParseError, _Illegal, RecursionError):
        return None
    if start + length < len(formula) or VISIBLE not in names:
        return None  # a last backslash is not parsed
    return sum(name != VISIBLE and name not in SPACES for name in names)


def depth(formula: str) -> int:
    """An upper bound of the nesting of brackets and environments: each kind counts by itself."""
    opened, deepest = dict.fromkeys(CLOSES.values(), 0), 0
    for bracket in BRACKET.findall(formula):
        if bracket in CLOSES:
            opened[CLOSES[bracket]] = max(opened[CLOSES[bracket]] - 1, 0)
        elif bracket in opened:
            opened[bracket] += 1
            deepest = max(deepest, sum(opened.values()))
    return deepest


@functools.cache
def latex_names() -> tuple[Any, frozenset[str], frozenset[str]]:
    """Arguments of commands for pylatexenc; names of all commands; names of all environments."""
    own: Any = latexwalker.get_default_latex_context_db().filter_context(["latex-base"])
    symbols: Any = latex2text.get_default_latex_context_db().filter_context(list(SYMBOLS))
    taking = lambda make, table: [
        make(name, MacroStandardArgsParser(arguments))
        for arguments, names in table.items()
        for name in names.split()
    ]
    macros, environments = taking(MacroSpec, COMMANDS), taking(EnvironmentSpec, ENVIRONMENTS)
    own.add_context_category("mathematics", macros, environments, prepend=True)
    known = {spec.macroname for spec in (*macros, *symbols.iter_macro_specs())}
    return own, frozenset(known - NO_FORMULA), frozenset(e.environmentname for e in environments)


class _Illegal(Exception):
    """LaTeX would stop with an error here."""


def _names(nodes: Iterable[Any], *, in_table: bool) -> Iterator[str]:
    """The commands and scripts of a list of nodes, with VISIBLE for each that is a symbol."""
    scripts: set[str] = set()  # of the last symbol
    waiting, open_left = "", 0  # a script or delimiter that still needs its symbol; open \left
    for item in _items(nodes):
        if isinstance(item, str) and item in "^_":
            if waiting or item in scripts:
                raise _Illegal
            scripts.add(item)
            waiting = item
            yield item
            continue
        if waiting not in ("^", "_"):
            scripts = set()
        name = getattr(item, "macroname", "")
        waiting = name if name in ("left", "right", "middle") else ""
        open_left += (name == "left") - (name == "right")
        if open_left < 0:
            raise _Illegal
        yield from _names_of(item, in_table=in_table)
    if waiting or open_left:
        raise _Illegal


def _items(nodes: Iterable[Any]) -> Iterator[Any]:
    """Characters one by one, and other nodes as they are; without spaces."""
    for node in nodes:
        if isinstance(node, latexwalker.LatexCharsNode):
            yield from "".join(node.chars.replace("~", " ").split())
        elif node is not None:  # an optional argument that is there
            yield node


def _names_of(item: Any, *, in_table: bool) -> Iterator[str]:
    table, known, environments = latex_names()
    if isinstance(item, str):
        if item == "#" or not item.isprintable():
            raise _Illegal
        yield VISIBLE
    elif item.isNodeType(latexwalker.LatexMacroNode):
        if item.macroname not in known:
            raise _Illegal
        yield item.macroname
        spec = table.get_macro_spec(item.macroname)
        takes = spec.args_parser.argspec if spec else ""
        if takes and item.nodeargd is None:  # as the argument of another command
            raise _Illegal
        if item.macroname not in SPACES and not takes:
            yield VISIBLE
        elif item.macroname not in SPACES:
            for argument in item.nodeargd.argnlist:
                yield from _names([argument], in_table=False)
    elif item.isNodeType(latexwalker.LatexEnvironmentNode):
        if item.environmentname not in environments:
            raise _Illegal
        yield item.environmentname
        yield from _names(item.nodelist, in_table=True)
    elif isinstance(item, latexwalker.LatexSpecialsNode | latexwalker.LatexCommentNode):
        if not in_table or item.isNodeType(latexwalker.LatexCommentNode):  # & belongs in a table
            raise _Illegal
    else:  # a group, or a formula inside of \text
        yield from _names(item.nodelist, in_table=False)
