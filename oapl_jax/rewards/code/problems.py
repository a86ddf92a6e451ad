"""Programming problems: their tests, the program in a response, equality of outputs.

The tests of a problem travel in the `answer` of its record, as JSON:

    {"kind": "stdin", "name": "", "tests": [["3 4\\n", "7\\n"], ...]}
    {"kind": "call", "name": "twoSum", "tests": [["[2, 7]\\n9", "[0, 1]"], ...]}

`stdin`: input and expected output. `call`: one JSON value a line for each argument of the function
`name`, or of that method of `class Solution`, and the JSON of its expected value. This is the form
of LiveCodeBench, and of DeepCoder's three sources once their lists are written as JSON.
"""

import dataclasses
import functools
import hashlib
import json
import re
from decimal import Decimal, InvalidOperation

from oapl_jax.errors import UserError

KINDS = ("stdin", "call")
BLOCK = re.compile(r"```(?:\w+)?\n(.*?)```", re.DOTALL)


@dataclasses.dataclass(frozen=True)
class Problem:
    """The tests of a problem: `kind` and `name` as above, and pairs of input and output."""

    kind: str
    name: str
    tests: tuple[tuple[str, str], ...]

    @functools.cached_property
    def digest(self) -> bytes:
        return hashlib.sha256(repr((self.kind, self.name, self.tests)).encode()).digest()

    @functools.cached_property
    def sizes(self) -> tuple[int, int]:
        """Bytes of the longest input and of the longest expected output."""
        size = lambda part: max(len(test[part].encode(errors="replace")) for test in self.tests)
        return size(0), size(1)


def extract_code(response: str, *, thinking_opened: bool) -> str | None:
    """The last fenced block after the thinking part, as in arXiv 2602.19362's released code.

    Args:
      response: of a policy.
      thinking_opened: whether the prompt ends inside the thinking part (its template writes
        `<think>`), so that a response without `</think>` has no answer.
    """
    _, end, answer = response.rpartition("</think>")
    if "<think>" in answer or (thinking_opened and not end):
        return None
    blocks = BLOCK.findall(answer)
    return blocks[-1].strip() if blocks else None


@functools.lru_cache(maxsize=32)  # the responses to one prompt are graded one after the other
def parse_problem(answer: str) -> Problem:
    """Reads the tests of a record from its `answer`; UserError names a mistake in them."""

    try:
        record = json.loads(answer)
        if not isinstance(record, dict) or record.keys() != {"kind", "name", "tests"}:
            raise ValueError('they are not an object of "kind", "name" and "tests"')
        kind, name, tests = record["kind"], record["name"], record["tests"]
        if kind not in KINDS:
            raise ValueError(f"kind {kind!r} is not one of {', '.join(KINDS)}")
        if not isinstance(name, str) or not (name.isidentifier() if kind == "call" else not name):
            raise ValueError(f"name {name!r} does not fit kind {kind}")
        if not isinstance(tests, list) or not tests:
            raise ValueError("there are none")
        for index, test in enumerate(tests):
            if not isinstance(test, list) or [type(part) for part in test] != [str, str]:
                raise ValueError(f"test {index} is not a pair of strings")
            if kind == "call":
                for line in (*test[0].split("\n"), test[1]):
                    json.loads(line)
    except ValueError as error:
        raise UserError(
            f"the tests of a record can't be used: {error}; build the data again"
        ) from error
    return Problem(kind, name, tuple((given, expected) for given, expected in tests))


def choose_tests(problem: Problem, most: int) -> list[int]:
    """Indices of the tests that count, in order: the `most` with the longest inputs; 0 for all."""
    length = lambda index: len(problem.tests[index][0])
    return sorted(sorted(range(len(problem.tests)), key=length, reverse=True)[: most or None])


def same_output(printed: str, expected: str) -> bool:
    """Whether two texts agree line by line, each stripped of white space.

    A line that differs must hold the same numbers: 1.50 is 1.5 and 1e3 is 1000, without tolerance.
    This is LiveCodeBench's rule (lcb_runner/evaluation/testing_util.py), as in arXiv 2602.19362's
    released code.
    """
    lines, wanted = ([s.strip() for s in t.strip().split("\n")] for t in (printed, expected))
    return len(lines) == len(wanted) and all(map(_same_line, lines, wanted))


def same_value(returned: str, expected: str) -> bool:
    """Whether two JSON texts hold equal values.

    Python's equality, without tolerance; a tuple was returned as a list. LiveCodeBench's rule, but
    for tuples and integer keys inside of other values, which it takes for different.
    """
    try:
        return json.loads(returned) == json.loads(expected)
    except (ValueError, RecursionError):
        return False


def _same_line(line: str, wanted: str) -> bool:
    if line == wanted:
        return True
    try:
        return [Decimal(part) for part in line.split()] == [Decimal(p) for p in wanted.split()]
    except InvalidOperation:
        return False
