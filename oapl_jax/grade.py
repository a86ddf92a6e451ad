"""Grades responses as a run does, and says why: the verdict, the extracted answer, the reason.

    python -m oapl_jax.grade --verifier=math responses.jsonl
    python -m oapl_jax.grade --record=runs/a/rollouts --row=0

A line of the file, or of standard input, is a JSON object {"response": text, "reference": answer}
or {"responses": [text, ..], "reference": answer}; for programs the reference is the tests of a
record (docs/data.md). --record is a recorded dataset or one of its shards, --row a group in it.
Prints a line for each response:

    {"verdict": right | wrong | error | timeout, "extracted": answer, "reason": text}

An error is an unreadable reference or, of code, a program that raised. Exit code 2: a line or a
setting is invalid; the responses before it are graded.
"""

import argparse
import contextlib
import json
import os
import runpy
import sys
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from array_record.python.array_record_data_source import ArrayRecordDataSource
from etils import epath

from oapl_jax.config import FUNCTION, RewardsConfig, load_config
from oapl_jax.data.prompts import response_text
from oapl_jax.errors import UserError, exit_with_code, one_line
from oapl_jax.files import local_copy
from oapl_jax.model.tokenizer import load_tokenizer
from oapl_jax.rewards.function.verifier import FunctionVerifier
from oapl_jax.rewards.grader import OPENED
from oapl_jax.rewards.tasks import FINAL_ANSWERS, VERIFIERS
from oapl_jax.rewards.verdicts import TRUNCATED, explain
from oapl_jax.rollout.dataset import Dataset
from oapl_jax.structs import Group, Prompt, decode_groups

RECORD_DEPTH = 5  # of RUN/evaluation/v000300/aime25/responses/SHARD
AT_ONCE = 256  # responses read ahead of the first verdict that is not printed
SETTINGS = Path(__file__).parents[1] / "configs" / "common.py"


class Graded(NamedTuple):
    """A response to grade, with its reference; `note` of how it ended, if that decides."""

    response: str
    reference: str
    note: str = ""
    prompt: Prompt | None = None  # of a recorded response


def read_lines(lines: Iterable[bytes], name: str) -> Iterator[Graded]:
    """Reads JSON lines in UTF-8; raises a UserError that names the first invalid line."""
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line.decode("utf-8-sig"))
            reference = row["reference"] if "reference" in row else row["tests"]
            responses = row["responses"] if "responses" in row else [row["response"]]
            if not isinstance(reference, str):
                if not isinstance(reference, dict | int | float) or isinstance(reference, bool):
                    raise TypeError("the reference is neither text nor a number nor tests")
                reference = json.dumps(reference, allow_nan=False)
            if not isinstance(responses, list):
                raise TypeError("responses is no list")
            if not all(isinstance(response, str) for response in responses):
                raise TypeError("a response is no text")
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise UserError(
                f'{name}, line {number}: not {{"response": text, "reference": answer}} ({error})'
            ) from error
        yield from (Graded(response, reference) for response in responses)


def read_group(record: epath.Path, row: int) -> Group:
    """Reads a group of a recorded dataset, or of one of its shards."""
    whole = record.is_dir()
    try:
        with local_copy(record.parent, () if whole else [record.name]) as local:
            shard = os.fspath(local / record.name)
            groups: Any = Dataset(record) if whole else ArrayRecordDataSource([shard])
            if not 0 <= row < len(groups):
                raise UserError(f"--row={row} is not in {record}, which has {len(groups)} groups")
            found = groups[row]
            return found if isinstance(found, Group) else decode_groups(found)[0]
    except UserError:
        raise
    except Exception as error:  # array_record and msgpack have no class of errors
        raise UserError(
            f"--record={record} is no whole shard ({one_line(error)}); copy it again"
        ) from error


def open_run(workdir: epath.Path | None) -> tuple[RewardsConfig, str]:
    """Settings of the verifiers, and the directory of the tokenizer, of a run; without one, the
    defaults of the configurations, and ""."""
    if workdir is None:
        if not SETTINGS.exists():
            raise UserError(f"{SETTINGS} is missing; name a run with --workdir")
        defaults = runpy.run_path(str(SETTINGS))["rewards"]()
        return RewardsConfig.from_dict(defaults.to_dict(), "rewards"), ""
    config = load_config(workdir)
    if config is None:
        raise UserError(f"--workdir={workdir} is no run: it has no config.json")
    tokenizer = config["model"]["path"] or str(workdir / "model")
    return RewardsConfig.from_dict(config["rewards"], "rewards"), tokenizer


def grade(task: str, rows: Iterable[Graded], config: RewardsConfig) -> Iterator[dict[str, Any]]:
    """Grades responses, several at a time, in order; those before a bad line, too."""
    with contextlib.ExitStack() as stack:
        opened = lambda verifier: stack.enter_context(contextlib.closing(verifier))
        if task == FUNCTION:
            function = opened(FunctionVerifier(config.function, config.function_pool))
            verify = lambda row: function.verify(row.prompt, row.response)
            extract = function.final_answer
        elif task in VERIFIERS:
            verify = lambda row: VERIFIERS[task](row.response, row.reference)
            extract = FINAL_ANSWERS[task]
        else:
            verifier = opened(OPENED[task](config[task]))
            verify = lambda row: verifier.verify(row.response, row.reference)
            extract = verifier.extract
        threads = stack.enter_context(ThreadPoolExecutor(config.math.processes))

        def judge(row: Graded) -> dict[str, Any]:
            try:
                verdict, reason = explain(verify(row))
            except UserError as error:  # of the tests
                verdict, reason = "error", str(error)
            if verdict == "wrong" and task in VERIFIERS:
                reason = f"{reason}; the reference is {row.reference}"
            if row.note:
                verdict, reason = "wrong", f"{row.note} (else {verdict}: {reason})"
            return {
                "verdict": verdict,
                "extracted": extract(row.response) or None,
                "reason": reason,
            }

        pending: deque[Future[dict[str, Any]]] = deque()
        fault = None
        try:
            for row in rows:
                pending.append(threads.submit(judge, row))
                while pending and (pending[0].done() or len(pending) == AT_ONCE):
                    yield pending.popleft().result()
        except UserError as error:
            fault = error
        for future in pending:
            yield future.result()
        if fault:
            raise fault


def main() -> None:
    parser = argparse.ArgumentParser(
        "oapl_jax.grade", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("file", nargs="?", help="JSON lines; standard input by default")
    parser.add_argument("--verifier", choices=sorted(OPENED), help="by default the record's task")
    parser.add_argument("--record", type=epath.Path, help="a recorded dataset or one of its shards")
    parser.add_argument("--row", type=int, help="a group of the record; 0 by default")
    parser.add_argument("--workdir", type=epath.Path, help="of a run with the settings to take")
    parser.add_argument("--tokenizer", help="directory; by default the run's")
    arguments = parser.parse_args()
    workdir, record = arguments.workdir, arguments.record
    if record is None and arguments.row is not None:
        raise UserError(f"--row={arguments.row} is of no record; name one with --record")
    if record is not None and not record.exists():
        raise UserError(f"--record={record} does not exist; name a recorded dataset or a shard")
    if record is not None and arguments.file is not None:
        raise UserError(f"--record={record} and {arguments.file} are both given; name one of them")
    if workdir is None and record is not None:
        around = record.parents[:RECORD_DEPTH]
        workdir = next((place for place in around if (place / "config.json").exists()), None)
    config, tokenizer = open_run(workdir)
    with contextlib.ExitStack() as stack:
        if record is not None:
            if not (tokenizer := arguments.tokenizer or tokenizer):
                raise UserError(
                    f"--record={record} holds token ids; name the tokenizer that sampled them with "
                    "--tokenizer, or its run with --workdir"
                )
            group, decoder = read_group(record, arguments.row or 0), load_tokenizer(tokenizer)
            task = arguments.verifier or (FUNCTION if config.function else group.prompt.task)
            if task == FUNCTION and not config.function:
                raise UserError(
                    f"--record={record} was judged by a reward function; name its run with "
                    "--workdir, or a verifier with --verifier"
                )
            rows: Iterable[Graded] = [
                Graded(
                    response_text(decoder, rollout.tokens),
                    group.prompt.answer,
                    TRUNCATED if rollout.finish_reason == "length" else "",
                    group.prompt,
                )
                for rollout in group.rollouts
            ]
        elif arguments.verifier is None:
            raise UserError("--verifier is missing; add, for example, --verifier=math")
        elif arguments.file is None and sys.stdin is None:
            raise UserError("standard input is closed; name a file of JSON lines")
        else:
            task, name = arguments.verifier, arguments.file or "standard input"
            try:
                lines = open(name, "rb") if arguments.file else sys.stdin.buffer  # noqa: SIM115
            except OSError as error:
                raise UserError(f"{name} can't be read: {error.strerror}") from error
            rows = read_lines(stack.enter_context(lines), name)
        for line in grade(task, rows, config):
            print(json.dumps(line), flush=True)


if __name__ == "__main__":
    exit_with_code(main)
