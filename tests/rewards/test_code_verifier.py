"""Rewards of programs: the right get 1; the wrong and the hostile get 0 and leave nothing."""

import json
import os
import secrets
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from contextlib import ExitStack, closing
from dataclasses import replace
from pathlib import Path

import hostile
import pytest
from processes import CODE, marked, wait_until

from oapl_jax.data.public.programs import Problem, longest_tests
from oapl_jax.errors import RunError, UserError
from oapl_jax.rewards.code import sandbox, verifier
from oapl_jax.rewards.code.verifier import CodeVerdict, CodeVerifier

REPOSITORY = Path(__file__).parents[2]
SQUARES = Problem("stdin", "", (("2\n", "4\n"), ("3\n", "9\n"), ("-4\n", "16\n")))
SQUARE = "print(int(input()) ** 2)"
ATTACKS = hostile.PROCESSES | hostile.RESOURCES | hostile.SIGHT


def respond(code):
    return f"First I thought.\n```python\n{code}\n```\nThat is it."


def grade(made, response, problem):
    return made.verify_many([(response, problem)])[0]


@pytest.fixture(scope="module")
def patient():
    with closing(CodeVerifier(CODE)) as made:
        yield made


@pytest.fixture(scope="module")
def hasty():
    """For programs that only the clock ends."""
    with closing(CodeVerifier(replace(CODE, seconds_per_test=1.0))) as made:
        yield made


@pytest.fixture
def new_verifier():
    """Makes verifiers with changed settings, and closes them."""
    with ExitStack() as made:
        yield lambda **changes: made.enter_context(closing(CodeVerifier(replace(CODE, **changes))))


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


def left_over(seconds=5):
    """The processes and files of hostile programs, or sandboxes, that are there for seconds.

    The name of a process that was killed stays in /proc until its parent has asked for it.
    """
    deadline = time.monotonic() + seconds
    while (found := left_now()) and time.monotonic() < deadline:
        time.sleep(0.1)
    return found


def left_now():
    found = [str(pid) for pid in sorted(children() - KEPT)] + [f"mark of {p}" for p in marked()]
    places = ["/", "/tmp", "/var/tmp", "/dev", "/dev/shm", "/usr/lib", Path.home(), REPOSITORY]
    places += [tempfile.gettempdir(), Path.cwd(), sys.base_prefix, f"{sys.base_prefix}/lib"]
    for place in places:
        found += [str(path) for path in Path(place).glob(f"*{hostile.MARK}*")]
    return found


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    """The targets that hostile programs are told to reach for."""
    abstract = f"{hostile.MARK}-{secrets.token_hex(8)}"
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
            told = dict(port=inet.getsockname()[1], abstract=abstract, pid=sleeper.pid)
            told |= dict(secret=secret, word=word, scratch=str(tmp_path_factory.mktemp("scratch")))
            told |= dict(repository=str(REPOSITORY), file=str(REPOSITORY / "setup.py"))
            yield told | {"listeners": (inet, unix)}
            assert sleeper.poll() is None
        finally:
            sleeper.kill()
            sleeper.wait()


def connections(listeners):
    """Accepts a connection of each listener that has one; their number."""
    ready, _, _ = select.select(listeners, [], [], 0)
    for listener in ready:
        listener.accept()[0].close()
    return len(ready)


def inputs(told):
    return json.dumps({name: value for name, value in told.items() if name != "listeners"}) + "\n"


@pytest.mark.parametrize("name", ATTACKS)
def test_a_hostile_program_gets_nothing_and_leaves_nothing(patient, hasty, told, name):
    tests = Problem("stdin", "", ((inputs(told), hostile.ANSWER),))
    made = hasty if name in hostile.ENDLESS else patient
    verdict = grade(made, respond(hostile.HEAD + ATTACKS[name]), tests)
    assert verdict.reward == 0.0
    # The isolation, and not slowness, stopped the others.
    assert (verdict.outcome == "timeout") == (name in hostile.ENDLESS)
    assert verdict.test == 0
    assert connections(told["listeners"]) == 0
    assert left_over() == []


@pytest.mark.parametrize("name", hostile.HARMLESS)
def test_without_isolation_it_would_succeed(told, name):
    """So that the test before can fail."""
    code = hostile.HEAD + ATTACKS[name]
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    how = dict(start_new_session=True, env=os.environ | {"HOME": "/"})
    with subprocess.Popen([sys.executable, "-c", code], **pipes, **how) as process:
        said, _ = process.communicate(inputs(told), timeout=60)
    assert said.strip() == hostile.ANSWER
    connections(told["listeners"])  # those of this program


@pytest.mark.parametrize("name", hostile.PAY)
def test_a_program_without_the_answer_gets_no_reward(patient, told, name):
    tests = tuple((inputs(told), f"answer-{secrets.token_hex(16)}\n") for _ in range(2))
    verdict = grade(patient, respond(hostile.HEAD + hostile.PAY[name]), Problem("stdin", "", tests))
    assert verdict in (CodeVerdict("failed", 0), CodeVerdict("error", 0))
    assert left_over() == []


@pytest.mark.parametrize("name", hostile.CALLS)
def test_a_function_that_returns_no_answer_gets_no_reward(patient, name):
    answer = json.dumps(f"answer-{secrets.token_hex(16)}")
    tests = Problem("call", "answer", (("1", answer),) * 2)
    verdict = grade(patient, respond(hostile.CALLS[name]), tests)
    assert verdict in (CodeVerdict("failed", 0), CodeVerdict("error", 0))
    assert left_over() == []


@pytest.mark.parametrize("name", hostile.SOURCES)
def test_a_source_text_can_do_no_harm(hasty, name):
    tests = Problem("stdin", "", (("", hostile.ANSWER),))
    verdict = grade(hasty, respond(hostile.SOURCES[name]), tests)
    assert verdict.outcome in ("error", "timeout")
    assert left_over() == []


def test_left_over_processes_and_files_would_be_found(patient, tmp_path, monkeypatch):
    with closing(sandbox.Sandbox(patient.bwrap, CODE)) as box:
        box.load_program(kind="stdin", name="", code=hostile.HEAD + "time.sleep(600)")
        box.send(b"{}", time.monotonic() + 10)
        wait_until(marked)
        assert len(left_over(seconds=0)) >= 2  # the child of this process, and the program
    monkeypatch.chdir(tmp_path)
    (tmp_path / f"{hostile.MARK}-7").touch()
    wait_until(lambda: left_over(seconds=0) == [str(tmp_path / f"{hostile.MARK}-7")])


# Right and wrong programs


@pytest.mark.parametrize(
    ("code", "outcome", "test"),
    [
        (SQUARE, "passed", None),
        ("print(int(input()) * 2)", "failed", 1),
        ("n = int(input())\nprint(n * n if n > 0 else '')", "failed", 2),
        ("n = int(input())\nprint(n * n)\nassert n != 3", "error", 1),
        ("n = int(input())\nprint(n * n)\nimport os\nif n == 3: os._exit(1)", "error", 1),
        ("print(int(input() + input()))", "error", 0),
        ("print(4, end='')\nimport sys\nsys.exit('done')", "failed", 1),
        ("nothing", "error", 0),
        # the exit code of a program that its CPU limit ended
        ("import os, signal\nos.kill(os.getpid(), signal.SIGXCPU)", "timeout", 0),
    ],
)
def test_programs_stop_where_they_are_wrong(patient, code, outcome, test):
    verdict = grade(patient, respond(code), SQUARES)
    assert verdict == CodeVerdict(outcome, test)
    assert verdict.reward == float(outcome == "passed")


@pytest.mark.parametrize(
    ("code", "name", "tests"),
    [
        (
            "for _ in range(int(input())):\n    print(sum(map(int, input().split())))",
            "",
            (("2\n1 2\n3 4\n", "3\n7"), ("1\n5 5", "10 \n\n")),
        ),
        (
            "def pairs(n):\n    return [(i, i + 1) for i in range(n)]",
            "pairs",
            (("2", "[[0, 1], [1, 2]]"), ("0", "[]")),
        ),
        (
            "class Solution:\n"
            "    def merge(self, words: List[str], weights: Dict[str, float]) -> Optional[str]:\n"
            "        return max(words, key=lambda word: weights[word], default=None)",
            "merge",
            (('["a", "b"]\n{"a": 1, "b": 2.5}', '"b"'), ("[]\n{}", "null")),
        ),
    ],
)
def test_the_shapes_of_deepcoder_and_livecodebench(patient, code, name, tests):
    """Problems as those data sets have them: stdin, a function, and a method of Solution."""
    problem = Problem("call" if name else "stdin", name, tests)
    assert grade(patient, respond(code), problem).reward == 1


BIG = 10**5000  # above the 4,300 digits of Python's default


def one_test(kind, given, expected):
    return Problem(kind, "" if kind == "stdin" else "f", ((given, expected),))


@pytest.mark.parametrize(
    ("code", "problem"),
    [
        ("print(10 ** int(input()))", one_test("stdin", "5000\n", f"{BIG}\n")),
        ("print(int(input()) + 1)", one_test("stdin", f"{BIG}\n", f"{BIG + 1}\n")),
        ("def f(x): return x + 1", one_test("call", f"{BIG}", f"{BIG + 1}")),
        *(
            (f"print(7)\n{end}\nprint(8)", one_test("stdin", "", "7"))
            for end in ("quit()", "exit(1)")
        ),
        ("def main():\n    print(7)\n    quit(3)\nmain()", one_test("stdin", "", "7")),
        # JSON has made text of the integer keys of TACO's dictionaries.
        ("def f(d): return d[1] + d[2]", one_test("taco", '{"1": 2, "2": 3}', "5")),
        ("def f(x, d): return d[-1][x]", one_test("taco", '"1"\n{"-1": {"1": 3}}', "[3]")),
        ("def f(d): return d['1']", one_test("taco", '{"1": 2, "a": 3}', "2")),
        ("def f(d): return {k: v for k, v in d.items()}", one_test("taco", '{"1": 2}', '{"1": 2}')),
        ("def f(d): return d['1']", one_test("call", '{"1": 2}', "2")),
    ],
)
def test_long_integers_early_ends_and_integer_keys_pass(patient, code, problem):
    assert grade(patient, respond(code), problem) == CodeVerdict("passed")


@pytest.mark.parametrize(
    ("body", "kind", "expected", "verdict"),
    [
        *(("return x", kind, ("[1]", "[2]"), CodeVerdict("passed")) for kind in ("taco", "call")),
        ("return x[0]", "taco", ("[1]", "[2]"), CodeVerdict("passed")),
        ("return x[0]", "call", ("[1]", "[2]"), CodeVerdict("failed", 0)),
        ("return x if x == [1] else x[0]", "taco", ("[1]", "[2]"), CodeVerdict("failed", 1)),
        ("return x[0]", "taco", ("[1]", "[2, 2]"), CodeVerdict("failed", 1)),
        ("return [x]", "taco", ("[1]", "[2]"), CodeVerdict("failed", 0)),
    ],
)
def test_a_list_of_one_may_stand_for_its_element_in_all_tests_of_taco(
    patient, body, kind, expected, verdict
):
    problem = Problem(kind, "f", tuple(zip(("[1]", "[2]"), expected, strict=True)))
    assert grade(patient, respond(f"def f(x): {body}"), problem) == verdict


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        *(("np.int64(5)", "5"), ("np.float32(0.5)", "0.5"), ("np.bool_(True)", "true")),
        *((array, "[1, 2]") for array in ("list(np.array([1, 2]))", "np.array([1, 2])")),
        ("(np.array([[1]]), {'a': [np.uint8(2)]})", '[[[1]], {"a": [2]}]'),
        ("Counter(np.array([3, 3]))", '{"3": 2}'),
        *(("np.str_('a')", '"a"'), ("np.array(['a'])", '["a"]')),
    ],
)
def test_values_of_numpy_are_those_of_python(new_verifier, value, expected):
    made = new_verifier(packages=("numpy",))
    code = f"import numpy as np\nclass Solution:\n    def f(self, x): return {value}"
    wrong = one_test("call", "1", '[[1], "7"]')
    right = one_test("call", "1", expected)
    assert made.verify_many([(respond(code), right), (respond(code), wrong)]) == [
        CodeVerdict("passed"),
        CodeVerdict("failed", 0),
    ]


@pytest.mark.parametrize(
    ("code", "prelude", "packages", "outcome"),
    [
        ("print(int(np.array([3, 4]).sum()))", "oapl", ("numpy",), "passed"),
        ("print(int(np.array([3, 4]).sum()))", "oapl", (), "error"),
        ("print(int(np.array([3, 4]).sum()))", "livecodebench", ("numpy",), "error"),
        ("print(len(os.sep) + len(io.StringIO('123456').read()))", "oapl", (), "passed"),
        ("print(len(os.sep) + 6)", "livecodebench", (), "error"),
        ("print(Counter('aaaaaaa')['a'] if isqrt(4) else List)", "oapl", (), "passed"),
        ("print(Counter('aaaaaaa')['a'] if isqrt(4) else List)", "livecodebench", (), "passed"),
    ],
)
def test_the_prelude_is_a_choice(new_verifier, code, prelude, packages, outcome):
    made = new_verifier(prelude=prelude, packages=packages)
    assert grade(made, respond(code), one_test("stdin", "", "7")).outcome == outcome


def test_verdicts_of_many_threads_are_those_of_one(patient):
    wanted = [CodeVerdict("passed"), CodeVerdict("failed", 1), CodeVerdict("error", 0)]
    codes = [SQUARE, "print(int(input()) * 2)", "boom"]
    cases = [(respond(f"{code}\n# {i}"), SQUARES) for i in range(6) for code in codes]
    found = patient.verify_many([*cases, ("nothing", SQUARES)])
    assert found == [*wanted * 6, CodeVerdict("no_code")]
    assert left_over() == []


def test_programs_run_side_by_side(patient, monkeypatch):
    both = threading.Barrier(2, timeout=60)
    choose = lambda *arguments: (both.wait(), longest_tests(*arguments))[1]
    monkeypatch.setattr(verifier, "longest_tests", choose)  # of a worker thread, before it runs any
    pair = [(respond(f"{SQUARE}\n# beside {i}"), SQUARES) for i in range(2)]
    assert patient.verify_many(pair) == [CodeVerdict("passed")] * 2


# Counts, cache, settings


def test_it_stops_at_the_first_failure_and_counts(new_verifier):
    made = new_verifier(max_tests=2)
    for response in (respond(SQUARE), respond("print(4)")):
        grade(made, response, SQUARES)
    none = grade(made, "The answer is 4.", SQUARES)
    assert (none, none.reward) == (CodeVerdict("no_code"), 0.0)
    # Of the three tests the two with the longest inputs: "-4", and the first of the others.
    counts = {"passed": 1, "failed": 1, "no_code": 1, "tests": 2 + 2, "dropped": 2}
    assert made.counts() == counts


def test_content_is_graded_once(new_verifier):
    made = new_verifier(cache_entries=2)
    other = Problem("stdin", "", (("2", "5"),))
    first = grade(made, respond(SQUARE), SQUARES)
    assert grade(made, "Other words.\n```\n" + SQUARE + "\n```", SQUARES) == first
    assert made.counts() == {"passed": 2, "tests": 3, "dropped": 0, "cached": 1}
    assert grade(made, respond(SQUARE), other) == CodeVerdict("failed", 0)  # other tests
    grade(made, respond(SQUARE), SQUARES)  # now the one asked for last
    grade(made, respond("print(1)"), SQUARES)  # pushes `other` out
    assert made.counts()["cached"] == 2
    grade(made, respond(SQUARE), SQUARES)
    grade(made, respond(SQUARE), other)
    assert made.counts()["cached"] == 3


def test_a_timeout_is_not_remembered(new_verifier):
    made = new_verifier(seconds_per_test=0.5)
    for _ in range(2):
        assert grade(made, respond("while True: pass"), SQUARES) == CodeVerdict("timeout", 0)
    assert "cached" not in made.counts()


def test_a_machine_that_cannot_isolate_is_refused(new_verifier, monkeypatch, tmp_path):
    monkeypatch.setattr(sandbox, "bwrap_paths", lambda: ["/bin/false"])
    with pytest.raises(UserError, match=r"allow_unsafe"):
        new_verifier()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with pytest.warns(UserWarning, match="allow_unsafe") as told:
        made = new_verifier(allow_unsafe=True, seconds_per_test=5.0)
    assert len(told) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert made.bwrap is None
        assert grade(made, respond(SQUARE), SQUARES) == CodeVerdict("passed")
        assert grade(made, respond("print(3)"), SQUARES) == CodeVerdict("failed", 0)
        for name in ("fork bomb", "ten gigabytes", "the network", "sleep for ever"):
            tests = Problem("stdin", "", (("{}", hostile.ANSWER),))
            assert grade(made, respond(hostile.HEAD + ATTACKS[name]), tests).reward == 0
    wait_until(lambda: not left_over(), seconds=30)  # the system may yet have to clear them away
    assert list(tmp_path.iterdir()) == []


def test_a_package_that_is_not_installed_is_named(new_verifier):
    with pytest.raises(UserError, match="no_such_package"):
        new_verifier(packages=("no_such_package",))


def test_a_test_that_no_program_could_pass_is_refused(patient):
    echo = respond("x = input()\nprint(x if len(x) < 9 else len(x))")
    room = CODE.temporary_bytes - verifier.FOLDER_BYTES
    for test in (("x" * room, str(room)), ("x", "x" + " " * (2**20 - 2))):
        assert grade(patient, echo, Problem("stdin", "", (test,))) == CodeVerdict("passed")
    for name, least, test in (
        ("temporary_bytes", 2**24 + 1, ("x" * (room + 1), "")),
        ("output_bytes", 2**20 + 1, ("", "x" * 2**20)),
    ):
        with pytest.raises(UserError, match=rf"rewards\.code\.{name}.*{least}"):
            grade(patient, echo, Problem("stdin", "", (test,)))


def test_a_sandbox_that_fails_is_no_wrong_answer(new_verifier):
    made = new_verifier()
    made.bwrap = "/bin/false"
    with pytest.raises(RunError):
        grade(made, respond(SQUARE), SQUARES)
    assert made.counts() == {}


# Pure functions


@pytest.mark.parametrize(
    ("response", "opened", "code"),
    [
        *((f"```{language}\nx\n```", False, "x") for language in ("python", "")),
        ("```py\nold\n```\nno:\n```python3\nnew\ny\n```\nbye", False, "new\ny"),
        ("<think>\n```python\nold\n```\n</think>\n```python\nnew\n```", False, "new"),
        ("```python\nold\n```\n</think>\n```python\nnew\n```", True, "new"),
        ("```python\n```", False, ""),
        *((f"{before}```python\nold\n```", True, None) for before in ("", "</think><think>\n")),
        ("```python\nold\n```\n</think>\nno code", True, None),
        ("<think>\n```python\nold\n```", False, None),
        *((response, False, None) for response in ("```python\nnever closed", "`x`", "")),
    ],
)
def test_the_last_block_behind_the_thinking_part(response, opened, code):
    assert verifier.extract_code(response, thinking_opened=opened) == code


def test_extraction_is_linear():
    for text in ("```" * 300_000, "```python\n" * 100_000, "```" + "x" * 1_000_000, "``" * 10**6):
        start = time.process_time()
        verifier.extract_code(text, thinking_opened=False)
        assert time.process_time() - start < 10  # of processor time; a square of it takes hours


def test_outputs_agree_as_in_livecodebench():
    same = (
        *(("3\n", "3"), ("  1 2 \n\t3\n\n", "1 2\n3"), ("1\r\n2\r\n", "1\n2"), ("Yes", "Yes")),
        *(("1  2", "1 2"), ("1.50", "1.5"), ("1e3", "1000"), ("-0", "0")),  # the same numbers
        *(("nan", "nan"), ("", ""), ("ä", "ä")),
    )
    different = (
        *(("a  b", "a b"), ("1 2\n3", "1 2 3"), ("1\n\n2", "1\n2"), ("1 2", "1 2 3")),
        # no tolerance
        *(("0.1", "0.10000000000000001"), ("50000000000000000", "50000000000000001")),
        *(("Yes", "YES"), ("nan", "NaN"), ("sNaN 1", "1 1"), ("", "0"), ("x 1.0", "x 1")),
    )
    assert [pair for pair in (*same, *different) if verifier.same_output(*pair)] == list(same)


def test_values_agree_as_in_livecodebench():
    same = (
        *(("[1, 2]", "[1,2]"), ("null", "null"), ('{"a": 1, "b": 2}', '{"b": 2, "a": 1}')),
        *(("1.0", "1"), ("true", "1")),  # Python's equality, which the benchmark uses
    )
    different = (
        *(("1", '"1"'), ("[[1]]", "[1]"), ("null", "false"), ("0.30000000000000004", "0.3")),
        *(("NaN", "NaN"), ("", "null"), ("1 2", "1"), ("[" * 100_000, "1"), ("1" * 5000, "1")),
    )
    assert [pair for pair in (*same, *different) if verifier.same_value(*pair)] == list(same)


def test_a_list_of_one_agrees_with_its_element():
    same = (("1", "[1]"), ("[1]", "[[1]]"), ("null", "[null]"), ("1.0", "[1]"))
    different = (("[1]", "[1]"), ("1", "1"), ("1", "[1, 2]"), ("1", "[]"), ("", "[1]"), ("1", "x"))
    different += (("1", '{"1": 1}'), ("[" * 100_000, "[1]"), ("9" * 60_000, "[1]"))
    assert [pair for pair in (*same, *different) if verifier.same_element(*pair)] == list(same)


def test_every_hostile_program_is_in_one_list():
    parts = (hostile.PROCESSES, hostile.RESOURCES, hostile.SIGHT, hostile.PAY, hostile.CALLS)
    names = [name for part in (*parts, hostile.SOURCES) for name in part]
    assert len(names) == len(set(names)) >= 70
    assert {*hostile.HARMLESS, *hostile.ENDLESS} <= {*ATTACKS}
    assert verifier.CPU_LIMIT == -signal.SIGXCPU
