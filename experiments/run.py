"""Runs of a sweep, identified by their settings, and the file of their results.

A run may start from another run's weights (the warm-up that all runs of a seed share) and may train
on rollouts that another run recorded. Two runs with equal settings are the same run.
"""

import dataclasses
import functools
import hashlib
import importlib
import json
import os
from collections.abc import Callable, Mapping
from typing import Any

from etils import epath

from configs.common import Config
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
STARTS = ("start", "stream")  # settings that are runs
Line = dict[str, Any]  # of the results file


@dataclasses.dataclass(frozen=True)
class Run:
    """One run of a sweep, identified by its settings.

    kind: "warm_up" (supervised stage, published as version 0), "generate" (a recorded dataset of
      rollouts of `start`; the name is a key of stored results) or "train" (oapl_jax.train).
    config: module of configs/ and its argument, such as "arithmetic:chain_sum".
    objective: a name of configs/objectives.py.
    seed: of everything but the problems, which all seeds share.
    overrides: sorted pairs of a config key and its value.
    split: on which the last policy is graded.
    start: its version 0 is the initial policy; None for a warm-up.
    stream: its rollouts are the training data; None samples live.
    prompts: number of training prompts of "generate".
    forget_every: steps between two resets of Adam's moments; 0 never resets them.
    """

    kind: str
    config: str
    objective: str
    seed: int
    overrides: tuple[tuple[str, Any], ...]
    split: str
    start: "Run | None" = None
    stream: "Run | None" = None
    prompts: int = 0
    forget_every: int = 0

    @property
    def needs(self) -> list["Run"]:
        """Runs that must end before this one can start."""
        return [run for run in (self.start, self.stream) if run]

    @property
    def kept(self) -> bool:
        """True if the workdir stays after the end, because other runs read it."""
        return self.kind != "train" or dict(self.overrides).get("rollout.record", False)

    @property
    def settings(self) -> dict[str, Any]:
        """JSON-able; start and stream are nested."""
        mine = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        others = {name: run.settings for name, run in mine.items() if isinstance(run, Run)}
        return {**mine, "overrides": dict(self.overrides), **others}

    @property
    def key(self) -> str:
        """A hash of settings and resolved config: a changed default makes another key."""
        return key_of(self)

    def workdir(self, root: epath.Path) -> epath.Path:
        return root / "runs" / self.key

    def weights(self, root: epath.Path) -> epath.Path:
        """Version 0, as weights.publisher lays it out."""
        return self.workdir(root) / "versions" / "v000000"

    def resolve(self, root: epath.Path) -> Config:
        """Returns the locked config with all overrides applied.

        Raises:
          KeyError, TypeError, ValueError: for an unknown key or a value of the wrong type.
        """
        module, _, argument = self.config.partition(":")
        arguments = [part for part in (argument, f"objective={self.objective}") if part]
        config = importlib.import_module(f"configs.{module}").get_config(",".join(arguments))
        data_dir = os.fspath(root / "data")
        values = {"seed": self.seed, "data.data_dir": data_dir, "tensorboard": False}
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
        config.update_from_flattened_dict(values | dict(self.overrides))
        return config


@functools.cache  # resolving a config takes milliseconds, and every lookup asks for the key
def key_of(run: Run) -> str:
    config = run.resolve(epath.Path("/")).to_dict()
    text = json.dumps([run.settings, config], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def make_run(kind: str, config: str, *, overrides: Mapping[str, Any], **others: Any) -> Run:
    return Run(kind, config, overrides=tuple(sorted(overrides.items())), **others)


@functools.cache
def _identity(run: Run) -> str:
    return json.dumps(run.settings, sort_keys=True)


class Results:
    """Results of finished runs, read from a JSON-lines file and looked up by settings.

    Attributes:
      lines: by identity of their run; of two lines of a run the last.
    """

    def __init__(self, root: epath.Path, *, any_defaults: bool = False):
        """`any_defaults` accepts runs under other defaults of configs/ than today's."""
        self.lines: dict[str, Line] = {}
        self._by_key: dict[str, Line] = {}
        self._any_defaults = any_defaults
        for line in read_json_lines(root / RESULTS) if (root / RESULTS).exists() else ():
            self.take(line)

    def line(self, run: Run) -> Line | None:
        """Returns the line of a run, or None if it has not ended."""
        line = self.lines.get(_identity(run))
        return line if line and (self._any_defaults or line["key"] == run.key) else None

    def take(self, line: Line) -> None:
        self._by_key[line["key"]] = line
        self.lines[json.dumps(self._nested(line["settings"]), sort_keys=True)] = line

    def _nested(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """Settings under today's names; start and stream nested, where keys were recorded."""
        of = lambda run: self._by_key[run]["settings"] if isinstance(run, str) else run
        others = {name: self._nested(of(settings[name])) for name in STARTS if settings[name]}
        today = lambda key: RENAMED.get((settings["objective"], key), RENAMED.get(key, key))
        overrides = {today(key): value for key, value in settings["overrides"].items()}
        return {**settings, "overrides": overrides, **others}


Add = Callable[[Run], None]
Sweep = Callable[[Add, Results, bool], None]  # adds runs, most urgent first; True: the quick form


def listed(sweep: Sweep, results: Results, quick: bool) -> list[Run]:
    """Runs of a sweep as far as the results decide them, each once and after those it needs."""
    found: dict[Run, None] = {}

    def add(run: Run) -> None:
        for other in run.needs:
            add(other)
        found[run] = None

    sweep(add, results, quick)
    return list(found)
