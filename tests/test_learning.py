"""The default job, shortened: OAPL with lag 16 raises pass@1 on problems that it has not seen."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_the_default_job_learns(tmp_path):
    command = [
        *(sys.executable, "-m", "oapl_jax.train", "--config=configs/arithmetic.py"),
        *(f"--workdir={tmp_path}/run", f"--config.data.data_dir={tmp_path}/data"),
        *("--config.num_steps=120", "--config.evaluation.every=1000"),
    ]
    environment = {**os.environ, "XLA_FLAGS": ""}
    subprocess.run(command, cwd=ROOT, env=environment, check=True, timeout=600)
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    before, after = result["before"], result["after"]
    assert before["pass@1"] <= 0.30
    assert after["pass@1"] >= before["pass@1"] + 0.30
    assert after["pass@8"] >= before["pass@8"]
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert max(json.loads(line)["lag/max"] for line in lines) == 15
