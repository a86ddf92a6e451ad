"""HTTP routes in front of a server that the proxy restarts: those of SGLang that a fleet uses.

/update_weights_from_disk checks a version's files, drains the requests in flight, restarts the
server on the version and responds once it is healthy. Meanwhile every other route returns 503. Each
response names the version that produced it.
"""

import asyncio
import json

import aiohttp
from aiohttp import web
from etils import epath

from oapl_jax.errors import UserError
from oapl_jax.files import checksum
from oapl_jax.fleet.restart_proxy.supervisor import ServedVersion, Supervisor
from oapl_jax.weights.publisher import MANIFEST, check_version, read_manifest

CONNECT_DEADLINE = 5.0  # seconds; the server is on this machine
FORWARDED_GETS = ("/health", "/health_generate", "/v1/models", "/metrics")
FORWARDED_POSTS = ("/tokenize", "/abort_request")
INFO_ROUTES = ("/model_info", "/get_model_info", "/server_info", "/get_server_info")


class Proxy:
    """Routes to the server of a supervisor."""

    def __init__(self, supervisor: Supervisor, session: aiohttp.ClientSession):
        self._supervisor, self._session = supervisor, session

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
            return _outcome(400, f"version {self._supervisor.version.name} stays: {error}")
        if version.name != name:
            return _outcome(400, f"{path} holds version {version.name}, not {name}")
        reason = await self._supervisor.update(version)
        return _outcome(500, reason) if reason else _outcome(200, f"version {name} is served")

    async def _generate(self, request: web.Request) -> web.Response:
        with self._supervisor.request() as version:
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
        if self._supervisor.state != "ready":
            return _error(503, f"the server is {self._supervisor.state}")
        return web.Response(text="Nothing is cached of another version.\n")

    async def _info(self, request: web.Request) -> web.Response:
        version = self._supervisor.version
        # Old and new servers have the longer names.
        path = "/get_" + request.path.removeprefix("/").removeprefix("get_")
        response = await self._forward(request, path)
        if response.status != 200:
            return response
        info = json.loads(response.text or "")
        info |= {"weight_version": version.name, "model_path": version.path}
        return web.json_response(info | {"supervisor": self._supervisor.counts})

    async def _forward(self, request: web.Request, path: str = "") -> web.Response:
        """Returns the server's response; the caller decides how long it waits."""
        if self._supervisor.state != "ready":
            return _error(503, f"the server is {self._supervisor.state}")
        try:
            async with self._session.request(
                request.method,
                self._supervisor.url + (path or request.path),
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
    """Reads a published version, after a check of its files.

    Raises:
      UserError: if it is incomplete or damaged.
    """
    directory = epath.Path(path)
    check_version(directory)
    name = str(read_manifest(directory)["version"])
    return ServedVersion(name, path, checksum(directory / MANIFEST))


def first_version(path: str) -> ServedVersion:
    """Reads the version that a server starts with; any other checkpoint is named "default".

    Raises:
      UserError: if the directory is neither.
    """
    if (epath.Path(path) / MANIFEST).exists():
        return read_version(path)
    if not (epath.Path(path) / "config.json").exists():
        raise UserError(f"--model={path} has no config.json; name a checkpoint or a version")
    return ServedVersion("default", path, "")
