"""A run whose servers stay away: it pauses, saves, ends with exit code 3, and goes on later."""

import json
import os
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT
from small_runs import checked

from configs import arithmetic
from oapl_jax.errors import UserError

DEADLINE = 300.0  # seconds for a run
SETTINGS = {
    "group_size": 4,
    "groups_per_step": 4,
    "data.train_size": 200,
    "data.validation_size": 8,
    "data.test_size": 8,
    "model.architecture.hidden_size": 32,
    "model.architecture.intermediate_size": 32,
    "warmup.num_steps": 6,
    "warmup.batch_size": 8,
    "warmup.demonstrations": 50,
    "lag.steps": 8,
    "buffer.zero_variance": "keep",
    "rollout.prompts_per_call": 6,  # so that a checkpoint of step 2 has the groups of step 3
    "rollout.max_sequences": 24,
    "rollout.deadline": 60.0,
    "fleet.start_deadline": 1.0,
    "fleet.drain_deadline": 1.0,
    "fleet.update_deadline": 1.0,
    "fleet.no_server_deadline": 2.0,
    "evaluation.n": 1,
    "evaluation.ks": "(1,)",
    "tensorboard": False,
}


@pytest.fixture(scope="module")
def train(tmp_path_factory):
    """A function: trains in a process and returns its exit code and all that it said."""
    shared = tmp_path_factory.mktemp("shared")
    environment = {
        **os.environ,
        "XLA_FLAGS": "",
        "JAX_COMPILATION_CACHE_DIR": os.environ["TEST_PROGRAMS"],
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }

    def run(workdir, **settings):
        named = {name.replace("__", "."): value for name, value in settings.items()}
        values = {**SETTINGS, "data.data_dir": shared / "data", **named}
        command = [sys.executable, "-m", "oapl_jax.train", "--config=configs/arithmetic.py"]
        command += [f"--workdir={workdir}", *(f"--config.{k}={v}" for k, v in values.items())]
        done = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=DEADLINE
        )
        return done.returncode, done.stdout + done.stderr

    return run


@pytest.fixture(scope="module")
def begun(train, tmp_path_factory):
    """The workdir of a run that has taken two steps with the embedded sampler."""
    workdir = tmp_path_factory.mktemp("begun")
    code, said = train(workdir, num_steps=2)
    assert code == 0, said
    return workdir


@pytest.mark.parametrize("overlap", [False, True])
def test_a_run_without_servers_saves_and_ends_with_code_3(
    train, begun, tmp_path, free_port, overlap
):
    workdir = tmp_path / "run"
    shutil.copytree(begun, workdir)
    nobody = f"('http://127.0.0.1:{free_port()}',)"
    fleet = dict(rollout__sampler="fleet", rollout__overlap=overlap, fleet__servers=nobody)
    code, said = train(workdir, num_steps=6, **fleet)
    assert code == 3, said
    assert "no server is ready: training pauses" in said
    assert "error: no server was ready for 2 s (fleet.no_server_deadline)" in said
    # Step 3 had its groups from the checkpoint, and is in one although checkpoint.every is 100.
    assert {path.name for path in (workdir / "checkpoints").iterdir()} >= {"3"}

    code, said = train(workdir, num_steps=6)
    assert code == 0, said
    assert "resumed from checkpoint step 3" in said
    ledger = subprocess.run(
        [sys.executable, "-m", "oapl_jax.report", workdir, "--json"],
        capture_output=True,
        text=True,
        check=True,
    )
    balance = json.loads(ledger.stdout)["balance"]
    assert balance["trained"] == 6 * 4 * 4  # steps, groups, responses
    assert balance["rewound"] > 0  # what was asked of nobody
    assert balance["failed"] == balance["reissued"] == 0


def test_the_learner_waits_longer_than_a_pause_may_last():
    config = arithmetic.get_config()
    config.rollout.sampler = "fleet"
    config.fleet.servers = ("http://127.0.0.1:9",)
    checked(config)
    config.rollout.deadline = config.fleet.no_server_deadline
    with pytest.raises(UserError, match=r"rollout\.deadline=1200 .* fleet\.no_server_deadline"):
        checked(config)
