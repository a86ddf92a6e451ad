"""A run without servers: it pauses, saves, ends with exit code 3, and resumes later."""

import shutil

import pytest
from etils import epath
from server_processes import find_port
from small_runs import checked

from configs import arithmetic
from oapl_jax.errors import UserError
from oapl_jax.rollout.ledger import FILE, LedgerReport

# A checkpoint of step 2 holds the groups of step 3, since 6 prompts are sampled at a time.
SETTINGS = dict(lag__steps=8, checkpoint__every=100, tracking__tensorboard=False)
SETTINGS |= dict(evaluation__every=0, warmup__num_steps=0)
SETTINGS |= dict(rollout__deadline=60.0, fleet__no_server_deadline=2.0)
SETTINGS |= {f"fleet__{name}_deadline": 1.0 for name in ("start", "drain", "update")}


@pytest.fixture(scope="module")
def train(runs):
    """Trains in a process; returns its output."""
    return lambda workdir, **settings: runs.run(workdir, **{**SETTINGS, **settings})


@pytest.fixture(scope="module")
def begun(train, tmp_path_factory):
    """Workdir of a run that has trained two steps with the embedded sampler."""
    workdir = tmp_path_factory.mktemp("begun")
    train(workdir, num_steps=2)
    return workdir


@pytest.mark.parametrize("overlap", [False, True])
def test_a_run_without_servers_saves_and_ends_with_code_3(train, begun, tmp_path, overlap):
    workdir = tmp_path / "run"
    shutil.copytree(begun, workdir)
    nobody = f"('http://127.0.0.1:{find_port()}',)"
    fleet = dict(rollout__sampler="fleet", rollout__overlap=overlap, fleet__servers=nobody)
    output = train(workdir, code=3, num_steps=6, **fleet)
    assert "fleet.no_server_deadline" in output
    # Step 3 had its groups from the checkpoint, and is in one although checkpoint.every is 100.
    assert {path.name for path in (workdir / "checkpoints").iterdir()} >= {"3"}

    assert "resumed from checkpoint step 3" in train(workdir, num_steps=6)
    balance = LedgerReport(epath.Path(workdir / FILE)).summary()["balance"]
    assert balance["trained"] == 6 * 4 * 4  # steps, groups, responses
    assert balance["rewound"] > 0  # requested while there was no server
    assert balance["failed"] == balance["reissued"] == 0


def test_the_learner_waits_longer_than_the_no_server_timeout():
    config = arithmetic.get_config()
    config.rollout.sampler = "fleet"
    config.fleet.servers = ("http://127.0.0.1:9",)
    checked(config)
    config.rollout.deadline = config.fleet.no_server_deadline
    with pytest.raises(UserError, match=r"rollout\.deadline"):
        checked(config)
