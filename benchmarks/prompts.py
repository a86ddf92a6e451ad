"""Measures the prompt stream: read, shuffle and iterate, with and without the tokenizer.

    python benchmarks/prompts.py [--prompts=100000] [--tokenizer=runs/smollm2-model]

The records are made up, of the length of mathematical problems, built and read by TFDS. The target
for 100,000 prompts without the tokenizer is 5 s. Prompts are templated and tokenized one at a time,
when they are taken, so that does not delay a start.
"""

import argparse
import itertools
import json
import logging
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from results import keep

from oapl_jax.config import ReleaseConfig
from oapl_jax.data.prompts import PromptStream, PromptTemplate
from oapl_jax.data.public import releases
from oapl_jax.data.records import Record
from oapl_jax.model.tokenizer import load_tokenizer

WORDS = ["find", "the", "number", "of", "positive", "integers", "$x^2", "+", "1$", "triangle", "12"]


class NoTokenizer:
    """Stand-in for a tokenizer, to measure everything else."""

    def apply_chat_template(self, chat: Any, **settings: Any) -> list[int]:
        return [ord(chat[-1]["content"][0])]


def prepare(directory: Path, size: int) -> Callable[[], Sequence[Record]]:
    """Builds a data set of problems of about 60 words; returns a function that opens it."""
    rng = np.random.default_rng(0)
    with (directory / "rows.jsonl").open("w") as file:
        for i in range(size):
            words = " ".join(rng.choice(WORDS, 60))
            file.write(json.dumps({"q": f"Problem {i}. {words}", "a": i}) + "\n")
    options = dict(task="math", columns={"problem": "q", "answer": "a"}, max_tests=0)
    table = ReleaseConfig(
        kind="table",
        path=str(directory / "rows.jsonl"),
        files=(),
        rows=size,
        part=(0, 100),
        options=options,
    )
    sets, data_dir = {"made_up": table}, str(directory / "data")
    opened = lambda: releases.open_set("made_up", sets, section="data.sets", data_dir=data_dir)
    opened()
    return opened


def seconds(run: Callable[[], Any]) -> tuple[float, float, Any]:
    """Wall-clock and CPU seconds, and the result."""
    wall, cpu = time.perf_counter(), time.process_time()
    result = run()
    return time.perf_counter() - wall, time.process_time() - cpu, result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prompts", type=int, default=100_000)
    parser.add_argument("--tokenizer", help="a directory; measured too if given")
    arguments = parser.parse_args()
    logging.disable(logging.WARNING)
    count = arguments.prompts

    with tempfile.TemporaryDirectory() as directory:
        wall, _, opened = seconds(lambda: prepare(Path(directory), count))
        results: dict[str, Any] = {"prompts": count, "build once, s": round(wall, 2)}
        open_wall, open_cpu, source = seconds(opened)
        tokenizers: dict[str, Any] = {"without tokenizer": NoTokenizer()}
        if arguments.tokenizer:
            tokenizers["with tokenizer"] = load_tokenizer(arguments.tokenizer)
        for name, tokenizer in tokenizers.items():
            limits: dict[str, Any] = dict(task="math", max_prompt_tokens=4096, instruction="")
            template = PromptTemplate(tokenizer, **limits)
            prompts = PromptStream(source, template, seed=0, host=0, hosts=1)
            took = lambda stream=prompts: sum(1 for _ in itertools.islice(stream, count))
            wall, cpu, taken = seconds(took)
            assert taken == count
            results |= {
                f"open and iterate, {name}, s": round(open_wall + wall, 2),
                f"the same, CPU s, {name}": round(open_cpu + cpu, 2),
                f"microseconds a prompt, {name}": round(wall / count * 1e6, 1),
            }
    for name, value in results.items():
        print(f"{name}: {value}")
    keep(results)


if __name__ == "__main__":
    main()
