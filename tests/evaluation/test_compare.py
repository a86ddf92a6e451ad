"""Two results compared: numbers worked out by hand, refusals by name, and what people see."""

import copy
import json
import sys

import numpy as np
import pytest
from etils import epath
from matplotlib.figure import Figure

from oapl_jax import evaluate
from oapl_jax.errors import UserError
from oapl_jax.evaluation import report
from oapl_jax.evaluation.benchmark import FORMAT
from oapl_jax.evaluation.compare import compare, read_result, table
from oapl_jax.evaluation.estimators import interval, intervals, pass_curve

IDS = ("a", "b", "c", "d", "e")
CORRECT_A, CORRECT_B = (0, 1, 2, 4, 0), (1, 1, 4, 3, 2)
MAJORITY_A, MAJORITY_B = (0, 0, 0.5, 1, 0), (0, 0, 1, 1, 1)


def make_result(correct, majority, *, ids=IDS, n=4, version=3):
    """The part of a result that a comparison and a report read."""
    curves = np.array([pass_curve(n, c) for c in correct])
    low, high = intervals(curves, np.ones((len(ids), 1)), resamples=200, seed=0)
    measured = {"value": 0.5, "low": 0.25, "high": 0.75}
    return {
        "format": FORMAT,
        "about": {
            **dict(benchmark="contest", version=version, weights="abcdef" * 10, sampler="local"),
            **dict(temperature=1.0, top_p=0.95, top_k=0, max_response_tokens=64),
        },
        "graded": {"answers": "y", "grader": "z", "libraries": {}},
        "problems": len(ids),
        "left_out": 1,
        "samples": n,
        "pass@k": dict(value=curves.mean(axis=0).tolist(), low=low.tolist(), high=high.tolist()),
        **dict.fromkeys(("avg@n", "maj@n", "truncated", "entropy"), measured),
        "verdicts": {"answers/right": 3, "answers/timeout": 1} if version == 3 else {},
        "length": {"value": 12.25, "low": 10.0, "high": 15.0},
        "bootstrap": {"resamples": 200, "seed": 0},
        "seconds": {"sampling": 12.6, "grading": 0.2},
        "per_problem": [
            {"id": name, "correct": c, "majority": majority[i]}
            for i, (name, c) in enumerate(zip(ids, correct, strict=True))
        ],
    }


A = make_result(CORRECT_A, MAJORITY_A)
B = make_result(CORRECT_B, MAJORITY_B, version=9)


def test_a_comparison_has_the_numbers_worked_out_by_hand():
    found = compare(A, B, resamples=1000, seed=4)
    assert found == json.loads(json.dumps(found))
    curve = {name: values[0] for name, values in found["pass@k"].items()}
    assert [curve[name] for name in ("a", "b", "value")] == pytest.approx([7 / 20, 11 / 20, 4 / 20])
    # |+-1 +-2 +-1 +-2| reaches 4 if the 2s agree and the 1s are not both against them: 6 of 16.
    assert curve["p"] == 6 / 16
    curves = [np.array([pass_curve(4, c) for c in side]) for side in (CORRECT_A, CORRECT_B)]
    for k, differences in enumerate((curves[1] - curves[0]).T):
        values = [found["pass@k"][name][k] for name in ("value", "low", "high")]
        ends = interval(differences, resamples=1000, seed=4)
        assert values == pytest.approx([differences.mean(), *ends])
    assert found["pass@k"]["p"][3] == 2 / 4  # two problems are gained at k = 4: ++ and -- of 4
    assert found["maj@n"]["value"] == pytest.approx(1.5 / 5)
    assert found["maj@n"]["p"] == 2 / 4
    assert (found["better"], found["worse"], found["equal"]) == (3, 1, 1)
    assert (found["problems"], found["samples"], found["versions"]) == (5, 4, [3, 9])
    assert found["same_grader"] is True
    backwards = make_result(CORRECT_B[::-1], MAJORITY_B[::-1], ids=IDS[::-1], version=9)
    assert compare(A, backwards, resamples=1000, seed=4) == found  # problems are paired by name
    other = compare(A, changed(B, graded__grader="new"), resamples=1000, seed=4)
    assert other["same_grader"] is False
    assert len(table(other).splitlines()) == len(table(found).splitlines()) + 1


def changed(result, **values):
    result = copy.deepcopy(result)
    for path, value in values.items():
        section, name = path.split("__")
        result[section][name] = value
    return result


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (make_result((1, 1, 1), (1, 1, 1), ids=("a", "b", "x")), "3 .*1 "),
        (changed(B, about__temperature=0.6), "temperature: 1.0 -> 0.6"),
        (changed(B, about__top_p=1.0, about__top_k=20), "top_p: 0.95 -> 1.0; top_k: 0 -> 20"),
        (changed(B, about__max_response_tokens=32), "max_response_tokens: 64 -> 32"),
        (make_result(CORRECT_B, MAJORITY_B, n=8), "samples: 4 -> 8"),
        (changed(B, graded__answers="corrected"), "answers"),
    ],
)
def test_different_settings_are_rejected_by_name(other, words):
    with pytest.raises(UserError, match=words):
        compare(A, other, resamples=100, seed=0)


@pytest.mark.parametrize("content", [None, "", "[]", "{}", '{"format": "other"}'])
def test_an_invalid_result_file_is_rejected(tmp_path, content):
    path = epath.Path(tmp_path / "a.json")
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserError, match=r"a\.json"):
        read_result(path)


def test_the_table_has_a_column_for_each_benchmark():
    lines = report.markdown({"contest": A, "other": B}).splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[:-2]]
    assert rows[0] == ["", "contest", "other"]
    cells = {name: cells for name, *cells in rows[2:]}
    low, high = A["pass@k"]["low"][1], A["pass@k"]["high"][1]
    assert cells["pass@2"][0] == f"{A['pass@k']['value'][1]:.3f} [{low:.3f}, {high:.3f}]"
    assert list(cells)[:5] == ["pass@1", "pass@2", "pass@4", "avg@4", "maj@4"]
    assert cells["tokens of a response"] == ["12.2 [10.0, 15.0]"] * 2
    assert cells["seconds of sampling"] == ["13", "13"]
    assert cells["verdicts"] == ["answers/right 3, answers/timeout 1", "-"]
    assert cells["dropped, too long"] == ["1", "1"]
    assert "abcdefabcdef" in lines[-1]  # the weights
    assert [report.powers_of_two(n) for n in (1, 2, 5)] == [[1], [1, 2], [1, 2, 4, 5]]


def test_the_picture_has_the_curves_and_their_bands(tmp_path, monkeypatch):
    figure = Figure()
    monkeypatch.setattr(report, "Figure", lambda figsize: figure)
    panels = {"contest": {"before": A, "after": B}, "other": {"": B}}
    report.plot(panels, epath.Path(tmp_path / "x.png"))
    for axis, results in zip(figure.axes, panels.values(), strict=True):
        for line, band, result in zip(axis.lines, axis.collections, results.values(), strict=True):
            curve = result["pass@k"]
            assert line.get_xdata().tolist() == [1, 2, 3, 4]
            assert line.get_ydata().tolist() == curve["value"]
            corners = {tuple(corner) for corner in band.get_paths()[0].vertices.tolist()}
            for k, *ends in zip((1, 2, 3, 4), curve["low"], curve["high"], strict=True):
                assert {(k, end) for end in ends} <= corners


def test_the_command_compares_two_files(tmp_path, monkeypatch, capsys):
    for name, result in (("a", A), ("b", B)):
        (tmp_path / f"{name}.json").write_text(json.dumps(result))
    files = f"--compare={tmp_path / 'a.json'},{tmp_path / 'b.json'}"
    monkeypatch.setattr(sys, "argv", ["oapl_jax.evaluate", files, f"--to={tmp_path / 'to'}"])
    evaluate.main()
    output = capsys.readouterr().out
    found = json.loads(output.splitlines()[-1])
    assert found == json.loads((tmp_path / "to" / "comparison.json").read_text())
    assert found == compare(A, B, resamples=20_000, seed=0)
    assert all(shown in output for shown in ("pass@1", "0.350", "0.550", "+0.200"))
    assert (tmp_path / "to" / "comparison.png").read_bytes().startswith(b"\x89PNG")
