"""Weights & Biases, offline and for real: its own files, read by its own reader."""

import json
import os
import subprocess
import sys

import pytest
from etils import epath

from oapl_jax.config import TrackingConfig
from oapl_jax.errors import UserError
from oapl_jax.tracking import trackers

RUN = """
import json, os, sys
from etils import epath
from oapl_jax.config import TrackingConfig
from oapl_jax.tracking.metrics import MetricsWriter
from oapl_jax.tracking.trackers import trackers
workdir, first, last, ends = epath.Path(sys.argv[1]), *map(int, sys.argv[2:4]), sys.argv[4]
section = TrackingConfig(tensorboard=False, wandb="offline", project="lag")
config = {"lag": {"steps": 8}}
writer = MetricsWriter(trackers(section, workdir, start_step=first - 1, config=config))
for step in range(first, last + 1):
    writer.write(step, {"loss": step / 2, "lag/histogram": {"0": 1}})
if ends == "killed":
    os._exit(9)
writer.close()
print(json.dumps(writer.failed))
"""
READ = """
import glob, json, sys
from wandb.proto import wandb_internal_pb2
from wandb.sdk.internal.datastore import DataStore
runs = []
for path in sorted(glob.glob(sys.argv[1] + "/wandb/offline-run-*/*.wandb")):
    store, run = DataStore(), {"id": "", "config": {}, "history": []}
    store.open_for_scan(path)
    while (data := store.scan_data()) is not None:
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        if record.HasField("run"):
            run["id"], run["project"] = record.run.run_id, record.run.project
            run["config"] = {u.key: json.loads(u.value_json) for u in record.run.config.update}
        if record.HasField("history"):
            values = ((i.key or i.nested_key[0], i.value_json) for i in record.history.item)
            run["history"].append({key: json.loads(value) for key, value in values})
    runs.append(run)
print(json.dumps(runs))
"""


def python(code, *arguments, code_expected=0):
    environment = {**os.environ, "WANDB_SILENT": "true"}
    environment.pop("WANDB_MODE", None)
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        capture_output=True,
        text=True,
        env=environment,
        timeout=120,
    )
    assert done.returncode == code_expected, done.stderr
    return done.stdout


def test_a_resumed_run_continues_the_same_run_offline(tmp_path):
    python(RUN, tmp_path, 1, 5, "killed", code_expected=9)
    assert python(RUN, tmp_path, 4, 7, "closed") == "{}\n"
    first, second = json.loads(python(READ, tmp_path))
    identity = (tmp_path / "wandb" / "run_id").read_text()
    assert first["id"] == second["id"] == identity
    assert first["project"] == second["project"] == "lag"
    assert second["config"]["lag"] == {"steps": 8}
    losses = lambda run: {line["_step"]: line["loss"] for line in run["history"]}
    assert losses(second) == {step: step / 2 for step in range(4, 8)}
    assert losses(first).items() <= {step: step / 2 for step in range(1, 6)}.items()
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
