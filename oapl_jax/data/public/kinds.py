"""The releases that are known, and tables of any other columns: how a row becomes a record."""

import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

from oapl_jax.data.public import mathematics, programs
from oapl_jax.data.public.cells import answered, asked, content_id, conversation, text
from oapl_jax.data.public.tables import Row
from oapl_jax.data.records import Record
from oapl_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Kind:
    """How a release is read.

    Attributes:
      record: (row, **options) -> record, without source.
      required, optional: columns that are read.
    """

    record: Callable[..., Record]
    required: tuple[str, ...]
    optional: tuple[str, ...] = ()


KINDS: dict[str, Kind] = {
    "deepscaler": Kind(mathematics.deepscaler, ("problem", "answer")),
    "competition": Kind(
        mathematics.competition, ("problem", "answer"), ("problem_idx", "id", "problem_type")
    ),
    "math500": Kind(mathematics.math500, ("problem", "answer", "subject", "level", "unique_id")),
    "gsm8k": Kind(mathematics.gsm8k, ("question", "answer")),
    "deepcoder": Kind(
        programs.deepcoder, ("problem", "tests"), ("starter_code", "metadata", "solutions")
    ),
    "livecodebench": Kind(
        programs.livecodebench,
        (
            "question_content",
            "platform",
            "question_id",
            "contest_date",
            "starter_code",
            "difficulty",
            "public_test_cases",
            "private_test_cases",
            "metadata",
        ),
    ),
}


def choose_kind(kind: str, options: Mapping[str, Any], *, setting: str) -> Kind:
    """The kind with its options.

    Args:
      kind: key of KINDS, or "table" for any files and a map of their columns.
      options: arguments of the kind's `record`; of "table", those of `table_kind`.
      setting: named in errors.

    Raises:
      UserError: for a kind that there is not, or options that do not fit it.
    """
    try:
        if kind == "table":
            return table_kind(setting, **options)
        if kind not in KINDS:
            raise UserError(f"{setting}.kind={kind!r} is not one of {', '.join((*KINDS, 'table'))}")
        chosen = KINDS[kind]
        inspect.signature(chosen.record).bind({}, **options)
    except TypeError as error:
        raise UserError(f"{setting}.options do not fit kind {kind}: {error}") from error
    return dataclasses.replace(chosen, record=functools.partial(chosen.record, **options))


def table_kind(setting: str, *, task: str, columns: Mapping[str, str], max_tests: int) -> Kind:
    """Any JSON, JSON Lines or Parquet files.

    Args:
      setting: named in errors.
      task: the verifier.
      columns: which column holds "problem" (or "messages", a list of role and content) and
        "answer" (or "tests", of any shape that programs.py reads); perhaps "difficulty",
        "starter_code" and "name" of the tested function.
      max_tests: see programs.shortened.

    Raises:
      UserError: for names of columns that are missing, too many or unknown.
    """
    columns = dict(columns)
    known = {"problem", "messages", "answer", "tests", "difficulty", "starter_code", "name"}
    pairs = ({"problem", "messages"}, {"answer", "tests"})
    if set(columns) - known or any(len(pair & set(columns)) != 1 for pair in pairs):
        raise UserError(
            f"{setting}.options.columns maps {', '.join(columns)}; it takes problem or messages, "
            "answer or tests, and perhaps difficulty, starter_code, name"
        )
    if "tests" in columns and "messages" in columns:
        raise UserError(f"{setting}.options.columns: tests go with a problem, not with messages")
    convert = functools.partial(_table_record, task=task, columns=columns, max_tests=max_tests)
    return Kind(convert, tuple(dict.fromkeys(columns.values())))


def _table_record(row: Row, *, task: str, columns: Mapping[str, str], max_tests: int) -> Record:
    cells = {field: row[column] for field, column in columns.items()}
    difficulty = text(cells.get("difficulty"))
    if "tests" in cells:
        record = programs.program(
            cells["problem"],
            programs.normal_tests(cells["tests"], text(cells.get("name"))),
            starter_code=cells.get("starter_code"),
            max_tests=max_tests,
        )
        return dataclasses.replace(
            record, id=content_id(task, record.messages), task=task, difficulty=difficulty
        )
    asks = "messages" in cells
    messages = conversation(cells["messages"]) if asks else asked(cells["problem"])
    return answered(messages, cells["answer"], task=task, difficulty=difficulty, metadata={})
