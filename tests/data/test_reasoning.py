"""The TFDS data set, on the real builder: disjoint splits, one build, nothing half-built."""

import dataclasses
import re
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from oapl_jax.data.records import Record
from oapl_jax.data.synthetic import reasoning, tasks
from oapl_jax.errors import UserError

# Small spaces, so that splits which are not disjoint by content are sure to collide.
SETTINGS = {
    "chain_sum": {"min_terms": 3, "max_terms": 3, "min_digits": 1, "max_digits": 1},
    "number_sorting": {"min_numbers": 4, "max_numbers": 4, "min_value": 0, "max_value": 9},
    "countdown": {
        "min_numbers": 2,
        "max_numbers": 3,
        "min_value": 1,
        "max_value": 9,
        "min_target": 1,
        "max_target": 30,
    },
    "documents": {
        "min_rows": 1,
        "max_rows": 1,
        "min_columns": 2,
        "max_columns": 2,
        "max_letters": 1,
        "formulas_alone": 0.5,
        "formulas_in_tables": 0.0,
        "max_depth": 1,
    },
}
SIZES = {"train": 400, "validation": 40, "test": 40}


def prepare(directory, task="chain_sum", generator=None, sizes=SIZES, seed=0):
    return reasoning.prepare(
        task=task,
        data_dir=str(directory),
        train_size=sizes["train"],
        validation_size=sizes["validation"],
        test_size=sizes["test"],
        generator=SETTINGS[task] if generator is None else generator,
        seed=seed,
    )


def splits(builder) -> dict[str, list[Record]]:
    return {split: list(reasoning.load(builder, split=split)) for split in SIZES}


def content(record: Record):
    """What makes two problems the same, from the question and not from the code under test."""
    numbers = sorted(map(int, re.findall(r"\d+", record.question)))
    match record.task:
        case "chain_sum" | "documents":
            return record.question
        case "number_sorting":
            return numbers, record.question[-1]
        case "countdown":
            *_, target = map(int, re.findall(r"\d+", record.question))
            return numbers, target  # the target is also among the numbers, in both of two equals


def shared_problems(chosen: dict[str, list[Record]]) -> int:
    """How many problems stand more than once, in one split or in two."""
    everything = [str(content(record)) for split in chosen.values() for record in split]
    return len(everything) - len(set(everything))


@pytest.mark.parametrize("task", tasks.TASKS)
def test_splits_have_their_sizes_and_are_disjoint_by_content(task, tmp_path):
    chosen = splits(prepare(tmp_path, task))
    assert {split: len(rows) for split, rows in chosen.items()} == SIZES
    assert shared_problems(chosen) == 0
    for split, rows in chosen.items():
        for record in rows:
            assert record.task == task
            assert record.id == tasks.content_id(task, record.metadata)
            assert reasoning.split_of(record.id) == split


@pytest.mark.parametrize(
    ("task", "key"),
    [
        ("number_sorting", lambda m: f"{m['direction']} {m['numbers']}"),
        ("countdown", lambda m: f"{m['numbers']} {m['target']}"),
    ],
)
def test_a_key_that_is_not_canonical_is_found_out(task, key, tmp_path, monkeypatch):
    broken = dataclasses.replace(tasks.TASKS[task], key=key)
    monkeypatch.setitem(tasks.TASKS, task, broken)
    assert shared_problems(splits(prepare(tmp_path, task))) > 0


def test_no_test_problem_is_a_training_problem_of_other_settings(tmp_path):
    test = {content(r) for r in splits(prepare(tmp_path))["test"]}
    wide = SETTINGS["chain_sum"] | {"max_terms": 4}
    others = (
        prepare(tmp_path, seed=1),
        prepare(tmp_path, sizes=SIZES | {"train": 1500}),
        prepare(tmp_path, generator=wide),
    )
    for other in others:
        assert not test & {content(r) for r in splits(other)["train"]}


def test_shares_of_the_space():
    first = ["0000000000000000", "cccccccccccccccc", "cccccccccccccccd"]
    assert [reasoning.split_of(i) for i in first] == ["train", "train", "validation"]
    assert [reasoning.split_of(i) for i in ("e666", "e667", "ffff")] == [
        "validation",
        "test",
        "test",
    ]


def test_building_again_changes_nothing_and_other_settings_go_elsewhere(tmp_path, monkeypatch):
    first = prepare(tmp_path)
    stamps = {p: p.stat().st_mtime_ns for p in Path(first.data_path).iterdir()}
    other = prepare(tmp_path, seed=1)
    assert other.data_path != first.data_path
    monkeypatch.setattr(reasoning, "draw_splits", None)  # a second build would call it
    again = prepare(tmp_path)
    assert {p: p.stat().st_mtime_ns for p in Path(again.data_path).iterdir()} == stamps
    assert splits(again) == splits(first)


def test_the_same_settings_give_the_same_records(tmp_path):
    assert splits(prepare(tmp_path / "a")) == splits(prepare(tmp_path / "b"))


def test_random_access(tmp_path):
    rows = reasoning.load(prepare(tmp_path), split="test")
    assert rows[-1] == list(rows)[len(rows) - 1]
    with pytest.raises(IndexError):
        rows[len(rows)]


def test_a_task_that_is_too_small_is_refused_and_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(reasoning, "PATIENCE", 500)
    tiny = SETTINGS["chain_sum"] | {"min_terms": 2, "max_terms": 2}  # 200 problems
    with pytest.raises(UserError, match=r"data\.train_size is 400 but task chain_sum has hardly"):
        prepare(tmp_path, generator=tiny)
    assert not list(tmp_path.rglob("*.array_record*")) + list(tmp_path.rglob("*.json"))


def test_an_empty_split_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"data\.test_size is 0"):
        prepare(tmp_path, sizes=SIZES | {"test": 0})


def test_a_build_killed_while_it_writes_leaves_no_data_set(tmp_path):
    script = f"""
        import os, signal
        from oapl_jax.data.synthetic import reasoning

        whole = reasoning.Reasoning._generate_examples

        def killed(self, chosen):
            for i, row in enumerate(whole(self, chosen)):
                if i == 20:
                    os.kill(os.getpid(), signal.SIGKILL)
                yield row

        reasoning.Reasoning._generate_examples = killed
        reasoning.prepare(task="chain_sum", data_dir={str(tmp_path)!r}, train_size=400,
                          validation_size=40, test_size=40,
                          generator={SETTINGS["chain_sum"]!r}, seed=0)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], timeout=60, check=False)
    assert done.returncode == -signal.SIGKILL
    remains = list(tmp_path.rglob("*incomplete*"))
    assert remains, "it was killed before it wrote anything, so this test shows nothing"
    chosen = splits(prepare(tmp_path))
    assert {split: len(rows) for split, rows in chosen.items()} == SIZES


def test_remains_in_the_final_place_are_refused(tmp_path):
    info = Path(prepare(tmp_path).data_path) / "dataset_info.json"
    info.unlink()
    with pytest.raises(UserError, match="half a data set; delete it"):
        prepare(tmp_path)


def test_two_builds_at_once(tmp_path, monkeypatch):
    alone, finished = reasoning.draw_splits, []

    def draw_while_another_builds(stream, *, sizes):
        monkeypatch.setattr(reasoning, "draw_splits", alone)
        finished.append(prepare(tmp_path))
        return alone(stream, sizes=sizes)

    monkeypatch.setattr(reasoning, "draw_splits", draw_while_another_builds)
    builder = prepare(tmp_path)
    assert len(finished) == 1
    assert splits(builder) == splits(finished[0])
    assert not list(tmp_path.rglob("*incomplete*"))
