"""Fixtures: real SGLang servers on a CPU with their versions, and fault servers.

Tests of real servers fail unless `make sglang` has installed SGLang into .venv-sglang.
"""

import contextlib
import dataclasses
import functools
import json
import os
import pathlib
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from fault_server import FaultServer, publish_toy
from fleets import open_toy_fleet
from jax.sharding import AxisType

from configs import arithmetic
from oapl_jax.data.synthetic.tasks import TASKS
from oapl_jax.learner import train_step as learner
from oapl_jax.model.policy import Policy, open_policy
from oapl_jax.model.sharding import AXES
from oapl_jax.model.transformer import Transformer, head, logits
from oapl_jax.weights.checkpoint import Weights
from oapl_jax.weights.probe import make_probe
from oapl_jax.weights.publisher import publish, version_path

ROOT = pathlib.Path(__file__).parents[2]
READY_DEADLINE = 400.0  # seconds; a start takes 20 on two free cores
CONTEXT = 4096  # tokens: room for a request that lasts long enough to be interrupted
TAIL = 6000  # characters of a log that a failed test shows

PROCESSES: list["Process"] = []  # running, for the logs of a failed test


class Process:
    """A server in a process group of its own, which ends with the test run; `call` talks to it."""

    def __init__(self, name: str, command: list[str], port: int, log: pathlib.Path):
        self.name, self.port, self.log = name, port, log
        self.url = f"http://127.0.0.1:{port}"
        ours = ("XLA_FLAGS", "JAX_PLATFORMS")
        with log.open("ab") as file:
            self._process = subprocess.Popen(
                ["setpriv", "--pdeathsig=KILL", *command],
                cwd=ROOT,
                env={k: v for k, v in os.environ.items() if k not in ours},
                stdout=file,
                stderr=file,
                process_group=0,
            )
        PROCESSES.append(self)

    def wait_ready(self, path: str = "/health") -> None:
        deadline = time.monotonic() + READY_DEADLINE
        while time.monotonic() < deadline:
            if (code := self._process.poll()) is not None:
                pytest.fail(f"{self.name} ended with code {code} before it was ready")
            with contextlib.suppress(OSError):
                if self.call(path)[0] == 200:
                    return
            time.sleep(0.5)
        pytest.fail(f"{self.name} was not ready in {READY_DEADLINE:.0f} seconds")

    def wait_exit(self, deadline: float) -> int:
        return self._process.wait(deadline)

    def call(self, path: str, body: Any = None, *, timeout: float = 60.0) -> tuple[int, Any]:
        """Returns status and content of a GET, or of a POST of `body`; OSError if unreachable."""
        request = urllib.request.Request(
            self.url + path,
            data=None if body is None else json.dumps(body).encode(),
            headers={"Content-Type": "application/json"},
        )
        try:
            with urllib.request.urlopen(request, timeout=timeout) as answer:
                status, text = answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            status, text = error.code, error.read().decode()
        try:
            return status, json.loads(text)
        except ValueError:
            return status, text

    def ask(self, path: str, body: Any = None) -> Any:
        status, answer = self.call(path, body)
        assert status == 200, f"{path} of {self.name}: {status} {answer}"
        return answer

    def interrupt(self, number: signal.Signals) -> None:
        self._process.send_signal(number)

    def kill(self) -> None:
        """SIGKILL to the whole group, at once."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        if self in PROCESSES:
            PROCESSES.remove(self)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    if report.failed:
        for process in PROCESSES:
            text = process.log.read_text(errors="replace")[-TAIL:]
            report.sections.append((f"log of {process.name} ({process.log})", text))
    return report


def find_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def sglang_program(name: str) -> list[str]:
    """Returns the command of a program of cpu_setup/ in SGLang's environment."""
    if not (ROOT / ".venv-sglang/done").exists():
        pytest.fail("SGLang is not installed (.venv-sglang); run make sglang")
    return [str(ROOT / ".venv-sglang/bin/python"), "-u", f"cpu_setup/{name}"]


@pytest.fixture
def free_port():
    return find_port


@pytest.fixture
def sglang_command():
    return sglang_program


def launch_server(model, log: pathlib.Path, port: int | None = None, **flags) -> Process:
    """Starts a server of a model; `weight_version=2` is the flag --weight-version=2."""
    port = port or find_port()
    command = [*sglang_program("serve.py"), f"--model-path={os.fspath(model)}", f"--port={port}"]
    command += ["--skip-tokenizer-init"]
    command += [f"--{name.replace('_', '-')}={value}" for name, value in flags.items()]
    return Process(f"SGLang on port {port}", command, port, log)


@dataclasses.dataclass
class Published:
    """Versions 1, 2 and 3 of a model of the default's sizes: three fresh sets of weights."""

    directory: epath.Path
    policy: Policy
    model: Transformer
    params: dict[int, Any]

    def path(self, version: int) -> epath.Path:
        return version_path(self.directory, version)

    def logp(self, version: int, prompt, response, temperature: float = 1.0) -> np.ndarray:
        """Log-probs of a response by the learner's model: one pass over the whole sequence."""
        whole = [*prompt, *response]
        tokens = np.zeros((1, 128), np.int32)  # one shape, so that it is compiled once
        tokens[0, : len(whole)] = whole
        scores = score(self.model)(self.params[version], tokens)
        table = np.asarray(jax.nn.log_softmax(scores / temperature, axis=-1))
        return table[np.arange(len(prompt) - 1, len(whole) - 1), response]


@functools.cache
def score(model: Transformer):
    """Jitted: parameters and int32[1, T] -> logits [T, V]."""

    def apply(params, tokens):
        places = jnp.arange(tokens.shape[1])[None]
        hidden: Any = model.apply({"params": params}, tokens, places, jnp.ones_like(tokens))
        return logits(hidden, head(params, model.config))[0]

    return jax.jit(apply)


@pytest.fixture(scope="session")
def published(tmp_path_factory) -> Published:
    directory = epath.Path(tmp_path_factory.mktemp("published"))
    sizes = arithmetic.get_config().model.architecture.to_dict()
    policy = open_policy(
        directory / "policy",
        path="",
        architecture={**sizes, "max_position_embeddings": CONTEXT},
        characters=TASKS["chain_sum"].characters,
    )
    model = Transformer(policy.config, jnp.dtype("float32"), remat="none")
    init = jax.jit(functools.partial(learner.init_params, model))
    mesh = jax.make_mesh((1,) * 4, AXES, (AxisType.Auto,) * 4, devices=jax.devices()[:1])
    probe = make_probe(model, mesh, row_length=64, rows_multiple=1, logp_chunk=64)
    params = {version: jax.device_get(init(jax.random.key(version))) for version in (1, 2, 3)}
    weights = Weights(directory / "weights")
    for version, of_version in params.items():
        weights.save(version, of_version, {**probe(of_version), "dtype": "float32"})
        weights.wait()
        publish(
            weights.path(version),
            policy.config,
            version=version,
            directory=directory,
            tokenizer=policy.tokenizer,
            dtype="float32",
            config_hash="",
        )
    weights.close()
    return Published(directory, policy, model, params)


@dataclasses.dataclass
class Servers:
    servers: list[Process]
    router: Process

    @property
    def urls(self) -> list[str]:
        return [server.url for server in self.servers]


@pytest.fixture(scope="session")
def servers(published, tmp_path_factory):
    """Two servers, started on version 1, and a router in front of them."""
    logs = tmp_path_factory.mktemp("servers")
    running = []
    try:
        for index in range(2):
            running.append(
                launch_server(
                    published.path(1),
                    logs / f"server{index}.log",
                    weight_version="1",
                    served_model_name="policy",  # the router takes other names for other models
                )
            )
        for server in running:
            server.wait_ready()
        port = find_port()
        command = [*sglang_program("route.py"), "--host=127.0.0.1", f"--port={port}"]
        command += [f"--prometheus-port={find_port()}", "--policy=round_robin", "--worker-urls"]
        command += [server.url for server in running]
        running.append(Process("sglang-router", command, port, logs / "router.log"))
        running[-1].wait_ready("/readiness")
        yield Servers(running[:2], running[2])
    finally:
        for process in running:
            process.kill()


@pytest.fixture
def stack():
    """Closes what a test has opened, in reverse order."""
    with contextlib.ExitStack() as stack:
        yield stack


@pytest.fixture
def start_process(tmp_path, stack):
    """Starts processes that end with the test: `start_process(name, command, port)`."""

    def start(name: str, command: list[str], port: int) -> Process:
        process = Process(name, command, port, tmp_path / f"{port}.log")
        stack.callback(process.kill)
        return process

    return start


@pytest.fixture
def start_server(tmp_path, stack):
    """Starts a server that ends with the test; see launch_server."""

    def start(model, port: int | None = None, *, wait: bool = True, **flags) -> Process:
        server = launch_server(model, tmp_path / f"server{time.monotonic()}.log", port, **flags)
        stack.callback(server.kill)
        if wait:
            server.wait_ready()
        return server

    return start


# Fault servers


@pytest.fixture
def directory(tmp_path):
    return epath.Path(tmp_path / "versions")


@pytest.fixture
def toy_servers(tmp_path, stack):
    """Starts `count` fault servers that end with the test."""

    def start(count):
        made = [FaultServer(epath.Path(tmp_path)) for _ in range(count)]
        for server in made:
            stack.callback(server.close)
        return made

    return start


@pytest.fixture
def make_fleet(toy_servers, stack):
    """`fleets.open_toy_fleet`, closed with the test."""

    def make(*args, **kwargs):
        fleet = open_toy_fleet(*args, **kwargs)
        stack.callback(fleet.close)
        return fleet

    return make


@pytest.fixture
def ready_fleet(make_fleet, directory):
    """Opens a fleet of fault servers that are all ready: `ready_fleet(servers, version=0)`."""

    def make(servers, version=0, **settings):
        fleet = make_fleet([server.url for server in servers], **settings)
        fleet.refresh(version, publish_toy(directory, version))
        fleet.wait_ready()
        return fleet

    return make
