"""Questions in files of one's own: their rows, and splits that are drawn or named."""

import json
from collections import Counter

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from configs import own_task
from oapl_jax.config import FileDataConfig
from oapl_jax.data.prompts import PromptTemplate
from oapl_jax.data.question_files import characters
from oapl_jax.data.splits import open_splits
from oapl_jax.errors import UserError
from oapl_jax.model.tokenizer import make_character_tokenizer

ROWS = [{"question": f"{i}+{i}?", "answer": 2 * i, "level": ["easy", i]} for i in range(40)]


@pytest.fixture
def split(tmp_path):
    """Opens the splits of rows, written as JSON Lines, or of files."""

    def opened(rows=ROWS, *, validation=(), test=(), **changes):
        values = own_task.get_config().data.to_dict() | {"data_dir": str(tmp_path / "data")}
        for name, content in (("train", rows), ("validation", validation), ("test", test)):
            path = tmp_path / f"{name}.jsonl"
            path.write_text("".join(json.dumps(row) + "\n" for row in content))
            values["sets"][name] = str(path) if content else ""
        return open_splits(FileDataConfig.from_dict(values | changes, "data"))

    return opened


def questions(split):
    return [record.question for record in split]


def test_a_row_becomes_a_record_with_all_its_columns(split):
    records = {r.question: r for part in split().values() for r in part}
    assert len(records) == 40
    for row in ROWS:
        record = records[row["question"]]
        assert record.answer == str(row["answer"])
        assert record.metadata == row
        assert (record.task, record.source) == ("function", "train")


def test_parquet_and_json_hold_the_same_records(split, tmp_path):
    pq.write_table(pa.Table.from_pylist(ROWS_OF_ONE_TYPE), tmp_path / "rows.parquet")
    (tmp_path / "rows.json").write_text(json.dumps(ROWS_OF_ONE_TYPE))
    expected = split(ROWS_OF_ONE_TYPE)
    for name in ("rows.parquet", "rows.json"):
        sets = dict(train=str(tmp_path / name), validation="", test="")
        found = split(sets=sets)
        for part, records in expected.items():
            assert [vars(r) for r in found[part]] == [vars(r) for r in records]


ROWS_OF_ONE_TYPE = [{**row, "level": [1, i]} for i, row in enumerate(ROWS)]


@pytest.mark.parametrize(
    ("row", "answer"),
    [
        ({"question": "a", "answer": "b "}, "b"),
        ({"question": "a", "answer": 0.5}, "0.5"),
        ({"question": "a", "answer": ["x", 1]}, '["x", 1]'),
        ({"question": "a", "answer": None}, ""),
        ({"question": "a"}, ""),
    ],
)
def test_a_reward_function_needs_no_answer_and_takes_any(split, row, answer):
    found = split([row, *ROWS], validation=ROWS[:2], test=ROWS[:2])["train"]
    (record,) = (record for record in found if record.question == "a")
    assert record.answer == answer
    assert record.metadata == row


def test_a_verifier_needs_an_answer(split):
    rows = [*ROWS, {"question": "no answer", "answer": ""}]
    splits = split(rows, task="math")
    assert sorted(q for part in splits.values() for q in questions(part)) == sorted(
        row["question"] for row in ROWS
    )
    assert {record.task for part in splits.values() for record in part} == {"math"}
    tests = json.dumps({"inputs": ["1\n"], "outputs": ["2\n"]})
    programs = [{"question": f"Add {i}.", "answer": tests} for i in range(9)]
    answers = {record.answer for record in split(programs, task="code")["train"]}
    assert [json.loads(answer)["kind"] for answer in answers] == ["stdin"]


def test_a_question_may_be_a_conversation(split):
    chat = [{"role": "system", "content": "Add."}, {"role": "user", "content": "1+1?"}]
    rows = [{"messages": [*chat[:1], {"role": "user", "content": f"{i}?"}]} for i in range(9)]
    columns = {"problem": "messages", "answer": "answer"}
    (record, *_) = split(rows, columns=columns)["train"]
    assert [message["role"] for message in record.messages] == ["system", "user"]


def test_splits_without_a_file_are_drawn_by_the_seed_and_disjoint(split, capsys):
    splits = split()
    assert {name: len(part) for name, part in splits.items()} == dict(
        train=32, validation=4, test=4
    )
    every = [q for part in splits.values() for q in questions(part)]
    assert sorted(every) == sorted(row["question"] for row in ROWS)
    said = capsys.readouterr().out
    assert all(name in said for name in ("validation: 4 of the 40", "test: 4 of the 40"))
    again, other = split(), split(seed=1)
    for name, part in splits.items():
        assert questions(again[name]) == questions(part)
        assert questions(other[name]) != questions(part)
    few = split(validation_share=0.5, test_share=0.001, most_drawn=3)
    assert {name: len(part) for name, part in few.items()} == dict(train=36, validation=3, test=1)


def test_drawing_favours_no_question(split):
    drawn = Counter(q for seed in range(60) for q in questions(split(seed=seed)["validation"]))
    # 240 draws of 40 questions: 6 of each, with a standard deviation of 2.3.
    assert len(drawn) >= 38
    assert max(drawn.values()) < 18


def test_questions_of_named_files_are_left_out_of_training(split, capsys):
    splits = split(validation=ROWS[:5], test=[ROWS[39], {"question": "new", "answer": 1}])
    assert sorted(questions(splits["validation"])) == [row["question"] for row in ROWS[:5]]
    assert sorted(questions(splits["test"])) == sorted([ROWS[39]["question"], "new"])
    assert sorted(questions(splits["train"])) == sorted(row["question"] for row in ROWS[5:39])
    assert "6 training questions" in capsys.readouterr().out
    splits = split(validation=ROWS[:5])  # test is drawn, and from the others
    every = [q for part in splits.values() for q in questions(part)]
    assert sorted(every) == sorted(row["question"] for row in ROWS)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (dict(sets=dict(train="none.jsonl", validation="", test="")), r"data\.sets\.train"),
        (dict(columns=dict(problem="prompt", answer="answer")), "question, answer, level"),
        (dict(columns=dict(problem="question", answer="target"), task="math"), "target"),
        (dict(rows=ROWS[:2]), r"data\.sets\.train"),
        (dict(validation=ROWS, test=ROWS), r"data\.sets\.train"),
        (dict(sets=dict(train="", validation="", test="")), r"data\.sets\.train"),
    ],
)
def test_files_that_do_not_fit_are_refused(split, changes, said):
    with pytest.raises(UserError, match=said):
        split(**changes)


def test_another_suffix_is_refused(split, tmp_path):
    (tmp_path / "rows.txt").write_text("What?")
    with pytest.raises(UserError, match=r"rows\.txt"):
        split(sets=dict(train=str(tmp_path / "rows.txt"), validation="", test=""))


def test_a_fresh_model_can_write_every_character_of_the_file(split):
    rows = [
        *({"question": f"größe {i}", "answer": "日"} for i in range(9)),
        {"question": "x", "answer": "", "solution": "é"},
    ]
    found = characters(split(rows), "Übe!")
    assert {*"größeÜ日éabcXYZ019~\n"} <= set(found)
    assert len(found) == len(set(found))


def test_a_prompt_carries_the_row_for_a_reward_function_alone(split, tmp_path):
    rows = [{**row, "huge": 10**40} for row in ROWS]
    record = split(rows)["train"][0]
    tokenizer = make_character_tokenizer("0123456789+?", tmp_path / "tokenizer")
    make = lambda keep: PromptTemplate(
        tokenizer, task="function", max_prompt_tokens=9, instruction="", keep_metadata=keep
    ).make_prompt(record, 0)
    assert json.loads(make(keep=True).metadata) == record.metadata
    assert make(keep=False).metadata == ""
