"""Checks one GPU or TPU host in less than eight minutes: kernels, learner, sampler, default job.

    python benchmarks/accelerator.py [--to=runs/benchmarks/accelerator.json]
    python benchmarks/accelerator.py --small     # tiny shapes: tries the command on a CPU

Nothing is downloaded: weights are random, of Qwen3-0.6B's shape. Each section runs in a process of
its own, which has the accelerator to itself and is ended when its time is over.

    device     rates of matrix products and of memory, measured and as published
    attention  each kernel of this platform against plain attention in float32: errors of output and
               gradients, relative to the largest value; milliseconds. Packed rows hold sequences of
               many lengths and padding. Of long rows the plain one computes some queries
    learner    tokens/s and MFU of a gradient step (OAPL, AdamW) by row length and kernel
    sampler    tokens/s of the embedded sampler with continuous batching, on recorded lengths of
               responses, and the bound by memory bandwidth: each token reads all weights, once for
               all slots of a device, and the keys and values before it
    job        two minutes of the default job, configs/arithmetic.py

A section that fails, or measures a line that does, is named in the JSON with its error, and the
exit code is 1; the others still run. A host without an accelerator is refused with exit code 2.
"""

import argparse
import dataclasses
import datetime
import functools
import importlib.metadata
import json
import os
import pathlib
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from recorded import FILE, GROUP_SIZE, WIDTH, compiled_seconds, sample_lengths
from results import DIRECTORY

import oapl_jax
from oapl_jax.config import LearnerConfig
from oapl_jax.errors import RunError, UserError, exit_with_code, one_line
from oapl_jax.learner import packing, train_step
from oapl_jax.learner.optimizer import make_optimizer
from oapl_jax.model import attention, hf
from oapl_jax.model.blockwise_attention import visible
from oapl_jax.model.config import ModelConfig
from oapl_jax.model.sharding import make_mesh
from oapl_jax.model.transformer import Transformer
from oapl_jax.objectives import bind
from oapl_jax.planning.hardware import CHIPS, GPUS
from oapl_jax.planning.programs import step_flops
from oapl_jax.rollout.local_sampler import LocalSampler
from oapl_jax.rollout.sampler import Sampling
from oapl_jax.structs import Batch, Group, Prompt, Rollout

ROOT = pathlib.Path(__file__).resolve().parent.parent
PACKAGES = re.compile("jax|jaxlib|libtpu|jax-cuda.*|jax_cuda.*|flax|optax|orbax-checkpoint")
QWEN3_06B = {
    "model_type": "qwen3",
    "vocab_size": 151936,
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 40960,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "tie_word_embeddings": True,
}
# Kind of device -> bfloat16 FLOP/s without sparsity, and bytes/s of its memory, as published.
PUBLISHED = {
    kind: (CHIPS[name].flops, CHIPS[name].hbm_bandwidth)
    for name, kinds in {
        "v5e": ["TPU v5 lite", "TPU v5e"],
        "v5p": ["TPU v5", "TPU v5p"],
        "v6e": ["TPU v6 lite", "TPU v6e"],
    }.items()
    for kind in kinds
} | {
    "NVIDIA A100-SXM4-40GB": (312e12, 1555e9),
    "NVIDIA A100-SXM4-80GB": (312e12, 2039e9),
    "NVIDIA H100 80GB HBM3": (989e12, 3350e9),
    "NVIDIA H200": (GPUS["h200"].flops, GPUS["h200"].bandwidth),
    "NVIDIA L4": (121e12, 300e9),
}
REMAT = {"gpu": "dots", "tpu": "attention", "cpu": "none"}
TOLERANCE = {"bfloat16": 0.03, "float32": 1e-4}  # of an error relative to the largest value
ROUNDS, ENOUGH = 3, 6.0  # a program is timed so often, or for this many seconds
LAST_LINES = 40  # of stderr, kept from a section that failed

Line = dict[str, Any]
Kernel = tuple[int, attention.MakeKernel]  # as in attention.KERNELS


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sizes:
    model: Mapping[str, Any]
    dtype: str
    product: int  # rows of the square matrices whose product is timed
    copied: int  # bytes
    lengths: tuple[int, int]  # of rows, the shorter ones first
    tokens: int  # of a device in a micro-batch
    queries: int  # most of a row that the plain attention computes
    prompt: int  # tokens, in the learner
    logp_chunk: int
    slots: int  # of a device
    groups: int  # of GROUP_SIZE recorded responses for each device, at most 32
    shorten: int  # divides the recorded lengths
    job_seconds: float
    patience: float  # multiplies the seconds of each section
    job: tuple[str, ...] = ()  # settings other than the default


FULL = Sizes(
    model=QWEN3_06B,
    dtype="bfloat16",
    product=8192,
    copied=1 << 30,
    lengths=(4096, 16384),
    tokens=16384,
    queries=1024,
    prompt=512,
    logp_chunk=256,
    slots=32,
    groups=16,
    shorten=1,
    job_seconds=115,
    patience=1,
)
SMALL = Sizes(
    model=QWEN3_06B
    | dict(vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=1)
    | dict(num_attention_heads=4, num_key_value_heads=2, head_dim=16),
    dtype="float32",
    product=256,
    copied=1 << 20,
    lengths=(64, 128),
    tokens=128,
    queries=32,
    prompt=16,
    logp_chunk=32,
    slots=4,
    groups=1,
    shorten=64,
    job_seconds=450,
    patience=4,  # on a busy machine
    job=(
        "--config.num_steps=2",
        "--config.group_size=2",
        "--config.groups_per_step=2",
        "--config.data.train_size=64",
        "--config.data.validation_size=4",
        "--config.data.test_size=4",
        "--config.model.architecture.hidden_size=32",
        "--config.model.architecture.intermediate_size=32",
        "--config.warmup.num_steps=2",
        "--config.warmup.batch_size=8",
        "--config.warmup.demonstrations=32",
        "--config.buffer.zero_variance=keep",
        "--config.rollout.prompts_per_call=2",
        "--config.rollout.max_sequences=16",
        "--config.evaluation.every=0",
        "--config.tracking.tensorboard=False",
    ),
)


def check_device(sizes: Sizes) -> Iterator[Line]:
    """Raises a UserError if the host has no accelerator."""
    platform, kind = jax.default_backend(), jax.devices()[0].device_kind
    if platform == "cpu" and sizes is FULL:
        raise UserError(
            "JAX finds no accelerator on this host; install jax[tpu] or jax[cuda13], or try the "
            "command on a CPU with --small"
        )
    line = {"platform": platform, "device": kind, "devices": jax.device_count()}
    names = "FLOP/s", "bytes/s"
    found = attempt(line, lambda: dict(zip(names, measured_rates(sizes), strict=True)))
    published = zip(names, PUBLISHED.get(kind, (None, None)), strict=True)
    yield found | {f"published {name}": rate for name, rate in published}


def measured_rates(sizes: Sizes) -> tuple[float, float]:
    """FLOP/s of a product of square matrices, and bytes/s read and written by a copy."""
    matrix = jnp.ones((sizes.product, sizes.product), sizes.dtype)
    array = jnp.ones(sizes.copied // 4, jnp.float32)
    product, copy = jax.jit(lambda x: x @ x), jax.jit(lambda x: x + 1)
    flops = 2 * sizes.product**3 / seconds(lambda: product(matrix))
    return flops, 2 * sizes.copied / seconds(lambda: copy(array))


def rates(sizes: Sizes) -> tuple[float, float, str]:
    """FLOP/s and bytes/s of a device, and their source."""
    kind = jax.devices()[0].device_kind
    if kind in PUBLISHED:
        return *PUBLISHED[kind], "published"
    return *measured_rates(sizes), "measured"


def kernels(platform: str) -> dict[str, Kernel]:
    """Attention kernels for a platform, in the form of attention.KERNELS, its own one first."""
    by_mask = 2, lambda *_: (jax.tree_util.Partial(attention.mask_attention), P())
    blockwise = attention.KERNELS["cpu"]
    return {
        "cpu": {"blockwise": blockwise, "mask": by_mask},
        "gpu": {"segments": attention.KERNELS["gpu"], "mask": by_mask, "blockwise": blockwise},
        "tpu": {"splash": attention.KERNELS["tpu"], "blockwise": blockwise},
    }[platform]


def any_length() -> Any:
    """Lifts the bound above which attention by a mask leaves rows to attention by blocks."""
    return mock.patch.object(attention, "QUADRATIC_BYTES", 1 << 62)


def check_attention(sizes: Sizes) -> Iterator[Line]:
    config, dtype = ModelConfig.from_hf(dict(sizes.model), source=__file__), jnp.dtype(sizes.dtype)
    mesh = make_mesh(data=1, fsdp=1, context=1, tensor=1, devices=jax.devices()[:1])
    here = NamedSharding(mesh, P())
    programs = {}
    for name, kernel in kernels(jax.default_backend()).items():
        run = functools.partial(on_mesh, mesh, kernel)
        both = run, functools.partial(gradients, run)
        programs[name] = [jax.jit(program, in_shardings=here) for program in both]
    rng = np.random.default_rng(0)
    for length in sizes.lengths:
        rows = sizes.tokens // length
        chosen = np.sort(rng.choice(length, min(length, sizes.queries), replace=False))
        shapes = [(config.num_heads, length), *[(config.num_kv_heads, length)] * 2]
        query, key, value, cotangent = (
            jax.random.normal(jax.random.key(i), (rows, count, heads, config.head_dim), dtype)
            for i, (heads, count) in enumerate((*shapes, (config.num_heads, len(chosen))))
        )
        segments = {"whole": np.ones((rows, length), np.int32)}
        segments["packed"] = packed_segments(rng, rows, length)
        for kind in segments:
            given = query, key, value, segments[kind], chosen, cotangent
            given = jax.device_put(given, here)
            expected = plain_gradients(*given)
            for name in programs:
                line = {"kernel": name, "length": length, "rows": kind}
                with any_length():
                    yield attempt(line, compare, programs[name], given, expected)


def on_mesh(mesh: Mesh, kernel: Kernel, *given: jax.Array) -> jax.Array:
    multiple, make_kernel = kernel
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        return attention.over_mesh(make_kernel, *given, multiple=multiple)


def packed_segments(rng: np.random.Generator, rows: int, length: int) -> np.ndarray:
    """Rows of eight sequences, then padding."""
    ends = np.sort([rng.choice(length, 8, replace=False) for _ in range(rows)])
    before = np.sum(ends[:, None] <= np.arange(length)[:, None], axis=-1)  # ends so far
    return np.where(before < 8, before + 1, 0).astype(np.int32)


def gradients(run: Callable[..., jax.Array], query, key, value, segments, chosen, cotangent):
    """Output of the chosen queries, and gradients of query, key and value."""
    out, pull = jax.vjp(lambda *given: run(*given, segments), query, key, value)
    return out[:, chosen], *pull(jnp.zeros_like(out).at[:, chosen].set(cotangent))


@jax.jit
def plain_gradients(query, key, value, segments, chosen, cotangent):
    """As `gradients`, in float32, by attention that holds the weights of the chosen queries."""
    slots = jnp.arange(query.shape[1])
    mask = visible(segments[:, chosen], segments, chosen, slots)
    run = lambda query, key, value: attention.masked_attention(query[:, chosen], key, value, mask)
    wide = (x.astype(jnp.float32) for x in (query, key, value))
    with jax.default_matmul_precision("highest"):
        out, pull = jax.vjp(run, *wide)
        return out, *pull(cotangent.astype(jnp.float32))


@jax.jit
def relative_errors(found, expected):
    """Largest difference of each pair of arrays over the largest expected value."""
    error = lambda x, y: jnp.abs(x.astype(jnp.float32) - y).max() / jnp.abs(y).max()
    return jnp.stack([error(x, y) for x, y in zip(found, expected, strict=True)])


def compare(programs: Sequence[Any], given: Sequence[jax.Array], expected: Any) -> Line:
    """Errors of a kernel and its times; raises a RunError if it differs from the plain one."""
    forward, backward = programs
    errors = np.asarray(relative_errors(backward(*given), expected))
    output, gradient = float(errors[0]), float(errors[1:].max())
    if not errors.max() <= TOLERANCE[given[0].dtype.name]:  # NaN fails too
        raise RunError(f"the output's error is {output:.2g}, the gradients' {gradient:.2g}")
    return {
        "output error": output,
        "gradient error": gradient,
        "forward ms": 1e3 * seconds(lambda: forward(*given[:4])),
        "forward and backward ms": 1e3 * seconds(lambda: backward(*given)),
    }


def check_learner(sizes: Sizes) -> Iterator[Line]:
    config = ModelConfig.from_hf(dict(sizes.model), source=__file__)
    platform = jax.default_backend()
    model = Transformer(config, jnp.dtype(sizes.dtype), REMAT[platform])
    mesh = make_mesh(data=1, fsdp=-1, context=1, tensor=1)
    optimizer = make_optimizer(
        learning_rate=1e-6,
        warmup_steps=0,
        final_fraction=1.0,
        num_steps=10,
        b1=0.9,
        b2=0.95,
        eps=1e-8,
        weight_decay=0.0,
        max_grad_norm=1.0,
        mu_dtype="float32",
    )
    init = train_step.make_init(model, optimizer, mesh, fresh=True)
    objective = bind("oapl", {"beta1": 1.0, "beta2": 0.1})
    peak, _, source = rates(sizes)
    for length in sizes.lengths:
        sequences, response = 2 * sizes.tokens // length * mesh.size, length - sizes.prompt
        batch = packing.build_batch(
            [random_group(config, sizes.prompt, response, sequences)],
            objective,
            LearnerConfig(
                micro_batches=2,
                row_length=length,
                rows_multiple=mesh.size,
                logp_chunk=sizes.logp_chunk,
            ),
            aggregation="sequence",
            step=0,
            max_prompt_tokens=sizes.prompt,
            max_response_tokens=response,
        )
        batch = packing.to_mesh(batch, train_step.batch_shardings(mesh))
        flops = step_flops(config, sequences, sizes.prompt, response)
        for name, kernel in kernels(platform).items():
            if name == "blockwise" and length > min(sizes.lengths):
                continue  # its loop over blocks would take minutes on an accelerator
            step = train_step.make_train_step(
                model,
                objective,
                optimizer,
                mesh,
                temperature=1.0,
                logp_chunk=sizes.logp_chunk,
                kl_weight=0.0,
                ess_power=0.0,
                to_reference=False,
            )
            line = {"kernel": name, "row length": length, "tokens": sequences * length}
            with mock.patch.dict(attention.KERNELS, {platform: kernel}), any_length():
                found = attempt(line, time_steps, init, step, batch)
            if "s" in found:
                found["tokens/s"] = found["tokens"] / found["s"]
                found["MFU"] = flops / (found["s"] * mesh.size * peak)
                found["peak"] = source
            yield found


def random_group(config: ModelConfig, prompt: int, response: int, size: int) -> Group:
    rng = np.random.default_rng(0)
    draw = lambda count: rng.integers(2, config.vocab_size, count).astype(np.int32)
    logp = np.full(response, -10.0, np.float32)
    rollouts = tuple(Rollout(draw(response), logp, 0, "length") for _ in range(size))
    return Group(Prompt("", 0, draw(prompt), "", "", ""), rollouts, np.arange(size) % 2.0)


def time_steps(init: Callable[..., Any], step: Callable[..., Any], batch: Batch) -> Line:
    state = init(jax.random.key(0))

    def run() -> Any:
        nonlocal state
        state, metrics = step(state, batch)  # donates the old state
        return metrics

    taken = seconds(run)
    if int(state.skipped):
        raise RunError("loss, gradient or update was not finite")
    return {"s": taken}


def check_sampler(sizes: Sizes) -> Iterator[Line]:
    config = ModelConfig.from_hf(dict(sizes.model), source=__file__)
    mesh = make_mesh(data=-1, fsdp=1, tensor=1)
    slots = sizes.slots * mesh.size
    recorded = json.loads(FILE.read_text())
    lengths = np.array(recorded["response"]).reshape(-1, GROUP_SIZE)[: sizes.groups]
    lengths = np.tile(-(-lengths // sizes.shorten), (mesh.size, 1))
    prompts = [
        Prompt("", i, np.full(tokens, 2, np.int32), "", "", "")
        for i, tokens in enumerate(recorded["prompt"][::GROUP_SIZE][: sizes.groups] * mesh.size)
    ]
    sampler = LocalSampler(
        config,
        mesh,
        dtype=sizes.dtype,
        stop_ids=(config.vocab_size,),  # no token
        seed=0,
        max_sequences=slots,
        max_prompt_tokens=WIDTH,
        prompt_multiple=WIDTH,
        tokens_per_round=16,
    )
    model = Transformer(config, jnp.dtype(sizes.dtype), "none")
    init = jax.jit(functools.partial(train_step.init_params, model))
    sampler.set_params(0, init(jax.random.key(0)))
    line = {"slots": slots, "responses": lengths.size, "tokens": int(lengths.sum())}
    found = attempt(line, time_sampler, sampler, prompts, lengths)
    if "s" in found:
        _, bandwidth, source = rates(sizes)
        bound = tokens_per_second_bound(
            config,
            itemsize=jnp.dtype(sizes.dtype).itemsize,
            prompts=np.array([len(prompt.tokens) for prompt in prompts]),
            lengths=lengths,
            slots=slots,
            devices=mesh.size,
            bandwidth=bandwidth,
        )
        found["tokens/s"] = found["tokens"] / found["s"]
        found |= {"bound": bound, "share of the bound": found["tokens/s"] / bound}
        found["bandwidth"] = source
    yield found


def time_sampler(sampler: LocalSampler, prompts: Sequence[Prompt], lengths: np.ndarray) -> Line:
    """Seconds for responses of the given lengths, whichever tokens are sampled."""
    longest = int(lengths.max())
    sampling = Sampling(temperature=1.0, top_p=1.0, top_k=0, max_response_tokens=longest)
    run = functools.partial(sample_lengths, sampler, prompts, lengths, sampling)
    run()  # compiles
    return {"s": compiled_seconds(run)}


def tokens_per_second_bound(
    config: ModelConfig,
    *,
    itemsize: int,
    prompts: np.ndarray,
    lengths: np.ndarray,
    slots: int,
    devices: int,
    bandwidth: float,
) -> float:
    """Tokens/s of all devices if decoding took only as long as reading from memory.

    Each device reads its copy of the weights once for a token of every slot, and, for each token,
    the keys and values of the places before it. Writes and prompts are not counted.

    Args:
      itemsize: bytes of a weight, and of a number in the cache.
      prompts: int[N], tokens of each prompt.
      lengths: int[N, G], tokens of its responses.
      slots: of all devices.
      bandwidth: bytes/s of one device.
    """
    place = 2 * config.num_layers * config.num_kv_heads * config.head_dim * itemsize
    places = np.sum(lengths * prompts[:, None] + lengths * (lengths + 1) / 2)
    weights = itemsize * hf.parameter_count(config) * lengths.sum() / slots
    return float(lengths.sum() * bandwidth / (weights + place * places / devices))


def check_job(sizes: Sizes) -> Iterator[Line]:
    """This process leaves the accelerator to the job's."""
    yield attempt({}, run_job, sizes)


def run_job(sizes: Sizes) -> Line:
    with tempfile.TemporaryDirectory() as directory:
        command = [
            *(sys.executable, "-m", "oapl_jax.train", "--config=configs/arithmetic.py"),
            *(f"--workdir={directory}/run", f"--config.data.data_dir={directory}/data"),
            *sizes.job,
        ]
        started = time.monotonic()
        process = subprocess.Popen(command, cwd=ROOT, stdout=sys.stderr)
        try:
            process.wait(sizes.job_seconds)
        except subprocess.TimeoutExpired:
            process.terminate()  # it saves and ends
        if code := process.wait():
            raise RunError(f"the job ended with exit code {code}")
        taken = time.monotonic() - started
        file = pathlib.Path(directory) / "run" / "metrics.jsonl"
        written = file.read_text() if file.exists() else ""
    steps = [json.loads(line) for line in written.splitlines()]
    if not steps:
        raise RunError(f"the job made no gradient step in {taken:.0f} s")
    of_steps = lambda key: [step[key] for step in steps if key in step]
    return {
        "seconds": taken,
        "steps": steps[-1]["step"],
        "s a step": steps[-1]["rl_seconds"] / steps[-1]["step"],
        "compile s": steps[-1]["compile/seconds"],
        "learner tokens/s": statistics.median(of_steps("learner/tokens_per_second")),
        "sampler tokens/s": statistics.median(of_steps("rollout/tokens_per_second")),
        "pass@1": of_steps("eval/pass@1"),
    }


def attempt(line: Line, measure: Callable[..., Line], *given: Any) -> Line:
    """The line with the measured values, or with the error of `measure(*given)`."""
    try:
        return line | measure(*given)
    except Exception as error:
        traceback.print_exc()
        return line | {"error": one_line(error)}


def seconds(run: Callable[[], Any]) -> float:
    """Median time of a program, after a first call that compiles it."""
    jax.block_until_ready(run())
    times = []
    while len(times) < ROUNDS and sum(times) < ENOUGH:
        start = time.perf_counter()
        jax.block_until_ready(run())
        times.append(time.perf_counter() - start)
    return statistics.median(times)


# Section -> its lines, and the most seconds that it may take.
SECTIONS: dict[str, tuple[Callable[[Sizes], Iterator[Line]], float]] = {
    "device": (check_device, 25),
    "attention": (check_attention, 75),
    "learner": (check_learner, 170),
    "sampler": (check_sampler, 75),
    "job": (check_job, 130),
}


def run_section(command: Sequence[str], budget: float) -> tuple[dict[str, Any], int | None]:
    """Runs a section in a process group of its own and ends it after `budget` seconds.

    Returns its entry in the JSON, with "error" and the last lines of stderr if it failed, and the
    exit code, None if its time was over.
    """
    started = time.monotonic()
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as messages:
        process = subprocess.Popen(command, stdout=out, stderr=messages, start_new_session=True)
        try:
            code = process.wait(budget)
        except BaseException as reason:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            if not isinstance(reason, subprocess.TimeoutExpired):
                raise
            code = None
        out.seek(0)
        messages.seek(0)
        whole = [line for line in out if line.startswith("{") and line.endswith("}\n")]
        last = [line.rstrip() for line in messages if line.strip()][-LAST_LINES:]
    lines = [json.loads(line) for line in whole]
    entry = {"seconds": round(time.monotonic() - started, 1), "budget": budget, "lines": lines}
    errors = [line["error"] for line in lines if "error" in line]
    if code is None:
        errors.insert(0, f"not done in {budget:g} s")
    elif code < 0:
        errors.insert(0, f"ended by {signal.Signals(-code).name}")
    elif code:
        errors.insert(0, last[-1].removeprefix("error: ") if last else f"exit code {code}")
    if errors:
        entry |= {"error": errors[0], "stderr": last}
    return entry, code


def show(line: Line) -> str:
    return ", ".join(f"{name} {value}" for name, value in line.items())


def rounded(line: Line) -> Line:
    """Numbers with four digits."""
    four = lambda x: float(f"{x:.4g}") if isinstance(x, float) else x
    return {key: four(value) for key, value in line.items()}


def check_host(small: bool, to: pathlib.Path) -> None:
    """Runs all sections and writes the JSON; raises a RunError if one failed."""
    sizes, options = (SMALL, ["--small"]) if small else (FULL, [])
    there = {d.metadata["Name"]: d.version for d in importlib.metadata.distributions()}
    versions = {name: there[name] for name in sorted(there) if PACKAGES.fullmatch(name)}
    found: dict[str, Any] = {
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "options": options,
        "versions": {"oapl_jax": oapl_jax.__version__} | versions,
        "failed": [],
        "sections": {},
    }
    for name, (_, budget) in SECTIONS.items():
        print(f"{name}, at most {sizes.patience * budget:g} s", flush=True)
        command = [sys.executable, __file__, f"--section={name}", *options]
        entry, code = run_section(command, sizes.patience * budget)
        if code == 2:
            raise UserError(entry["error"])
        for line in entry["lines"]:
            print(f"  {show(line)}", flush=True)
        if "error" in entry:
            print(f"  failed: {entry['error']}", flush=True)
            found["failed"].append(name)
        found["sections"][name] = entry
        to.parent.mkdir(parents=True, exist_ok=True)
        to.write_text(json.dumps(found, indent=1) + "\n")
    print(to)
    if found["failed"]:
        raise RunError(f"{', '.join(found['failed'])} failed; {to} has the errors")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--to", type=pathlib.Path, default=DIRECTORY / "accelerator.json")
    parser.add_argument("--small", action="store_true", help="tiny shapes, on any platform")
    parser.add_argument("--section", choices=SECTIONS, help="print one section's lines as JSON")
    given = parser.parse_args()
    if not given.section:
        check_host(given.small, given.to)
        return
    measure, _ = SECTIONS[given.section]
    for line in measure(SMALL if given.small else FULL):
        print(json.dumps(rounded(line)), flush=True)


if __name__ == "__main__":
    exit_with_code(main)
