"""Gives a server without a route for new weights that route, by restarting it on each version.

    python -m oapl_jax.fleet.restart_proxy --port=30000 --server_port=30001 --model=DIR -- \\
      python -m sgl_jax.launch_server --model-path={model} --host=127.0.0.1 --port={port} ...

It stands beside the server and passes requests through to it. `/update_weights_from_disk` checks
the version's files, lets the requests in flight end, restarts the server on it and answers once it
is healthy. While it does, everything else answers 503. Each answer names the version that gave it.
A server that dies is started again, a limited number of times.
"""

import argparse
import asyncio
import json
import shutil
import signal
import socket
from typing import Any

import aiohttp
from aiohttp import web
from etils import epath

from oapl_jax.errors import UserError, exit_with_code
from oapl_jax.files import checksum
from oapl_jax.fleet.restart_proxy.supervisor import Supervisor, Version, say
from oapl_jax.weights.publisher import MANIFEST, check_version, read_manifest

CONNECT_DEADLINE = 5.0  # seconds; the server is on this machine
SHUTDOWN_DEADLINE = 5.0  # seconds for callers to get their last answer
MAX_REQUEST_BYTES = 1 << 28
PASSED = (
    ("GET", "/health"),
    ("GET", "/health_generate"),
    ("GET", "/v1/models"),
    ("GET", "/metrics"),
    ("POST", "/tokenize"),
    ("POST", "/abort_request"),
)
INFOS = ("/model_info", "/get_model_info", "/server_info", "/get_server_info")


class Front:
    """The routes in front of a supervised server: SGLang's, as far as a fleet needs them."""

    def __init__(self, supervisor: Supervisor, session: aiohttp.ClientSession):
        self._supervisor, self._session = supervisor, session

    def routes(self) -> list[web.RouteDef]:
        return [
            web.post("/generate", self._generate),
            web.post("/update_weights_from_disk", self._update),
            web.post("/flush_cache", self._flush),
            *(web.get(path, self._info) for path in INFOS),
            *(web.route(method, path, self._pass) for method, path in PASSED),
        ]

    async def _generate(self, request: web.Request) -> web.Response:
        if self._supervisor.state != "ready":
            return self._unavailable()
        with self._supervisor.request() as version:
            status, content = await self._forward(request)
        if status != 200:
            return web.Response(body=content, status=status, content_type="application/json")
        try:
            answer = stamp(json.loads(content), version)
        except (ValueError, LookupError, TypeError):
            return refusal(502, "the server's answer is no JSON with meta_info and output_ids")
        return web.json_response(answer)

    async def _update(self, request: web.Request) -> web.Response:
        try:
            body = await request.json()
            path, name = str(body["model_path"]), str(body["weight_version"])
        except (ValueError, LookupError, TypeError):
            return outcome(400, "the request must be JSON with model_path and weight_version")
        try:
            version = await asyncio.to_thread(read_version, path)
        except UserError as error:
            return outcome(400, f"version {self._supervisor.version.name} stays: {error}")
        if version.name != name:
            return outcome(400, f"{path} holds version {version.name}, not {name}")
        refused = await self._supervisor.take(version)
        return outcome(500, refused) if refused else outcome(200, f"version {name} serves")

    async def _flush(self, request: web.Request) -> web.Response:
        """A process that was started for its version has nothing cached of another one."""
        if self._supervisor.state != "ready":
            return self._unavailable()
        return web.Response(text="Nothing is cached of another version.\n")

    async def _info(self, request: web.Request) -> web.Response:
        if self._supervisor.state != "ready":
            return self._unavailable()
        # The longer names are those that old and new servers have.
        path = "/get_" + request.path.removeprefix("/").removeprefix("get_")
        version = self._supervisor.version
        status, content = await self._forward(request, path)
        if status != 200:
            return web.Response(body=content, status=status, content_type="application/json")
        info = json.loads(content) | {"weight_version": version.name, "model_path": version.path}
        return web.json_response(info | {"supervisor": self._supervisor.counts})

    async def _pass(self, request: web.Request) -> web.Response:
        if self._supervisor.state != "ready":
            return self._unavailable()
        status, content = await self._forward(request)
        return web.Response(body=content, status=status)

    async def _forward(self, request: web.Request, path: str = "") -> tuple[int, bytes]:
        """The server's status and answer; it has as long as the caller waits."""
        try:
            async with self._session.request(
                request.method,
                self._supervisor.url + (path or request.path),
                data=await request.read() or None,
                headers={"Content-Type": "application/json"},
                timeout=aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_DEADLINE),
            ) as answer:
                return answer.status, await answer.read()
        except (aiohttp.ClientError, TimeoutError) as error:
            reason = f"the server broke the connection off: {type(error).__name__} {error}"
            return 503, json.dumps({"error": {"message": reason}}).encode()

    def _unavailable(self) -> web.Response:
        return refusal(503, f"the server is {self._supervisor.state}")


def read_version(path: str) -> Version:
    """A published version whose files are as its manifest says.

    Raises:
      UserError: if they are not.
    """
    directory = epath.Path(path)
    check_version(directory)
    name = str(read_manifest(directory)["version"])
    return Version(name, path, checksum(directory / MANIFEST))


def first_version(path: str) -> Version:
    """What a server starts with: a published version, or any checkpoint, called "default".

    Raises:
      UserError: if it is neither.
    """
    if (epath.Path(path) / MANIFEST).exists():
        return read_version(path)
    if not (epath.Path(path) / "config.json").exists():
        raise UserError(f"--model={path} has no config.json; name a checkpoint or a version")
    return Version("default", path, "")


def stamp(answer: Any, version: str) -> Any:
    """Puts the version into the answer of /generate; nothing else is of another version."""
    for response in answer if isinstance(answer, list) else [answer]:
        span = {"version": version, "start": 0, "end": len(response["output_ids"])}
        response["meta_info"] |= {"weight_version": version, "weight_versions": [span]}
    return answer


def refusal(status: int, message: str) -> web.Response:
    return web.json_response({"error": {"message": message}}, status=status)


def outcome(status: int, message: str) -> web.Response:
    answer = {"success": status == 200, "message": message, "num_paused_requests": 0}
    return web.json_response(answer, status=status)


async def serve(arguments: argparse.Namespace, version: Version) -> None:
    """Listens, and keeps the server up until SIGTERM or Ctrl-C.

    Raises:
      UserError: if the port is taken.
      RunError: see Supervisor.run.
    """
    async with aiohttp.ClientSession() as session:
        supervisor = Supervisor(
            session,
            arguments.command,
            version=version,
            server_port=arguments.server_port,
            start_deadline=arguments.deadline,
            drain_deadline=arguments.drain_deadline,
            stop_deadline=arguments.stop_deadline,
            restarts=arguments.restarts,
            window=arguments.window,
        )
        app = web.Application(client_max_size=MAX_REQUEST_BYTES)
        app.add_routes(Front(supervisor, session).routes())
        # A caller that hangs up cancels its request, and so the server's.
        runner = web.AppRunner(
            app, access_log=None, handler_cancellation=True, shutdown_timeout=SHUTDOWN_DEADLINE
        )
        await runner.setup()
        try:
            await listen(runner, arguments.host, arguments.port)
            running = asyncio.ensure_future(supervisor.run())
            for number in (signal.SIGTERM, signal.SIGINT):
                asyncio.get_running_loop().add_signal_handler(number, running.cancel)
            await running
        except asyncio.CancelledError:
            say("stopped")
        finally:
            await runner.cleanup()


async def listen(runner: web.AppRunner, host: str, port: int) -> None:
    try:
        await web.TCPSite(runner, host, port).start()
    except OSError as error:
        raise UserError(f"--host={host} --port={port} can't be listened on: {error}") from error


def check_arguments(arguments: argparse.Namespace) -> None:
    """Raises a UserError for a command or a port that can't be."""
    command = arguments.command
    if not any("{model}" in word for word in command):
        raise UserError("the command has no {model}, where the version's directory goes")
    if shutil.which(command[0]) is None:
        raise UserError(f"there is no program {command[0]}; the command after -- starts the server")
    with socket.socket() as probe:
        if probe.connect_ex(("127.0.0.1", arguments.server_port)) == 0:
            raise UserError(
                f"something already listens on --server_port={arguments.server_port}; end it, or "
                "choose another port"
            )


def main() -> None:
    parser = argparse.ArgumentParser("oapl_jax.fleet.restart_proxy", description=__doc__)
    parser.add_argument("--host", default="127.0.0.1", help="where the fleet's client calls")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--server_port", type=int, required=True, help="where the server listens")
    parser.add_argument("--model", required=True, help="directory to start with")
    parser.add_argument("--deadline", type=float, default=600, help="seconds for a start")
    parser.add_argument("--drain_deadline", type=float, default=300, help="seconds for requests")
    parser.add_argument("--stop_deadline", type=float, default=30, help="seconds for its end")
    parser.add_argument("--restarts", type=int, default=5, help="of a dead server, at most ...")
    parser.add_argument("--window", type=float, default=600, help="... in so many seconds")
    parser.add_argument("command", nargs="+", help="starts the server; has {model}, maybe {port}")
    arguments = parser.parse_args()
    check_arguments(arguments)
    version = first_version(arguments.model)

    asyncio.run(serve(arguments, version))


if __name__ == "__main__":
    exit_with_code(main)
