"""The builders of public releases, on small files in their schemas."""

import hashlib
import json
import socket
import time
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from bucket import emulated
from etils import epath

from oapl_jax.data import records, samples
from oapl_jax.data.prompts import Prompts
from oapl_jax.data.public import releases, tables
from oapl_jax.data.public.kinds import KINDS
from oapl_jax.data.public.releases import open_set, open_splits, percentile, prepare, report_of
from oapl_jax.data.records import Joined, Record, user
from oapl_jax.errors import UserError

ROWS = 6
LCB = dict(start="2024-08-01", end="2025-02-01", max_tests=0)
DEEPCODER = "agentica-org/DeepCoder-Preview-Dataset"
# Name -> kind, directory, files, rows, options.
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
    """The arguments of `prepare`, by name."""

    def arguments(kind, path, files):
        rows = 5 * ROWS if kind == "livecodebench" else ROWS
        return dict(
            kind=kind,
            path=str(root / path),
            files=(files,),
            rows=rows,
            part=(0, 100),
            options=OPTIONS.get(kind, {}),
        )

    return {name: arguments(*line) for name, line in SETS.items()}


@pytest.fixture
def table(tmp_path):
    """Prepares rows that are written as JSON Lines."""

    def prepared(written, *, columns=None, task="math", max_tests=0, name="mine", **changes):
        file = tmp_path / "rows.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in written))
        columns = columns or {"problem": "q", "answer": "a"}
        options = dict(task=task, columns=columns, max_tests=max_tests)
        arguments = dict(kind="table", path=str(file), files=(), rows=0, part=(0, 100))
        arguments |= dict(options=options, data_dir=str(tmp_path / "data")) | changes
        builder = prepare(name, section="data.sets", **arguments)
        return list(records.load(builder, split=releases.SPLIT)), report_of(builder)

    return prepared


@pytest.mark.parametrize("name", SETS)
def test_every_release_becomes_records(name, sets, tmp_path):
    found = list(open_set(name, section="data.sets", data_dir=str(tmp_path), sets=sets))
    expected = 2 * ROWS if name == "livecodebench" else ROWS  # August and October
    assert len(found) == len({r.id for r in found}) == expected
    for record in found:
        assert record.source == name
        assert [m["role"] for m in record.messages] == ["user"]
        if SETS[name][0] in OPTIONS:
            assert record.task == "code"
            tests = json.loads(record.answer)
            assert len(tests["tests"]) == (3 if name == "livecodebench" else 2)
            # The samples' problems add their number, which stands last in the name or the text.
            name_or_text = tests["name"].replace("_", " ") or record.question[:-1]
            number = int(name_or_text.split()[-1])
            for given, wanted in tests["tests"]:
                assert int(wanted) == int(given) + number
        else:
            assert record.task == "math"
            numbers = [int(w) for w in record.question.replace("$", " ").split() if w.isdigit()]
            assert sum(numbers) == int(record.answer)


def test_files_may_lie_in_a_bucket_and_prepared_data_may_not(sets, root, tmp_path):
    with emulated("releases") as bucket:
        samples.write(f"{bucket}/all", ROWS)
        there = {
            name: one | {"path": one["path"].replace(str(root), f"{bucket}/all")}
            for name, one in sets.items()
        }
        for name in ("deepscaler", "aime25", "livecodebench"):  # JSON, Parquet, JSON Lines
            mine, theirs = (
                open_set(name, section="data.sets", data_dir=str(tmp_path / place), sets=which)
                for place, which in (("local", sets), ("bucket", there))
            )
            assert list(mine) == list(theirs)
        with pytest.raises(UserError, match="data_dir=gs://releases/data is in an object store"):
            open_set("gsm8k", section="data.sets", data_dir=f"{bucket}/data", sets=there)


def test_nothing_is_fetched(sets, tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("the network was asked")

    for name in ("connect", "connect_ex", "sendto"):
        monkeypatch.setattr(socket.socket, name, refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    with pytest.raises(AssertionError, match="the network was asked"):
        socket.create_connection(("127.0.0.1", 9))
    for name in sets:
        assert open_set(name, section="data.sets", data_dir=str(tmp_path), sets=sets)


def test_what_else_is_known(sets, tmp_path):
    first = {
        name: min(
            open_set(name, section="data.sets", data_dir=str(tmp_path), sets=sets),
            key=lambda r: r.question,
        )
        for name in ("aime24", "aime25", "math500")
    }
    assert first["aime24"].metadata == {"number": 0, "type": []}
    assert first["aime25"].metadata == {"number": 1, "type": ["Algebra"]}
    assert first["math500"].difficulty == "1"
    assert first["math500"].metadata == {
        "unique_id": "test/algebra/0.json",
        "subject": "Algebra",
    }
    answers = [
        record.answer
        for record in open_set("gsm8k", section="data.sets", data_dir=str(tmp_path), sets=sets)
    ]
    assert all(answer.isdigit() for answer in answers)
    assert max(map(int, answers)) > 1000  # "1,009" in the file


def test_rows_that_are_left_out_are_counted_with_their_reason(table, caplog):
    rows = [
        {"q": "one", "a": 1},
        {"q": "", "a": "2"},
        {"q": "three", "a": None},
        {"q": "  one ", "a": "another answer"},
        {"q": "four", "a": ["4"]},
        {"q": "five", "a": " "},
        {"q": "six\ud800", "a": "6"},
        {"q": "seven", "a": 7.5},
    ]
    found, report = table(rows, rows=8)
    assert {(r.question, r.answer) for r in found} == {("one", "1"), ("seven", "7.5")}
    assert (report.rows, report.kept) == (8, 2)
    assert report.left_out == {
        "no problem": 1,
        "no answer": 2,
        "repeats an earlier problem": 1,
        "a cell is neither text nor a number": 1,
        "text that is not Unicode": 1,
    }
    assert report.examples["no answer"] == [2, 5]
    assert report.rows == report.kept + report.left_out.total()
    assert caplog.messages[-1].startswith("mine: 8 rows, 2 kept; left out: 2 no answer, 1 ")


def test_the_id_is_of_the_words_and_of_the_task(table):
    one = table([{"q": "a b  c", "a": 1}])[0][0]
    (same,), report = table([{"q": "a\nb c", "a": 2}, {"q": "a b c ", "a": 3}])
    assert (same.id, same.answer) == (one.id, "2")
    assert report.left_out == {"repeats an earlier problem": 1}
    for other in (table([{"q": "a b C", "a": 1}]), table([{"q": "a b c", "a": 1}], task="code")):
        assert other[0][0].id != one.id


def test_another_number_of_rows_is_refused_and_leaves_nothing(table, tmp_path):
    rows = [{"q": str(i), "a": i} for i in range(5)]
    with pytest.raises(UserError, match=r"sets\.mine: the files hold 5 rows, and data\.sets\.mine"):
        table(rows, rows=6)
    assert not [*tmp_path.rglob("*.array_record*"), *tmp_path.rglob("dataset_info.json")]
    assert len(table(rows, rows=5)[0]) == 5


def test_no_row_is_fit(table):
    with pytest.raises(UserError, match=r"no row is fit to be a problem \(1 rows, 0 kept; left"):
        table([{"q": "one", "a": None}])


def test_a_column_is_missing(table):
    with pytest.raises(UserError, match=r"row 2 of .* has no column a \(has: q\)"):
        table([{"q": "one", "a": 1}, {"q": "two"}])


def test_a_table_of_conversations_of_any_task(table):
    chat = [{"role": "system", "content": "s"}, {"role": "user", "content": "u", "name": "x"}]
    rows = [
        {"chat": chat, "label": "l", "grade": 3},
        {"chat": [], "label": "l", "grade": 3},
        {"chat": ["u"], "label": "l", "grade": 3},
        {"chat": [{"role": "user"}], "label": "l", "grade": 3},
    ]
    columns = {"messages": "chat", "answer": "label", "difficulty": "grade"}
    (record,), report = table(rows, columns=columns, task="chain_sum")
    assert record.messages == ({"role": "system", "content": "s"}, *user("u"))
    assert (record.task, record.difficulty, record.question) == ("chain_sum", "3", "u")
    assert report.left_out == {
        "messages that are not a list": 1,
        "a message without role or content": 2,
    }


def test_a_table_may_be_parquet(table, tmp_path):
    rows = [
        {"chat": [{"role": "user", "content": "u"}], "label": 7, "grade": "easy", "unread": 1.5},
        {"chat": [{"role": "user", "content": "v"}], "label": None, "grade": "", "unread": 0.0},
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    columns = {"messages": "chat", "answer": "label", "difficulty": "grade"}
    (record,), report = table([], columns=columns, path=str(tmp_path / "rows.parquet"))
    assert (record.messages, record.answer, record.difficulty) == (user("u"), "7", "easy")
    assert report.left_out == {"no answer": 1}


def test_a_table_of_programs(table):
    tests = {"inputs": ["1", "22"], "outputs": ["2", "3"]}
    rows = [
        {"q": "P", "t": tests, "code": "", "f": ""},
        {"q": "Q", "t": {"inputs": [[1], [22]], "outputs": [2, 3]}, "code": "def f(x):", "f": "f"},
        {"q": "R", "t": "[]", "code": "", "f": ""},
    ]
    columns = {"problem": "q", "tests": "t", "starter_code": "code", "name": "f"}
    found, report = table(rows, columns=columns, task="code", max_tests=1)
    by_kind = {json.loads(r.answer)["kind"]: r for r in found}
    assert json.loads(by_kind["stdin"].answer)["tests"] == [["22", "3"]]
    assert json.loads(by_kind["call"].answer)["name"] == "f"
    assert "def f(x):" in by_kind["call"].question
    assert report.left_out == {"no tests": 1}


@pytest.mark.parametrize(
    "columns",
    [
        {"problem": "q"},
        {"answer": "a"},
        {"problem": "q", "messages": "m", "answer": "a"},
        {"problem": "q", "answer": "a", "tests": "t"},
        {"problem": "q", "answer": "a", "hint": "h"},
        {"messages": "q", "tests": "t"},
    ],
)
def test_a_map_of_columns_that_does_not_work(columns, table):
    with pytest.raises(UserError, match=r"data\.sets\.mine\.options\.columns"):
        table([{"q": "1", "a": 1}], columns=columns)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "aime"}, r"sets\.gsm8k\.kind='aime' is not one of deepscaler, .*, table"),
        ({"options": {"max_tests": 1}}, r"options do not fit kind gsm8k: .*max_tests"),
        ({"kind": "deepcoder"}, "options do not fit kind deepcoder: .*max_tests"),
        ({"kind": "table"}, "options do not fit kind table: "),
        ({"part": (50, 50)}, r"part=\(50, 50\) is not two numbers"),
        ({"part": (0, 101)}, "not two numbers"),
        ({"files": ("*.csv",)}, "no file matches"),
        ({"path": "/nowhere"}, "docs/data.md"),
        ({"colour": 1}, r"data\.sets\.gsm8k: .*colour"),
    ],
)
def test_settings_that_do_not_fit(changes, message, sets, tmp_path):
    with pytest.raises(UserError, match=message):
        open_set(
            "gsm8k",
            section="data.sets",
            data_dir=str(tmp_path),
            sets={"gsm8k": sets["gsm8k"] | changes},
        )


def test_parts_are_disjoint_and_together_all(table):
    rows = [{"q": f"problem {i}", "a": i} for i in range(400)]
    whole = {r.id for r in table(rows)[0]}
    train, report = table(rows, part=(0, 90))
    rest, _ = table(rows, part=(90, 100))
    assert {r.id for r in train} | {r.id for r in rest} == whole
    assert len(train) + len(rest) == 400
    assert 15 < len(rest) < 75
    assert report.left_out == {"outside of part": len(rest)}
    assert [percentile(i) for i in ("0000", "028f", "0290", "ffff")] == [0, 0, 1, 99]


def test_it_is_built_once_and_again_if_settings_or_files_change(sets, root, tmp_path, monkeypatch):
    def build(**changes):
        return prepare(
            "gsm8k", section="data.sets", data_dir=str(tmp_path), **sets["gsm8k"] | changes
        ).data_path

    first = build()
    file = next((root / "openai/gsm8k/main").glob("train-*"))
    copy = tmp_path / "copy"
    copy.mkdir()
    (copy / file.name).write_bytes(file.read_bytes())
    elsewhere = build(path=str(copy), files=("train-*.parquet",))
    assert build(rows=0) != first
    with monkeypatch.context() as patched:
        patched.setattr(releases, "records", None)  # a second build would call it
        assert build() == first == elsewhere  # equal files make an equal data set
    (copy / file.name).write_bytes(file.read_bytes() + b"more")
    with pytest.raises(UserError, match="damaged"):
        build(path=str(copy), files=("train-*.parquet",))


def test_other_content_of_the_same_size_is_another_data_set(table):
    assert [r.answer for r in table([{"q": "one", "a": 1}])[0]] == ["1"]
    assert [r.answer for r in table([{"q": "one", "a": 2}])[0]] == ["2"]


def test_of_a_large_file_only_the_size_counts(tmp_path, monkeypatch):
    file = epath.Path(tmp_path) / "x.jsonl"
    file.write_text("abc")
    assert tables.fingerprint(file) == ["x.jsonl", 3, hashlib.sha256(b"abc").hexdigest()]
    monkeypatch.setattr(tables, "HASHED", 2)
    assert tables.fingerprint(file) == ["x.jsonl", 3, ""]


def test_a_split_of_several_sets(sets, tmp_path):
    splits = open_splits(
        task="math",
        data_dir=str(tmp_path),
        sets=sets,
        train=("deepscaler",),
        validation=("aime24",),
        test=("aime25", "hmmt25_feb", "brumo25"),
    )
    assert [r.source for r in splits["test"]] == (
        ["aime25"] * ROWS + ["hmmt25_feb"] * ROWS + ["brumo25"] * ROWS
    )
    assert splits["test"][-1] == splits["test"][3 * ROWS - 1]
    with pytest.raises(IndexError):
        splits["test"][3 * ROWS]
    assert {r.source for r in splits["train"]} == {"deepscaler"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train": ("imo",)}, "'imo' is not one of data.sets: deepscaler, "),
        ({"test": ()}, "data.test names no data set"),
        ({"test": ("aime25", "taco")}, r"data\.sets\.taco is of task code, and data\.task=math"),
    ],
)
def test_splits_that_can_not_be(changes, message, sets, tmp_path):
    names = dict(train=("deepscaler",), validation=("aime24",), test=("aime25",))
    with pytest.raises(UserError, match=message):
        open_splits(task="math", data_dir=str(tmp_path), sets=sets, **names | changes)


def test_a_large_split_is_read_record_by_record(sets, tmp_path, monkeypatch):
    small = open_set("deepscaler", section="data.sets", data_dir=str(tmp_path), sets=sets)
    monkeypatch.setattr(records, "IN_MEMORY", 0)
    large = open_set("deepscaler", section="data.sets", data_dir=str(tmp_path), sets=sets)
    assert isinstance(small._stored, list)
    assert not isinstance(large._stored, list)
    assert list(large) == list(small)
    assert large[-2] == small[-2]


def test_a_hundred_thousand_prompts_are_read_in_five_seconds(tmp_path):
    """A tenth of them, in CPU time, and the best of three: other work on the machine costs that."""
    count = 10_000
    lines = (json.dumps({"q": f"Problem {i}. " + "words " * 60, "a": i}) for i in range(count))
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    options = dict(task="math", columns={"problem": "q", "answer": "a"}, max_tests=0)
    mine = dict(kind="table", path=str(tmp_path / "rows.jsonl"), files=(), rows=count)
    settings = dict(
        section="data.sets",
        data_dir=str(tmp_path / "data"),
        sets={"mine": mine | dict(part=(0, 100), options=options)},
    )
    open_set("mine", **settings)  # built once
    tokenizer = SimpleNamespace(apply_chat_template=lambda *_, **__: [1])
    taken = []
    for _ in range(3):
        start = time.process_time()
        prompts = Prompts(
            open_set("mine", **settings),
            tokenizer,
            task="math",
            seed=0,
            max_prompt_tokens=1,
            instruction="Think.",
            host=0,
            hosts=1,
        )
        ids = {prompt.id for prompt in islice(prompts, count)}
        taken.append(time.process_time() - start)
        assert len(ids) == count
    assert min(taken) < 5 * count / 100_000


def test_joined_parts():
    record = lambda i: Record(str(i), user(str(i)), "", "math", {})
    joined = Joined([[record(0)], [record(1), record(2)], [record(3)]])
    assert [r.id for r in joined] == ["0", "1", "2", "3"]
    assert joined[-1].id == "3"


def test_the_samples_are_of_every_kind(root):
    assert {line[0] for line in SETS.values()} == set(KINDS)
    written = {str(p.relative_to(root).parent) for p in Path(root).rglob("*.*") if p.is_file()}
    for _, path, files in SETS.values():
        assert str((epath.Path(path) / files).parent) in written
