"""The commands of docs/own-task.md, in fewer steps, from the page itself."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from small_runs import ROOT, quick_compilation

PAGE = (ROOT / "docs" / "own-task.md").read_text()
REDUCED = {
    "num_steps": 2,
    "groups_per_step": 4,
    "group_size": 4,
    "warmup.num_steps": 25,  # then most responses end
    "warmup.batch_size": 32,
    "buffer.zero_variance": "keep",
    "rollout.prompts_per_call": 4,
    "data.most_drawn": 8,
    "evaluation.every": 2,
    "evaluation.n": 2,
    "evaluation.ks": "(1, 2)",
}


def files() -> dict[str, str]:
    """The files that the page has its reader save, by name."""
    blocks = re.findall(r"Save this as `(\S+)`:\n\n((?:    .*\n|\n)+)", PAGE)
    return {name: re.sub("^    ", "", text, flags=re.M).strip() + "\n" for name, text in blocks}


def commands() -> list[str]:
    """The commands of the page, up to the reference part."""
    lines = PAGE.partition("## The reward function")[0].replace("\\\n", " ")
    return re.findall(r"^    (python .*)$", lines, flags=re.M)


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """Runs the page's commands in an empty directory; their outputs."""
    directory = tmp_path_factory.mktemp("own")
    (directory / "configs").symlink_to(ROOT / "configs")
    for name, text in files().items():
        (directory / name).write_text(text)
    reduced = [f"--config.{name}={value}" for name, value in REDUCED.items()]
    cache = f"--config.compile_cache={os.environ['TEST_PROGRAMS']}"
    environment = {
        **quick_compilation(),
        "PYTHONPATH": str(ROOT),
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    outputs = []
    for command in commands():
        if "--config" in command:
            command = " ".join([command, *map(repr, reduced), cache])
        done = subprocess.run(
            command,
            shell=True,
            cwd=directory,
            env=environment,
            capture_output=True,
            text=True,
            timeout=900,
        )
        assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
        outputs.append(done.stdout)
    return directory, outputs


def test_the_page_has_the_two_files_and_its_commands():
    assert set(files()) == {"questions.py", "my_reward.py"}
    assert len(files()["my_reward.py"].splitlines()) <= 10
    for part in ("questions.jsonl", "oapl_jax.train", "metrics.jsonl", "oapl_jax.evaluate"):
        assert any(part in command for command in commands()), part


def test_its_run_rewards_by_the_function_and_evaluates(ran):
    directory, _ = ran
    lines = [json.loads(x) for x in (directory / "runs/own/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2]
    assert lines[-1]["rewards/function/returned"] > 10  # four of them in the self-check
    assert lines[-1]["rewards/function/error"] == lines[-1]["rewards/function/timeout"] == 0
    assert {"eval/pass@1", "eval/reward"} <= lines[-1].keys()
    assert (directory / "runs/own/learning.png").stat().st_size > 0


def test_it_says_which_questions_are_drawn_and_shows_responses(ran):
    _, (_, trained, curve, shown) = ran
    assert re.search(r"validation: 8 of the \d+ questions of questions\.jsonl", trained)
    assert re.search(r"test: 8 of the \d+ questions", trained)
    assert curve.split()[:1] == ["2"]
    assert re.search(r"verdict\s+wrong", shown)
