"""Rows of programming data sets, made records: a problem and the tests of a solution.

The tests of a record are JSON in its `answer`, for the verifier of programs:

    {"kind": "stdin", "name": "", "tests": [[input, output], ..]}
    {"kind": "call", "name": function, "tests": [[arguments, value], ..]}

All four are texts; of a call, JSON: an argument a line, and the value. Every data set has its own
shape for tests; `normal_tests` reads them all.
"""

import base64
import binascii
import dataclasses
import datetime
import json
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

from oapl_jax.data.public.cells import Unfit, asked, content_id, text
from oapl_jax.data.public.tables import Row
from oapl_jax.data.records import Record, user
from oapl_jax.errors import UserError

TASK = "code"  # the verifier
MAX_TESTS_BYTES = 2**30  # of a problem's decompressed tests
KINDS = {
    "stdin": "stdin",
    "stdin_stdout": "stdin",
    "functional": "call",
    "function_call": "call",
}


@dataclasses.dataclass(frozen=True)
class Tests:
    """Attributes: kind "stdin" or "call"; name of the function; pairs of input and output."""

    kind: str
    name: str
    tests: Sequence[tuple[str, str]]


def deepcoder(row: Row, *, max_tests: int) -> Record:
    """DeepCoder preview: the configurations primeintellect, taco and lcbv5.

    Args:
      row: "problem" and "tests"; lcbv5 also has "starter_code", and the function's name in
        "metadata"; the others have "solutions".
      max_tests: see `shortened`.
    """
    name = text(_object(row.get("metadata")).get("func_name"))
    record = program(
        row["problem"],
        normal_tests(row["tests"], name),
        starter_code=row.get("starter_code"),
        max_tests=max_tests,
    )
    found = first_solution(row.get("solutions"))
    return dataclasses.replace(record, metadata={"solution": found} if found else {})


def first_solution(cell: Any) -> str:
    """The first program of a list, or of JSON of one, in a fence; "" if there is none."""
    try:
        programs = _parsed(cell)
    except Unfit:
        return ""
    first = programs[0] if isinstance(programs, list) and programs else ""
    if not isinstance(first, str) or not first.strip():
        return ""
    return first.strip() if "```" in first else f"```python\n{first.strip()}\n```"


def livecodebench(row: Row, *, start: str, end: str, max_tests: int) -> Record:
    """LiveCodeBench, code_generation_lite, from one day to another.

    Args:
      row: of a release's test*.jsonl.
      start, end: first and last date of a problem's contest, "2024-08-01".
      max_tests: see `shortened`; 0 for the benchmark as it is.

    Raises:
      UserError: if start or end is no date.
    """
    day = text(str(row["contest_date"]))[:10]
    if not _date(start) <= _date(day) <= _date(end):
        raise Unfit("outside of start and end")
    public, private = _parsed(row["public_test_cases"]), _private_tests(row["private_test_cases"])
    if not isinstance(public, list) or not isinstance(private, list):
        raise Unfit("tests of an unknown shape")
    name = text(_object(row["metadata"]).get("func_name"))
    record = program(
        row["question_content"],
        normal_tests(public + private, name),
        starter_code=row["starter_code"],
        max_tests=max_tests,
    )
    metadata = {"question_id": row["question_id"], "platform": row["platform"], "date": day}
    return dataclasses.replace(record, difficulty=text(row["difficulty"]), metadata=metadata)


def program(problem: Any, tests: Tests, *, starter_code: Any, max_tests: int) -> Record:
    """A record of a problem and its tests.

    A problem whose function is named neither by its text nor by starter code gets a line that
    names it: without that no solution could pass.
    """
    question = asked(problem)[0]["content"]
    code = starter_code.rstrip() if isinstance(starter_code, str) else ""
    if code:
        question += f"\n\nStarter code:\n\n```python\n{code}\n```"
    if tests.kind == "call" and tests.name not in question:
        question += f"\n\nThe solution is a function named `{tests.name}`."
    answer = dataclasses.asdict(dataclasses.replace(tests, tests=shortened(tests.tests, max_tests)))
    return Record(
        id=content_id(TASK, user(question)),
        messages=user(question),
        answer=_json(answer),
        task=TASK,
        metadata={},
    )


def shortened(tests: Sequence[tuple[str, str]], max_tests: int) -> list[tuple[str, str]]:
    """The `max_tests` tests with the longest inputs, in their order; all of them if it is 0.

    DeepCoder trains with the 15 longest, see code_reward.py in github.com/rllm-org/rllm.
    """
    by_length = sorted(range(len(tests)), key=lambda i: len(tests[i][0]), reverse=True)
    longest = by_length[: max_tests or None]
    return [tests[i] for i in sorted(longest)]


def normal_tests(tests: Any, name: str) -> Tests:
    """The tests of any data set in one shape.

    Args:
      tests: a mapping with "inputs", "outputs" and perhaps "fn_name" (taco); or a list of mappings
        with "input", "output", "type" or "testtype", and perhaps "fn_name" (the others); or JSON of
        one of them.
      name: of the function, from elsewhere in the row; "" if the tests name it or none is called.

    Raises:
      Unfit: naming what is wrong with them.
    """
    tests = _parsed(tests)
    if isinstance(tests, Mapping):
        inputs, outputs = tests.get("inputs"), tests.get("outputs")
        if not isinstance(inputs, list) or not isinstance(outputs, list):
            raise Unfit("tests of an unknown shape")
        if len(inputs) != len(outputs):
            raise Unfit("tests with more inputs than outputs, or fewer")
        name = text(tests.get("fn_name")) or name
        pairs, kinds = list(zip(inputs, outputs, strict=True)), {"call" if name else "stdin"}
        lines = False
    else:
        if not isinstance(tests, list) or not all(isinstance(test, Mapping) for test in tests):
            raise Unfit("tests of an unknown shape")
        if not all("input" in test and "output" in test for test in tests):
            raise Unfit("a test without input or output")
        name = next((text(t["fn_name"]) for t in tests if t.get("fn_name")), name)
        pairs = [(test["input"], test["output"]) for test in tests]
        kinds = {KINDS.get(test.get("testtype") or test.get("type")) for test in tests}
        lines = any(test.get("testtype") == "functional" for test in tests)
    if not pairs:
        raise Unfit("no tests")
    if len(kinds) != 1 or None in kinds:
        raise Unfit("tests of several kinds, or of an unknown one")
    (kind,) = kinds
    if kind == "stdin":
        return Tests("stdin", "", [(_lines(a), _lines(b)) for a, b in pairs])
    if not name.isidentifier():
        raise Unfit("no name of the function that the tests call")
    return Tests("call", name, [_json_lines(*pair) for pair in pairs] if lines else _calls(pairs))


def _lines(value: Any) -> str:
    """What stands on stdin or stdout: text, or a list of its lines."""
    if isinstance(value, list):
        return "\n".join(map(_lines, value))
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise Unfit("a test is not text")
    return str(value)


def _json_lines(arguments: Any, value: Any) -> tuple[str, str]:
    """LiveCodeBench, whose shape is ours."""
    if not isinstance(arguments, str) or not isinstance(value, str):
        raise Unfit("a test is not text")
    for line in (*arguments.split("\n"), value):
        _parsed(line)
    return arguments, value


def _calls(pairs: Sequence[tuple[Any, Any]]) -> list[tuple[str, str]]:
    """taco and primeintellect: lists of arguments; most problems wrap the value into a list.

    A problem of which every test has a list of one element is taken to wrap it, as in APPS.
    """
    if not all(isinstance(arguments, list) and arguments for arguments, _ in pairs):
        raise Unfit("the arguments of a call are not a list, or none")
    wrapped = all(isinstance(value, list) and len(value) == 1 for _, value in pairs)
    return [
        ("\n".join(map(_json, arguments)), _json(value[0] if wrapped else value))
        for arguments, value in pairs
    ]


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _private_tests(packed: Any) -> Any:
    """LiveCodeBench's hidden tests: JSON, or base64 of zlib of a pickled text of JSON."""
    if not isinstance(packed, str) or packed.lstrip().startswith("["):
        return _parsed(packed)
    try:
        unpacker = zlib.decompressobj()
        pickled = unpacker.decompress(base64.b64decode(packed, validate=True), MAX_TESTS_BYTES)
        if not unpacker.eof:
            raise Unfit("private tests that are cut off, or too many")
        return _parsed(pickled_text(pickled))
    except (binascii.Error, zlib.error, ValueError) as error:
        raise Unfit("private tests that can't be unpacked") from error


def pickled_text(data: bytes) -> str:
    """The text that a pickle consists of; nothing in it is executed.

    Read by hand: a pickle may call any function, and here only these opcodes are let through
    (pickletools in Python's library describes them): PROTO, FRAME, one of BINUNICODE,
    SHORT_BINUNICODE and BINUNICODE8, BINPUT, LONG_BINPUT, MEMOIZE, and STOP at the end.

    Raises:
      ValueError: for every other pickle.
    """
    skipped = {0x80: 1, 0x95: 8, 0x94: 0, ord("q"): 1, ord("r"): 4}  # bytes of their arguments
    sizes = {0x8C: 1, ord("X"): 4, 0x8D: 8}  # bytes of the text's length
    found: list[bytes] = []
    place = 0
    while place < len(data):
        opcode, place = data[place], place + 1
        if opcode in skipped:
            place += skipped[opcode]
        elif opcode in sizes and not found:
            begin = place + sizes[opcode]
            place = begin + int.from_bytes(data[place:begin], "little")
            if place > len(data):
                raise ValueError("a pickle is cut off")
            found.append(data[begin:place])
        elif opcode == ord(".") and found and place == len(data):
            return found[0].decode()
        else:
            raise ValueError(f"a pickle holds more than a text: opcode {opcode:#x} at {place - 1}")
    raise ValueError("a pickle without an end")


def _parsed(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except json.JSONDecodeError as error:
        raise Unfit("tests or metadata that are not JSON") from error


def _object(value: Any) -> Mapping[str, Any]:
    parsed = _parsed(value) if value else {}
    return parsed if isinstance(parsed, Mapping) else {}


def _date(day: str) -> datetime.date:
    try:
        return datetime.date.fromisoformat(day)
    except ValueError as error:
        raise UserError(f"{day!r} is not a date like 2024-08-01 (options.start, .end)") from error
