"""The default job, shortened, with rollouts from two real SGLang servers."""

import json
import os
import subprocess
import sys

from server_processes import ROOT

STEPS = 64
LAG = 16  # gradient steps between two versions, the default's
DEADLINE = 480.0  # seconds


def test_the_default_job_learns_on_a_fleet(servers, tmp_path):
    workdir = tmp_path / "run"
    command = [
        *(sys.executable, "-m", "oapl_jax.train", "--config=configs/arithmetic.py"),
        *(f"--workdir={workdir}", f"--config.data.data_dir={tmp_path}/data"),
        *(f"--config.num_steps={STEPS}", "--config.evaluation.every=1000"),
        *("--config.rollout.sampler=fleet", "--config.rollout.overlap=True"),
        f"--config.fleet.servers={tuple(servers.urls)}",
    ]
    environment = {**os.environ, "XLA_FLAGS": ""}
    subprocess.run(command, cwd=ROOT, env=environment, check=True, timeout=DEADLINE)

    result = json.loads((workdir / "result.json").read_text())
    before, after = result["before"], result["after"]
    assert after["pass@1"] >= before["pass@1"] + 0.30, (before, after)

    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "lag/max" in line]
    assert max(line["lag/max"] for line in steps) == LAG - 1
    refreshed = max(line.get("fleet/refreshed", 0) for line in steps)
    assert refreshed >= 2 * 3, "each server loaded at least three versions"

    ledger = [sys.executable, "-m", "oapl_jax.report", str(workdir), "--json"]
    printed = subprocess.run(
        ledger, cwd=ROOT, env=environment, check=True, stdout=subprocess.PIPE, timeout=60
    ).stdout
    report = json.loads(printed)
    assert report["balanced"]
    assert report["balance"]["trained"] == STEPS * 32 * 8
    assert report["balance"]["failed"] == 0
    assert set(report["servers"]) == set(servers.urls)
