"""Rows of programming data sets: a problem and the tests of its solution.

The tests of a problem travel in the `answer` of its record, as JSON:

    {"kind": "stdin", "name": "", "tests": [["3 4\\n", "7\\n"], ..]}
    {"kind": "call", "name": "twoSum", "tests": [["[2, 7]\\n9", "[0, 1]"], ..]}

`stdin`: input and expected output. `call`: one JSON value a line for each argument of the function
`name`, or of that method of `class Solution`, and the JSON of its expected value: the form of
LiveCodeBench. `taco`: a call by the rules of APPS, for tests that JSON or a list around each value
has changed: a dictionary whose keys are all integers is passed with integer keys, and an expected
list of one element may stand for the element. Every data set has its own format for tests;
`parse_tests` reads them all.
"""

import base64
import dataclasses
import datetime
import functools
import hashlib
import io
import json
import pickle
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

from oapl_jax.data.public.tables import (
    InvalidRow,
    Row,
    cell_text,
    make_record,
    parse_json,
    question_messages,
)
from oapl_jax.data.records import Record, user
from oapl_jax.errors import UserError

MAX_TESTS_BYTES = 2**30  # of a problem's decompressed tests
TEST_TYPES = dict(stdin="stdin", stdin_stdout="stdin", functional="call", function_call="call")


@dataclasses.dataclass(frozen=True)
class Problem:
    """The tests of a problem: pairs of input and expected output; InvalidRow for any others."""

    kind: str
    name: str
    tests: tuple[tuple[str, str], ...]

    def __post_init__(self) -> None:
        if self.kind not in ("stdin", "call", "taco"):
            raise InvalidRow("tests of an unknown kind")
        if not self.tests:
            raise InvalidRow("no tests")
        called = self.kind != "stdin"
        if not (self.name.isidentifier() if called else self.name == ""):
            raise InvalidRow("no name of the function that is called, or one for stdin")
        for test in self.tests:
            if not isinstance(test, tuple) or [type(part) for part in test] != [str, str]:
                raise InvalidRow("a test is not text")
            for line in (*test[0].split("\n"), test[1]) if called else ():
                _parse_json(line)

    @functools.cached_property
    def digest(self) -> bytes:
        return hashlib.sha256(repr((self.kind, self.name, self.tests)).encode()).digest()

    @functools.cached_property
    def sizes(self) -> tuple[int, int]:
        """Bytes of the longest input and of the longest expected output."""
        size = lambda part: max(len(test[part].encode(errors="replace")) for test in self.tests)
        return size(0), size(1)


@functools.lru_cache(maxsize=32)  # the responses to one prompt are graded one after the other
def parse_problem(answer: str) -> Problem:
    """Reads the tests of a record from its `answer`; UserError names a mistake in them."""
    try:
        record = parse_json(answer)
        tests = (tuple(test) if isinstance(test, list) else test for test in record["tests"])
        return Problem(**{**record, "tests": tuple(tests)})
    except (InvalidRow, AttributeError, LookupError, TypeError, ValueError) as error:
        fault = f"the tests of a record can't be used ({error!r})"
        raise UserError(f"{fault}; build the data again") from error


def longest_tests(tests: Sequence[tuple[str, str]], most: int) -> list[int]:
    """Indices, in order, of the `most` tests with the longest inputs; 0 for all.

    DeepCoder trains with the 15 longest: code_reward.py in github.com/rllm-org/rllm.
    """
    by_length = sorted(range(len(tests)), key=lambda i: len(tests[i][0]), reverse=True)
    return sorted(by_length[: most or None])


def deepcoder(row: Row, *, max_tests: int) -> Record:
    """DeepCoder preview: the configurations primeintellect, taco and lcbv5.

    lcbv5 has "starter_code", and the function's name in "metadata"; the others have "solutions".
    """
    name = cell_text(_parse_object(row.get("metadata")).get("func_name"))
    solution = first_solution(row.get("solutions"))
    return program_record(
        row["problem"],
        parse_tests(row["tests"], name),
        starter_code=row.get("starter_code"),
        max_tests=max_tests,
        metadata={"solution": solution} if solution else {},
    )


def first_solution(cell: Any) -> str:
    """Fenced first program of a list, or of JSON of a list; "" if there is none."""
    try:
        programs = _parse_json(cell)
    except InvalidRow:
        return ""
    first = programs[0] if isinstance(programs, list) and programs else ""
    if not isinstance(first, str) or not first.strip():
        return ""
    return first.strip() if "```" in first else f"```python\n{first.strip()}\n```"


def livecodebench(row: Row, *, start: str, end: str, max_tests: int) -> Record:
    """LiveCodeBench, code_generation_lite: contests from `start` to `end`, both included.

    Raises:
      UserError: if start or end is no date.
    """
    day = str(row["contest_date"]).strip()[:10]
    try:
        date = datetime.date.fromisoformat(day)
    except ValueError as error:
        raise InvalidRow("no date of the contest") from error
    if not _option_date(start) <= date <= _option_date(end):
        raise InvalidRow("outside of start and end")
    public = _parse_json(row["public_test_cases"])
    private = _unpack_private_tests(row["private_test_cases"])
    if not isinstance(public, list) or not isinstance(private, list):
        raise InvalidRow("tests of an unknown shape")
    name = cell_text(_parse_object(row["metadata"]).get("func_name"))
    return program_record(
        row["question_content"],
        parse_tests(public + private, name),
        starter_code=row["starter_code"],
        max_tests=max_tests,
        difficulty=row["difficulty"],
        metadata={"question_id": row["question_id"], "platform": row["platform"], "date": day},
    )


def program_record(
    text: Any,
    problem: Problem,
    *,
    starter_code: Any,
    max_tests: int,
    task: str = "code",
    difficulty: Any = "",
    metadata: dict[str, Any] | None = None,
) -> Record:
    """A record of a problem and its tests; names the called function if the text does not."""
    question = question_messages(text)[0]["content"]
    code = starter_code.rstrip() if isinstance(starter_code, str) else ""
    if code:
        question += f"\n\nStarter code:\n\n```python\n{code}\n```"
    if problem.kind != "stdin" and problem.name not in question:
        question += f"\n\nThe solution is a function named `{problem.name}`."
    kept = tuple(problem.tests[i] for i in longest_tests(problem.tests, max_tests))
    answer = _json(dataclasses.asdict(problem) | {"tests": kept})
    return make_record(task, user(question), answer, difficulty=difficulty, metadata=metadata)


def parse_tests(tests: Any, name: str) -> Problem:
    """Converts the tests of any supported data set; InvalidRow for any other format.

    Args:
      tests: a mapping with "inputs", "outputs" and optionally "fn_name" (taco); or a list of
        mappings with "input", "output", "type" or "testtype", and optionally "fn_name" (the
        others); or JSON of either.
      name: of the function, from elsewhere in the row; "" if the tests name it or call none.
    """
    tests = _parse_json(tests)
    if isinstance(tests, Mapping):
        inputs, outputs = tests.get("inputs"), tests.get("outputs")
        if not isinstance(inputs, list) or not isinstance(outputs, list):
            raise InvalidRow("tests of an unknown shape")
        if len(inputs) != len(outputs):
            raise InvalidRow("tests with more inputs than outputs, or fewer")
        name = cell_text(tests.get("fn_name")) or name
        pairs, kinds = list(zip(inputs, outputs, strict=True)), {"call" if name else "stdin"}
        json_lines = False
    else:
        if not isinstance(tests, list) or not all(isinstance(test, Mapping) for test in tests):
            raise InvalidRow("tests of an unknown shape")
        if not all("input" in test and "output" in test for test in tests):
            raise InvalidRow("a test without input or output")
        name = next((cell_text(t["fn_name"]) for t in tests if t.get("fn_name")), name)
        pairs = [(test["input"], test["output"]) for test in tests]
        kinds = {TEST_TYPES.get(str(test.get("testtype") or test.get("type"))) for test in tests}
        json_lines = any(test.get("testtype") == "functional" for test in tests)
    if pairs and (len(kinds) != 1 or None in kinds):
        raise InvalidRow("tests of several kinds, or of an unknown one")
    if kinds == {"stdin"}:
        return Problem("stdin", "", tuple((_stream_text(a), _stream_text(b)) for a, b in pairs))
    if json_lines:
        return Problem("call", name, tuple(pairs))
    if not all(isinstance(arguments, list) and arguments for arguments, _ in pairs):
        raise InvalidRow("the arguments of a call are not a list, or none")
    calls = (("\n".join(map(_json, given)), _json(value)) for given, value in pairs)
    return Problem("taco", name, tuple(calls))


def _stream_text(value: Any) -> str:
    """Content of stdin or stdout: text, or a list of its lines."""
    if isinstance(value, list):
        return "\n".join(map(_stream_text, value))
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise InvalidRow("a test is not text")
    return str(value)


def _unpack_private_tests(packed: Any) -> Any:
    """LiveCodeBench's hidden tests: JSON, or base64 of zlib of a pickled JSON text."""
    if not isinstance(packed, str) or packed.lstrip().startswith("["):
        return _parse_json(packed)
    try:
        unpacker = zlib.decompressobj()
        pickled = unpacker.decompress(base64.b64decode(packed, validate=True), MAX_TESTS_BYTES)
    except (ValueError, zlib.error) as error:
        raise InvalidRow("private tests that can't be unpacked") from error
    if not unpacker.eof:
        raise InvalidRow("private tests that are cut off, or too many")
    return _parse_json(unpickle_text(pickled))


class _PlainUnpickler(pickle.Unpickler):
    """Refuses every global, so that a pickle can name nothing that could be called."""

    def find_class(self, module_name: str, global_name: str) -> Any:
        raise pickle.UnpicklingError(f"{module_name}.{global_name} is refused")


def unpickle_text(data: bytes) -> str:
    """Unpickles a string and executes nothing; InvalidRow for anything else, or a global in it."""
    try:
        text = _PlainUnpickler(io.BytesIO(data)).load()
    except Exception as error:  # the library names no closed set for damaged pickles
        raise InvalidRow("private tests that can't be unpacked") from error
    if not isinstance(text, str):
        raise InvalidRow("private tests that can't be unpacked")
    return text


def _json(value: Any) -> str:
    try:
        return json.dumps(value, ensure_ascii=False)
    except TypeError as error:
        raise InvalidRow("tests that are not JSON") from error


def _parse_json(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return parse_json(value)
    except json.JSONDecodeError as error:
        raise InvalidRow("tests or metadata that are not JSON") from error


def _parse_object(value: Any) -> Mapping[str, Any]:
    parsed = _parse_json(value) if value else {}
    return parsed if isinstance(parsed, Mapping) else {}


def _option_date(day: str) -> datetime.date:
    try:
        return datetime.date.fromisoformat(day)
    except ValueError as error:
        raise UserError(f"{day!r} is not a date like 2024-08-01 (options.start, .end)") from error
