"""Fixtures: real SGLang servers on a CPU with their versions, and fault servers.

Tests of real servers fail unless `make sglang` has installed SGLang into .venv-sglang.
"""

import asyncio
import contextlib
import dataclasses
import functools
import inspect
import time
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from fault_server import FaultServer
from fleets import ToyFleet
from jax.sharding import AxisType
from server_processes import PROCESSES, Process, find_port, launch_server, sglang_program

from configs import arithmetic
from oapl_jax.config import LearnerConfig
from oapl_jax.data.synthetic.tasks import TASKS
from oapl_jax.learner import train_step
from oapl_jax.model.policy import Policy, open_policy
from oapl_jax.model.sharding import AXES
from oapl_jax.model.transformer import Transformer, head, logits
from oapl_jax.weights.checkpoint import Weights
from oapl_jax.weights.probe import make_probe
from oapl_jax.weights.publisher import publish, version_path

TAIL = 6000  # characters of a log that a failed test shows
CONTEXT = 4096  # tokens: room for a request that lasts long enough to be interrupted


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    if report.failed:
        for process in PROCESSES:
            text = process.log.read_text(errors="replace")[-TAIL:]
            report.sections.append((f"log of {process.name} ({process.log})", text))
    return report


@dataclasses.dataclass(eq=False)
class Published:
    """Versions 1, 2 and 3, with fresh weights, of a model of the default's sizes."""

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
        scores = self.score(self.params[version], tokens)
        table = np.asarray(jax.nn.log_softmax(scores / temperature, axis=-1))
        return table[np.arange(len(prompt) - 1, len(whole) - 1), response]

    @functools.partial(jax.jit, static_argnums=0)
    def score(self, params, tokens):
        """Parameters and int32[1, T] -> logits [T, V]."""
        places = jnp.arange(tokens.shape[1])[None]
        hidden: Any = self.model.apply({"params": params}, tokens, places, jnp.ones_like(tokens))
        return logits(hidden, head(params, self.model.config))[0]


@pytest.fixture(scope="session")
def published(tmp_path_factory) -> Published:
    directory = epath.Path(tmp_path_factory.mktemp("published"))
    sizes = arithmetic.get_config().model.architecture.to_dict()
    sizes["max_position_embeddings"] = CONTEXT
    characters = TASKS["chain_sum"].characters
    policy = open_policy(directory / "policy", path="", architecture=sizes, characters=characters)
    model = Transformer(policy.config, jnp.dtype("float32"), remat="none")
    init = jax.jit(functools.partial(train_step.init_params, model))
    mesh = jax.make_mesh((1,) * 4, AXES, (AxisType.Auto,) * 4, devices=jax.devices()[:1])
    layout = LearnerConfig(micro_batches=1, row_length=64, rows_multiple=1, logp_chunk=64)
    probe = make_probe(model, mesh, layout)
    params = {version: jax.device_get(init(jax.random.key(version))) for version in (1, 2, 3)}
    weights = Weights(directory / "weights", deadline=60.0)
    for version, of_version in params.items():
        weights.save(version, of_version, {**probe(of_version), "dtype": "float32"})
        weights.wait()
        description = dict(tokenizer=policy.tokenizer, dtype="float32", config_hash="")
        path = weights.path(version)
        publish(path, policy.config, version=version, directory=directory, **description)
    weights.close()
    return Published(directory, policy, model, params)


@pytest.fixture(scope="session")
def servers(published, tmp_path_factory):
    """Two servers, started on version 1, and a router in front of them."""
    logs = tmp_path_factory.mktemp("servers")
    flags = dict(weight_version="1", served_model_name="policy")  # one model, to the router
    with contextlib.ExitStack() as running:
        made = []
        for index in range(2):
            made.append(launch_server(published.path(1), logs / f"server{index}.log", **flags))
            running.callback(made[-1].kill)
        for server in made:
            server.wait_ready()
        port = find_port()
        command = [*sglang_program("route.py"), "--host=127.0.0.1", f"--port={port}"]
        command += [f"--prometheus-port={find_port()}", "--policy=round_robin", "--worker-urls"]
        command += [server.url for server in made]
        router = Process("sglang-router", command, port, logs / "router.log")
        running.callback(router.kill)
        router.wait_ready("/readiness")
        urls = [server.url for server in made]
        yield SimpleNamespace(servers=made, router=router, urls=urls)


@pytest.fixture
def stack():
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


@pytest.fixture
def toy_servers(tmp_path, stack):
    def start(count):
        made = [FaultServer(epath.Path(tmp_path)) for _ in range(count)]
        for server in made:
            stack.callback(server.close)
        return made

    return start


@pytest.fixture
def make_fleet(toy_servers, tmp_path, stack):
    """Opens a fleet of `count` fault servers, after `prepare` of each; returns both."""

    def make(count, version=None, *, prepare=lambda server: None, **settings):
        made = toy_servers(count)
        for server in made:
            prepare(server)
        settings = {"servers": tuple(server.url for server in made), **settings}
        fleet = ToyFleet(epath.Path(tmp_path / "versions"), **settings)
        stack.callback(fleet.close)
        if version is not None:
            fleet.publish(version)
            fleet.wait_ready()
        return fleet, made

    return make


@pytest.fixture
def ready_fleet(make_fleet):
    return lambda count, version=0, **settings: make_fleet(count, version, **settings)


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem):
    if not inspect.iscoroutinefunction(pyfuncitem.obj):
        return None
    names = inspect.signature(pyfuncitem.obj).parameters
    asyncio.run(pyfuncitem.obj(**{name: pyfuncitem.funcargs[name] for name in names}))
    return True
