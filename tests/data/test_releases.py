"""The builders of public releases, on small files in their schemas."""

import dataclasses
import hashlib
import json
import os
import socket
import time
from contextlib import suppress
from datetime import date, datetime
from decimal import Decimal
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from bucket import emulated
from etils import epath

from oapl_jax.config import PublicDataConfig, ReleaseConfig
from oapl_jax.data import records, samples
from oapl_jax.data.prompts import PromptStream, PromptTemplate
from oapl_jax.data.public import releases, tables
from oapl_jax.data.public.readers import RELEASES, choose_reader
from oapl_jax.data.public.releases import open_set, open_splits, prepare, report_of
from oapl_jax.data.records import Concatenated, Record, position, to_row, user
from oapl_jax.errors import UserError

ROWS = 6
LCB = dict(start="2024-08-01", end="2025-02-01", max_tests=0)
DEEPCODER = "agentica-org/DeepCoder-Preview-Dataset"
# Name -> kind, directory, files.
SETS = {
    "deepscaler": ("deepscaler", "agentica-org/DeepScaleR-Preview-Dataset", "deepscaler.json"),
    "aime24": ("competition", "HuggingFaceH4/aime_2024", "data/train-*.parquet"),
    "aime25": ("competition", "MathArena/aime_2025", "data/train-*.parquet"),
    "hmmt25_feb": ("competition", "MathArena/hmmt_feb_2025", "data/train-*.parquet"),
    "hmmt25_nov": ("competition", "MathArena/hmmt_nov_2025", "data/train-*.parquet"),
    "brumo25": ("competition", "MathArena/brumo_2025", "data/train-*.parquet"),
    "math500": ("math500", "HuggingFaceH4/MATH-500", "test.jsonl"),
    "gsm8k": ("gsm8k", "openai/gsm8k", "main/train-*.parquet"),
    "gsm8k_test": ("gsm8k", "openai/gsm8k", "main/test-*.parquet"),
    "primeintellect": ("deepcoder", DEEPCODER, "primeintellect/train-*.parquet"),
    "taco": ("deepcoder", DEEPCODER, "taco/train-*.parquet"),
    "lcbv5": ("deepcoder", DEEPCODER, "lcbv5/train-*.parquet"),
    "lcbv5_test": ("deepcoder", DEEPCODER, "lcbv5/test-*.parquet"),
    "livecodebench": ("livecodebench", "livecodebench/code_generation_lite", "test*.jsonl"),
}
OPTIONS = {"deepcoder": dict(max_tests=15), "livecodebench": LCB}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("releases")
    samples.write(str(root), ROWS)
    return root


@pytest.fixture
def sets(root):
    """Settings of all releases, by name."""

    def release(kind, path, files):
        rows = 5 * ROWS if kind == "livecodebench" else ROWS
        where = dict(kind=kind, path=str(root / path), files=(files,))
        return ReleaseConfig(**where, rows=rows, part=(0, 100), options=OPTIONS.get(kind, {}))

    return {name: release(*line) for name, line in SETS.items()}


@pytest.fixture
def opened(sets, tmp_path):
    """Opens one of `sets` by name, with changed settings."""

    def opened(name, **changes):
        changed = sets | {name: dataclasses.replace(sets[name], **changes)}
        return open_set(name, changed, section="data.sets", data_dir=str(tmp_path))

    return opened


@pytest.fixture
def table(tmp_path):
    """Prepares rows that are written as JSON Lines."""

    def prepared(written, *, columns=None, task="math", max_tests=0, **changes):
        file = tmp_path / "rows.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in written))
        columns = columns or {"problem": "q", "answer": "a"}
        options = dict(task=task, columns=columns, max_tests=max_tests)
        settings = dict(kind="table", path=str(file), files=(), rows=0, part=(0, 100))
        release = ReleaseConfig(**settings | dict(options=options) | changes)
        builder = prepare("mine", release, section="data.sets", data_dir=str(tmp_path / "data"))
        return list(records.load_split(builder, releases.SPLIT)), report_of(builder)

    return prepared


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("the network was asked")

    for name in ("connect", "connect_ex", "sendto"):
        monkeypatch.setattr(socket.socket, name, refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    with pytest.raises(AssertionError, match="the network was asked"):
        socket.create_connection(("127.0.0.1", 9))


@pytest.mark.parametrize("name", SETS)
def test_every_release_becomes_records_without_downloads(name, opened, no_network):
    found = list(opened(name))
    expected = 2 * ROWS if name == "livecodebench" else ROWS  # August and October
    assert len(found) == len({r.id for r in found}) == expected
    for record in found:
        assert record.source == name
        assert [m["role"] for m in record.messages] == ["user"]
        assert record.task == ("code" if SETS[name][0] in OPTIONS else "math")
        if record.task == "code":
            tests = json.loads(record.answer)
            assert len(tests["tests"]) == (3 if name == "livecodebench" else 2)
            # The samples' problems add their number, which stands last in the name or the text.
            name_or_text = tests["name"].replace("_", " ") or record.question[:-1]
            number = int(name_or_text.split()[-1])
            for given, wanted in tests["tests"]:
                assert int(wanted.strip("[]")) == int(given) + number
        else:
            numbers = [int(w) for w in record.question.replace("$", " ").split() if w.isdigit()]
            assert sum(numbers) == int(record.answer)


def test_files_in_a_bucket_are_read_and_prepared_data_is_local(sets, root, tmp_path):
    with emulated("releases") as bucket:
        samples.write(f"{bucket}/all", ROWS)
        there = {
            name: dataclasses.replace(one, path=one.path.replace(str(root), f"{bucket}/all"))
            for name, one in sets.items()
        }
        for name in ("deepscaler", "aime25", "livecodebench"):  # JSON, Parquet, JSON Lines
            mine, theirs = (
                open_set(name, which, section="data.sets", data_dir=str(tmp_path / place))
                for place, which in (("local", sets), ("bucket", there))
            )
            assert list(mine) == list(theirs)
        with pytest.raises(UserError, match=r"data\.data_dir"):
            open_set("gsm8k", there, section="data.sets", data_dir=f"{bucket}/data")


def test_metadata_difficulty_and_final_answers(opened):
    for name, difficulty, metadata in (
        ("aime24", "", {"number": 0, "type": []}),
        ("aime25", "", {"number": 1, "type": ["Algebra"]}),
        ("math500", "1", {"unique_id": "test/algebra/0.json", "subject": "Algebra"}),
    ):
        first = min(opened(name), key=lambda r: r.question)
        assert (first.difficulty, first.metadata) == (difficulty, metadata)
    answers = [record.answer for record in opened("gsm8k")]
    assert all(answer.isdigit() for answer in answers)
    assert max(map(int, answers)) > 1000  # "1,009" in the file


def test_dropped_rows_are_counted_by_reason(table, caplog):
    rows = (("one", 1), ("", "2"), ("three", None), ("  one ", "another answer"), ("four", ["4"]))
    rows += (("five", " "), ("six\ud800", "6"), ("seven", 7.5))
    rows += (("eight", float("nan")), ("nine", float("inf")), ("ten", True), ("long", 10**5000))
    found, report = table([{"q": q, "a": a} for q, a in rows], rows=12)
    kept = {("one", "1"), ("seven", "7.5"), ("long", "1" + "0" * 5000)}
    assert {(r.question, r.answer) for r in found} == kept
    assert (report.rows, report.kept) == (12, 3)
    assert report.dropped == {
        "no problem": 1,
        "no answer": 3,
        "repeats an earlier problem": 1,
        "a cell is neither text nor a number": 3,
        "text that is not Unicode": 1,
    }
    assert report.examples["no answer"] == [2, 5, 8]
    assert report.rows == report.kept + report.dropped.total()
    assert caplog.messages[-1] == f"mine: {report}"


def test_the_id_depends_on_the_words_and_the_task(table):
    one = table([{"q": "a b  c", "a": 1}])[0][0]
    (same,), report = table([{"q": "a\nb c", "a": 2}, {"q": "a b c ", "a": 3}])
    assert (same.id, same.answer) == (one.id, "2")
    assert report.dropped == {"repeats an earlier problem": 1}
    for other in (table([{"q": "a b C", "a": 1}]), table([{"q": "a b c", "a": 1}], task="code")):
        assert other[0][0].id != one.id


def test_rejects_another_number_of_rows_and_leaves_nothing(table, tmp_path):
    rows = [{"q": str(i), "a": i} for i in range(5)]
    with pytest.raises(UserError, match=r"data\.sets\.mine\.rows"):
        table(rows, rows=6)
    assert not [*tmp_path.rglob("*.array_record*"), *tmp_path.rglob("dataset_info.json")]
    assert len(table(rows, rows=5)[0]) == 5


def test_rejects_files_without_problems(table):
    for rows in ([], [{"q": "one", "a": None}]):
        with pytest.raises(UserError, match=r"data\.sets\.mine.*rows\.jsonl"):
            table(rows)
    with pytest.raises(UserError, match=r"row 2 of .*rows\.jsonl"):
        table([{"q": "one", "a": 1}, {"q": "two"}])


def test_a_row_that_python_cannot_hold_is_dropped_alone(table, tmp_path):
    good, deep = '{"q": "one", "a": 1}\n', '{"q": "two", "a": ' + "[" * 10**5 + "]" * 10**5 + "}\n"
    (tmp_path / "deep.jsonl").write_text(deep + good)
    (record,), report = table([], path=str(tmp_path / "deep.jsonl"))
    assert (record.question, report.rows, report.kept) == ("one", 2, 1)


CALL = '{"fn_name": "f", "inputs": [[INPUT]], "outputs": [[1]]}'
CELLS = (
    *(None, True, 1.5, float("nan"), float("inf"), 10**5000, "", " ", "x", "\ud800", b"x"),
    *([], {}, [1], [[1]], ["x"], [{}], [None], {"a": 1}, {"func_name": [1]}, "[]", "{}", "[1"),
    *(Decimal("1.5"), Decimal("NaN"), datetime(2024, 8, 10), date(2024, 8, 10), "[" * 10**5),
    *(CALL, CALL.replace("INPUT", "9" * 60_000), CALL.replace("INPUT", "[" * 5000 + "]" * 5000)),
    {"inputs": [[date(2024, 8, 10)]], "outputs": [1], "fn_name": "f"},
    *([{"input": 1, "output": 2, "type": kind}] for kind in ([1], {}, "stdin_stdout")),
    *([{"input": i, "output": "9" * 60_000, "testtype": "functional"}] for i in ("1", "[1")),
)


@pytest.mark.parametrize(
    ("kind", "row"),
    [
        ("deepscaler", samples.aime_2024(3, 1)),
        ("competition", samples.aime_2024(3, 1) | {"problem_idx": 1, "problem_type": ["A"]}),
        ("math500", samples.math500(3, 1)),
        ("gsm8k", samples.gsm8k(3, 1)),
        *(
            ("deepcoder", one(3, 1))
            for one in (samples.primeintellect, samples.taco, samples.lcbv5)
        ),
        ("livecodebench", samples.livecodebench(3, 1, month=10)),
    ],
)
def test_no_cell_of_a_row_ends_a_build(kind, row):
    reader = choose_reader(kind, OPTIONS.get(kind, {}), setting="data.sets.x")
    to_row(reader.record(row))  # the row itself is a problem
    for column in (*reader.required, *reader.optional):
        for cell in CELLS:
            with suppress(tables.InvalidRow, UnicodeEncodeError):
                "".join(to_row(reader.record(row | {column: cell})).values()).encode()


CHAT = {"messages": "chat", "answer": "label", "difficulty": "grade"}


def test_a_table_of_conversations_of_any_task(table):
    chat = [{"role": "system", "content": "s"}, {"role": "user", "content": "u", "name": "x"}]
    chats = (chat, [], ["u"], [{"role": "user"}])
    rows = [{"chat": chat, "label": "l", "grade": 3} for chat in chats]
    (record,), report = table(rows, columns=CHAT, task="chain_sum")
    assert record.messages == ({"role": "system", "content": "s"}, *user("u"))
    assert (record.task, record.difficulty, record.question) == ("chain_sum", "3", "u")
    assert report.dropped == {
        "messages that are not a list": 1,
        "a message without role or content": 2,
    }


def test_a_table_may_be_parquet(table, tmp_path):
    rows = [
        {"chat": list(user("u")), "label": 7, "grade": "easy", "unread": 1.5},
        {"chat": list(user("v")), "label": None, "grade": "", "unread": 0.0},
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    (record,), report = table([], columns=CHAT, path=str(tmp_path / "rows.parquet"))
    assert (record.messages, record.answer, record.difficulty) == (user("u"), "7", "easy")
    assert report.dropped == {"no answer": 1}


def test_a_table_of_programs(table):
    tests = {"inputs": ["1", "22"], "outputs": ["2", "3"]}
    calls = {"inputs": [[1], [22]], "outputs": [2, 3]}
    rows = (("P", tests, "", ""), ("Q", calls, "def f(x):", "f"), ("R", "[]", "", ""))
    rows = [dict(zip(("q", "t", "code", "f"), row, strict=True)) for row in rows]
    columns = {"problem": "q", "tests": "t", "starter_code": "code", "name": "f"}
    found, report = table(rows, columns=columns, task="code", max_tests=1)
    by_kind = {json.loads(r.answer)["kind"]: r for r in found}
    assert json.loads(by_kind["stdin"].answer)["tests"] == [["22", "3"]]
    assert json.loads(by_kind["taco"].answer)["name"] == "f"
    assert "def f(x):" in by_kind["taco"].question
    assert report.dropped == {"no tests": 1}


@pytest.mark.parametrize(
    "columns",
    [
        *("problem", "answer", "problem messages answer", "problem answer tests"),
        *("problem answer hint", "messages tests"),
    ],
)
def test_rejects_a_map_of_columns(columns, table):
    with pytest.raises(UserError, match=r"data\.sets\.mine\.options\.columns"):
        table([{"q": "1", "a": 1}], columns=dict.fromkeys(columns.split(), "q"))


@pytest.mark.parametrize(
    ("changes", "setting"),
    [
        ({"kind": "aime"}, "kind"),
        ({"options": {"max_tests": 1}}, "options .*max_tests"),
        ({"kind": "deepcoder"}, "options .*max_tests"),
        ({"kind": "table"}, "options"),
        ({"part": (50, 50)}, "part"),
        ({"part": (60, 50)}, "part"),
        ({"files": ("*.csv",)}, "files"),
        ({"path": "/nowhere"}, "path"),
    ],
)
def test_rejects_settings(changes, setting, opened):
    with pytest.raises(UserError, match=rf"data\.sets\.gsm8k\.{setting}"):
        opened("gsm8k", **changes)


def test_parts_are_disjoint_and_together_all(table):
    rows = [{"q": f"problem {i}", "a": i} for i in range(400)]
    whole = {r.id for r in table(rows)[0]}
    train, report = table(rows, part=(0, 90))
    rest, _ = table(rows, part=(90, 100))
    assert {r.id for r in train} | {r.id for r in rest} == whole
    assert len(train) + len(rest) == 400
    assert 15 < len(rest) < 75
    assert report.dropped == {"outside of part": len(rest)}
    assert [position(i, 100) for i in ("0000", "028f", "0290", "ffff")] == [0, 0, 1, 99]


def test_a_data_set_is_built_again_only_if_settings_or_files_change(
    sets, root, tmp_path, monkeypatch
):
    def build(**changes):
        release = dataclasses.replace(sets["gsm8k"], **changes)
        builder = prepare("gsm8k", release, section="data.sets", data_dir=str(tmp_path))
        return builder.data_path

    first = build()
    file = next((root / "openai/gsm8k/main").glob("train-*"))
    copy = tmp_path / file.name
    copy.write_bytes(file.read_bytes())
    elsewhere = build(path=str(copy), files=())
    assert build(rows=0) != first
    with monkeypatch.context() as patched:
        patched.setattr(releases, "records", None)  # a second build would call it
        assert build() == first == elsewhere  # equal files make an equal data set
    copy.write_bytes(file.read_bytes() + b"more")
    with pytest.raises(UserError, match="damaged"):
        build(path=str(copy), files=())


@pytest.mark.parametrize("in_memory", [True, False])
@pytest.mark.parametrize(
    ("file", "left"),
    [
        *(("dataset_info.json", left) for left in (0, 20)),
        *(("features.json", left) for left in (None, 0, 20)),
        *(("*.array_record*", left) for left in (None, 0, 5000)),
    ],
)
def test_a_damaged_data_set_is_named(opened, tmp_path, monkeypatch, file, left, in_memory):
    opened("gsm8k")
    (found,) = tmp_path.rglob(file)
    if left is None:
        found.unlink()
    else:
        os.truncate(found, left)
    monkeypatch.setattr(records, "IN_MEMORY", 2**28 if in_memory else 0)
    with pytest.raises(UserError, match=str(found.parent)):
        list(opened("gsm8k"))


@pytest.mark.parametrize("data_dir", ["/proc/nowhere", "file", "file/below"])
def test_a_directory_that_takes_no_data_set_is_named(sets, tmp_path, data_dir):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=rf"data\.data_dir=.*{data_dir}"):
        open_set("gsm8k", sets, section="data.sets", data_dir=str(tmp_path / data_dir))


def test_other_content_of_equal_size_is_another_data_set(table):
    for a in (1, 2):
        assert [r.answer for r in table([{"q": "one", "a": a}])[0]] == [str(a)]


def test_of_a_large_file_only_the_size_counts(tmp_path, monkeypatch):
    file = epath.Path(tmp_path) / "x.jsonl"
    file.write_text("abc")
    assert tables.fingerprint(file) == ["x.jsonl", 3, hashlib.sha256(b"abc").hexdigest()]
    monkeypatch.setattr(tables, "HASHED", 2)
    assert tables.fingerprint(file) == ["x.jsonl", 3, ""]


NAMES = dict(train=("deepscaler",), validation=("aime24",), test=("aime25", "hmmt25_feb"))


def open_named(sets, directory, **names):
    text = dict(task="math", max_prompt_tokens=1, instruction="", data_dir=str(directory))
    return open_splits(PublicDataConfig(sets=sets, **text, **NAMES | names))


def test_a_split_of_several_sets(sets, tmp_path):
    splits = open_named(sets, tmp_path)
    assert {r.source for r in splits["train"]} == {"deepscaler"}
    test = splits["test"]
    assert [r.source for r in test] == ["aime25"] * ROWS + ["hmmt25_feb"] * ROWS
    assert test[-1] == test[2 * ROWS - 1] == list(test)[-1]
    with pytest.raises(IndexError):
        test[2 * ROWS]


@pytest.mark.parametrize(
    ("changes", "setting"),
    [
        ({"train": ("imo",)}, "'imo' .*data.sets"),
        ({"test": ()}, "data.test"),
        ({"test": ("aime25", "taco")}, r"data\.sets\.taco"),
    ],
)
def test_rejects_names_of_splits(changes, setting, sets, tmp_path):
    with pytest.raises(UserError, match=setting):
        open_named(sets, tmp_path, **changes)


def test_a_large_split_is_read_record_by_record(opened, monkeypatch):
    small = list(opened("deepscaler"))
    monkeypatch.setattr(records, "IN_MEMORY", 0)
    large = opened("deepscaler")
    assert list(large) == small
    assert large[-2] == small[-2]


def test_a_hundred_thousand_prompts_are_read_in_five_seconds(tmp_path):
    """Measures a tenth of them, in CPU time, best of three because of other load."""
    count = 10_000
    lines = (json.dumps({"q": f"Problem {i}. " + "words " * 60, "a": i}) for i in range(count))
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    options = dict(task="math", columns={"problem": "q", "answer": "a"}, max_tests=0)
    settings = dict(kind="table", path=str(tmp_path / "rows.jsonl"), files=(), rows=count)
    sets = {"mine": ReleaseConfig(part=(0, 100), options=options, **settings)}
    opened = lambda: open_set("mine", sets, section="data.sets", data_dir=str(tmp_path / "data"))
    opened()  # built once
    first = lambda chat, **_: [ord(chat[-1]["content"][0])]
    tokenizer = SimpleNamespace(apply_chat_template=first, get_chat_template=str)
    template = PromptTemplate(tokenizer, task="math", max_prompt_tokens=1, instruction="Think.")
    taken = []
    for _ in range(3):
        start = time.process_time()
        prompts = PromptStream(opened(), template, seed=0, host=0, hosts=1)
        ids = {prompt.id for prompt in islice(prompts, count)}
        taken.append(time.process_time() - start)
        assert len(ids) == count
    assert min(taken) < 5 * count / 100_000


def test_concatenated_parts():
    records = [Record(str(i), user(""), "", "math", {}) for i in range(4)]
    whole = Concatenated([records[:1], records[1:3], records[3:]])
    assert list(whole) == records
    assert whole[-1] == records[-1]


def test_the_samples_are_of_every_kind(root):
    assert {line[0] for line in SETS.values()} == set(RELEASES)
    written = {str(p.relative_to(root).parent) for p in Path(root).rglob("*.*") if p.is_file()}
    for _, path, files in SETS.values():
        assert str((epath.Path(path) / files).parent) in written
