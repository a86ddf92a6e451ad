"""Runs whose workdir is a bucket: killed at random, they end in the same bits as on a disk."""

import itertools
import json
import random
import sys
import time

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from bucket import emulated
from etils import epath
from small_runs import opened, small_arithmetic, timeless
from stores import wait_until

from oapl_jax import grade, report
from oapl_jax.errors import UserError
from oapl_jax.files import open_log, read_log
from oapl_jax.model import hf
from oapl_jax.planning.layouts import kept_plan
from oapl_jax.publish import publish_step
from oapl_jax.rollout.dataset import Dataset
from oapl_jax.rollout.kept import read_notes
from oapl_jax.rollout.ledger import LedgerReport
from oapl_jax.structs import encode_groups
from oapl_jax.tracking.metrics import read_lines
from oapl_jax.weights import lease
from oapl_jax.weights.publisher import (
    check_version,
    checked_version,
    published_versions,
    version_path,
)

SETTINGS = {
    "num_steps": 6,
    "evaluation.every": 0,
    "warmup.num_steps": 0,
    "checkpoint.every": 2,
    "lag.steps": 3,
    "rollout.keep": 0.5,
    "publish_full_every": 2,
}


@pytest.fixture(scope="module")
def bucket():
    with emulated("runs") as bucket:
        yield bucket


@pytest.fixture(scope="module")
def on_disk(runs, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("on_disk")
    runs.run(workdir, **SETTINGS)
    return epath.Path(workdir)


@pytest.fixture(scope="module")
def killed(runs, bucket, tmp_path_factory):
    """A run in a bucket that was killed five times, once with its machine, and went on."""
    workdir, rng = bucket / "killed", random.Random(17)
    for step in (1, 2, 3, 5, 6):  # a checkpoint and a version are due at 2, 4 and 6
        with pytest.MonkeyPatch.context() as patch:
            if step == 3:  # what was on this machine's disk is not there when the run goes on
                patch.setenv("TMPDIR", str(tmp_path_factory.mktemp("lost")))
            process = runs.start(runs.command(workdir, **SETTINGS))
        for line in process.stdout:
            if line.startswith(f"train {step}/"):
                break
        else:
            pytest.fail("the run ended before it was killed")
        time.sleep(rng.random() * 0.3)
        process.kill()
        process.communicate()
    runs.run(workdir, **SETTINGS)
    return workdir


def arrays(workdir):
    """Parameters and optimizer of the newest checkpoint, read by Orbax without any of our code."""
    with ocp.CheckpointManager(workdir / "checkpoints") as manager:
        restore = ocp.args.StandardRestore()
        found = manager.restore(
            manager.latest_step(), args=ocp.args.Composite(params=restore, optimizer=restore)
        )
    return jax.tree.map(np.asarray, (found.params, found.optimizer))


def test_a_killed_run_ends_in_the_bits_of_one_on_a_disk(on_disk, killed):
    mine, theirs = (read_lines(workdir / "metrics.jsonl") for workdir in (killed, on_disk))
    assert list(map(timeless, mine)) == list(map(timeless, theirs))
    jax.tree.map(np.testing.assert_array_equal, arrays(killed), arrays(on_disk))
    mine, theirs = (list(Dataset(workdir / "rollouts")) for workdir in (killed, on_disk))
    assert encode_groups(mine) == encode_groups(theirs)
    indices = [group.prompt.stream_index for group in mine]
    notes = [read_notes(workdir / "rollouts", indices) for workdir in (killed, on_disk)]
    assert notes[0] == notes[1]
    assert published_versions(killed / "versions") == published_versions(on_disk / "versions")


def test_the_ledger_of_a_killed_run_balances(on_disk, killed):
    mine, theirs = (
        LedgerReport(workdir / "ledger.jsonl").summary() for workdir in (killed, on_disk)
    )
    assert mine["balanced"]
    for state in ("trained", "expired", "held"):
        assert mine["balance"][state] == theirs["balance"][state]


def test_tensorboard_reads_it(killed):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(killed / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("reward")] == [1, 2, 3, 4, 5, 6]


def test_the_report_is_written_beside_it(killed, on_disk, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["report", str(killed), str(on_disk), "--json"])
    report.main()
    summaries = json.loads(capsys.readouterr().out)
    assert [summary["balanced"] for summary in summaries.values()] == [True, True]
    monkeypatch.setattr(sys, "argv", ["report", str(killed)])
    report.main()
    assert "</html>" in (killed / "report.html").read_text()


def test_a_step_is_published_to_the_bucket(killed):
    path = publish_step(killed, 4, killed / "published", dtype="bfloat16")
    assert path == version_path(killed / "published", 4)
    check_version(path)
    assert "reward" in (path / "README.md").read_text()


def test_a_workdir_in_a_bucket_is_evaluated_and_recorded(runs, killed):
    result = json.loads(runs.run(killed, module="evaluate", **SETTINGS).splitlines()[-1])
    assert result["version"] == 6
    to = killed / "recorded"
    runs.run(killed, f"--to={to}", "--prompts=6", module="record", **SETTINGS)
    assert len(Dataset(to)) == 6
    assert Dataset(to).versions == [6]


def test_other_commands_take_it(runs, killed, monkeypatch, capsys):
    shard = next((killed / "rollouts").glob("*.array_record"))
    for record in (killed / "rollouts", shard):
        monkeypatch.setattr(sys, "argv", ["grade", f"--record={record}", "--row=0"])
        grade.main()
        lines = capsys.readouterr().out.splitlines()
        assert len(lines) == 4
        assert {json.loads(line)["verdict"] for line in lines} <= {"right", "wrong"}
    runs.run(killed, module="audit", **SETTINGS)
    assert json.loads((killed / "audit.json").read_text())["evaluation"]
    assert "checkpoint" in runs.run(killed, "--dry-run", **SETTINGS)
    plan = kept_plan(killed / "sweep.json", "a mesh", lambda: {"memory": 1})
    assert kept_plan(killed / "sweep.json", "a mesh", dict) == plan


BENCHMARK = """
from configs import arithmetic

def get_config(arg=None):
    config = arithmetic.get_config(arg)
    with config.unlocked():
        config.benchmarks = {{"sums": {table!r}}}
    return config
"""


def test_benchmarks_are_evaluated_in_it(runs, killed, tmp_path):
    rows = [{"question": f"{a}+2=", "target": str(a + 2)} for a in range(3)]
    (tmp_path / "sums.jsonl").write_text("\n".join(map(json.dumps, rows)))
    columns = dict(problem="question", answer="target")
    options = dict(task="chain_sum", columns=columns, max_tests=0)
    table = dict(kind="table", path=str(tmp_path / "sums.jsonl"), files=(), rows=3, part=(0, 100))
    (tmp_path / "config.py").write_text(BENCHMARK.format(table=table | dict(options=options)))
    command = runs.command(killed, "evaluate", **SETTINGS)
    at = next(i for i, word in enumerate(command) if word.startswith("--config="))
    command[at : at + 1] = [f"--config={tmp_path}/config.py", "--benchmark=sums", "--n=4"]

    def evaluate():
        process = runs.start(command)
        output, _ = process.communicate(timeout=300)
        assert not process.returncode, output

    evaluate()
    directory = version_path(killed / "evaluation", 6)
    result = json.loads((directory / "sums" / "result.json").read_text())
    assert (result["problems"], result["samples"]) == (3, 4)
    assert (directory / "results.md").exists()
    assert (directory / "pass_at_k.png").exists()
    evaluate()  # nothing is sampled again
    again = json.loads((directory / "sums" / "result.json").read_text())
    assert again["per_problem"] == result["per_problem"]


def test_it_has_one_owner(runs, killed):
    """A second start on this machine is refused, and leaves the log of the first alone."""
    with lease.hold(killed, log=print, lost=pytest.fail):
        log = open_log(killed / "log.txt")
        segments = sorted((killed / "log.txt").iterdir())
        log.append(b"a line\n")
        said = runs.run(killed, code=2, **SETTINGS)
        assert str(killed) in said.splitlines()[-1]
        assert sorted((killed / "log.txt").iterdir()) == segments
        log.close()
        assert b"".join(read_log(killed / "log.txt")).endswith(b"a line\n")
    assert not (killed / lease.FILE).exists()


def test_an_owner_on_another_machine_is_watched(bucket, monkeypatch):
    """It renews its lease in the bucket; one that no longer does is succeeded."""
    monkeypatch.setattr(lease, "RENEW", 0.1)
    monkeypatch.setattr(lease, "EXPIRE", 1.0)
    machines = itertools.count()
    monkeypatch.setattr(lease, "_machine", lambda: f"machine {next(machines)}")
    workdir, lines, lost = bucket / "leased", [], []
    held = lambda: lease.hold(workdir, log=lines.append, lost=lost.append)
    with held():
        with pytest.raises(UserError, match="--workdir=gs://runs/leased"):
            held().__enter__()
        first = (workdir / lease.FILE).read_text()
        wait_until(lambda: (workdir / lease.FILE).read_text() != first)
    assert not (workdir / lease.FILE).exists()
    (workdir / lease.FILE).write_text(first)  # of a machine that was lost
    with held():
        assert (workdir / lease.FILE).read_text() != first
    assert "took" in lines[-1]
    assert not lost


def test_a_damaged_version_of_a_bucket_is_restored(killed):
    run = opened(small_arithmetic({"num_steps": 6}), killed)
    version = published_versions(killed / "versions")[-1]
    path = version_path(killed / "versions", version)
    weights = path / "model.safetensors.xor.zst"
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(UserError, match="safetensors"):
        check_version(path)
    assert run.versions.repair()[version] == ["model.safetensors"]
    with checked_version(path) as whole:
        assert (whole / "model.safetensors").exists()
    assert not hf.is_delta(path)
