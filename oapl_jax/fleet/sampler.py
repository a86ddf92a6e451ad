"""A Sampler over many servers.

    prompts -> a thread that pulls them -> the fleet's event loop: one task a group -> generate

The event loop has a thread of its own, so servers are tended while the learner learns. Prompts are
pulled in a third thread: a pull may block until there is room for more groups, and that must never
hold back the groups that are done.

A group is one request, pinned to one server and the version which that server holds then. What
fails is requested again from another server; what is in flight when its server must be refreshed
is finished or given up and requested again. Each prompt comes out once.
"""

import asyncio
import os
import threading
from collections import Counter
from collections.abc import Callable, Coroutine, Iterable, Iterator, Sequence
from typing import Any

import aiohttp
from etils import epath

from oapl_jax.errors import RunError
from oapl_jax.files import absolute
from oapl_jax.fleet.admission import Terms, check_prompt, warnings_of
from oapl_jax.fleet.config import FleetSettings
from oapl_jax.fleet.generate_queue import Call
from oapl_jax.fleet.no_server_timeout import Pause
from oapl_jax.fleet.pool import Members
from oapl_jax.fleet.server import READY
from oapl_jax.fleet.shared import Shared, Version
from oapl_jax.model.config import ModelConfig
from oapl_jax.rollout.sampler import Sampled, Sampling
from oapl_jax.structs import Prompt
from oapl_jax.weights import publisher

COUNTS = ("prompts", "groups", "dropped", "given_up")  # the last three and those in flight balance
THREAD_DEADLINE = 30.0  # seconds for the fleet's own thread to begin, and to end
LOOK_EVERY = 0.2  # seconds between two looks at whether any server is ready


class Fleet:
    """A Sampler whose rollouts come from SGLang servers.

    It starts its thread at once and never waits for a server but in `generate`.

    Args:
      model_config: sizes of the learner's model.
      settings: which servers, and how they are treated.
      tokenizer: the learner's, compared with that of a server which has one.
      stop_ids: token ids that end a response.
      sampling: the run's, which servers are checked against before they sample.
      max_prompt_tokens: of the longest prompt.
      dtype: that versions are published in.
      older_versions: whether servers that do not have the wanted version yet, or refuse it, go on
        with the one that they have. Without it every prompt taken after `refresh` is sampled from
        the wanted version; groups of another one that are in flight are given `drain_deadline`.
      say: takes a sentence for people; called in the fleet's thread.
    """

    def __init__(
        self,
        model_config: ModelConfig,
        settings: FleetSettings,
        *,
        tokenizer: Any,
        stop_ids: Sequence[int],
        sampling: Sampling,
        max_prompt_tokens: int,
        dtype: str,
        older_versions: bool,
        say: Callable[[str], None],
    ):
        self._settings, self._say = settings, say
        self._terms = Terms(
            model_config=model_config,
            tokenizer=tokenizer,
            stop_ids=tuple(sorted(stop_ids)),
            sampling=sampling,
            max_prompt_tokens=max_prompt_tokens,
            dtype=dtype,
            probe_gap=settings.probe_gap,
        )
        for warning in warnings_of(sampling):
            say(warning)
        self._version = -1
        self._checked: dict[tuple[int, str], Version] = {}
        self._lock = threading.Lock()  # of the next four
        self._counts: Counter[str] = Counter(dict.fromkeys(COUNTS, 0))
        self._calls: set[Call] = set()
        self._failure: BaseException | None = None
        self._closed = False
        self._pause = Pause(settings, say)
        self._tasks: set[asyncio.Task] = set()  # the fleet's thread only
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="fleet", daemon=True)
        self._thread.start()
        self._members = self._in_loop(self._open(older_versions))

    @property
    def version(self) -> int:
        return self._version

    def versions(self) -> set[int]:
        held = self._members.versions() | {self._version}
        return held.union(*(call.versions() for call in self._open_calls())) - {-1}

    def refresh(self, version: int, path: epath.Path) -> None:
        """See Sampler. It checks the files, once a version, tells the fleet and returns.

        The servers read the same path, so it must be on a disk or in a bucket that all can read.
        """
        where = os.fspath(absolute(path))
        if (version, where) not in self._checked:
            publisher.check_version(path)
            probe = publisher.read_probe(path)
            self._checked[version, where] = Version.of(version, where, probe)
        self._version = version
        self._tell_loop(self._members.want, self._checked[version, where])

    def generate(
        self, prompts: Iterable[Prompt], *, n: int, sampling: Sampling
    ) -> Iterator[Sampled]:
        """See Sampler. Prompts are taken in another thread, while fewer than `max_in_flight` groups
        are in flight.

        Raises:
          FleetLost: if groups waited `no_server_deadline` seconds with no server ready.
          UserError: if every server is refused from the start, or for a prompt that none can take.
        """
        call = Call(self._settings.max_in_flight)
        with self._lock:
            if self._failure:
                raise self._failure
            if self._closed:
                return
            self._calls.add(call)
        pull = threading.Thread(
            target=self._pull,
            args=(call, iter(prompts), n, sampling),
            name="fleet-prompts",
            daemon=True,  # nobody can end a pull that blocks but who made the prompts
        )
        pull.start()
        try:
            for sampled in call.results():
                self._count("groups" if sampled.rollouts else "dropped")
                yield sampled
        finally:
            self._count("given_up", call.stop())
            with self._lock:
                self._calls.discard(call)
            self._tell_loop(call.cancel_tasks)

    def close(self) -> None:
        """See Sampler.

        Raises:
          RunError: if the fleet's thread does not end.
        """
        with self._lock:
            if self._closed:
                return
            self._closed = True
            calls = set(self._calls)
        for call in calls:
            self._count("given_up", call.stop())
        self._in_loop(self._shut())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(THREAD_DEADLINE)
        if self._thread.is_alive():
            raise RunError(f"the fleet's thread did not end in {THREAD_DEADLINE:.0f} s")
        self._loop.close()

    def metrics(self) -> dict[str, float]:
        """The fleet now, and counts since it was made; see docs/metrics.md. Any thread."""
        members = self._members.all()
        with self._lock:
            counts = Counter(self._counts)
        for of_server in list(self._members.counts.values()):
            counts.update(of_server)
        gauges = {
            "servers": len(members),
            "ready": sum(m.state == READY for m in members),
            "in_flight": sum(len(m.requests) for m in members),
            "waiting": sum(call.outstanding for call in self._open_calls()),
            "probe_gap": max((m.probe_gap for m in members), default=0.0),
            "refresh_seconds": max((m.refresh_seconds for m in members), default=0.0),
            "paused_seconds": self._pause.seconds,
        }
        return {f"fleet/{name}": float(v) for name, v in {**gauges, **counts}.items()}

    def servers(self) -> dict[str, dict[str, Any]]:
        """What is known of each server. Any thread."""
        return {m.url: {**m.report(), **self._members.counts[m.url]} for m in self._members.all()}

    # The thread that pulls prompts

    def _pull(self, call: Call, prompts: Iterator[Prompt], n: int, sampling: Sampling) -> None:
        try:
            while call.wait_for_room():
                prompt = next(prompts, None)
                if prompt is None or not call.take():
                    break
                self._count("prompts")
                if self._version == -1:
                    raise RunError("the fleet was given a prompt before its first version")
                check_prompt(
                    prompt,
                    vocab_size=self._terms.model_config.vocab_size,
                    max_tokens=self._terms.max_prompt_tokens,
                )
                self._tell_loop(self._start, call, prompt, n, sampling)
        except BaseException as error:
            call.fail(error)
        finally:
            call.exhaust()

    # The fleet's thread

    def _tell_loop(self, function: Callable, *args: Any) -> None:
        """Lets the fleet's thread call something next, unless it is closed."""
        with self._lock:
            if not self._closed:
                self._loop.call_soon_threadsafe(function, *args)

    def _in_loop(self, coroutine: Coroutine) -> Any:
        future = asyncio.run_coroutine_threadsafe(coroutine, self._loop)
        try:
            return future.result(THREAD_DEADLINE)
        except TimeoutError as error:
            raise RunError(
                f"the fleet's thread did not answer in {THREAD_DEADLINE:.0f} s"
            ) from error

    async def _open(self, older_versions: bool) -> Members:
        connector = aiohttp.TCPConnector(limit=0, force_close=True)  # no stale connections
        self._session = aiohttp.ClientSession(connector=connector)
        shared = Shared(self._settings, self._terms, older_versions=older_versions, say=self._say)
        members = Members(self._session, shared, self._spawn)
        self._spawn(members.watch())
        self._spawn(self._look_after(members))
        return members

    async def _shut(self) -> None:
        for task in (tasks := set(self._tasks)):
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._session.close()

    def _spawn(self, coroutine: Coroutine) -> asyncio.Task:
        """A task of the event loop; if it dies of anything, so does `generate`."""
        task = self._loop.create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: asyncio.Task) -> None:
        self._tasks.discard(task)
        error = None if task.cancelled() else task.exception()
        if error:
            self._fail(error)

    def _fail(self, error: BaseException) -> None:
        with self._lock:
            self._failure = self._failure or error
        for call in self._open_calls():
            call.fail(error)

    def _open_calls(self) -> set[Call]:
        with self._lock:
            return set(self._calls)

    def _count(self, name: str, number: int = 1) -> None:
        with self._lock:
            self._counts[name] += number

    def _start(self, call: Call, prompt: Prompt, n: int, sampling: Sampling) -> None:
        call.start(self._spawn(self._sample(call, prompt, n, sampling)))

    async def _sample(self, call: Call, prompt: Prompt, n: int, sampling: Sampling) -> None:
        call.deliver(await self._members.sample(prompt, n=n, sampling=sampling))

    async def _look_after(self, members: Members) -> None:
        while not self._failure:
            await asyncio.sleep(LOOK_EVERY)
            waiting = any(call.outstanding for call in self._open_calls())
            error = self._pause.look(members.all(), waiting=waiting)
            if error:
                self._fail(error)
