"""Rewards of programs: the right get 1; the wrong and the hostile get 0 and leave nothing."""

import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from pathlib import Path

import pytest
from hostile import (
    ANSWER,
    CALLS,
    ENDLESS,
    HARMLESS,
    HEAD,
    MARK,
    PAY,
    PROCESSES,
    RESOURCES,
    SIGHT,
    SOURCES,
)

from oapl_jax.errors import RunError, UserError
from oapl_jax.rewards.code import programs, sandbox
from oapl_jax.rewards.code.launch import Limits
from oapl_jax.rewards.code.problems import (
    Problem,
    choose_tests,
    extract,
    parse_problem,
    same_output,
    same_value,
)
from oapl_jax.rewards.code.programs import Programs, Verdict

SETTINGS = dict(
    isolation="auto",
    allow_unsafe=False,
    parallel=2,
    seconds_per_test=30.0,
    memory_bytes=1 << 30,
    processes=8,
    output_bytes=1 << 20,
    temporary_bytes=1 << 24,
    max_tests=0,
    thinking_opened=False,
    packages=(),
    start_seconds=60.0,
    cache_entries=100,
)
LIMITS = Limits(**{name: SETTINGS[name] for name in Limits.__dataclass_fields__})
WAYS = sandbox.available(LIMITS, packages=(), start_seconds=60)
assert WAYS, sandbox.hole("namespaces", LIMITS, packages=(), start_seconds=60)
REPOSITORY = Path(__file__).parents[2]
SQUARES = Problem("stdin", "", (("2\n", "4\n"), ("3\n", "9\n"), ("-4\n", "16\n")))
SQUARE = "print(int(input()) ** 2)"


def respond(code):
    return f"First I thought.\n```python\n{code}\n```\nThat is it."


@pytest.fixture(scope="module", params=WAYS)
def graders(request):
    """A patient one, and one for programs that only the clock ends."""
    patient = Programs(**SETTINGS | dict(isolation=request.param))
    hasty = Programs(**SETTINGS | dict(isolation=request.param, seconds_per_test=1.0))
    yield patient, hasty
    for grader in (patient, hasty):
        grader.close()


@pytest.fixture(scope="module", params=WAYS)
def grader(request):
    made = Programs(**SETTINGS | dict(isolation=request.param))
    yield made
    made.close()


# Hostile programs


KEPT = set()  # processes that these tests keep for themselves, or that other files' tests keep


@pytest.fixture(scope="module", autouse=True)
def of_other_files():
    """Servers, say, which all files share that are tested in this process."""
    KEPT.update(children())


def children():
    """The processes that this one has started and not yet seen end."""
    lists = [path.read_text().split() for path in Path("/proc/self/task").glob("*/children")]
    return {int(pid) for pids in lists for pid in pids}


def left_over():
    """What hostile programs, or sandboxes, of this process left, and that is there for seconds.

    The name of a process that was killed stays in /proc until its parent has asked for it.
    """
    deadline = time.monotonic() + 5
    while (found := left_now()) and time.monotonic() < deadline:
        time.sleep(0.1)
    return found


def left_now():
    """Processes and files."""
    found = [str(pid) for pid in sorted(children() - KEPT)]
    for path in Path("/proc").glob("[0-9]*/task/*/comm"):
        try:
            if path.read_text().strip() == MARK:
                found.append(str(path))
        except OSError:  # it has ended
            pass
    places = ["/", "/tmp", "/var/tmp", "/dev", "/dev/shm", "/usr/lib", Path.home(), REPOSITORY]
    places += [tempfile.gettempdir(), Path.cwd(), sys.base_prefix, f"{sys.base_prefix}/lib"]
    for place in places:
        found += [str(path) for path in Path(place).glob(f"*{MARK}*")]
    return found


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    """What hostile programs are told to reach for."""
    abstract = f"{MARK}-{secrets.token_hex(8)}"
    with socket.create_server(("127.0.0.1", 0)) as inet, socket.socket(socket.AF_UNIX) as unix:
        unix.bind(f"\0{abstract}")
        unix.listen()
        # Its environment and command line are what a program might read.
        secret, word = secrets.token_hex(16), secrets.token_hex(16)
        sleeper = subprocess.Popen(
            [sys.executable, "-c", "import time; time.sleep(3600)", word],
            env=os.environ | {"SECRET": secret},
        )
        KEPT.add(sleeper.pid)
        try:
            yield {
                "port": inet.getsockname()[1],
                "abstract": abstract,
                "pid": sleeper.pid,
                "secret": secret,
                "word": word,
                "repository": str(REPOSITORY),
                "file": str(REPOSITORY / "setup.py"),
                "scratch": str(tmp_path_factory.mktemp("scratch")),
                "listeners": (inet, unix),
            }
            assert sleeper.poll() is None
        finally:
            sleeper.kill()
            sleeper.wait()


def connections(listeners):
    made = 0
    for listener in listeners:
        listener.setblocking(False)
        try:
            listener.accept()[0].close()
            made += 1
        except BlockingIOError:
            pass
    return made


def inputs(told):
    return json.dumps({name: value for name, value in told.items() if name != "listeners"}) + "\n"


ATTACKS = PROCESSES | RESOURCES | SIGHT


@pytest.mark.parametrize("name", ATTACKS)
def test_a_hostile_program_gets_nothing_and_leaves_nothing(graders, told, name):
    patient, hasty = graders
    tests = Problem("stdin", "", ((inputs(told), ANSWER),))
    verdict = (hasty if name in ENDLESS else patient).grade(respond(HEAD + ATTACKS[name]), tests)
    assert verdict.reward == 0.0
    # A wall, and not slowness, stopped the others.
    assert (verdict.outcome == "timeout") == (name in ENDLESS)
    assert verdict.test == 0
    assert connections(told["listeners"]) == 0
    assert left_over() == []


@pytest.mark.parametrize("name", HARMLESS)
def test_without_walls_it_would_succeed(told, name):
    """So that the test before can fail."""
    code = HEAD + ATTACKS[name]
    with subprocess.Popen(
        [sys.executable, "-c", code],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env=os.environ | {"HOME": "/"},
    ) as process:
        said, _ = process.communicate(inputs(told), timeout=60)
    assert said.strip() == ANSWER
    connections(told["listeners"])  # those of this program


@pytest.mark.parametrize("name", PAY)
def test_no_program_is_paid_for_what_it_does_not_know(graders, told, name):
    tests = tuple((inputs(told), f"answer-{secrets.token_hex(16)}\n") for _ in range(2))
    verdict = graders[0].grade(respond(HEAD + PAY[name]), Problem("stdin", "", tests))
    assert verdict in (Verdict("failed", 0), Verdict("error", 0))
    assert left_over() == []


@pytest.mark.parametrize("name", CALLS)
def test_no_function_is_paid_for_what_it_does_not_return(graders, name):
    answer = json.dumps(f"answer-{secrets.token_hex(16)}")
    problem = Problem("call", "answer", (("1", answer),) * 2)
    verdict = graders[0].grade(respond(CALLS[name]), problem)
    assert verdict in (Verdict("failed", 0), Verdict("error", 0))
    assert left_over() == []


@pytest.mark.parametrize("name", SOURCES)
def test_a_source_text_can_do_no_harm(graders, name):
    problem = Problem("stdin", "", (("", ANSWER),))
    verdict = graders[1].grade(respond(SOURCES[name]), problem)
    assert verdict.outcome in ("error", "timeout")
    assert left_over() == []


def test_what_is_left_would_be_found(graders, tmp_path, monkeypatch):
    way = graders[0].isolation
    with sandbox.Sandbox(way, LIMITS, packages=(), start_seconds=60) as box:
        box.load(kind="stdin", name="", code=HEAD + "time.sleep(600)")
        box._write(b"{}", time.monotonic() + 10)
        deadline = time.monotonic() + 30
        while not any("comm" in thing for thing in left_over()):
            assert time.monotonic() < deadline
            time.sleep(0.02)
        assert len(left_over()) >= 2  # the child of this process, and the program
    monkeypatch.chdir(tmp_path)
    (tmp_path / f"{MARK}-7").touch()
    assert left_over() == [str(tmp_path / f"{MARK}-7")]


def test_tests_of_one_program_see_nothing_of_each_other(grader):
    code = """
import os
if os.path.exists("/tmp/seen"):
    print("second")
else:
    open("/tmp/seen", "w").close()
    print("first")
"""
    tests = Problem("stdin", "", (("", "first"), ("", "second")))
    assert grader.grade(respond(code), tests) == Verdict("failed", 1)


# Right and wrong programs


def test_right_programs_pass(grader):
    assert grader.grade(respond(SQUARE), SQUARES) == Verdict("passed")
    assert Verdict("passed").reward == 1.0
    assert [Verdict(name).reward for name in ("failed", "timeout", "error", "no_code")] == [0.0] * 4


@pytest.mark.parametrize(
    ("code", "verdict"),
    [
        ("print(int(input()) * 2)", Verdict("failed", 1)),
        ("n = int(input())\nprint(n * n if n > 0 else '')", Verdict("failed", 2)),
        ("n = int(input())\nprint(n * n)\nassert n != 3", Verdict("error", 1)),
        ("n = int(input())\nprint(n * n)\nimport os\nif n == 3: os._exit(1)", Verdict("error", 1)),
        ("print(int(input() + input()))", Verdict("error", 0)),
        ("print(4, end='')\nimport sys\nsys.exit('done')", Verdict("failed", 1)),
        ("nothing", Verdict("error", 0)),
    ],
)
def test_wrong_programs_stop_where_they_are_wrong(grader, code, verdict):
    assert grader.grade(respond(code), SQUARES) == verdict


def test_a_response_without_a_program(grader):
    before = grader.counts().get("no_code", 0)
    assert grader.grade("The answer is 4.", SQUARES) == Verdict("no_code")
    assert grader.counts()["no_code"] == before + 1


def test_the_shapes_of_deepcoder_and_livecodebench(grader):
    """Problems as those data sets have them: stdin, a function, and a method of Solution."""
    read = "for _ in range(int(input())):\n    print(sum(map(int, input().split())))"
    stdin = Problem("stdin", "", (("2\n1 2\n3 4\n", "3\n7"), ("1\n5 5", "10 \n\n")))
    assert grader.grade(respond(read), stdin).reward == 1
    function = "def pairs(n):\n    return [(i, i + 1) for i in range(n)]"
    answers = (("2", "[[0, 1], [1, 2]]"), ("0", "[]"))
    assert grader.grade(respond(function), Problem("call", "pairs", answers)).reward == 1
    method = """
class Solution:
    def merge(self, words: List[str], weights: Dict[str, float]) -> Optional[str]:
        return max(words, key=lambda word: weights[word], default=None)
"""
    answers = (('["a", "b"]\n{"a": 1, "b": 2.5}', '"b"'), ("[]\n{}", "null"))
    assert grader.grade(respond(method), Problem("call", "merge", answers)).reward == 1


def test_verdicts_of_many_threads_are_those_of_one(grader):
    wanted = [Verdict("passed"), Verdict("failed", 1), Verdict("error", 0), Verdict("no_code")]
    codes = [SQUARE, "print(int(input()) * 2)", "boom"]
    cases = [(respond(f"{code}\n# {i}"), SQUARES) for i in range(6) for code in codes]
    cases += [("nothing", SQUARES)]
    found = grader.grade_all(cases)
    assert found == wanted[:3] * 6 + wanted[3:]
    assert left_over() == []


def test_programs_run_side_by_side(monkeypatch):
    grader = Programs(**SETTINGS)
    both = threading.Barrier(2, timeout=60)
    run = grader._run
    monkeypatch.setattr(grader, "_run", lambda *a: (both.wait(), run(*a))[1])
    pair = [(respond(SQUARE), SQUARES), (respond(SQUARE + " "), SQUARES)]
    pair[1] = (respond(f"{SQUARE}\n#"), SQUARES)
    assert grader.grade_all(pair) == [Verdict("passed")] * 2
    grader.close()


# Counts, cache, settings


def test_it_stops_at_the_first_failure_and_counts():
    grader = Programs(**SETTINGS | dict(max_tests=2))
    grader.grade(respond(SQUARE), SQUARES)
    grader.grade(respond("print(4)"), SQUARES)
    grader.grade("no program", SQUARES)
    # Of the three tests the two with the longest inputs: "-4", and the first of the others.
    assert grader.counts() == {
        "passed": 1,
        "failed": 1,
        "no_code": 1,
        "tests": 2 + 2,
        "left_out": 2,
    }
    grader.close()


def test_content_is_graded_once():
    grader = Programs(**SETTINGS | dict(cache_entries=2))
    other = Problem("stdin", "", (("2", "5"),))
    first = grader.grade(respond(SQUARE), SQUARES)
    assert grader.grade("Other words.\n```\n" + SQUARE + "\n```", SQUARES) == first
    assert grader.counts() == {"passed": 2, "tests": 3, "left_out": 0, "cached": 1}
    assert grader.grade(respond(SQUARE), other) == Verdict("failed", 0)  # other tests
    assert grader.counts()["cached"] == 1
    grader.grade(respond(SQUARE), SQUARES)  # now the one asked for last
    grader.grade(respond("print(1)"), SQUARES)  # pushes `other` out
    assert grader.counts()["cached"] == 2
    grader.grade(respond(SQUARE), SQUARES)
    assert grader.counts()["cached"] == 3
    grader.grade(respond(SQUARE), other)
    assert grader.counts()["cached"] == 3
    grader.close()


def test_a_timeout_is_not_remembered():
    grader = Programs(**SETTINGS | dict(seconds_per_test=0.5))
    for _ in range(2):
        assert grader.grade(respond("while True: pass"), SQUARES) == Verdict("timeout", 0)
    assert "cached" not in grader.counts()
    grader.close()


def test_processor_time_counts_as_time():
    grader = Programs(**SETTINGS | dict(seconds_per_test=300.0))
    code = "import os, signal\nos.kill(os.getpid(), signal.SIGXCPU)"
    assert grader.grade(respond(code), SQUARES) == Verdict("timeout", 0)
    grader.close()


def test_a_machine_that_cannot_isolate_is_refused(monkeypatch, tmp_path):
    command = sandbox.command
    broken = lambda way, *rest: command(way, *rest) if way == "none" else ["/bin/false"]
    monkeypatch.setattr(sandbox, "command", broken)
    with pytest.raises(UserError, match=r"bubblewrap: .*; namespaces: .*allow_unsafe=True"):
        Programs(**SETTINGS)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with pytest.warns(UserWarning, match="can't be isolated") as told:
        grader = Programs(**SETTINGS | dict(allow_unsafe=True, seconds_per_test=5.0))
    assert len(told) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert grader.isolation == "none"
        assert grader.grade(respond(SQUARE), SQUARES) == Verdict("passed")
        assert grader.grade(respond("print(3)"), SQUARES) == Verdict("failed", 0)
        for name in ("fork bomb", "ten gigabytes", "the network", "sleep for ever"):
            tests = Problem("stdin", "", (("{}", ANSWER),))
            verdict = grader.grade(respond(HEAD + ATTACKS[name]), tests)
            assert verdict.reward == 0
    grader.close()
    deadline = time.monotonic() + 30
    while left_over():  # killed, but the system may yet have to clear them away
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert list(tmp_path.iterdir()) == []


def test_isolation_is_chosen_and_told():
    assert Programs(**SETTINGS).isolation == WAYS[0]
    with pytest.raises(UserError, match="isolation='docker' is not one of auto, bubblewrap, names"):
        Programs(**SETTINGS | dict(isolation="docker"))
    with pytest.raises(UserError, match="package no_such_package"):
        Programs(**SETTINGS | dict(packages=("no_such_package",)))


def test_a_test_that_no_program_could_pass_is_refused():
    grader = Programs(**SETTINGS)
    echo = "x = input()\nprint(x if len(x) < 9 else len(x))"
    room = SETTINGS["temporary_bytes"] - programs.FOLDER_BYTES
    for given, expected in (("x" * room, str(room)), ("x", "x" + " " * (2**20 - 2))):
        fits = Problem("stdin", "", ((given, expected),))
        assert grader.grade(respond(echo), fits) == Verdict("passed")
    large = Problem("stdin", "", (("x" * (room + 1), ""),))
    with pytest.raises(UserError, match=f"temporary_bytes={2**24} .* raise it to {2**24 + 1}"):
        grader.grade(respond(echo), large)
    with pytest.raises(UserError, match=f"output_bytes={2**20} .* raise it to {2**20 + 1}"):
        grader.grade(respond(echo), Problem("stdin", "", (("", "x" * 2**20),)))
    grader.close()


def test_a_sandbox_that_fails_is_no_wrong_answer(monkeypatch):
    grader = Programs(**SETTINGS)
    monkeypatch.setattr(sandbox, "command", lambda *_: ["/bin/false"])
    with pytest.raises(RunError, match=f"{grader.isolation}"):
        grader.grade(respond(SQUARE), SQUARES)
    assert grader.counts() == {}
    grader.close()


# Pure functions


@pytest.mark.parametrize(
    ("response", "opened", "code"),
    [
        ("```python\nx\n```", False, "x"),
        ("```\nx\n```", False, "x"),
        ("```py\nold\n```\nno:\n```python3\nnew\ny\n```\nbye", False, "new\ny"),
        ("<think>\n```python\nold\n```\n</think>\n```python\nnew\n```", False, "new"),
        ("```python\nold\n```\n</think>\n```python\nnew\n```", True, "new"),
        ("```python\nold\n```\n</think>\nno code", True, None),
        ("```python\nold\n```", True, None),
        ("<think>\n```python\nold\n```", False, None),
        ("</think><think>\n```python\nold\n```", True, None),
        ("```python\nnever closed", False, None),
        ("`x`", False, None),
        ("", False, None),
        ("```python\n```", False, ""),
    ],
)
def test_the_last_block_behind_the_thinking_part(response, opened, code):
    assert extract(response, thinking_opened=opened) == code


def test_extraction_is_linear():
    for text in ("```" * 300_000, "```python\n" * 100_000, "```" + "x" * 1_000_000, "``" * 10**6):
        start = time.process_time()
        extract(text, thinking_opened=False)
        assert time.process_time() - start < 10  # of processor time; a square of it takes hours


@pytest.mark.parametrize(
    ("printed", "expected", "same"),
    [
        ("3\n", "3", True),
        ("  1 2 \n\t3\n\n", "1 2\n3", True),
        ("1\r\n2\r\n", "1\n2", True),
        ("1  2", "1 2", True),  # the same numbers
        ("a  b", "a b", False),
        ("1 2\n3", "1 2 3", False),
        ("1\n\n2", "1\n2", False),
        ("1.50", "1.5", True),
        ("1e3", "1000", True),
        ("-0", "0", True),
        ("0.1", "0.10000000000000001", False),  # no tolerance
        ("50000000000000000", "50000000000000001", False),
        ("1 2", "1 2 3", False),
        ("Yes", "YES", False),
        ("Yes", "Yes", True),
        ("nan", "NaN", False),
        ("nan", "nan", True),
        ("sNaN 1", "1 1", False),
        ("", "", True),
        ("", "0", False),
        ("x 1.0", "x 1", False),
        ("ä", "ä", True),
    ],
)
def test_outputs_agree_as_in_livecodebench(printed, expected, same):
    assert same_output(printed, expected) is same


@pytest.mark.parametrize(
    ("returned", "expected", "same"),
    [
        ("[1, 2]", "[1,2]", True),
        ("1.0", "1", True),
        ("true", "1", True),  # Python's equality, which the benchmark uses
        ("1", '"1"', False),
        ("[[1]]", "[1]", False),
        ("null", "null", True),
        ("null", "false", False),
        ('{"a": 1, "b": 2}', '{"b": 2, "a": 1}', True),
        ("0.30000000000000004", "0.3", False),
        ("NaN", "NaN", False),
        ("", "null", False),
        ("1 2", "1", False),
        ("[" * 100_000, "1", False),
        ("1" * 5000, "1", False),
    ],
)
def test_values_agree_as_in_livecodebench(returned, expected, same):
    assert same_value(returned, expected) is same


def test_tests_are_read():
    stdin = {"kind": "stdin", "name": "", "tests": [["1\n", "2\n"], ["", "x"]]}
    assert parse_problem(json.dumps(stdin)) == Problem("stdin", "", (("1\n", "2\n"), ("", "x")))
    call = {"kind": "call", "name": "f", "tests": [['[1]\n"a"', "null"]]}
    assert parse_problem(json.dumps(call)) == Problem("call", "f", (('[1]\n"a"', "null"),))


@pytest.mark.parametrize(
    ("answer", "what"),
    [
        ("42, 43", "not JSON"),
        ("42", "not an object"),
        ({"kind": "stdin", "tests": [["", ""]]}, "not an object"),
        ({"kind": "file", "name": "", "tests": [["", ""]]}, "kind 'file'"),
        ({"kind": "stdin", "name": "f", "tests": [["", ""]]}, "name 'f' does not fit kind stdin"),
        ({"kind": "call", "name": "f()", "tests": [["1", "1"]]}, "name 'f\\(\\)' does not fit"),
        ({"kind": "call", "name": "", "tests": [["1", "1"]]}, "name '' does not fit"),
        ({"kind": "stdin", "name": "", "tests": []}, "there are none"),
        ({"kind": "stdin", "name": "", "tests": "ab"}, "there are none"),
        ({"kind": "stdin", "name": "", "tests": [["1", "1"], ["1"]]}, "test 1 is not a pair"),
        ({"kind": "stdin", "name": "", "tests": [["1", 1]]}, "test 0 is not a pair"),
        ({"kind": "call", "name": "f", "tests": [["1\n", "1"]]}, "test 0 is not one JSON value"),
        ({"kind": "call", "name": "f", "tests": [["1", "x"]]}, "test 0 is not one JSON value"),
    ],
)
def test_tests_that_are_none_are_refused(answer, what):
    with pytest.raises(UserError, match=what):
        parse_problem(answer if isinstance(answer, str) else json.dumps(answer))


def test_the_longest_inputs_are_chosen_in_order():
    tests = Problem("stdin", "", tuple((text, "") for text in ("aa", "a", "aaaa", "aa", "aaa")))
    assert choose_tests(tests, 0) == [0, 1, 2, 3, 4]
    assert choose_tests(tests, 3) == [0, 2, 4]
    assert choose_tests(tests, 9) == [0, 1, 2, 3, 4]


def test_tests_with_other_content_have_other_digests():
    same = Problem("stdin", "", (("a", "b"),))
    assert same.digest == Problem("stdin", "", (("a", "b"),)).digest
    others = [
        ("stdin", "", (("ab", ""),)),
        ("call", "", (("a", "b"),)),
        ("stdin", "a", (("", "b"),)),
    ]
    assert len({same.digest} | {Problem(*other).digest for other in others}) == 4


def test_every_hostile_program_is_in_one_list():
    names = [name for part in (PROCESSES, RESOURCES, SIGHT, PAY, CALLS, SOURCES) for name in part]
    assert len(names) == len(set(names)) >= 70
    assert {*HARMLESS, *ENDLESS} <= {*ATTACKS}
    assert programs.CPU_LIMIT == -signal.SIGXCPU
