"""Tests of programs in the format of every release, and pickles, which are never executed."""

import base64
import json
import os
import pickle
import zlib

import pytest

from oapl_jax.data.public import programs
from oapl_jax.data.public.programs import (
    deepcoder,
    livecodebench,
    longest_tests,
    parse_tests,
    unpickle_text,
)
from oapl_jax.data.public.tables import InvalidRow
from oapl_jax.data.samples import packed
from oapl_jax.errors import UserError

STDIN = [("1 2\n", "3\n"), ("4 5\n", "9\n")]


def stdin(**more):
    return [{"input": a, "output": b, **more} for a, b in STDIN]


def answer(record):
    """The tests, in the format of the verifier of programs."""
    tests = json.loads(record.answer)
    assert tests.keys() == {"kind", "name", "tests"}
    for pair in tests["tests"]:
        assert [type(part) for part in pair] == [str, str]
        if tests["kind"] == "call":  # JSON, an argument a line
            assert [json.loads(line) for line in (*pair[0].split("\n"), pair[1])]
    return tests["kind"], tests["name"], [tuple(pair) for pair in tests["tests"]]


@pytest.mark.parametrize(
    ("tests", "name", "expected"),
    [
        (stdin(type="stdin_stdout"), "", ("stdin", "", STDIN)),
        (stdin(type="stdin_stdout", fn_name=None), "", ("stdin", "", STDIN)),
        (stdin(testtype="stdin"), "", ("stdin", "", STDIN)),
        (stdin(testtype="stdin"), "unused", ("stdin", "", STDIN)),
        ({"inputs": [a for a, _ in STDIN], "outputs": [b for _, b in STDIN]}, "", None),
        ({"inputs": [["1 2", ""]], "outputs": [["3", ""]]}, "", ("stdin", "", [("1 2\n", "3\n")])),
        ({"inputs": [5], "outputs": [2.5]}, "", ("stdin", "", [("5", "2.5")])),
        # Calls: arguments are a list here, and a line each in the record.
        (
            [{"type": "function_call", "fn_name": "f", "input": [[1, 2], "a"], "output": [3]}] * 2,
            "",
            ("call", "f", [('[1, 2]\n"a"', "3")] * 2),
        ),
        (
            {"fn_name": "f", "inputs": [[1], [2]], "outputs": [[[5]], [[6, 7]]]},
            "",
            ("call", "f", [("1", "[5]"), ("2", "[6, 7]")]),
        ),
        ({"inputs": [[1]], "outputs": [2]}, "f", ("call", "f", [("1", "2")])),
        # One value that is no list of one: none of them is wrapped.
        (
            {"fn_name": "f", "inputs": [[1], [2], [3]], "outputs": [[1], [], "ä\n"]},
            "",
            ("call", "f", [("1", "[1]"), ("2", "[]"), ("3", '"ä\\n"')]),
        ),
        # LiveCodeBench's own lines stay as they are: a list of one is a list of one.
        (
            [{"testtype": "functional", "input": '[1]\n"b"', "output": "[3]"}],
            "g",
            ("call", "g", [('[1]\n"b"', "[3]")]),
        ),
    ],
)
def test_every_format_of_tests(tests, name, expected):
    for given in (tests, json.dumps(tests)):
        found = parse_tests(given, name)
        assert (found.kind, found.name, list(found.tests)) == (expected or ("stdin", "", STDIN))


@pytest.mark.parametrize(
    ("tests", "name", "reason"),
    [
        ([], "", "no tests"),
        ({"inputs": [], "outputs": []}, "", "no tests"),
        ({"inputs": ["1"], "outputs": []}, "", "more inputs than outputs"),
        ({"inputs": "1", "outputs": "2"}, "", "unknown shape"),
        ("nothing", "", "not JSON"),
        (7, "", "unknown shape"),
        (["1"], "", "unknown shape"),
        ([{"input": "1", "testtype": "stdin"}], "", "without input or output"),
        (stdin(type="stdin_stdout") + stdin(type="function_call"), "f", "several kinds"),
        (stdin(type="special"), "", "unknown one"),
        (stdin(), "", "unknown one"),
        ({"inputs": [{}], "outputs": ["1"]}, "", "not text"),
        ({"inputs": ["1"], "outputs": [None]}, "", "not text"),
        ({"inputs": ["1"], "outputs": [True]}, "", "not text"),
        ([{"type": "function_call", "input": [1], "output": 2}], "", "no name of the function"),
        ([{"type": "function_call", "input": [1], "output": 2}], "a.b", "no name of the function"),
        ({"fn_name": "f", "inputs": ["1"], "outputs": ["2"]}, "", "arguments of a call"),
        ({"fn_name": "f", "inputs": [[]], "outputs": ["2"]}, "", "arguments of a call"),
        ([{"testtype": "functional", "input": "x", "output": "1"}], "f", "not JSON"),
        ([{"testtype": "functional", "input": [1], "output": "1"}], "f", "not text"),
    ],
)
def test_unusable_tests_are_dropped_by_reason(tests, name, reason):
    with pytest.raises(InvalidRow, match=reason):
        parse_tests(tests, name)


def test_the_longest_tests_keep_their_order():
    tests = [("1", "a"), ("333", "b"), ("22", "c"), ("333", "d")]
    assert longest_tests(tests, 0) == tests
    assert longest_tests(tests, 9) == tests
    assert longest_tests(tests, 2) == [tests[1], tests[3]]
    assert longest_tests(tests, 3) == tests[1:]


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
    assert record.question == (
        "P\n\nStarter code:\n\n```python\nclass Solution:\n    def add(self, x):\n```"
    )
    assert answer(record) == ("call", "add", [("1", "2")])


def test_a_function_that_the_problem_does_not_name_is_named():
    tests = json.dumps({"fn_name": "add_up", "inputs": [[1]], "outputs": [[1]]})
    silent = deepcoder({"problem": "Add.", "tests": tests}, max_tests=0)
    named = deepcoder({"problem": "Write add_up.", "tests": tests}, max_tests=0)
    assert silent.question == "Add.\n\nThe solution is a function named `add_up`."
    assert named.question == "Write add_up."


# LiveCodeBench


def lcb_row(**changes):
    public = [{"input": "1\n", "output": "2\n", "testtype": "stdin"}]
    private = [{"input": "5\n", "output": "6\n", "testtype": "stdin"}]
    row = {
        "question_content": "Add 1.",
        "platform": "atcoder",
        "question_id": "abc_a",
        "contest_date": "2024-08-10T00:00:00",
        "starter_code": "",
        "difficulty": "easy",
        "public_test_cases": json.dumps(public),
        "private_test_cases": pickled(json.dumps(private)),
        "metadata": "{}",
    }
    return row | changes


def pickled(value, protocol=4):
    return base64.b64encode(zlib.compress(pickle.dumps(value, protocol))).decode()


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
    else:
        # Before anything is unpacked: a release has gigabytes of tests.
        with pytest.raises(InvalidRow, match="outside of start and end"):
            livecodebench(row | {"private_test_cases": "unreadable"}, **WINDOW)


def test_rejects_a_window_that_is_no_date():
    with pytest.raises(UserError, match="8/1/24"):
        livecodebench(lcb_row(), start="8/1/24", end="2025-02-01", max_tests=0)


@pytest.mark.parametrize(
    ("private", "reason"),
    [
        ("no base64!", "can't be unpacked"),
        (base64.b64encode(b"no zlib").decode(), "can't be unpacked"),
        (pickled(["a list"]), "can't be unpacked"),
        (pickled("no json"), "not JSON"),
        (pickled('{"a": 1}'), "unknown shape"),
        (base64.b64encode(zlib.compress(b"x" * 5000)[:-6]).decode(), "cut off"),
    ],
)
def test_unreadable_private_tests_are_dropped_by_reason(private, reason):
    with pytest.raises(InvalidRow, match=reason):
        livecodebench(lcb_row(private_test_cases=private), **WINDOW)


def test_tests_that_unpack_to_too_much_are_dropped(monkeypatch):
    monkeypatch.setattr(programs, "MAX_TESTS_BYTES", 1000)
    with pytest.raises(InvalidRow, match="too many"):
        livecodebench(lcb_row(private_test_cases=pickled(" " * 10**6)), **WINDOW)


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


@pytest.mark.parametrize(
    "value", [["a"], ("a",), {"a": "b"}, b"a", 7, None, InvalidRow, str, print]
)
def test_only_a_text_is_read(value):
    for protocol in range(6):
        with pytest.raises(InvalidRow):
            unpickle_text(pickle.dumps(value, protocol))


@pytest.mark.parametrize("protocol", [2, 4])
def test_a_damaged_pickle_is_dropped(protocol):
    good = pickle.dumps("some text", protocol)
    for bad in (b"", good[:-1], good[:9], good[:-1] + b"R.", b"\x80\x04\x8c\x01\xff."):
        with pytest.raises(InvalidRow):
            unpickle_text(bad)
