"""The embedded tasks: endless made records, most of reasoning_gym, and what a noisy teacher would
answer.

Questions are compact, for a character-level model. All that a task knows about a record follows
from the record's metadata by pure functions; how a response is judged stands in rewards/tasks.py
and rewards/documents.py.
"""

import dataclasses
import hashlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from oapl_jax.data.records import Record, user
from oapl_jax.data.synthetic import documents
from oapl_jax.errors import UserError

DIGITS = "0123456789"
FAILURES_IN_A_ROW = 20  # each is already a hundred attempts inside reasoning_gym


@dataclasses.dataclass(frozen=True)
class Task:
    """The pure functions of one task.

    Attributes:
      generator: makes items by index, {"metadata": ..} each, from a seed and the settings.
      metadata: of one item's.
      question, answer: of one metadata.
      key: canonical content of one metadata: equal keys mean the same problem.
      keep: whether a problem of this metadata belongs to the task; the others are passed over.
      demonstration: (record, rng, noise) -> a response as a teacher writes it, who errs in each
        step with probability `noise`; without noise it is always right.
      characters: every character of questions and demonstrations.
    """

    generator: Callable[..., Any]
    metadata: Callable[[Mapping[str, Any]], dict[str, Any]]
    question: Callable[[Mapping[str, Any]], str]
    answer: Callable[[Mapping[str, Any]], str]
    key: Callable[[Mapping[str, Any]], str]
    keep: Callable[[Mapping[str, Any]], bool]
    demonstration: Callable[[Record, np.random.Generator, float], str]
    characters: str


def records(task: str, *, seed: int, settings: Mapping[str, Any]) -> Iterator[Record]:
    """An endless iterator of records, with repetitions.

    Args:
      task: key of TASKS.
      seed: different seeds give unrelated streams.
      settings: keyword arguments of the task's generator (`data.generator`).

    Raises:
      UserError: for an unknown task, or settings that the generator refuses or can't satisfy.
    """
    if task not in TASKS:
        raise UserError(f"data.task is {task!r}; choose one of {', '.join(TASKS)}")
    chosen = TASKS[task]
    # reasoning_gym seeds item i with seed + i, so that neighbouring seeds would share their items.
    first = int.from_bytes(hashlib.sha256(f"{task}:{seed}".encode()).digest()[:6])
    try:
        items = chosen.generator(seed=first, **settings)
    except (AssertionError, TypeError) as error:
        raise UserError(f"data.generator does not fit task {task}: {error}") from error
    return _records(task, chosen, items)


def _records(task: str, chosen: Task, items: Any) -> Iterator[Record]:
    index, failures = 0, 0
    while True:
        try:
            metadata = chosen.metadata(items[index]["metadata"])
        except ValueError as error:
            failures += 1
            if failures == FAILURES_IN_A_ROW:
                raise UserError(
                    f"task {task} finds no problem for its settings ({error}); widen data.generator"
                ) from error
        else:
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
        index += 1


def content_id(task: str, metadata: Mapping[str, Any]) -> str:
    """16 hexadecimal digits, equal for two problems exactly if their keys are equal."""
    return hashlib.sha256(f"{task}:{TASKS[task].key(metadata)}".encode()).hexdigest()[:16]


# chain_sum: "4+3-2=" is answered by its running totals, "07,05". Problems whose totals stay within
# two characters keep the steps of the reasoning at fixed places: a small model then learns faster.


def _totals(terms: list[str], misread: Callable[[], bool]) -> list[int]:
    """The totals after each operator; a misread operator is taken for its opposite."""
    totals = [int(terms[0])]
    for operator, term in zip(terms[1::2], terms[2::2], strict=True):
        plus = (operator == "+") != misread()
        totals.append(totals[-1] + (int(term) if plus else -int(term)))
    return totals[1:] or totals


def _chain_sum_demonstration(record: Record, rng: np.random.Generator, noise: float) -> str:
    """After a misread operator the teacher goes on from the wrong total."""
    totals = _totals(record.metadata["terms"], lambda: rng.random() < noise)
    return ",".join(f"{total:02d}" for total in totals)


def _right_totals(metadata: Mapping[str, Any]) -> list[int]:
    return _totals(metadata["terms"], lambda: False)


# number_sorting: "3,1,2<" (ascending) or "3,1,2>" (descending) is answered by "1,2,3" or "3,2,1".


def _number_sorting_metadata(item: Mapping[str, Any]) -> dict[str, Any]:
    numbers = [int(float(number)) for number in item["original_numbers"]]  # "-0.0" becomes 0
    return {"numbers": numbers, "direction": item["direction"]}


def _sorted(metadata: Mapping[str, Any]) -> list[int]:
    return sorted(metadata["numbers"], reverse=metadata["direction"] == "descending")


def _number_sorting_demonstration(record: Record, rng: np.random.Generator, noise: float) -> str:
    return ",".join(
        _with_another_digit(str(number), rng) if rng.random() < noise else str(number)
        for number in _sorted(record.metadata)
    )


def _with_another_digit(number: str, rng: np.random.Generator) -> str:
    place = int(rng.integers(number.startswith("-"), len(number)))
    other = (int(number[place]) + int(rng.integers(1, 10))) % 10
    return f"{number[:place]}{other}{number[place + 1 :]}"


# countdown: "3,4,5:17=" is answered by an expression, "3*4+5".

COUNTDOWN_SYMBOLS = DIGITS + "+-*/()"


def _countdown_metadata(item: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "numbers": item["numbers"],
        "target": item["target"],
        "expression": item["expression"].replace(" ", ""),
    }


def _countdown_demonstration(record: Record, rng: np.random.Generator, noise: float) -> str:
    return "".join(
        str(rng.choice([other for other in COUNTDOWN_SYMBOLS if other != symbol]))
        if rng.random() < noise
        else symbol
        for symbol in record.metadata["expression"]
    )


# reasoning_gym is imported where data is made: all its tasks come along, with half a second.
def _chain_sums(**settings: Any) -> Any:
    from reasoning_gym.arithmetic.chain_sum import ChainSumConfig, ChainSumDataset

    return ChainSumDataset(ChainSumConfig(**settings))


def _number_sortings(**settings: Any) -> Any:
    from reasoning_gym.algorithmic import number_sorting as module

    config = module.NumberSortingConfig(**settings, min_decimals=0, max_decimals=0)
    return module.NumberSortingDataset(config)


def _countdowns(**settings: Any) -> Any:
    from reasoning_gym.games.countdown import CountdownConfig, CountdownDataset

    return CountdownDataset(CountdownConfig(**settings))


TASKS = {
    "chain_sum": Task(
        generator=_chain_sums,
        metadata=lambda item: {"terms": item["expression"].split()},
        question=lambda m: "".join(m["terms"]) + "=",
        answer=lambda m: str(_right_totals(m)[-1]),
        key=lambda m: "".join(m["terms"]),
        keep=lambda m: all(0 <= total <= 99 for total in _right_totals(m)),
        demonstration=_chain_sum_demonstration,
        characters=DIGITS + "+-=,",
    ),
    "number_sorting": Task(
        generator=_number_sortings,
        metadata=_number_sorting_metadata,
        question=lambda m: (
            ",".join(map(str, m["numbers"])) + ("<" if m["direction"] == "ascending" else ">")
        ),
        answer=lambda m: ",".join(map(str, _sorted(m))),
        key=lambda m: f"{m['direction']} {sorted(m['numbers'])}",
        keep=lambda m: True,
        demonstration=_number_sorting_demonstration,
        characters=DIGITS + "-,<>",
    ),
    "countdown": Task(
        generator=_countdowns,
        metadata=_countdown_metadata,
        question=lambda m: f"{','.join(map(str, m['numbers']))}:{m['target']}=",
        answer=lambda m: f"{' '.join(map(str, m['numbers']))} -> {m['target']}",
        key=lambda m: f"{sorted(m['numbers'])} {m['target']}",
        keep=lambda m: True,
        demonstration=_countdown_demonstration,
        characters=COUNTDOWN_SYMBOLS + ",:=",
    ),
    "documents": Task(
        generator=documents.MadeDocuments,
        metadata=dict,
        question=documents.question,
        answer=documents.answer,
        key=documents.key,
        keep=lambda m: True,
        demonstration=documents.demonstration,
        characters=documents.CHARACTERS,
    ),
}
