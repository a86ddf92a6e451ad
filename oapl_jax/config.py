"""Typed configuration: a frozen dataclass a section, which documents and validates its fields once.

A file of configs/ builds an ml_collections ConfigDict: the launch surface, locked, with overrides
by `--config.a.b=`. `Config.from_dict` turns it into sections before anything is opened. A package
takes its own section; only launch.py, build.py and the commands see the whole `Config`.
"""

import ctypes
import dataclasses
import difflib
import itertools
import json
import math
import os
import re
import reprlib
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from contextvars import ContextVar
from typing import Any, ClassVar, Self

from etils import epath

from oapl_jax.errors import UserError
from oapl_jax.files import is_local, write_atomically

DTYPES = ("float32", "bfloat16")
# Tasks of reasoning_gym in its own words, whose answers are one word or number.
WORD_TASKS = ("needle_haystack",)
TASKS = ("chain_sum", "number_sorting", "countdown", "documents", *WORD_TASKS, "math", "code")
FUNCTION = "function"  # task of records that only a reward function can judge
LORA_TARGETS = (
    *("q_proj", "k_proj", "v_proj", "o_proj"),
    *("gate_proj", "up_proj", "down_proj"),
)
REMAT = ("none", "dots", "attention", "full", "offload")
FORMAT = 3  # of a workdir: its config.json, checkpoints and ledger
MAX_SEED = (1 << 32) - 3  # JAX takes seeds modulo 2^32, and evaluation and judges take the next two
MAX_SECONDS = 1e6  # of a wait: 12 days. The kernel's timers overflow at 25
MAX_PROCESSES = 1024  # and threads
# Settings that saved files depend on; they can't change within a workdir.
# (After a change of lag.steps, the due version may never have been published.)
STRUCTURAL = (
    "seed",
    "group_size",
    "groups_per_step",
    "model",
    "data",
    "warmup",
    "buffer.mode",
    "curriculum.name",
    "curriculum.curator.path",
    "curriculum.curator.architecture",
    "lag",
    "rollout.source",
    "rollout.dataset",
    "rollout.dataset_share",
    "rollout.dataset_order",
    "rollout.dataset_version",
    "rollout.record",
    "evaluation.n",
    "evaluation.ks",
)
_path: ContextVar[str] = ContextVar("path", default="")  # of the section under construction


def setting(
    doc: str,
    *,
    choices: Sequence[str] = (),
    at_least: float | None = None,
    above: float | None = None,
    at_most: float | None = None,
    below: float | None = None,
    infinite: bool = False,
    path: bool = False,
    default: Any = dataclasses.MISSING,
) -> Any:
    """Declares a field of a Section: its documentation and the values that it may have.

    The limits hold for each number of a tuple or mapping, which must be finite or, if `infinite`,
    may be infinity. `~` at the beginning of a path becomes
    the home directory.
    """
    limits = {
        "at least": (at_least, lambda value, limit: value >= limit),
        "above": (above, lambda value, limit: value > limit),
        "at most": (at_most, lambda value, limit: value <= limit),
        "below": (below, lambda value, limit: value < limit),
    }
    limits = {name: limit for name, limit in limits.items() if limit[0] is not None}
    metadata = {"doc": doc, "choices": tuple(choices), "limits": limits}
    metadata |= {"infinite": infinite, "path": path}
    return dataclasses.field(default=default, metadata=metadata)


@typing.dataclass_transform(
    frozen_default=True, kw_only_default=True, field_specifiers=(setting, dataclasses.field)
)
class Section:
    """Base class of a section: a frozen, keyword-only dataclass that validates itself.

    Raises:
      UserError: if a field is outside its range or choices, or `check` rejects a combination.
    """

    SECTION: ClassVar[str] = ""  # path of the section in a configuration, for messages

    def __init_subclass__(cls) -> None:
        dataclasses.dataclass(frozen=True, kw_only=True)(cls)

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):  # pyright: ignore[reportArgumentType]
            value, name = getattr(self, field.name), self.full_name(field.name)
            choices = field.metadata.get("choices", ())
            if choices and value not in choices:
                raise UserError(f"{name}={_shown(value)} is not one of {', '.join(choices)}")
            limits = field.metadata.get("limits", {})
            # A count meets int32 on the devices; a limit of its own or a package says otherwise.
            wide = isinstance(value, Mapping) or "at most" in limits
            bits = 64 if wide or field.name.endswith("_bytes") else 32
            for path, x in numbers(value, name):
                if x == math.inf and field.metadata.get("infinite"):
                    continue
                fits = _is_finite(x, bits) and all(fit(x, limit) for limit, fit in limits.values())
                if not fits:
                    range_ = " and ".join(f"{word} {x:.12g}" for word, (x, _) in limits.items())
                    raise UserError(
                        f"{path}={_shown(x)} must be {range_ or 'finite'}, in float32 and "
                        f"int{bits} too"
                    )
        self.check()

    def keys(self) -> list[str]:
        """Names of the fields: with `__getitem__`, `f(**section)` passes them as arguments."""
        return [field.name for field in dataclasses.fields(self)]  # pyright: ignore[reportArgumentType]

    def __getitem__(self, field: str) -> Any:
        return getattr(self, field)

    def full_name(self, field: str) -> str:
        """Full name of a field in the configuration, such as "optim.learning_rate"."""
        section = _path.get() or self.SECTION
        return f"{section}.{field}" if section else field

    def check(self) -> None:
        """Rejects combinations of fields; overridden where a section has any."""

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], path: str = "") -> Self:
        """Builds the section from nested plain values.

        Args:
          values: as of `ConfigDict.to_dict()`.
          path: of the section in the configuration; "" for the whole.

        Raises:
          UserError: naming a key that is unknown (with the nearest known ones) or missing, or a
            value of the wrong type or outside its range.
        """
        hints = typing.get_type_hints(cls)
        fields = {field.name: field for field in dataclasses.fields(cls)}  # pyright: ignore
        join = lambda name: f"{path}.{name}" if path else name
        for name in values.keys() - fields.keys():
            raise UserError(f"{join(name)} is not a setting{nearest(name, fields, section=path)}")
        required = {n for n, field in fields.items() if field.default is dataclasses.MISSING}
        for name in sorted(required - values.keys()):
            raise UserError(f"{join(name)} is missing; add it to the file that --config names")
        # In field order: sections that others refer to (rollout) are validated first.
        given = [name for name in fields if name in values]
        typed = {name: _typed(values[name], hints[name], join(name)) for name in given}
        for name in given:
            if fields[name].metadata.get("path"):
                typed[name] = os.path.expanduser(typed[name])
        token = _path.set(path)
        try:
            return cls(**typed)
        finally:
            _path.reset(token)


def numbers(value: Any, name: str) -> Iterator[tuple[str, int | float]]:
    """Yields the numbers of a value with their full names, also of nested tuples and mappings.

    A float comes as float32 too: the devices compute in it, and 0.99999999 is 1 and 1e-50 is 0.
    """
    if isinstance(value, int | float):
        yield name, value
    if isinstance(value, float):
        yield name, ctypes.c_float(value).value
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from numbers(item, f"{name}.{key}")
    if isinstance(value, tuple | list):
        for item in value:
            yield from numbers(item, name)


def _is_finite(number: int | float, bits: int = 64) -> bool:
    """False for NaN, infinity, and an integer that a signed one of `bits` can't hold."""
    return math.isfinite(number) if isinstance(number, float) else abs(number) < 1 << bits - 1


def _shown(value: Any) -> str:
    """An abbreviated `repr`; Python refuses that of an integer of more than 4,300 digits."""
    try:
        return reprlib.repr(value)
    except ValueError:
        return "..."


def nearest(
    name: str,
    known: typing.Iterable[str],
    elsewhere: typing.Iterable[str] = (),
    *,
    section: str = "",
) -> str:
    """The known names that resemble a misspelt one, as the end of a sentence.

    `elsewhere` has full names of all sections, of which the last part is compared; `known` are
    those of `section`.
    """
    close = difflib.get_close_matches(name, list(known), n=3, cutoff=0.5)
    found = [f"{section}.{other}" if section else other for other in close]
    last = lambda path: path.rpartition(".")[2]
    ends = difflib.get_close_matches(name, {last(path) for path in elsewhere}, n=3, cutoff=0.8)
    found += [path for path in elsewhere if last(path) in ends and last(path) not in close][:3]
    return f"; did you mean {' or '.join(found)}?" if found else f" (known: {', '.join(known)})"


def _typed(value: Any, hint: Any, path: str) -> Any:
    """`value` as the annotated type of its field; lists become tuples, ints become floats."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        hint = next(kind for kind in arguments if kind.accepts(value))
        return hint.from_dict(value, path)
    if isinstance(hint, type) and issubclass(hint, Section):
        if not isinstance(value, Mapping):
            raise UserError(f"{path}={_shown(value)} must be a section of settings")
        return hint.from_dict(value, path)
    if origin is tuple and isinstance(value, list | tuple):
        return tuple(_typed(item, arguments[0], path) for item in value)
    if isinstance(origin, type) and issubclass(origin, Mapping) and isinstance(value, Mapping):
        return {k: _typed(item, arguments[1], f"{path}.{k}") for k, item in value.items()}
    if hint is Any:
        return value
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value) if _is_finite(value) else value  # which is out of range
    if isinstance(hint, type) and type(value) is hint:
        return value
    raise UserError(f"{path}={_shown(value)} must be of type {getattr(hint, '__name__', hint)}")


class ReleaseConfig(Section):
    """One public release: files in the layout of docs/data.md."""

    kind: str = setting("reader of data/public for the rows")
    path: str = setting("directory of the files, local or gs://", path=True)
    files: tuple[str, ...] = setting("glob patterns below `path`")
    rows: int = setting("rows that the files must have; 0: any number", at_least=0)
    part: tuple[int, ...] = setting(
        "hundredths [start, end) of the space of all problems", at_least=0, at_most=100
    )
    options: Mapping[str, Any] = setting("further arguments of the reader")


class SyntheticDataConfig(Section):
    """Problems that are generated; section `data` of a synthetic task."""

    SECTION = "data"
    task: str = setting("verifier of the answers", choices=TASKS)
    data_dir: str = setting("directory of the prepared data sets", path=True)
    train_size: int = setting("training problems", at_least=1)
    validation_size: int = setting("validation problems", at_least=1)
    test_size: int = setting("test problems", at_least=1)
    seed: int = setting("seed of the generator", at_least=0, at_most=MAX_SEED)
    generator: Mapping[str, Any] = setting("settings of the task's generator")
    max_prompt_tokens: int = setting("longer prompts are dropped and counted", at_least=1)
    instruction: str = setting("text below each question")

    @classmethod
    def accepts(cls, values: Mapping[str, Any]) -> bool:
        return "sets" not in values


class PublicDataConfig(Section):
    """Problems of public releases; section `data` of a pretrained model's task."""

    SECTION = "data"
    task: str = setting("verifier of the answers", choices=TASKS)
    data_dir: str = setting("directory of the prepared data sets", path=True)
    sets: Mapping[str, ReleaseConfig] = setting("releases by name")
    train: tuple[str, ...] = setting("names of the sets to train on")
    validation: tuple[str, ...] = setting("names of the validation sets")
    test: tuple[str, ...] = setting("names of the test sets")
    max_prompt_tokens: int = setting("longer prompts are dropped and counted", at_least=1)
    instruction: str = setting("text below each question")

    @classmethod
    def accepts(cls, values: Mapping[str, Any]) -> bool:
        return "sets" in values and not FileDataConfig.accepts(values)


class FileSetsConfig(Section):
    """Files of questions: JSON Lines, JSON or Parquet."""

    SECTION = "data.sets"
    train: str = setting("file of the training questions", path=True)
    validation: str = setting("file of the validation split; '': drawn from `train`", path=True)
    test: str = setting("file of the test split; '': drawn from `train`", path=True)

    def check(self) -> None:
        if not self.train:
            raise UserError(
                f"{self.full_name('train')} names no file; add, for example, "
                "--config.data.sets.train=questions.jsonl"
            )


class FileColumnsConfig(Section):
    """Columns of the files; a reward function sees all columns, these and others."""

    SECTION = "data.columns"
    problem: str = setting("column of the question: text, or a list of messages")
    answer: str = setting("column of the reference answer; of programs, their tests")


class FileDataConfig(Section):
    """Questions in files of one's own; section `data` of configs/own_task.py."""

    SECTION = "data"
    task: str = setting(
        "'function': rewards.function judges; or the verifier of the answers",
        choices=(FUNCTION, "math", "code"),
    )
    data_dir: str = setting("directory of the prepared data sets", path=True)
    sets: FileSetsConfig
    columns: FileColumnsConfig
    validation_share: float = setting(
        "of the training questions, drawn for validation if no file is named", above=0, below=1
    )
    test_share: float = setting("likewise for the test split", above=0, below=1)
    most_drawn: int = setting("questions drawn for a split at most", at_least=1)
    seed: int = setting("seed of the drawn splits", at_least=0, at_most=MAX_SEED)
    max_prompt_tokens: int = setting("longer prompts are dropped and counted", at_least=1)
    instruction: str = setting("text below each question")

    @classmethod
    def accepts(cls, values: Mapping[str, Any]) -> bool:
        sets = values.get("sets")
        return isinstance(sets, Mapping) and isinstance(sets.get("train"), str)


class LoraConfig(Section):
    """Adapters (arXiv 2106.09685), trained in the place of all weights: docs/lora.md."""

    SECTION = "model.lora"
    rank: int = setting("of the adapters; 0 trains all weights", at_least=0)
    alpha: float = setting("the adapters' product is multiplied by alpha / rank", above=0)
    targets: tuple[str, ...] = setting("projections with an adapter, by peft's names")
    merged: bool = setting("publish merged weights too, for servers that take no adapters")

    def check(self) -> None:
        if self.merged and not self.rank:
            raise UserError(
                f"{self.full_name('merged')}=True publishes adapters merged, and "
                f"{self.full_name('rank')}=0 trains none; set one of them"
            )
        unknown = [name for name in self.targets if name not in LORA_TARGETS]
        if unknown or not self.targets or len(set(self.targets)) < len(self.targets):
            raise UserError(
                f"{self.full_name('targets')}={list(self.targets)} must be distinct projections, "
                f"one or more of {', '.join(LORA_TARGETS)}"
            )


class ModelSection(Section):
    """The policy's checkpoint or architecture."""

    SECTION = "model"
    path: str = setting("checkpoint in Hugging Face format; '' for a fresh model", path=True)
    architecture: Mapping[str, Any] = setting("config.json of a fresh model, without vocabulary")
    dtype: str = setting("dtype of activations; parameters are float32", choices=DTYPES)
    remat: str = setting("rematerialization policy of a layer", choices=REMAT)
    lora: LoraConfig

    def check(self) -> None:
        if self.lora.rank and not self.path:
            raise UserError(
                f"model.lora.rank={self.lora.rank} trains adapters of a pretrained model; name its "
                "checkpoint in model.path, or set model.lora.rank=0"
            )


class MeshConfig(Section):
    """Sizes of the device mesh; one of them may be -1 and takes the remaining devices."""

    SECTION = "mesh"
    data: int = setting("data parallelism, parameters replicated", at_least=-1)
    fsdp: int = setting("data parallelism, parameters sharded", at_least=-1)
    context: int = setting("positions of a row", at_least=-1)
    tensor: int = setting("heads, feed-forward and vocabulary", at_least=-1)


class OptimizerConfig(Section):
    """AdamW with gradient clipping, linear warm-up and cosine decay."""

    SECTION = "optim"
    learning_rate: float = setting("peak of the schedule", above=0)
    warmup_steps: int = setting("steps of the linear warm-up", at_least=0)
    final_fraction: float = setting("final over peak learning rate", at_least=0, at_most=1)
    b1: float = setting("decay of the first moment", at_least=0, below=1)
    b2: float = setting("decay of the second moment", at_least=0, below=1)
    eps: float = setting("added to the root of the second moment", above=0)
    weight_decay: float = setting("decoupled weight decay", at_least=0)
    max_grad_norm: float = setting("global norm above which gradients are scaled down", above=0)
    mu_dtype: str = setting("dtype of the first moment", choices=DTYPES)


class WarmupConfig(Section):
    """The supervised stage before RL, on noisy demonstrations."""

    SECTION = "warmup"
    num_steps: int = setting("gradient steps; 0 skips the stage", at_least=0)
    noise: float = setting("probability that a demonstrated step is wrong", at_least=0, at_most=1)
    batch_size: int = setting("demonstrations of a gradient step", at_least=1)
    demonstrations: int = setting(
        "distinct demonstrations; 0: of all training problems with a solution", at_least=0
    )
    optim: OptimizerConfig


class ObjectiveConfig(Section):
    """The objective; its own constants are validated by `objectives.bind`."""

    SECTION = "objective"
    name: str = setting("key of objectives.OBJECTIVES")
    denominator: str = setting(
        "policy whose log-probs anchor or correct: the sampler's own, recomputed by the learner "
        "from the published version, or those of version 0",
        choices=("behavior", "learner", "reference"),
    )
    aggregation: str = setting(
        "average over tokens, over sequences, or sum over a constant length",
        choices=("token", "sequence", "sequence_token", "constant"),
    )
    constant_length: int = setting("divisor of aggregation='constant', tokens", above=0)
    kl_weight: float = setting("weight of KL(pi || pi_ref) added to the loss", at_least=0)
    ess_power: float = setting("updates are scaled by (ESS / B)^ess_power", at_least=0)
    constants: Mapping[str, Any] = setting(
        "constants of the objectives, by their papers' names", infinite=True
    )

    def full_name(self, field: str) -> str:
        return super().full_name(field).removesuffix(".constants")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], path: str = "") -> Self:
        own = {field.name for field in dataclasses.fields(cls)} - {"constants"}  # pyright: ignore
        saved = values.get("constants", {})  # of a configuration that was saved
        values = {k: v for k, v in {**values, **saved}.items() if k != "constants"}
        common = {name: value for name, value in values.items() if name in own}
        constants = {name: value for name, value in values.items() if name not in own}
        for name in constants:  # a common setting, misspelt? `bind` knows the constants alone
            if difflib.get_close_matches(name, own, n=1, cutoff=0.8):
                raise UserError(f"{path}.{name} is not a setting{nearest(name, own, section=path)}")
        return super().from_dict({**common, "constants": constants}, path)


class LagConfig(Section):
    """The lag policy: which learner steps are published, and which version serves."""

    SECTION = "lag"
    mode: str = setting(
        "publish every `steps` steps; serve `steps` behind; or a random age up to `steps`",
        choices=("window", "fixed", "uniform"),
    )
    steps: int = setting("gradient steps", at_least=0)

    def check(self) -> None:
        if self.mode == "window" and self.steps < 1:
            raise UserError(f"lag.steps={self.steps} must be at least 1 for lag.mode='window'")


class BufferConfig(Section):
    """The buffer between worker and learner."""

    SECTION = "buffer"
    mode: str = setting(
        "groups of older versions are dropped, kept, or replayed",
        choices=("clear_on_sync", "keep_with_anchor", "replay"),
    )
    max_age: int = setting("lag above which a group expires (not clear_on_sync)", at_least=0)
    max_reuse: int = setting("gradient steps that may use a group (replay)", at_least=1)
    capacity: int = setting("groups held; 0: the fewest that the sampler needs", at_least=0)
    zero_variance: str = setting(
        "groups with equal rewards are kept, dropped, or kept with a weight",
        choices=("keep", "drop", "weight"),
    )
    zero_variance_weight: float = setting("weight of zero_variance='weight'", at_least=0)


class SamplerMeshConfig(Section):
    """Sizes of the embedded sampler's mesh on each host; -1 takes the remaining devices."""

    SECTION = "rollout.mesh"
    data: int = setting("rows, parameters replicated: the fastest", at_least=-1)
    fsdp: int = setting("rows, parameters sharded and gathered for each token", at_least=-1)
    tensor: int = setting("heads of parameters and KV cache, and the feed-forward", at_least=-1)


class RolloutConfig(Section):
    """Sampling, recorded datasets, and recording."""

    SECTION = "rollout"
    sampler: str = setting("embedded decoder or SGLang servers", choices=("local", "fleet"))
    overlap: bool = setting("sample beside the learner instead of in turns")
    temperature: float = setting("divides the logits", above=0)
    top_p: float = setting("probability of the nucleus; 1 switches it off", above=0, at_most=1)
    top_k: int = setting("most likely tokens to sample from; 0 switches it off", at_least=0)
    max_response_tokens: int = setting("longer responses are truncated", at_least=1)
    prompts_per_call: int = setting("prompts sampled at a time without overlap", at_least=1)
    reward_threads: int = setting("groups rewarded at a time", at_least=1, at_most=MAX_PROCESSES)
    max_zero_reward_groups: int = setting(
        "consecutive groups without reward that abort the run; 0: never", at_least=0
    )
    deadline: float = setting(
        "seconds that learner and sampler wait for each other", above=0, at_most=MAX_SECONDS
    )
    max_sequences: int = setting(
        "slots, responses decoded at a time on each host (local)", at_least=1
    )
    prompt_multiple: int = setting(
        "prompts are padded to it, or two, four, ... times as much (local)", at_least=1
    )
    tokens_per_round: int = setting(
        "tokens decoded between two exchanges with the host (local)", at_least=1
    )
    devices: int = setting(
        "of each host, for the embedded sampler alone; 0: shared with the learner", at_least=0
    )
    mesh: SamplerMeshConfig
    source: str = setting(
        "sample groups, read a recorded dataset, or both", choices=("live", "dataset", "both")
    )
    dataset: str = setting("directory of the recorded dataset", path=True)
    dataset_share: float = setting("recorded share of source='both'", at_least=0, at_most=1)
    dataset_order: str = setting(
        "endless permutations, or once in order", choices=("shuffled", "recorded")
    )
    dataset_version: int = setting("version of the groups in this run; -1: recorded", at_least=-1)
    record: bool = setting("write all sampled groups to rollouts/ in the workdir")
    keep: float = setting(
        "or this share of them, for the report; 0: none", at_least=0, at_most=1, default=0.0
    )
    groups_per_shard: int = setting("groups of a recorded shard", at_least=1)

    def check(self) -> None:
        side_by_side = self.overlap and self.sampler == "local" and self.source != "dataset"
        if self.devices and not side_by_side:
            raise UserError(
                f"rollout.devices={self.devices} stand idle while the learner uses the others, "
                "unless the embedded sampler works beside it; set rollout.devices=0, or "
                "rollout.overlap=True with rollout.sampler='local' and sampled groups"
            )
        if (self.source == "live") == bool(self.dataset):
            raise UserError(
                f"rollout.source={self.source!r} and rollout.dataset={self.dataset!r} do not fit: "
                "name a dataset made by oapl_jax.record for 'dataset' or 'both', none for 'live'"
            )

    @property
    def kept_share(self) -> float:
        """Share of the sampled groups that is written to rollouts/."""
        return 1.0 if self.record else self.keep

    def recorded_groups(self, groups_per_step: int) -> int:
        """Groups of a gradient step that are read from the dataset; the others are sampled."""
        share = {"live": 0.0, "both": self.dataset_share, "dataset": 1.0}[self.source]
        return round(share * groups_per_step)


class PassRatesConfig(Section):
    """Running pass rates of the curricula `window` and `learnability`."""

    decay: float = setting("of the counts of a prompt at each new group", at_least=0, at_most=1)
    prior_rate: float = setting("pass rate of a prompt not sampled yet", above=0, below=1)
    prior_count: float = setting("responses that the prior weighs", above=0)


class DifficultyWindowConfig(Section):
    """Pass rates within which a prompt has weight 1."""

    low: float = setting("lower bound", at_least=0, at_most=1)
    high: float = setting("upper bound", at_least=0, at_most=1)
    outside: float = setting("weight outside the window", above=0, at_most=1)

    def check(self) -> None:
        if self.low > self.high:
            raise UserError(
                f"{self.full_name('low')}={self.low} must be at most {self.full_name('high')}"
            )


class CuratorConfig(Section):
    """The network of the curriculum `actor_curator` (arXiv 2602.20532)."""

    path: str = setting(
        "checkpoint with the policy's vocabulary; '' for a fresh network", path=True
    )
    architecture: Mapping[str, Any] = setting("config.json of a fresh network")
    dtype: str = setting("dtype of activations", choices=DTYPES)
    remat: str = setting("rematerialization policy of a layer", choices=REMAT)
    dormant: int = setting("gradient steps before the curator is trained", at_least=0)
    warmup: int = setting("gradient steps that train it before it chooses", at_least=0)
    temperature: float = setting("of the softmax over candidates", above=0)
    clip: float = setting("clip range of its surrogate", above=0)
    passes: int = setting("gradient steps on each choice", at_least=1)
    rows: int = setting("candidates of one forward pass", at_least=1)
    optim: OptimizerConfig


class CurriculumConfig(Section):
    """The prompts that are sampled."""

    SECTION = "curriculum"
    name: str = setting(
        "key of curriculum.CURRICULA",
        choices=("uniform", "window", "learnability", "actor_curator"),
    )
    candidates: int = setting("prompts to choose rollout.prompts_per_call from", at_least=1)
    top_p: float = setting("nucleus of the choice; the rest is uniform", above=0, at_most=1)
    rates: PassRatesConfig
    window: DifficultyWindowConfig
    curator: CuratorConfig


class ProbeTolerance(Section):
    """Largest log-prob difference in nats between learner and server on a version's probe."""

    float32: float = setting("where both compute in float32", above=0)
    bfloat16: float = setting("for any other pair of dtypes", above=0)


class FleetConfig(Section):
    """SGLang servers. Deadlines and intervals are in seconds."""

    SECTION = "fleet"
    servers: tuple[str, ...] = setting("URLs of the servers")
    servers_file: str = setting(
        "or a file with one URL a line, read again every `poll_every`", path=True
    )
    router: str = setting("or the URL of a sglang-router, whose GET /workers is the list")
    api_key_file: str = setting(
        "file with the --api-key of servers and router; '' for none", path=True, default=""
    )
    fetch_port: int = setting(
        "port of oapl_jax.fleet.fetch on each server's machine; 0: servers read the workdir",
        at_least=0,
        at_most=65535,
        default=0,
    )
    poll_every: float = setting(
        "between two reads of servers_file or router", above=0, at_most=MAX_SECONDS
    )
    max_in_flight: int = setting("groups in flight over all servers", at_least=1)
    attempts: int = setting("requests of a group before it is dropped and counted", at_least=1)
    backoff: float = setting(
        "before a failed server is retried; doubles each time", above=0, at_most=MAX_SECONDS
    )
    backoff_limit: float = setting("largest backoff", above=0, at_most=MAX_SECONDS)
    health_every: float = setting(
        "between two health checks of a server", above=0, at_most=MAX_SECONDS
    )
    connect_deadline: float = setting("to open a connection", above=0, at_most=MAX_SECONDS)
    control_deadline: float = setting(
        "of a control call: health, admission, probe", above=0, at_most=MAX_SECONDS
    )
    request_deadline: float = setting("for the rollouts of one group", above=0, at_most=MAX_SECONDS)
    drain_deadline: float = setting(
        "for groups in flight before a refresh; 0: abort", at_least=0, at_most=MAX_SECONDS
    )
    update_deadline: float = setting("for a server to load a version", above=0, at_most=MAX_SECONDS)
    start_deadline: float = setting(
        "for a server to answer for the first time", above=0, at_most=MAX_SECONDS
    )
    no_server_deadline: float = setting(
        "without a ready server before the run ends", above=0, at_most=MAX_SECONDS
    )
    refresh_fraction: float = setting(
        "of the servers refreshed at a time, at least one", above=0, at_most=1
    )
    probe_tolerance: ProbeTolerance
    mixed_versions: str = setting(
        "responses that span two versions are requested again or kept",
        choices=("reissue", "keep"),
    )

    def check(self) -> None:
        needed = max(self.start_deadline, self.drain_deadline + self.update_deadline)
        if self.no_server_deadline < needed:
            raise UserError(
                f"fleet.no_server_deadline={self.no_server_deadline:g} ends a run whose servers "
                "are within fleet.start_deadline or fleet.drain_deadline + fleet.update_deadline; "
                f"it must be at least {needed:g}"
            )

    def check_source(self) -> None:
        """Rejects a fleet whose servers are named in no way, or in several."""
        named = [name for name in ("servers", "servers_file", "router") if getattr(self, name)]
        if len(named) != 1:
            raise UserError(
                f"fleet names its servers by {' and '.join(named) or 'nothing'}; set exactly one "
                "of fleet.servers, fleet.servers_file and fleet.router"
            )

    def check_versions(self, directory: epath.PathLike) -> None:
        """Rejects versions in a bucket without a fetcher: servers load from disks alone."""
        if not is_local(directory) and not self.fetch_port:
            raise UserError(
                f"the servers can't load versions from {directory}; start oapl_jax.fleet.fetch "
                "beside each and set fleet.fetch_port (docs/serving.md)"
            )

    def backoff_after(self, failures: int) -> float:
        """Seconds to wait after `failures` consecutive failures."""
        return min(self.backoff * 2.0 ** (failures - 1), self.backoff_limit)


class MathRewardConfig(Section):
    """Judge processes of mathematical answers."""

    processes: int = setting("answers judged at a time", at_least=1, at_most=MAX_PROCESSES)
    seconds: float = setting(
        "deadline of an answer; then its process is killed", above=0, at_most=MAX_SECONDS
    )
    recycle_after: int = setting("answers of a process before it is replaced", at_least=1)
    memory_bytes: int = setting("memory limit of a process", at_least=1)
    thinking_opened: bool = setting("whether the chat template itself writes <think>")


class CodeRewardConfig(Section):
    """The sandbox of programs."""

    allow_unsafe: bool = setting("run programs on a machine that can't isolate them")
    parallel: int = setting(
        "programs at a time; at most one a core", at_least=1, at_most=MAX_PROCESSES
    )
    seconds_per_test: float = setting("deadline of a test", above=0, at_most=MAX_SECONDS)
    memory_bytes: int = setting("memory limit of a program", at_least=1)
    processes: int = setting("threads of a program", at_least=1, at_most=MAX_PROCESSES)
    output_bytes: int = setting("output limit of a test", at_least=1)
    temporary_bytes: int = setting("size of a program's temporary files", at_least=1)
    max_tests: int = setting("longest tests of a problem that are run; 0: all", at_least=0)
    thinking_opened: bool = setting("whether the chat template itself writes <think>")
    packages: tuple[str, ...] = setting("packages that a program may import")
    prelude: str = setting(
        "imports before a program: LiveCodeBench's, or also np, pd, os, io as in OAPL's code",
        choices=("livecodebench", "oapl"),
    )
    start_seconds: float = setting("deadline for a sandbox to start", above=0, at_most=MAX_SECONDS)
    cache_entries: int = setting("verdicts kept, by content", at_least=0)


class DocumentWeights(Section):
    """Weights of the four terms of a document's reward."""

    syntax: float = setting("valid formulas", at_least=0)
    closure: float = setting("closed tags", at_least=0)
    table: float = setting("rectangular tables", at_least=0)
    text: float = setting("similarity to the reference", at_least=0)


class DocumentRewardConfig(Section):
    """Rewards of tables and formulas (arXiv 2603.01840)."""

    weights: DocumentWeights
    plain_formula: float = setting(
        "term of a valid formula without the reference's commands", at_least=-1, at_most=1
    )
    per_open_tag: float = setting("subtracted for each open tag", at_least=0)
    max_characters: int = setting("longer responses get no reward", at_least=1)


class FunctionPoolConfig(Section):
    """Processes that call `rewards.function`."""

    processes: int = setting(
        "calls at a time; see also rollout.reward_threads", at_least=1, at_most=MAX_PROCESSES
    )
    seconds: float = setting(
        "deadline of a call; then its process is killed", above=0, at_most=MAX_SECONDS
    )
    memory_bytes: int = setting("memory of a process beyond its imports", at_least=1)


class RewardsConfig(Section):
    """A reward function, or verifiers, each of which opens for the first prompt of its task."""

    SECTION = "rewards"
    function: str = setting(
        "Python function that gives the rewards, 'my_module:reward'; '': the task's verifier"
    )
    function_pool: FunctionPoolConfig
    math: MathRewardConfig
    code: CodeRewardConfig
    documents: DocumentRewardConfig


class RubricConfig(Section):
    """A judge made of rules."""

    objectives: Mapping[str, Any] = setting("objective -> rule -> weight of its vote")


class CallableJudgeConfig(Section):
    """A judge that is a Python function."""

    function: str = setting("'package.module:name'")
    objectives: tuple[str, ...] = setting("names of the objectives that it compares by")


class LanguageModelJudgeConfig(Section):
    """A language model as a judge, on SGLang servers of its own."""

    servers: tuple[str, ...] = setting("URLs of servers with fixed weights")
    api_key_file: str = setting("file with their --api-key; '' for none", path=True, default="")
    tokenizer: str = setting("directory of the judge's tokenizer", path=True)
    chat: Mapping[str, Any] = setting("arguments of its chat template")
    template: str = setting("the question, with {prompt}, {first}, {second}, {question}")
    questions: Mapping[str, Any] = setting("objective -> question")
    verdicts: Mapping[str, float] = setting(
        "token -> score of the first response", at_least=0, at_most=1
    )
    min_verdict_mass: float = setting(
        "probability of all verdicts below which there is no score", at_least=0, at_most=1
    )
    max_prompt_tokens: int = setting("longer questions are not asked", at_least=1)
    questions_per_request: int = setting("questions of a request", at_least=1)
    max_in_flight: int = setting("requests in flight for a group", at_least=1)
    connect_deadline: float = setting("seconds to open a connection", above=0, at_most=MAX_SECONDS)
    request_deadline: float = setting("seconds for a request", above=0, at_most=MAX_SECONDS)
    backoff: float = setting(
        "seconds before a failed request is retried; doubles", above=0, at_most=MAX_SECONDS
    )
    group_deadline: float = setting("seconds for a group", above=0, at_most=MAX_SECONDS)


class PreferencesConfig(Section):
    """Rewards by comparison with responses of the reference policy (arXiv 2602.19041)."""

    SECTION = "preferences"
    judge: str = setting(
        "the verifier's rewards, or the judge of this name",
        choices=("none", "rubric", "language_model", "callable"),
    )
    beta: float = setting("entropy weight of the adversary", above=0)
    comparators: int = setting("responses of the reference policy to a prompt", at_least=1)
    dataset: str = setting("recorded dataset of them; '' samples version 0", path=True)
    rubric: RubricConfig
    callable: CallableJudgeConfig
    language_model: LanguageModelJudgeConfig


class LearnerConfig(Section):
    """Layout of a gradient step."""

    SECTION = "learner"
    micro_batches: int = setting("most micro-batches of a gradient step", at_least=1)
    row_length: int = setting("tokens of a packed row", at_least=1)
    rows_multiple: int = setting(
        "rows of a micro-batch are a multiple of it; 0: of mesh.data x mesh.fsdp", at_least=0
    )
    logp_chunk: int = setting("positions whose logits exist at a time", at_least=1)


class EvaluationConfig(Section):
    """Evaluation of splits during a run, and of benchmarks."""

    SECTION = "evaluation"
    every: int = setting("gradient steps between two evaluations; 0: never", at_least=0)
    n: int = setting("samples of a prompt", at_least=1)
    ks: tuple[int, ...] = setting("k of pass@k, each at most n", at_least=1)
    resamples: int = setting("bootstrap resamples", at_least=1)
    max_response_tokens: int = setting("longer responses to benchmarks are truncated", at_least=1)

    def check(self) -> None:
        if not self.ks or min(self.ks) < 1 or max(self.ks) > self.n:
            raise UserError(
                f"evaluation.ks={list(self.ks)} must lie within 1 and evaluation.n={self.n}; "
                "raise n or change ks"
            )


class CheckpointConfig(Section):
    """Checkpoints to resume from."""

    SECTION = "checkpoint"
    every: int = setting("gradient steps between two checkpoints", at_least=1)
    keep: int = setting("newest checkpoints to keep", at_least=1)


class TrackingConfig(Section):
    """Trackers that get the metrics of each step, beside metrics.jsonl."""

    SECTION = "tracking"
    tensorboard: bool = setting("write event files to tensorboard/ in the workdir")
    wandb: str = setting(
        "Weights & Biases: upload, write files for `wandb sync`, or neither",
        choices=("online", "offline", "off"),
    )
    project: str = setting("project of Weights & Biases")


class Config(Section):
    """The whole configuration of a run."""

    seed: int = setting("seed of everything random", at_least=0, at_most=MAX_SEED)
    num_steps: int = setting("gradient steps", at_least=0, below=1 << 31)
    group_size: int = setting("rollouts of a prompt", at_least=1)
    groups_per_step: int = setting("groups of a gradient step", at_least=1)
    data: SyntheticDataConfig | PublicDataConfig | FileDataConfig
    model: ModelSection
    mesh: MeshConfig
    warmup: WarmupConfig
    objective: ObjectiveConfig
    optim: OptimizerConfig
    lag: LagConfig
    buffer: BufferConfig
    rollout: RolloutConfig
    curriculum: CurriculumConfig
    fleet: FleetConfig
    rewards: RewardsConfig
    preferences: PreferencesConfig
    learner: LearnerConfig
    evaluation: EvaluationConfig
    checkpoint: CheckpointConfig
    tracking: TrackingConfig
    benchmarks: Mapping[str, ReleaseConfig] = setting("public releases for oapl_jax.evaluate")
    publish_dtype: str = setting("dtype of published weights", choices=DTYPES)
    publish_full_every: int = setting(
        "every so many versions one with all weights, the others as deltas of the one before",
        at_least=1,
        default=1,
    )
    compile_cache: str = setting(
        "directory of compiled programs, from the workdir; '': none", path=True
    )
    releases: str = setting("directory that the releases' paths begin with", default="")
    rounds: str = setting("directory that earlier rounds' paths begin with", default="")

    def to_dict(self) -> dict[str, Any]:
        """Nested plain values, as saved in a workdir."""
        return json.loads(json.dumps(dataclasses.asdict(self)))

    @property
    def _in_flight(self) -> tuple[int, str]:
        """Groups that the sampler takes at a time, and the setting that says so."""
        if self.rollout.sampler == "fleet":
            return self.fleet.max_in_flight, "fleet.max_in_flight"
        return self.rollout.max_sequences // self.group_size, "rollout.max_sequences"

    @property
    def least_capacity(self) -> int:
        """Groups of the smallest buffer: with overlap it holds those that a sampler takes too."""
        at_once, _ = self._in_flight
        return self.groups_per_step + max(self.rollout.prompts_per_call, at_once, 1)

    def derived(self, mesh: Mapping[str, int]) -> Self:
        """Replaces sizes that are 0 by those that follow from a mesh and the other settings."""
        rows, capacity = self.learner.rows_multiple, self.buffer.capacity
        return dataclasses.replace(
            self,
            learner=dataclasses.replace(
                self.learner, rows_multiple=rows or mesh["data"] * mesh["fsdp"]
            ),
            buffer=dataclasses.replace(self.buffer, capacity=capacity or self.least_capacity),
        )

    @property
    def compares(self) -> bool:
        """True if a judge rewards the sampled groups."""
        return self.preferences.judge != "none" and self.rollout.source != "dataset"

    def check(self) -> None:
        rollout, buffer = self.rollout, self.buffer
        if self.group_size == 1 and buffer.zero_variance == "drop":
            raise UserError(
                "group_size=1 makes the rewards of a group equal, and buffer.zero_variance='drop' "
                "drops such groups; raise group_size or set buffer.zero_variance='keep'"
            )
        _, name = self._in_flight
        needed = self.least_capacity
        if rollout.source != "dataset" and 0 < buffer.capacity < needed:
            raise UserError(
                f"buffer.capacity={buffer.capacity} is too small for groups_per_step + "
                f"rollout.prompts_per_call or the groups of {name}; raise it to {needed}, or set 0"
            )
        recorded = rollout.recorded_groups(self.groups_per_step)
        if rollout.source == "both" and not 0 < recorded < self.groups_per_step:
            raise UserError(
                f"rollout.dataset_share={rollout.dataset_share} leaves no recorded or no sampled "
                f"group of groups_per_step={self.groups_per_step}; use rollout.source='dataset' or "
                "'live'"
            )
        if (
            rollout.source != "live"
            and rollout.dataset_version != 0
            and self.objective.denominator == "learner"
        ):
            raise UserError(
                "objective.denominator='learner' needs the weights of every version, and a run has "
                "none of a recorded dataset's; set rollout.dataset_version=0 or "
                "objective.denominator='behavior'"
            )
        if self.data.task == FUNCTION and not self.rewards.function:
            raise UserError(
                "data.task='function' needs rewards.function; name yours with "
                "--config.rewards.function=my_module:reward, or a verifier with "
                "--config.data.task=math"
            )
        lora = self.model.lora
        if self.publish_full_every > 1 and lora.rank and not lora.merged:
            raise UserError(
                f"publish_full_every={self.publish_full_every} publishes deltas of whole weights, "
                f"and model.lora.rank={lora.rank} adapters alone; set publish_full_every=1 or "
                "model.lora.merged=True"
            )
        if rollout.sampler == "fleet":
            self.check_fleet()
        if self.curriculum.name != "uniform":
            self.check_curriculum()

    def check_fleet(self) -> None:
        rollout, fleet = self.rollout, self.fleet
        if rollout.deadline <= fleet.no_server_deadline:
            raise UserError(
                f"rollout.deadline={rollout.deadline:g} ends a run without a server before "
                f"fleet.no_server_deadline={fleet.no_server_deadline:g} does; raise it above that"
            )
        if self.publish_full_every > 1 and not fleet.fetch_port:
            raise UserError(
                f"publish_full_every={self.publish_full_every} publishes deltas, which no server "
                "loads; start oapl_jax.fleet.fetch beside each and set fleet.fetch_port, or set "
                "publish_full_every=1"
            )
        if self.compares and not self.preferences.dataset:
            raise UserError(
                "a fleet serves the newest versions and can't sample the reference policy; record "
                "its responses with oapl_jax.record and set preferences.dataset"
            )

    def check_curriculum(self) -> None:
        curriculum, picks = self.curriculum, self.rollout.prompts_per_call
        if self.rollout.source == "dataset":
            raise UserError(
                f"curriculum.name={curriculum.name!r} chooses prompts to sample, and "
                "rollout.source='dataset' samples none; change one of them"
            )
        if curriculum.candidates < picks:
            raise UserError(
                f"curriculum.candidates={curriculum.candidates} must be at least "
                f"rollout.prompts_per_call={picks}; several times as many are useful"
            )

    def check_layout(self, *, mesh: Mapping[str, int], hosts: int) -> None:
        """Rejects sizes that can't be divided over a mesh and hosts, which need not exist.

        Args:
          mesh: axis name -> size.
          hosts: processes of the run.

        Raises:
          UserError: naming the setting and the remedy.
        """
        devices, learner = mesh["data"] * mesh["fsdp"], self.learner
        divided = [("learner.rows_multiple", learner.rows_multiple)]
        if self.curriculum.name == "actor_curator":
            divided.append(("curriculum.curator.rows", self.curriculum.curator.rows))
        for name, value in divided:
            if value % devices:
                raise UserError(
                    f"{name}={value} can't be divided over mesh.data x mesh.fsdp = {devices} "
                    f"devices; set it to {value + -value % devices}"
                )
        if learner.row_length % mesh["context"]:
            raise UserError(
                f"learner.row_length={learner.row_length} can't be divided over mesh.context="
                f"{mesh['context']}; raise it to "
                f"{learner.row_length + -learner.row_length % (128 * mesh['context'])}"
            )
        sampled = lambda groups: groups - self.rollout.recorded_groups(groups)
        if sampled(groups := self.groups_per_step) % hosts:
            fits = next(n for n in itertools.count(groups) if not sampled(n) % hosts)
            raise UserError(
                f"groups_per_step={groups} ({sampled(groups)} of them sampled) can't be divided "
                f"over {hosts} hosts; raise it to {fits}"
            )
        for name, value, single in (
            ("rollout.record", self.rollout.record, self.rollout.record),
            ("curriculum.name", self.curriculum.name, self.curriculum.name != "uniform"),
        ):
            if hosts > 1 and single:
                raise UserError(f"{name}={value!r} needs a single host, and this run has {hosts}")
        servers = self.fleet.servers
        if self.rollout.sampler == "fleet" and 0 < len(servers) < hosts:
            raise UserError(
                f"fleet.servers names {len(servers)} servers for {hosts} hosts; each host needs "
                "its own"
            )

    def check_lengths(self, max_positions: int) -> None:
        """Rejects a prompt and response that together exceed the model's context or a row."""
        prompt, response = self.data.max_prompt_tokens, self.rollout.max_response_tokens
        rows, needed = self.learner.row_length, prompt + response
        sizes = f"data.max_prompt_tokens={prompt} + rollout.max_response_tokens={response}"
        if needed > max_positions:
            raise UserError(
                f"{sizes} is {needed} tokens, more than the model's max_position_embeddings "
                f"({max_positions}); {shorter('rollout', prompt, max_positions)}"
            )
        if needed > rows:
            raise UserError(
                f"{sizes} is {needed} tokens, more than learner.row_length={rows}; raise that to "
                f"{needed}"
            )


def shorter(section: str, prompt: int, positions: int) -> str:
    """Remedy: lengths that fit a context, with the prompts as they are if these leave room."""
    setting, half = f"{section}.max_response_tokens", positions // 2
    if prompt < positions:
        return f"set {setting}={positions - prompt}"
    return f"set data.max_prompt_tokens={half} and {setting}={positions - half}"


class Setting(typing.NamedTuple):
    """A field of a section, as documented."""

    name: str  # in full, as in --config.NAME
    type: str
    values: str  # allowed ones; "" for all of the type
    doc: str


def sections(kind: type[Section] = Config, path: str = "") -> list[tuple[str, type[Section]]]:
    """(path, class) of a section and of all below it.

    Alternatives have the same path. NAME in a path stands for any name.
    """
    found = [(path, kind)]
    for field in dataclasses.fields(kind):  # pyright: ignore[reportArgumentType]
        hint = typing.get_type_hints(kind)[field.name]
        named = ".NAME" if typing.get_origin(hint) is Mapping else ""
        for part in (hint, *typing.get_args(hint)):
            if isinstance(part, type) and issubclass(part, Section):
                found += sections(part, f"{path}.{field.name}{named}".removeprefix("."))
    return found


def settings_of(kind: type[Section], path: str) -> list[Setting]:
    """The fields of a section that are no sections themselves."""
    found, hints = [], typing.get_type_hints(kind)
    for field in dataclasses.fields(kind):  # pyright: ignore[reportArgumentType]
        if "doc" not in field.metadata or (kind is ObjectiveConfig and field.name == "constants"):
            continue
        hint, metadata = hints[field.name], field.metadata
        limits = " and ".join(f"{word} {x:.12g}" for word, (x, _) in metadata["limits"].items())
        name = f"{path}.{field.name}".removeprefix(".")
        type_ = hint.__name__ if isinstance(hint, type) else str(hint)
        type_ = re.sub(r"\b(typing|collections\.abc|oapl_jax\.config)\.", "", type_)
        values = ", ".join(metadata["choices"]) or limits
        found.append(Setting(name, type_, values, metadata["doc"]))
    return found


def load_config(workdir: epath.Path) -> dict[str, Any] | None:
    """Reads the configuration that a workdir belongs to; None if it holds no run yet.

    Raises:
      UserError: if config.json is damaged, missing beside checkpoints, or of another format: the
        checkpoints can't be resumed.
    """
    path, checkpoints = workdir / "config.json", workdir / "checkpoints"
    if not path.exists():
        if checkpoints.exists() and any(step.name.isdigit() for step in checkpoints.iterdir()):
            raise UserError(
                f"{workdir} has checkpoints and no config.json, so their settings are unknown; put "
                "it back, or give another --workdir"
            )
        return None
    try:
        config = dict(json.loads(path.read_text()))
    except (ValueError, TypeError) as error:
        raise UserError(f"{path} is damaged ({error}); restore a whole copy") from error
    if "num_steps" not in config:
        raise UserError(f"{path} is not of a run of oapl_jax; give another --workdir")
    if config.pop("format", None) != FORMAT:
        raise UserError(
            f"{workdir} was written by another version of oapl_jax (workdir format {FORMAT} is "
            "needed); continue with that version, or give another --workdir"
        )
    return config


def changed_settings(workdir: epath.Path, config: Mapping[str, Any]) -> list[str]:
    """Compares a configuration with the one that a workdir belongs to; [] without one.

    Returns:
      A line for each setting that differs from the saved one and may (a longer run, another mesh,
      another learning rate).

    Raises:
      UserError: listing the settings that differ and may not; for a workdir of another format.
    """
    saved = load_config(workdir)
    if saved is None:
        return []
    new, old = flatten(config), flatten(saved)
    value = lambda config, key: config.get(key, "absent")
    differing = sorted(key for key in old.keys() | new.keys() if value(old, key) != value(new, key))
    structural = lambda key: any(key == s or key.startswith(s + ".") for s in STRUCTURAL)
    rejected = [key for key in differing if structural(key) or key not in old or key not in new]
    change = lambda key: f"{key}: {value(old, key)} -> {value(new, key)}"
    if rejected:
        raise UserError(
            f"--workdir={workdir} holds a run with other settings "
            f"({'; '.join(map(change, rejected))}); set them back, or give another --workdir"
        )
    return [change(key) for key in differing]


def save_config(workdir: epath.Path, config: Mapping[str, Any]) -> None:
    """Writes the configuration that a workdir belongs to, as config.json."""
    text = json.dumps({"format": FORMAT, **config}, indent=1, sort_keys=True)
    workdir.mkdir(parents=True, exist_ok=True)
    write_atomically(workdir / "config.json", [text.encode()])


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}."""
    flat = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[prefix + key] = list(value) if isinstance(value, tuple) else value
    return flat
