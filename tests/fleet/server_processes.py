"""Processes of the tests: SGLang, its router, the restart proxy; and those of the soak test."""

import contextlib
import os
import pathlib
import signal
import socket
import subprocess
import time
from collections.abc import Mapping
from typing import Any

import requests

ROOT = pathlib.Path(__file__).parents[2]
READY_DEADLINE = 400.0  # seconds; a start takes 20 on two free cores

PROCESSES: list["Process"] = []  # running, for the logs of a failed test


class Process:
    """A process in a group of its own, which ends with the test run; `call` talks to a server.

    `environment` is added to that of the tests, without JAX's part.
    """

    def __init__(
        self,
        name: str,
        command: list[str],
        port: int,
        log: pathlib.Path,
        *,
        host: str = "127.0.0.1",
        environment: Mapping[str, str] = {},
    ):
        self.name, self.port, self.log = name, port, log
        self.url = f"http://{host}:{port}"
        ours, guard = ("XLA_FLAGS", "JAX_PLATFORMS"), ["setpriv", "--pdeathsig=KILL"]
        env = {k: v for k, v in os.environ.items() if k not in ours} | dict(environment)
        with log.open("ab") as file:
            where: Any = dict(cwd=ROOT, env=env, stdout=file, stderr=file, process_group=0)
            self._process = subprocess.Popen([*guard, *command], **where)
        PROCESSES.append(self)

    @property
    def group(self) -> int:
        """Process id of its leader."""
        return self._process.pid

    @property
    def code(self) -> int | None:
        """Exit code, negative for a signal; None while it runs."""
        return self._process.poll()

    def wait_ready(self, path: str = "/health", *, deadline: float = READY_DEADLINE) -> None:
        until = time.monotonic() + deadline
        while time.monotonic() < until:
            if self.code is not None:
                raise AssertionError(f"{self.name} ended with code {self.code}; see {self.log}")
            with contextlib.suppress(OSError):
                if self.call(path)[0] == 200:
                    return
            time.sleep(0.5)
        raise AssertionError(f"{self.name} was not ready in {deadline:.0f} seconds")

    def wait_exit(self, deadline: float) -> int:
        return self._process.wait(deadline)

    def call(self, path: str, body: Any = None, *, timeout: float = 60.0) -> tuple[int, Any]:
        """Returns status and content of a GET, or of a POST of `body`; OSError if unreachable."""
        method = "GET" if body is None else "POST"
        answer = requests.request(method, self.url + path, json=body, timeout=timeout)
        try:
            return answer.status_code, answer.json()
        except ValueError:
            return answer.status_code, answer.text

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


def find_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def sglang_program(name: str) -> list[str]:
    """Returns the command of a program of cpu_setup/ in SGLang's environment."""
    if not (ROOT / ".venv-sglang/done").exists():
        raise AssertionError("SGLang is not installed (.venv-sglang); run make sglang")
    return [str(ROOT / ".venv-sglang/bin/python"), "-u", f"cpu_setup/{name}"]


def launch_server(model, log: pathlib.Path, port: int | None = None, **flags) -> Process:
    """Starts a server of a model; `weight_version=2` is the flag --weight-version=2."""
    port = port or find_port()
    command = [*sglang_program("serve.py"), f"--model-path={os.fspath(model)}", f"--port={port}"]
    command += ["--skip-tokenizer-init"]
    command += [f"--{name.replace('_', '-')}={value}" for name, value in flags.items()]
    return Process(f"SGLang on port {port}", command, port, log)
