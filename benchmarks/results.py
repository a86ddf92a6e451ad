"""Prints a benchmark's table and writes its results as JSON."""

import json
import pathlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any

DIRECTORY = pathlib.Path("runs/benchmarks")


def show(lines: Sequence[Mapping[str, Any]]) -> None:
    """Prints a Markdown table with the keys of the first line as columns."""
    print("| " + " | ".join(lines[0]) + " |\n|" + "---|" * len(lines[0]))
    for line in lines:
        print("| " + " | ".join(str(line[column]) for column in lines[0]) + " |")
    print()


def keep(found: Any) -> None:
    """Writes runs/benchmarks/NAME.json for the command benchmarks/NAME.py."""
    DIRECTORY.mkdir(parents=True, exist_ok=True)
    file = DIRECTORY / f"{pathlib.Path(sys.argv[0]).stem}.json"
    file.write_text(json.dumps(found, indent=1) + "\n")
    print(file)
