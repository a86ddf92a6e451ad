"""Rewards of documents: each term by hand, the guards, and hostile responses."""

import builtins
import functools
import itertools
import re
import time
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from processes import REWARDS
from test_grader import Text, prompt, rollout

from configs import documents
from oapl_jax.config import DocumentWeights
from oapl_jax.data.prompts import PromptTemplate
from oapl_jax.data.synthetic.tasks import TASKS, records
from oapl_jax.errors import UserError
from oapl_jax.model.tokenizer import make_character_tokenizer
from oapl_jax.rewards.documents.latex import MAX_DEPTH, MAX_FORMULA, count_commands
from oapl_jax.rewards.documents.markup import MAX_COLUMNS, Table, read_document
from oapl_jax.rewards.documents.verifier import (
    LEAST,
    RANGES,
    DocumentVerifier,
    closure_term,
    normalized_sum,
    syntax_term,
    table_term,
    text_term,
)
from oapl_jax.rewards.grader import Grader, check_rewards

CONFIG = REWARDS.documents
VERIFIER = DocumentVerifier(CONFIG)
GENERATOR = documents.get_config().data.generator.to_dict()

ROWS = "<table><tr><td>ab</td><td>c</td></tr><tr><td>d</td><td>ef</td></tr></table>"
SHOWN = "\tab\tc\n\td\tef"
PIPES = "| ab | c |\n|---|:-:|\n| d | ef |"
GOOD, RAGGED = Table(ragged=False, complete=True), Table(ragged=True, complete=True)
BARE = Table(ragged=False, complete=False)


@pytest.fixture(scope="module")
def made():
    stream = records("documents", seed=5, settings=GENERATOR)
    return list(itertools.islice(stream, 200))


# Formulas


@pytest.mark.parametrize(
    ("formula", "number"),
    [
        *(("x", 0), (r"\frac{a}{b}", 1), (r"\frac ab", 1), (r"a^{2}_1", 2), (r"{}^2", 1)),
        (r"\sum_{i=1}^{n} i^2 = \frac{n(n+1)}{2}", 5),
        (r"\sqrt[3]{\alpha}", 2),
        (r"\left(\frac{a}{b}\right)", 3),
        (r"\begin{pmatrix}a&b\\c&d\end{pmatrix}", 2),
        (r"x_\text{max}\,\mathrm{d}x", 3),  # a space is no command
        (r"\operatorname{tr} A \leq \dfrac12", 3),
    ],
)
def test_formulas_and_their_commands(formula, number):
    assert count_commands(formula) == number


@pytest.mark.parametrize(
    "formula",
    [
        *(r"\frac{a}", r"\frac{a", r"\frac", "a}", "{a", r"\sqrt[3", r"\sqrt\frac ab"),  # arguments
        *("a^b^c", "a_b_c", "a^", "_", r"x^{a}_{b}^{c}", "a^_b"),  # scripts
        *(r"\left(a", r"a\right)", r"\left(a\right", r"{\left(}a\right)"),  # pairs
        r"\right)a\left(",
        *(r"\begin{matrix}a", r"\begin{matrix}a\end{pmatrix}", r"\end{matrix}"),
        *(r"\foo", r"\foo{a}", r"\begin{foo}a\end{foo}", r"\newcommand{\a}{b}\a"),  # illegal names
        *(r"\input{/etc/passwd}", r"\verb|a|", r"\include{a}", r"\def\a{b}"),
        *("a&b", "a#b", "a%b", "a$b", "a\\"),  # illegal characters
        *("", " ", "{}", r"\,", r"\frac{}{}", r"\phantom{a}", r"\quad~"),  # nothing to see
        "\u200b",
    ],
)
def test_invalid_formulas(formula):
    assert count_commands(formula) is None


def test_depth_and_length_are_bounded_before_anything_is_parsed():
    nested = lambda n: r"\sqrt{" * n + "x" + "}" * n
    assert count_commands(nested(MAX_DEPTH)) == MAX_DEPTH
    assert count_commands(nested(MAX_DEPTH + 1)) is None
    mixed = "{]" * (MAX_DEPTH + 1) + "x" + "}" * (MAX_DEPTH + 1)
    assert count_commands(mixed) is None  # a bracket of another kind closes nothing
    both = r"\sqrt[{" * (MAX_DEPTH // 2 + 1) + "x" + "}]{y}" * (MAX_DEPTH // 2 + 1)
    assert count_commands(both) is None
    assert count_commands(both[7:-5]) == MAX_DEPTH // 2
    assert count_commands("x" * MAX_FORMULA) == 0
    assert count_commands("x" * (MAX_FORMULA + 1)) is None


# Reading


@pytest.mark.parametrize(
    ("source", "tables", "open_tags", "shown"),
    [
        *((same, (GOOD,), 0, SHOWN) for same in (ROWS, PIPES, "ab|c\n-|-\nd|ef")),
        (ROWS.replace("<td>c</td>", ""), (RAGGED,), 0, "\tab\n\td\tef"),
        (PIPES.replace("| ef ", ""), (RAGGED,), 0, "\tab\tc\n\td"),
        (PIPES.replace("|:-:", ""), (), 0, "| ab | c | |---| | d | ef |"),  # a rule of one
        *((ROWS.replace(t, "", 1), (GOOD,), 1, SHOWN) for t in ("</td>", "</tr>", "<tr>")),
        (ROWS.replace("</td>", ""), (GOOD,), 4, SHOWN),
        (ROWS.replace("</table>", ""), (BARE,), 1, SHOWN),
        ("<table></table>", (BARE,), 0, ""),
        ("<table><caption>x</caption><tr><td></td></tr></table>", (BARE,), 0, "x\n\t"),
        (f"<b><i>{ROWS}</b>", (GOOD,), 1, SHOWN),
        ("a<br>b<br/>c &lt;&#100; <!-- e -->", (), 0, "a\nb\nc <d <!-- e -->"),
        ("**a** **b", (), 1, "a b"),
        ("```\na\n```\n~~b", (), 1, "a b"),
        ("</p>a", (), 1, "a"),
        ("a < b and <c", (), 0, "a < b and <c"),
        ("a|b\nc|d", (), 0, "a|b c|d"),  # no rule
        ("a<i/>b", (), 0, "ab"),
        ("\ue0000\ue001$x$", (), 0, "0$x$"),
    ],
)
def test_tags_tables_and_text(source, tables, open_tags, shown):
    found = read_document(source)
    assert (found.tables, found.open_tags, found.text) == (tables, open_tags, shown)


@pytest.mark.parametrize(
    ("rows", "ragged"),
    [
        ("<tr><td colspan=2>a</td></tr><tr><td>b</td><td>c</td></tr>", False),
        ("<tr><td colspan='3'>a</td></tr><tr><td>b</td><td>c</td></tr>", True),
        ("<tr><td rowspan=2>a</td><td>b</td></tr><tr><td>c</td></tr>", False),
        ("<tr><td rowspan=2>a</td><td>b</td></tr><tr><td>c</td><td>d</td></tr>", True),
        ("<tr><td>a</td><td ROWSPAN = 2>b</td></tr><tr><td>c</td></tr>", False),
        ("<tr><td>a</td><td rowspan=2>b</td></tr><tr><td colspan=2>c</td></tr>", True),  # one over
        ("<tr><td rowspan=3>a</td><td>b</td></tr><tr><td>c</td></tr>", True),  # beyond the end
        ("<tr><td>a</td><td>b</td><td rowspan=2>c</td></tr><tr><td>d</td></tr>", True),  # a hole
        ("<tr></tr><tr><td>a</td></tr>", True),
        ("<tr><th>a</th></tr><tr><td>b</td></tr>", False),
        ("<tr><td>a</td></tr><td>b</td><tr><td colspan=0>c</td></tr>", False),  # a row without tags
        (f"<tr>{'<td>a</td>' * MAX_COLUMNS}</tr>", False),
        (f"<tr><td colspan={MAX_COLUMNS}>a</td></tr>", False),
        (f"<tr><td>a</td><td colspan={MAX_COLUMNS}>b</td></tr>", True),
        (f"<tr><td>a{ROWS}</td><td>b</td></tr><tr><td>c</td><td>d</td></tr>", False),
    ],
)
def test_rows_have_the_columns_that_their_cells_span(rows, ragged):
    assert read_document(f"<table>{rows}</table>").tables[-1].ragged is ragged


def test_formulas_are_cut_out_before_tags_and_pipes_are_read():
    found = read_document(r"$a<b$ \(c\) \[d\] $$e$$ \$5 | $f")
    assert [f.source for f in found.formulas] == ["a<b", "c", "d", "e", "f"]
    assert [f.commands for f in found.formulas] == [0, 0, 0, 0, None]  # the last never ends
    assert read_document("a|$|b|$\n-|-\nc|d").tables == (GOOD,)
    cells = read_document("<td>$a</td><td>b$</td>")  # a closing tag ends what has no end
    assert [f.commands for f in cells.formulas] == [None, None]
    assert cells.open_tags == 0


# Terms

RICH = r"$\frac{a}{b^{2}}$"  # two commands


NO_C = ROWS.replace("<td>c</td>", "")
TERMS = {
    "syntax": functools.partial(syntax_term, plain=0.2),
    "closure": lambda response, _: closure_term(response, per_tag=0.1),
    "table": table_term,
    "text": text_term,
}
CASES = {  # response, reference, value
    "syntax": (
        (RICH, RICH, 1.0),
        (r"$\frac{a}{b}$", RICH, 1 - 0.8 / 2),
        ("$x$", RICH, 0.2),
        (r"$\frac{\frac{a}{b}}{c^{2}}$", RICH, 1.0),  # no more than the reference has
        *((response, RICH, -1.0) for response in (r"$\frac{a}{b$", r"$\foo$", "none")),
        ("$ $", RICH, -1.0),  # valid, but empty
        (f"{RICH} $a^$", RICH, (1 - 1) / 2),
        (RICH, f"{RICH} {RICH}", ((1 - 0.8 / 2) - 1) / 2),  # half of the commands, one missing
        (f"{RICH} {RICH} $x", f"{RICH} {RICH}", (1 + 1 - 1) / 3),
        *(("a", "b", 1.0), ("$x$", "b", 1.0), ("$x", "b", -1.0)),
    ),
    "closure": (
        (ROWS, "", 0.0),
        (ROWS.replace("</td>", "", 1), "", -0.1),
        (ROWS.replace("</td>", ""), "", -0.4),
        (ROWS.replace("</td>", "").replace("</tr>", "").replace("</table>", ""), "", -0.7),
        ("<b>" * 30, "", -1.0),
        ("</i>**", "", -0.2),
    ),
    "table": (
        *(("a", "b", 1.0), (ROWS, ROWS, 1.0), (PIPES, ROWS, 1.0), (ROWS, "b", 1.0)),
        *((NO_C, ROWS, 0.0), (NO_C, "b", 0.0), (ROWS.replace("</table>", ""), ROWS, 0.0)),
        ("<table><tr><td></td></tr></table>", ROWS, 0.0),  # valid, but empty
        *(("ab c", ROWS, 0.0), (ROWS, ROWS * 2, 0.5), (ROWS * 2, ROWS, 1.0)),
        (ROWS + NO_C, ROWS, 0.5),
    ),
    "text": (
        *((ROWS, ROWS, 0.0), (PIPES, ROWS, 0.0), ("a  b\n c", "<b>a</b> b c", 0.0)),
        (ROWS.replace("td>", "th>"), ROWS, 0.0),  # of tags only what they lay out counts
        (ROWS.replace(">ab", ">ax"), ROWS, -1 / 11),
        (NO_C, ROWS, -2 / 11),  # "\tc" of "\tab\tc\n\td\tef"
        (ROWS.replace("</td><td>", ""), ROWS, -2 / 11),  # cells run together
        *(("", ROWS, -1.0), ("xyz", "abc", -1.0), ("abcd", "ab", -2 / 4)),
    ),
}


@pytest.mark.parametrize("name", TERMS)
def test_terms(name):
    for response, reference, value in CASES[name]:
        found = TERMS[name](read_document(response), read_document(reference))
        assert found == pytest.approx(value), (response, reference)


def test_the_sum_is_a_share_of_its_range():
    weights = dict(syntax=1.0, closure=2.0, table=3.0, text=4.0)
    assert normalized_sum(LEAST, weights) == 0.0
    assert normalized_sum({name: high for name, (_, high) in RANGES.items()}, weights) == 1.0
    # R = -0.5 - 2 * 0.25 + 3 * 0.5 - 4 * 0.25 = -0.5, within -7 and 4.
    terms = dict(syntax=-0.5, closure=-0.25, table=0.5, text=-0.25)
    assert normalized_sum(terms, weights) == pytest.approx((-0.5 + 7) / 11)
    only = dict(syntax=0.0, closure=0.0, table=1.0, text=0.0)
    assert normalized_sum(terms, only) == 0.5


# Verdicts

BOTH = f"{ROWS} {RICH}"
ALL_FAULTS = ("unclosed", "ragged", "invalid")


@pytest.mark.parametrize(
    ("response", "faults"),
    [
        (BOTH, ()),
        (BOTH.replace("</td>", "", 1), ("unclosed",)),
        (BOTH.replace("<td>c</td>", ""), ("ragged",)),
        (BOTH.replace("}$", "$"), ("invalid",)),
        (ROWS, ("invalid",)),  # a missing one
        (BOTH.replace("<td>c</td>", "").replace("}$", "$") + "<b>", ALL_FAULTS),
        ("", ("invalid", "empty")),
        ("<b></b> $ $ ", ("invalid", "empty")),
        ("x" * 8193, ("long",)),
        (re.sub(">[a-f]+<", "><", ROWS), ("invalid", "empty")),
    ],
)
def test_faults(response, faults):
    grade = VERIFIER.verify(response, BOTH)
    assert grade.faults == faults
    assert (grade.reward == 1) == (faults == ())


EMPTY = ("", " \n", "\u200b", "<b></b>", "<table><tr><td></td></tr></table>", "$$$$", "$ $")


@pytest.mark.parametrize("response", [*EMPTY, "x" * 8193])
def test_valid_but_empty_output_gets_the_least_of_every_term(response):
    grade = VERIFIER.verify(response, BOTH)
    assert (grade.reward, dict(grade.terms)) == (0.0, LEAST)


def test_an_omission_costs_more_than_a_fault():
    """A policy must not learn to write nothing rather than something with a fault."""
    reward = lambda response: VERIFIER.verify(response, BOTH).reward
    for response in (BOTH.replace("</td>", "", 1), BOTH.replace("<td>c</td>", "")):
        assert reward(response) > reward("ab c d ef")
    assert reward(BOTH.replace("}$", "$")) > reward(ROWS)
    one_row = VERIFIER.verify(re.sub("<tr><td>d.*?</tr>", "", BOTH), BOTH)
    assert one_row.terms["table"] == 1.0  # rectangular: the text tells
    assert one_row.reward < 1


def test_weights_choose_the_terms():
    weights = DocumentWeights(syntax=0.0, closure=0.0, table=1.0, text=0.0)
    verifier = DocumentVerifier(replace(CONFIG, weights=weights))
    assert verifier.verify(ROWS.replace(">ab", ">xyz") + "<b>", ROWS).reward == 1.0
    assert verifier.verify(ROWS.replace("<td>c</td>", ""), ROWS).reward == 0.0
    constants = DocumentVerifier(replace(CONFIG, plain_formula=0.5, per_open_tag=0.4))
    terms = constants.verify("<b>$x$", RICH).terms
    assert (terms["syntax"], terms["closure"]) == (0.5, -0.4)
    weights = replace(weights, table=0.0)
    with pytest.raises(UserError, match=r"rewards\.documents\.weights"):
        DocumentVerifier(replace(CONFIG, weights=weights))


def test_the_reference_has_the_highest_reward_and_nothing_else_of_another_text_has_it(made):
    """Over random edits of made documents, and over other documents."""
    rng = np.random.default_rng(0)
    for record, other in itertools.pairwise(made):
        assert VERIFIER.verify(record.answer, record.answer).reward == 1.0
        assert 0 <= VERIFIER.verify(other.answer, record.answer).reward < 1
        edited = edit(record.answer, rng)
        grade = VERIFIER.verify(edited, record.answer)
        assert all(low <= grade.terms[name] <= high for name, (low, high) in RANGES.items())
        assert 0 <= grade.reward <= 1
        same = read_document(edited).text == read_document(record.answer).text
        assert (grade.reward == 1) == (same and not grade.faults)


def edit(document, rng):
    """The document with some characters left out, doubled or replaced."""
    characters = list(document)
    for place in rng.integers(len(characters), size=rng.integers(1, 4)):
        other = str(rng.choice(list("<>/td$\\{}a")))
        characters[place] = ("", characters[place] * 2, other)[rng.integers(3)]
    return "".join(characters)


# Hostile responses

MANY = 8192
PIECES = [
    *("<", "<a ", "<a>", "</a>", "</", "<!--", "<![", "<a b='", '<a b="c" ', "<script>", "<a ="),
    *("&", "&#", "&amp;", "&#x10ffff;", "<br/>", "<td><table>", "<tr>", "<table>", "</table>"),
    *("$", "$$", "\\(", "\\[", "\\", "{", "}", "{}", "{]", "^", "$a", "$</", "$x$", "\\left"),
    *("|", "|-|\n", "a|b\n-|-\n", "**", "`", "# ", " ", "\n", "\t", " \n", "<a/", "\\frac"),
    *("\\begin{a}", "\\begin{matrix}", "\\sqrt[", "\\text{$", "\\verb|", "\ue000", "\ue0000\ue001"),
    *("\0", "\ud800", "\u2028", "\u200b", "\U0010ffff", "é"),
    "<td colspan=9999 rowspan=9999>",
]
HOSTILE = {
    **{repr(piece): (piece * MANY)[:MANY] for piece in PIECES},
    **{f"formula of {piece!r}": f"${(piece * MANY)[: MAX_FORMULA - 2]}$" for piece in PIECES},
    "a million characters": "<td>" * 250_000,
    "digits beyond int()": f"&#{'1' * 5000};",
    "digits of a span": f"<table><tr><td colspan={'9' * 5000}>",
    "spans over spans": "<table>" + "<tr><td rowspan=99 colspan=99>" * 250,
    "wide and long": "<table><tr>" + "<td rowspan=100 colspan=100></td>" * 2 + "<tr>" * 2000,
    "closing the first": "<a>" * 1300 + "</b>" * 1000,
    "an empty stand-in": "&#xe000;0&#xe001;$x$&#xe000;99999999999999999999&#xe001;",
    "a file": r"$\input{/etc/passwd}$",
    "a program": r"$\immediate\write18{touch owned}$ <script>open('owned')</script>",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_text_is_read_quickly_and_is_not_right(name):
    """By processor time, which other programs do not lengthen."""
    start = time.thread_time()
    grade = VERIFIER.verify(HOSTILE[name], BOTH)
    assert time.thread_time() - start < 1
    assert grade.reward < 0.6


def test_random_text_never_raises(made):
    rng = np.random.default_rng(1)
    parts = [*PIECES, *ROWS, *RICH, "<td>", "</td>", "<tr>", "colspan=2", "&lt;", "word", "|", "\n"]
    for record in made:
        response = "".join(rng.choice(np.array(parts, object), rng.integers(1, 60)))
        grade = VERIFIER.verify(response, record.answer)
        assert 0 <= grade.reward < 1


def test_nothing_is_executed_or_opened(monkeypatch):
    VERIFIER.verify(BOTH, BOTH)  # what is imported late
    called = []

    def forbidden(*words, **__):
        called.append(words)
        raise AssertionError("model text was executed")

    with monkeypatch.context() as patch:
        for name in ("eval", "exec", "compile", "open"):
            patch.setattr(builtins, name, forbidden)
        for response in HOSTILE.values():
            VERIFIER.verify(response, BOTH)
    assert called == []  # a verifier may have caught what was raised


# In a run


def test_the_grader_counts_responses_and_faults():
    grader = Grader(Text(), REWARDS)
    asked = prompt("documents", ROWS)
    assert grader.metrics() == {}
    assert grader.reward(asked, rollout(ROWS)) == 1.0
    one_open = grader.reward(asked, rollout(ROWS.replace("</tr>", "", 1)))
    # 0.25 * 0.1 of closure, of a range of 2 * 0.25 + 0.25 + 0.25 + 1.
    assert one_open == pytest.approx(1 - 0.025 / 2)
    assert 0 < grader.reward(asked, rollout("<table><tr><td>ab</td></tr><tr>")) < one_open
    assert grader.reward(asked, rollout("")) == 0.0
    assert grader.reward(asked, rollout(ROWS, "length")) == 0.0  # cut off, and not counted
    assert grader.metrics() == {
        "rewards/documents/graded": 4,
        "rewards/documents/right": 1,
        "rewards/documents/unclosed": 2,
        "rewards/documents/ragged": 1,
        "rewards/documents/empty": 1,
    }
    assert grader.final_answer(asked, rollout(ROWS)) == ROWS
    grader.close()


def test_the_self_check_passes_these_rewards_and_refuses_lenient_ones(made, tmp_path):
    tokenizer = make_character_tokenizer(TASKS["documents"].characters, tmp_path)
    template = PromptTemplate(tokenizer, task="documents", max_prompt_tokens=32, instruction="")
    check_rewards(Grader(tokenizer, REWARDS), template, made)
    with pytest.raises(UserError, match="is wrong"):
        check_rewards(SimpleNamespace(function=None, reward=lambda *_: 1.0), template, made)
    short = replace(REWARDS, documents=replace(CONFIG, max_characters=5))
    with pytest.raises(UserError, match="is right"):
        check_rewards(Grader(tokenizer, short), template, made)
