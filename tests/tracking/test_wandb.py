"""Weights & Biases, offline and for real: its own client, and the files that it leaves."""

import json
import os
import struct
import subprocess
import sys

import pytest
from etils import epath
from wandb.proto import wandb_internal_pb2

from oapl_jax.config import TrackingConfig
from oapl_jax.errors import UserError
from oapl_jax.tracking import trackers

RUN = """
import json, sys
from etils import epath
from oapl_jax.config import TrackingConfig
from oapl_jax.tracking.metrics import MetricsWriter
from oapl_jax.tracking.trackers import trackers
workdir, first, last = epath.Path(sys.argv[1]), *map(int, sys.argv[2:])
section = TrackingConfig(tensorboard=False, wandb="offline", project="lag")
config = {"lag": {"steps": 8}}
writer = MetricsWriter(trackers(section, workdir, start_step=first - 1, config=config))
for step in range(first, last + 1):
    writer.write(step, {"loss": step / 2, "lag/histogram": {"0": 1}})
writer.close()
print(json.dumps(writer.failed))
"""


def records(content):
    """Records of a .wandb file: LevelDB's log format behind a header of 7 bytes."""
    whole, place = b"", 7
    while place + 7 <= len(content):
        size, kind = struct.unpack("<HB", content[place + 4 : place + 7])
        whole += content[place + 7 : place + 7 + size]
        place += 7 + size
        if 32768 - place % 32768 < 7:  # the rest of a block is padding
            place += 32768 - place % 32768
        if kind in (1, 4):  # whole, or the last part
            yield wandb_internal_pb2.Record.FromString(whole)
            whole = b""


def read_runs(workdir):
    """Id, project, settings and lines of each time that a run was opened."""
    runs = []
    for path in sorted(workdir.glob("wandb/offline-run-*/*.wandb")):
        run = {"history": []}
        for record in records(path.read_bytes()):
            if record.HasField("run"):
                run |= {"id": record.run.run_id, "project": record.run.project}
                run["config"] = {u.key: json.loads(u.value_json) for u in record.run.config.update}
            if record.HasField("history"):
                items = record.history.item
                values = ((i.key or i.nested_key[0], json.loads(i.value_json)) for i in items)
                run["history"].append(dict(values))
        runs.append(run)
    return runs


def run(*arguments):
    """Stdout of a process that writes the steps from its second to its third argument."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("WANDB_")}
    done = subprocess.run(
        [sys.executable, "-c", RUN, *map(str, arguments)],
        capture_output=True,
        text=True,
        env=environment,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout


def test_a_resumed_run_continues_the_same_run_offline(tmp_path):
    assert run(tmp_path, 1, 5) == run(tmp_path, 4, 7) == "{}\n"
    first, second = read_runs(tmp_path)
    identity = (tmp_path / "wandb" / "run_id").read_text()
    assert first["id"] == second["id"] == identity
    assert first["project"] == second["project"] == "lag"
    assert second["config"]["lag"] == {"steps": 8}
    losses = lambda run: {line["_step"]: line["loss"] for line in run["history"]}
    assert losses(second) == {step: step / 2 for step in range(4, 8)}
    assert losses(first) == {step: step / 2 for step in range(1, 6)}
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(1, 8))


def test_a_package_that_is_missing_is_a_mistake_before_any_work(monkeypatch):
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda name: None)
    section = TrackingConfig(tensorboard=False, wandb="offline", project="")
    with pytest.raises(UserError, match=r"tracking\.wandb"):
        trackers.check_trackers(section)
    off = TrackingConfig(tensorboard=False, wandb="off", project="")
    trackers.check_trackers(off)
    assert list(trackers.trackers(off, epath.Path("x"), start_step=0, config={})) == [trackers.FILE]
