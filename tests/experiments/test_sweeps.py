"""Sweeps: combinators, every point of every experiment, manifests, stale points, table, search."""

import json
import re
import sys
import textwrap
import threading
from concurrent.futures import Future
from pathlib import Path

import pytest
from absl import flags
from etils import epath
from ml_collections import config_flags

from experiments import launch, manifest, measures, paper, readme, sweep, table
from experiments.comparison import fill
from experiments.search import Range
from experiments.sweep import (
    FORMS,
    RESULTS,
    Add,
    Results,
    grouped,
    listed,
    load_experiment,
    named,
    point,
    rows_of,
)
from oapl_jax.config import Config
from oapl_jax.errors import RunError, UserError
from oapl_jax.files import JsonLines

ROOT = Path(__file__).parents[2]
FIGURES = ("objectives", "steps", "lag", "pass_at_k", "code_rounds", "betas", "ablations")
HAVE = {"objectives", "lag"}  # their forms on CPU have a test of their own
CARD = ("Claim", "Command", "Hardware", "Scale", "Hours", "Expected", "Measured")


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
    rows = rows_of(add)
    against = getattr(module, "AGAINST", ())
    assert any(set(pair) <= rows.keys() for pair in against) or name in HAVE
    seeds = [[p.seed for p in row] for row in rows.values()]
    assert all(row == seeds[0] for row in seeds)  # differences are paired
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
    """Its cost is that of the plan and the list price."""
    card = readme.card(name)
    assert [field for field in CARD if not card.get(field)] == []
    assert re.search(r"commits? [0-9a-f]{7}\b.*\b\d{4}-\d\d-\d\d\b", card["Measured"])
    module = load_experiment(str(ROOT / f"experiments/{name}.py"))
    points = listed(module.sweep, no_results(), "paper")
    assert all(str(cost) in card["Scale"] for cost in paper.costs(points, paper.TOPOLOGY, None))


def test_the_figures_have_the_papers_values():
    points = {
        n: listed(load_experiment(str(ROOT / f"experiments/{n}.py")).sweep, no_results(), "paper")
        for n in FIGURES
    }
    of = lambda name, key: {p.flat_config[key] for p in points[name] if p.objective == "oapl"}
    assert of("lag", "lag.steps") == {1, 10, 50, 100, 400}
    assert of("betas", "objective.beta1") == {0.5, 1.0, 2.0, 1e6}
    assert of("betas", "objective.beta2") == {1e-4, 1e-3, 1e-2}
    assert {p.samples for p in points["pass_at_k"]} == {256}
    assert of("ablations", "objective.denominator") == {"behavior", "learner"}
    assert of("ablations", "group_size") == {4, 8, 16}
    rounds = [(p.kind, p.config[-1]) for p in points["code_rounds"]]
    assert rounds == [
        ("warm_up", "0"),
        *(("generate", "1"), ("train", "1"), ("generate", "2"), ("train", "2")),
    ]
    shared = {p.trained for n in ("objectives", "steps", "pass_at_k") for p in points[n]}
    assert len(shared) == 3  # base, OAPL and GRPO + IS are trained once
    assert len(shared & {p.trained for p in points["lag"]}) == 2
    assert len({p.trained for p in points["betas"]} - shared) == 11


def test_the_cost_is_that_of_the_planned_step():
    runs = paper.runs({"objective": ("oapl",), "lag.steps": (1, 50)})
    line = json.loads(paper.TABLE.read_text())["competition_math qwen3-4b-thinking-2507 v5e:8x8"]
    hours = 2 * 1000 * line["roofline"]["seconds"] / line["fleet"]["learning"] / 3600
    found = paper.cost([*runs, *runs], "v5e:8x8", price=2.0)
    assert (found.points, found.hours) == (2, pytest.approx(hours))
    assert found.dollars == pytest.approx(hours * 64 * 2)
    assert paper.cost(runs, "v5p:4x4x4").dollars > 0
    for topology in ("v6e:8x8", "v5e:3x3"):  # no list price here; no such slice
        with pytest.raises(UserError):
            paper.cost(runs, topology)


# Published results


@pytest.mark.parametrize("name", FIGURES)
def test_published_tables_are_those_of_the_published_results(name):
    published = ROOT / "docs/experiments"
    root = ROOT / "docs/comparison" if name in HAVE else published
    module = load_experiment(str(ROOT / f"experiments/{name}.py"))
    found = table.table_of(module, epath.Path(root), "cpu", keep_stale=True)
    assert found.missing == []
    expected = json.loads((published / f"{name}.json").read_text())
    for part in ("rows", "differences", "failed"):
        assert json.loads(json.dumps(found.json()[part])) == expected[part]
    text = found.markdown().rstrip("\n")
    assert (published / f"{name}.md").read_text().startswith(text)


def test_the_readme_is_what_its_command_writes():
    page = (ROOT / "experiments/README.md").read_text()
    parts = readme.parts(ROOT / "docs/experiments", paper.TOPOLOGY, None)
    assert fill(page, parts) == page


def test_the_sweep_of_the_page_has_six_points_that_apply(tmp_path):
    page = (ROOT / "experiments/README.md").read_text()
    (text,) = re.findall(r"`my_sweep\.py`:\n\n((?: {4}.*\n|\n)+)", page)
    (tmp_path / "my_sweep.py").write_text(textwrap.dedent(text))
    points = named(load_experiment(str(tmp_path / "my_sweep.py")).sweep, no_results(), "cpu")
    names = [f"{method}, seed {seed}" for method in ("oapl", "grpo") for seed in range(3)]
    assert list(points.values()) == names
    for each in points:
        Config.from_dict(each.resolve(epath.Path("/root")).to_dict())


# The launcher, with points that end at once


def run_of(seed=0, **changes):
    return point("arithmetic:chain_sum", {"objective": "oapl", "seed": seed, **changes})


def sweep_of_rows(add):
    add(run_of(0), run_of(1), row="plain")
    add(run_of(2, **{"lag.steps": 8}))


def sweep_without_rows(add):
    for values in add.product({"lag.steps": (1, 8)}, add.seeds(2)):
        add(run_of(**values))


def sweep_with_a_long_row(add):
    add(run_of(0), row="a" * 200)


@pytest.mark.parametrize(
    ("of", "names"),
    [
        (sweep_of_rows, ["plain, seed 0", "plain, seed 1", "train oapl seed 2"]),
        (
            sweep_without_rows,
            ["steps 1, seed 0", "steps 1, seed 1", "steps 8, seed 0", "steps 8, seed 1"],
        ),
        (sweep_with_a_long_row, ["train oapl seed 0"]),
    ],
)
def test_points_are_named_by_their_row(of, names):
    assert list(named(of, no_results(), "cpu").values()) == names


class Instant:
    """Ends points as the test says: a pass@1, or an exception."""

    deadline = 60.0

    def __init__(self, root, results=None, at_once=2):
        self.root, self.results, self.at_once = root, results or {}, at_once
        self.started, self.held, self.closed = [], (), False

    def submit(self, each, *, again):
        self.started.append(each)
        self.again = [*getattr(self, "again", []), again]
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

    def holds(self, each):
        return each.seed in self.held

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


def test_a_fresh_grading_keeps_the_training_that_another_point_has_done(root, monkeypatch):
    """Both are stale; the first is trained anew, and the second only graded anew."""
    one = run_of()
    two = sweep.dataclasses.replace(one, samples=256)
    launched(root, [one, two])
    change_code(monkeypatch)
    launched(root, [one], stale_points="redo")
    workdir = one.workdir(root)
    (workdir / "checkpoint").touch()
    (two.outcome(root)).write_text("{}")
    assert launched(root, [two], stale_points="redo")[0] == [0]
    assert (workdir / "checkpoint").exists()
    assert json.loads(two.outcome(root).read_text())["outcome"] == "ended"
    assert states(root, [one, two]) == ["ended", "ended"]


def test_a_broken_point_and_a_stale_one_are_begun_again(root, monkeypatch):
    """What an earlier try started must not go on; an unfinished point does."""
    points = [run_of(seed) for seed in range(3)]
    launched(root, points[:2], {0: RuntimeError("killed")})
    manifest.Manifests(root).begin(points[2], fresh=False)
    change_code(monkeypatch)
    backend = Instant(root)
    backend.held = (2,)
    launcher = launch.Launcher(root, stale_points="redo")
    launcher.run(lambda add: add(*points), "cpu", backend)
    assert [each.seed for each in backend.started] == [2, 0, 1]  # a held point goes first
    assert backend.again == [True] * 3
    manifest.Manifests(root).begin(run_of(3), fresh=False)
    backend = Instant(root)
    launch.Launcher(root).run(lambda add: add(run_of(3), run_of(4)), "cpu", backend)
    assert backend.again == [False, False]


def test_points_that_share_a_workdir_are_not_run_at_once(root):
    one = run_of()
    two = sweep.dataclasses.replace(one, samples=256)
    assert one.workdir(root) == two.workdir(root)
    assert one.outcome(root) != two.outcome(root)
    backend, active = Instant(root), []

    def submit(each, *, again):
        ended = Instant.submit(backend, each, again=again)
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
    pair = "steps 16 - steps 8"
    assert found.differences[pair]["pass@1"][0] == pytest.approx(0.1)  # of seed 0, which both have
    assert [named.partition(":")[0] for named in found.failed] == ["steps 8, seed 2"]
    assert [named.partition(":")[0] for named in found.missing] == [
        "steps 16, seed 1",
        "steps 16, seed 2",
    ]
    assert all(named in found.markdown() for named in (*found.failed, *found.missing))
    parsed = json.loads(json.dumps(found.json(), allow_nan=False))
    assert parsed["rows"]["steps 8"]["measures"]["pass@1"][0] == pytest.approx(0.2)
    assert parsed["differences"][pair]["pass@1"] == [pytest.approx(0.1), None, None]
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


def starting_from(seed, **changes):
    start = point("arithmetic:chain_sum", {"objective": "oapl", "seed": seed}, kind="warm_up")
    return sweep.dataclasses.replace(run_of(seed), **{"start": start, **changes})


@pytest.mark.parametrize(
    ("make", "names"),
    [
        (
            lambda seed: [run_of(seed, **{"lag.steps": lag}) for lag in (8, 16)],
            ["steps 8", "steps 16"],
        ),
        (  # a default beside its override
            lambda seed: [run_of(seed), run_of(seed, **{"lag.steps": 8})],
            ["steps 16", "steps 8"],
        ),
        (
            lambda seed: [starting_from(seed, forget_every=8), starting_from(seed)],
            ["forget_every 8", "oapl"],
        ),
        (
            lambda seed: [
                starting_from(
                    seed, start=sweep.dataclasses.replace(starting_from(seed).start, prompts=n)
                )
                for n in (4, 5)
            ],
            ["start's prompts 4", "start's prompts 5"],
        ),
        (
            lambda seed: [run_of(seed), starting_from(seed, start=None, at_steps=(1, 2))],
            ["oapl", "at_steps (1, 2)"],
        ),
    ],
)
def test_rows_are_named_by_what_varies(make, names):
    """A row has the points that differ in the seed alone, also of the points they start from."""
    points = [each for seed in (0, 1) for each in make(seed)]
    found = grouped(points)
    assert list(found) == names
    assert [[each.seed for each in row] for row in found.values()] == [[0, 1]] * len(names)


def graded_line(each, **more):
    line = {"key": each.key, "settings": each.settings, "code": "", "outcome": "ended"}
    return {**line, "generations": 100, **more}


def test_figures_of_graded_checkpoints_and_of_generations(root):
    """As at the paper's scale: no validation, and benchmarks graded at several checkpoints."""
    one = point("arithmetic", {"objective": "oapl"}, benchmarks=("aime", "hmmt"), at_steps=(8, 16))
    two = sweep.dataclasses.replace(one, start=sweep.dataclasses.replace(one, publish=True))
    graded = {
        name: {"8": {"pass@1": 0.1, "pass@4": 0.3}, "16": {"pass@1": 0.2, "pass@4": 0.5}}
        for name in ("aime", "hmmt")
    }
    of_step = {step: {name: graded[name][step] for name in graded} for step in ("8", "16")}
    curve = {"entropy": [0.5, None, 0.3]}
    file = JsonLines(root / RESULTS, exclusive=False)
    for each in (one, two.start, two):
        file.append(graded_line(each, benchmarks=of_step, curve=curve))
    ungraded = sweep.dataclasses.replace(two, seed=1)
    file.append(graded_line(ungraded))
    module = Module([])
    module.sweep = lambda add: (add(one, row="one"), add(two, ungraded, row="two"))
    module.KS, module.AGAINST = (1, 4), (("two", "one"),)
    found = table.table_of(module, root, "paper", keep_stale=True)
    assert [named.partition(":")[0] for named in found.missing] == ["two, seed 1"]
    assert found.measures[:4] == ("aime pass@1", "aime pass@4", "hmmt pass@1", "hmmt pass@4")
    (line,) = found.cells["two"].lines
    assert measures.by_step(line, "hmmt pass@4") == ([8, 16], [0.3, 0.5])
    assert measures.by_step(line, "entropy") == ([8, 24], [0.5, 0.3])
    assert measures.score(line, "hmmt pass@4") == 0.5  # of the last step
    assert measures.score(line, "generations") == 200  # with those of the run before
    assert found.differences["two - one"]["aime pass@1"][0] == 0
    drawn = table.panels(found, ("pass@1", "pass@16", "entropy", "generations"))
    assert drawn == [
        ("bars", "aime pass@1"),
        *(("steps", f"{name} pass@1") for name in ("aime", "hmmt")),
        ("steps", "entropy"),
        ("generations", "aime pass@1"),
    ]
    table.save(table.draw(found, ("pass@1", "entropy", "generations")), root / "figure.png")


def test_a_curve_that_no_run_has_is_left_out(root):
    """Some forms of a figure validate fewer k."""
    each = run_of()
    progress = [[8, 100, 0.1, 0.5], [16, 200, 0.3, 0.4]]
    line = graded_line(
        each, progress=progress, validation={"pass@1": [0.1, 0.3], "pass@4": [0.2, 0.4]}
    )
    JsonLines(root / RESULTS, exclusive=False).append(line)
    found = table.table_of(Module([each]), root, "quick", keep_stale=True)
    drawn = table.panels(found, ("pass@1", "pass@4", "pass@16"))
    assert drawn[1:] == [("steps", "pass@1"), ("steps", "pass@4")]
    assert measures.by_generations(line) == ([100, 200], [0.1, 0.3])


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


@pytest.mark.parametrize("maximize", [True, False])
def test_a_failed_trial_is_the_worst_of_a_search(root, maximize):
    """Of entropy too, which a failed point does not have."""
    found, results = {}, Results(root)
    search = searching(root, found, measure="entropy", maximize=maximize)
    while not found or found["best"] is None:
        for number, each in enumerate(listed(search, results, "cpu")):
            line = {"key": each.key, "settings": each.settings, "code": ""}
            ended = {"outcome": "ended", "test": {"entropy": float(number)}}
            failed = {"outcome": "failed", "reason": "not finite"}
            results.take(line | (failed if number in (0, 11) else ended))
    points = listed(search, results, "cpu")
    best = points[10 if maximize else 1]
    assert dict(best.overrides)["optim.learning_rate"] == found["best"]["optim.learning_rate"]


def test_a_search_for_what_is_not_measured_is_refused(root):
    results = Results(root)
    search = searching(root, {}, measure="pass@3")
    for each in listed(search, results, "cpu"):
        results.take(graded_line(each, test={"pass@1": 0.5}))
    with pytest.raises(UserError):
        listed(search, results, "cpu")


def test_a_locked_root_is_refused(root):
    file = JsonLines(root / RESULTS, exclusive=True)
    with pytest.raises(UserError):
        launch.Launcher(root)
    file.close()


def test_a_hanging_point_ends_the_launch(root, monkeypatch):
    monkeypatch.setattr(launch, "LOOK", 0.01)
    backend = Instant(root)
    backend.deadline = 0.1
    backend.submit = lambda each, *, again: Future()
    launcher = launch.Launcher(root)
    with pytest.raises(RunError):
        launcher.run(lambda add: add(run_of()), "cpu", backend)
    assert backend.closed


def test_a_root_in_a_bucket_is_refused(monkeypatch):
    words = ["launch", "--experiment=experiments/lag.py", "--root=gs://bucket/sweeps"]
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(UserError, match="--root=gs://bucket/sweeps"):
        launch.main()
