"""Points of a sweep, the combinators of an experiment file, and the file of results.

An experiment file has a function `sweep(add)`. A point is a configuration of `configs/` with
overrides:

    def sweep(add):
        grid = {"objective": ("oapl", "grpo"), "lag.steps": (8, 32)}
        for values in add.product(grid, add.seeds(3)):
            add(point("arithmetic:chain_sum", values), row=values["objective"])

`row` names a row of the table (experiments/table.py); without any, rows are named by the settings
that vary. A point may start from another point's weights (the warm-up that all points of a seed
share) and may train on rollouts that another point recorded. Two points with equal settings are the
same point.
"""

import dataclasses
import functools
import hashlib
import importlib
import importlib.util
import itertools
import json
import os
import re
import runpy
import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeAlias

from etils import epath

from configs.common import Config
from oapl_jax.errors import UserError
from oapl_jax.files import read_json_lines

RESULTS = "results.jsonl"
# Config keys of the recorded docs/comparison/results.jsonl -> today's; with an objective where only
# its own constant has another name.
_POLICY_GRADIENT = ("estimator", "clip_low", "clip_high", "correction", "correction_cap")
_VESPO = ("power_good", "decay_good", "power_bad", "decay_bad")
RENAMED: dict[str | tuple[str, str], str] = {
    "zero_variance_weight": "buffer.zero_variance_weight",
    "rollout.unpaid_groups": "rollout.max_zero_reward_groups",
    **{f"objective.{name}": f"objective.policy_gradient.{name}" for name in _POLICY_GRADIENT},
    **{f"objective.vespo_{name}": f"objective.vespo.{name}" for name in _VESPO},
    "objective.asymre_shift": "objective.asymre.delta_v",
    "objective.likelihood_weight": "objective.mixed.likelihood_weight",
    ("gspo", "objective.clip_low"): "objective.gspo.clip_low",
    ("gspo", "objective.clip_high"): "objective.gspo.clip_high",
    ("cispo", "objective.correction_cap"): "objective.cispo.cap",
    ("a_star_po", "objective.beta2"): "objective.a_star_po.beta2",
    ("tba", "objective.beta2"): "objective.tba.beta",
    ("opmd_kimi", "objective.beta2"): "objective.opmd_kimi.tau",
}
STARTS = ("start", "stream")  # settings that are points
FORMS = ("paper", "cpu", "quick")  # of an experiment: its own scale, two CPU cores, minutes
LONGEST_NAME = 80  # characters of a row that names its points
PUBLISHED = "versions"  # directory of a workdir
# Grading of the last policy: responses to a problem, and the k of pass@k.
GRADES = {"validation": dict(n=16, ks=(1, 8)), "test": dict(n=64, ks=(1, 8, 64))}
Line = dict[str, Any]  # of the results file
Values: TypeAlias = Mapping[str, Any]  # overrides by config key; also "objective" and "seed"
Grid: TypeAlias = "Mapping[str, Iterable[Any]] | Sequence[Values]"
Rows: TypeAlias = "dict[str, list[Point]]"  # of a table: a point a seed, by name


@dataclasses.dataclass(frozen=True)
class Point:
    """One run of a sweep, identified by its settings.

    kind: "warm_up" (supervised stage, published as version 0), "generate" (a recorded dataset of
      rollouts of `start`; the name is a key of stored results) or "train" (oapl_jax.train).
    config: module of configs/, or a file, and its argument: "arithmetic:chain_sum", "my.py:small".
    objective: a name of configs/objectives.py; "" if the configuration takes none.
    seed: of everything but the problems, which all seeds share.
    overrides: sorted pairs of a config key and its value.
    split: on which the last policy is graded.
    start: its published version is the initial policy; None for a warm-up.
    stream: its rollouts are the training data; None samples live.
    prompts: number of training prompts of "generate".
    forget_every: steps between two resets of Adam's moments; 0 never resets them.
    samples: responses to a problem in the grading; 0: those of GRADES.
    benchmarks: graded in place of the split, by oapl_jax.evaluate.
    at_steps: checkpoint steps that are graded on the benchmarks; none: the last.
    publish: the last policy is published, because other points start from it.
    """

    kind: str
    config: str
    objective: str
    seed: int
    overrides: tuple[tuple[str, Any], ...]
    split: str
    start: "Point | None" = None
    stream: "Point | None" = None
    prompts: int = 0
    forget_every: int = 0
    samples: int = 0
    benchmarks: tuple[str, ...] = ()
    at_steps: tuple[int, ...] = ()
    publish: bool = False

    @property
    def needs(self) -> list["Point"]:
        """Points that must end before this one can start."""
        return [point for point in (self.start, self.stream) if point]

    @property
    def kept(self) -> bool:
        """True if the workdir stays after the end, because other points read it."""
        recorded = dict(self.overrides).get("rollout.record", False)
        return self.kind != "train" or recorded or self.publish

    @property
    def settings(self) -> dict[str, Any]:
        """JSON-able; start and stream are nested. Fields that came later are left out at their
        defaults, so that results from before them keep their identity."""
        mine = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        others = {name: point.settings for name, point in mine.items() if isinstance(point, Point)}
        later = ("samples", "benchmarks", "at_steps", "publish")
        mine = {name: value for name, value in mine.items() if value or name not in later}
        return {**mine, "overrides": dict(self.overrides), **others}

    @property
    def key(self) -> str:
        """A hash of settings and resolved config: a changed default makes another key."""
        return key_of(self)

    @property
    def identity(self) -> str:
        """A hash of the settings alone."""
        return hashlib.sha256(_identity(self).encode()).hexdigest()[:16]

    @property
    def name(self) -> str:
        """Kind, objective and seed, for people."""
        objective = f" {self.objective}" if self.objective else ""
        return f"{self.kind}{objective} seed {self.seed}"

    @property
    def grading(self) -> dict[str, Any]:
        """Settings of `evaluation` for the last policy: n, and the k of pass@k."""
        if not self.samples:
            return GRADES[self.split]
        powers = (2**i for i in range(self.samples.bit_length()))
        return dict(n=self.samples, ks=tuple(k for k in powers if k <= self.samples))

    @property
    def trained(self) -> "Point":
        """The same training without its grading: points that share it share the workdir."""
        return dataclasses.replace(self, samples=0, benchmarks=(), at_steps=())

    def workdir(self, root: epath.Path) -> epath.Path:
        return root / "runs" / self.trained.key

    def outcome(self, root: epath.Path) -> epath.Path:
        """The file that ends the point."""
        suffix = "" if self == self.trained else f"-{self.key}"
        return self.workdir(root) / f"outcome{suffix}.json"

    def weights(self, root: epath.Path) -> epath.Path:
        """The published version, as weights.publisher lays it out."""
        step = self.resolve(root).num_steps if self.kind == "train" else 0
        return self.workdir(root) / PUBLISHED / f"v{step:06d}"

    def values(self, root: epath.Path) -> dict[str, Any]:
        """All overrides: those of the settings that are points, then its own."""
        data_dir = os.fspath(root / "data")
        values = {"seed": self.seed, "data.data_dir": data_dir, "tracking.tensorboard": False}
        if self.start:
            values |= {
                "warmup.num_steps": 0,
                "model.path": os.fspath(self.start.weights(root)),
            }
        if self.stream:
            replay = self.stream.kind == "train"
            values |= {
                "rollout.source": "dataset",
                "rollout.dataset": os.fspath(self.stream.workdir(root) / "rollouts"),
                "rollout.dataset_order": "recorded" if replay else "shuffled",
                "rollout.dataset_version": -1 if replay else 0,
            }
        return values | dict(self.overrides)

    def resolve(self, root: epath.Path) -> Config:
        """Returns the locked config with all overrides applied.

        Raises:
          KeyError, TypeError, ValueError: for an unknown key or a value of the wrong type.
        """
        file, arguments = self.config_file
        if file.startswith("configs/"):
            module = importlib.import_module(f"configs.{file[len('configs/') : -len('.py')]}")
            config = module.get_config(arguments)
        else:
            get_config = runpy.run_path(file)["get_config"]
            config = get_config(arguments) if arguments else get_config()
        config.update_from_flattened_dict(self.values(root))
        return config

    @property
    def flat_config(self) -> dict[str, Any]:
        """The resolved config's values by dotted key."""

        def walk(values: Mapping[str, Any], prefix: str) -> Iterable[tuple[str, Any]]:
            for name, value in values.items():
                if isinstance(value, Mapping):
                    yield from walk(value, f"{prefix}{name}.")
                else:
                    yield f"{prefix}{name}", value

        return dict(walk(self.resolve(epath.Path("/")).to_dict(), ""))

    @property
    def config_file(self) -> tuple[str, str]:
        """The file of --config and its argument."""
        file, _, argument = self.config.partition(":")
        file = file if file.endswith(".py") else f"configs/{file}.py"
        parts = (argument, f"objective={self.objective}" if self.objective else "")
        return file, ",".join(filter(None, parts))

    def flags(self, root: epath.Path, **changes: Any) -> list[str]:
        """--config, --workdir and an override for each value, as oapl_jax.train takes them."""
        file, argument = self.config_file
        changes = {name.replace("__", "."): value for name, value in changes.items()}
        values = {**self.values(root), **changes}
        return [
            f"--config={file}{':' if argument else ''}{argument}",
            f"--workdir={os.fspath(self.workdir(root))}",
            *(f"--config.{name}={value}" for name, value in values.items()),
        ]

    def commands(self, root: epath.Path) -> list["Command"]:
        """The commands that do the same as the launcher: train, publish or record, then grade.

        Only training needs the devices of the configuration's mesh. The others run on any machine.
        """
        workdir = self.workdir(root)
        if self.kind == "generate":
            assert self.start is not None
            version = os.fspath(self.start.weights(root))
            words = [f"--version_dir={version}", f"--to={os.fspath(workdir / 'rollouts')}"]
            words += [f"--prompts={self.prompts}"] if self.prompts else []
            return [Command("record", [*self._flags_here(root), *words])]
        changes = dict(num_steps=0, evaluation__every=0) if self.kind == "warm_up" else {}
        found = [Command("train", self.flags(root, **changes), workdir / "result.json")]
        if self.kind == "warm_up" or self.publish:
            weights = self.weights(root)
            to = f"--to={os.fspath(weights.parent)}"
            words = [f"--from={os.fspath(workdir)}", f"--step={int(weights.name[1:])}", to]
            found.append(Command("publish", words, weights / "COMMITTED"))
        return [*found, *self._grading_commands(root)]

    def _grading_commands(self, root: epath.Path) -> list["Command"]:
        if self.benchmarks:
            words = [*self._flags_here(root), f"--benchmark={','.join(self.benchmarks)}"]
            words += [f"--n={self.samples}"] if self.samples else []
            steps = [[f"--step={step}"] for step in self.at_steps] or [[]]
            return [Command("evaluate", [*words, *step]) for step in steps]
        if not self.split:
            return []
        grading = {f"evaluation__{name}": value for name, value in self.grading.items()}
        words = [*self._flags_here(root, **grading), f"--split={self.split}"]
        return [Command("evaluate", words)]

    def _flags_here(self, root: epath.Path, **changes: Any) -> list[str]:
        """Flags for another machine than the learner's: its mesh has as many devices as it has."""
        mesh = {"mesh__fsdp": -1} if self.flat_config["mesh.fsdp"] > 1 else {}
        return self.flags(root, **mesh, **changes)


@dataclasses.dataclass(frozen=True)
class Command:
    """A command of oapl_jax.

    Attributes:
      made: a file that exists once the command has ended; None if it may run again.
    """

    name: str
    flags: list[str]
    made: epath.Path | None = None

    @property
    def words(self) -> list[str]:
        return ["python", "-m", f"oapl_jax.{self.name}", *self.flags]


def shell(command: Sequence[str]) -> str:
    """A command as one line, quoted for a shell."""
    return shlex.join(command)


@functools.cache  # resolving a config takes milliseconds, and every lookup asks for the key
def key_of(point: Point) -> str:
    config = point.resolve(epath.Path("/")).to_dict()
    text = json.dumps([point.settings, config], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@functools.cache
def _identity(point: Point) -> str:
    return json.dumps(point.settings, sort_keys=True)


def point(
    config: str, values: Values, *, kind: str = "train", split: str = "test", **fields: Any
) -> Point:
    """Makes a point; `values` are overrides, of which "objective" and "seed" are fields."""
    overrides = dict(values)
    objective = overrides.pop("objective", fields.pop("objective", ""))
    seed = overrides.pop("seed", fields.pop("seed", 0))
    named = dict(objective=objective, seed=seed, split=split)
    return Point(kind, config, overrides=tuple(sorted(overrides.items())), **named, **fields)


class Results:
    """Results of finished points, read from a JSON-lines file and looked up by settings.

    Attributes:
      lines: by identity of their point; of two lines of a point the last.
    """

    def __init__(self, root: epath.Path, *, any_defaults: bool = False, code: str = ""):
        """`any_defaults` accepts points under other defaults of configs/ than today's; `code`, if
        given, only points of this digest of the code."""
        self.lines: dict[str, Line] = {}
        self._by_key: dict[str, Line] = {}
        self._any_defaults, self._code = any_defaults, code
        for line in read_json_lines(root / RESULTS) if (root / RESULTS).exists() else ():
            self.take(line)

    def line(self, point: Point) -> Line | None:
        """Returns the line of a point, or None if it has not ended."""
        line = self.lines.get(_identity(point))
        return line if line and not self.stale(point) else None

    def stale(self, point: Point) -> str:
        """What differs between the line of a point and today: "configuration", "code" or ""."""
        line = self.lines.get(_identity(point))
        if line is None:
            return ""
        if not self._any_defaults and line["key"] != point.key:
            return "configuration"
        return "code" if self._code and line["code"] != self._code else ""

    def take(self, line: Line) -> None:
        self._by_key[line["key"]] = line
        self.lines[json.dumps(self._nested(line["settings"]), sort_keys=True)] = line

    def _nested(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """Settings under today's names; start and stream nested, where keys were recorded."""
        of = lambda point: self._by_key[point]["settings"] if isinstance(point, str) else point
        others = {name: self._nested(of(settings[name])) for name in STARTS if settings[name]}
        today = lambda key: RENAMED.get((settings["objective"], key), RENAMED.get(key, key))
        overrides = {today(key): value for key, value in settings["overrides"].items()}
        return {**settings, "overrides": overrides, **others}


def benchmark_results(workdir: epath.Path) -> dict[str, Any]:
    """pass@k by step and benchmark, as oapl_jax.evaluate wrote them; {} without any."""
    found: dict[str, Any] = {}
    for path in sorted((workdir / "evaluation").glob("v*/*/result.json")):
        values = json.loads(path.read_text())["pass@k"]["value"]
        measured = {f"pass@{k}": value for k, value in enumerate(values, 1)}
        step = str(int(path.parent.parent.name[1:]))
        found.setdefault("benchmarks", {}).setdefault(step, {})[path.parent.name] = measured
    return found


class Add:
    """Collects the points of a sweep, each once and after those it needs.

    Attributes:
      form: one of FORMS.
      results: of the points that have ended; points may depend on them, such as the best trial's.
      points: in the order of execution.
      rows: of the table: points by name, one a seed.
    """

    def __init__(self, results: Results, form: str):
        self.results, self.form = results, form
        self.points: dict[Point, None] = {}
        self.rows: Rows = {}

    def __call__(self, *points: Point, row: str = "") -> None:
        """Adds points, which are also a row of the table if it has a name."""
        for each in points:
            self(*each.needs)
            self.points[each] = None
        if row:
            self.rows.setdefault(row, []).extend(points)

    @staticmethod
    def product(*grids: Grid) -> list[Values]:
        """All combinations of the grids' values; a mapping has a list of values for each key."""
        return [_merged(parts) for parts in itertools.product(*_axes(grids))]

    @staticmethod
    def zip(*grids: Grid) -> list[Values]:
        """The first values together, then the second ones, and so on."""
        axes = _axes(grids)
        if len({len(axis) for axis in axes}) > 1:
            raise UserError(f"add.zip has lists of {[len(axis) for axis in axes]} values")
        return [_merged(parts) for parts in zip(*axes, strict=True)]

    @staticmethod
    def chain(*grids: Sequence[Values]) -> list[Values]:
        """One after the other."""
        return list(itertools.chain(*grids))

    @staticmethod
    def seeds(count: int) -> list[Values]:
        return [{"seed": seed} for seed in range(count)]

    def search(self, make: Callable[[Values], Sequence[Point]], space: Values, **settings: Any):
        """Adds the trials of an optimizer; see experiments.search."""
        from experiments.search import search  # needs the extra `search`

        return search(self, make, space, **settings)


def _axes(grids: Iterable[Grid]) -> list[list[Values]]:
    axes = []
    for grid in grids:
        if isinstance(grid, Mapping):
            axes += [[{key: value} for value in values] for key, values in grid.items()]
        else:
            axes.append(list(grid))
    return axes


def _merged(parts: Iterable[Values]) -> Values:
    merged: dict[str, Any] = {}
    for part in parts:
        if twice := merged.keys() & part.keys():
            raise UserError(f"{sorted(twice)[0]} has two lists of values; name it once")
        merged |= part
    return merged


Sweep = Callable[[Add], None]  # adds points, most urgent first


def rows_of(add: Add) -> Rows:
    """The rows that the sweep named, or all points that train, see `grouped`."""
    return add.rows or grouped(add.points)


def listed(sweep: Sweep, results: Results, form: str) -> list[Point]:
    """Points of a sweep as far as the results decide them."""
    add = Add(results, form)
    sweep(add)
    return list(add.points)


def named(sweep: Sweep, results: Results, form: str) -> dict[Point, str]:
    """The same points with names for people: row and seed, unless a row has no short name."""
    add = Add(results, form)
    sweep(add)
    names = {point: point.name for point in add.points}
    for row, points in rows_of(add).items():
        if len(row) <= LONGEST_NAME:
            names |= {point: f"{row}, seed {point.seed}" for point in points}
    return names


def grouped(points: Iterable[Point]) -> Rows:
    """Points that train, in rows that differ in the seed alone, named by what varies."""
    settings = {point: _described(point) for point in points if point.kind == "train"}
    keys = dict.fromkeys(key for mine in settings.values() for key in mine)
    for point, mine in settings.items():
        config = point.flat_config
        settings[point] = {key: mine.get(key, str(config.get(key, ""))) for key in keys}
    varied = [key for key in keys if len({mine[key] for mine in settings.values()}) > 1]
    short = lambda key: re.sub(r"\w+\.", "", key).removeprefix("objective")
    rows: Rows = {}
    for point, mine in settings.items():
        name = ", ".join(f"{short(key)} {mine[key]}".strip() for key in varied if mine[key])
        rows.setdefault(name or point.objective, []).append(point)
    return rows


def _described(point: Point) -> dict[str, str]:
    """Settings by name, all but the seed; those of `start` and `stream` behind their name."""
    skipped = ("seed", "overrides", "publish", *STARTS)
    own = {f.name: getattr(point, f.name) for f in dataclasses.fields(point)}
    found = {name: str(value or "") for name, value in own.items() if name not in skipped}
    found |= {key: str(value) for key, value in point.overrides}
    for name in STARTS:
        if other := own[name]:
            found |= {f"{name}'s {key}": value for key, value in _described(other).items()}
    return found


def load_experiment(path: str) -> Any:
    """The module of an experiment file, such as experiments/lag.py.

    Raises a UserError if there is no such file, or it has no sweep.
    """
    file = epath.Path(path)
    if not file.exists():
        raise UserError(f"--experiment={path} is no file; name one such as experiments/lag.py")
    own = file.resolve().parent == epath.Path(__file__).resolve().parent
    if own:
        module: Any = importlib.import_module(f"experiments.{file.stem}")
    else:
        spec: Any = importlib.util.spec_from_file_location(file.stem, os.fspath(file))
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    if not hasattr(module, "sweep"):
        raise UserError(f"--experiment={path} has no sweep(add); the file of a sweep defines it")
    return module
