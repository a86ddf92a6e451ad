"""A server's process: start, wait for health, and end with all of its workers."""

import asyncio
import contextlib
import os
import signal
from collections.abc import Sequence

import aiohttp

from oapl_jax.errors import RunError

POLL_EVERY = 0.5  # seconds between two health checks
HEALTH_DEADLINE = 30.0  # seconds for one health check; SGLang's own gives up after 20
KILL_DEADLINE = 10.0  # seconds for the system to end a killed process


class ServerProcess:
    """A process in a process group of its own; use `start`."""

    def __init__(self, process: asyncio.subprocess.Process):
        self._process = process

    @classmethod
    async def start(cls, command: Sequence[str]) -> "ServerProcess":
        """Starts a process that the system kills if this process dies, so that its port is free."""
        guarded = ["setpriv", "--pdeathsig=KILL", "--", *command]
        return cls(await asyncio.create_subprocess_exec(*guarded, process_group=0))

    async def exit_code(self) -> int:
        """Waits for the end of the process; a negative code is the number of a signal."""
        return await self._process.wait()

    async def wait_healthy(self, url: str, deadline: float) -> None:
        """Waits until GET `url` returns 200.

        Raises:
          RunError: if the process ends first, or after `deadline` seconds.
        """
        exit_code = asyncio.ensure_future(self.exit_code())
        healthy = asyncio.ensure_future(_poll(url))
        try:
            await asyncio.wait(
                {exit_code, healthy}, timeout=deadline, return_when=asyncio.FIRST_COMPLETED
            )
            if exit_code.done():
                code = exit_code.result()
                raise RunError(f"the server ended with code {code} before {url} responded")
            if not healthy.done():
                raise RunError(f"{url} did not respond within {deadline:g} s of the server's start")
        finally:
            exit_code.cancel()
            healthy.cancel()

    async def end(self, deadline: float) -> None:
        """Sends SIGTERM to the process, and after `deadline` seconds SIGKILL to the whole group.

        Raises:
          RunError: if the group survives SIGKILL.
        """
        if self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self._process.terminate()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self.exit_code(), deadline)
        try:
            os.killpg(self._process.pid, signal.SIGKILL)
            await asyncio.wait_for(self._wait_gone(), KILL_DEADLINE)
        except ProcessLookupError:
            pass  # the group had ended
        except TimeoutError as error:
            raise RunError(f"process group {self._process.pid} can't be killed") from error

    async def _wait_gone(self) -> None:
        """Waits for the last process of the group: only then a device or port is free."""
        await self.exit_code()
        while _is_alive(self._process.pid):
            await asyncio.sleep(0.05)


def _is_alive(group: int) -> bool:
    """Tells if any process of the group is more than a zombie."""
    for name in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError, ValueError), open(f"/proc/{name}/stat") as file:
            state, _, its_group = file.read().rpartition(")")[2].split()[:3]
            if int(its_group) == group and state not in "ZX":
                return True
    return False


async def _poll(url: str) -> None:
    timeout = aiohttp.ClientTimeout(total=HEALTH_DEADLINE)
    async with aiohttp.ClientSession(timeout=timeout) as session:
        while True:
            with contextlib.suppress(aiohttp.ClientError, TimeoutError):
                async with session.get(url) as response:
                    if response.status == 200:
                        return
            await asyncio.sleep(POLL_EVERY)
