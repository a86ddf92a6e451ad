"""Overlap of training and evaluation problems, and the audit command over a configuration."""

import json
import runpy
import subprocess
import sys
import textwrap

import pytest

from oapl_jax.audit import audit_releases, sections
from oapl_jax.config import Config
from oapl_jax.data import samples
from oapl_jax.data.overlap import find_overlap
from oapl_jax.data.records import Record, user
from oapl_jax.errors import UserError

WORDS = [f"word{i}" for i in range(40)]


def record(name, text, source="eval"):
    return Record(name, user(text), "", "math", {}, source)


def words(first, last):
    return " ".join(WORDS[first:last])


def found(train, evaluation):
    result = find_overlap(
        [record(f"t{i}", text, "train") for i, text in enumerate(train)],
        [record(f"e{i}", text) for i, text in enumerate(evaluation)],
    )
    return result["evaluation"]["eval"]


@pytest.mark.parametrize(
    ("one", "other", "equal"),
    [
        ("Find $x^2 + 1$.", "find  x^2+1.", True),
        (r"Let \( a \) and \[b\]", "let a\nand b", True),
        (r"\left(a\,b\right) \quad c", "(ab)c", True),
        ("ﬁnd ①", "find 1", True),
        (r"\displaystyle \frac{1}{2}", r"\frac{1}{2}", True),
        ("Find 2+3.", "Find 2-3.", False),
        ("Find 12.", "Find 21.", False),
        (r"a \leftarrow b", "a arrow b", False),
        (r"\lefty", "y", False),
    ],
)
def test_equal_after_normalisation(one, other, equal):
    part = found([one], [other])
    assert (part["exact"], len(part["found"])) == ({"train": equal}, equal)


def test_finds_thirteen_words_in_a_row_and_not_twelve():
    # 20 words have 8 runs of 13; the first 14 words hold two of them.
    part = found([words(0, 14)], [words(0, 20)])
    assert part["ngram"] == {"train": 1}
    hit = dict(id="e0", text=words(0, 20)[:100], train_source="train", train_id="t0")
    assert part["found"] == [hit | dict(exact=False, share=0.25)]
    assert found([words(0, 13).upper()], [words(0, 20)])["found"][0]["share"] == 0.125
    assert found([words(0, 12)], [words(0, 20)])["found"] == []
    assert found([words(0, 12) + " other " + words(12, 20)], [words(0, 20)])["found"] == []


def test_ignores_symbols_between_words_and_not_their_order():
    assert found(["; ".join(WORDS[:13])], [words(0, 20)])["ngram"] == {"train": 1}
    backwards = " ".join(reversed(WORDS[:20]))
    assert found([backwards], [words(0, 20)])["ngram"] == {"train": 0}


def test_the_share_is_over_all_training_problems_and_the_nearest_is_named():
    # Runs 0-1 stand in the first training problem, 5-7 in the second, 6-7 in the third: 5 of 8.
    train = [words(0, 14), words(5, 20), words(6, 20)]
    (hit,) = found(train, [words(0, 20)])["found"]
    assert (hit["share"], hit["train_id"]) == (0.625, "t1")


def test_counts_by_source_and_short_problems():
    train = (("a", words(0, 20), "one"), ("b", words(20, 40), "two"), ("c", "Short.", "two"))
    evaluation = (("1", words(0, 20), "x"), ("2", words(19, 40), "x"))
    evaluation += (("3", "short.", "y"), ("4", "Shorter.", "y"))
    made = lambda rows: (record(*row) for row in rows)
    result = find_overlap(made(train), made(evaluation))
    assert result["train"] == {"one": 1, "two": 2}
    x, y = result["evaluation"]["x"], result["evaluation"]["y"]
    hits = lambda part: [
        (h["id"], h["train_id"], h["exact"], h["share"]) for h in part.pop("found")
    ]
    assert hits(x) == [("1", "a", True, 1.0), ("2", "b", False, round(8 / 9, 3))]
    assert hits(y) == [("3", "c", True, 0.0)]
    counts = lambda one, two: {"one": one, "two": two}
    assert x == {"problems": 2, "short": 0, "exact": counts(1, 0), "ngram": counts(1, 1)}
    assert y == {"problems": 2, "short": 2, "exact": counts(0, 1), "ngram": counts(0, 0)}


# The command


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("releases")
    samples.write(str(root), 4)
    return root


@pytest.fixture
def config(tmp_path, root):
    """A file with a configuration that names two releases."""
    deepscaler = "agentica-org/DeepScaleR-Preview-Dataset"
    text = f"""
        from configs import competition_math
        from ml_collections import ConfigDict

        def release(kind, path, file, rows):
            return dict(kind=kind, path=path, files=(file,), rows=rows, part=(0, 100), options={{}})

        def get_config():
            math500 = "{root / "HuggingFaceH4/MATH-500"}"
            config = competition_math.get_config().unlock()
            config.data.update(data_dir="{tmp_path / "data"}", train=("deepscaler",))
            config.data.sets = ConfigDict(dict(
                deepscaler=release("deepscaler", "{root / deepscaler}", "deepscaler.json", 0),
                math500=release("math500", math500, "test.jsonl", 4),
                gone=release("math500", "/nowhere", "*", 4),
            ))
            lines = release("math500", math500, "test.jsonl", 0)
            config.benchmarks = ConfigDict(dict(lines=lines))
            return config.lock()
    """
    (tmp_path / "config.py").write_text(textwrap.dedent(text))
    return tmp_path / "config.py"


def audit(config, *against):
    settings = runpy.run_path(str(config))["get_config"]().to_dict()
    settings = Config.from_dict(settings)
    return audit_releases(settings.data, settings.benchmarks, against)


def run(config, *flags):
    """The command; its exit code, output and audit.json."""
    out = config.parent / "out"
    command = [sys.executable, "-m", "oapl_jax.audit", f"--config={config}", f"--workdir={out}"]
    done = subprocess.run([*command, *flags], capture_output=True, text=True, timeout=120)
    file = out / "audit.json"
    return done, json.loads(file.read_text()) if file.exists() else None


def test_the_command_finds_an_added_problem(config, root):
    done, result = run(config, "--against=math500")
    assert done.returncode == 0, done.stderr
    assert result["evaluation"]["math500"]["found"] == []
    assert result["rows"]["deepscaler"]["kept"] == 4

    file = root / "agentica-org/DeepScaleR-Preview-Dataset/deepscaler.json"
    line = (root / "HuggingFaceH4/MATH-500/test.jsonl").read_text().splitlines()[2]
    rows = json.loads(file.read_text())
    rows.append({"problem": json.loads(line)["problem"].upper(), "answer": "1"})
    file.write_text(json.dumps(rows))
    done, result = run(config, "--against=math500")
    assert done.returncode == 1, done.stderr
    (hit,) = result["evaluation"]["math500"]["found"]
    assert (hit["exact"], hit["text"]) == (True, json.loads(line)["problem"])
    table = [line.split() for line in done.stdout.splitlines()]
    assert ["math500", "4", "4", "deepscaler", "5", "1", "0"] in table
    result = audit(config, "lines")  # a benchmark, of the same file
    assert len(result["evaluation"]["lines"]["found"]) == 1


def test_the_command_rejects_unknown_and_missing_sets(config):
    done, _ = run(config, "--against=imo")
    assert done.returncode == 2
    assert "'imo'" in done.stderr
    with pytest.raises(UserError, match=r"data\.sets\.gone\.path=/nowhere"):
        audit(config)  # against all but train


def test_a_name_in_both_sections_must_be_the_same_set():
    with pytest.raises(UserError, match=r"data\.sets\.a .*config\.benchmarks\.a"):
        sections({"a": dict(rows=1)}, {"a": dict(rows=2)})
    same = sections({"a": dict(rows=1)}, {"a": dict(rows=1), "b": {}})
    assert [same[name][0] for name in ("a", "b")] == ["data.sets", "config.benchmarks"]
