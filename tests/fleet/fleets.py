"""What the fleet's tests share: settings, prompts, somebody who takes groups, and the books."""

import threading
import time
from collections import Counter, defaultdict
from typing import Any

import numpy as np
from fault_server import MODEL, STOP, VOCAB, is_right, publish_toy

from oapl_jax.config import FleetConfig, ProbeTolerance
from oapl_jax.data.prompts import PromptStream
from oapl_jax.data.records import Record, user
from oapl_jax.fleet.sampler import Fleet
from oapl_jax.rollout.buffer import Buffer
from oapl_jax.rollout.ledger import Ledger
from oapl_jax.rollout.ledger_report import LedgerReport
from oapl_jax.rollout.sampler import Sampling
from oapl_jax.rollout.worker import Worker
from oapl_jax.structs import Prompt

N = 3
SAMPLING = Sampling(temperature=0.7, top_p=1.0, top_k=0, max_response_tokens=6)
PATIENCE = 30.0  # seconds until a test gives up
SETTINGS: dict[str, Any] = dict(
    servers=(),
    servers_file="",
    router="",
    poll_every=0.05,
    max_in_flight=8,
    attempts=4,
    backoff=0.01,
    backoff_limit=0.1,
    health_every=0.1,
    connect_deadline=5.0,
    control_deadline=10.0,
    request_deadline=10.0,
    drain_deadline=10.0,
    update_deadline=10.0,
    start_deadline=10.0,
    no_server_deadline=25.0,
    refresh_fraction=0.5,
    probe_tolerance=ProbeTolerance(float32=1e-3, bfloat16=0.1),
    mixed_versions="reissue",
)


CLOSE = 1e-4  # nats between a real server's log-prob and the learner's, fp32
REAL_SAMPLING = Sampling(temperature=1.0, top_p=1.0, top_k=0, max_response_tokens=20)
REAL_SETTINGS: dict[str, Any] = dict(
    servers=(),
    servers_file="",
    router="",
    poll_every=0.5,
    max_in_flight=8,
    attempts=4,
    backoff=0.2,
    backoff_limit=2.0,
    health_every=2.0,
    connect_deadline=5.0,
    control_deadline=60.0,
    request_deadline=120.0,
    drain_deadline=60.0,
    update_deadline=60.0,
    start_deadline=150.0,
    no_server_deadline=170.0,
    refresh_fraction=0.5,
    probe_tolerance=ProbeTolerance(float32=CLOSE, bfloat16=0.1),
    mixed_versions="reissue",
)


def open_toy_fleet(urls=(), *, allow_older=False, sampling=SAMPLING, **settings):
    """A fleet of fault servers, whose sentences are in its `said`."""
    return _open(
        MODEL,
        {**SETTINGS, "servers": tuple(urls), **settings},
        tokenizer=None,
        stop_ids=(STOP,),
        sampling=sampling,
        max_prompt_tokens=8,
        allow_older=allow_older,
    )


def open_real_fleet(published, urls=(), *, allow_older=False, **settings):
    """A fleet of SGLang servers of the model that is `published`."""
    return _open(
        published.policy.config,
        {**REAL_SETTINGS, "servers": tuple(urls), **settings},
        tokenizer=published.policy.tokenizer,
        stop_ids=published.policy.stop_ids,
        sampling=REAL_SAMPLING,
        max_prompt_tokens=12,
        allow_older=allow_older,
    )


def _open(model_config, settings, **terms):
    said = []
    settings = FleetConfig(**settings)
    fleet: Any = Fleet(model_config, settings, dtype="float32", log=said.append, **terms)
    fleet.said = said
    return fleet


def ready_fleet(make_fleet, made, directory, version=0, **settings: Any):
    """A fleet of these servers, all of which serve `version`."""
    fleet = make_fleet([server.url for server in made], **settings)
    fleet.refresh(version, publish_toy(directory, version))
    wait_until(lambda: states(fleet) == {"ready"}, "readiness")
    return fleet


def states(fleet):
    return {server["state"] for server in fleet.servers().values()}


def once(call, fault):
    """A plan that commits one fault at the next such call."""
    left = [fault]
    return lambda this: left.pop() if this == call and left else ""


def wait_until(condition, what="it", patience=PATIENCE):
    give_up = time.monotonic() + patience
    while not condition():
        assert time.monotonic() < give_up, f"{what} does not happen"
        time.sleep(0.005)


def prompt(draw):
    tokens = np.random.default_rng(draw).integers(2, VOCAB, 1 + draw % 5).astype(np.int32)
    return Prompt(f"p{draw}", draw, tokens, "", "", "toy")


def prompts(count):
    return map(prompt, range(count))


class Taker(threading.Thread):
    """Takes what a fleet generates, in a thread, so that no failure of the fleet hangs a test."""

    def __init__(self, fleet, prompts, sampling=SAMPLING, patience=PATIENCE):
        super().__init__(daemon=True)
        self._generate = lambda: fleet.generate(prompts, n=N, sampling=sampling)
        self._patience = patience
        self.taken, self.error = [], None
        self.start()

    def run(self):
        try:
            for sampled in self._generate():
                self.taken.append(sampled)
        except BaseException as error:
            self.error = error

    def result(self):
        self.join(self._patience)
        assert not self.is_alive(), "the fleet hangs"
        if self.error:
            raise self.error
        return self.taken


def assert_right(taken, sampling=SAMPLING):
    """Every rollout is one of the toy policy's version that it is stamped with."""
    for sampled in taken:
        assert len(sampled.rollouts) in (0, N)
        assert len({r.policy_version for r in sampled.rollouts}) <= 1
        for rollout in sampled.rollouts:
            assert is_right(rollout, sampled.prompt.tokens, sampling)
            assert rollout.tokens.dtype == np.int32
            assert rollout.behavior_logp.dtype == np.float32


def gap(published, sampled, version, temperature=1.0):
    """Largest difference of a log-prob of a group from those of a version."""
    tokens = sampled.prompt.tokens
    return max(
        np.abs(published.logp(version, tokens, r.tokens, temperature) - r.behavior_logp).max()
        for r in sampled.rollouts
    )


def assert_published(published, taken):
    """Each group is of the version that it is stamped with, and of no other."""
    for sampled in taken:
        assert len(sampled.rollouts) == N
        (version,) = {r.policy_version for r in sampled.rollouts}
        assert gap(published, sampled, version) < CLOSE
        for other in {1, 2, 3} - {version}:
            # Of a token or two, versions can say nearly the same.
            short = sum(len(r.tokens) for r in sampled.rollouts) < 3 * N
            assert gap(published, sampled, other) > (10 * CLOSE if short else 0.1)


def assert_each_once(taken, count):
    assert sorted(s.prompt.stream_index for s in taken) == list(range(count))


def assert_balanced(fleet, taken, count):
    """The fleet's own counts, when nothing is in flight."""
    found = counts_of(fleet)
    attempts = Counter(a.reason for s in taken for a in s.attempts)
    assert found["prompts"] == count
    assert found["groups"] == sum(bool(s.rollouts) for s in taken)
    assert found["dropped"] == sum(not s.rollouts for s in taken)
    assert found["prompts"] == found["groups"] + found["dropped"] + found["cancelled"]
    assert found["sampled"] == found["groups"]
    assert found["tokens"] == sum(len(r.tokens) for s in taken for r in s.rollouts)
    assert found["attempts_failed"] == attempts["failed"]
    assert found["aborted"] == attempts["aborted"]
    assert found["mixed"] == attempts["mixed"]
    assert found["in_flight"] == found["waiting"] == 0


def counts_of(fleet):
    return {name.removeprefix("fleet/"): value for name, value in fleet.metrics().items()}


class Run:
    """A fleet in a worker's hands, with a buffer, a ledger, and `train` in a learner's place.

    Args:
      fleet: the sampler.
      directory: of the ledger.
      tokenizer: of the prompts, which are sums.
      sampling: how tokens are drawn.
      capacity: of the buffer, groups; whatever their versions are, all are trained on.
      patience: seconds until a wait gives up.

    `groups` has all that were rewarded.
    """

    def __init__(self, fleet, directory, tokenizer, *, sampling, capacity, patience=PATIENCE):
        self.fleet, self.groups, self._trained, self._patience = fleet, [], [], patience
        self._path = directory / "ledger.jsonl"
        ledger = Ledger(self._path)
        self._buffer = Buffer(
            mode="keep_with_anchor",
            max_age=1,
            max_reuse=1,
            capacity=capacity,
            zero_variance="keep",
            seed=0,
            on_end=ledger.end,
        )
        records = [Record(f"id{i}", user(f"{i}+1="), "", "chain_sum", {}) for i in range(10, 99)]
        stream = PromptStream(
            records,
            tokenizer,
            task="chain_sum",
            seed=0,
            max_prompt_tokens=8,
            instruction="",
            host=0,
            hosts=1,
        )
        self.worker = Worker(
            stream,
            fleet,
            lambda prompt, rollouts: np.array([len(r.tokens) for r in rollouts], np.float32),
            self._buffer,
            ledger=ledger,
            record=self.groups.append,
            group_size=N,
            sampling=sampling,
            prompts_per_call=1,
            reward_threads=1,
            deadline=patience,
        )

    def train(self, step=0):
        """One group, as soon as there is one."""
        wait_until(lambda: self.worker.check() or len(self._buffer), "a group", self._patience)
        self._trained += self._buffer.sample(1, step)

    def train_until(self, condition, what):
        give_up = time.monotonic() + self._patience
        while not condition():
            assert time.monotonic() < give_up, f"{what} does not happen"
            self.train()

    def _idle(self):
        with self._buffer.lock:  # then what is outstanding stays as it is for a moment
            return not self._buffer.has_room(1) and not self.worker.state()["again"]

    def finish(self):
        """Lets the fleet finish and closes the ledger, in which no group is lost or duplicated.

        Returns:
          its account.
        """
        wait_until(self._idle, "a full buffer", self._patience)
        counts = counts_of(self.fleet)
        self.worker.stop()
        found = LedgerReport(self._path)
        summary, entries = found.summary(), found.groups()
        assert summary["balanced"], summary["faults"]
        assert sorted(entry.stream_index for entry in entries) == list(range(len(entries)))
        draws = lambda state: {e.stream_index for e in entries if e.state == state}
        trained = [group.prompt.stream_index for group in self._trained]
        assert len(trained) == len(set(trained))
        assert draws("trained") == set(trained)
        assert draws("held") == self._buffer.draws()
        assert draws("trained") | draws("held") == {
            group.prompt.stream_index for group in self.groups
        }
        assert draws("trained") | draws("held") | draws("failed") == {
            e.stream_index for e in entries
        }

        sampled = defaultdict(list)
        for row in found.rollouts():
            if row.tokens is not None:
                sampled[int(row.id.split(".")[1])].append((row.version, row.tokens))
        for group in self.groups:
            assert sampled[group.prompt.stream_index] == [
                (group.policy_version, len(rollout.tokens)) for rollout in group.rollouts
            ]
        # And the fleet has counted the same.
        reasons = Counter(row.reason for row in found.rollouts())
        for reason, name in (("failed", "attempts_failed"), ("aborted",) * 2, ("mixed",) * 2):
            assert reasons[reason] == N * counts[name]
        assert counts["prompts"] == len(entries)
        assert counts["groups"] == len(self.groups)
        assert counts["dropped"] == len(draws("failed"))
        return found
