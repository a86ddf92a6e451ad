"""Tests of programs in the shapes of every release, and the reader that lets no pickle run."""

import base64
import json
import pickle
import zlib

import pytest

from oapl_jax.data.public import programs
from oapl_jax.data.public.cells import Unfit
from oapl_jax.data.public.programs import (
    deepcoder,
    livecodebench,
    normal_tests,
    pickled_text,
    shortened,
)
from oapl_jax.data.samples import packed
from oapl_jax.errors import UserError

STDIN = [("1 2\n", "3\n"), ("4 5\n", "9\n")]


def stdin(**more):
    return [{"input": a, "output": b, **more} for a, b in STDIN]


def answer(record):
    """The tests, in the form that the verifier of programs takes."""
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
def test_every_shape_of_tests(tests, name, expected):
    for given in (tests, json.dumps(tests)):
        found = normal_tests(given, name)
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
def test_tests_that_can_not_be_used_have_a_reason(tests, name, reason):
    with pytest.raises(Unfit, match=reason):
        normal_tests(tests, name)


def test_the_longest_tests_stay_in_their_order():
    tests = [("1", "a"), ("333", "b"), ("22", "c"), ("333", "d")]
    assert shortened(tests, 0) == tests
    assert shortened(tests, 9) == tests
    assert shortened(tests, 2) == [tests[1], tests[3]]
    assert shortened(tests, 3) == tests[1:]


# DeepCoder


def test_a_deepcoder_problem_from_stdin():
    row = {"problem": " Add them. ", "tests": json.dumps(stdin(type="stdin_stdout"))}
    record = deepcoder(row, max_tests=1)
    assert record.question == "Add them."
    assert answer(record) == ("stdin", "", STDIN[:1])
    assert record.task == "code"
    assert len(record.id) == 16


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


@pytest.mark.parametrize("metadata", [None, "", {"func_name": None}])
def test_a_deepcoder_row_of_stdin_has_empty_columns(metadata):
    row = {"problem": "P", "tests": stdin(testtype="stdin"), "starter_code": ""}
    assert deepcoder(row | {"metadata": metadata}, max_tests=0).question == "P"


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


def test_private_tests_may_be_json():
    row = lcb_row()
    assert livecodebench(row | {"private_test_cases": row["public_test_cases"]}, **WINDOW)


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
        with pytest.raises(Unfit, match="outside of start and end"):
            livecodebench(row | {"private_test_cases": "unreadable"}, **WINDOW)


def test_a_window_that_is_no_date():
    with pytest.raises(UserError, match=r"'8/1/24' is not a date like 2024-08-01"):
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
def test_private_tests_that_can_not_be_read(private, reason):
    with pytest.raises(Unfit, match=reason):
        livecodebench(lcb_row(private_test_cases=private), **WINDOW)


def test_tests_that_unpack_to_too_much(monkeypatch):
    monkeypatch.setattr(programs, "MAX_TESTS_BYTES", 1000)
    with pytest.raises(Unfit, match="too many"):
        livecodebench(lcb_row(private_test_cases=pickled(" " * 10**6)), **WINDOW)


# Pickles


@pytest.mark.parametrize("protocol", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("text", ["", "ab", "ä" * 200, "x" * 70_000, "x" * 65_535 + "€"])
def test_a_pickled_text_is_read_whatever_the_protocol_and_the_length(protocol, text):
    assert pickled_text(pickle.dumps(text, protocol)) == text


def test_the_samples_are_what_pickle_itself_reads():
    text = json.dumps([1, "ä"])
    data = zlib.decompress(base64.b64decode(packed(text)))
    assert pickle.loads(data) == text == pickled_text(data)


class Evil:
    def __reduce__(self):
        return exec, ("raise SystemError('it ran')",)


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4, 5])
@pytest.mark.parametrize(
    "value", [Evil(), ["a"], ("a",), {"a": "b"}, b"a", 7, None, Unfit, ("a", Evil())]
)
def test_nothing_but_a_text_is_read(protocol, value):
    with pytest.raises(ValueError, match="pickle"):
        pickled_text(pickle.dumps(value, protocol))


@pytest.mark.parametrize("protocol", [2, 4])
def test_a_pickle_that_was_tampered_with(protocol):
    good = pickle.dumps("some text", protocol)
    for bad in (b"", good[:-1], good[:9], good + b".", good + good, good[:-1] + b"R."):
        with pytest.raises(ValueError, match="pickle"):
            pickled_text(bad)
    with pytest.raises(ValueError, match="pickle"):  # a second text
        pickled_text(good[:-1] + b"\x8c\x01a.")
    with pytest.raises(UnicodeDecodeError):
        pickled_text(b"\x80\x04\x8c\x01\xff.")
