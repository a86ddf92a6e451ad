"""Grades that follow the responses and the grader, and a result worked out by hand."""

import dataclasses
import json
import threading

import numpy as np
import pytest
from etils import epath
from groups import Killed, make_prompts

from oapl_jax.errors import UserError
from oapl_jax.evaluation import benchmark
from oapl_jax.evaluation.benchmark import Grades, Samples, grader_identity, measure
from oapl_jax.evaluation.estimators import interval
from oapl_jax.rewards.grader import Grade
from oapl_jax.rollout.dataset import Dataset, DatasetWriter
from oapl_jax.structs import Group, Rollout

ABOUT = {"version": 5, "pair": (1, 2)}


def rollout(tokens, *, logp=-0.5, cut=False):
    logps = np.full(len(tokens), logp, np.float32)
    return Rollout(np.array(tokens, np.int32), logps, 5, "length" if cut else "stop")


def respond(directory, requests, *, logp=-0.5):
    """Writes groups: (row, start, rollouts or their number); a sample's tokens are its place."""
    prompts, directory = make_prompts(3), epath.Path(directory / "r")
    writer = DatasetWriter(directory, ABOUT, groups_per_shard=3, weights_digest=lambda version: "w")
    for row, start, rollouts in requests:
        if isinstance(rollouts, int):
            rollouts = [rollout([row, start + j], logp=logp - j) for j in range(rollouts)]
        prompt = dataclasses.replace(prompts[row], stream_index=start * len(prompts) + row)
        writer.add(Group(prompt, tuple(rollouts), np.full(len(rollouts), np.nan, np.float32)))
    writer.flush()
    writer.close()


FIVE = [(row, start, min(2, 5 - start)) for start in (0, 2, 4) for row in range(3)]


def as_graded(rewards, answers):
    """Texts and grades of responses."""
    verdicts = ["right" if reward >= 1 else "wrong" for reward in rewards]
    grades = map(Grade, rewards, answers, verdicts, [f"reward {reward}" for reward in rewards])
    return [f"so {answer}" for answer in answers], list(grades)


class Judge:
    """A sample is right if its index is even; its answer is its row. Counts what it is asked."""

    def __init__(self, lives=10**9):
        self.asked, self._lives = 0, lives

    def __call__(self, prompt, rollouts):
        if not self._lives:
            raise Killed
        self._lives -= 1
        self.asked += len(rollouts)
        return as_graded(
            [float(r.tokens[1] % 2 == 0) for r in rollouts],
            [f"{prompt.answer}: {r.tokens[0]}, {r.tokens[1] // 3}" for r in rollouts],
        )


def grade(directory, judge, *, n=5, about=None, threads=1, asked=None):
    prompts, dataset = make_prompts(3), Dataset(epath.Path(directory / "r"))
    samples = Samples(dataset, prompts=3, n=n)
    grades = Grades(epath.Path(directory / "g"), about or {"format": "g"}, prompts, samples.logp)
    counts = asked or (lambda: {"asked": getattr(judge, "asked", 0)})
    try:
        grades.fill(dataset, judge, counts, threads=threads, progress=lambda done: None)
    finally:
        grades.close()
    return grades, samples


@pytest.mark.parametrize("lives", range(9))
def test_grading_goes_on_where_it_was_killed(tmp_path, lives):
    respond(tmp_path, FIVE)
    with pytest.raises(Killed):
        grade(tmp_path, Judge(lives))
    graded, _ = grade(tmp_path, judge := Judge(), threads=3)
    assert judge.asked <= 2 * (9 - lives)
    assert graded.graded.all()
    assert graded.correct.tolist() == [[True, False, True, False, True]] * 3
    assert graded.answers[1] == ["1: 1, 0"] * 3 + ["1: 1, 1"] * 2
    for cut, asked in ((-3, {1, 2}), (5, {15})):  # in the middle of the last and the first line
        (tmp_path / "g").write_bytes((tmp_path / "g").read_bytes()[:cut])
        assert (grade(tmp_path, judge := Judge())[0].correct == graded.correct).all()
        assert judge.asked in asked


def test_a_line_has_text_beside_ids(tmp_path):
    respond(tmp_path, [(0, 0, 2)])
    grade(tmp_path, Judge(), n=2)
    line = json.loads((tmp_path / "g").read_text().splitlines()[1])
    assert {name: line[name] for name in ("prompt", "question", "response", "answer")} == {
        "prompt": "id0",
        "question": "What is 0?",
        "response": ["so 0: 0, 0", "so 0: 0, 0"],
        "answer": ["0: 0, 0", "0: 0, 0"],
    }
    assert line["verdict"] == ["right", "wrong"]
    assert line["reason"] == ["reward 1.0", "reward 0.0"]


def test_more_samples_need_their_grades_only(tmp_path):
    respond(tmp_path, [(row, 0, 4) for row in range(3)])
    assert grade(tmp_path, judge := Judge(), n=3)[0].correct.sum() == 3 * 2
    assert judge.asked == 12  # a group is graded whole
    assert grade(tmp_path, judge := Judge(), n=2)[0].graded.all()
    assert judge.asked == 0
    respond(tmp_path, [(row, 4, 2) for row in range(3)])
    assert grade(tmp_path, judge := Judge(), n=6)[0].graded.all()
    assert judge.asked == 12 + 6


def test_grades_and_verdicts_are_those_of_these_responses_by_this_grader(tmp_path):
    respond(tmp_path, FIVE)
    (judge := Judge()).asked = 100  # by another benchmark before
    assert grade(tmp_path, judge, threads=2)[0].verdicts == {"asked": 15}
    assert grade(tmp_path, Judge())[0].verdicts == {"asked": 15}
    for path in (tmp_path / "r").iterdir():
        path.unlink()
    respond(tmp_path, FIVE, logp=-7)  # others in the same places
    for asked in (15, 0):
        assert grade(tmp_path, judge := Judge())[0].graded.all()
        assert judge.asked == asked
    other = lambda prompt, rollouts: as_graded([1.0] * len(rollouts), ["same"] * len(rollouts))
    assert grade(tmp_path, other)[0].correct.sum() == 9  # the file stands
    graded, _ = grade(tmp_path, other, about={"format": "g", "grader": "new"})
    assert graded.correct.all()
    assert graded.answers == [["same"] * 5] * 3
    assert (tmp_path / "g").read_text().count("\n") == 1 + 9


def test_groups_are_graded_beside_each_other(tmp_path):
    respond(tmp_path, [(row, 0, 2) for row in range(3)])
    together = threading.Barrier(3, timeout=20)

    def judge(prompt, rollouts):
        together.wait()
        return as_graded([1.0] * len(rollouts), [""] * len(rollouts))

    assert grade(tmp_path, judge, n=2, threads=3)[0].correct.all()


LINE = {"prompt": "id0", "start": 0, "logp": [-1.0], "reward": [1.0], "answer": ["a"]}
LINE |= {"verdicts": {}, "seconds": 0.5}


@pytest.mark.parametrize(
    "line", ["{]", "[]", *(json.dumps({k: v for k, v in LINE.items() if k != x}) for x in LINE)]
)
def test_a_damaged_file_is_refused(tmp_path, line):
    respond(tmp_path, [(0, 0, 1)])
    (tmp_path / "g").write_text(f'{{"format": "g"}}\n{line}\n')
    with pytest.raises(UserError, match="line 2 of"):
        grade(tmp_path, Judge(), n=1)


def test_a_grade_is_decided_by_answers_code_libraries_and_settings(monkeypatch, tmp_path):
    prompts = make_prompts(3)
    about = grader_identity(prompts, {})
    assert about == json.loads(json.dumps(about))
    assert set(about["libraries"]) == set(benchmark.LIBRARIES)
    assert grader_identity(prompts[::-1], {"math": {"seconds": 5}}) == about
    other = dataclasses.replace(prompts[0], answer="another answer")
    assert grader_identity([other, *prompts[1:]], {})["answers"] != about["answers"]
    (tmp_path / "deep").mkdir()
    for path, text, same in (
        ("__init__.py", "", False),
        ("deep/a.py", "x = 1\n", False),
        ("deep/a.py", "# a comment\nx  = 1\n", True),
        ("deep/a.py", "x = 2\n", False),
    ):
        (tmp_path / path).write_text(text)
        monkeypatch.setattr(benchmark.rewards, "__file__", str(tmp_path / "__init__.py"))
        before, about = about, grader_identity(prompts, {})
        assert (before["grader"] == about["grader"]) == same
        assert before["answers"] == about["answers"]
    sums = [dataclasses.replace(prompt, task="math") for prompt in prompts]
    of = lambda **settings: grader_identity(sums, {"math": settings, "code": {"parallel": 2}})
    assert of(seconds=5, processes=2, packages=(1,)) == of(seconds=5, processes=9, packages=(1,))
    assert of(seconds=5)["settings"] == {"seconds": 5}


def test_a_reward_function_identifies_the_grader_by_name_and_code(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(tmp_path)
    module = tmp_path / "identified_rewards.py"
    found = []
    for body in ("0", "0  # as before", "1"):
        module.write_text(
            f"def reward(record, response): return {body}\ndef other(r, s): return 2\n"
        )
        for name in ("reward", "other"):
            settings = {"function": f"identified_rewards:{name}", "math": {"seconds": 5}}
            about = grader_identity(make_prompts(2), settings)
            found.append(json.dumps(about))
    assert found[0] == found[2] != found[4]
    assert found[0] != found[1] == found[3]


BY_HAND = {  # tokens, log-probability of each token, cut off; whether right, and what it answers
    "id0": [
        *[([1], -0.5, False, 1, "a")] * 2,
        ([1], -0.5, False, 0, "b"),
        ([1, 1, 1], -0.5, True, 0, "c"),
    ],
    "id1": [
        ([1, 1], -2.0, False, 0, "x"),
        ([1, 1], -0.5, False, 0, "x"),
        ([1], -0.5, False, 1, "b"),
        ([1], -0.5, True, 0, "b"),
    ],
    "id2": [([1], -0.5, False, 0, "x")] * 4,
}


def test_a_result_has_the_numbers_worked_out_by_hand(tmp_path):
    of = lambda samples: [rollout(t, logp=logp, cut=cut) for t, logp, cut, _, _ in samples]
    respond(tmp_path, [(row, 0, of(samples)) for row, samples in enumerate(BY_HAND.values())])
    judge = lambda p, rs: as_graded(
        [(s[3] + 1) / 2 for s in BY_HAND[p.id]], [s[4] for s in BY_HAND[p.id]]
    )
    grades, samples = grade(tmp_path, judge, n=4, asked=lambda: {"late": 2})  # from before
    options = dict(about=ABOUT, dropped=2, resamples=200, seed=3)
    result = measure(make_prompts(3), samples, grades, **options)
    json.dumps(result, allow_nan=False)
    by_problem = {
        "pass@1": [2 / 4, 1 / 4, 0],
        "pass@2": [5 / 6, 3 / 6, 0],
        "pass@3": [1, 3 / 4, 0],
        "pass@4": [1, 1, 0],
        "avg@n": [2 / 4, 1 / 4, 0],
        "maj@n": [1, 1 / 2, 0],
        "length": [6 / 4, 6 / 4, 1],
        "truncated": [1 / 4, 1 / 4, 0],
    }
    assert [len(result["pass@k"][part]) for part in ("value", "low", "high")] == [4] * 3
    for k in range(1, 5):
        result[f"pass@{k}"] = {part: curve[k - 1] for part, curve in result["pass@k"].items()}
    for name, values in by_problem.items():
        found = [result[name][part] for part in ("value", "low", "high")]
        ends = interval(np.array(values), resamples=200, seed=3)
        assert found == pytest.approx([np.mean(values), *ends]), name
    assert result["entropy"]["value"] == pytest.approx((0.5 * 14 + 2.0 * 2) / 16)
    assert 0.5 <= result["entropy"]["low"] < result["entropy"]["high"] <= 1
    counts = dict(problems=3, samples=4, left_out=2, about=ABOUT, verdicts={})
    assert {name: result[name] for name in counts} == counts
    counts = dict(correct=1, majority=0.5, tokens=6, truncated=1, logp=-6.0)
    assert result["per_problem"][1] == {"id": "id1", **counts}


def test_one_process_at_a_time_grades(tmp_path):
    def judge(prompt, rollouts):
        with pytest.raises(UserError, match="another process"):
            grade(tmp_path, Judge())
        return as_graded([1.0] * len(rollouts), [""] * len(rollouts))

    respond(tmp_path, FIVE)
    assert grade(tmp_path, judge)[0].correct.all()
