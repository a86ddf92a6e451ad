"""Shared by the fleet's tests: configs, prompts, a consumer of groups, and the accounting."""

import threading
import time
from collections import Counter, defaultdict
from typing import Any

import numpy as np
from fault_server import MODEL, STOP, VOCAB, is_right, publish_toy
from stores import store_of_sums, wait_until

from configs import common
from oapl_jax.config import FleetConfig
from oapl_jax.fleet.admission import Requirements
from oapl_jax.fleet.sampler import Fleet
from oapl_jax.model import hf
from oapl_jax.rollout.ledger import LedgerReport
from oapl_jax.rollout.sampler import Sampling
from oapl_jax.rollout.worker import Worker
from oapl_jax.structs import Prompt

N = 3
PATIENCE = 30.0  # seconds until a test fails
SAMPLING = Sampling(temperature=0.7, top_p=1.0, top_k=0, max_response_tokens=6)
DEADLINES = [f"{name}_deadline" for name in ("control", "request", "drain", "update", "start")]
SETTINGS: dict[str, Any] = common.fleet().to_dict() | dict.fromkeys(DEADLINES, 10.0)
SETTINGS |= dict(no_server_deadline=25.0, poll_every=0.05, max_in_flight=8)
SETTINGS |= dict(backoff=0.01, backoff_limit=0.1, health_every=0.1)
REASONS = {"failed": "attempts_failed", "aborted": "aborted", "mixed": "mixed"}  # and their counts
CLOSE = 1e-4  # nats between log-probs of a real server and the learner, float32
REAL_SAMPLING = Sampling(temperature=1.0, top_p=1.0, top_k=0, max_response_tokens=20)
REAL_SETTINGS: dict[str, Any] = SETTINGS | dict.fromkeys(DEADLINES, 60.0)
REAL_SETTINGS |= dict(request_deadline=120.0, start_deadline=150.0, no_server_deadline=170.0)
REAL_SETTINGS |= dict(poll_every=0.5, backoff=0.2, backoff_limit=2.0, health_every=2.0)
REAL_SETTINGS |= dict(probe_tolerance={"float32": CLOSE, "bfloat16": 0.1})


class LoggingFleet(Fleet):
    """A fleet that keeps its log; a wait fails a test after `patience` seconds."""

    def __init__(self, settings, *, allow_older, sampling, patience=PATIENCE, **requirements):
        self.logged: list[str] = []
        self.default_sampling, self.patience = sampling, patience
        config = FleetConfig.from_dict(settings)
        requirements |= dict(dtype="float32", probe_tolerance=config.probe_tolerance)
        required = Requirements(sampling=sampling, **requirements)
        super().__init__(config, required, allow_older=allow_older, log=self.logged.append)

    def has_logged(self, text):
        return any(text in sentence for sentence in self.logged)

    def of(self, server, name):
        """Returns a value of `servers()`, for a server that may not be known yet."""
        return self.servers().get(server.url, defaultdict(int, state="", reason=""))[name]

    def states(self):
        return {server["state"] for server in self.servers().values()}

    def counts(self):
        return {name.removeprefix("fleet/"): value for name, value in self.metrics().items()}

    def wait_ready(self, version=None):
        """Waits until every server is ready, with `version` if it is given."""
        held = lambda: version is None or self.versions() == {version}
        wait_until(lambda: self.states() == {"ready"} and held(), "readiness", self.patience)

    def take(self, prompts, sampling=None):
        return Taker(self, prompts, sampling or self.default_sampling)

    def sample(self, count):
        """Samples `count` prompts; see Taker.right."""
        return self.take(prompts(count)).right(count)

    def assert_balanced(self, taken, count):
        """Asserts that the counts are those of what was taken, with nothing in flight."""
        found, attempts = self.counts(), Counter(taken.reasons)
        assert found["prompts"] == count
        assert found["groups"] == found["sampled"] == sum(bool(s.rollouts) for s in taken)
        assert found["dropped"] == sum(not s.rollouts for s in taken)
        assert found["prompts"] == found["groups"] + found["dropped"] + found["cancelled"]
        assert found["tokens"] == sum(len(r.tokens) for s in taken for r in s.rollouts)
        for reason, name in REASONS.items():
            assert found[name] == attempts[reason]
        assert found["in_flight"] == found["waiting"] == 0


class ToyFleet(LoggingFleet):
    """A fleet of fault servers, whose versions are below `directory`."""

    def __init__(
        self, directory, *, allow_older=False, sampling=SAMPLING, adapters=None, **settings
    ):
        self.directory, settings, self._adapters = directory, SETTINGS | settings, adapters
        model = dict(model_config=MODEL, tokenizer=None, stop_ids=(STOP,), max_prompt_tokens=8)
        model |= dict(adapters=adapters)
        super().__init__(settings, allow_older=allow_older, sampling=sampling, **model)

    def publish(self, version, **changes):
        """Publishes a version and makes it the target."""
        weights = hf.ADAPTER if self._adapters else "model.safetensors"
        self.refresh(version, publish_toy(self.directory, version, weights=weights, **changes))


def open_real_fleet(
    published, urls=(), *, allow_older=False, patience=180.0, adapters=None, **settings
):
    settings = {**REAL_SETTINGS, "servers": tuple(urls), **settings}
    policy, how = published.policy, dict(sampling=REAL_SAMPLING, patience=patience)
    how |= dict(model_config=policy.config, tokenizer=policy.tokenizer, stop_ids=policy.stop_ids)
    how |= dict(adapters=adapters)
    return LoggingFleet(settings, allow_older=allow_older, max_prompt_tokens=12, **how)


def once(call, fault):
    """Returns a plan that commits one fault at the next such call."""
    left = [fault]
    return lambda this: left.pop() if this == call and left else ""


def always(call, fault):
    """Returns a plan that commits a fault at each such call."""
    return lambda this: fault if this == call else ""


def prompt(index):
    tokens = np.random.default_rng(index).integers(2, VOCAB, 1 + index % 5).astype(np.int32)
    return Prompt(f"p{index}", index, tokens, "", "", "toy")


def prompts(count):
    return map(prompt, range(count))


class Taken(list):
    @property
    def servers(self):
        return {sampled.server for sampled in self}

    @property
    def versions(self):
        return {rollout.policy_version for sampled in self for rollout in sampled.rollouts}

    @property
    def reasons(self):
        return [attempt.reason for sampled in self for attempt in sampled.attempts]

    def assert_each_once(self, count):
        assert sorted(s.prompt.stream_index for s in self) == list(range(count))


class Taker(threading.Thread):
    """Takes what a fleet generates, in a thread, so that no failure of the fleet hangs a test."""

    def __init__(self, fleet, prompts, sampling):
        super().__init__(daemon=True)
        self._fleet, self._prompts, self._sampling = fleet, prompts, sampling
        self.taken, self.error = Taken(), None
        self.start()

    def run(self):
        try:
            for sampled in self._fleet.generate(self._prompts, n=N, sampling=self._sampling):
                self.taken.append(sampled)
        except BaseException as error:
            self.error = error

    def result(self):
        self.join(self._fleet.patience)
        assert not self.is_alive(), "the fleet hangs"
        if self.error:
            raise self.error
        return self.taken

    def right(self, count=None):
        """Returns `count` groups of the toy policy, each once and of the version of its stamp."""
        taken = self.result()
        taken.assert_each_once(len(taken) if count is None else count)
        for sampled in taken:
            assert len(sampled.rollouts) in (0, N)
            assert len(Taken([sampled]).versions) <= 1
            for rollout in sampled.rollouts:
                assert is_right(rollout, sampled.prompt.tokens, self._sampling)
                assert rollout.tokens.dtype == np.int32
                assert rollout.behavior_logp.dtype == np.float32
        return taken


def difference(published, sampled, version, temperature=1.0):
    """Returns the largest difference of a group's log-probs from those of a version."""
    tokens = sampled.prompt.tokens
    return max(
        np.abs(published.logp(version, tokens, r.tokens, temperature) - r.behavior_logp).max()
        for r in sampled.rollouts
    )


def assert_published(published, taken):
    """Asserts that each group is of the version that it is stamped with, and of no other."""
    for sampled in taken:
        assert len(sampled.rollouts) == N
        (version,) = {rollout.policy_version for rollout in sampled.rollouts}
        assert difference(published, sampled, version) < CLOSE
        for other in {1, 2, 3} - {version}:
            # Of a token or two, versions can say nearly the same.
            short = sum(len(r.tokens) for r in sampled.rollouts) < 3 * N
            assert difference(published, sampled, other) > (10 * CLOSE if short else 0.1)


def damage(path):
    weights = bytearray((path / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (path / "model.safetensors").write_bytes(bytes(weights))


class Run:
    """A fleet with a worker, a group store and a ledger; `train` takes the learner's place."""

    def __init__(self, fleet, directory, tokenizer, *, capacity):
        self.fleet, self.groups, self._trained, self._patience = fleet, [], [], fleet.patience
        self._path, self._capacity = directory / "ledger.jsonl", capacity
        buffer = dict(mode="keep_with_anchor", max_age=1, capacity=capacity)
        sizes = dict(group_size=N, on_group=self.groups.append)
        self.store = store_of_sums(tokenizer, self._path, **sizes, **buffer)
        reward = lambda prompt, rollouts: np.array([len(r.tokens) for r in rollouts], np.float32)
        settings = dict(prompts_per_call=1, reward_threads=1, deadline=self._patience)
        settings |= dict(group_size=N, sampling=fleet.default_sampling)
        self.worker = Worker(self.store, fleet, reward, **settings)

    def train(self, step=0):
        """Takes one group, as soon as there is one."""
        wait_until(lambda: self.worker.check() or len(self.store), "a group", self._patience)
        self._trained += self.store.take(1, 0, step)

    def train_until(self, condition, what):
        until = time.monotonic() + self._patience
        while not condition():
            assert time.monotonic() < until, f"{what} does not happen"
            self.train()

    def _is_full(self):
        state = self.store.snapshot(lambda: None)
        return len(state["buffer"]["uses"]) == self._capacity and not state["again"]

    def finish(self):
        """Ends the worker; returns the ledger's report, in which each group is once."""
        wait_until(self._is_full, "a full buffer", self._patience)
        counts = self.fleet.counts()
        self.worker.stop()
        found = LedgerReport(self._path)
        held = {group.prompt.stream_index for group in self.store.take(self._capacity, 0, 0)}
        summary, entries = found.summary(), found.groups()
        assert summary["balanced"], summary["faults"]
        assert sorted(entry.stream_index for entry in entries) == list(range(len(entries)))
        indices = lambda state: {e.stream_index for e in entries if e.state == state}
        trained = [group.prompt.stream_index for group in self._trained]
        assert len(trained) == len(set(trained))
        assert indices("trained") == set(trained)
        assert indices("held") == held
        rewarded = {group.prompt.stream_index for group in self.groups}
        assert indices("trained") | indices("held") == rewarded
        assert rewarded | indices("failed") == {e.stream_index for e in entries}

        sampled = defaultdict(list)
        for row in found.rollouts():
            if row.tokens is not None:
                sampled[int(row.id.split(".")[1])].append((row.version, row.tokens))
        for group in self.groups:
            assert sampled[group.prompt.stream_index] == [
                (group.policy_version, len(rollout.tokens)) for rollout in group.rollouts
            ]
        # The fleet's counts are the same.
        reasons = Counter(row.reason for row in found.rollouts())
        for reason, name in REASONS.items():
            assert reasons[reason] == N * counts[name]
        assert counts["prompts"] == len(entries)
        assert counts["groups"] == len(self.groups)
        assert counts["dropped"] == len(indices("failed"))
        return found
