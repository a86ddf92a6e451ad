"""Publishing of an Orbax step: bytes a second as a share of the disk's speed, and memory.

    python benchmarks/publishing.py [--directory=runs] [--rounds=5]

Saves a model of SmolLM2-135M's shape with random weights with Orbax, and publishes it. In turns
with each publication, one write of as many bytes to the same disk, with fsync, measures the disk's
speed; the median of the ratios counts, since a shared machine drifts. The step is in the page
cache, as after a save. Publishing needs processors and the plain write hardly any: if other
programs use them the ratio falls, see "cores it got". Memory is the rise of the peak of a process
that only publishes.
"""

import argparse
import json
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import time
from typing import Any

import numpy as np
import xxhash
from etils import epath
from results import keep, show

from oapl_jax.model import hf
from oapl_jax.model.config import ModelConfig
from oapl_jax.weights.publisher import publish, read_manifest

SIZES = {
    "model_type": "llama",
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "head_dim": 64,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_theta": 100000.0,
    "tie_word_embeddings": True,
}
CONFIG = ModelConfig.from_hf(SIZES, source="SmolLM2-135M")
BLOCK = 16 << 20


class NoTokenizer:
    def save_pretrained(self, save_directory: str) -> None:
        """Writes no files."""


NO_TOKENIZER: Any = NoTokenizer()


def save_step(directory: epath.Path) -> epath.Path:
    """Saves an Orbax step of random weights."""
    from flax.traverse_util import unflatten_dict

    from oapl_jax.weights.checkpoint import Weights  # not needed to publish

    rng = np.random.default_rng(0)
    flat: dict[str, Any] = {}
    for tensor in hf.tensors_of(CONFIG):
        shape = tensor.shape[::-1] if tensor.transposed else tensor.shape
        shape = shape if tensor.layer is None else (CONFIG.num_layers, *shape)
        if tensor.path not in flat:
            flat[tensor.path] = rng.standard_normal(shape, np.float32) * np.float32(0.05)
    weights = Weights(directory, deadline=60.0)
    weights.save(0, unflatten_dict(flat, sep="/"), {"tokens": [], "logp": [], "dtype": "float32"})
    weights.close()
    return weights.path(0)


def publish_once(source: epath.Path, directory: epath.Path, dtype: str) -> tuple[float, int]:
    """Publishes and removes a version; returns seconds and bytes."""
    start = time.perf_counter()
    path = publish(
        source,
        CONFIG,
        version=0,
        directory=directory,
        tokenizer=NO_TOKENIZER,
        dtype=dtype,
        config_hash="",
    )
    seconds = time.perf_counter() - start
    written = sum(entry["bytes"] for entry in read_manifest(path)["files"].values())
    directory.rmtree()
    return seconds, written


def write_once(path: pathlib.Path, size: int, block: bytes) -> float:
    """Returns the seconds to write and fsync this many bytes."""
    start = time.perf_counter()
    with path.open("wb", buffering=0) as file:
        for _ in range(size // len(block)):
            file.write(block)
        file.write(block[: size % len(block)])
        os.fsync(file.fileno())
    seconds = time.perf_counter() - start
    path.unlink()
    return seconds


def hash_rate(block: bytes) -> float:
    start = time.perf_counter()
    xxhash.xxh3_128(block)
    return len(block) / (time.perf_counter() - start)


def memory(which: str) -> int:
    """Bytes of this process: now (VmRSS) or the peak since the last reset (VmHWM)."""
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(which))


def measure(source: epath.Path, directory: pathlib.Path, dtype: str, rounds: int) -> dict[str, Any]:
    """Measures in a process that does nothing else."""
    versions = epath.Path(directory / "versions")
    before = memory("VmRSS")
    pathlib.Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    _, size = publish_once(source, versions, dtype)
    rise = memory("VmHWM") - before
    block = np.random.default_rng(0).bytes(BLOCK)
    rows = []
    for _ in range(rounds):
        disk = size / write_once(directory / "file", size, block)
        cpu, (seconds, _) = time.process_time(), publish_once(source, versions, dtype)
        cpu = time.process_time() - cpu
        rate = size / seconds
        rows.append((rate, disk, rate / disk, hash_rate(block), cpu / seconds, cpu / size))
    publishing, disk, ratio, hashing, cores, cpu = np.median(rows, axis=0)
    largest = max(np.prod(tensor.shape) for tensor in hf.tensors_of(CONFIG)) * size_of(dtype)
    return {
        "dtype": dtype,
        "MB": round(size / 1e6),
        "publish MB/s": round(publishing / 1e6),
        "disk MB/s": round(disk / 1e6),
        "ratio": round(ratio, 2),
        "lowest ratio": round(min(row[2] for row in rows), 2),
        "highest ratio": round(max(row[2] for row in rows), 2),
        "checksum MB/s": round(hashing / 1e6),
        "cores it got": round(cores, 2),
        "CPU s/GB": round(cpu * 1e9, 2),
        "memory MB": round(rise / 1e6),
        "memory bound MB": round((2 * largest + 1e9) / 1e6),
    }


def size_of(dtype: str) -> int:
    return np.dtype(hf.EXPORT_DTYPES[dtype][1]).itemsize


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--directory", type=pathlib.Path, default=pathlib.Path("runs"))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--source", help=argparse.SUPPRESS)  # for the process that only publishes
    parser.add_argument("--dtype", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.source:
        result = measure(epath.Path(given.source), given.directory, given.dtype, given.rounds)
        print(json.dumps(result))
        return
    given.directory.mkdir(parents=True, exist_ok=True)
    results = []
    place = pathlib.Path(tempfile.mkdtemp(prefix="publishing-", dir=given.directory.resolve()))
    try:
        source = save_step(epath.Path(place / "weights"))
        for dtype in hf.EXPORT_DTYPES:
            options = [f"--source={source}", f"--dtype={dtype}", f"--directory={place}"]
            command = [sys.executable, __file__, *options, f"--rounds={given.rounds}"]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            results.append(json.loads(done.stdout.splitlines()[-1]))
    finally:
        shutil.rmtree(place)
    show(results)
    keep(results)


if __name__ == "__main__":
    main()
