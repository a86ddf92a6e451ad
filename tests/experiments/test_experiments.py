"""The comparison of objectives: its plan, its numbers, its page, and its commands, interrupted."""

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from etils import epath

from configs import arithmetic
from configs.objectives import OBJECTIVES
from experiments import findings, grid, lag, objectives, page, plot, tables
from experiments.arms import Arm, a_run, arms, stream, tuned, warm_up
from experiments.forgetful import forgetful
from experiments.runs import OUTCOME, key_of, run_of, summary, trained
from oapl_jax.check import check_sizes
from oapl_jax.errors import NotFinite, RunError
from oapl_jax.learner.optimizer import make_optimizer, make_schedule
from oapl_jax.tracking.progress import StopRequest

ROOT = Path(__file__).parents[2]
FULL, QUICK = objectives.FULL, objectives.QUICK
SECONDS = 900  # for a command, on a machine that has other things to do


# The plan


def test_every_objective_has_the_same_budget():
    """`prosper` alone is not compared: its rewards are preferences."""
    assert set(OBJECTIVES) - {"prosper"} == {m.partition(",")[0] for m in objectives.METHODS}
    for name in objectives.METHODS:
        tried = objectives.candidates(FULL, name)
        assert len(tried) == len({str(values) for values in tried}) == FULL.trials
        rates = {values["optim.learning_rate"] for values in tried}
        assert (min(rates), max(rates)) == (3e-4, 3e-3)


def test_nothing_is_chosen_on_the_test_split():
    assert not set(objectives.TUNING_SEEDS) & set(FULL.seeds)
    values = objectives.candidates(FULL, "grpo")[0]
    for arm, _ in arms(FULL):
        for trial in objectives.trials(FULL, arm, "grpo", values):
            assert trial.split == "validation"
            assert dict(trial.overrides)["evaluation.every"] == 0  # train would grade both splits
        recorded = stream(FULL, arm, 0)
        assert recorded is None or recorded.split == "validation"


def every_run(plan):
    """One run of every kind that the two commands do, and every trial of every method."""
    for arm, names in arms(plan):
        for name in names:
            yield a_run(plan, arm, name, objectives.candidates(plan, name)[-1], 0, "test")
    for name in (*plan.core, *plan.rest):
        for values in objectives.candidates(plan, name):
            yield a_run(plan, Arm("live", 8), name, values, 100, "validation")
    for table in lag.tables(plan):
        for row in table.cells.values():
            for runs in row.values():
                yield runs[0]


@pytest.mark.parametrize("plan", [FULL, QUICK], ids=["full", "quick"])
def test_every_run_has_a_sound_configuration(plan, tmp_path):
    seen = {}
    for run in every_run(plan):
        for part in (run, run.start, run.stream):
            if part and part.key not in seen:
                config = part.resolve(epath.Path(tmp_path))
                check_sizes(config)
                assert config.num_steps % config.lag.steps == 0
                seen[part.key] = part
    kinds = {run.kind for run in seen.values()}
    assert kinds == {"warm_up", "generate", "train"}


def test_a_run_is_what_decides_it():
    one = run_of("train", "arithmetic", objective="oapl", seed=0, overrides={}, split="test")
    start = run_of("warm_up", "arithmetic", objective="oapl", seed=0, overrides={}, split="test")
    others = [
        run_of("train", "arithmetic", objective="oapl", seed=1, overrides={}, split="test"),
        run_of(
            "train",
            "arithmetic",
            objective="oapl",
            seed=0,
            overrides={"seed": 7},
            split="test",
        ),
        run_of(
            "train", "arithmetic", objective="oapl", seed=0, overrides={}, split="test", start=start
        ),
    ]
    assert len({one.key, *(other.key for other in others)}) == 4
    assert json.loads(json.dumps(others[-1].settings))["start"] == start.key


def test_a_choice_is_that_of_the_next_larger_tuned_lag():
    choosers = {1: 8, 8: 8, 32: 128, 128: 128}
    for at, chooser in choosers.items():
        for source in ("live", "oapl"):
            assert tuned(FULL, Arm(source, at)) == Arm("live", chooser)
    assert tuned(FULL, Arm("offline", 0)) == Arm("live", 128)
    core = [arm for arm, names in arms(FULL) if names == FULL.core]
    assert len(core) == len(set(core)) == 4 + 1 + 4
    assert [arm for arm, _ in arms(FULL)][: len(core)] == core  # complete before the rest begins


def test_no_two_methods_are_the_same():
    """With a correction of tokens GRPO at the learner's own policy is CISPO at the same cap."""
    caps = {values["correction_cap"] for values in objectives.METHODS["cispo"]}
    assert arithmetic.get_config("objective=grpo_is").objective.correction_cap not in caps


def test_a_changed_default_makes_another_run(monkeypatch):
    run = lambda: run_of(
        "train", "arithmetic", objective="oapl", seed=0, overrides={}, split="test"
    )
    before = run().key
    assert run().key == before
    default = arithmetic.get_config

    def changed(argument=""):
        config = default(argument)
        config.optim.b2 = 0.5
        return config

    monkeypatch.setattr(arithmetic, "get_config", changed)
    key_of.cache_clear()  # as if in another process
    assert run().key != before
    key_of.cache_clear()


# A run's numbers


def test_adam_forgets_but_the_schedule_goes_on():
    """Against Adam by hand, whose moments and bias correction begin anew at steps 0, 3, 6, .."""
    changes = dict(learning_rate=0.1, warmup_steps=2, weight_decay=0.01, max_grad_norm=1e9)
    settings = {**arithmetic.get_config().optim.to_dict(), **changes, "num_steps": 9}
    optimizer, remembering = (
        forgetful(make_optimizer(**settings), every=3),
        make_optimizer(**settings),
    )
    of_rate = ("learning_rate", "warmup_steps", "final_fraction", "num_steps")
    rate = make_schedule(**{name: settings[name] for name in of_rate})
    gradients = np.random.default_rng(0).normal(size=(9, 4))
    params = {"w": jnp.ones(4)}
    state, update = optimizer.init(params), jax.jit(optimizer.update)
    expected, m, v = np.ones(4), np.zeros(4), np.zeros(4)
    other, other_state = params, remembering.init(params)
    for step, g in enumerate(gradients):
        if step % 3 == 0:
            m, v = np.zeros(4), np.zeros(4)
        m, v = 0.9 * m + 0.1 * g, 0.95 * v + 0.05 * g**2
        k = step % 3 + 1
        direction = m / (1 - 0.9**k) / (np.sqrt(v / (1 - 0.95**k)) + 1e-8)
        expected = expected - float(rate(step)) * (direction + 0.01 * expected)
        updates, state = update({"w": jnp.asarray(g)}, state, params)
        params = optax.apply_updates(params, updates)
        np.testing.assert_allclose(params["w"], expected, rtol=1e-5)
        updates, other_state = remembering.update({"w": jnp.asarray(g)}, other_state, other)
        other = optax.apply_updates(other, updates)
    assert np.abs(np.asarray(other["w"]) - expected).max() > 1e-3


def metric(step, kl, **more):
    return {
        "step": step,
        "lag/mean": (step - 1) % 4,
        "kl": kl,
        "entropy": 0.2,
        "reward": 0.5,
    } | more


def test_the_drift_is_that_at_the_end_of_windows():
    run = a_run(FULL, Arm("live", 8), "oapl", {"optim.learning_rate": 1e-3}, 0, "test")
    config = run.resolve(epath.Path("/nowhere"))
    lines = [metric(s, s / 100, **{"buffer/added": 8 * s, "skipped": 0}) for s in range(1, 13)]
    lines[7] |= {"eval/pass@1": 0.5, "eval/entropy": 0.1}
    config.num_steps = 12
    found = summary(lines, config, run)
    assert found["drift"] == pytest.approx((0.04 + 0.08 + 0.12) / 3)
    assert found["generations"] == 12 * 8 * 8
    assert found["progress"] == [[8, 8 * 8 * 8, 0.5, 0.1]]
    assert found["curve"]["kl"] == [0.08]


def test_generations_of_a_recorded_set_count_once():
    run = a_run(FULL, Arm("offline", 0), "oapl", {"optim.learning_rate": 1e-3}, 0, "test")
    config = run.resolve(epath.Path("/nowhere"))
    lines = [metric(s, 0.0, **{"recorded/taken": 512 * s, "skipped": 0}) for s in range(1, 5)]
    assert summary(lines[:1], config, run)["generations"] == 512 * 8
    assert summary(lines, config, run)["generations"] == FULL.prompts * 8


def test_of_a_run_that_fails_the_steps_up_to_there_count(monkeypatch, tmp_path):
    run = a_run(FULL, Arm("live", 2), "oapl", {}, 0, "test")
    workdir = run.workdir(epath.Path(tmp_path))
    workdir.mkdir(parents=True)
    steps = [metric(s, s / 10, **{"buffer/added": 8 * s, "skipped": 3}) for s in range(1, 7)]
    (workdir / "metrics.jsonl").write_text("".join(map(grid.as_line, steps)))

    def breaks(job, stop):
        raise NotFinite("the loss was not finite")

    monkeypatch.setattr("experiments.runs.open_job", lambda config, at: None)
    monkeypatch.setattr("experiments.runs.train.run_job", breaks)
    of_run = trained(run, epath.Path(tmp_path), StopRequest())
    assert of_run is not None
    assert (of_run["outcome"], of_run["reason"]) == ("failed", "the loss was not finite")
    assert (of_run["generations"], of_run["skipped"]) == (6 * 8 * 8, 3)
    assert of_run["drift"] == 0.4  # of the window that came to its end
    assert summary([], run.resolve(epath.Path(tmp_path)), run) == {}


# What is made of them


def line_of(run, pass_at_1, *, entropy=0.1, level_at=None):
    """A line such as a run leaves."""
    graded = {"pass@1": pass_at_1, "pass@8": 0.9, "pass@64": 1.0, "entropy": entropy}
    reached = 0.9 if level_at else 0.1
    return {
        "key": run.key,
        "settings": run.settings,
        "seconds": 1.0,
        "core_seconds": 1.0,
        "code": "c0de",
        "outcome": "ended",
        run.split: graded,
        "generations": 16384,
        "skipped": 0,
        "drift": 0.01,
        "progress": [[32, level_at or 2048, reached, 0.1], [64, 16384, reached, 0.1]],
        "curve": {"kl": [0.1], "entropy": [0.1], "reward": [0.1]},
    }


def failed(run):
    line = {"key": run.key, "settings": run.settings, "seconds": 1.0, "code": "c0de"}
    of_steps = {"generations": 8192, "drift": 2.0, "curve": {"kl": [0.1]}, "progress": []}
    return line | {"outcome": "failed", "reason": "loss was not finite", **of_steps}


class FakeGrid(grid.Grid):
    """Lines without runs."""

    def __init__(self, root, lines):
        root.mkdir(parents=True, exist_ok=True)
        for line in lines:
            grid.append(epath.Path(root), line)
        super().__init__(epath.Path(root), jobs=1)


def an_arm(arm, scores, **more):
    """Lines of one arm: trials of which the second is best, and runs with the given pass@1."""
    for name, values in scores.items():
        tried = objectives.candidates(FULL, name)
        for i, v in enumerate(tried):
            for trial in objectives.trials(FULL, arm, name, v):
                yield failed(trial) if i == 0 else line_of(trial, 0.8 if i == 1 else 0.3)
        runs = objectives.compared(FULL, arm, name, tried[1])
        for run, value in zip(runs, values, strict=True):
            yield failed(run) if value is None else line_of(run, value, **more.get(name, {}))


def starts(value):
    return [line_of(warm_up(FULL, seed), value) for seed in FULL.seeds]


def test_the_trial_that_is_best_on_the_mean_of_its_seeds_is_chosen(tmp_path):
    """The fourth is as good as the second; the first is best with one seed alone."""
    arm = Arm("live", 8)
    scores = [(0.9, 0.2), (0.6, 0.8), (None, 0.9), (0.7, 0.7), (0.2, 0.2), (0.1, 0.1)]
    lines = []
    for v, of_seeds in zip(objectives.candidates(FULL, "grpo"), scores, strict=True):
        for trial, value in zip(objectives.trials(FULL, arm, "grpo", v), of_seeds, strict=True):
            lines.append(failed(trial) if value is None else line_of(trial, value))
    some = FakeGrid(tmp_path / "some", lines[:-1])
    assert objectives.choose(some, FULL, arm, "grpo") is None  # not before all are over
    every = FakeGrid(tmp_path / "all", lines)
    assert objectives.choose(every, FULL, arm, "grpo") == objectives.candidates(FULL, "grpo")[1]
    for other in (Arm("oapl", 8), Arm("live", 1)):
        assert objectives.choose(every, FULL, other, "grpo") is not None
    assert objectives.choose(every, FULL, Arm("live", 32), "grpo") is None


def test_the_page_says_where_oapl_loses(tmp_path):
    """GRPO is better in every seed, grpo_is worse, gspo neither; one run of cispo failed."""
    arm = Arm("live", 128)
    scores = {
        "oapl": [0.60, 0.62, 0.64, 0.61, 0.63],
        "grpo": [0.70, 0.71, 0.75, 0.70, 0.74],
        "grpo_is": [0.50, 0.51, 0.50, 0.52, 0.50],
        "gspo": [0.61, 0.61, 0.65, 0.60, 0.63],
        "cispo": [0.62, 0.20, None, 0.61, 0.63],
        "maxrl": [0.30, 0.30, 0.30, 0.30, 0.30],
    }
    levels = {"oapl": dict(level_at=4096), "grpo": dict(level_at=2048)}
    made = FakeGrid(tmp_path, [*starts(0.25), *an_arm(arm, scores, **levels)])
    found = tables.collect(made, FULL)
    assert list(found) == [arm]
    assert list(found[arm]) == ["grpo", "gspo", "oapl", "grpo_is", "cispo", "maxrl"]  # best first
    text = page.page(made, FULL, {}, "")
    assert "Of 149 pairs of a method and an arm 143 are missing" in " ".join(text.split())
    assert "| `grpo` | 0.720 + |" in text
    assert "| `grpo_is` | 0.506 - |" in text
    assert "| `gspo` | 0.620 |" in text
    assert "| `cispo` | 0.412 (2 lost) |" in text  # a failed run counts as 0, and as lost
    of_pass, of_level = (text.split(f"### {name}\n")[1] for name in ("pass@1", "to pass@1 0.8"))
    assert "live: 2 more, 2 level, 1 less." in of_pass
    row = next(x for x in text.splitlines() if x.startswith("| live, lag 128 |  | **-0.100**"))
    assert "| **+0.114** [+0." in row
    # GRPO needs fewer generations, others never got there, of cispo one run has failed.
    assert "live: 1 more, 3 less, 1 unknown." in " ".join(of_level.split())
    assert "| live, lag 128 |  | **+2048** | **-12288**" in text
    of_arm = text.split("### live, lag 128")[1]
    assert "| `grpo` | 0.001 | clip_high 0.2 | 0.720 [0.691, 0.749] |" in of_arm
    of_cispo = next(x for x in of_arm.splitlines() if x.startswith("| `cispo`"))
    assert of_cispo.count("unknown") == 3  # its entropy, and the generations to the levels
    assert "4096 (5/5)" in of_arm
    assert "16384 (0/5)" in of_arm
    assert "replay" not in of_arm  # arms without results have no table


def test_where_rates_end(tmp_path):
    """The last rate before the first loss, not the last without one; and the last good one."""
    by_rate = {"0.001": 0.70, "0.003": 0.72, "0.01": 0.68, "0.03": 0.30}
    lost = {"0.001": 0, "0.003": 1, "0.01": 0, "0.03": 2}

    def cell(rate):
        run = a_run(FULL, Arm("live", 8), "oapl", {"optim.learning_rate": float(rate)}, 0, "test")
        values = [0.1] * lost[rate] + [by_rate[rate] * 2 - 0.1 * lost[rate]] * (2 - lost[rate])
        start = line_of(warm_up(FULL, 0), 0.25)
        return findings.Cell([line_of(run, v) for v in values], [start, start])

    row = {rate: cell(rate) for rate in by_rate}
    good, kept = tables.limits({"Lag 8": {"oapl": row}})
    assert kept.splitlines()[-1] == "| oapl | 0.001 |"
    assert tables.limits({"Lag 8": {"oapl": {"0.003": cell("0.003")}}})[1].endswith("| none |")
    assert good.splitlines()[-1] != kept.splitlines()[-1]
    some, _ = tables.limits({"Lag 1": {"oapl": row}, "Lag 8": {"oapl": row, "grpo": row}})
    assert some.splitlines()[-1] == "| grpo |  | 0.01 |"


def test_pictures_are_drawn_of_what_is_there(tmp_path):
    arm = Arm("live", 8)
    scores = {
        "oapl": [0.6, 0.7, 0.6, 0.7, 0.6],
        "grpo": [0.6, None, 0.6, 0.7, None],
        "maxrl": [0.4, 0.5, 0.4, 0.5, None],
    }
    lines = [*starts(0.25), *an_arm(arm, scores)]
    surface = next(t for t in lag.tables(FULL) if t.title == "Lag 128")
    for row in surface.cells.values():
        for runs in row.values():
            lines += [line_of(run, 0.5) for run in runs]
    made = FakeGrid(tmp_path / "grid", [*lines, {**lines[0], "key": "another"}])
    plot.render(made, epath.Path(tmp_path / "docs"), False)
    text = (tmp_path / "docs" / "comparison.md").read_text()
    for name in ("methods", "lags", "pass_at_k", "generations", "rates", "drift"):
        assert f"(comparison/{name}.png)" in text
        picture = (tmp_path / "docs" / "comparison" / f"{name}.png").read_bytes()
        assert picture.startswith(b"\x89PNG")
    assert "without runs that failed (2 of grpo at live, lag 8)" in text
    assert "### Lag 128" in text
    assert "### Lag 8" not in text
    kept = grid.read(epath.Path(tmp_path / "docs" / "comparison"))
    assert kept == [line for line in made.lines.values() if line["key"] != "another"]
    empty = epath.Path(tmp_path / "empty")
    plot.render(FakeGrid(tmp_path / "none", []), empty, False)
    assert "](comparison/" not in (empty / "comparison.md").read_text()


def test_what_is_written_into_the_page_by_hand_is_kept(tmp_path):
    file, grid = epath.Path(tmp_path / "comparison.md"), FakeGrid(tmp_path / "grid", [])
    plot.render(grid, epath.Path(tmp_path), False)
    first = file.read_text()
    written = first.replace(page.BEGIN, f"{page.BEGIN}## What they say\n\nLittle.\n")
    assert written != first
    file.write_text(written)
    plot.render(grid, epath.Path(tmp_path), False)
    assert file.read_text() == written


def test_intervals_are_those_of_student():
    """By hand, with the 97.5 % quantile of t at 4 degrees; and a difference is seed by seed."""
    ours, theirs = [0.60, 0.62, 0.64, 0.61, 0.63], [0.50, 0.51, 0.50, 0.52, 0.50]
    arm, values = Arm("live", 8), {"optim.learning_rate": 1e-3}
    runs = [a_run(FULL, arm, "oapl", values, seed, "test") for seed in FULL.seeds]
    cells = [
        findings.Cell([line_of(r, x) for r, x in zip(runs, of, strict=True)], [])
        for of in (ours, theirs)
    ]
    squares = sum((a - b - 0.114) ** 2 for a, b in zip(ours, theirs, strict=True))
    reach = 2.776445 * (squares / 4 / 5) ** 0.5
    mean, low, high = findings.difference(*cells, "pass@1")
    assert (mean, low, high) == pytest.approx((0.114, 0.114 - reach, 0.114 + reach), abs=1e-6)
    assert findings.verdict((mean, low, high)) == "more"
    assert findings.verdict(findings.difference(*cells[::-1], "pass@1")) == "less"
    assert findings.verdict((0.1, 0.0, 0.2)) == "level"
    assert findings.verdict(findings.spread([0.1])) == "level"  # one seed decides nothing


# The results file


def test_a_line_that_a_kill_has_cut_is_removed(tmp_path):
    path = epath.Path(tmp_path / "results.jsonl")
    path.write_text('{"key": "a", "outcome": "ended"}\n{"key": "b", "outc')
    assert [line["key"] for line in grid.read(epath.Path(tmp_path))] == ["a"]
    grid.cut_off(path)
    grid.append(epath.Path(tmp_path), {"key": "c", "outcome": "ended"})
    assert [line["key"] for line in grid.read(epath.Path(tmp_path))] == ["a", "c"]


def test_what_broke_is_still_to_do_and_what_failed_is_not(tmp_path):
    values = {"optim.learning_rate": 1e-3}
    one, two = (a_run(FULL, Arm("live", 8), "oapl", values, seed, "test") for seed in (0, 1))
    for run, outcome in ((one, "broken"), (two, "failed")):
        line = {"key": run.key, "settings": run.settings, "outcome": outcome, "reason": ""}
        grid.append(epath.Path(tmp_path), line)
    made = grid.Grid(epath.Path(tmp_path), jobs=1)
    assert made.line(one) is None
    assert made.line(two) is not None


class InstantGrid(grid.Grid):
    """Runs that are over at once, and find what they are told to; None: that break."""

    def __init__(self, root, finding):
        super().__init__(epath.Path(root), jobs=1)
        self.finding, self.done = finding, []

    def _do(self, run):
        if self.finding is None:
            return "out of memory"
        workdir = run.workdir(self.root)
        workdir.mkdir(parents=True)
        self.done.append(run.kind)
        outcome = {"outcome": "ended", run.split: {"pass@1": self.finding, "drift": float("nan")}}
        (workdir / OUTCOME).write_text(json.dumps(outcome))
        return ""


def test_another_machine_goes_on_from_the_results_alone(tmp_path):
    """It needs the warm-up again, which must come out as it did where the results are from."""
    values = {"optim.learning_rate": 1e-3}
    one, two = (a_run(FULL, Arm("live", lag), "oapl", values, 0, "test") for lag in (8, 32))
    here = InstantGrid(tmp_path / "here", 0.25)
    here.run([one], what="here")
    assert here.done == ["warm_up", "train"]
    for name, finding in (("there", 0.25), ("elsewhere", 0.26)):
        (tmp_path / name).mkdir()
        shutil.copy(tmp_path / "here" / grid.RESULTS, tmp_path / name)
        other = InstantGrid(tmp_path / name, finding)
        other.run([one], what="nothing to do")
        assert other.done == []
        if name == "there":
            other.run([one, two], what="there")
            assert other.done == ["warm_up", "train"]
            assert len(results(tmp_path / name)) == 3
            continue
        for _ in range(2):  # no less the second time
            other = InstantGrid(tmp_path / name, finding)
            with pytest.raises(RunError, match=r"another machine.*another --root"):
                other.run([one, two], what="elsewhere")
            assert other.done == ["warm_up"]
        broken = InstantGrid(tmp_path / name, None)
        with pytest.raises(RunError, match="done again for others, broke: out of memory"):
            broken.run([one, two], what="elsewhere")
        assert len(results(tmp_path / name)) == 2


# The commands


def results(root: Path) -> list[dict]:
    path = root / "results.jsonl"
    return [json.loads(x) for x in path.read_text().splitlines()] if path.exists() else []


def command(root: Path, module: str = "objectives") -> list[str]:
    return [sys.executable, "-m", f"experiments.{module}", "--quick", f"--root={root}"]


def environment() -> dict[str, str]:
    return {**os.environ, "XLA_FLAGS": ""}  # one device


def run(root: Path, module: str = "objectives", code: int = 0) -> str:
    done = subprocess.run(
        command(root, module),
        cwd=ROOT,
        env=environment(),
        timeout=SECONDS,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == code, done.stdout
    return done.stdout


def interrupt(root: Path, number: int, lines: int) -> tuple[int, str]:
    """Starts the command, and sends it a signal once so many runs are done."""
    process = subprocess.Popen(
        command(root),
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    started = time.monotonic()
    while len(results(root)) < lines:
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() - started < SECONDS
        time.sleep(0.1)
    process.send_signal(number)
    output, _ = process.communicate(timeout=SECONDS)
    return process.returncode, output


def test_the_quick_comparison_goes_on_where_it_was_interrupted(tmp_path):
    code, _ = interrupt(tmp_path, signal.SIGKILL, lines=1)
    assert code == -signal.SIGKILL
    first = (tmp_path / "results.jsonl").read_text()
    code, output = interrupt(tmp_path, signal.SIGINT, lines=6)
    assert (code, "the same command goes on" in output) == (130, True)
    output = run(tmp_path)
    text = (tmp_path / "results.jsonl").read_text()
    assert text.startswith(first)  # nothing is done twice
    lines = results(tmp_path)
    assert len({line["key"] for line in lines}) == len(lines)
    assert {line["outcome"] for line in lines} == {"ended"}
    made = grid.Grid(epath.Path(tmp_path), jobs=1)
    found = tables.collect(made, QUICK)
    assert {arm for arm, _ in arms(QUICK)} == set(found)
    assert all(set(methods) == set(QUICK.core) for methods in found.values())

    # The stream of a replay is the same for both objectives, and is not what they sample.
    of = {
        (line["settings"]["objective"], line["settings"]["stream"]): line
        for line in lines
        if line["settings"]["split"] == "test" and line["settings"]["kind"] == "train"
    }
    streams = {key for _, key in of} - {None}
    assert len(streams) == 1 + len(QUICK.lags)
    for key in streams:
        assert of["oapl", key]["curve"]["reward"] == of["grpo", key]["curve"]["reward"]
        assert of["oapl", key]["curve"]["kl"] != of["grpo", key]["curve"]["kl"]
    page_text = (tmp_path / "comparison.md").read_text()
    assert "| `grpo` |" in page_text
    assert (tmp_path / "comparison" / "lags.png").read_bytes().startswith(b"\x89PNG")
    # Workdirs of finished runs are gone, but for those that others start from.
    needed = {line["settings"][k] for line in lines for k in ("start", "stream")} - {None}
    assert {path.name for path in (tmp_path / "runs").iterdir()} == needed

    assert "to do" not in run(tmp_path)
    assert (tmp_path / "results.jsonl").read_text() == text
    run(tmp_path, "lag")
    assert (tmp_path / "results.jsonl").read_text().startswith(text)
    text = (tmp_path / "comparison.md").read_text()
    assert "### Lag 8" in text
    assert "Adam anew" in text


def test_one_command_at_a_time(tmp_path):
    with (tmp_path / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        output = run(tmp_path, code=2)
        run(tmp_path, "plot")  # which only reads
    assert "another process works on" in output
