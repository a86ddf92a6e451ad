"""Throughput of the fleet's client at a real server, against SGLang's own benchmark client.

    make sglang
    python benchmarks/fleet.py [--rounds=5]

Both send token ids to one SGLang server on a CPU, with the same lengths and number of responses in
flight, in turns, since a shared machine drifts. Two measures of each: output tokens a second, and
requests in the server: the sum of the requests' latencies, as the server reports them, over the
time of the client. The result is the median of the rounds' ratios; the second measure depends less
on other load of the machine. The model is tiny: the faster the server, the more it waits for its
client. SGLang's client has no groups.
"""

import argparse
import contextlib
import functools
import json
import os
import pathlib
import socket
import subprocess
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from results import keep, show

from configs import common
from oapl_jax.config import FleetConfig, LearnerConfig
from oapl_jax.fleet.admission import Requirements
from oapl_jax.fleet.sampler import Fleet
from oapl_jax.learner import train_step
from oapl_jax.model.config import ModelConfig
from oapl_jax.model.sharding import make_mesh
from oapl_jax.model.tokenizer import make_character_tokenizer
from oapl_jax.model.transformer import Transformer
from oapl_jax.rollout.sampler import Sampling
from oapl_jax.structs import Prompt
from oapl_jax.weights.checkpoint import Weights
from oapl_jax.weights.probe import make_probe
from oapl_jax.weights.publisher import publish

ROOT = pathlib.Path(__file__).parents[1]
PYTHON = str(ROOT / ".venv-sglang/bin/python")
SIZES = {
    "model_type": "qwen3",
    "hidden_size": 64,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 1024,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "vocab_size": 4096,  # so that a random model hardly ever draws the end of a response
    "eos_token_id": 1,
    "pad_token_id": 0,
}
IN_FLIGHT, RESPONSES = 32, 512
PROMPT_TOKENS, RESPONSE_TOKENS = 32, 64
GROUP_SIZES = (1, 8)
SAMPLING = Sampling(temperature=1.0, top_p=1.0, top_k=0, max_response_tokens=RESPONSE_TOKENS)
DEADLINE = 180.0  # seconds for the server to be ready


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def publish_model(directory: epath.Path, config: ModelConfig, tokenizer) -> epath.Path:
    model = Transformer(config, jnp.dtype("float32"), remat="none")
    params = jax.jit(functools.partial(train_step.init_params, model))(jax.random.key(0))
    mesh = make_mesh(data=1, fsdp=-1, context=1, tensor=1)
    layout = LearnerConfig(micro_batches=1, row_length=64, rows_multiple=1, logp_chunk=64)
    probe = make_probe(model, mesh, layout)
    weights = Weights(directory / "weights", deadline=60.0)
    weights.save(0, params, {**probe(params), "dtype": "float32"})
    weights.wait()
    path = publish(
        weights.path(0),
        config,
        version=0,
        directory=directory,
        tokenizer=tokenizer,
        dtype="float32",
        config_hash="",
    )
    weights.close()
    return path


@contextlib.contextmanager
def server(path: epath.Path, log: pathlib.Path) -> Iterator[str]:
    port = free_port()
    command = [PYTHON, "cpu_setup/serve.py", f"--model-path={path}", f"--port={port}"]
    with log.open("wb") as file:
        process = subprocess.Popen(
            ["setpriv", "--pdeathsig=KILL", *command, "--skip-tokenizer-init"],
            cwd=ROOT,
            env={name: value for name, value in os.environ.items() if name != "XLA_FLAGS"},
            stdout=file,
            stderr=file,
        )
    try:
        deadline = time.monotonic() + DEADLINE
        while True:
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=30).close()
                break
            if process.poll() is not None or time.monotonic() > deadline:
                raise SystemExit(f"the server did not start; see {log}")
            time.sleep(1.0)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.kill()
        process.wait()


def open_fleet(url: str, path: epath.Path, config: ModelConfig, tokenizer, group: int) -> Fleet:
    changes = dict(servers=(url,), max_in_flight=IN_FLIGHT // group, attempts=1)
    settings = FleetConfig.from_dict({**common.fleet().to_dict(), **changes})
    requirements = Requirements(
        model_config=config,
        tokenizer=tokenizer,
        stop_ids=config.eos_token_ids,
        sampling=SAMPLING,
        max_prompt_tokens=PROMPT_TOKENS,
        dtype="float32",
        probe_tolerance=settings.probe_tolerance,
    )
    fleet = Fleet(settings, requirements, allow_older=False, log=print)
    fleet.refresh(0, path)
    return fleet


def seconds_in_server(url: str) -> float:
    """Returns the summed latency of all requests that the server has finished."""
    with urllib.request.urlopen(f"{url}/metrics", timeout=30) as answer:
        lines = answer.read().decode().splitlines()
    named = [line for line in lines if line.startswith("sglang:e2e_request_latency_seconds_sum")]
    return sum(float(line.split()[-1]) for line in named)


def ours(fleet: Fleet, group: int, seed: int) -> tuple[int, float]:
    """Runs the fleet's client; returns output tokens and seconds."""
    rng = np.random.default_rng(seed)
    draw = lambda: rng.integers(2, SIZES["vocab_size"], PROMPT_TOKENS).astype(np.int32)
    prompts = [Prompt(str(i), i, draw(), "", "", "") for i in range(RESPONSES // group)]
    start = time.perf_counter()
    sampled = list(fleet.generate(prompts, n=group, sampling=SAMPLING))
    seconds = time.perf_counter() - start
    rollouts = [rollout for s in sampled for rollout in s.rollouts]
    if len(rollouts) != RESPONSES:
        raise SystemExit(f"the fleet got {len(rollouts)} of {RESPONSES} responses")
    return sum(len(rollout.tokens) for rollout in rollouts), seconds


def theirs(url: str, path: epath.Path, seed: int) -> tuple[int, float]:
    """Runs SGLang's benchmark client; returns output tokens and seconds, as it reports them."""
    with tempfile.NamedTemporaryFile() as file:
        flags = {
            "backend": "sglang",
            "base-url": url,
            "model": path,
            "dataset-name": "random-ids",
            "random-input-len": PROMPT_TOKENS,
            "random-output-len": RESPONSE_TOKENS,
            "random-range-ratio": 1.0,
            "num-prompts": RESPONSES,
            "max-concurrency": IN_FLIGHT,
            "warmup-requests": 0,
            "temperature": 1.0,
            "seed": seed,
            "output-file": file.name,
        }
        switches = ("tokenize-prompt", "return-logprob", "disable-stream", "disable-ignore-eos")
        command = [PYTHON, "-Wignore", "cpu_setup/bench.py", "--disable-tqdm"]
        command += [f"--{name}={value}" for name, value in flags.items()]
        command += [f"--{switch}" for switch in switches]
        subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
        result = json.loads(pathlib.Path(file.name).read_text().splitlines()[-1])
    if result["completed"] != RESPONSES:
        raise SystemExit(f"SGLang's client got {result['completed']} of {RESPONSES} responses")
    return result["total_output_tokens"], result["duration"]


def measure(url: str, run: Callable[[], tuple[int, float]]) -> tuple[float, float]:
    """Returns output tokens a second, and requests in the server."""
    before = seconds_in_server(url)
    tokens, seconds = run()
    return tokens / seconds, (seconds_in_server(url) - before) / seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    if not (ROOT / ".venv-sglang/done").exists():
        raise SystemExit("SGLang is not installed (.venv-sglang); run make sglang")
    config = ModelConfig.from_hf(SIZES, source="benchmarks/fleet.py")
    with tempfile.TemporaryDirectory() as place:
        directory = epath.Path(place)
        tokenizer = make_character_tokenizer("0123456789", f"{place}/tokenizer")
        path = publish_model(directory, config, tokenizer)
        with server(path, pathlib.Path(place) / "server.log") as url:
            fleets = {n: open_fleet(url, path, config, tokenizer, n) for n in GROUP_SIZES}
            clients = {"SGLang's client": functools.partial(theirs, url, path)}
            for n, fleet in fleets.items():
                clients[f"ours, groups of {n}"] = functools.partial(ours, fleet, n)
            for run in clients.values():
                run(seed=0)  # warm-up
            rows = np.array(
                [
                    [measure(url, functools.partial(run, seed=seed)) for run in clients.values()]
                    for seed in range(1, rounds + 1)
                ]
            )
            for fleet in fleets.values():
                fleet.close()
    ratios = np.median(rows / rows[:, :1], axis=0)
    lines = [
        {
            "client": name,
            "tokens/s": round(rate),
            "of SGLang's": round(by[0], 3),
            "in the server": round(busy, 2),
            "of its": round(by[1], 3),
        }
        for name, (rate, busy), by in zip(clients, np.median(rows, axis=0), ratios, strict=True)
    ]
    show(lines)
    keep({"table": lines, "rounds": rows.tolist()})


if __name__ == "__main__":
    main()
