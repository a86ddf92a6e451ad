"""The command that grades responses: a line of JSON for each."""

import io
import json
import sys

import numpy as np
import pytest
from etils import epath
from ml_collections import ConfigDict

from configs import common
from oapl_jax import grade
from oapl_jax.config import save_config
from oapl_jax.errors import exit_with_code
from oapl_jax.model.tokenizer import make_character_tokenizer
from oapl_jax.rollout.dataset import DatasetWriter
from oapl_jax.structs import Group, Prompt, Rollout

TESTS = {"kind": "stdin", "name": "", "tests": [["2\n", "4\n"], ["3\n", "9\n"]]}


@pytest.fixture
def command(monkeypatch, capsys):
    """Runs the command; returns its exit code, the lines that it printed, and its error."""

    def run(*arguments, lines=()):
        text = "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines)
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode())))
        monkeypatch.setattr(sys, "argv", ["grade", *map(str, arguments)])
        code = 0
        try:
            exit_with_code(grade.main)
        except SystemExit as ended:
            code = ended.code
        printed = capsys.readouterr()
        return code, [json.loads(line) for line in printed.out.splitlines()], printed.err

    return run


def verdicts(graded):
    return [(line["verdict"], line["extracted"]) for line in graded]


def test_each_response_of_a_line_is_graded(command):
    lines = (
        {"response": r"It is \boxed{\frac{1}{2}}.", "reference": "0.5"},
        {"responses": [r"\boxed{5:00}", r"\boxed{8:00}", "I see.\n\n?"], "reference": "8:00"},
        "",
        {"response": r"\boxed{9^{9^{9^{9}}}}", "reference": "7"},
        {"response": r"\boxed{x}", "reference": r"\frac{1}{"},
    )
    code, graded, _ = command("--verifier=math", lines=lines)
    assert code == 0
    assert verdicts(graded) == [
        ("right", r"\frac{1}{2}"),
        ("wrong", "5:00"),
        ("right", "8:00"),
        ("wrong", None),
        ("timeout", r"9^{9^{9^{9}}}"),
        ("error", "x"),
    ]
    assert all(line.keys() == {"verdict", "extracted", "reason"} for line in graded)
    assert all(line["reason"] for line in graded)
    assert "8:00" in graded[1]["reason"]


def test_programs_are_run_on_the_tests_of_a_record(command):
    fenced = lambda code: f"```python\n{code}\n```"
    square = "print(int(input()) ** 2)"
    responses = [fenced(square), fenced("print(4)"), fenced("raise ValueError"), square]
    for reference in (TESTS, json.dumps(TESTS)):
        lines = [{"responses": responses, "reference": reference}]
        code, graded, _ = command("--verifier=code", lines=lines)
        assert code == 0
        assert verdicts(graded) == [
            ("right", square),
            ("wrong", "print(4)"),
            ("error", "raise ValueError"),
            ("wrong", None),
        ]
        assert "test 1" in graded[1]["reason"]


def test_tests_that_can_not_be_read_are_an_error(command):
    lines = [{"response": "```python\n1\n```", "tests": "?"}, {"response": "", "tests": TESTS}]
    code, graded, _ = command("--verifier=code", lines=lines)
    assert code == 0
    assert [line["verdict"] for line in graded] == ["error", "wrong"]


def test_a_document_is_right_at_full_reward(command):
    table = "| a | b |\n|---|---|\n| 1 | 2 |"
    lines = [{"responses": [table, table.replace("2", "3")], "reference": table}]
    _, graded, _ = command("--verifier=documents", lines=lines)
    assert verdicts(graded) == [("right", table), ("wrong", table.replace("2", "3"))]
    assert "text" in graded[1]["reason"]


@pytest.mark.parametrize(
    "bad",
    [
        "{",
        "[]",
        "5",
        '{"response": "5"}',
        '{"reference": "5"}',
        '{"response": 5, "reference": "5"}',
        '{"responses": "5", "reference": "5"}',
        '{"responses": {"5": "5"}, "reference": "5"}',
        *(
            f'{{"response": "5", "reference": {value}}}'
            for value in ("null", "true", "NaN", "1e999", "[5]", "9" * 60_000, "[" * 99_999)
        ),
        b'{"response": "\xff", "reference": "5"}',
        b'{"response": "5", "refer\0ence": "5"}',
        b"\0",
        '{"response": "5", "reference": "5"}'.encode("utf-16"),
    ],
)
def test_a_bad_line_is_named_after_those_before_it_are_graded(command, tmp_path, bad):
    file = tmp_path / "answers.jsonl"
    good = json.dumps({"response": r"\boxed{5}", "reference": "5"}).encode()
    bad = bad.encode() if isinstance(bad, str) else bad
    file.write_bytes(b"\n".join((b"\xef\xbb\xbf" + good, bad, good)))
    code, graded, error = command("--verifier=math", file)
    assert code == 2
    assert verdicts(graded) == [("right", "5")]
    assert "answers.jsonl, line 2" in error


def test_what_is_missing_is_named(command, tmp_path):
    for arguments, name in (
        ([], "--verifier"),
        (["--verifier=math", tmp_path / "none.jsonl"], "none.jsonl"),
        (["--verifier=math", f"--workdir={tmp_path}"], "--workdir"),
        ([f"--record={tmp_path / 'none'}", "--tokenizer=x"], "--record"),
        ([f"--record={tmp_path / 'none'}"], "--record"),
        ([f"--record={tmp_path}"], "--tokenizer"),
        (["--verifier=math", "--row=1"], "--record"),
        (["--verifier=math", tmp_path], str(tmp_path)),
        ([tmp_path / "some.jsonl", f"--record={tmp_path / 'none'}"], "--record"),
    ):
        code, graded, error = command(*arguments)
        assert (code, graded) == (2, [])
        assert name in error


def test_a_closed_standard_input_is_named(command, monkeypatch):
    monkeypatch.setattr(io, "TextIOWrapper", lambda _: None)
    code, graded, error = command("--verifier=math")
    assert (code, graded) == (2, [])
    assert "standard input" in error


@pytest.fixture
def run(tmp_path):
    """A workdir with two recorded groups, whose tokens are characters."""
    responses = [
        (r"\boxed{1/2}", "stop"),
        (r"\boxed{2}", "stop"),
        (r"\boxed{1/2} or", "length"),
    ]
    text = "".join(response for response, _ in responses) + "0123456789,"
    tokenizer = make_character_tokenizer("".join(sorted(set(text))), tmp_path / "run" / "model")

    def group(index, task, answer, said):
        tokens = [np.array(tokenizer.encode(text), np.int32) for text, _ in said]
        rollouts = tuple(
            Rollout(ids, np.zeros(len(ids), np.float32), 0, reason)
            for ids, (_, reason) in zip(tokens, said, strict=True)
        )
        prompt = Prompt(f"id{index}", index, np.zeros(1, np.int32), "?", answer, task)
        return Group(prompt, rollouts, np.zeros(len(said), np.float32))

    writer = DatasetWriter(
        epath.Path(tmp_path / "run" / "rollouts"),
        {"task": "math"},
        groups_per_shard=2,
        weights_digest=lambda version: "",
    )
    writer.add(group(0, "math", "0.5", responses))
    writer.add(group(1, "chain_sum", "7", [("3,7", "stop"), ("7,3", "stop")]))
    writer.close()
    config = ConfigDict(
        {"num_steps": 1, "model": {"path": ""}, "rewards": common.rewards()}
    ).to_dict()
    save_config(epath.Path(tmp_path / "run"), config)
    return tmp_path / "run"


def test_recorded_rollouts_are_graded_by_the_verifier_of_their_task(command, run):
    (shard,) = (run / "rollouts").glob("groups-*")
    for record in (run / "rollouts", shard):
        for arguments in ([f"--workdir={run}"], [f"--tokenizer={run / 'model'}"]):
            code, graded, error = command(f"--record={record}", "--row=0", *arguments)
            assert (code, error) == (0, "")
            assert verdicts(graded) == [("right", "1/2"), ("wrong", "2"), ("wrong", "1/2")]
            assert "truncated" in graded[2]["reason"]
        code, graded, _ = command(f"--record={record}", "--row=1")  # of the run around it
        assert (code, verdicts(graded)) == (0, [("right", "7"), ("wrong", "3")])
        assert "7" in graded[1]["reason"]
    code, _, error = command(f"--record={run / 'rollouts'}", "--row=2")
    assert code == 2
    assert "--row" in error


def test_a_damaged_shard_is_named(command, run):
    (shard,) = (run / "rollouts").glob("groups-*")
    whole = shard.read_bytes()
    middle = len(whole) // 2
    flipped = whole[:middle] + bytes(byte ^ 255 for byte in whole[middle:])
    for content in (whole[:middle], flipped, b"", b"no record"):
        shard.write_bytes(content)
        code, graded, error = command(f"--record={shard}")
        assert (code, graded) == (2, [])
        assert shard.name in error


def test_rollouts_of_a_run_with_a_reward_function_are_judged_by_it(
    command, run, tmp_path, monkeypatch
):
    code = "def reward(record, response): return float('2' in response)"
    (tmp_path / "my_rewards.py").write_text(code)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    record, place = run / "rollouts", run / "config.json"
    config = json.loads(place.read_text())
    config["rewards"]["function"] = "my_rewards:reward"
    place.write_text(json.dumps(config))
    code, graded, error = command(f"--record={record}")
    assert (code, error) == (0, "")
    assert [line["verdict"] for line in graded] == ["right", "right", "wrong"]
    assert command(f"--record={record}", "--verifier=math")[1][1]["verdict"] == "wrong"
