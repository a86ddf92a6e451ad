r"""Parser of documents: their formulas, tables, open tags and visible text.

HTML, Markdown and their mixtures are read alike. Formulas are cut out first ($..$, $$..$$, \(..\),
\[..\]; a dollar that begins none is written \$), so that no < or | in them is taken for structure;
pipe tables become HTML ones; then tags are matched. Each pass takes linear time, which html.parser
of Python does not where tags do not end.
"""

import html
import re
from typing import NamedTuple

from oapl_jax.rewards.documents.latex import count_commands

INSIDE = {  # a formula and its end, which is missing if a closing tag or the text's end comes first
    "$": re.compile(r"((?:[^\\$<]|\\[\s\S]|<(?!/))*+)(\$)?"),
    "$$": re.compile(r"((?:[^\\$<]|\\[\s\S]|<(?!/))*+)(\$\$)?"),
    r"\(": re.compile(r"((?:[^\\<]|\\[^)]|<(?!/))*+)(\\\))?"),
    r"\[": re.compile(r"((?:[^\\<]|\\[^\]]|<(?!/))*+)(\\\])?"),
}
BEGIN = re.compile(r"\\[\s\S]|\$\$?")
STANDIN = "\ue000{}\ue001"  # in the place of a formula, of Unicode's private use
STANDINS = re.compile(STANDIN.format("[0-9]+"))
NO_STANDINS = {0xE000: None, 0xE001: None}
PIPE = re.compile(r"(?<!\\)\|")
RULE = re.compile(r":?-+:?")
MARKS = re.compile(r"\*\*|~~|```")  # which come in pairs
HEADING = re.compile(r"^ {0,3}#{1,6} ", re.MULTILINE)
# No < within a tag, so that what does not end is left behind at the next one.
TAG = re.compile(r"""<(/?)([a-zA-Z][a-zA-Z0-9-]*)((?:[^<>"']|"[^"<]*"|'[^'<]*')*+)>""")
SPAN = re.compile(r"""(colspan|rowspan)\s*+=\s*+["']?([0-9]{1,4})""")
CHARACTER = re.compile("&(?:#[0-9]{1,7}|#[xX][0-9a-fA-F]{1,6}|[a-zA-Z]{2,31});")
CELL = ("td", "th")
NO_CONTENT = ("area", "br", "col", "embed", "hr", "img", "input", "link", "meta", "source", "wbr")
NEW_LINE = ("br", "caption", "div", "h1", "h2", "h3", "h4", "h5", "h6", "li", "p", "table", "tr")
MAX_COLUMNS = 200  # of a table; a wider one counts as ragged


class Formula(NamedTuple):
    """A formula without delimiters, and its number of commands, None if it is invalid."""

    source: str
    commands: int | None


class Table(NamedTuple):
    """A table: whether two rows differ in their columns; whether it ends and has text in a cell."""

    ragged: bool
    complete: bool


class Document(NamedTuple):
    """Parsed document: tables in the order of their ends; `open_tags` counts unbalanced tags and
    Markdown marks (**, ~~, ```); `text` is the rendered text: a line for each row, a tab before
    each cell, white space as one space, formulas as their source between dollars."""

    formulas: tuple[Formula, ...]
    tables: tuple[Table, ...]
    open_tags: int
    text: str


def read_document(text: str) -> Document:
    """Parses any text, in linear time; no text makes it raise."""
    formulas, text = cut_formulas(text.translate(NO_STANDINS))
    marks = MARKS.findall(text)
    reader = _Reader()
    reader.read(pipe_tables_to_html(HEADING.sub("", MARKS.sub("", text))))
    sources = [" ".join(formula.source.split()) for formula in formulas]
    shown = {STANDIN.format(i): f"${source}$" for i, source in enumerate(sources) if source}
    seen = STANDINS.sub(lambda found: shown.get(found[0], ""), reader.text())
    return Document(
        formulas=tuple(formulas),
        tables=tuple(reader.tables),
        open_tags=reader.unmatched + sum(marks.count(mark) % 2 for mark in set(marks)),
        text="".join(c for c in seen if c.isprintable() or c in "\n\t").strip(" \n"),
    )


def cut_formulas(text: str) -> tuple[list[Formula], str]:
    """The formulas of a text, and the text with a STANDIN in the place of each."""
    formulas, rest, at = [], [], 0
    while begin := BEGIN.search(text, at):
        if begin[0] not in INSIDE:  # another command, or \\$
            rest.append(text[at : begin.end()])
            at = begin.end()
            continue
        inside = INSIDE[begin[0]].match(text, begin.end())
        assert inside is not None  # it may be empty
        rest += (text[at : begin.start()], STANDIN.format(len(formulas)))
        formulas.append(Formula(inside[1], count_commands(inside[1]) if inside[2] else None))
        at = inside.end()
    return formulas, "".join((*rest, text[at:]))


def pipe_tables_to_html(text: str) -> str:
    """Markdown's tables: a line of cells, a rule with as many (|---|:-:|), more lines of cells."""
    lines, out, at = [*text.split("\n"), ""], [], 0
    while at < len(lines) - 1:
        rows, rule = [_cells(lines[at])], _cells(lines[at + 1])
        if not rule or len(rule) != len(rows[0]) or not all(map(RULE.fullmatch, rule)):
            out.append(lines[at])
            at += 1
            continue
        at += 2
        while row := _cells(lines[at]):
            rows.append(row)
            at += 1
        cells = ("".join(f"<td>{cell}</td>" for cell in row) for row in rows)
        out.append(f"<table>{''.join(f'<tr>{row}</tr>' for row in cells)}</table>")
    return "\n".join(out)


def _cells(line: str) -> list[str]:
    """The cells between the pipes of a line; none if it has no pipe."""
    cells = [cell.strip() for cell in PIPE.split(line.strip())]
    return cells[cells[0] == "" : len(cells) - (cells[-1] == "")] if len(cells) > 1 else []


class _Grid:
    """The columns of a table, row by row, as HTML lays out its cells."""

    def __init__(self):
        self.in_row = self.has_text = False
        self._broken, self._widths = False, set()
        self._row: dict[int, int] = {}  # column -> rows that its cell covers, this one included
        self._above: dict[int, int] = {}  # column -> rows that a cell from above still covers
        self._column = 0

    @property
    def ragged(self) -> bool:
        return self._broken or len(self._widths) > 1 or bool(self._above)

    def begin_row(self) -> None:
        self.end_row()
        self.in_row, self._row, self._column = True, {}, 0

    def add_cell(self, columns: int, rows: int) -> None:
        if not self.in_row:
            self.begin_row()
        while self._column in self._above:
            self._column += 1
        end = self._column + columns
        self._broken |= end > MAX_COLUMNS
        for column in range(self._column, min(end, MAX_COLUMNS)):
            self._broken |= column in self._above
            self._row[column] = rows
        self._column = end

    def end_row(self) -> None:
        if not self.in_row:
            return
        self.in_row, covered = False, self._above | self._row
        self._widths.add(len(covered))
        self._above = {column: rows - 1 for column, rows in covered.items() if rows > 1}


class _Reader:
    """Reads the tags of a text in order, with a stack of the open ones."""

    def __init__(self):
        self.tables: list[Table] = []
        self.unmatched = 0
        self._open: list[str] = []
        self._grids: list[_Grid] = []  # of the open tables
        self._text: list[str] = []

    def read(self, text: str) -> None:
        at = 0
        for tag in TAG.finditer(text):
            self._data(text[at : tag.start()])
            at = tag.end()
            ends, name, attributes = tag[1], tag[2].lower(), tag[3]
            if not ends:
                self._begin(name, attributes)
            if ends or attributes.endswith("/"):
                self._end(name)
        self._data(text[at:])
        while self._open:
            self._leave_open()

    def text(self) -> str:
        text = re.sub(" +", " ", "".join(self._text))
        return re.sub(r"[ \n]*\n[ \n]*", "\n", re.sub(" ?\t ?", "\t", text))

    def _data(self, data: str) -> None:
        data = CHARACTER.sub(lambda found: html.unescape(found[0]), data)
        self._text.append(re.sub(r"\s+", " ", data))
        if self._grids and self._grids[-1].in_row and data.strip():
            self._grids[-1].has_text = True

    def _begin(self, name: str, attributes: str) -> None:
        self._text.append("\t" if name in CELL else "\n" if name in NEW_LINE else "")
        if name in NO_CONTENT:
            return
        self._open.append(name)
        if name == "table":
            self._grids.append(_Grid())
        elif self._grids and name == "tr":
            self._grids[-1].begin_row()
        elif self._grids and name in CELL:
            spans = dict(SPAN.findall(attributes.lower()))
            columns, rows = (int(spans.get(of, 1)) for of in ("colspan", "rowspan"))
            self._grids[-1].add_cell(max(columns, 1), max(rows, 1))

    def _end(self, name: str) -> None:
        if name in NO_CONTENT:
            return
        self._text.append("\n" if name in NEW_LINE else "")
        if name not in self._open:
            self.unmatched += 1
            return
        while self._open[-1] != name:
            self._leave_open()
        self._open.pop()
        if name == "table":
            self._end_table(ends=True)
        elif name == "tr" and self._grids:
            self._grids[-1].end_row()

    def _leave_open(self) -> None:
        self.unmatched += 1
        if self._open.pop() == "table":
            self._end_table(ends=False)

    def _end_table(self, *, ends: bool) -> None:
        grid = self._grids.pop()
        grid.end_row()
        self.tables.append(Table(grid.ragged, ends and grid.has_text))
