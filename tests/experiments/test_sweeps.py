"""Sweeps: combinators, every point of every experiment, manifests, stale points, table, search."""

import json
import sys
import threading
from concurrent.futures import Future
from pathlib import Path

import pytest
from absl import flags
from etils import epath
from ml_collections import config_flags

from experiments import launch, manifest, paper, sweep, table
from experiments.search import Range
from experiments.sweep import FORMS, RESULTS, Add, Results, grouped, listed, load_experiment, point
from oapl_jax.config import Config
from oapl_jax.errors import RunError, UserError
from oapl_jax.files import JsonLines

ROOT = Path(__file__).parents[2]
FIGURES = ("objectives", "steps", "lag", "pass_at_k", "code_rounds", "betas", "ablations")
HAVE = {"objectives", "lag"}  # their forms on CPU have a test of their own
CARD = ("Claim:", "Command:", "Hardware:", "Hours:", "Expected:", "Measured:")


def no_results():
    return Results(epath.Path("/nowhere"))


# Combinators


@pytest.mark.parametrize(
    ("found", "right"),
    [
        (Add.product({"a": (1, 2)}), [{"a": 1}, {"a": 2}]),
        (
            Add.product({"a": (1, 2), "b": "xy"}),
            [{"a": 1, "b": "x"}, {"a": 1, "b": "y"}, {"a": 2, "b": "x"}, {"a": 2, "b": "y"}],
        ),
        (Add.product(), [{}]),
        (Add.product({"a": ()}), []),
        (Add.zip({"a": (1, 2), "b": "xy"}), [{"a": 1, "b": "x"}, {"a": 2, "b": "y"}]),
        (Add.zip([{"a": 1, "c": 0}], {"b": "x"}), [{"a": 1, "c": 0, "b": "x"}]),
        (Add.chain([{"a": 1}], [{"b": 2}, {}]), [{"a": 1}, {"b": 2}, {}]),
        (Add.seeds(2), [{"seed": 0}, {"seed": 1}]),
        (
            Add.product(Add.zip({"a": (1, 2), "b": (3, 4)}), Add.seeds(2)),
            [{"a": a, "b": b, "seed": s} for a, b in ((1, 3), (2, 4)) for s in (0, 1)],
        ),
    ],
)
def test_combinators(found, right):
    assert found == right


@pytest.mark.parametrize(
    "make",
    [
        lambda: Add.zip({"a": (1, 2), "b": (3,)}),
        lambda: Add.product({"a": (1,)}, [{"a": 2}]),
        lambda: load_experiment("experiments/nothing.py"),
        lambda: load_experiment(str(ROOT / "experiments/table.py")),
    ],
)
def test_a_sweep_that_can_not_be_is_refused(make):
    with pytest.raises(UserError):
        make()


# Experiments


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", FIGURES)
def test_every_point_of_every_experiment_applies_to_its_locked_config(name, form, monkeypatch):
    """Seeds aside; a point's flags, read as oapl_jax.train reads them, give its configuration."""
    monkeypatch.chdir(ROOT)
    module = load_experiment(str(ROOT / f"experiments/{name}.py"))
    points = listed(module.sweep, no_results(), form)
    assert points
    assert len({each.key for each in points}) == len(points)
    if form == "cpu" and name in HAVE:
        return
    add, root = Add(no_results(), form), epath.Path("/root")
    module.sweep(add)
    rows = module.cells(add)
    assert {p for cell in rows.values() for p in cell} <= set(add.points) or name in HAVE
    for each in {(p.kind, p.config, p.objective, p.overrides): p for p in points}.values():
        config = each.resolve(root)
        Config.from_dict(config.to_dict())
        if each is not points[-1]:  # it takes as long as a start
            continue
        values = flags.FlagValues()
        config_flags.DEFINE_config_file("config", flag_values=values)
        flags.DEFINE_string("workdir", None, "", flag_values=values)
        monkeypatch.setattr(sys, "argv", ["train", *each.flags(root)])
        values(sys.argv)
        assert values["config"].value.to_dict() == config.to_dict()


@pytest.mark.parametrize("name", FIGURES)
def test_every_experiment_has_a_card(name):
    card = load_experiment(str(ROOT / f"experiments/{name}.py")).__doc__
    assert [line for line in CARD if line not in card] == []


def test_the_figures_have_the_papers_values():
    points = {
        n: listed(load_experiment(str(ROOT / f"experiments/{n}.py")).sweep, no_results(), "paper")
        for n in FIGURES
    }
    of = lambda name, key: {dict(p.overrides).get(key) for p in points[name]} - {None}
    assert of("lag", "lag.steps") == {1, 10, 50, 100, 400}
    assert of("betas", "objective.beta1") == {0.5, 1.0, 2.0, 1e6}
    assert of("betas", "objective.beta2") == {1e-4, 1e-3, 1e-2}
    assert {p.samples for p in points["pass_at_k"]} == {256}
    assert of("ablations", "objective.denominator") == {"learner"}
    assert of("ablations", "group_size") == {4, 16}
    rounds = [(p.kind, p.config[-1]) for p in points["code_rounds"]]
    assert rounds == [
        ("warm_up", "0"),
        *(("generate", "1"), ("train", "1"), ("generate", "2"), ("train", "2")),
    ]
    shared = {p.trained for n in ("objectives", "steps", "pass_at_k") for p in points[n]}
    assert len(shared) == 3  # base, OAPL and GRPO + IS are trained once


def test_the_cost_is_that_of_the_planned_step():
    runs = paper.runs({"objective": ("oapl",), "lag.steps": (1, 50)})
    line = json.loads(paper.TABLE.read_text())["competition_math qwen3-4b-thinking-2507 v5e:8x8"]
    hours = 2 * 1000 * line["roofline"]["seconds"] / line["fleet"]["learning"] / 3600
    found = paper.cost([*runs, *runs], "v5e:8x8", price=2.0)
    assert (found.points, found.hours) == (2, pytest.approx(hours))
    assert found.dollars == pytest.approx(hours * 64 * 2)


# The launcher, with points that end at once


def run_of(seed=0, **changes):
    return point("arithmetic:chain_sum", {"objective": "oapl", "seed": seed, **changes})


class Instant:
    """Ends points as the test says: a pass@1, or an exception."""

    deadline = 60.0

    def __init__(self, root, results=None, at_once=2):
        self.root, self.results, self.at_once = root, results or {}, at_once
        self.started, self.most, self.closed = [], 0, False

    def submit(self, each):
        self.started.append(each)
        future: Future = Future()
        found = self.results.get(each.seed, 0.5)
        if isinstance(found, BaseException):
            future.set_exception(found)
            return future
        outcome = {"outcome": "ended", "test": {"pass@1": found}, "lags": {"0": 8}, "data": {}}
        if found is None:
            outcome = {"outcome": "failed", "reason": "not finite", "lags": {}, "data": {}}
        each.workdir(self.root).mkdir(parents=True, exist_ok=True)
        each.outcome(self.root).write_text(json.dumps(outcome))
        future.set_result(1.0)
        return future

    def ready(self, each):
        return each.outcome(self.root).exists()

    def close(self):
        self.closed = True


def launched(root, points, results=None, **settings):
    """Launches points; returns the seeds that were started, and the launcher."""
    backend = Instant(root, results)
    launcher = launch.Launcher(root, **settings)
    launcher.run(lambda add: add(*points), "cpu", backend)
    assert backend.closed
    return [each.seed for each in backend.started], launcher


@pytest.fixture
def root(tmp_path):
    return epath.Path(tmp_path)


def states(root, points):
    results = Results(root, code=manifest.checkout()["code"])
    return [manifest.Manifests(root).state(each, results) for each in points]


def test_starting_again_does_what_is_missing(root):
    points = [run_of(seed) for seed in range(4)]
    broken = {1: RuntimeError("disk"), 2: None}
    assert states(root, points) == ["missing"] * 4
    started, launcher = launched(root, points[:3], broken)
    assert (started, list(launcher.broken)) == ([0, 1, 2], [points[1]])
    assert states(root, points) == ["ended", "broken", "failed", "missing"]
    assert launched(root, points)[0] == [1, 3]
    assert launched(root, points)[0] == []
    assert states(root, points) == ["ended", "ended", "failed", "ended"]


def test_a_manifest_has_all_that_a_result_depends_on(root):
    each = run_of(3, **{"lag.steps": 8})
    launched(root, [each], {3: RuntimeError("killed")})
    launched(root, [each])
    found = manifest.Manifests(root).read(each)
    assert found["restarts"] == 1
    assert found["settings"]["overrides"] == {"lag.steps": 8}
    assert (found["config"]["lag"]["steps"], found["config"]["num_steps"]) == (8, 400)
    assert found["seeds"] == {"seed": 3, "data.seed": 0}
    assert found["lags"] == {"0": 8}
    assert {"python", "jax", "numpy"} <= set(found["versions"])
    assert found["started"] <= found["ended"]
    assert {"commit", "uncommitted", "code", "data", "outcome"} <= set(found)


def test_checksums_and_lags_are_summed_from_the_files(tmp_path):
    directory = tmp_path / "problems" / "x-1" / "1.0.0"
    directory.mkdir(parents=True)
    (directory / "dataset_info.json").write_text("{}")
    (directory / "a.array_record").write_text("a")
    first = manifest.data_checksums(str(tmp_path))
    assert set(first["x-1"]) == {"dataset_info.json", "a.array_record"}
    (directory / "a.array_record").write_text("b")
    assert manifest.data_checksums(str(tmp_path)) != first
    lines = [{"lag/histogram": {"0": 4, "1": 4}}, {"lag/histogram": {"1": 8}}, {}]
    assert manifest.lag_histogram(lines) == {"0": 4, "1": 12}


def change_code(monkeypatch):
    other = {**manifest.checkout(), "code": "other"}
    for module in (manifest, launch):
        monkeypatch.setattr(module, "checkout", lambda: other)


def change_config(monkeypatch):
    default = sweep.Point.resolve

    def resolve(self, where):
        config = default(self, where)
        config.optim.b2 = 0.5
        return config

    monkeypatch.setattr(sweep.Point, "resolve", resolve)
    sweep.key_of.cache_clear()


@pytest.mark.parametrize(
    ("change", "what"), [(change_code, "code"), (change_config, "configuration")]
)
@pytest.mark.parametrize("results", [{0: 0.5}, {0: RuntimeError("killed")}])
def test_a_point_of_other_code_or_configuration_is_stale(root, monkeypatch, change, what, results):
    """It is neither run again nor resumed before it is said, ended or not."""
    each = run_of()
    launched(root, [each], results)
    old = each.workdir(root)
    old.mkdir(parents=True, exist_ok=True)
    (old / "half").touch()
    with monkeypatch.context() as changed:
        change(changed)
        assert (
            manifest.Manifests(root).state(each, Results(root, code=manifest.checkout()["code"]))
            == f"stale: {what}"
        )
        started, launcher = launched(root, [each])
        assert (started, launcher.stale) == ([], {each: what})
        started, _ = launched(root, [each], stale_points="keep")
        assert started == ([] if results[0] == 0.5 else [0])
        assert (old / "half").exists()
        if results[0] == 0.5:
            assert launched(root, [each], {0: 0.7}, stale_points="redo")[0] == [0]
            assert not (old / "half").exists()
            line = Results(root, code=manifest.checkout()["code"]).line(each)
            assert line is not None
            assert line["test"]["pass@1"] == 0.7
    sweep.key_of.cache_clear()


def test_points_that_share_a_workdir_are_not_run_at_once(root):
    one = run_of()
    two = sweep.dataclasses.replace(one, samples=256)
    assert one.workdir(root) == two.workdir(root)
    assert one.outcome(root) != two.outcome(root)
    backend, active = Instant(root), []

    def submit(each):
        ended = Instant.submit(backend, each)
        future: Future = Future()
        assert each.trained not in active
        active.append(each.trained)
        threading.Timer(0.05, lambda: (active.remove(each.trained), future.set_result(1.0))).start()
        return future if ended.done() else ended

    backend.submit = submit
    launch.Launcher(root).run(lambda add: add(one, two), "cpu", backend)
    assert states(root, [one, two]) == ["ended", "ended"]


# The table


class Module:
    __file__ = "figure.py"
    MEASURES = ("pass@1",)

    def __init__(self, points):
        self.sweep = lambda add: add(*points)


def test_the_table_names_what_is_not_in_its_means(root):
    points = [run_of(s, **{"lag.steps": lag}) for lag in (8, 16) for s in (0, 1, 2)]
    launched(root, points[:3], {0: 0.2, 1: 0.4, 2: None})
    launched(root, points[3:5], {0: 0.3, 1: RuntimeError("killed")})
    found = table.table_of(Module(points), root, "cpu", keep_stale=False)
    assert found.states == {
        "steps 8": {"ended": 2, "failed": 1},
        "steps 16": {"ended": 1, "broken": 1, "missing": 1},
    }
    assert found.cells["steps 8"].of("pass@1") == [0.2, 0.4, 0.0]  # a failed run counts as 0
    assert found.minus("steps 16", "pass@1")[0] == pytest.approx(0.1)  # of seed 0, which both have
    assert len(found.problems) == 3
    assert all(problem.partition(":")[0] in found.markdown() for problem in found.problems)
    parsed = json.loads(json.dumps(found.json(), allow_nan=False))
    assert parsed["rows"]["steps 8"]["measures"]["pass@1"][0] == pytest.approx(0.2)
    assert parsed["rows"]["steps 16"]["minus"]["pass@1"] == [pytest.approx(0.1), None, None]
    table.save(table.draw(found, ("pass@1",)), root / "figure.png")


def test_stale_points_are_in_no_mean(root, monkeypatch):
    points = [run_of(seed) for seed in (0, 1)]
    launched(root, points, {0: 0.2, 1: 0.4})
    monkeypatch.setattr(table, "checkout", lambda: {"code": "other"})
    monkeypatch.setattr(manifest, "checkout", lambda: {"code": "other"})
    found = table.table_of(Module(points), root, "cpu", keep_stale=False)
    assert (found.cells, found.states) == ({}, {"oapl": {"stale: code": 2}})
    kept = table.table_of(Module(points), root, "cpu", keep_stale=True)
    assert kept.cells["oapl"].of("pass@1") == [0.2, 0.4]


def test_rows_are_named_by_what_varies():
    points = [run_of(s, **{"lag.steps": lag}) for lag in (8, 16) for s in (0, 1)]
    assert {name: len(rows) for name, rows in grouped(points).items()} == {
        "steps 8": 2,
        "steps 16": 2,
    }


# Search


def searching(root, found, **settings):
    """A search of a learning rate whose best value is 0.01, by one batch after the other."""
    space = {"optim.learning_rate": Range(1e-4, 1.0, log=True), "objective.beta2": (0.1, 0.2)}

    def make(values):
        return [point("arithmetic", {"objective": "oapl", **values})]

    def sweep(add):
        found["best"] = add.search(make, space, trials=12, **settings)

    return sweep


def test_a_search_is_a_function_of_its_results(root):
    found, batches = {}, []
    search = searching(root, found)
    results = Results(root)
    while not batches or found["best"] is None:
        points = listed(search, results, "cpu")
        batches.append(len(points))
        assert listed(search, results, "cpu") == points
        for each in points:
            rate = dict(each.overrides)["optim.learning_rate"]
            value = 1 / (1 + abs(rate - 0.01) * 100)
            line = {"key": each.key, "settings": each.settings, "code": "", "outcome": "ended"}
            results.take(line | {"test": {"pass@1": value}})
    assert batches == [4, 8, 12, 12]
    assert found["best"]["optim.learning_rate"] in [
        dict(p.overrides)["optim.learning_rate"] for p in points
    ]
    best = max(points, key=lambda p: results.line(p)["test"]["pass@1"])
    assert dict(best.overrides)["optim.learning_rate"] == found["best"]["optim.learning_rate"]


def test_a_locked_root_is_refused(root):
    file = JsonLines(root / RESULTS, exclusive=True)
    with pytest.raises(UserError):
        launch.Launcher(root)
    file.close()


def test_a_hanging_point_ends_the_launch(root, monkeypatch):
    monkeypatch.setattr(launch, "LOOK", 0.01)
    backend = Instant(root)
    backend.deadline = 0.1
    backend.submit = lambda each: Future()
    launcher = launch.Launcher(root)
    with pytest.raises(RunError):
        launcher.run(lambda add: add(run_of()), "cpu", backend)
    assert backend.closed
