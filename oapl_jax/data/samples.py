"""Writes small made-up files in the schemas and the layout of the public releases (docs/data.md).

    python -m oapl_jax.data.samples --to=runs/samples --rows=20

Stand-ins for the real releases, for tests and for trying out a configuration.
"""

import argparse
import base64
import functools
import itertools
import json
import pickle
import zlib
from collections.abc import Callable, Iterable
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from etils import epath

Row = dict[str, Any]
COMPETITIONS = ("aime_2025", "hmmt_feb_2025", "hmmt_nov_2025", "brumo_2025")


def write(root: str, rows: int) -> None:
    """Writes every release with `rows` rows a file; no two files share a problem."""
    numbers = itertools.count(11)

    def file(path: str, row: Callable[[int, int], Row]) -> None:
        """Writes rows of a number unique to each problem and an index within the file."""
        _write(epath.Path(root) / path, [row(next(numbers), i) for i in range(rows)])

    agentica, train = "agentica-org", "train-00000-of-00001.parquet"
    deepscaler = lambda n, i: _sum(n, solution="By adding.")
    file(f"{agentica}/DeepScaleR-Preview-Dataset/deepscaler.json", deepscaler)
    file(f"HuggingFaceH4/aime_2024/data/{train}", aime_2024)
    competition = lambda n, i: _sum(n, problem_idx=i + 1, problem_type=["Algebra"])
    for name in COMPETITIONS:
        file(f"MathArena/{name}/data/{train}", competition)
    file("HuggingFaceH4/MATH-500/test.jsonl", math500)
    for split in ("train", "test"):
        file(f"openai/gsm8k/main/{split}-00000-of-00001.parquet", gsm8k)
    deepcoder = f"{agentica}/DeepCoder-Preview-Dataset"
    file(f"{deepcoder}/primeintellect/{train}", primeintellect)
    file(f"{deepcoder}/taco/{train}", taco)
    for split in ("train", "test"):
        file(f"{deepcoder}/lcbv5/{split}-00000-of-00001.parquet", lcbv5)
    for part in range(1, 6):
        name = f"test{part if part > 1 else ''}.jsonl"
        row = functools.partial(livecodebench, month=2 * part)  # February to October
        file(f"livecodebench/code_generation_lite/{name}", row)


def _write(file: epath.Path, rows: list[Row]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    if file.suffix == ".parquet":
        with file.open("wb") as stream:
            pq.write_table(pa.Table.from_pylist(rows), stream)
    elif file.suffix == ".json":
        file.write_text(json.dumps(rows))
    else:
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))


# Mathematics: sums


def _sum(n: int, **more: Any) -> Row:
    return {"problem": f"Compute ${n} + {n + 1}$.", "answer": str(2 * n + 1), **more}


def aime_2024(n: int, i: int) -> Row:
    return _sum(n, id=i, solution="By adding.", url="", year="2024")


def math500(n: int, i: int) -> Row:
    known = {"subject": "Algebra", "level": i % 5 + 1, "unique_id": f"test/algebra/{i}.json"}
    return _sum(n, solution="By adding.", **known)


def gsm8k(n: int, i: int) -> Row:
    """Small numbers; every fourth answer has a comma."""
    have, more = n % 9 + 1, n // 9 + (1000 if n % 4 == 0 else 0)
    total = have + more
    return {
        "question": f"Ada has {have} nuts and finds {more} more. How many nuts does she have?",
        "answer": f"{have} + {more} = <<{have}+{more}={total}>>{total}\n#### {total:,}",
    }


# Programs: add n to an integer, by a call if n is odd, else from stdin to stdout


def _program(n: int) -> tuple[str, str, str, str]:
    """Problem, solution, starter code and name of the function, "" if there is none."""
    if n % 2 == 0:
        problem = f"Read an integer and print the sum of it and {n}."
        return problem, f"print(int(input()) + {n})", "", ""
    name = f"add_{n}"
    problem = f"Write a function {name} that adds {n} to an integer."
    code = f"class Solution:\n    def {name}(self, x: int) -> int:\n        "
    return problem, f"def {name}(x):\n    return x + {n}", code, name


def _pairs(n: int) -> list[tuple[Any, Any]]:
    """Inputs and outputs of two tests: lists of arguments and values, or lines."""
    return [([x], [x + n]) if n % 2 else (f"{x}\n", f"{x + n}\n") for x in (1, 20)]


def _line_tests(n: int, inputs: Iterable[int]) -> str:
    kind = "functional" if n % 2 else "stdin"
    return json.dumps([dict(input=str(x), output=str(x + n), testtype=kind) for x in inputs])


def primeintellect(n: int, i: int) -> Row:
    problem, solution, _, name = _program(n)
    kind = {"type": "function_call", "fn_name": name} if name else {"type": "stdin_stdout"}
    tests = json.dumps([{"input": a, "output": b} | kind for a, b in _pairs(n)])
    return {"problem": problem, "solutions": [f"```python\n{solution}\n```"], "tests": tests}


def taco(n: int, i: int) -> Row:
    problem, solution, _, name = _program(n)
    inputs, outputs = zip(*_pairs(n), strict=True)
    tests = {"inputs": inputs, "outputs": outputs} | ({"fn_name": name} if name else {})
    return {"problem": problem, "solutions": [solution], "tests": json.dumps(tests)}


def lcbv5(n: int, i: int) -> Row:
    problem, _, code, name = _program(n)
    tests, metadata = _line_tests(n, (1, 20)), {"func_name": name or None}
    return {"problem": problem, "starter_code": code, "tests": tests, "metadata": metadata}


def livecodebench(n: int, i: int, *, month: int) -> Row:
    problem, _, code, name = _program(n)
    return {
        "question_title": f"Add {n}",
        "question_content": problem,
        "platform": "leetcode" if name else "atcoder",
        "question_id": str(n),
        "contest_id": "1",
        "contest_date": f"2024-{month:02d}-15T00:00:00",
        "starter_code": code,
        "difficulty": "easy",
        "public_test_cases": _line_tests(n, (1,)),
        "private_test_cases": packed(_line_tests(n, (20, 300))),
        "metadata": json.dumps({"func_name": name} if name else {}),
    }


def packed(text: str) -> str:
    """LiveCodeBench's encoding of hidden tests: base64 of zlib of a pickled text."""
    return base64.b64encode(zlib.compress(pickle.dumps(text))).decode()


def main() -> None:
    parser = argparse.ArgumentParser(description="Writes made-up releases.")
    parser.add_argument("--to", required=True, help="a directory")
    parser.add_argument("--rows", type=int, required=True, help="of each file")
    arguments = parser.parse_args()
    write(arguments.to, arguments.rows)


if __name__ == "__main__":
    main()
