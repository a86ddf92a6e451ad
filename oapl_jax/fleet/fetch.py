"""Fetches versions from a bucket to the disk of a server, which loads them from there.

    python -m oapl_jax.fleet.fetch --from=gs://BUCKET/run/versions --to=/var/oapl --port=30900
    python -m oapl_jax.fleet.fetch --from=gs://BUCKET/run/versions --to=/var/oapl --version=16

The first form runs beside the servers of a machine. Before a server loads a version, the learner
asks `POST /fetch {"path": "gs://.../v000016"}` (fleet.fetch_port) and gets `{"path": DIRECTORY}`, a
local copy whose files have the checksums of the version's manifest. A delta is added to the copy of
its base; without one, the chain from the last whole version is fetched, with a line. The `--keep`
last used copies stay. Only paths below --from are fetched, and with --api_key_file only for callers
with the key. Beside servers that speak https it needs a certificate, as theirs, and speaks it too.
The second form fetches one version and prints its directory, as for the start of a server.
"""

import argparse
import asyncio
import signal
import ssl
import sys
import time

from aiohttp import web
from etils import epath

from oapl_jax.errors import UserError, exit_with_code, one_line
from oapl_jax.files import absolute, check_reachable
from oapl_jax.fleet.addresses import read_api_key
from oapl_jax.fleet.restart_proxy import demand_key
from oapl_jax.weights.publisher import (
    FETCHING,
    collect_fetched,
    fetch_version,
    version_path,
)


class Fetcher:
    """Copies of versions below a local directory.

    Args:
      source: directory of the versions.
      to: local directory of the copies.
      keep: copies that stay.
    """

    def __init__(self, source: epath.Path, to: epath.Path, *, keep: int):
        self._source, self._to, self._keep = source, to, keep
        self._lock = asyncio.Lock()  # one fetch at a time: servers that ask for the same share it
        to.mkdir(parents=True, exist_ok=True)
        for path in to.glob(f"*{FETCHING}"):  # left by a kill
            path.rmtree()

    async def fetch(self, request: web.Request) -> web.Response:
        """POST /fetch; status 400 with a sentence for a version that can't be fetched."""
        try:
            path = epath.Path((await request.json())["path"])
        except (ValueError, LookupError, TypeError):
            return _refusal('the body must be {"path": DIRECTORY OF A VERSION}')
        if path.parent != self._source or ".." in path.name:
            return _refusal(f"{path} is not in {self._source} (--from)")
        async with self._lock:
            started = time.monotonic()
            try:
                copy = await asyncio.to_thread(fetch_version, path, self._to, log=log)
                deleted = await asyncio.to_thread(collect_fetched, self._to, keep=self._keep)
            except Exception as error:  # of the store or the disk; the learner asks again
                log(f"{path} could not be fetched: {error}")
                return _refusal(str(error) if isinstance(error, UserError) else one_line(error))
        log(f"{copy} after {time.monotonic() - started:.1f} s; deleted: {deleted or 'none'}")
        return web.json_response({"path": str(copy)})

    async def health(self, _: web.Request) -> web.Response:
        return web.json_response({"from": str(self._source), "to": str(self._to)})


def _refusal(message: str) -> web.Response:
    return web.json_response({"message": message}, status=400)


def log(text: str) -> None:
    print(text, flush=True)


def complain(text: str) -> None:
    print(text, file=sys.stderr)


async def serve(
    fetcher: Fetcher,
    host: str,
    port: int,
    api_key: str = "",
    context: ssl.SSLContext | None = None,
) -> None:
    """Serves until SIGTERM or Ctrl-C, by https with a context; a UserError if the port is taken."""
    app = web.Application(middlewares=demand_key(api_key))
    app.add_routes([web.post("/fetch", fetcher.fetch), web.get("/health", fetcher.health)])
    runner, stopped = web.AppRunner(app, access_log=None), asyncio.Event()
    await runner.setup()
    try:
        await web.TCPSite(runner, host, port, ssl_context=context).start()
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, stopped.set)
        log(f"fetches versions at http{'s' if context else ''}://{host}:{port}/fetch")
        await stopped.wait()
    except OSError as error:
        raise UserError(f"--host={host} --port={port} can't be opened: {error}") from error
    finally:
        await runner.cleanup()


def open_certificate(certificate: str, key: str) -> ssl.SSLContext | None:
    """Reads a certificate and its key; None without a certificate."""
    if not certificate and not key:
        return None
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    try:
        context.load_cert_chain(certificate, key or None)
    except OSError as error:
        raise UserError(
            f"--ssl_certfile={certificate} with --ssl_keyfile={key} can't be read "
            f"({one_line(error)}); name the files of a certificate and its key"
        ) from error
    return context


def main() -> None:
    parser = argparse.ArgumentParser(
        "oapl_jax.fleet.fetch",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--from", dest="source", required=True, help="directory of the versions")
    parser.add_argument("--to", required=True, help="local directory of the copies")
    parser.add_argument("--keep", type=int, default=3, help="copies that stay")
    parser.add_argument("--version", type=int, help="fetch this one and end")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at")
    parser.add_argument("--port", type=int, default=30900, help="port to listen at")
    parser.add_argument("--api_key_file", default="", help="file with the key that callers need")
    parser.add_argument("--ssl_certfile", default="", help="certificate, of servers with https")
    parser.add_argument("--ssl_keyfile", default="", help="its private key")
    arguments = parser.parse_args()
    source, to, api_key = absolute(arguments.source), absolute(arguments.to), ""
    check_reachable(source, of="--from")
    if arguments.keep < 2:
        raise UserError(
            f"--keep={arguments.keep}: a server may load one copy while the next is made"
        )
    if arguments.version is not None:
        print(fetch_version(version_path(source, arguments.version), to, log=complain))
        return
    if arguments.api_key_file:
        api_key, exposed = read_api_key(arguments.api_key_file, of="--api_key_file")
        if exposed:
            log(exposed)
    context = open_certificate(arguments.ssl_certfile, arguments.ssl_keyfile)
    fetcher = Fetcher(source, to, keep=arguments.keep)
    asyncio.run(serve(fetcher, arguments.host, arguments.port, api_key, context))


if __name__ == "__main__":
    exit_with_code(main)
