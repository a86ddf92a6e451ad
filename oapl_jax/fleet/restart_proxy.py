"""Proxy that gives a server without an update route that route, by a restart on each version.

    python -m oapl_jax.fleet.restart_proxy --port=30000 --server_port=30001 --model=DIR -- \\
      python -m sgl_jax.launch_server --model-path={model} --host=127.0.0.1 --port={port} ...

It runs beside the server and has the routes of SGLang that a fleet uses. /update_weights_from_disk
checks a version's files, drains the requests in flight, restarts the server on the version and
responds once it is healthy. Meanwhile every other route returns 503. Each response names the
version that produced it. A server that dies is restarted. With --api_key_file, every route but
/health* demands the key, as SGLang's --api-key does; the server itself needs none.
"""

import argparse
import asyncio
import collections
import contextlib
import dataclasses
import hmac
import json
import os
import shutil
import signal
import socket
import time
from collections.abc import Coroutine, Iterator, Sequence
from typing import Any

import aiohttp
from aiohttp import web
from aiohttp.typedefs import Handler, Middleware
from etils import epath

from oapl_jax.errors import RunError, UserError, exit_with_code
from oapl_jax.files import checksum
from oapl_jax.fleet.addresses import read_api_key
from oapl_jax.weights.publisher import (
    MANIFEST,
    check_loadable,
    check_version,
    read_manifest,
)

MAX_BACKOFF = 30.0  # seconds
POLL_EVERY = 0.5  # seconds between two health checks
HEALTH_DEADLINE = 30.0  # seconds for one health check; SGLang's own gives up after 20
KILL_DEADLINE = 10.0  # seconds for the system to end a killed process
CONNECT_DEADLINE = 5.0  # seconds; the server is on this machine
SHUTDOWN_DEADLINE = 5.0  # seconds for callers to get their last response
MAX_REQUEST_BYTES = 1 << 28
FORWARDED_GETS = ("/health", "/health_generate", "/v1/models", "/metrics")
FORWARDED_POSTS = ("/tokenize", "/abort_request")
INFO_ROUTES = ("/model_info", "/get_model_info", "/server_info", "/get_server_info")


@dataclasses.dataclass(frozen=True)
class ServedVersion:
    """A version directory, or any checkpoint."""

    name: str  # the learner's step; "default" for a checkpoint that is no version
    path: str
    # xxh128 of the manifest: a killed run publishes a step again, maybe with other weights.
    manifest: str


@dataclasses.dataclass(kw_only=True)
class Supervisor:
    """A server process, its version, and its requests in flight."""

    command: Sequence[str]  # {model} is replaced by the version's directory, {port} by server_port
    version: ServedVersion  # to start with; then the one loaded now, or before the server went down
    server_port: int  # on this machine
    start_deadline: float  # seconds from a start of the server until it generates a token
    drain_deadline: float  # seconds for requests in flight before a restart; then they are aborted
    stop_deadline: float  # seconds for the server to end after SIGTERM
    restarts: int  # most restarts of a server that died, within ...
    window: float  # ... so many seconds
    # "starting", "ready", "draining" or "restarting"; only a ready server gets requests.
    state: str = dataclasses.field(default="starting", init=False)

    def __post_init__(self):
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.counts = {"refreshes": 0, "failed_refreshes": 0, "deaths": 0, "aborted": 0}
        self._in_flight = 0
        self._idle = asyncio.Event()
        # Versions to load; a future becomes "" once its version is served, or else the reason.
        self._updates: asyncio.Queue[tuple[ServedVersion, asyncio.Future[str]]] = asyncio.Queue()
        self._deaths: collections.deque[float] = collections.deque()
        self._process: asyncio.subprocess.Process | None = None  # leads a process group

    @contextlib.contextmanager
    def request(self) -> Iterator[str]:
        """Marks a request to a ready server; yields the version that serves it.

        A restart drains it, or aborts it by the end of the process.
        """
        self._in_flight += 1
        try:
            yield self.version.name
        finally:
            self._in_flight -= 1
            if not self._in_flight:
                self._idle.set()

    async def update(self, version: ServedVersion) -> str:
        """Restarts the server on a version, after earlier updates; returns "" or why it failed."""
        outcome = asyncio.get_running_loop().create_future()
        self._updates.put_nowait((version, outcome))
        return await asyncio.shield(outcome)  # a caller that hangs up cancels no update

    async def run(self) -> None:
        """Keeps the server up until cancelled; RunError if it does not start or dies too often."""
        try:
            await self._start(self.version)
            while True:
                try:
                    update = await self._while_it_runs(self._updates.get())
                except RunError as error:
                    await self._revive(str(error))
                else:
                    await self._restart(*update)
        finally:
            if self._process is not None:
                await self._end()

    async def _start(self, version: ServedVersion) -> None:
        command = [
            word.replace("{model}", version.path).replace("{port}", str(self.server_port))
            for word in self.command
        ]
        log(f"starting the server on version {version.name} ({version.path})")
        started = time.monotonic()
        # The system kills it if this process dies, so that its port is free.
        guarded = ["setpriv", "--pdeathsig=KILL", "--", *command]
        self._process = await asyncio.create_subprocess_exec(*guarded, process_group=0)
        try:
            # Not /health: some servers are healthy before they have compiled their first step.
            healthy = _wait_healthy(f"{self.url}/health_generate")
            await self._while_it_runs(healthy, self.start_deadline)
        except RunError:
            await self._end()
            raise
        self.version, self.state = version, "ready"
        log(f"version {version.name} is served after {time.monotonic() - started:.0f} s")

    async def _while_it_runs(self, coroutine: Coroutine, deadline: float | None = None) -> Any:
        """Awaits a coroutine; a RunError if the server ends first, or after `deadline` seconds."""
        assert self._process is not None
        ended = asyncio.ensure_future(self._process.wait())
        task = asyncio.ensure_future(coroutine)
        try:
            await asyncio.wait({ended, task}, timeout=deadline, return_when="FIRST_COMPLETED")
            if task.done():
                return task.result()
            if ended.done():  # a negative code is the number of a signal
                raise RunError(f"the server ended with exit code {ended.result()}")
            raise RunError(f"the server was not healthy within {deadline:g} s of its start")
        finally:
            ended.cancel()
            task.cancel()

    async def _end(self) -> None:
        """Sends SIGTERM to the server, and after `stop_deadline` seconds SIGKILL to its group."""
        assert self._process is not None
        if self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self._process.terminate()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._process.wait(), self.stop_deadline)
        group = self._process.pid
        try:
            async with asyncio.timeout(KILL_DEADLINE):
                os.killpg(group, signal.SIGKILL)
                await self._process.wait()
                while _is_alive(group):  # only after its last process a device or port is free
                    await asyncio.sleep(0.05)
        except ProcessLookupError:
            pass  # the group had ended
        except TimeoutError as error:
            raise RunError(f"process group {group} can't be killed") from error

    async def _revive(self, death: str) -> None:
        """Restarts a dead server on its version, with a growing backoff."""
        log(death)
        self.state = "restarting"
        await self._end()  # its workers
        while True:
            now = time.monotonic()
            self.counts["deaths"] += 1
            self._deaths.append(now)
            while self._deaths[0] < now - self.window:
                self._deaths.popleft()
            if len(self._deaths) > self.restarts:
                deaths = f"the server died {len(self._deaths)} times within {self.window:g} s"
                raise RunError(f"{deaths} (--restarts={self.restarts}); see its own log")
            await asyncio.sleep(min(2.0 ** (len(self._deaths) - 1), MAX_BACKOFF))
            try:
                return await self._start(self.version)
            except RunError as error:
                log(str(error))

    async def _restart(self, version: ServedVersion, outcome: asyncio.Future[str]) -> None:
        """Restarts the server on a version, or on the old one if that fails."""
        if version == self.version:
            outcome.set_result("")
            return
        self.state = "draining"
        self._idle.clear()
        if self._in_flight:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._idle.wait(), self.drain_deadline)
        if self._in_flight:
            self.counts["aborted"] += self._in_flight
            log(f"aborting {self._in_flight} requests after {self.drain_deadline:g} s")
        self.state = "restarting"
        old = self.version
        await self._end()
        try:
            await self._start(version)
        except RunError as error:
            self.counts["failed_refreshes"] += 1
            reason = f"version {version.name} does not start: {error}"
            log(reason)
            try:
                await self._start(old)
            except RunError as again:
                outcome.set_result(f"{reason}; nor does version {old.name}: {again}")
                raise
            outcome.set_result(f"{reason}; version {old.name} is served again")
        else:
            self.counts["refreshes"] += 1
            outcome.set_result("")


def _is_alive(group: int) -> bool:
    """Tells if any process of the group is more than a zombie."""
    for name in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError, ValueError), open(f"/proc/{name}/stat") as file:
            state, _, its_group = file.read().rpartition(")")[2].split()[:3]
            if int(its_group) == group and state not in "ZX":
                return True
    return False


async def _wait_healthy(url: str) -> None:
    timeout = aiohttp.ClientTimeout(total=HEALTH_DEADLINE)
    async with aiohttp.ClientSession(timeout=timeout) as session:
        while True:
            with contextlib.suppress(aiohttp.ClientError, TimeoutError):
                async with session.get(url) as response:
                    if response.status == 200:
                        return
            await asyncio.sleep(POLL_EVERY)


def log(message: str) -> None:
    print(f"restart_proxy: {message}", flush=True)


@dataclasses.dataclass
class Proxy:
    """Routes to the server of a supervisor."""

    supervisor: Supervisor
    session: aiohttp.ClientSession

    def routes(self) -> list[web.RouteDef]:
        return [
            web.post("/update_weights_from_disk", self._update),
            web.post("/generate", self._generate),
            # A process that was started on its version has nothing of another version cached.
            web.post("/flush_cache", self._flush_cache),
            *(web.get(path, self._info) for path in INFO_ROUTES),
            *(web.get(path, self._forward) for path in FORWARDED_GETS),
            *(web.post(path, self._forward) for path in FORWARDED_POSTS),
        ]

    async def _update(self, request: web.Request) -> web.Response:
        try:
            body = await request.json()
            path, name = str(body["model_path"]), str(body["weight_version"])
        except (ValueError, LookupError, TypeError):
            return _outcome(400, "the request must be JSON with model_path and weight_version")
        try:
            version = await asyncio.to_thread(read_version, path)
        except UserError as error:
            return _outcome(400, f"version {self.supervisor.version.name} stays: {error}")
        if version.name != name:
            return _outcome(400, f"{path} holds version {version.name}, not {name}")
        reason = await self.supervisor.update(version)
        return _outcome(500, reason) if reason else _outcome(200, f"version {name} is served")

    async def _generate(self, request: web.Request) -> web.Response:
        with self.supervisor.request() as version:
            response = await self._forward(request)
        if response.status != 200:
            return response
        try:
            content = json.loads(response.text or "")
            for sample in content if isinstance(content, list) else [content]:
                span = {"version": version, "start": 0, "end": len(sample["output_ids"])}
                sample["meta_info"] |= {"weight_version": version, "weight_versions": [span]}
        except (ValueError, LookupError, TypeError):
            return _error(502, "the server's response is no JSON with meta_info and output_ids")
        return web.json_response(content)

    async def _flush_cache(self, request: web.Request) -> web.Response:
        if self.supervisor.state != "ready":
            return _error(503, f"the server is {self.supervisor.state}")
        return web.Response(text="Nothing is cached of another version.\n")

    async def _info(self, request: web.Request) -> web.Response:
        version = self.supervisor.version
        # Old and new servers have the longer names.
        path = "/get_" + request.path.removeprefix("/").removeprefix("get_")
        response = await self._forward(request, path)
        if response.status != 200:
            return response
        info = json.loads(response.text or "")
        info |= {"weight_version": version.name, "model_path": version.path}
        return web.json_response(info | {"supervisor": self.supervisor.counts})

    async def _forward(self, request: web.Request, path: str = "") -> web.Response:
        """Returns the server's response; the caller decides how long it waits."""
        if self.supervisor.state != "ready":
            return _error(503, f"the server is {self.supervisor.state}")
        try:
            async with self.session.request(
                request.method,
                self.supervisor.url + (path or request.path),
                data=await request.read() or None,
                headers={"Content-Type": "application/json"},
                timeout=aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_DEADLINE),
            ) as response:
                return web.Response(
                    body=await response.read(),
                    status=response.status,
                    content_type=response.content_type,
                )
        except (aiohttp.ClientError, TimeoutError) as error:
            return _error(503, f"the server broke the connection: {type(error).__name__} {error}")


def _error(status: int, message: str) -> web.Response:
    return web.json_response({"error": {"message": message}}, status=status)


def _outcome(status: int, message: str) -> web.Response:
    """Builds a response in the form of SGLang's /update_weights_from_disk."""
    content = {"success": status == 200, "message": message, "num_paused_requests": 0}
    return web.json_response(content, status=status)


def read_version(path: str) -> ServedVersion:
    """Reads a published version; a UserError if it is incomplete or damaged."""
    directory = epath.Path(path)
    check_loadable(directory)
    check_version(directory)
    name = str(read_manifest(directory)["version"])
    return ServedVersion(name, path, checksum(directory / MANIFEST))


def first_version(path: str) -> ServedVersion:
    """Reads the version that a server starts with; any other checkpoint is named "default"."""
    if (epath.Path(path) / MANIFEST).exists():
        return read_version(path)
    if not (epath.Path(path) / "config.json").exists():
        raise UserError(f"--model={path} has no config.json; name a checkpoint or a version")
    return ServedVersion("default", path, "")


def demand_key(api_key: str) -> list[Middleware]:
    """Middlewares that return 401 to a request without the key; none for the key ""."""
    expected = f"bearer {api_key}".encode()

    @web.middleware
    async def check(request: web.Request, handler: Handler) -> web.StreamResponse:
        scheme, _, key = request.headers.get("Authorization", "").partition(" ")
        given = f"{scheme.lower()} {key}".encode(errors="surrogateescape")
        if request.path.startswith("/health") or hmac.compare_digest(given, expected):
            return await handler(request)
        return _error(401, "the request needs the key of --api_key_file as its bearer token")

    return [check] if api_key else []


async def serve(supervisor: Supervisor, host: str, port: int, api_key: str = "") -> None:
    """Serves until SIGTERM or Ctrl-C; a UserError if the port is taken."""
    async with aiohttp.ClientSession() as session:
        app = web.Application(client_max_size=MAX_REQUEST_BYTES, middlewares=demand_key(api_key))
        app.add_routes(Proxy(supervisor, session).routes())
        # A caller that hangs up cancels its request, and so the server's.
        runner = web.AppRunner(
            app, access_log=None, handler_cancellation=True, shutdown_timeout=SHUTDOWN_DEADLINE
        )
        await runner.setup()
        try:
            try:
                await web.TCPSite(runner, host, port).start()
            except OSError as error:
                at = f"--host={host} --port={port}"
                raise UserError(f"{at} can't be opened: {error}; choose another port") from error
            running = asyncio.ensure_future(supervisor.run())
            for number in (signal.SIGTERM, signal.SIGINT):
                asyncio.get_running_loop().add_signal_handler(number, running.cancel)
            await running
        except asyncio.CancelledError:
            log("stopped")
        finally:
            await runner.cleanup()


def check_arguments(arguments: argparse.Namespace) -> None:
    """Raises UserError for a command that can't start a server, or a port in use."""
    command = arguments.command
    if not any("{model}" in word for word in command):
        raise UserError("the command has no {model}, to be replaced by the version's directory")
    if shutil.which(command[0]) is None:
        raise UserError(f"there is no program {command[0]}; the command after -- starts the server")
    with socket.socket() as probe:
        if probe.connect_ex(("127.0.0.1", arguments.server_port)) == 0:
            raise UserError(
                f"--server_port={arguments.server_port} is in use; end its process, or choose "
                "another port"
            )


def main() -> None:
    parser = argparse.ArgumentParser("oapl_jax.fleet.restart_proxy", description=__doc__)
    parser.add_argument("--host", default="127.0.0.1", help="address of the proxy")
    parser.add_argument("--port", type=int, required=True, help="port of the proxy")
    parser.add_argument("--server_port", type=int, required=True, help="port of the server")
    parser.add_argument("--model", required=True, help="directory to start with")
    parser.add_argument(
        "--deadline", dest="start_deadline", type=float, default=600, help="seconds for a start"
    )
    parser.add_argument("--drain_deadline", type=float, default=300, help="seconds for requests")
    parser.add_argument("--stop_deadline", type=float, default=30, help="seconds after SIGTERM")
    parser.add_argument("--api_key_file", default="", help="file with the key that callers need")
    parser.add_argument("--restarts", type=int, default=5, help="most restarts of a dead server")
    parser.add_argument("--window", type=float, default=600, help="seconds that --restarts counts")
    parser.add_argument("command", nargs="+", help="starts the server; has {model}, maybe {port}")
    arguments = parser.parse_args()
    check_arguments(arguments)
    settings, api_key = vars(arguments), ""
    host, port, model = (settings.pop(name) for name in ("host", "port", "model"))
    if key_file := settings.pop("api_key_file"):
        api_key, exposed = read_api_key(key_file, of="--api_key_file")
        if exposed:
            log(exposed)
    asyncio.run(serve(Supervisor(version=first_version(model), **settings), host, port, api_key))


if __name__ == "__main__":
    exit_with_code(main)
