"""The experiment on curricula: bank, claim, and the quick form of its command."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from etils import epath
from small_runs import cached_programs

from experiments import curriculum
from experiments.curriculum import Outcome, steps_to
from oapl_jax.data.records import Record, user
from oapl_jax.data.synthetic.tasks import TASKS
from oapl_jax.errors import UserError
from oapl_jax.tracking.metrics import read_lines

ROOT = Path(__file__).parents[2]


def test_nine_tenths_of_the_bank_are_useless():
    useful = [Record(f"{i}", user(f"{i}+1="), "", "chain_sum", {}) for i in range(800)]
    bank = curriculum.bank(useful)
    assert len(bank) == 2000
    assert bank[:200] == useful[:200]
    of = {name: {r.id for r in getattr(curriculum, name)()} for name in ("solved", "impossible")}
    assert [sum(r.id in ids for r in bank) for ids in of.values()] == [900, 900]
    assert not of["solved"] & of["impossible"]


def test_useless_prompts_are_always_solved_or_too_long():
    task, rng = TASKS["chain_sum"], np.random.default_rng(0)
    for record in curriculum.solved():
        wrong = task.demonstration(record, rng, 1.0)
        assert wrong.split(",")[-1] == task.demonstration(record, rng, 0.0).split(",")[-1]
    room = curriculum.get_config("uniform", 0).rollout.max_response_tokens
    for record in curriculum.impossible():
        right = task.demonstration(record, rng, 0.0)
        assert len(right) + 1 > room
        assert record.answer not in [str(int(total)) for total in right.split(",")[:4]]


def test_a_target_is_reached_by_two_evaluations_in_a_row():
    points = [(2, 0.1), (4, 0.5), (6, 0.2), (8, 0.4), (10, 0.4), (12, 0.3)]
    assert steps_to(0.4, points) == 8
    assert steps_to(0.1, points) == 2
    assert steps_to(0.5, points) is None
    assert steps_to(0.9, points) is None


def outcome(name, steps, seed=0):
    """Of a run of 60 steps that is at the target from `steps` on."""
    curve = [(step, 0.6 if step >= steps else 0.1) for step in range(2, 62, 2)]
    return Outcome(name, seed, curve, 0.6, 0.5)


def test_the_claim_is_half_of_the_steps():
    assert outcome("actor_curator", 30).share == 0.5
    assert outcome("actor_curator", 30).holds
    assert not outcome("actor_curator", 32).holds
    assert not outcome("actor_curator", 99).holds
    assert outcome("actor_curator", 99).share is None


@pytest.mark.parametrize("steps", [20, 40, 99])
def test_the_command_fails_with_the_claim(monkeypatch, tmp_path, steps):
    runs = [outcome("uniform", 60), outcome("window", 99), outcome("actor_curator", 20)]
    runs += [outcome("uniform", 60, seed=7), outcome("actor_curator", steps, seed=7)]
    monkeypatch.setattr(curriculum, "compare", lambda *_, **__: runs)
    monkeypatch.setattr("jax.config.update", lambda *_: None)
    monkeypatch.setattr(sys, "argv", ["curriculum", f"--to={tmp_path}"])
    if steps <= 30:
        curriculum.main()
    else:
        with pytest.raises(SystemExit, match="7"):
            curriculum.main()
    found = json.loads((tmp_path / "test" / "curriculum.json").read_text())
    assert [run["holds"] for run in found] == [False, False, True, False, steps <= 30]
    assert (tmp_path / "test" / "curriculum.png").exists()


def test_the_quick_form_ends_and_is_not_run_twice(tmp_path):
    command = [sys.executable, "-m", "experiments.curriculum", "--quick", f"--to={tmp_path}"]
    command += ["--seeds", "0", "--others", "actor_curator"]

    def run():
        done = subprocess.run(
            command,
            cwd=ROOT,
            env=cached_programs(1),
            timeout=300,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert done.returncode == 0, done.stdout
        return done.stdout

    output, steps = run(), curriculum.QUICK["num_steps"]
    uniform, chosen = (
        read_lines(epath.Path(tmp_path) / "test" / f"{name}-0" / "metrics.jsonl")
        for name in ("uniform", "actor_curator")
    )
    assert len(uniform) == len(chosen) == steps
    assert chosen[-1]["curriculum/steps"] > 0
    assert chosen[-1]["curriculum/effective_share"] < 0.99 < chosen[0]["curriculum/effective_share"]
    found = json.loads((tmp_path / "test" / "curriculum.json").read_text())
    assert [run["curriculum"] for run in found] == ["uniform", "actor_curator"]
    for outcome, lines in zip(found, (uniform, chosen), strict=True):
        assert [step for step, _ in outcome["curve"]] == [2, 4, 6, 8]
        assert outcome["target"] == uniform[-1]["eval/pass@1"]
        assert outcome["curve"][-1][1] == lines[-1]["eval/pass@1"]
        assert 0 < outcome["useful"] < 1
    again = run()
    assert again.splitlines()[-5:] == output.splitlines()[-5:]
    assert f"train {steps}/{steps}" in output
    assert "train" not in again
    runs = epath.Path(tmp_path) / "test"
    others = curriculum.get_config("uniform", 0, **{**curriculum.QUICK, "optim.learning_rate": 1.0})
    with pytest.raises(UserError, match="uniform-0"):
        curriculum.run(runs / "uniform-0", others, runs / "start-0" / "versions/v000000", "test")
