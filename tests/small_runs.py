"""Training runs in processes of their own, small, for the tests of the whole loop."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from etils import epath
from ml_collections import ConfigDict

from configs import arithmetic
from oapl_jax.build import Run
from oapl_jax.config import Config

ROOT = Path(__file__).parent.parent
SMALL = {
    "num_steps": 12,
    "group_size": 4,
    "groups_per_step": 4,
    "data.train_size": 200,
    "data.validation_size": 8,
    "data.test_size": 16,
    "model.architecture.hidden_size": 32,
    "model.architecture.intermediate_size": 32,
    "warmup.num_steps": 6,
    "warmup.batch_size": 8,
    "warmup.demonstrations": 50,
    "lag.steps": 4,
    "buffer.zero_variance": "keep",
    "rollout.prompts_per_call": 6,  # so that groups are left over at a checkpoint
    "rollout.max_sequences": 24,
    "evaluation.every": 5,
    "evaluation.n": 4,
    "evaluation.ks": (1, 4),
    "checkpoint.every": 3,
}
IN_PROCESS = {  # on the eight devices of this process
    "group_size": 4,
    "groups_per_step": 4,
    "data.validation_size": 4,
    "data.test_size": 4,
    "model.architecture.hidden_size": 32,
    "model.architecture.intermediate_size": 32,
    "mesh.data": 8,
    "mesh.fsdp": 1,
    "lag.steps": 4,
    "rollout.prompts_per_call": 4,
    "tracking.tensorboard": False,
}
QUICK_COMPILATION = {  # environment of a process that compiles for longer than its programs run
    "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
}
TIMES = ("seconds", "per_second", "latency", "compile/")  # what may differ between two equal runs


class Runs:
    """Starts training processes that share a data set and compiled programs."""

    def __init__(self, shared: Path):
        self.data_dir = shared / "data"

    def command(
        self, workdir: Path, module: str = "train", config: str = "", **settings
    ) -> list[str]:
        shared = {
            "data.data_dir": self.data_dir,
            "compile_cache": os.environ["TEST_PROGRAMS"],
        }
        values = {**SMALL, **shared, **settings}
        return [
            *(sys.executable, "-m", f"oapl_jax.{module}"),
            *(f"--config=configs/arithmetic.py{config}", f"--workdir={workdir}"),
            *(f"--config.{name}={value}" for name, value in values.items()),
        ]

    def environment(self, devices: int) -> dict[str, str]:
        return quick_compilation(devices)

    def start(self, command: list[str], devices: int = 1) -> subprocess.Popen:
        return subprocess.Popen(
            command,
            cwd=ROOT,
            env=self.environment(devices),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def run(self, workdir: Path, *extra: str, devices: int = 1, code: int = 0, **settings) -> str:
        config = settings.pop("config", "")
        module = settings.pop("module", "train")
        names = {name.replace("__", "."): value for name, value in settings.items()}
        command = [*self.command(workdir, module, config, **names), *extra]
        process = self.start(command, devices)
        try:
            output, _ = process.communicate(timeout=300)
        finally:
            process.kill()
        assert process.returncode == code, output
        return output


def small_arithmetic(settings: Mapping, choice: str | None = None, **more) -> ConfigDict:
    """The arithmetic task with a small model, to be run in this process."""
    config = arithmetic.get_config(choice)
    more = {name.replace("__", "."): value for name, value in more.items()}
    config.update_from_flattened_dict({**IN_PROCESS, **settings, **more})
    return config


def quick_compilation(devices: int = 1) -> dict[str, str]:
    """The environment of a process that compiles as this one does."""
    flags = os.environ["XLA_FLAGS"].replace("count=8", f"count={devices}")
    return {**os.environ, **QUICK_COMPILATION, "XLA_FLAGS": flags}


def cached_programs(devices: int = 8) -> dict[str, str]:
    """`quick_compilation`, with the same compiled programs."""
    return {**quick_compilation(devices), "JAX_COMPILATION_CACHE_DIR": os.environ["TEST_PROGRAMS"]}


def metrics(workdir: Path) -> list[dict]:
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def timeless(line: dict) -> dict:
    return {k: v for k, v in line.items() if not any(part in k for part in TIMES)}


def typed(config) -> Config:
    """The typed configuration of a ConfigDict."""
    return Config.from_dict(config.to_dict())


def opened(config, workdir) -> Run:
    """The run of a ConfigDict."""
    return Run(typed(config), epath.Path(workdir))


def checked(config) -> Config:
    """The typed configuration of a ConfigDict, after every check that needs no files."""
    return opened(config, "never written").config
