"""Share of bfloat16 weights that differ between the versions of a run, against their lag.

    python benchmarks/weight_changes.py [--model=runs/smollm2-model] [--lags=1,2,..,400]
    python benchmarks/weight_changes.py WORKDIR [WORKDIR ...]

The first form trains a pretrained model on sums of two numbers, with OAPL at a lag of 8 and AdamW
at a learning rate of 1e-6, from weights in bfloat16, as models are published. It keeps the rounded
weights of some steps: of each lag the two pairs that begin with the first step and end with the
last. A delta of two versions is their XOR, compressed (oapl_jax/weights/delta.py).

The second form compares all pairs of published versions of each run, in the same way. A run keeps
the versions that its lag policy and its checkpoints need: a larger `checkpoint.keep` and a smaller
`lag.steps` give more lags.
"""

import argparse
import itertools
import json
import random
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from etils import epath
from results import keep, show
from safetensors import safe_open

from configs import common, own_task
from oapl_jax import train
from oapl_jax.build import Run
from oapl_jax.config import Config
from oapl_jax.errors import UserError, exit_with_code
from oapl_jax.files import absolute
from oapl_jax.launch import use_compile_cache
from oapl_jax.tracking.progress import StopRequest
from oapl_jax.weights import delta
from oapl_jax.weights.publisher import checked_version, published_versions, version_path

LAGS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 400)
PART = 1 << 23  # weights compared at a time


def get_config(model: epath.Path, questions: epath.Path, num_steps: int) -> common.Config:
    """Sums of two small numbers: short prompts and responses, so that a step takes seconds."""
    config = own_task.get_config("pretrained").unlock()
    config.num_steps = num_steps
    config.group_size = 4
    config.groups_per_step = config.rollout.prompts_per_call = 2
    config.data.update(task="math", max_prompt_tokens=40)
    config.data.sets.train = str(questions)
    config.data.data_dir = str(questions.parent / "data")
    config.rollout.update(
        max_response_tokens=16, max_sequences=8, prompt_multiple=8, max_zero_reward_groups=0
    )
    config.lag.steps = 8
    config.buffer.zero_variance = "keep"
    config.model.update(path=str(model), dtype="float32", remat="none")
    config.learner.update(micro_batches=1, rows_multiple=1, logp_chunk=64)
    config.evaluation.every = 0
    config.checkpoint.update(every=num_steps, keep=1)
    config.tracking.tensorboard = False
    return config.lock()


class FromBfloat16(Run):
    """A run whose first weights are numbers of bfloat16."""

    def start_params(self) -> Any:
        rounded = lambda x: x.astype(jnp.bfloat16).astype(x.dtype)
        return jax.tree.map(rounded, super().start_params())


def kept_weights(
    config: common.Config, workdir: epath.Path, steps: set[int]
) -> tuple[dict[int, epath.Path], float]:
    """Trains; returns the files with the rounded weights of some steps, and seconds a step."""
    found: dict[int, epath.Path] = {}
    begun = time.monotonic()
    publish_and_serve = train.publish_and_serve

    def keep_weights(run: Run, step: int, params: Any, loop: train.Loop) -> None:
        if step in steps:
            found[step] = workdir / f"weights{step}"
            with found[step].open("wb") as file:
                for leaf in jax.tree.leaves(params):
                    file.write(np.asarray(leaf).astype(ml_dtypes.bfloat16).view(np.uint16).data)
        publish_and_serve(run, step, params, loop)

    train.publish_and_serve = keep_weights
    use_compile_cache(config.compile_cache, workdir)
    run = FromBfloat16(Config.from_dict(config.to_dict()), workdir / "run")
    if train.train(run, StopRequest()) is None:
        raise UserError("the run was stopped; begin again")
    return found, (time.monotonic() - begun) / config.num_steps


def compare(file: epath.Path, base: epath.Path) -> tuple[float, float]:
    """Share of changed weights, and bytes of the delta as a share of those of the weights."""
    one, other = (np.memmap(path, np.uint16, "r") for path in (file, base))
    parts = range(0, len(one), PART)
    differing = sum(np.count_nonzero(one[i : i + PART] != other[i : i + PART]) for i in parts)
    size = sum(map(len, delta.encode(file, base, itemsize=2)))
    return differing / len(one), size / one.nbytes


def rounded(version: epath.Path, to: epath.Path) -> epath.Path:
    """Writes the weights of a local version to a file, in bfloat16."""
    with to.open("wb") as out:
        for path in sorted(version.glob("*.safetensors")):
            with safe_open(path, framework="numpy") as tensors:
                for name in sorted(tensors.keys()):
                    bits = tensors.get_tensor(name).astype(ml_dtypes.bfloat16).view(np.uint16)
                    out.write(np.ascontiguousarray(bits).data)
    return to


def pairs_of_run(
    workdir: epath.Path, scratch: epath.Path
) -> Iterator[tuple[int, tuple[float, float]]]:
    """Yields the lag of each pair of published versions, and what `compare` finds."""
    directory = workdir / "versions"
    versions = published_versions(directory)
    if len(versions) < 2:
        raise UserError(f"{workdir} has versions {versions}; name a run that keeps two or more")
    files = {}
    for version in versions:
        with checked_version(version_path(directory, version)) as path:
            files[version] = rounded(path, scratch / str(version))
    for older, newer in itertools.combinations(versions, 2):
        yield newer - older, compare(files[newer], files[older])


def rows_of(pairs: Mapping[int, list[tuple[float, float]]], **about: Any) -> list[dict[str, Any]]:
    rows = []
    for lag, found in sorted(pairs.items()):
        changed, size = zip(*found, strict=True)
        row = {"lag": lag, "changed": f"{np.mean(changed):.2%}", "pairs": len(found)}
        row |= {"lowest": f"{min(changed):.2%}", "highest": f"{max(changed):.2%}"}
        rows.append(about | row | {"delta / weights": f"{np.mean(size):.2%}"})
    return rows


def measure(model: epath.Path, lags: list[int], scratch: epath.Path) -> list[dict[str, Any]]:
    questions, rng = scratch / "questions.jsonl", random.Random(0)
    sums = [(rng.randint(1, 30), rng.randint(1, 30)) for _ in range(2000)]
    rows = [
        {"question": f"What is {a} + {b}?", "answer": str(a + b)} for a, b in dict.fromkeys(sums)
    ]
    questions.write_text("\n".join(map(json.dumps, rows)))
    last = max(lags)
    config = get_config(model, questions, last + 1)
    steps = {0, last, *lags, *(last - lag for lag in lags)}
    files, seconds = kept_weights(config, scratch, steps)
    ends = {lag: {(0, lag), (last - lag, last)} for lag in lags}
    pairs = {
        lag: [compare(files[newer], files[older]) for older, newer in sorted(ends[lag])]
        for lag in lags
    }
    return rows_of(pairs, model=model.name, seconds_a_step=round(seconds, 2))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("workdirs", nargs="*", metavar="WORKDIR", help="of a run with versions")
    parser.add_argument("--model", default="runs/smollm2-model", help="a pretrained model")
    parser.add_argument("--lags", default=",".join(map(str, LAGS)), help="of which to compare")
    given, rows = parser.parse_args(), []
    runs = epath.Path("runs")
    runs.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=runs) as scratch:
        place = absolute(scratch)
        for workdir in given.workdirs:
            pairs = defaultdict(list)
            for lag, found in pairs_of_run(absolute(workdir), place):
                pairs[lag].append(found)
            rows += rows_of(pairs, run=workdir)
        if not given.workdirs:
            rows = measure(
                absolute(given.model), [int(lag) for lag in given.lags.split(",")], place
            )
    show(rows)
    keep(rows)


if __name__ == "__main__":
    exit_with_code(main)
