"""Tests of programs in the format of every release, and pickles, which are never executed."""

import base64
import json
import os
import pickle
import zlib

import pytest

from oapl_jax.data.public import programs
from oapl_jax.data.public.programs import (
    Problem,
    deepcoder,
    livecodebench,
    longest_tests,
    parse_problem,
    parse_tests,
    unpickle_text,
)
from oapl_jax.data.public.tables import InvalidRow
from oapl_jax.data.samples import packed
from oapl_jax.errors import UserError

STDIN = [("1 2\n", "3\n"), ("4 5\n", "9\n")]
INPUTS, OUTPUTS = (list(part) for part in zip(*STDIN, strict=True))


def stdin(**more):
    return [{"input": a, "output": b, **more} for a, b in STDIN]


def columns(inputs, outputs, **more):
    return {"inputs": inputs, "outputs": outputs, **more}


def call(given, returned, **more):
    return {"input": given, "output": returned, **more}


def answer(record):
    """The tests, in the format of the verifier of programs."""
    problem = parse_problem(record.answer)
    return problem.kind, problem.name, list(problem.tests)


@pytest.mark.parametrize(
    ("tests", "name", "expected"),
    [
        (stdin(type="stdin_stdout"), "", STDIN),
        (stdin(type="stdin_stdout", fn_name=None), "", STDIN),
        (stdin(testtype="stdin"), "", STDIN),
        (stdin(testtype="stdin"), "unused", STDIN),
        (columns(INPUTS, OUTPUTS), "", STDIN),
        (columns([["1 2", ""]], [["3", ""]]), "", STDIN[:1]),
        (columns([5], [2.5]), "", [("5", "2.5")]),
        # Calls: arguments are a list here, and a line each in the record.
        (
            [call([[1, 2], "a"], [3], type="function_call", fn_name="f")] * 2,
            "",
            ("taco", "f", [('[1, 2]\n"a"', "[3]")] * 2),
        ),
        (columns([[1]], [2]), "f", ("taco", "f", [("1", "2")])),
        (
            columns([[1], [2], [3]], [[1], [], "ä\n"], fn_name="f"),
            "",
            ("taco", "f", [("1", "[1]"), ("2", "[]"), ("3", '"ä\\n"')]),
        ),
        (
            columns([[{"1": 2}]], [[10**5000]], fn_name="f"),
            "",
            ("taco", "f", [('{"1": 2}', "[1" + "0" * 5000 + "]")]),
        ),
        # LiveCodeBench's own lines stay as they are.
        (
            [call('[1]\n"b"', "[3]", testtype="functional")],
            "g",
            ("call", "g", [('[1]\n"b"', "[3]")]),
        ),
    ],
)
def test_every_format_of_tests(tests, name, expected):
    wanted = expected if isinstance(expected, tuple) else ("stdin", "", expected)
    for given in (tests, json.dumps(tests)):
        found = parse_tests(given, name)
        assert (found.kind, found.name, list(found.tests)) == wanted


@pytest.mark.parametrize(
    ("tests", "name", "reason"),
    [
        *((tests, "", "no tests") for tests in ([], columns([], []))),
        (columns(["1"], []), "", "more inputs than outputs"),
        *((tests, "", "unknown shape") for tests in (columns("1", "2"), 7, ["1"])),
        ("nothing", "", "not JSON"),
        ([{"input": "1", "testtype": "stdin"}], "", "without input or output"),
        (stdin(type="stdin_stdout") + stdin(type="function_call"), "f", "several kinds"),
        *((tests, "", "unknown one") for tests in (stdin(type="special"), stdin())),
        (columns([{}], ["1"]), "", "not text"),
        *((columns(["1"], [output]), "", "not text") for output in (None, True)),
        *(([call([1], 2, type="function_call")], f, "no name of") for f in ("", "a.b")),
        *((columns(i, ["2"], fn_name="f"), "", "arguments of a call") for i in (["1"], [[]])),
        ([call("x", "1", testtype="functional")], "f", "not JSON"),
        ([call([1], "1", testtype="functional")], "f", "not text"),
        ([call("9" * 60_000, "1", testtype="functional")], "f", "50,000 digits"),
        ([call("[" * 10**5, "1", testtype="functional")], "f", "nested"),
        ('{"fn_name": "f", "inputs": [[%s]], "outputs": [1]}' % ("9" * 60_000), "", "50,000"),
    ],
)
def test_unusable_tests_are_dropped_by_reason(tests, name, reason):
    with pytest.raises(InvalidRow, match=reason):
        parse_tests(tests, name)


@pytest.mark.parametrize(
    ("inputs", "most", "chosen"),
    [
        *(("1 333 22 333", most, [0, 1, 2, 3]) for most in (0, 9)),
        *(("1 333 22 333", 2, [1, 3]), ("1 333 22 333", 3, [1, 2, 3])),
        *(("aa a aaaa aa aaa", most, [0, 1, 2, 3, 4]) for most in (0, 9)),
        ("aa a aaaa aa aaa", 3, [0, 2, 4]),
    ],
)
def test_the_longest_tests_keep_their_order(inputs, most, chosen):
    assert longest_tests([(text, "") for text in inputs.split()], most) == chosen


# The tests of a record


@pytest.mark.parametrize(
    ("kind", "name", "tests"),
    [
        ("stdin", "", (("1\n", "2\n"), ("", "x"))),
        *((kind, "f", (('[1]\n"a"', "null"),)) for kind in ("call", "taco")),
    ],
)
def test_the_tests_of_a_record_are_read(kind, name, tests):
    text = json.dumps({"kind": kind, "name": name, "tests": tests})
    assert parse_problem(text) == Problem(kind, name, tests)


NO_JSON = ([["1\n", "1"]], [["1", "x"]], [["9" * 60_000, "1"]], [["1", "[" * 10**5]])


@pytest.mark.parametrize(
    "answer",
    [
        *("42, 43", "42", '{"kind": "stdin", "tests": [["", ""]]}'),
        *(
            json.dumps({"kind": kind, "name": name, "tests": tests})
            for kind, name, tests in (
                ("file", "", [["", ""]]),
                ("stdin", "f", [["", ""]]),
                *(("call", name, [["1", "1"]]) for name in ("f()", "")),
                *(("stdin", "", tests) for tests in ([], "ab", [["1", "1"], ["1"]], [["1", 1]])),
                *((kind, "f", tests) for kind in ("call", "taco") for tests in NO_JSON),
            )
        ),
    ],
)
def test_malformed_tests_are_refused(answer):
    with pytest.raises(UserError):
        parse_problem(answer)


def test_tests_with_other_content_have_other_digests():
    tests = (("1", "2"),)
    assert Problem("stdin", "", tests).digest == Problem("stdin", "", tests).digest
    problems = (("stdin", "", tests), ("stdin", "", (("12", ""),)), ("call", "f", tests))
    problems += (("call", "f1", (("2", "3"),)), ("call", "f", (("12", "3"),)))
    assert len({Problem(*problem).digest for problem in problems}) == 5


# DeepCoder


def test_a_deepcoder_problem_from_stdin():
    row = {"problem": " Add them. ", "tests": json.dumps(stdin(type="stdin_stdout"))}
    record = deepcoder(row, max_tests=1)
    assert (record.question, record.task, len(record.id)) == ("Add them.", "code", 16)
    assert answer(record) == ("stdin", "", STDIN[:1])
    row = {"problem": "P", "tests": stdin(testtype="stdin"), "starter_code": ""}
    for empty in (None, "", {"func_name": None}):
        assert deepcoder(row | {"metadata": empty}, max_tests=0).question == "P"


@pytest.mark.parametrize("metadata", [{"func_name": "add"}, '{"func_name": "add"}'])
def test_a_deepcoder_problem_with_starter_code(metadata):
    tests = [{"testtype": "functional", "input": "1", "output": "2"}]
    code = "class Solution:\n    def add(self, x):\n        "
    row = {"problem": "P", "tests": json.dumps(tests), "starter_code": code, "metadata": metadata}
    record = deepcoder(row, max_tests=0)
    assert record.question == f"P\n\nStarter code:\n\n```python\n{code.rstrip()}\n```"
    assert answer(record) == ("call", "add", [("1", "2")])


def test_a_function_that_the_problem_does_not_name_is_named():
    tests = json.dumps({"fn_name": "add_up", "inputs": [[1]], "outputs": [[1]]})
    silent = deepcoder({"problem": "Add.", "tests": tests}, max_tests=0)
    named = deepcoder({"problem": "Write add_up.", "tests": tests}, max_tests=0)
    assert silent.question == "Add.\n\nThe solution is a function named `add_up`."
    assert named.question == "Write add_up."


# LiveCodeBench


def lcb_row(**changes):
    public, private = (json.dumps([call(f"{x}\n", f"{x + 1}\n", testtype="stdin")]) for x in (1, 5))
    row = dict(question_content="Add 1.", platform="atcoder", question_id="abc_a", starter_code="")
    row |= dict(contest_date="2024-08-10T00:00:00", difficulty="easy", metadata="{}")
    row |= dict(public_test_cases=public, private_test_cases=packed(private))
    return row | changes


WINDOW = dict(start="2024-08-01", end="2025-02-01", max_tests=0)


def test_a_livecodebench_problem():
    record = livecodebench(lcb_row(), **WINDOW)
    assert answer(record) == ("stdin", "", [("1\n", "2\n"), ("5\n", "6\n")])
    assert record.metadata == {"question_id": "abc_a", "platform": "atcoder", "date": "2024-08-10"}
    assert (record.question, record.difficulty, record.task) == ("Add 1.", "easy", "code")
    plain = lcb_row(private_test_cases=lcb_row()["public_test_cases"])  # JSON as it is
    assert answer(livecodebench(plain, **WINDOW)) == ("stdin", "", [("1\n", "2\n")] * 2)


@pytest.mark.parametrize(
    ("date", "inside"),
    [("2024-07-31", False), ("2024-08-01", True), ("2025-02-01", True), ("2025-02-02", False)],
)
def test_the_window_includes_both_days(date, inside):
    row = lcb_row(contest_date=f"{date}T00:00:00")
    if inside:
        assert livecodebench(row, **WINDOW).metadata["date"] == date
        return
    # Before anything is unpacked: a release has gigabytes of tests.
    with pytest.raises(InvalidRow, match="outside of start and end"):
        livecodebench(row | {"private_test_cases": "unreadable"}, **WINDOW)
    with pytest.raises(UserError, match="8/1/24"):
        livecodebench(row, **WINDOW | {"start": "8/1/24"})


@pytest.mark.parametrize("date", [None, "", "soon", 7, float("nan"), "8/1/24"])
def test_a_row_without_a_date_is_dropped(date):
    with pytest.raises(InvalidRow):
        livecodebench(lcb_row(contest_date=date), **WINDOW)


@pytest.mark.parametrize(
    ("private", "reason"),
    [
        ("no base64!", "can't be unpacked"),
        (base64.b64encode(b"no zlib").decode(), "can't be unpacked"),
        (packed(["a list"]), "can't be unpacked"),
        (packed("no json"), "not JSON"),
        (packed('{"a": 1}'), "unknown shape"),
        (base64.b64encode(zlib.compress(b"x" * 5000)[:-6]).decode(), "cut off"),
    ],
)
def test_unreadable_private_tests_are_dropped_by_reason(private, reason):
    with pytest.raises(InvalidRow, match=reason):
        livecodebench(lcb_row(private_test_cases=private), **WINDOW)


def test_tests_that_unpack_to_too_much_are_dropped(monkeypatch):
    monkeypatch.setattr(programs, "MAX_TESTS_BYTES", 1000)
    with pytest.raises(InvalidRow, match="too many"):
        livecodebench(lcb_row(private_test_cases=packed(" " * 10**6)), **WINDOW)


# Pickles


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4, 5])
@pytest.mark.parametrize("text", ["", "ab", "ä" * 200, "x" * 70_000, "x" * 65_535 + "€"])
def test_a_pickled_text_is_read(protocol, text):
    assert unpickle_text(pickle.dumps(text, protocol)) == text


def test_the_samples_pack_tests_as_the_release_does():
    text = json.dumps([1, "ä"])
    assert unpickle_text(zlib.decompress(base64.b64decode(packed(text)))) == text


class Evil:
    """Makes a directory when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4, 5])
def test_nothing_is_executed(protocol, tmp_path):
    evil = Evil(tmp_path / "executed")
    for value in (evil, ("a", evil), {"a": evil}):
        with pytest.raises(InvalidRow):
            unpickle_text(pickle.dumps(value, protocol))
    assert not evil.path.exists()
    pickle.loads(pickle.dumps(evil, protocol))  # the pickle does work elsewhere
    assert evil.path.exists()


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4, 5])
def test_only_a_whole_text_is_read(protocol):
    values = (["a"], ("a",), {"a": "b"}, b"a", 7, None, InvalidRow, str, print)
    good = pickle.dumps("some text", protocol)
    damaged = (b"", good[:-1], good[:9], good[:-1] + b"R.", b"\x80\x04\x8c\x01\xff.")
    for bad in (*(pickle.dumps(value, protocol) for value in values), *damaged):
        with pytest.raises(InvalidRow):
            unpickle_text(bad)
