"""A Sampler over SGLang servers.

    prompts -> thread that pulls them -> event loop: one task per group -> GenerateQueue -> generate

The event loop has a thread of its own, so that servers are refreshed while the learner trains.
Prompts are pulled in a third thread, since a pull may block until there is room for more groups and
must not delay finished groups.

A group is one request, pinned to one server and to the version that the server holds. A failed
request is retried on another server; requests in flight at a server that must be refreshed are
drained, or aborted and retried. Each prompt comes out once.
"""

import asyncio
import contextlib
import functools
import os
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Coroutine, Iterable, Iterator
from typing import Any

from etils import epath

from oapl_jax.config import FleetConfig
from oapl_jax.errors import FleetLost, RunError, UserError
from oapl_jax.files import absolute
from oapl_jax.fleet.addresses import read_api_key, read_server_list
from oapl_jax.fleet.admission import Requirements, sampling_warnings
from oapl_jax.fleet.pool import LOST, READY, REFUSED, Pool, PublishedVersion
from oapl_jax.rollout.sampler import Sampled, Sampling
from oapl_jax.structs import Prompt
from oapl_jax.weights.publisher import check_loadable, check_version

COUNTS = ("prompts", "groups", "dropped", "cancelled")  # prompts: the last three and those waiting
THREAD_DEADLINE = 30.0  # seconds for the event loop to start, and to end
WATCH_EVERY = 0.2  # seconds between two looks for a ready server


class GenerateQueue:
    """Groups of one `Fleet.generate`, between the threads that pull, sample and take them."""

    def __init__(self, max_in_flight: int):
        self.waiting = 0  # groups that were requested and are not finished
        self.tasks: set[asyncio.Task] = set()  # of these groups; the event loop's thread only
        self._max_in_flight = max_in_flight
        self._changed = threading.Condition()
        self._finished: deque[Sampled] = deque()
        self._taken: Sampled | None = None  # until its taker asks for the next one
        self._exhausted = self._stopped = False
        self._failure: BaseException | None = None

    @property
    def closed(self) -> bool:
        return self._stopped or self._failure is not None

    def pull(self, prompts: Iterator[Prompt]) -> Prompt | None:
        """Waits for room and takes the next prompt; None if there is none, or after the end."""
        with self._changed:
            self._changed.wait_for(
                lambda: self.closed or max(self.waiting, len(self._finished)) < self._max_in_flight
            )
        prompt = None if self.closed else next(prompts, None)
        with self._changed:
            if prompt is None or self.closed:
                return None
            self.waiting += 1
            return prompt

    def put(self, sampled: Sampled) -> None:
        with self._changed:
            if not self._stopped:
                self.waiting -= 1
                self._finished.append(sampled)
            self._changed.notify_all()

    def end(self, error: BaseException | None = None) -> None:
        """Ends the prompts; with an error, `results` raises it after the finished groups."""
        with self._changed:
            self._exhausted, self._failure = True, self._failure or error
            self._changed.notify_all()

    def stop(self) -> int:
        """Ends `results`; returns how many prompts were cancelled."""
        with self._changed:
            cancelled = self.waiting + len(self._finished)
            self._stopped, self.waiting = True, 0
            self._finished.clear()
            self._changed.notify_all()
            return cancelled

    def results(self) -> Iterator[Sampled]:
        """Yields finished groups, until all are finished or the queue is stopped.

        Every wait ends: a request has deadlines, and the owner of the prompts ends a blocked pull.
        """
        while True:
            with self._changed:
                self._taken = None
                self._changed.wait_for(
                    lambda: self._finished or self.closed or (self._exhausted and not self.waiting)
                )
                if self._finished:
                    self._taken = self._finished.popleft()
                    self._changed.notify_all()
                elif self._failure and not self._stopped:
                    raise self._failure
                else:
                    return
            yield self._taken

    def versions(self) -> set[int]:
        """Returns the versions of groups that are finished, or taken last."""
        with self._changed:
            finished = [*self._finished, *([self._taken] if self._taken else [])]
        return {s.rollouts[0].policy_version for s in finished if s.rollouts}


class Fleet:
    """A Sampler whose rollouts come from SGLang servers; only `generate` waits for servers.

    Args:
      config: servers, deadlines and retries.
      requirements: on each server.
      allow_older: servers that do not hold the target version yet, or refuse it, continue with
        their older one. Otherwise every prompt taken after `refresh` is sampled from the target
        version, and groups of another version in flight have `drain_deadline` to finish.
      log: logs one sentence; called in the event loop's thread.

    Raises:
      UserError: for a list of servers or an API key that can't be used.
    """

    def __init__(
        self,
        config: FleetConfig,
        requirements: Requirements,
        *,
        allow_older: bool,
        log: Callable[[str], None],
    ):
        self._config, self._requirements, self._log = config, requirements, log
        warnings, api_key = sampling_warnings(requirements.sampling), ""
        if config.api_key_file:
            api_key, exposed = read_api_key(config.api_key_file, of="fleet.api_key_file")
            warnings += [exposed] if exposed else []
        if config.servers_file:
            with contextlib.suppress(FileNotFoundError):  # the first server may write it
                read_server_list(config.servers_file, of="fleet.servers_file")
        for warning in warnings:
            log(warning)
        self.version = -1
        self._read_version = functools.cache(PublishedVersion.read)
        self._lock = threading.Lock()  # of the next four
        self._counts: Counter[str] = Counter(dict.fromkeys(COUNTS, 0))
        self._queues: set[GenerateQueue] = set()
        self._failure: BaseException | None = None
        self._closed = False
        self._paused_before, self._paused_since = 0.0, None  # seconds; time
        self._tasks: set[asyncio.Task] = set()  # the event loop's thread only
        self._pool = Pool(config, requirements, api_key, allow_older, log, self._spawn)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="fleet", daemon=True)
        self._thread.start()
        self._call_in_loop(self._spawn, self._pool.watch())
        self._call_in_loop(self._spawn, self._watch_for_no_server())

    def versions(self) -> set[int]:
        held = self._pool.versions() | {self.version}
        return held.union(*(queue.versions() for queue in self._open_queues())) - {-1}

    def refresh(self, version: int, path: epath.Path) -> None:
        """See Sampler. Checks the version's files, once, and makes it the servers' target.

        The servers read the same path, on a disk that all can read, or a copy that the fetcher
        beside each makes (`fleet.fetch_port`), as of a version in a bucket.
        """
        self._config.check_versions(path)
        if not self._config.fetch_port:
            check_loadable(path)
        published = self._read_version(version, os.fspath(absolute(path)))
        self.version = version
        self._call_in_loop(self._pool.set_target, published)

    def generate(
        self, prompts: Iterable[Prompt], *, n: int, sampling: Sampling
    ) -> Iterator[Sampled]:
        """See Sampler. Prompts are pulled in a thread, up to `max_in_flight` groups at a time.

        Raises:
          FleetLost: if groups waited `no_server_deadline` seconds without a ready server.
          UserError: if no server is admitted, or for a prompt that no server can take.
        """
        queue = GenerateQueue(self._config.max_in_flight)
        with self._lock:
            if self._failure:
                raise self._failure
            if self._closed:
                return
            self._queues.add(queue)
        threading.Thread(
            target=self._pull_prompts,
            args=(queue, iter(prompts), n, sampling),
            name="fleet-prompts",
            daemon=True,  # only the owner of the prompts can end a blocked pull
        ).start()
        try:
            for sampled in queue.results():
                self._count("groups" if sampled.rollouts else "dropped")
                yield sampled
        finally:
            self._count("cancelled", queue.stop())
            with self._lock:
                self._queues.discard(queue)
            self._call_in_loop(lambda: [task.cancel() for task in queue.tasks])

    def close(self) -> None:
        """See Sampler; RunError if the event loop's thread does not end."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
        for queue in self._open_queues():
            self._count("cancelled", queue.stop())
        ended = asyncio.run_coroutine_threadsafe(self._cancel_tasks(), self._loop)
        with contextlib.suppress(TimeoutError):
            ended.result(THREAD_DEADLINE)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(THREAD_DEADLINE)
        if self._thread.is_alive():
            raise RunError(f"the fleet's thread did not end in {THREAD_DEADLINE:.0f} s")
        self._loop.close()

    def metrics(self) -> dict[str, float]:
        """Returns gauges, and counts since the start; see docs/metrics.md. Any thread."""
        servers, since = list(self._pool.servers.values()), self._paused_since
        with self._lock:
            counts = Counter(self._counts)
        for of_server in list(self._pool.counts.values()):
            counts.update(of_server)
        gauges = {
            "servers": len(servers),
            "ready": sum(s.state == READY for s in servers),
            "in_flight": sum(s.in_flight for s in servers),
            "waiting": sum(queue.waiting for queue in self._open_queues()),
            "probe_gap": max((s.probe_gap for s in servers), default=0.0),
            "refresh_seconds": max((s.refresh_seconds for s in servers), default=0.0),
            "paused_seconds": self._paused_before + (time.monotonic() - since if since else 0.0),
        }
        return {f"fleet/{name}": float(v) for name, v in {**gauges, **counts}.items()}

    def servers(self) -> dict[str, dict[str, Any]]:
        """Returns state and counts of each server, by URL. Any thread."""
        names = ("state", "reason", "version", "in_flight", "probe_gap", "refresh_seconds")
        report = lambda server: {**{k: getattr(server, k) for k in names}, **server.counts}
        return {url: report(server) for url, server in list(self._pool.servers.items())}

    # The thread that pulls prompts

    def _pull_prompts(
        self, queue: GenerateQueue, prompts: Iterator[Prompt], n: int, sampling: Sampling
    ) -> None:
        try:
            while (prompt := queue.pull(prompts)) is not None:
                self._count("prompts")
                if self.version == -1:
                    raise RunError("the fleet was given a prompt before its first version")
                self._requirements.check_prompt(prompt)
                self._call_in_loop(self._start_group, queue, prompt, n, sampling)
            queue.end()
        except BaseException as error:
            queue.end(error)

    def _open_queues(self) -> set[GenerateQueue]:
        with self._lock:
            return set(self._queues)

    def _count(self, name: str, number: int = 1) -> None:
        with self._lock:
            self._counts[name] += number

    # The event loop's thread

    def _call_in_loop(self, function: Callable, *args: Any) -> None:
        """Schedules a call in the event loop, unless the fleet is closed."""
        with self._lock:
            if not self._closed:
                self._loop.call_soon_threadsafe(function, *args)

    async def _cancel_tasks(self) -> None:
        for task in (tasks := set(self._tasks)):
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _spawn(self, coroutine: Coroutine) -> asyncio.Task:
        """Starts a task; if it raises, `generate` raises the same."""
        task = self._loop.create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._end_task)
        return task

    def _end_task(self, task: asyncio.Task) -> None:
        self._tasks.discard(task)
        error = None if task.cancelled() else task.exception()
        if error:
            self._fail(error)

    def _fail(self, error: BaseException) -> None:
        with self._lock:
            self._failure = self._failure or error
        for queue in self._open_queues():
            queue.end(error)

    def _start_group(
        self, queue: GenerateQueue, prompt: Prompt, n: int, sampling: Sampling
    ) -> None:
        async def sample() -> None:
            queue.put(await self._pool.sample(prompt, n=n, sampling=sampling))

        if not queue.closed:
            task = self._spawn(sample())
            queue.tasks.add(task)
            task.add_done_callback(queue.tasks.discard)

    async def _watch_for_no_server(self) -> None:
        """Ends the run if groups wait for `no_server_deadline` seconds without a ready server."""
        deadline, logged, served = self._config.no_server_deadline, False, False
        while not self._failure:
            await asyncio.sleep(WATCH_EVERY)
            servers, now = list(self._pool.servers.values()), time.monotonic()
            ready = any(map(self._pool.can_sample, servers))
            served = served or ready
            if ready or not any(queue.waiting for queue in self._open_queues()):
                if self._paused_since:
                    self._paused_before += now - self._paused_since
                if logged:
                    self._log("a server is ready, training continues")
                self._paused_since, logged = None, False
                continue
            self._paused_since = self._paused_since or now
            seconds = now - self._paused_since
            states = "; ".join(server.describe() for server in servers)
            states = states or self._pool.list_fault or "the list of servers is empty"
            if servers and not served and all(s.not_admitted for s in servers):
                self._fail(UserError(f"no server can be used: {states}"))
            elif seconds > deadline:
                self._fail(
                    FleetLost(
                        f"no server was ready for {deadline:g} s (fleet.no_server_deadline): "
                        f"{states}; the same command resumes from the newest checkpoint"
                    )
                )
            elif not logged and (
                seconds > deadline / 2 or all(s.state in (LOST, REFUSED) for s in servers)
            ):
                logged = True
                if damage := await self._target_damage():
                    self._fail(FleetLost(damage))
                    return
                self._log(
                    f"no server is ready: training pauses, for {deadline - seconds:.0f} s at most "
                    f"(fleet.no_server_deadline); {states}"
                )

    async def _target_damage(self) -> str:
        """A sentence if files of the target version were damaged after its check, or ""."""
        target = self._pool.target_version
        try:
            if target:
                await asyncio.to_thread(check_version, epath.Path(target.path))
        except UserError as error:
            fault = str(error).partition(";")[0]
            return f"no server is ready, and {fault}; oapl_jax.train restores it when it resumes"
        return ""
