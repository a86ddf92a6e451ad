"""Made documents: descriptions, answers, the noisy teacher's omissions, unrelated seeds."""

import itertools
import json

import numpy as np
import pytest

from configs import common, documents
from oapl_jax.config import DocumentRewardConfig
from oapl_jax.data.records import Record, user
from oapl_jax.data.synthetic.documents import DocumentGenerator, answer, demonstration, question
from oapl_jax.data.synthetic.tasks import TASKS, records
from oapl_jax.errors import UserError
from oapl_jax.rewards.documents.verifier import DocumentVerifier

CONFIG = documents.get_config()
REWARDS = DocumentRewardConfig.from_dict(common.rewards().documents.to_dict())
GENERATOR = CONFIG.data.generator.to_dict()
ROWS = {"rows": [["ab", {"formula": ["frac", "x", "y"]}], ["c", "de"]]}
FORMULA = {"formula": ["frac", ["pow", "b", "2"], ["sqrt", ["sub", "a", "1"]]]}


def record(metadata):
    return Record("0", user(question(metadata)), answer(metadata), "documents", metadata)


class OmitAt:
    """Random numbers that make the teacher omit something at the given steps alone."""

    def __init__(self, *steps):
        self.steps, self.step = steps, -1

    def random(self):
        self.step += 1
        return 0.0 if self.step in self.steps else 1.0


def test_question_and_answer_by_hand():
    assert question(ROWS) == "ab|frac(x,y)/c|de="
    assert answer(ROWS) == (
        r"<table><tr><td>ab</td><td>$\frac{x}{y}$</td></tr><tr><td>c</td><td>de</td></tr></table>"
    )
    assert question(FORMULA) == "frac(pow(b,2),sqrt(sub(a,1)))="
    assert answer(FORMULA) == r"$\frac{b^{2}}{\sqrt{a_{1}}}$"


def test_omissions_of_the_noisy_teacher():
    """Steps: each cell, with its formula and its tag; the row; at last the table."""
    replaced = [  # in turn
        *(("<td>ab</td>", ""), ("ab</td>", "ab"), (r"<td>$\frac{x}{y}$</td>", ""), ("y}$", "y$")),
        *(("$</td>", "$"), ("</tr><tr>", "<tr>"), ("<td>c</td>", ""), ("c</td>", "c")),
        *(("<td>de</td>", ""), ("de</td>", "de"), ("</tr></table>", "</table>"), ("</table>", "")),
    ]
    for step, (right, wrong) in enumerate(replaced):
        rng = OmitAt(step)
        omitted = demonstration(record(ROWS), rng, 0.5)  # pyright: ignore[reportArgumentType]
        assert omitted == answer(ROWS).replace(right, wrong) != answer(ROWS)
    always = lambda metadata: demonstration(record(metadata), np.random.default_rng(0), 1.0)
    assert always(FORMULA) == r"$\frac{b^{2}{\sqrt{a_{1$"
    assert always(ROWS) == "<table><tr><tr>"


def test_the_noisy_teacher_makes_every_fault():
    verifier, rng = DocumentVerifier(REWARDS), np.random.default_rng(0)
    for made in itertools.islice(records("documents", seed=0, settings=GENERATOR), 500):
        text = demonstration(made, rng, CONFIG.warmup.noise)
        assert (verifier.verify(text, made.answer).reward == 1) == (text == made.answer)
    counts = verifier.counts()
    assert 0.35 < counts["right"] / 500 < 0.6
    assert min(counts[fault] for fault in ("unclosed", "ragged", "invalid")) > 25


def test_neighbouring_seeds_share_no_items():
    def content(seed):
        items = DocumentGenerator(seed=seed, **{**GENERATOR, "formulas_alone": 0.0})
        return {json.dumps(items[index]) for index in range(200)}

    assert content(0) == content(0)
    assert not content(0) & content(1)
    assert len(content(0)) > 195


def test_items_have_the_configured_sizes():
    items = DocumentGenerator(seed=0, **GENERATOR)
    made = [items[index]["metadata"] for index in range(500)]
    assert made == json.loads(json.dumps(made))
    tables = [m["rows"] for m in made if "rows" in m]
    assert 0.68 < len(tables) / 500 < 0.82
    assert {(len(rows), len(row)) for rows in tables for row in rows} == {(2, 2), (2, 3)}
    formulas = [sum(not isinstance(c, str) for row in rows for c in row) for rows in tables]
    assert set(formulas) == {0, 1}
    assert 0.4 < np.mean(formulas) < 0.6
    deep = DocumentGenerator(seed=0, **{**GENERATOR, "formulas_alone": 1.0, "max_depth": 3})
    depth = lambda f: 0 if isinstance(f, str) else 1 + max(map(depth, f[1:]))
    assert {depth(deep[i]["metadata"]["formula"]) for i in range(200)} == {1, 2, 3}


def test_the_items_of_the_configuration_fit_its_token_limits():
    for made in itertools.islice(records("documents", seed=1, settings=GENERATOR), 3000):
        assert len(made.question) <= CONFIG.data.max_prompt_tokens
        assert len(made.answer) < CONFIG.rollout.max_response_tokens  # and a stop token
        assert set(made.question + made.answer) <= set(TASKS["documents"].characters)


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        *(("min_rows", 0), ("max_columns", 1), ("max_letters", 0), ("max_depth", 0), ("rows", 3)),
        *(("formulas_alone", 1.5), ("formulas_in_tables", -0.5)),
    ],
)
def test_rejects_generator_settings(setting, value):
    with pytest.raises(UserError, match=rf"data\.generator.*{setting}"):
        next(records("documents", seed=0, settings={**GENERATOR, setting: value}))
