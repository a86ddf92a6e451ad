"""Every sample once, whatever the sampler does and whenever it is killed; grades that follow the
responses and the grader; and a result worked out by hand."""

import contextlib
import dataclasses
import itertools
import json
import threading

import numpy as np
import pytest
from etils import epath

from oapl_jax.errors import RunError, UserError
from oapl_jax.evaluation import grades
from oapl_jax.evaluation.benchmark import measure, missing, sample
from oapl_jax.evaluation.estimators import interval
from oapl_jax.evaluation.grades import Grades
from oapl_jax.evaluation.responses import Responses
from oapl_jax.rollout.sampler import Sampled, Sampling
from oapl_jax.structs import Prompt, Rollout

SAMPLING = Sampling(1.0, 1.0, 0, 4)
VERSION = 5
ABOUT = {"format": "some responses", "version": VERSION, "prompts": "abc", "pair": (1, 2)}
PATIENCE = 20.0  # seconds until a test gives up


class Killed(Exception):
    pass


def make_prompts(count):
    tokens = np.zeros(1, np.int32)
    return [Prompt(f"id{i}", 7 * i, tokens, "", f"{i}", "t") for i in range(count)]


def rollout(tokens, *, logp=-0.5, version=VERSION, cut=False):
    logps = np.full(len(tokens), logp, np.float32)
    return Rollout(np.array(tokens, np.int32), logps, version, "length" if cut else "stop")


class ScriptedSampler:
    """A sample is its draw and index; they come in an order that a seed draws.

    `fails` and `stale` are prompts; it is killed when it has yielded `lives` times.
    """

    def __init__(self, seed=0, fails=(), stale=(), lives=10**9):
        self._rng = np.random.default_rng(seed)
        self._fails, self._stale, self._lives = fails, stale, lives
        self.asked = []

    def generate(self, prompts, *, n, sampling):
        assert sampling == SAMPLING
        prompts = list(prompts)
        self.asked += [(p.stream_index, n) for p in prompts]
        for i in self._rng.permutation(len(prompts)):
            if not self._lives:
                raise Killed
            self._lives -= 1
            prompt = prompts[i]
            version = VERSION - (prompt.id in self._stale)
            rollouts = [
                rollout(
                    [prompt.stream_index, j], logp=-prompt.stream_index - j / 8, version=version
                )
                for j in range(n)
            ]
            yield Sampled(prompt, () if prompt.id in self._fails else tuple(rollouts), "s", 0.1)


def fill(path, sampler, *, prompts=3, n=5, at_once=2, about=ABOUT, seen=None):
    """Samples what is missing, and returns (tokens of each sample, by prompt)."""
    prompts = make_prompts(prompts)
    responses = Responses(epath.Path(path), about, prompts, n=n)
    try:
        sample(
            sampler,
            prompts,
            responses,
            at_once=at_once,
            version=VERSION,
            sampling=SAMPLING,
            progress=[].append if seen is None else seen.append,
        )
    finally:
        responses.close()
    return contents(path, prompts, n, about)


def contents(path, prompts, n, about=ABOUT):
    responses = Responses(epath.Path(path), about, prompts, n=n)
    found = {prompt.id: [None] * n for prompt in prompts}
    for prompt_id, start, rollouts in responses.rollouts():
        for index, one in enumerate(rollouts, start):
            if index < n:
                assert found[prompt_id][index] is None
                found[prompt_id][index] = one.tokens.tolist()
    responses.close()
    return found


def samples(found):
    return [tuple(tokens) for of_prompt in found.values() for tokens in of_prompt]


# Which samples are missing


def test_requests_cover_what_is_missing_and_nothing_else():
    rng = np.random.default_rng(0)
    for at_once in (1, 2, 3, 8):
        for _ in range(50):
            there = rng.random((3, 7)) < rng.random()
            after = there.astype(int)
            for start, row, count in missing(there, at_once):
                assert 1 <= count <= at_once
                after[row, start : start + count] += 1
            assert (after == 1).all()
    assert list(missing(np.zeros((2, 5), bool), 2)) == [
        *((0, 0, 2), (0, 1, 2), (2, 0, 2), (2, 1, 2), (4, 0, 1), (4, 1, 1))
    ]


@pytest.mark.parametrize("at_once", [1, 2, 3, 5, 99])
def test_every_prompt_gets_exactly_n_with_random_numbers_of_their_own(tmp_path, at_once):
    sampler, seen = ScriptedSampler(), []
    found = fill(tmp_path / "r", sampler, at_once=at_once, seen=seen)
    assert len(samples(found)) == len(set(samples(found))) == 15
    assert {n for _, n in sampler.asked} <= set(range(1, min(at_once, 5) + 1))
    assert seen[-1] == 15
    assert seen == sorted(seen)
    assert fill(tmp_path / "r", again := ScriptedSampler(), at_once=at_once) == found
    assert again.asked == []


@pytest.mark.parametrize("lives", range(9))
def test_killed_it_ends_with_the_same_samples(tmp_path, lives):
    """At every line, and then in the middle of one."""
    unbroken = fill(tmp_path / "unbroken", ScriptedSampler())
    path = tmp_path / "r"
    with pytest.raises(Killed):
        fill(path, ScriptedSampler(seed=lives, lives=lives))
    whole = path.read_bytes()
    assert whole.count(b"\n") == 1 + lives
    with contextlib.suppress(Killed):  # the ninth line is the last
        fill(path, ScriptedSampler(seed=lives, lives=1))
    line = path.read_bytes()[len(whole) :]
    for cut in (1, len(line) // 2, len(line) - 1):
        path.write_bytes(whole + line[:cut])
        sampler = ScriptedSampler(seed=lives + 1)
        assert fill(path, sampler) == unbroken
        assert len(sampler.asked) == 9 - lives  # what was there is not sampled again


@pytest.mark.parametrize("size", [0, 1, 30])
def test_killed_in_the_first_line_it_begins_anew(tmp_path, size):
    path = tmp_path / "r"
    path.write_bytes(json.dumps(ABOUT).encode()[:size])
    assert fill(path, ScriptedSampler()) == fill(tmp_path / "other", ScriptedSampler())


def test_n_may_be_raised_and_lowered_and_the_first_samples_stay(tmp_path):
    path = tmp_path / "r"
    three = fill(path, ScriptedSampler(), n=3, at_once=2)
    eight = fill(path, sampler := ScriptedSampler(), n=8, at_once=4)
    assert {name: found[:3] for name, found in eight.items()} == three
    assert sum(n for _, n in sampler.asked) == 3 * 5
    assert len(set(samples(eight))) == 24  # no two from the same draw and index
    before = path.read_bytes()
    assert fill(path, sampler := ScriptedSampler(), n=2) == {k: v[:2] for k, v in eight.items()}
    assert sampler.asked == []
    assert path.read_bytes() == before


@pytest.mark.parametrize("kind", ["fails", "stale"])
def test_what_could_not_be_sampled_is_missing_until_it_is(tmp_path, kind):
    with pytest.raises(RunError, match=r"10 of 15 responses could not be sampled from version 5"):
        fill(tmp_path / "r", ScriptedSampler(**{kind: ("id0", "id2")}))
    again = ScriptedSampler()
    assert len(samples(fill(tmp_path / "r", again))) == 15
    assert sum(n for _, n in again.asked) == 10


# What a file may hold


def test_responses_of_another_kind_are_refused_by_name(tmp_path):
    fill(tmp_path / "r", ScriptedSampler())
    before = (tmp_path / "r").read_bytes()
    words = r"about something else \(version: 5 -> 6; prompts: abc -> x\).* --to"
    with pytest.raises(UserError, match=words):
        fill(tmp_path / "r", None, about={**ABOUT, "version": 6, "prompts": "x"})
    with pytest.raises(UserError, match=r"line 1 .*format is 'some responses', not 'new'"):
        fill(tmp_path / "r", None, about={**ABOUT, "format": "new"})
    assert (tmp_path / "r").read_bytes() == before


LINE = {
    "prompt": "id0",
    "start": 0,
    "tokens": [[1], [2]],
    "logp": [0.0, 0.0],
    "finish": ["stop", "stop"],
    "server": "s",
    "seconds": 0.5,
}


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        (["{]"], "line 2 .* is damaged"),
        (["[]"], "line 2 .*no object"),
        ([json.dumps(LINE), json.dumps({**LINE, "start": 1})], "line 3 .* there already"),
        ([json.dumps({**LINE, "prompt": "id9"})], "line 2 .*id9"),
        ([json.dumps({**LINE, "start": -1})], "line 2"),
        ([json.dumps({**LINE, "logp": [0.0]})], "line 2"),
        ([json.dumps({**LINE, "finish": ["stop"]})], "line 2"),
        ([json.dumps({k: v for k, v in LINE.items() if k != "seconds"})], "line 2 .*seconds"),
    ],
)
def test_a_damaged_file_is_refused(tmp_path, lines, words):
    path = tmp_path / "r"
    path.write_text("".join(f"{line}\n" for line in [json.dumps(ABOUT), *lines]))
    with pytest.raises(UserError, match=words):
        fill(path, None)


def test_one_process_at_a_time_writes(tmp_path):
    path, prompts = epath.Path(tmp_path / "r"), make_prompts(1)
    first = Responses(path, ABOUT, prompts, n=1)
    with pytest.raises(UserError, match=r"another process is writing .*/r"):
        Responses(path, ABOUT, prompts, n=1)
    first.close()
    Responses(path, ABOUT, prompts, n=1).close()


def test_a_log_probability_that_is_no_number_ends_it(tmp_path):
    responses = Responses(epath.Path(tmp_path / "r"), ABOUT, make_prompts(1), n=1)
    with pytest.raises(RunError, match="not finite"):
        responses.append(0, Sampled(make_prompts(1)[0], (rollout([1], logp=np.nan),), "s", 0.1))
    responses.close()
    with pytest.raises(UserError, match="local directory"):
        Responses(epath.Path("gs://bucket/r"), ABOUT, make_prompts(1), n=1)


# Grades


class Judge:
    """A sample is right if its index is even; its answer is its draw. Counts what it is asked."""

    def __init__(self, lives=10**9):
        self.asked, self._lives = 0, lives

    def __call__(self, prompt, rollouts):
        if not self._lives:
            raise Killed
        self._lives -= 1
        self.asked += len(rollouts)
        assert all(np.isnan(r.behavior_logp).all() for r in rollouts)
        return (
            [float(r.tokens[1] % 2 == 0) for r in rollouts],
            [f"{prompt.answer}: {r.tokens[0]}" for r in rollouts],
        )


def grade(directory, judge, *, n=5, about=None, threads=1, prompts=3):
    prompts = make_prompts(prompts)
    responses = Responses(epath.Path(directory / "r"), ABOUT, prompts, n=n)
    graded = Grades(
        epath.Path(directory / "g"), about or {"format": "some grades"}, prompts, responses
    )
    try:
        graded.fill(
            responses,
            prompts,
            judge,
            lambda: {"asked": judge.asked} if isinstance(judge, Judge) else {},
            threads=threads,
            progress=lambda done: None,
        )
    finally:
        graded.close()
        responses.close()
    return graded


@pytest.mark.parametrize("lives", range(9))
def test_grading_goes_on_where_it_was_killed(tmp_path, lives):
    fill(tmp_path / "r", ScriptedSampler())
    with pytest.raises(Killed):
        grade(tmp_path, Judge(lives))
    graded = grade(tmp_path, judge := Judge(), threads=3)
    lines = 9 - max(lives, 0)
    assert judge.asked <= 2 * lines
    assert graded.there.all()
    assert graded.correct.tolist() == [[True, False, True, False, True]] * 3
    assert graded.answers[1] == ["1: 1", "1: 1", "1: 7", "1: 7", "1: 13"]
    assert (grade(tmp_path, judge := Judge()).correct == graded.correct).all()
    assert judge.asked == 0


def test_verdicts_are_those_of_these_responses(tmp_path):
    fill(tmp_path / "r", ScriptedSampler())
    (judge := Judge()).asked = 100  # by another benchmark before
    assert grade(tmp_path, judge, threads=2).verdicts == {"asked": 15}
    assert grade(tmp_path, Judge()).verdicts == {"asked": 15}


def test_more_samples_need_their_grades_only(tmp_path):
    fill(tmp_path / "r", ScriptedSampler(), n=4, at_once=4)
    assert grade(tmp_path, judge := Judge(), n=3).correct.sum() == 3 * 2
    assert judge.asked == 12  # a request is graded whole
    assert grade(tmp_path, judge := Judge(), n=2).there.all()
    assert judge.asked == 0
    fill(tmp_path / "r", ScriptedSampler(), n=6, at_once=4)
    assert grade(tmp_path, judge := Judge(), n=6).there.all()
    assert judge.asked == 12 + 6


def test_another_grader_grades_anew_without_any_sampling(tmp_path):
    fill(tmp_path / "r", ScriptedSampler())
    grade(tmp_path, Judge())
    before = (tmp_path / "r").read_bytes()
    other = lambda prompt, rollouts: ([1.0] * len(rollouts), ["same"] * len(rollouts))
    assert grade(tmp_path, other).correct.sum() == 9  # the file stands
    graded = grade(tmp_path, other, about={"format": "some grades", "grader": "new"})
    assert graded.correct.all()
    assert graded.answers == [["same"] * 5] * 3
    assert (tmp_path / "g").read_text().count("\n") == 1 + 9
    assert (tmp_path / "r").read_bytes() == before


def test_other_responses_in_the_same_place_are_graded_anew(tmp_path):
    fill(tmp_path / "r", ScriptedSampler())
    grade(tmp_path, Judge())
    (tmp_path / "r").unlink()
    prompts = make_prompts(3)
    responses = Responses(epath.Path(tmp_path / "r"), ABOUT, prompts, n=5)
    for prompt, start in itertools.product(prompts, range(5)):
        responses.append(start, Sampled(prompt, (rollout([9, 8], logp=-7),), "s", 0.1))
    responses.close()
    assert grade(tmp_path, judge := Judge()).correct.all()
    assert judge.asked == 15
    assert grade(tmp_path, judge := Judge()).correct.all()
    assert judge.asked == 0


def test_requests_are_graded_beside_each_other(tmp_path):
    fill(tmp_path / "r", ScriptedSampler(), n=2)
    both = threading.Barrier(3)

    def judge(prompt, rollouts):
        both.wait(PATIENCE)
        return [1.0] * len(rollouts), [""] * len(rollouts)

    assert grade(tmp_path, judge, n=2, threads=3).correct.all()


def test_what_decides_a_grade_is_named(monkeypatch, tmp_path):
    """The reference answers in any order, the sources of the rewards, and their libraries."""
    prompts = make_prompts(3)
    about = grades.describe(prompts, {})
    assert grades.describe(prompts[::-1], {"math": {"seconds": 5}}) == about
    other = Prompt("id0", 0, prompts[0].tokens, "", "another answer", "t")
    assert grades.describe([other, *prompts[1:]], {})["answers"] != about["answers"]
    (tmp_path / "deep").mkdir()
    for path, text in (("__init__.py", ""), ("deep/a.py", "x = 1\n"), ("deep/a.py", "x = 2\n")):
        (tmp_path / path).write_text(text)
        monkeypatch.setattr(grades.rewards, "__file__", str(tmp_path / "__init__.py"))
        before, about = about, grades.describe(prompts, {})
        assert before["grader"] != about["grader"]
        assert before["answers"] == about["answers"]
    sums = [dataclasses.replace(prompt, task="math") for prompt in prompts]
    of = lambda **settings: grades.describe(sums, {"math": settings, "code": {"parallel": 2}})
    assert of(seconds=5, processes=2, packages=(1,)) == of(seconds=5, processes=9, packages=(1,))
    assert of(seconds=5)["settings"] == {"seconds": 5}
    assert set(about["libraries"]) == set(grades.LIBRARIES)


# The result

BY_HAND = {  # tokens, log-probability of each token, cut off; whether right, and what it answers
    "id0": [
        ([1], -0.5, False, 1, "a"),
        ([1], -0.5, False, 1, "a"),
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


def result_by_hand(tmp_path):
    prompts = make_prompts(3)
    responses = Responses(epath.Path(tmp_path / "r"), ABOUT, prompts, n=4)
    for prompt in prompts:
        samples = tuple(rollout(t, logp=logp, cut=cut) for t, logp, cut, _, _ in BY_HAND[prompt.id])
        responses.append(0, Sampled(prompt, samples, "s", 0.1))
    graded = Grades(epath.Path(tmp_path / "g"), {"format": "g"}, prompts, responses)
    graded.fill(
        responses,
        prompts,
        lambda p, rs: ([(s[3] + 1) / 2 for s in BY_HAND[p.id]], [s[4] for s in BY_HAND[p.id]]),
        lambda: {"late": 2},  # counts from before this benchmark
        threads=1,
        progress=lambda done: None,
    )
    result = measure(prompts, responses, graded, left_out=2, resamples=200, seed=3)
    graded.close()
    responses.close()
    return result


def test_a_result_has_the_numbers_worked_out_by_hand(tmp_path):
    result = result_by_hand(tmp_path)
    assert result == json.loads(json.dumps(result, allow_nan=False))
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
    for k, part in itertools.product(range(1, 5), ("value", "low", "high")):
        assert len(result["pass@k"][part]) == 4
        result[f"pass@{k}"] = result.get(f"pass@{k}", {})
        result[f"pass@{k}"][part] = result["pass@k"][part][k - 1]
    for name, values in by_problem.items():
        assert result[name]["value"] == pytest.approx(np.mean(values)), name
        expected = interval(np.array(values), resamples=200, seed=3)
        assert (result[name]["low"], result[name]["high"]) == pytest.approx(expected), name
    assert result["entropy"]["value"] == pytest.approx((0.5 * 14 + 2.0 * 2) / 16)
    assert 0.5 <= result["entropy"]["low"] < result["entropy"]["high"] <= 1
    assert (result["problems"], result["samples"], result["left_out"]) == (3, 4, 2)
    assert result["bootstrap"] == {"resamples": 200, "seed": 3}
    assert result["about"] == {**ABOUT, "pair": [1, 2]}
    assert result["verdicts"] == {}
    assert result["per_problem"][1] == {
        "id": "id1",
        "correct": 1,
        "majority": 0.5,
        "tokens": 6,
        "truncated": 1,
        "logp": -6.0,
    }
