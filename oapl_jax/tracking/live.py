"""Serves the run report on this machine and follows the runs: the page asks for newer data."""

import http.server
import threading
import urllib.parse
from collections.abc import Callable
from typing import Any

from oapl_jax.errors import UserError
from oapl_jax.tracking.page import page

ADDRESS = "127.0.0.1"


def make_server(
    port: int, stamp: Callable[[], str], build: Callable[[str], bytes]
) -> http.server.ThreadingHTTPServer:
    """A server on the loopback address, at a free port if `port` is 0.

    GET / is the page; GET /data?stamp=S is packed data (tracking/page.py), or 204 if S is the
    stamp of the files' present state. Requests that name another host are refused: a page of the
    Internet can't read the report through a name that leads here.

    Args:
      stamp: of the present state.
      build: stamp -> packed data; a UserError is answered by its sentence.

    Raises a UserError if the port is taken.
    """
    html, lock, newest = page(None).encode(), threading.Lock(), ("", b"")

    def data_of(current: str) -> bytes:
        nonlocal newest
        with lock:
            if newest[0] != current:
                newest = current, build(current)
            return newest[1]

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            host = (self.headers.get("Host") or "").rpartition(":")[0]
            url = urllib.parse.urlsplit(self.path)
            if host not in (ADDRESS, "localhost"):
                self._reply(403, b"this server answers to its loopback address only", "text/plain")
            elif url.path == "/":
                self._reply(200, html, "text/html; charset=utf-8")
            elif url.path == "/data":
                self._reply_data(urllib.parse.parse_qs(url.query).get("stamp", [""])[0])
            else:
                self._reply(404, b"", "text/plain")

        def _reply_data(self, known: str) -> None:
            try:
                current = stamp()
                if known == current:
                    self._reply(204, b"", "text/plain")
                else:
                    self._reply(200, data_of(current), "application/octet-stream")
            except (UserError, OSError) as error:
                self._reply(503, str(error).encode(), "text/plain; charset=utf-8")

        def _reply(self, status: int, body: bytes, kind: str) -> None:
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.send_header("Cache-Control", "no-store")
            self.send_header("X-Content-Type-Options", "nosniff")
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    try:
        return http.server.ThreadingHTTPServer((ADDRESS, port), Handler)
    except OSError as error:
        raise UserError(
            f"--port={port} can't be opened ({error.strerror}); name another one, or 0"
        ) from error
