"""Synthetic tasks (reasoning_gym, made documents) and their TFDS data set, split by content.

Questions are compact, for a character-level model, or reasoning_gym's own, for a pretrained one.
Everything about a record follows from its metadata by pure functions; the verifiers are
rewards/tasks.py and rewards/documents.

The hash of a problem's content alone determines its split, so a problem of a test split is in no
training split, whatever the sizes, settings and seeds of the two data sets.
"""

import dataclasses
import hashlib
import importlib
import itertools
import json
import string
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from oapl_jax.config import WORD_TASKS, SyntheticDataConfig
from oapl_jax.data.records import Record, Split, load_split, position, prepare_records, user
from oapl_jax.data.synthetic import documents
from oapl_jax.errors import UserError

DIGITS = "0123456789"
SHARES = {"train": 8, "validation": 1, "test": 1}  # of the space of problems, in tenths
MAX_FAILURES = 20  # consecutive; each is a hundred attempts inside reasoning_gym
MAX_MISSES = 5000  # consecutive generated records that are new to no split with room left


@dataclasses.dataclass(frozen=True)
class Task:
    """The pure functions of one task.

    Attributes:
      generator: (seed, **settings) -> items by index, {"metadata": .., "question": .., ..} each.
      metadata: item -> record's metadata.
      question, answer: of a record's metadata.
      key: canonical content of a record's metadata; equal keys mean the same problem.
      demonstration: (record, rng, noise) -> response with an error in each step with probability
        `noise`; correct without noise.
      characters: every character of questions and demonstrations.
      keep: whether a problem belongs to the task; others are skipped.
    """

    generator: Callable[..., Any]
    metadata: Callable[[Mapping[str, Any]], dict[str, Any]]
    question: Callable[[Mapping[str, Any]], str]
    answer: Callable[[Mapping[str, Any]], str]
    key: Callable[[Mapping[str, Any]], str]
    demonstration: Callable[[Record, np.random.Generator, float], str]
    characters: str
    keep: Callable[[Mapping[str, Any]], bool] = lambda metadata: True


def _reasoning_gym(module: str, name: str, **fixed: Any) -> Callable[..., Any]:
    """The generator of a task, imported when it is used: reasoning_gym imports all its tasks."""

    def generator(**settings: Any) -> Any:
        found = importlib.import_module(f"reasoning_gym.{module}")
        config, items = (getattr(found, f"{name}{kind}") for kind in ("Config", "Dataset"))
        return items(config(**settings, **fixed))

    return generator


# chain_sum: "4+3-2=" is answered by its running totals, "07,05". Problems whose totals stay within
# two characters keep the steps of the reasoning at fixed positions: a small model learns faster.


def _totals(terms: list[str], misread: Callable[[], bool] = lambda: False) -> list[int]:
    """The total after each operator; a misread operator counts as its opposite."""
    totals = [int(terms[0])]
    for operator, term in zip(terms[1::2], terms[2::2], strict=True):
        plus = (operator == "+") != misread()
        totals.append(totals[-1] + (int(term) if plus else -int(term)))
    return totals[1:] or totals


def _chain_sum_demonstration(record: Record, rng: np.random.Generator, noise: float) -> str:
    """After a misread operator the demonstration continues from the wrong total."""
    totals = _totals(record.metadata["terms"], lambda: rng.random() < noise)
    return ",".join(f"{total:02d}" for total in totals)


# number_sorting: "3,1,2<" (ascending) or "3,1,2>" (descending) is answered by "1,2,3" or "3,2,1".


def _number_sorting_metadata(item: Mapping[str, Any]) -> dict[str, Any]:
    made = item["metadata"]
    numbers = [int(float(number)) for number in made["original_numbers"]]  # "-0.0" becomes 0
    return {"numbers": numbers, "direction": made["direction"]}


def _sorted(metadata: Mapping[str, Any]) -> list[int]:
    return sorted(metadata["numbers"], reverse=metadata["direction"] == "descending")


def _number_sorting_demonstration(record: Record, rng: np.random.Generator, noise: float) -> str:
    return ",".join(
        _replace_digit(str(number), rng) if rng.random() < noise else str(number)
        for number in _sorted(record.metadata)
    )


def _replace_digit(number: str, rng: np.random.Generator) -> str:
    place = int(rng.integers(number.startswith("-"), len(number)))
    digit = (int(number[place]) + int(rng.integers(1, 10))) % 10
    return f"{number[:place]}{digit}{number[place + 1 :]}"


# countdown: "3,4,5:17=" is answered by an expression, "3*4+5".

COUNTDOWN_SYMBOLS = DIGITS + "+-*/()"


def _countdown_metadata(item: Mapping[str, Any]) -> dict[str, Any]:
    made = item["metadata"]
    expression = made["expression"].replace(" ", "")
    return {"numbers": made["numbers"], "target": made["target"], "expression": expression}


def _countdown_demonstration(record: Record, rng: np.random.Generator, noise: float) -> str:
    return _mistyped(record.metadata["expression"], COUNTDOWN_SYMBOLS, rng, noise)


def _mistyped(text: str, symbols: str, rng: np.random.Generator, noise: float) -> str:
    """The text with another one of `symbols` in the place of each character, by probability."""
    return "".join(
        str(rng.choice([other for other in symbols if other != symbol]))
        if rng.random() < noise
        else symbol
        for symbol in text
    )


# Word problems: reasoning_gym's own question, answered by one word or number.

WORD_PROBLEM_CHARACTERS = string.ascii_letters + DIGITS + string.punctuation + " \n\u2019"


def _word_problem_metadata(item: Mapping[str, Any]) -> dict[str, Any]:
    return {name: item[name].strip() for name in ("question", "answer")}


def _word_problem_demonstration(record: Record, rng: np.random.Generator, noise: float) -> str:
    return _mistyped(record.answer, string.ascii_letters, rng, noise)


def _word_problems(name: str) -> Task:
    def generator(**settings: Any) -> Any:
        return importlib.import_module("reasoning_gym").create_dataset(name, **settings)

    return Task(
        generator=generator,
        metadata=_word_problem_metadata,
        question=lambda m: m["question"],
        answer=lambda m: m["answer"],
        key=lambda m: m["question"],
        demonstration=_word_problem_demonstration,
        characters=WORD_PROBLEM_CHARACTERS,
    )


TASKS = {
    "chain_sum": Task(
        generator=_reasoning_gym("arithmetic.chain_sum", "ChainSum"),
        metadata=lambda item: {"terms": item["metadata"]["expression"].split()},
        question=lambda m: "".join(m["terms"]) + "=",
        answer=lambda m: str(_totals(m["terms"])[-1]),
        key=lambda m: "".join(m["terms"]),
        keep=lambda m: all(0 <= total <= 99 for total in _totals(m["terms"])),
        demonstration=_chain_sum_demonstration,
        characters=DIGITS + "+-=,",
    ),
    "number_sorting": Task(
        generator=_reasoning_gym(
            "algorithmic.number_sorting", "NumberSorting", min_decimals=0, max_decimals=0
        ),
        metadata=_number_sorting_metadata,
        question=lambda m: (
            ",".join(map(str, m["numbers"])) + ("<" if m["direction"] == "ascending" else ">")
        ),
        answer=lambda m: ",".join(map(str, _sorted(m))),
        key=lambda m: f"{m['direction']} {sorted(m['numbers'])}",
        demonstration=_number_sorting_demonstration,
        characters=DIGITS + "-,<>",
    ),
    "countdown": Task(
        generator=_reasoning_gym("games.countdown", "Countdown"),
        metadata=_countdown_metadata,
        question=lambda m: f"{','.join(map(str, m['numbers']))}:{m['target']}=",
        answer=lambda m: f"{' '.join(map(str, m['numbers']))} -> {m['target']}",
        key=lambda m: f"{sorted(m['numbers'])} {m['target']}",
        demonstration=_countdown_demonstration,
        characters=COUNTDOWN_SYMBOLS + ",:=",
    ),
    "documents": Task(
        generator=documents.DocumentGenerator,
        metadata=lambda item: item["metadata"],
        question=documents.question,
        answer=documents.answer,
        key=lambda m: json.dumps(m, sort_keys=True),
        demonstration=documents.demonstration,
        characters=documents.CHARACTERS,
    ),
    **{name: _word_problems(name) for name in WORD_TASKS},
}


def records(task: str, *, seed: int, settings: Mapping[str, Any]) -> Iterator[Record]:
    """Generates endless records, with repetitions; streams of different seeds are unrelated.

    Raises:
      UserError: for an unknown task, or settings (`data.generator`) that its generator rejects or
        can't satisfy.
    """
    if task not in TASKS:
        raise UserError(f"data.task is {task!r}; choose one of {', '.join(TASKS)}")
    # reasoning_gym seeds item i with seed + i; hashing keeps neighbouring seeds from sharing items.
    first = int.from_bytes(hashlib.sha256(f"{task}:{seed}".encode()).digest()[:6])
    try:
        items = TASKS[task].generator(seed=first, **settings)
    except (AssertionError, TypeError) as error:
        raise UserError(f"data.generator does not fit task {task}: {error}") from error
    return _records(task, items)


def _records(task: str, items: Any) -> Iterator[Record]:
    chosen, failures = TASKS[task], 0
    for index in itertools.count():
        try:
            metadata = chosen.metadata(items[index])
        except ValueError as error:
            failures += 1
            if failures == MAX_FAILURES:
                raise UserError(
                    f"task {task} finds no problem for its settings ({error}); widen data.generator"
                ) from error
            continue
        failures = 0
        if chosen.keep(metadata):
            yield Record(
                id=content_id(task, metadata),
                messages=user(chosen.question(metadata)),
                answer=chosen.answer(metadata),
                task=task,
                metadata=metadata,
                source=task,
            )


def content_id(task: str, metadata: Mapping[str, Any]) -> str:
    """16 hexadecimal digits, equal for two problems exactly if their keys are equal."""
    return hashlib.sha256(f"{task}:{TASKS[task].key(metadata)}".encode()).hexdigest()[:16]


def split_of(record_id: str) -> str:
    """Fixed split of a content."""
    tenth = position(record_id, sum(SHARES.values()))
    ends = itertools.accumulate(SHARES.values())
    return next(split for split, end in zip(SHARES, ends, strict=True) if tenth < end)


def fill_splits(stream: Iterator[Record], *, sizes: Mapping[str, int]) -> dict[str, list[Record]]:
    """Takes the first `sizes[split]` distinct records of the stream for each split; UserError if
    it gives no new ones before every split is full."""
    chosen: dict[str, list[Record]] = {split: [] for split in sizes}
    seen: set[str] = set()
    misses = 0
    while any(len(chosen[split]) < size for split, size in sizes.items()):
        record = next(stream)
        split = split_of(record.id)
        if record.id not in seen and len(chosen[split]) < sizes[split]:
            seen.add(record.id)
            chosen[split].append(record)
            misses = 0
            continue
        misses += 1
        if misses == MAX_MISSES:
            split = next(s for s in sizes if len(chosen[s]) < sizes[s])
            raise UserError(
                f"data.{split}_size is {sizes[split]}, but task {record.task} has hardly more than "
                f"{len(chosen[split])} distinct {split} problems under data.generator; lower "
                f"data.{split}_size or widen data.generator"
            )
    return chosen


def prepare(config: SyntheticDataConfig) -> tfds.core.DatasetBuilder:
    """Builds the data set unless it is complete in `data_dir`, and opens it; UserError for settings
    that the task rejects, too few problems for the sizes, or a partial data set."""
    task, seed, generator = config.task, config.seed, dict(config.generator)
    sizes = {split: getattr(config, f"{split}_size") for split in SHARES}
    content = {"task": task, "generator": generator, "sizes": sizes, "seed": seed}
    chosen = lambda: fill_splits(records(task, seed=seed, settings=generator), sizes=sizes)
    return prepare_records(task, content, chosen, data_dir=config.data_dir)


def open_splits(config: SyntheticDataConfig) -> dict[str, Split]:
    """Opens train, validation and test; prepares them if needed."""
    builder = prepare(config)
    return {split: load_split(builder, split) for split in SHARES}
