"""What a benchmark found: tables to be read, and a file for whoever goes on with it."""

import json
import pathlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any

DIRECTORY = pathlib.Path("runs/benchmarks")


def show(lines: Sequence[Mapping[str, Any]]) -> None:
    """Prints a table, whose columns are the keys of the first line."""
    print("| " + " | ".join(lines[0]) + " |\n|" + "---|" * len(lines[0]))
    for line in lines:
        print("| " + " | ".join(str(line[column]) for column in lines[0]) + " |")
    print()


def keep(found: Any) -> None:
    """Writes runs/benchmarks/NAME.json, NAME being that of the command."""
    DIRECTORY.mkdir(parents=True, exist_ok=True)
    file = DIRECTORY / f"{pathlib.Path(sys.argv[0]).stem}.json"
    file.write_text(json.dumps(found, indent=1) + "\n")
    print(file)
