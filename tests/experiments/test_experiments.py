"""The comparison of objectives: points, statistics, launcher, page, and an interrupted command."""

import json
import os
import re
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
from small_runs import checked, quick_compilation

from configs import arithmetic
from configs.objectives import OBJECTIVES
from experiments import comparison, lag, launch, local, objectives, table
from experiments.execute import resetting, summary
from experiments.objectives import FULL, QUICK, Arm, arms, stream, train, tuned, warm_up
from experiments.sweep import RESULTS, Results, key_of, listed, point
from oapl_jax.errors import RunError
from oapl_jax.files import JsonLines
from oapl_jax.learner.optimizer import make_optimizer

ROOT = Path(__file__).parents[2]
NOWHERE = epath.Path("/nowhere")
SECONDS = 900  # for a command, on a busy machine


# Sweeps


def test_every_objective_has_the_same_number_of_trials():
    """`prosper` alone is not compared: its rewards are preferences."""
    assert set(OBJECTIVES) - {"prosper"} == {m.partition(",")[0] for m in objectives.METHODS}
    for name in objectives.METHODS:
        tried = objectives.candidates(FULL, name)
        assert len(tried) == len({str(values) for values in tried}) == FULL.trials
        rates = {values["optim.learning_rate"] for values in tried}
        assert (min(rates), max(rates)) == (3e-4, 3e-3)


def test_no_two_methods_are_the_same():
    """With a correction of tokens GRPO at the learner's own policy is CISPO at the same cap."""
    caps = {values["cispo.cap"] for values in objectives.METHODS["cispo"]}
    section = arithmetic.get_config("objective=grpo_is").objective.policy_gradient
    assert section.correction_cap not in caps


def test_no_choice_uses_the_test_split():
    assert not set(FULL.tuning_seeds) & set(FULL.seeds)
    values = objectives.candidates(FULL, "grpo")[0]
    for arm, _ in arms(FULL):
        for seed in FULL.tuning_seeds:
            trial = objectives.trial(FULL, arm, "grpo", values, seed)
            assert trial.split == "validation"
            assert dict(trial.overrides)["evaluation.every"] == 0  # train would grade both splits
        recorded = stream(FULL, arm, 0)
        assert recorded is None or recorded.split == "validation"


@pytest.mark.parametrize("form", ["cpu", "quick"])
def test_every_compared_run_applies_to_its_locked_config(form, tmp_path):
    root = epath.Path(tmp_path)
    plan, nothing = QUICK if form == "quick" else FULL, Results(root)
    runs = listed(objectives.sweep, nothing, form) + listed(lag.sweep, nothing, form)
    for arm, names in arms(plan):  # the compared runs, as if the last trial was chosen
        values = {name: objectives.candidates(plan, name)[-1] for name in names}
        runs += [train(plan, arm, name, values[name], 0, "test") for name in names]
    seen = {}
    for run in runs:
        for part in filter(None, (run, run.start, run.stream)):
            settings = (part.kind, part.objective, part.overrides, part.stream)  # for any seed
            if settings not in seen:
                seen[settings] = config = part.resolve(root)
                checked(config)
                assert config.num_steps % config.lag.steps == 0
    assert {kind for kind, *_ in seen} == {"warm_up", "generate", "train"}


def test_equal_settings_are_one_run(monkeypatch):
    default = dict(objective="oapl", seed=0, split="test")
    make = lambda values=(), **changes: point("arithmetic", dict(values), **default | changes)
    start = make(kind="warm_up")
    runs = [make(), make(seed=1), make({"num_steps": 7}), make(start=start)]
    before = make().key
    assert len({run.key for run in runs}) == 4
    assert before == runs[0].key
    edited = arithmetic.get_config("objective=oapl")
    edited.optim.b2 = 0.5
    monkeypatch.setattr(arithmetic, "get_config", lambda _: edited)
    key_of.cache_clear()
    assert make().key != before
    key_of.cache_clear()


def test_an_arm_takes_the_choice_of_the_next_larger_tuned_lag():
    for at, chooser in {1: 8, 8: 8, 32: 128, 128: 128}.items():
        for source in ("live", "oapl"):
            assert tuned(FULL, Arm(source, at)) == Arm("live", chooser)
    assert tuned(FULL, Arm("offline", 0)) == Arm("live", 128)
    core = [arm for arm, names in arms(FULL) if names == FULL.core]
    assert len(core) == len(set(core)) == 4 + 1 + 4
    assert [arm for arm, _ in arms(FULL)][: len(core)] == core  # complete before the rest begins


# Metrics of a run


def test_a_reset_of_adam_keeps_the_schedule():
    """Against Adam by hand, whose moments and bias correction begin anew at steps 0, 3, 6, .."""
    changes = dict(learning_rate=0.1, warmup_steps=2, weight_decay=0.01, max_grad_norm=1e9)
    settings = {**arithmetic.get_config().optim.to_dict(), **changes, "num_steps": 9}
    remembering = make_optimizer(**settings)
    optimizer = resetting(make_optimizer(**settings), every=3)
    last = 0.1 * settings["final_fraction"]
    rate = optax.warmup_cosine_decay_schedule(0.1 / 3, 0.1, 2, decay_steps=9, end_value=last)
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
    line = {"step": step, "lag/mean": (step - 1) % 4, "kl": kl, "entropy": 0.2, "reward": 0.5}
    return line | more


def test_drift_is_measured_at_the_end_of_windows():
    run = train(FULL, Arm("live", 8), "oapl", {"optim.learning_rate": 1e-3}, 0, "test")
    config = run.resolve(NOWHERE)
    lines = [metric(s, s / 100, **{"buffer/added": 8 * s, "skipped": 0}) for s in range(1, 13)]
    lines[7] |= {"eval/pass@1": 0.5, "eval/entropy": 0.1}
    config.num_steps = 12
    found = summary(lines, config, run)
    assert found["drift"] == pytest.approx((0.04 + 0.08 + 0.12) / 3)
    assert found["generations"] == 12 * 8 * 8
    assert found["progress"] == [[8, 8 * 8 * 8, 0.5, 0.1]]
    assert found["curve"]["kl"] == [0.08]
    config.num_steps = 256  # a run that fails at step 7: its second window has no end
    assert summary(lines[:7], config, run)["drift"] == 0.04
    del lines[3]["kl"]
    assert "drift" not in summary(lines[:7], config, run)
    assert summary([], config, run) == {}


def test_generations_of_a_recorded_set_count_once():
    run = train(FULL, Arm("offline", 0), "oapl", {"optim.learning_rate": 1e-3}, 0, "test")
    config = run.resolve(NOWHERE)
    lines = [metric(s, 0.0, **{"recorded/taken": 512 * s, "skipped": 0}) for s in range(1, 5)]
    assert summary(lines[:1], config, run)["generations"] == 512 * 8
    assert summary(lines, config, run)["generations"] == FULL.prompts * 8


# Statistics


def line_of(run, pass_at_1, *, entropy=0.1, level_at=None):
    """A line such as a run leaves; a pass@1 of None is that of a run that failed."""
    of_run = {"key": run.key, "settings": run.settings, "seconds": 1.0, "code": "c0de"}
    if pass_at_1 is None:
        steps = {"generations": 8192, "drift": 2.0, "curve": {"kl": [0.1]}, "progress": []}
        return of_run | {"outcome": "failed", "reason": "loss was not finite", **steps}
    reached = 0.9 if level_at else 0.1
    return of_run | {
        "core_seconds": 1.0,
        "outcome": "ended",
        run.split: {"pass@1": pass_at_1, "pass@8": 0.9, "pass@64": 1.0, "entropy": entropy},
        "generations": 16384,
        "skipped": 0,
        "drift": 0.01,
        "progress": [[32, level_at or 2048, reached, 0.1], [64, 16384, reached, 0.1]],
        "curve": {"kl": [0.1], "entropy": [0.1], "reward": [0.1]},
    }


def results_of(lines):
    made = Results(NOWHERE)
    for line in lines:
        made.take(line)
    return made


def an_arm(arm, scores, **more):
    """Lines of one arm: the second trial is best; runs with the given pass@1, one a seed."""
    for name, values in scores.items():
        tried = objectives.candidates(FULL, name)
        for i, v in enumerate(tried):
            for seed in FULL.tuning_seeds:
                trial = objectives.trial(FULL, arm, name, v, seed)
                yield line_of(trial, {0: None, 1: 0.8}.get(i, 0.3))
        runs = objectives.compared(FULL, arm, name, tried[1])
        for run, value in zip(runs, values, strict=True):
            yield line_of(run, value, **(more.get(name, {}) if value is not None else {}))


def starts(value):
    return [line_of(warm_up(FULL, seed), value) for seed in FULL.seeds]


def test_the_trial_with_the_best_mean_of_its_seeds_is_chosen():
    """The fourth is as good as the second; the first is best with one seed alone."""
    arm = Arm("live", 8)
    scores = [(0.9, 0.2), (0.6, 0.8), (None, 0.9), (0.7, 0.7), (0.2, 0.2), (0.1, 0.1)]
    lines = [
        line_of(objectives.trial(FULL, arm, "grpo", v, seed), value)
        for v, values in zip(objectives.candidates(FULL, "grpo"), scores, strict=True)
        for seed, value in zip(FULL.tuning_seeds, values, strict=True)
    ]
    some, every = results_of(lines[:-1]), results_of(lines)
    assert objectives.choose(some, FULL, arm, "grpo") is None  # not before all have ended
    assert objectives.choose(every, FULL, arm, "grpo") == objectives.candidates(FULL, "grpo")[1]
    for other in (Arm("oapl", 8), Arm("live", 1)):
        assert objectives.choose(every, FULL, other, "grpo") is not None
    assert objectives.choose(every, FULL, Arm("live", 32), "grpo") is None


SCORES = {
    "oapl": [0.60, 0.62, 0.64, 0.61, 0.63],
    "grpo": [0.70, 0.71, 0.75, 0.70, 0.74],
    "grpo_is": [0.50, 0.51, 0.50, 0.52, 0.50],
    "gspo": [0.61, 0.61, 0.65, 0.60, 0.63],
    "cispo": [0.62, 0.20, None, 0.61, 0.63],
    "maxrl": [0.30, 0.30, 0.30, 0.30, 0.30],
}
LEVELS = {"oapl": dict(level_at=4096), "grpo": dict(level_at=2048)}


def test_verdicts_say_which_methods_are_ahead_of_oapl():
    """GRPO is better in every seed, grpo_is worse, gspo neither; two runs of cispo are lost."""
    arm = Arm("live", 128)
    made = results_of([*starts(0.25), *an_arm(arm, SCORES, **LEVELS)])
    found = comparison.collect(made, FULL)
    assert list(found) == [arm]
    assert list(found[arm]) == ["grpo", "gspo", "oapl", "grpo_is", "cispo", "maxrl"]  # best first
    cells = {name: cell for name, (_, cell) in found[arm].items()}
    assert {name: cell.lost for name, cell in cells.items() if cell.lost} == {"cispo": 2}
    assert cells["cispo"].mean("pass@1") == pytest.approx(0.412)  # a failed run counts as 0

    def verdicts(measure):
        apart = lambda name: table.difference(cells[name], cells["oapl"], measure)
        return {name: table.verdict(apart(name)) for name in cells if name != "oapl"}

    words = {"grpo": "more", "gspo": "level", "grpo_is": "less", "cispo": "level", "maxrl": "less"}
    assert verdicts("pass@1") == words
    # GRPO needs fewer generations; others never got there, and of cispo one run has failed.
    fewer = dict.fromkeys(words, "more") | {"grpo": "less", "cispo": "unknown"}
    assert verdicts("to pass@1 0.8") == fewer
    assert cells["oapl"].mean("to pass@1 0.8") == 4096
    assert cells["gspo"].reached("to pass@1 0.8") == [False] * 5
    parts = dict(comparison.blocks(made, FULL))
    assert all(word in parts["pass@1"] for word in ("0.720 +", "0.506 -", "0.412 (2 lost)"))
    assert "1 more, 2 level, 2 less" in parts["pass@1 minus oapl"]


def test_limits_of_the_learning_rate():
    """The last rate before the first loss, not the last without one; and the last good one."""
    by_rate = {"0.001": 0.70, "0.003": 0.72, "0.01": 0.68, "0.03": 0.30}
    lost = {"0.001": 0, "0.003": 1, "0.01": 0, "0.03": 2}

    def cell(rate):
        run = train(FULL, Arm("live", 8), "oapl", {"optim.learning_rate": float(rate)}, 0, "test")
        values = [0.1] * lost[rate] + [by_rate[rate] * 2 - 0.1 * lost[rate]] * (2 - lost[rate])
        start = line_of(warm_up(FULL, 0), 0.25)
        return table.Cell([line_of(run, v) for v in values], [start, start])

    row = {rate: cell(rate) for rate in by_rate}
    last = lambda of, which: comparison.limits(of)[which].splitlines()[-1]
    assert last({"Lag 8": {"oapl": row}}, 1) == "| oapl | 0.001 |"
    assert last({"Lag 8": {"oapl": {"0.003": cell("0.003")}}}, 1) == "| oapl | none |"
    assert last({"Lag 1": {"oapl": row}, "Lag 8": {"oapl": row, "grpo": row}}, 0) == (
        "| grpo |  | 0.01 |"
    )


def test_intervals_are_those_of_student():
    """By hand, with the 97.5 % quantile of t at 4 degrees; and a difference is seed by seed."""
    runs = objectives.compared(FULL, Arm("live", 8), "oapl", {"optim.learning_rate": 1e-3})
    ours, theirs = SCORES["oapl"], SCORES["grpo_is"]
    lines = lambda of: [line_of(run, value) for run, value in zip(runs, of, strict=True)]
    cells = [table.Cell(lines(of), []) for of in (ours, theirs)]
    squares = sum((a - b - 0.114) ** 2 for a, b in zip(ours, theirs, strict=True))
    reach = 2.776445 * (squares / 4 / 5) ** 0.5
    mean, low, high = table.difference(*cells, "pass@1")
    assert (mean, low, high) == pytest.approx((0.114, 0.114 - reach, 0.114 + reach), abs=1e-6)
    assert table.verdict((mean, low, high)) == "more"
    assert table.verdict(table.difference(*cells[::-1], "pass@1")) == "less"
    assert table.verdict((0.1, 0.0, 0.2)) == "level"
    assert table.verdict(table.spread([0.1])) == "level"  # one seed decides nothing


# The page


def render(root, to, *more):
    command = [sys.executable, "-m", "experiments.comparison", f"--root={root}", f"--to={to}"]
    subprocess.run([*command, *more], check=True, cwd=ROOT, timeout=SECONDS)


def test_pictures_and_tables_of_incomplete_results(tmp_path):
    scores = {"oapl": SCORES["oapl"], "grpo": [0.6, None, 0.6, 0.7, None]}
    lines = [*starts(0.25), *an_arm(Arm("live", 128), scores)]
    surface = next(t for t in lag.tables(FULL) if t.title == "Lag 128")
    lines += [line_of(r, 0.5) for row in surface.cells.values() for c in row.values() for r in c]
    written = JsonLines(epath.Path(tmp_path / RESULTS), exclusive=False)
    for line in (*lines, {**lines[0], "key": "0", "settings": {**lines[0]["settings"], "seed": 9}}):
        written.append(line)
    page = tmp_path / "docs" / "comparison.md"
    page.parent.mkdir()
    page.write_text("Words.\n<!-- rates that lose no run -->\nold\n<!-- end -->\nMore words.\n")
    render(tmp_path, page.parent)
    pictures = {path.stem for path in page.parent.glob("comparison/*.png")}
    assert pictures == {"methods", "lags", "generations", "pass_at_k", "rates"}
    text = page.read_text()
    assert text.startswith("Words.\n<!--")
    assert text.endswith("-->\nMore words.\n")
    assert "old" not in text
    assert "sft" in text
    kept = Results(epath.Path(page.parent / "comparison")).lines
    assert {line["key"] for line in kept.values()} == {line["key"] for line in lines}


def test_published_results_give_the_published_page(tmp_path):
    """Tables, and every number of the text that a table can hold."""
    published = (ROOT / "docs" / "comparison.md").read_text()
    results = Results(epath.Path(ROOT / "docs" / "comparison"), any_defaults=True)
    parts = dict(comparison.blocks(results, FULL))
    assert comparison.fill(published, parts) == published
    assert len(comparison.lines_of(results, FULL)) == len(results.lines) == 1653
    tables = "\n".join(parts.values())
    numbers = set(re.findall(r"\d*\.\d+", tables))
    prose = re.sub(r"<!-- .+? -->\n.*?<!-- end -->|`.*?`|arXiv \S+", "", published, flags=re.DOTALL)
    unknown = [n for n in re.findall(r"(?<![\d.])0?\.\d+", prose) if not {n, f"0{n}"} & numbers]
    assert unknown == []


# The launcher


def end_at_once(run, root):
    """Replaces local.work in a worker: ends with the pass@1 that a file holds."""
    workdir = run.workdir(root)
    workdir.mkdir(parents=True, exist_ok=True)
    outcome = {"outcome": "ended", run.split: {"pass@1": float((root / "pass@1").read_text())}}
    (workdir / "outcome.json").write_text(json.dumps(outcome))
    return 0.0


def launched(root, *runs, pass_at_1):
    """Launches runs; returns the kinds of the lines and the reasons of the broken runs."""
    root.mkdir(exist_ok=True)
    (root / "pass@1").write_text(pass_at_1)
    launcher = launch.Launcher(epath.Path(root), clean=True)
    workers = local.Workers(epath.Path(root), jobs=1)
    launcher.run(lambda add: add(*runs), "quick", workers)
    return [line["settings"]["kind"] for line in results_in(root)], launcher.broken


def results_in(root):
    path = root / RESULTS
    return [json.loads(x) for x in path.read_text().splitlines()] if path.exists() else []


def test_another_machine_resumes_from_the_results_alone(tmp_path, monkeypatch):
    """It repeats the warm-up for a second run, which must end as it did before."""
    monkeypatch.setattr(local, "work", end_at_once)
    one = warm_up(QUICK, 0)
    two = train(QUICK, Arm("live", 8), "oapl", {}, 0, "validation")
    here, there, elsewhere = (tmp_path / name for name in ("here", "there", "elsewhere"))
    assert launched(here, one, pass_at_1="0.25") == (["warm_up"], {})
    for root in (there, elsewhere):
        root.mkdir()
        (root / RESULTS).write_text((here / RESULTS).read_text())
    assert launched(there, one, pass_at_1="0.26") == (["warm_up"], {})  # nothing to do
    assert launched(there, two, pass_at_1="0.25") == (["warm_up", "train"], {})
    for _ in range(2):
        with pytest.raises(RunError, match="--root"):
            launched(elsewhere, two, pass_at_1="0.26")
    assert len(results_in(elsewhere)) == 1


def test_a_run_that_breaks_is_named_and_tried_again(tmp_path, monkeypatch):
    monkeypatch.setattr(local, "work", end_at_once)
    runs = [warm_up(QUICK, 0), train(QUICK, Arm("live", 8), "oapl", {}, 0, "validation")]
    kinds, broken = launched(tmp_path, *runs, pass_at_1="no number")
    assert (kinds, list(broken)) == ([], runs[:1])  # the second run needs the first
    assert "ValueError" in broken[runs[0]]
    assert launched(tmp_path, *runs, pass_at_1="0.25") == (["warm_up", "train"], {})


# The commands


def start(root: Path, module: str = "objectives", **where) -> subprocess.Popen:
    # With the default SIGINT, which background jobs of a shell ignore.
    command = ["env", "--default-signal=INT", sys.executable, "-m", "experiments.launch"]
    flags = ["--to=local", "--form=quick", "--clean", f"--root={root}"]
    command += [f"--experiment=experiments/{module}.py", *flags]
    return subprocess.Popen(command, cwd=ROOT, env=quick_compilation(), **where)


def interrupt(root: Path, number: int, lines: int) -> int:
    """Starts the command, and sends it a signal once so many runs have ended."""
    process, started = start(root), time.monotonic()
    while len(results_in(root)) < lines:
        assert process.poll() is None
        assert time.monotonic() - started < SECONDS
        time.sleep(0.1)
    process.send_signal(number)
    return process.wait(timeout=SECONDS)


def children(process: int) -> list[int]:
    return [int(p) for p in Path(f"/proc/{process}/task/{process}/children").read_text().split()]


def kill_a_worker(root: Path) -> str:
    """Starts the command and kills a process of its runs; returns the error."""
    launcher, started = start(root, stderr=subprocess.PIPE, text=True), time.monotonic()
    while not (workers := [p for child in children(launcher.pid) for p in children(child)]):
        assert launcher.poll() is None
        assert time.monotonic() - started < SECONDS
        time.sleep(0.1)
    os.kill(workers[0], signal.SIGKILL)
    error = launcher.communicate(timeout=SECONDS)[1]
    assert launcher.returncode == 1
    return error


def test_the_quick_comparison_resumes_after_interruptions(tmp_path):
    assert str(tmp_path / "runs") in kill_a_worker(tmp_path)
    assert interrupt(tmp_path, signal.SIGKILL, lines=1) == -signal.SIGKILL
    first = (tmp_path / RESULTS).read_text()
    assert interrupt(tmp_path, signal.SIGINT, lines=6) == 130
    assert start(tmp_path).wait(SECONDS) == 0
    text = (tmp_path / RESULTS).read_text()
    assert text.startswith(first)
    lines = results_in(tmp_path)
    assert len({line["key"] for line in lines}) == len(lines)  # nothing is done twice
    assert {line["outcome"] for line in lines} == {"ended"}
    found = comparison.collect(Results(epath.Path(tmp_path)), QUICK)
    assert {arm for arm, _ in arms(QUICK)} == set(found)
    assert all(set(methods) == set(QUICK.core) for methods in found.values())

    # The stream of a replay is the same for both objectives, and is not what they sample.
    of = {
        ((run := line["settings"])["objective"], json.dumps(run["stream"])): line
        for line in lines
        if (line["settings"]["split"], line["settings"]["kind"]) == ("test", "train")
    }
    streams = {name for _, name in of} - {"null"}
    assert len(streams) == 1 + len(QUICK.lags)
    for name in streams:
        assert of["oapl", name]["curve"]["reward"] == of["grpo", name]["curve"]["reward"]
        assert of["oapl", name]["curve"]["kl"] != of["grpo", name]["curve"]["kl"]
    # Workdirs of finished runs are gone, but for those that others start from.
    kept = {line["key"] for line in lines if line["settings"]["kind"] != "train"}
    kept |= {line["key"] for line in lines if "rollout.record" in line["settings"]["overrides"]}
    assert {path.name for path in (tmp_path / "runs").iterdir()} == kept

    assert start(tmp_path).wait(SECONDS) == 0
    assert (tmp_path / RESULTS).read_text() == text
    assert start(tmp_path, "lag").wait(SECONDS) == 0
    assert (tmp_path / RESULTS).read_text().startswith(text)
    render(tmp_path, tmp_path / "docs", "--quick")
    page = (tmp_path / "docs" / "comparison.md").read_text()
    assert all(part in page for part in ("`grpo`", "Lag 8", "Adam's moments at a sync"))


def test_one_launcher_at_a_time(tmp_path):
    file = JsonLines(epath.Path(tmp_path / RESULTS), exclusive=True)
    assert start(tmp_path).wait(SECONDS) == 2
    file.close()
