"""Writes small made-up files in the schemas and the layout of the public releases (docs/data.md).

    python -m oapl_jax.data.samples --to=runs/samples --rows=20

Stand-ins for the real releases, for tests and for trying out a configuration.
"""

import argparse
import base64
import json
import pickle
import zlib
from collections.abc import Iterable
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from etils import epath

Row = dict[str, Any]
COMPETITIONS = ("aime_2025", "hmmt_feb_2025", "hmmt_nov_2025", "brumo_2025")


def write(root: str, rows: int) -> None:
    """Writes every release with about `rows` rows; no two releases share a problem."""
    at = epath.Path(root)
    agentica, matharena, h4 = at / "agentica-org", at / "MathArena", at / "HuggingFaceH4"
    sums = _Sums()

    deepscaler = [sums.problem() | {"solution": "By adding."} for _ in range(rows)]
    _text(agentica / "DeepScaleR-Preview-Dataset" / "deepscaler.json", json.dumps(deepscaler))
    _parquet(
        h4 / "aime_2024" / "data" / "train-00000-of-00001.parquet",
        [
            {"id": i, **sums.problem(), "solution": "By adding.", "url": "", "year": "2024"}
            for i in range(rows)
        ],
    )
    for name in COMPETITIONS:
        _parquet(
            matharena / name / "data" / "train-00000-of-00001.parquet",
            [
                {"problem_idx": i + 1, **sums.problem(), "problem_type": ["Algebra"]}
                for i in range(rows)
            ],
        )
    _lines(
        h4 / "MATH-500" / "test.jsonl",
        [
            {
                **sums.problem(),
                "solution": "By adding.",
                "subject": "Algebra",
                "level": i % 5 + 1,
                "unique_id": f"test/algebra/{i}.json",
            }
            for i in range(rows)
        ],
    )
    for split in ("train", "test"):
        _parquet(
            at / "openai" / "gsm8k" / "main" / f"{split}-00000-of-00001.parquet",
            [sums.word_problem() for _ in range(rows)],
        )

    deepcoder = agentica / "DeepCoder-Preview-Dataset"
    programs = _Programs()
    for config, make in (
        ("primeintellect/train", programs.primeintellect),
        ("taco/train", programs.taco),
        ("lcbv5/train", programs.lcbv5),
        ("lcbv5/test", programs.lcbv5),
    ):
        _parquet(deepcoder / f"{config}-00000-of-00001.parquet", [make() for _ in range(rows)])
    for number in range(1, 6):
        name = f"test{number if number > 1 else ''}.jsonl"
        day = f"2024-{2 * number:02d}-15T00:00:00"  # February to October
        _lines(
            at / "livecodebench" / "code_generation_lite" / name,
            [programs.livecodebench(day) for _ in range(rows)],
        )


class _Sums:
    """Generates distinct problems of addition."""

    def __init__(self):
        self._number = 10

    def problem(self) -> Row:
        self._number += 1
        return {
            "problem": f"Compute ${self._number} + {self._number + 1}$.",
            "answer": str(2 * self._number + 1),
        }

    def word_problem(self) -> Row:
        """Small numbers; every fourth answer has a comma."""
        self._number += 1
        have, more = self._number % 9 + 1, self._number // 9
        more += 1000 if self._number % 4 == 0 else 0
        total = have + more
        return {
            "question": f"Ada has {have} nuts and finds {more} more. How many nuts does she have?",
            "answer": f"{have} + {more} = <<{have}+{more}={total}>>{total}\n#### {total:,}",
        }


class _Programs:
    """Generates distinct programming problems; tests by stdin and by call alternate."""

    def __init__(self):
        self._number = 10

    def _next(self) -> tuple[int, bool]:
        self._number += 1
        return self._number, bool(self._number % 2)

    def primeintellect(self) -> Row:
        n, called = self._next()
        kind = {"type": "function_call", "fn_name": f"add_{n}"} if called else {}
        tests = [
            {"type": "stdin_stdout", "input": a, "output": b} | kind for a, b in _pairs(n, called)
        ]
        solution = f"```python\n{_solution(n, called)}\n```"
        return {"problem": _task(n, called), "solutions": [solution], "tests": json.dumps(tests)}

    def taco(self) -> Row:
        n, called = self._next()
        inputs, outputs = zip(*_pairs(n, called), strict=True)
        tests: Row = {"inputs": inputs, "outputs": outputs}
        tests |= {"fn_name": f"add_{n}"} if called else {}
        solutions = [_solution(n, called)]
        return {"problem": _task(n, called), "solutions": solutions, "tests": json.dumps(tests)}

    def lcbv5(self) -> Row:
        n, called = self._next()
        return {
            "problem": _task(n, called),
            "starter_code": _starter_code(n) if called else "",
            "tests": json.dumps(_line_tests(n, called, (1, 20))),
            "metadata": {"func_name": f"add_{n}" if called else None},
        }

    def livecodebench(self, day: str) -> Row:
        n, called = self._next()
        return {
            "question_title": f"Add {n}",
            "question_content": _task(n, called),
            "platform": "leetcode" if called else "atcoder",
            "question_id": str(n),
            "contest_id": "1",
            "contest_date": day,
            "starter_code": _starter_code(n) if called else "",
            "difficulty": "easy",
            "public_test_cases": json.dumps(_line_tests(n, called, (1,))),
            "private_test_cases": packed(json.dumps(_line_tests(n, called, (20, 300)))),
            "metadata": json.dumps({"func_name": f"add_{n}"} if called else {}),
        }


def _task(n: int, called: bool) -> str:
    if called:
        return f"Write a function add_{n} that adds {n} to an integer."
    return f"Read an integer and print the sum of it and {n}."


def _pairs(n: int, called: bool) -> list[tuple[Any, Any]]:
    """Inputs and outputs of two tests, as lists of arguments and values, or as lines."""
    return [([x], [x + n]) if called else (f"{x}\n", f"{x + n}\n") for x in (1, 20)]


def _solution(n: int, called: bool) -> str:
    return f"def add_{n}(x):\n    return x + {n}" if called else f"print(int(input()) + {n})"


def _starter_code(n: int) -> str:
    return f"class Solution:\n    def add_{n}(self, x: int) -> int:\n        "


def _line_tests(n: int, called: bool, inputs: Iterable[int]) -> list[Row]:
    kind = "functional" if called else "stdin"
    return [{"input": str(x), "output": str(x + n), "testtype": kind} for x in inputs]


def packed(text: str) -> str:
    """LiveCodeBench's encoding of hidden tests: base64 of zlib of a pickled text."""
    return base64.b64encode(zlib.compress(pickle.dumps(text))).decode()


def _text(file: epath.Path, text: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)


def _lines(file: epath.Path, rows: Iterable[Row]) -> None:
    _text(file, "".join(json.dumps(row) + "\n" for row in rows))


def _parquet(file: epath.Path, rows: list[Row]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("wb") as stream:
        pq.write_table(pa.Table.from_pylist(rows), stream)


def main() -> None:
    parser = argparse.ArgumentParser(description="Writes made-up releases.")
    parser.add_argument("--to", required=True, help="a directory")
    parser.add_argument("--rows", type=int, required=True, help="of each release, about")
    arguments = parser.parse_args()
    write(arguments.to, arguments.rows)


if __name__ == "__main__":
    main()
