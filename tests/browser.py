"""Debian's Chromium without a window, driven by its DevTools protocol over a websocket."""

import asyncio
import base64
import contextlib
import os
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

import aiohttp

NAMES = ("chromium", "google-chrome")
SECONDS = 120.0  # for a browser to start, and for each answer
OPTIONS = (
    *("--headless=new", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"),
    *("--disable-background-networking", "--hide-scrollbars", "--window-size=1400,1000"),
    "--remote-debugging-port=0",
)


class Browser:
    """One page.

    Attributes:
      errors: texts of exceptions, of console errors and of log entries of that level.
      requests: URLs that the page asked for, but those of its own data.
    """

    def __init__(self, profile: Path):
        program = next(filter(None, map(shutil.which, NAMES)), None)
        assert program, "these tests need Chromium: make browser, or apt-get install chromium"
        root = ["--no-sandbox"] if os.geteuid() == 0 else []  # its sandbox refuses root
        command = [program, *OPTIONS, *root, f"--user-data-dir={profile}", "about:blank"]
        quiet: Any = dict(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        self._process = subprocess.Popen(command, **quiet)
        self._runner, self._count = asyncio.Runner(), 0
        self.errors: list[str] = []
        self.requests: list[str] = []
        try:
            self._run(self._connect(profile / "DevToolsActivePort"))
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        with contextlib.suppress(AttributeError):
            self._run(self._session.close())
        self._runner.close()
        self._process.terminate()
        self._process.wait(SECONDS)

    def open(self, url: str) -> None:
        """Loads a page and waits until it has drawn its data."""
        self.errors.clear()
        self.requests.clear()
        self.call("Page.navigate", url=url)
        self.wait(
            "document.readyState == 'complete' && document.querySelector('#where')?.textContent"
        )

    def wait(self, condition: str) -> None:
        end = time.monotonic() + SECONDS
        while not self.evaluate(f"Boolean({condition})"):
            assert time.monotonic() < end, f"{condition}; {self.errors}"
            time.sleep(0.05)

    def evaluate(self, expression: str) -> Any:
        """The JSON value of a JavaScript expression; a promise is awaited."""
        found = self.call(
            "Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True
        )
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def fill(self, element: str, value: str) -> None:
        """Types into an input or chooses in a select, by its id; waits until the list follows."""
        self.evaluate(
            f"(() => {{ const e = document.getElementById({element!r}); e.value = {value!r};"
            " e.dispatchEvent(new Event('input', {bubbles: true}));"
            " return new Promise(done => setTimeout(done, 200)); })()"  # behind the page's own wait
        )

    def prefer(self, theme: str) -> None:
        """The color scheme, light or dark, that the machine asks for."""
        features = [{"name": "prefers-color-scheme", "value": theme}]
        self.call("Emulation.setEmulatedMedia", features=features)

    def screenshot(self, path: Path, selector: str = "body") -> None:
        """Writes the element as PNG."""
        box = self.evaluate(
            f"(() => {{ const b = document.querySelector({selector!r}).getBoundingClientRect();"
            " return {x: b.x + scrollX, y: b.y + scrollY, width: b.width, height: b.height}; })()"
        )
        options: Any = dict(clip={**box, "scale": 1}, captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", **options)["data"]))

    def call(self, method: str, **parameters: Any) -> Any:
        return self._run(asyncio.wait_for(self._call(method, parameters), SECONDS))

    def _run(self, awaitable: Any) -> Any:
        async def awaited() -> Any:
            return await awaitable

        return self._runner.run(awaited())

    async def _connect(self, port_file: Path) -> None:
        end = time.monotonic() + SECONDS
        while not port_file.exists() or not port_file.read_text().strip():
            assert time.monotonic() < end, "Chromium did not start"
            await asyncio.sleep(0.05)
        port = port_file.read_text().split()[0]
        self._session = aiohttp.ClientSession()
        async with self._session.get(f"http://127.0.0.1:{port}/json") as reply:
            (page,) = [p for p in await reply.json() if p["type"] == "page"]
        self._socket = await self._session.ws_connect(
            page["webSocketDebuggerUrl"], max_msg_size=1 << 28
        )
        for domain in ("Page", "Runtime", "Log", "Network"):
            await self._call(f"{domain}.enable", {})

    async def _call(self, method: str, parameters: dict[str, Any]) -> Any:
        self._count += 1
        await self._socket.send_json({"id": self._count, "method": method, "params": parameters})
        while True:
            message = await self._socket.receive_json()
            if message.get("id") == self._count:
                assert "error" not in message, message
                return message["result"]
            self._note(message)

    def _note(self, message: dict[str, Any]) -> None:
        values = message.get("params", {})
        match message.get("method"):
            case "Runtime.exceptionThrown":
                self.errors.append(str(values["exceptionDetails"]))
            case "Runtime.consoleAPICalled" if values["type"] in ("error", "assert", "warning"):
                self.errors.append(str(values["args"]))
            case "Log.entryAdded" if values["entry"]["level"] == "error":
                self.errors.append(values["entry"]["text"])
            case "Network.requestWillBeSent":
                url = values["request"]["url"]
                self.requests += [url] * (not url.startswith(("data:", "blob:")))
