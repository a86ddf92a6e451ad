"""Proxy that gives a server without an update route that route, by a restart on each version.

    python -m oapl_jax.fleet.restart_proxy --port=30000 --server_port=30001 --model=DIR -- \\
      python -m sgl_jax.launch_server --model-path={model} --host=127.0.0.1 --port={port} ...

It runs beside the server, forwards requests to it (proxy.py), and restarts it on each new version,
or when it dies (supervisor.py).
"""

import argparse
import asyncio
import shutil
import signal
import socket

import aiohttp
from aiohttp import web

from oapl_jax.errors import UserError, exit_with_code
from oapl_jax.fleet.restart_proxy.proxy import Proxy, first_version
from oapl_jax.fleet.restart_proxy.supervisor import Supervisor, log

SHUTDOWN_DEADLINE = 5.0  # seconds for callers to get their last response
MAX_REQUEST_BYTES = 1 << 28


async def serve(supervisor: Supervisor, host: str, port: int) -> None:
    """Serves until SIGTERM or Ctrl-C.

    Raises:
      UserError: if the port is taken.
      RunError: see Supervisor.run.
    """
    async with aiohttp.ClientSession() as session:
        app = web.Application(client_max_size=MAX_REQUEST_BYTES)
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
    parser.add_argument("--restarts", type=int, default=5, help="most restarts of a dead server")
    parser.add_argument("--window", type=float, default=600, help="seconds that --restarts counts")
    parser.add_argument("command", nargs="+", help="starts the server; has {model}, maybe {port}")
    arguments = parser.parse_args()
    check_arguments(arguments)
    settings = vars(arguments)
    host, port, model = (settings.pop(name) for name in ("host", "port", "model"))
    asyncio.run(serve(Supervisor(version=first_version(model), **settings), host, port))


if __name__ == "__main__":
    exit_with_code(main)
