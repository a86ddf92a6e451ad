"""Kept groups: an even share, notes as computed by hand, and the viewer's columns of them."""

import json

import numpy as np
import pytest
from etils import epath
from groups import make_group
from made_runs import make_run

from oapl_jax.errors import UserError
from oapl_jax.model.tokenizer import load_tokenizer
from oapl_jax.rewards.grader import Grade
from oapl_jax.rollout.dataset import Dataset
from oapl_jax.rollout.kept import (
    NOTES,
    KeptNotes,
    fitted_points,
    keeps,
    read_notes,
    token_gaps,
)
from oapl_jax.rollout.viewer import UNKNOWN, KeptRun, TokenTexts, viewer_columns


@pytest.mark.parametrize(
    ("share", "hosts", "kept"),
    [
        (0.0, 1, []),
        (1.0, 1, list(range(12))),
        (0.25, 1, [0, 4, 8]),
        (0.5, 2, [0, 4, 8]),  # every second prompt of host 0
        (0.4, 1, [0, 2, 5, 7, 10]),
    ],
)
def test_an_even_share_of_host_0s_prompts_is_kept(share, hosts, kept):
    assert [i for i in range(12) if keeps(i, share, hosts=hosts)] == kept
    assert not any(keeps(-1 - i, share, hosts=hosts) for i in range(12))  # of a recorded dataset


def test_notes_have_the_verdicts_and_what_a_step_computed(tmp_path):
    groups = [make_group(index, size=2, longest=3) for index in (7, 8, 9)]
    notes = KeptNotes(epath.Path(tmp_path), share=0.5, hosts=1)
    grades = [Grade(1.0, "12", "right", "equal"), Grade(0.0, "x" * 9999, "wrong", "other")]
    notes.graded(groups[1].prompt, grades)
    rows = [r for group in groups for r in group.rollouts]
    logp = np.full((6, 5), 9.0, np.float32)
    for i, rollout in enumerate(rows):
        logp[i, : len(rollout.tokens)] = rollout.behavior_logp + 0.25 * i
    values = dict(log_ratio=np.arange(6) / 2, target=np.arange(6) - 2.0)
    notes.trained(groups, 3, {"logp": logp, **values})
    notes.close()
    found = read_notes(epath.Path(tmp_path), range(10))
    assert set(found) == {8}
    assert read_notes(epath.Path(tmp_path), {7, 9}) == {}
    assert found[8]["grades"] == [["12", "right", "equal"], ["x" * 2000, "wrong", "other"]]
    expected = dict(step=3, log_ratio=[1.0, 1.5], target=[0.0, 1.0], reward=[0.0, 1.0])
    assert {key: found[8][key] for key in expected} == expected
    lengths = [len(r.tokens) for r in groups[1].rollouts]
    gaps = token_gaps(found[8])
    np.testing.assert_allclose(gaps, np.repeat([0.5, 0.75], lengths), atol=1e-3)
    points = fitted_points(epath.Path(tmp_path))
    assert points.tolist() == [[1.0, 0.0, 0.0], [1.5, 1.0, 1.0]]


def test_the_last_note_counts_and_values_that_are_not_finite_are_left_out(tmp_path):
    group = make_group(0, size=2)
    notes = KeptNotes(epath.Path(tmp_path), share=1.0, hosts=1)
    logp = np.zeros((2, 9), np.float32)
    for step, value in ((1, 0.5), (2, np.nan)):
        log_ratio = np.array([value, 0.5])
        notes.trained([group], step, {"logp": logp, "log_ratio": log_ratio})
    notes.close()
    lines = [json.loads(line) for line in (tmp_path / NOTES).read_text().splitlines()]
    assert ["log_ratio" in line for line in lines] == [True, False]
    assert read_notes(epath.Path(tmp_path), {0})[0]["step"] == 2
    assert len(fitted_points(epath.Path(tmp_path))) == 0  # without targets


def test_columns_spell_the_responses_and_carry_their_gaps(tmp_path):
    workdir = make_run(tmp_path / "a", steps=3, kept=4)
    tokenizer = load_tokenizer(workdir / "model")
    run = KeptRun(
        name="a",
        directory=workdir / "rollouts",
        texts=TokenTexts(tokenizer),
        ends={0: ("trained", 0), 3: ("expired", None)},
    )
    header, arrays = viewer_columns([run], max_tokens=10**6)
    assert header["kept"] == header["shown"] == {"groups": 4, "responses": 16}
    assert [(g["state"], g["step"]) for g in header["groups"]] == [
        ("trained", 0), ("", None), ("", None), ("expired", None)
    ]  # fmt: skip
    dataset, start = Dataset(workdir / "rollouts"), 0
    rollouts = [rollout for group in dataset for rollout in group.rollouts]
    for rollout in rollouts:
        end = start + len(rollout.tokens)
        strings = [header["strings"][i] for i in arrays["tokens"][start:end]]
        assert "".join(strings) == tokenizer.decode(rollout.tokens)
        logp = np.round(rollout.behavior_logp * 1000)
        np.testing.assert_array_equal(arrays["logp"][start:end], logp)
        start = end
    assert header["responses"]["length"] == [len(r.tokens) for r in rollouts]
    assert header["responses"]["verdict"][:4] == ["right", "wrong", "wrong", "right"]
    assert start == len(arrays["tokens"]) == len(arrays["gap"])
    assert UNKNOWN not in arrays["gap"]


def test_a_group_without_notes_has_unknown_gaps(tmp_path):
    workdir = make_run(tmp_path / "a", steps=2)
    (workdir / "rollouts" / NOTES).unlink()
    run = KeptRun(name="a", directory=workdir / "rollouts", texts=TokenTexts(None), ends={})
    header, arrays = viewer_columns([run], max_tokens=10**6)
    assert set(arrays["gap"].tolist()) == {UNKNOWN}
    assert set(header["responses"]["verdict"]) == {""}
    assert all(text.startswith("⟨") for text in header["strings"])  # no tokenizer: token ids


def test_beyond_its_tokens_the_viewer_has_an_even_sample_and_counts_all(tmp_path):
    workdir = make_run(tmp_path / "a", steps=50, length=10)
    run = KeptRun(name="a", directory=workdir / "rollouts", texts=TokenTexts(None), ends={})
    header, arrays = viewer_columns([run], max_tokens=1000)  # 40 a group
    assert header["kept"] == {"groups": 100, "responses": 400}
    assert header["shown"] == {"groups": 25, "responses": 100}
    assert len(arrays["tokens"]) == 1000
    indices = [group["index"] for group in header["groups"]]
    assert (indices[0], indices[-1]) == (0, 99)
    assert max(np.diff(indices)) <= 5


def test_a_character_of_several_tokens_stands_at_the_first_of_them():
    class Bytes:
        """A tokenizer whose tokens are bytes."""

        eos_token_id = 0

        def decode(self, tokens, clean_up_tokenization_spaces):
            return bytes(tokens).decode(errors="replace")

    texts, tokens = TokenTexts(Bytes()), list("a≤b∑∞".encode())
    spelled = texts.spell(tokens)
    assert spelled[:5] == ["a", "≤", "", "", "b"]
    assert "".join(spelled) == "a≤b∑∞"
    assert texts.spell(tokens[1:3]) == ["\N{REPLACEMENT CHARACTER}", ""]  # cut off


def test_a_damaged_group_is_named(tmp_path):
    workdir = make_run(tmp_path / "a", steps=2, length=400)
    (shard,) = (workdir / "rollouts").glob("groups-*")
    content = bytearray(shard.read_bytes())
    content[200:240] = bytes(40)
    shard.write_bytes(content)
    run = KeptRun(name="a", directory=workdir / "rollouts", texts=TokenTexts(None), ends={})
    with pytest.raises(UserError, match="rollouts"):
        viewer_columns([run], max_tokens=10**6)
