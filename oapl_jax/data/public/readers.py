"""Readers of public releases: a row of a release's files -> a record."""

import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

from oapl_jax.config import FUNCTION
from oapl_jax.data.public import programs, tables
from oapl_jax.data.public.tables import Row, cell_text, question_messages
from oapl_jax.data.records import Record
from oapl_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Reader:
    """Reader of one format.

    Attributes:
      record: (row, **options) -> record without source; raises InvalidRow.
      required, optional: columns that are read; all of them if `optional` is None.
    """

    record: Callable[..., Record]
    required: tuple[str, ...]
    optional: tuple[str, ...] | None = ()


def deepscaler(row: Row) -> Record:
    return _math(row["problem"], row["answer"])


def competition(row: Row) -> Record:
    """AIME, HMMT and BRUMO as MathArena releases them; the optional columns vary."""
    number = next((row[c] for c in ("problem_idx", "id") if row.get(c) is not None), "")
    kinds = row.get("problem_type")
    metadata = {"number": number, "type": kinds if isinstance(kinds, list) else []}
    return _math(row["problem"], row["answer"], metadata=metadata)


def math500(row: Row) -> Record:
    metadata = {"unique_id": row["unique_id"], "subject": row["subject"]}
    return _math(row["problem"], row["answer"], difficulty=row["level"], metadata=metadata)


def gsm8k(row: Row) -> Record:
    """The final answer follows "####", with commas between thousands."""
    _, mark, final = cell_text(row["answer"]).rpartition("####")
    if not mark:
        raise tables.InvalidRow("no final answer behind ####")
    return _math(row["question"], final.replace(",", ""))


def _math(question: Any, answer: Any, **fields: Any) -> Record:
    return tables.make_record("math", question_messages(question), answer, **fields)


RELEASES: dict[str, Reader] = {
    "deepscaler": Reader(deepscaler, ("problem", "answer")),
    "competition": Reader(
        competition, ("problem", "answer"), ("problem_idx", "id", "problem_type")
    ),
    "math500": Reader(math500, ("problem", "answer", "subject", "level", "unique_id")),
    "gsm8k": Reader(gsm8k, ("question", "answer")),
    "deepcoder": Reader(
        programs.deepcoder, ("problem", "tests"), ("starter_code", "metadata", "solutions")
    ),
    "livecodebench": Reader(
        programs.livecodebench,
        (
            *("question_content", "platform", "question_id", "contest_date", "starter_code"),
            *("difficulty", "public_test_cases", "private_test_cases", "metadata"),
        ),
    ),
}


def choose_reader(kind: str, options: Mapping[str, Any], *, setting: str) -> Reader:
    """Binds a reader to its options, which section `setting` of the configuration holds; UserError
    for an unknown kind, or options that do not fit it.

    Args:
      kind: key of RELEASES; "table" for files of any columns; or "questions", see
        data/question_files.py.
      options: arguments of the reader's `record`; of "table", those of `table_reader`; of
        "questions", those of `questions_reader`.
    """
    try:
        if kind == "table":
            return table_reader(setting, **options)
        if kind == "questions":
            return questions_reader(**options)
        if kind not in RELEASES:
            known = ", ".join((*RELEASES, "table", "questions"))
            raise UserError(f"{setting}.kind={kind!r} is not one of {known}")
        reader = RELEASES[kind]
        inspect.signature(reader.record).bind({}, **options)
    except TypeError as error:
        raise UserError(f"{setting}.options do not fit kind {kind}: {error}") from error
    return dataclasses.replace(reader, record=functools.partial(reader.record, **options))


def table_reader(setting: str, *, task: str, columns: Mapping[str, str], max_tests: int) -> Reader:
    """Reader of any JSON, JSON Lines or Parquet files; UserError for fields that do not fit.

    Args:
      columns: field -> column. Fields: "problem" or "messages" (a list of role and content);
        "answer" or "tests" (any format of `programs.parse_tests`); optionally "difficulty",
        "starter_code" and "name" of the tested function.
      max_tests: see `programs.longest_tests`.
    """
    columns = dict(columns)
    known = {"problem", "messages", "answer", "tests", "difficulty", "starter_code", "name"}
    pairs = ({"problem", "messages"}, {"answer", "tests"})
    if set(columns) - known or any(len(pair & set(columns)) != 1 for pair in pairs):
        raise UserError(
            f"{setting}.options.columns maps {', '.join(columns)}; it takes problem or messages, "
            "answer or tests, and optionally difficulty, starter_code, name"
        )
    if "tests" in columns and "messages" in columns:
        raise UserError(f"{setting}.options.columns: tests go with a problem, not with messages")
    convert = functools.partial(_table_record, task=task, columns=columns, max_tests=max_tests)
    return Reader(convert, tuple(dict.fromkeys(columns.values())))


def _table_record(row: Row, *, task: str, columns: Mapping[str, str], max_tests: int) -> Record:
    cells = {field: row[column] for field, column in columns.items()}
    difficulty = cells.get("difficulty")
    if "tests" in cells:
        return programs.program_record(
            cells["problem"],
            programs.parse_tests(cells["tests"], cell_text(cells.get("name"))),
            starter_code=cells.get("starter_code"),
            max_tests=max_tests,
            task=task,
            difficulty=difficulty,
        )
    make = tables.cell_messages if "messages" in cells else question_messages
    messages = make(cells.get("messages", cells.get("problem")))
    return tables.make_record(task, messages, cells["answer"], difficulty=difficulty)


def questions_reader(*, task: str, problem: str, answer: str) -> Reader:
    """Reader of any files of questions, all of whose columns become metadata.

    Args:
      task: of the records; those of FUNCTION need no answer.
      problem, answer: columns; a problem may be a list of messages.
    """
    convert = functools.partial(_question, task=task, problem=problem, answer=answer)
    needed = (problem,) if task == FUNCTION else (problem, answer)
    return Reader(convert, needed, optional=None)


def _question(row: Row, *, task: str, problem: str, answer: str) -> Record:
    cell, reference = row[problem], row.get(answer)
    messages = (tables.cell_messages if isinstance(cell, list) else question_messages)(cell)
    if task == "code":
        tests = programs.parse_tests(reference, cell_text(row.get("name")))
        record = programs.program_record(
            messages[-1]["content"], tests, starter_code=row.get("starter_code"), max_tests=0
        )
    elif task == FUNCTION:
        reference = tables.text_or_json(reference)
        record = Record(tables.messages_id(task, messages), messages, reference, task, {})
    else:
        record = tables.make_record(task, messages, reference)
    return dataclasses.replace(record, metadata={**row, **record.metadata})
