"""The servers of a fleet: who is among them, and who takes the next group.

All of this lives in one event loop; the Fleet in fleet.py puts it into a thread.
"""

import asyncio
import json
import time
from collections import Counter
from collections.abc import Callable, Coroutine

import aiohttp
import jax
from etils import epath

from oapl_jax.fleet.client import Server
from oapl_jax.fleet.config import FleetSettings
from oapl_jax.fleet.failures import Aborted, Mixed, ServerError
from oapl_jax.fleet.refresh import Keeper
from oapl_jax.fleet.server import COUNTS, Member
from oapl_jax.fleet.shared import Shared, Version
from oapl_jax.rollout.sampler import Attempt, Sampled, Sampling
from oapl_jax.structs import Prompt


class Members:
    """All servers of a fleet.

    Args:
      session: for every request.
      shared: what they go by.
      spawn: starts a task whose failure is the fleet's.

    `counts` has, for each URL that ever was a member, what happened there.
    """

    def __init__(
        self,
        session: aiohttp.ClientSession,
        shared: Shared,
        spawn: Callable[[Coroutine], asyncio.Task],
    ):
        self._session, self._shared, self._spawn = session, shared, spawn
        self._keeping: dict[Member, asyncio.Task] = {}
        self.counts: dict[str, Counter[str]] = {}

    def all(self) -> list[Member]:
        """Any thread."""
        return list(self._shared.members.values())

    def versions(self) -> set[int]:
        """What the servers hold or are told to take. Any thread."""
        wanted = self._shared.wanted
        held = {v for m in self.all() for v in (m.version, m.target) if v is not None}
        return held | ({wanted.number} if wanted else set())

    async def watch(self) -> None:
        """Keeps the members those that the list names, until cancelled."""
        settings, members, said = self._shared.settings, self._shared.members, False
        while True:
            try:
                urls, said = await read_members(settings, self._session), False
            except (OSError, ValueError, aiohttp.ClientError, TimeoutError) as error:
                urls = {m.url for m in self.all() if not m.leaving}
                if not said:
                    said = True
                    self._shared.say(f"the servers' list can't be read and stays as it is: {error}")
            for url in sorted(urls - members.keys()):
                self._join(url)
            for url in sorted(members.keys() - urls):
                if not members[url].leaving:
                    members[url].leaving = True
                    self._spawn(self._leave(members[url]))
            await asyncio.sleep(settings.members_every)

    def _join(self, url: str) -> None:
        server = Server(
            self._session,
            url,
            connect_deadline=self._shared.settings.connect_deadline,
            answer_deadline=self._shared.settings.answer_deadline,
        )
        counts = self.counts.setdefault(url, Counter(dict.fromkeys(COUNTS, 0)))
        counts["joined"] += 1
        member = self._shared.members[url] = Member(server, self._shared, counts)
        self._keeping[member] = self._spawn(Keeper(member, self._shared).keep())

    async def _leave(self, member: Member) -> None:
        self._keeping.pop(member).cancel()
        await member.leave()
        del self._shared.members[member.url]
        self._shared.notify()

    def want(self, version: Version) -> None:
        """From now on, servers are brought to this version."""
        shared = self._shared
        shared.wanted, shared.asked = version, time.monotonic()
        shared.published[version.number] = version
        keep = self.versions()
        shared.published = {n: v for n, v in shared.published.items() if n in keep}
        for member in self.all():
            member.woken.set()
        shared.notify()

    async def sample(self, prompt: Prompt, *, n: int, sampling: Sampling) -> Sampled:
        """Requests a group until it is there, or has failed too often."""
        attempts: list[Attempt] = []
        rollouts, failures, member = (), 0, None
        while not rollouts and failures < self._shared.settings.attempts:
            if failures:
                await asyncio.sleep(self._shared.settings.backoff_after(failures))
            member = await self._pick(avoid=member)
            version, started, reason = member.version, time.monotonic(), "failed"
            assert version is not None
            try:
                rollouts = await member.request(prompt, n=n, sampling=sampling)
            except ServerError as error:
                if isinstance(error, Aborted | Mixed):
                    reason = "aborted" if isinstance(error, Aborted) else "mixed"
            seconds = time.monotonic() - started
            if not rollouts:
                attempts.append(Attempt(member.url, version, reason, seconds))
                failures += reason != "aborted"  # to give a group up for a refresh is our doing
        assert member
        return Sampled(prompt, rollouts, member.url, seconds, tuple(attempts))

    async def _pick(self, avoid: Member | None) -> Member:
        """Waits for a server that may sample, and takes the one with the least to do.

        The fleet ends the wait when `no_server_deadline` has passed.
        """
        while True:
            serving = [member for member in self.all() if member.serves]
            if serving:
                return min(serving, key=lambda m: (m is avoid, len(m.requests)))
            await self._shared.change()


async def read_members(settings: FleetSettings, session: aiohttp.ClientSession) -> set[str]:
    """The URLs of the servers of this host, now: of several hosts, each takes every so many-th, so
    that none changes the weights of another's.

    Raises:
      OSError, ValueError, aiohttp.ClientError, TimeoutError: if the list can't be read.
    """
    if settings.router:
        timeout = aiohttp.ClientTimeout(
            total=settings.answer_deadline, sock_connect=settings.connect_deadline
        )
        url = settings.router.rstrip("/") + "/workers"
        async with session.get(url, timeout=timeout, raise_for_status=True) as response:
            content = json.loads(await response.read())
        try:
            found = [worker["url"] for worker in content["workers"]]
        except (LookupError, TypeError) as error:
            raise ValueError(f"{url} gave no list of workers") from error
    elif settings.servers_file:
        text = await asyncio.to_thread(epath.Path(settings.servers_file).read_text)
        found = [line.partition("#")[0] for line in text.splitlines()]
    else:
        found = settings.servers
    urls = sorted({_url(name) for name in found if name.strip()})
    return set(urls[jax.process_index() :: jax.process_count()])


def _url(name: str) -> str:
    name = name.strip().rstrip("/")
    return name if "://" in name else f"http://{name}"
