"""A server's process, as the supervisor starts, waits for and ends it."""

import asyncio
import contextlib
import os
import signal
from collections.abc import Sequence

import aiohttp

from oapl_jax.errors import RunError

POLL = 0.5  # seconds between two looks
ANSWER_DEADLINE = 30.0  # seconds for one look: SGLang's own check gives up after 20
KILL_DEADLINE = 10.0  # seconds for the system to end a process that was killed


class Child:
    """A process in a group of its own; use `start`."""

    def __init__(self, process: asyncio.subprocess.Process):
        self._process = process

    @classmethod
    async def start(cls, command: Sequence[str]) -> "Child":
        """Starts it; the system kills it if this process dies, so that no port stays taken."""
        guarded = ["setpriv", "--pdeathsig=KILL", "--", *command]
        return cls(await asyncio.create_subprocess_exec(*guarded, process_group=0))

    async def exit_code(self) -> int:
        """Waits for its end, as long as it takes; below 0 is the number of a signal."""
        return await self._process.wait()

    async def healthy(self, session: aiohttp.ClientSession, url: str, deadline: float) -> None:
        """Waits until a GET of `url` answers 200.

        Raises:
          RunError: if the process ends first, or `deadline` seconds have passed.
        """
        exit_code = asyncio.ensure_future(self.exit_code())
        health = asyncio.ensure_future(_until_healthy(session, url))
        try:
            await asyncio.wait(
                {exit_code, health}, timeout=deadline, return_when=asyncio.FIRST_COMPLETED
            )
            if exit_code.done():
                raise RunError(
                    f"the server ended with code {exit_code.result()} before {url} answered; its "
                    "own messages say why"
                )
            if not health.done():
                raise RunError(f"{url} did not answer within {deadline:g} s of the server's start")
        finally:
            exit_code.cancel()
            health.cancel()

    async def end(self, deadline: float) -> None:
        """SIGTERM to the process, which ends its workers; then SIGKILL to what is left of them.

        Raises:
          RunError: if it survives even that.
        """
        if self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self._process.terminate()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self.exit_code(), deadline)
        try:
            os.killpg(self._process.pid, signal.SIGKILL)
            await asyncio.wait_for(self._gone(), KILL_DEADLINE)
        except ProcessLookupError:
            pass  # all gone before
        except TimeoutError as error:
            raise RunError(f"process group {self._process.pid} can't be killed") from error

    async def _gone(self) -> None:
        """A device or port is free only when the last process of the group is gone."""
        await self.exit_code()
        while _alive(self._process.pid):
            await asyncio.sleep(0.05)


def _alive(group: int) -> bool:
    """Whether a process of the group is more than a zombie."""
    for name in os.listdir("/proc"):
        if name.isdigit():
            with contextlib.suppress(OSError, ValueError):
                with open(f"/proc/{name}/stat") as file:
                    state, _, its_group = file.read().rpartition(")")[2].split()[:3]
                if int(its_group) == group and state not in "ZX":
                    return True
    return False


async def _until_healthy(session: aiohttp.ClientSession, url: str) -> None:
    timeout = aiohttp.ClientTimeout(total=ANSWER_DEADLINE)
    while True:
        with contextlib.suppress(aiohttp.ClientError, TimeoutError):
            async with session.get(url, timeout=timeout) as answer:
                if answer.status == 200:
                    return
        await asyncio.sleep(POLL)
