"""Synthetic tasks: generated records and demonstrations, and the TFDS data set split by content."""

import dataclasses
import itertools
import json
import re
import resource
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
from disks import no_file_larger_than

from configs import common
from oapl_jax.config import WORD_TASKS, DocumentRewardConfig, SyntheticDataConfig
from oapl_jax.data.records import Record, load_split, user
from oapl_jax.data.synthetic import tasks
from oapl_jax.data.synthetic.tasks import TASKS, content_id, records, split_of
from oapl_jax.errors import RunError, UserError
from oapl_jax.rewards.documents.verifier import DocumentVerifier
from oapl_jax.rewards.tasks import VERIFIERS

# Small spaces of problems, so that splits which are not disjoint by content are sure to collide.
SETTINGS = {
    "chain_sum": dict(min_terms=3, max_terms=3, min_digits=1, max_digits=1),
    "number_sorting": dict(min_numbers=4, max_numbers=4, min_value=0, max_value=9),
    "countdown": dict(min_numbers=2, max_numbers=3, min_value=1, max_value=9)
    | dict(min_target=1, max_target=30),
    "documents": dict(min_rows=1, max_rows=1, min_columns=2, max_columns=2, max_letters=1)
    | dict(formulas_alone=0.5, formulas_in_tables=0.0, max_depth=1),
    "needle_haystack": dict(min_num_statements=1, max_num_statements=1),
}
LARGER = {
    "chain_sum": dict(min_terms=2, max_terms=6, max_digits=2),
    "number_sorting": dict(max_numbers=8, min_value=-20, max_value=20),
    "countdown": dict(min_numbers=3, max_numbers=4, max_value=20, max_target=99),
    "documents": dict(max_rows=3, max_columns=3, max_letters=3, formulas_in_tables=0.5),
    "needle_haystack": dict(max_num_statements=5),
}
SIZES = {"train": 400, "validation": 40, "test": 40}
VERIFY = DocumentVerifier(DocumentRewardConfig.from_dict(common.rewards().documents.to_dict()))


# Records and demonstrations


@pytest.fixture(scope="module", params=TASKS)
def sample(request) -> list[Record]:
    settings = SETTINGS[request.param] | LARGER[request.param]
    return list(itertools.islice(records(request.param, seed=0, settings=settings), 100))


def success(sample: list[Record], noise: float) -> float:
    rng = np.random.default_rng(0)
    return float(np.mean([right(r, TASKS[r.task].demonstration(r, rng, noise)) for r in sample]))


def right(record: Record, response: str) -> bool:
    if record.task == "documents":
        return VERIFY.verify(response, record.answer).reward == 1
    return VERIFIERS[record.task](response, record.answer) == 1


def test_demonstrations_are_correct_without_noise_and_mostly_wrong_with_much(sample):
    assert success(sample, 0.0) == 1.0
    assert success(sample, 0.5) < 0.4
    assert success(sample, 0.5) < success(sample, 0.1) < 1.0


def test_characters_and_ids(sample):
    rng = np.random.default_rng(1)
    for record in sample:
        text = record.question + TASKS[record.task].demonstration(record, rng, 0.5)
        assert set(text) <= set(TASKS[record.task].characters)
        stored = json.loads(json.dumps(record.metadata))
        assert stored == record.metadata
        assert content_id(record.task, stored) == record.id


@pytest.mark.parametrize(
    ("task", "metadata", "question", "answer"),
    [
        ("chain_sum", {"terms": ["4", "+", "3", "-", "-2"]}, "4+3--2=", "9"),
        ("number_sorting", {"numbers": [3, -1, 2], "direction": "descending"}, "3,-1,2>", "3,2,-1"),
        ("countdown", {"numbers": [3, 4, 5], "target": 17}, "3,4,5:17=", "3 4 5 -> 17"),
    ],
)
def test_question_and_answer_by_hand(task, metadata, question, answer):
    assert (TASKS[task].question(metadata), TASKS[task].answer(metadata)) == (question, answer)


def test_chain_sum_demonstration_continues_from_a_wrong_total():
    def demonstrated(terms, noise, seed=0):
        record = Record("0", user(f"{terms}="), "", "chain_sum", {"terms": [*terms]})
        return TASKS["chain_sum"].demonstration(record, np.random.default_rng(seed), noise)

    assert demonstrated("1+2-3", 0.0) == "03,00"
    assert demonstrated("1+2-3", 1.0) == "-1,02"  # every operator misread
    some = {demonstrated("1+2-3", 0.5, seed) for seed in range(50)}
    assert some == {"03,00", "03,06", "-1,-4", "-1,02"}
    assert demonstrated("4", 0.0) == "04"


def test_chain_sum_keeps_totals_of_two_characters():
    settings = SETTINGS["chain_sum"] | dict(min_terms=4, max_terms=4)
    for record in itertools.islice(records("chain_sum", seed=0, settings=settings), 200):
        totals = TASKS["chain_sum"].demonstration(record, np.random.default_rng(0), 0.0).split(",")
        assert all(len(total) == 2 and int(total) >= 0 for total in totals)
        assert int(totals[-1]) == int(record.answer)


@pytest.mark.parametrize("task", WORD_TASKS)
def test_a_word_problem_has_reasoning_gyms_question_and_answer(task):
    items = TASKS[task].generator(seed=1, **SETTINGS[task])
    for item in (items[index] for index in range(20)):
        metadata = TASKS[task].metadata(item)
        assert TASKS[task].question(metadata) == item["question"].strip()
        answer = TASKS[task].answer(metadata)
        assert VERIFIERS[task](answer, answer) == items.score_answer(answer, item) == 1


def test_keys_are_canonical():
    sorting, countdown, sums = TASKS["number_sorting"], TASKS["countdown"], TASKS["chain_sum"]
    key = lambda way, *numbers: sorting.key({"direction": way, "numbers": numbers})
    assert key("ascending", 3, 1, 2) == key("ascending", 1, 2, 3)
    assert key("ascending", 1, 2) != key("descending", 1, 2)
    assert key("ascending", 1, 23) != key("ascending", 12, 3)
    a = {"numbers": [3, 4], "target": 7, "expression": "3+4"}
    assert countdown.key(a) == countdown.key(a | {"numbers": [4, 3], "expression": "4+3"})
    assert countdown.key(a) != countdown.key(a | {"target": 12})
    assert sums.key({"terms": ["1", "+", "2"]}) != sums.key({"terms": ["2", "+", "1"]})


def test_the_stream_is_a_function_of_the_seed():
    def first(seed):
        settings = SETTINGS["chain_sum"] | LARGER["chain_sum"]
        stream = records("chain_sum", seed=seed, settings=settings)
        return [record.id for record in itertools.islice(stream, 100)]

    assert first(0) == first(0)
    # reasoning_gym's own seeding would give seeds 0 and 1 ninety-nine records in common.
    assert len(set(first(0)) & set(first(1))) < 30


@pytest.mark.parametrize(
    ("task", "settings", "setting"),
    [
        ("sudoku", {}, "data.task"),
        ("chain_sum", {"min_terms": 3, "max_terms": 2}, "data.generator .*max_terms"),
        ("chain_sum", {"terms": 3}, "data.generator .*'terms'"),
        ("countdown", {"max_value": 2, "min_target": 900, "max_target": 999}, "data.generator"),
    ],
)
def test_rejects_generator_settings(task, settings, setting, monkeypatch):
    monkeypatch.setattr(tasks, "MAX_FAILURES", 2)
    with pytest.raises(UserError, match=setting):
        next(records(task, seed=0, settings=SETTINGS.get(task, {}) | settings))


# The data set


def config(directory, task="chain_sum", generator=None, sizes=SIZES, seed=0):
    return SyntheticDataConfig(
        task=task,
        data_dir=str(directory),
        generator=SETTINGS[task] if generator is None else generator,
        seed=seed,
        max_prompt_tokens=1,
        instruction="",
        **{f"{split}_size": size for split, size in sizes.items()},
    )


def prepare(directory, *args, **settings):
    return tasks.prepare(config(directory, *args, **settings))


def splits(builder) -> dict[str, list[Record]]:
    return {split: list(load_split(builder, split)) for split in SIZES}


def content(record: Record):
    """Identity of a problem, from its question and not from the code under test."""
    numbers = sorted(map(int, re.findall(r"\d+", record.question)))
    match record.task:
        case "number_sorting":
            return numbers, record.question[-1]
        case "countdown":
            *_, target = map(int, re.findall(r"\d+", record.question))
            return numbers, target  # the target is also among the numbers, in both of two equals
    return record.question


def repeated_problems(chosen: dict[str, list[Record]]) -> int:
    """Number of problems that occur more than once, in one split or in two."""
    everything = [str(content(record)) for split in chosen.values() for record in split]
    return len(everything) - len(set(everything))


@pytest.mark.parametrize(("limit", "kind"), [(100, RunError), (None, UserError)])
def test_a_full_disk_may_pass_and_a_file_in_the_way_may_not(limit, kind, tmp_path):
    place = tmp_path / "data"
    if limit is None:
        place.touch()
    with no_file_larger_than(limit or resource.RLIM_INFINITY), pytest.raises(kind, match="data"):
        prepare(place)


@pytest.mark.parametrize("task", TASKS)
def test_splits_have_their_sizes_and_are_disjoint_by_content(task, tmp_path):
    chosen = splits(prepare(tmp_path, task))
    assert {split: len(rows) for split, rows in chosen.items()} == SIZES
    assert repeated_problems(chosen) == 0
    for split, rows in chosen.items():
        for record in rows:
            assert record.task == task
            assert record.id == content_id(task, record.metadata)
            assert split_of(record.id) == split


@pytest.mark.parametrize(
    ("task", "key"),
    [
        ("number_sorting", lambda m: f"{m['direction']} {m['numbers']}"),
        ("countdown", lambda m: f"{m['numbers']} {m['target']}"),
    ],
)
def test_a_key_that_is_not_canonical_repeats_problems(task, key, tmp_path, monkeypatch):
    monkeypatch.setitem(TASKS, task, dataclasses.replace(TASKS[task], key=key))
    assert repeated_problems(splits(prepare(tmp_path, task))) > 0


def test_no_test_problem_is_a_training_problem_of_other_settings(tmp_path):
    test = {content(r) for r in splits(prepare(tmp_path))["test"]}
    wider = SETTINGS["chain_sum"] | {"max_terms": 4}
    for other in (dict(seed=1), dict(sizes=SIZES | {"train": 1500}), dict(generator=wider)):
        assert not test & {content(r) for r in splits(prepare(tmp_path, **other))["train"]}


def test_shares_of_the_space():
    ids = ("0" * 16, "c" * 16, "c" * 15 + "d", "e666", "e667", "ffff")
    assert [*map(split_of, ids)] == ["train", "train", "validation", "validation", "test", "test"]


def test_a_complete_data_set_is_not_built_again_and_a_partial_one_is_rejected(tmp_path):
    first = prepare(tmp_path)
    stamps = {p: p.stat().st_mtime_ns for p in Path(first.data_path).iterdir()}
    assert prepare(tmp_path, seed=1).data_path != first.data_path
    again = prepare(tmp_path)
    assert {p: p.stat().st_mtime_ns for p in Path(again.data_path).iterdir()} == stamps
    assert splits(again) == splits(first) == splits(prepare(tmp_path / "other"))
    rows = load_split(again, "test")
    assert rows[-1] == list(rows)[len(rows) - 1]
    with pytest.raises(IndexError):
        rows[len(rows)]
    info = Path(again.data_path) / "dataset_info.json"
    info.unlink()
    with pytest.raises(UserError, match=re.escape(str(info.parent))):
        prepare(tmp_path)


def test_rejects_sizes_and_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(tasks, "MAX_MISSES", 500)
    tiny = SETTINGS["chain_sum"] | {"min_terms": 2, "max_terms": 2}  # 200 problems
    with pytest.raises(UserError, match=r"data\.train_size"):
        prepare(tmp_path, generator=tiny)
    with pytest.raises(UserError, match=r"data\.test_size"):
        prepare(tmp_path, sizes=SIZES | {"test": 0})
    assert not list(tmp_path.rglob("*.array_record*")) + list(tmp_path.rglob("*.json"))


def test_a_build_killed_while_writing_leaves_no_data_set(tmp_path):
    script = f"""
        import os, signal
        from oapl_jax.config import SyntheticDataConfig
        from oapl_jax.data import records
        from oapl_jax.data.synthetic import tasks

        rows, whole = iter(range(1000)), records.to_row

        def killed(record):
            if next(rows) == 20:
                os.kill(os.getpid(), signal.SIGKILL)
            return whole(record)

        records.to_row = killed
        tasks.prepare({config(tmp_path)})
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], timeout=60, check=False)
    assert done.returncode == -signal.SIGKILL
    assert list(tmp_path.rglob("*incomplete*")), "killed before it wrote anything"
    chosen = splits(prepare(tmp_path))
    assert {split: len(rows) for split, rows in chosen.items()} == SIZES


def test_two_concurrent_builds(tmp_path, monkeypatch):
    alone, finished = tasks.fill_splits, []

    def fill_while_another_builds(stream, *, sizes):
        monkeypatch.setattr(tasks, "fill_splits", alone)
        finished.append(prepare(tmp_path))
        return alone(stream, sizes=sizes)

    monkeypatch.setattr(tasks, "fill_splits", fill_while_another_builds)
    builder = prepare(tmp_path)
    assert len(finished) == 1
    assert splits(builder) == splits(finished[0])
    assert not list(tmp_path.rglob("*incomplete*"))
