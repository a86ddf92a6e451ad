"""The worker, in turns with a learner and in a thread beside it; its sampler follows a script."""

import itertools
import threading
import time

import numpy as np
import pytest
from etils import epath
from stores import store_of_sums, wait_until

from oapl_jax.errors import RunError
from oapl_jax.model.tokenizer import make_character_tokenizer
from oapl_jax.rollout.ledger import LedgerReport
from oapl_jax.rollout.sampler import Attempt, Sampled, Sampling
from oapl_jax.rollout.worker import Worker
from oapl_jax.structs import Rollout

SAMPLING = Sampling(temperature=1.0, top_p=1.0, top_k=0, max_response_tokens=4)
GROUP_SIZE = 3
PER_CALL = 2
PATIENCE = 20.0  # seconds until a test gives up


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return make_character_tokenizer("0123456789+-=,", tmp_path_factory.mktemp("tokenizer"))


class ScriptedSampler:
    """Answers right, right but cut off, and wrong, to two prompts at a time.

    It waits for a permit each time if it has any; a group in `fails` comes without rollouts; the
    groups of a portion come in the order of `order`; told to close, it gives up what it has if
    `aborts`.
    """

    def __init__(self, tokenizer):
        self.version = 0
        self.refreshed: list[tuple[int, str]] = []
        self.asked: list[list[int]] = []
        self.failure: BaseException | None = None
        self.fails: set[int] = set()
        self.order = slice(None)
        self.aborts, self.closed = False, 0
        self.started, self.permits = threading.Semaphore(0), None
        self._tokenizer = tokenizer

    def versions(self):
        return {self.version}

    def refresh(self, version, path):
        self.version = version
        self.refreshed.append((version, str(path)))

    def close(self):
        self.closed += 1
        if self.aborts:
            self.permits.release(100)

    def generate(self, prompts, *, n, sampling):
        assert (n, sampling) == (GROUP_SIZE, SAMPLING)
        prompts = iter(prompts)
        while taken := list(itertools.islice(prompts, PER_CALL)):
            version = self.version
            self.asked.append([p.stream_index for p in taken])
            self.started.release()
            if self.permits is not None:
                assert self.permits.acquire(timeout=PATIENCE)
            if self.failure:
                raise self.failure
            if self.aborts and self.closed:
                return
            for prompt in taken[self.order]:
                if prompt.stream_index in self.fails:
                    attempts = (Attempt("s", version, "failed", 0.5),) * 2
                    yield Sampled(prompt, (), "s", 1.0, attempts)
                else:
                    yield Sampled(prompt, self._answers(prompt.answer, version), "s", 0.25)

    def _answers(self, answer, version):
        def rollout(text, finish_reason):
            tokens = self._tokenizer.encode(text)
            tokens += [self._tokenizer.eos_token_id] * (finish_reason == "stop")
            logp = np.full(len(tokens), -0.5, np.float32)
            return Rollout(np.array(tokens, np.int32), logp, version, finish_reason)

        wrong = str(int(answer) + 1)
        return (rollout(answer, "stop"), rollout(answer, "length"), rollout(wrong, "stop"))


@pytest.fixture
def make(tokenizer, tmp_path):
    """Makes (worker, sampler, store); at the end of the test the worker's thread is stopped, and
    every ledger must balance."""
    workers = []

    def right_and_whole(prompt, rollout):
        text = tokenizer.decode(rollout.tokens.tolist(), skip_special_tokens=True)
        return float(text == prompt.answer and rollout.finish_reason == "stop")

    def made(
        *, deadline=PATIENCE, reward=right_and_whole, reward_threads=1, permits=None, **buffer
    ):
        ledger = epath.Path(tmp_path / f"{len(workers)}.jsonl")
        buffer = {"capacity": 6, "group_size": GROUP_SIZE, **buffer}
        store, sampler = store_of_sums(tokenizer, ledger, **buffer), ScriptedSampler(tokenizer)
        sampler.permits = None if permits is None else threading.Semaphore(permits)
        rewards = lambda prompt, of: np.array([reward(prompt, r) for r in of], np.float32)
        sizes = dict(group_size=GROUP_SIZE, sampling=SAMPLING, prompts_per_call=PER_CALL)
        limits = dict(reward_threads=reward_threads, deadline=deadline)
        worker = Worker(store, sampler, rewards, **sizes, **limits)
        workers.append((worker, sampler))
        return worker, sampler, store

    yield made
    for i, (worker, sampler) in enumerate(workers):
        if sampler.permits is not None:
            sampler.permits.release(1000)
        worker.stop()
        summary = LedgerReport(epath.Path(tmp_path / f"{i}.jsonl")).summary()
        assert summary["balanced"], summary
        asked = sum(map(len, sampler.asked))
        failed = len(sampler.fails & set(itertools.chain(*sampler.asked)))
        # What was taken is asked for; what stop found in hand was perhaps taken but not asked.
        assert summary["requested"] >= GROUP_SIZE * (asked + failed)


def held(store):
    return store.take(len(store), 0, step=0)


def held_indices(store):
    return [group.prompt.stream_index for group in held(store)]


def snapshot(store):
    """Position in the prompt stream, and the prompts to sample again."""
    state = store.snapshot(lambda: None)
    return state["prompts"]["stream"]["stream_index"], state["again"]


def ends(store):
    counts = store.counts()
    return {k.split("/")[1]: n for k, n in counts.items() if k.startswith("buffer/") and n}


def path(version):
    return epath.Path(f"/versions/v{version:06d}")


def ledger_of(tmp_path, number=0):
    balance = LedgerReport(epath.Path(tmp_path / f"{number}.jsonl")).summary()["balance"]
    return {k: v for k, v in balance.items() if v}


def test_produce_adds_rewarded_groups_of_one_version_and_measures_them(make):
    """They are recorded whole before the buffer has them."""
    recorded = []
    worker, sampler, store = make(on_group=lambda group: recorded.append((group, len(store))))
    assert store.take_metrics() == {}
    worker.produce()
    assert len(store) == PER_CALL
    worker.produce()
    metrics = store.take_metrics()
    groups = held(store)
    assert [g.prompt.stream_index for g in groups] == [0, 1, 2, 3]
    assert [before for _, before in recorded] == [0, 1, 2, 3]
    for group, (whole, _) in zip(groups, recorded, strict=True):
        assert whole is group
        assert group.reward.dtype == np.float32
        assert group.reward.tolist() == [1, 0, 0]  # cut off: 0, although it says the right number
        assert group.policy_version == 0
        texts = [tuple(r.tokens) for r in group.rollouts]
        assert texts[0][:-1] == texts[1]
    assert sampler.refreshed == []
    assert metrics["rollout/groups"] == 2 * PER_CALL
    assert metrics["rollout/reward"] == pytest.approx(1 / 3)
    assert metrics["rollout/truncated"] == pytest.approx(1 / 3)
    assert metrics["rollout/right_and_stopped"] == pytest.approx(1 / 3)
    assert metrics["rollout/length"] == pytest.approx((3 + 2 + 3) / 3)
    for name in ("zero_variance", "waiting_seconds", "failed"):
        assert metrics[f"rollout/{name}"] == 0
    assert metrics["rollout/latency"] == 0.25
    assert metrics["rollout/seconds"] > 0
    speed = 8 * 2 * PER_CALL / metrics["rollout/seconds"]
    assert metrics["rollout/tokens_per_second"] == pytest.approx(speed)
    assert store.take_metrics() == {}


def test_serve_refreshes_once_and_before_the_next_portion(make):
    worker, sampler, store = make(mode="keep_with_anchor")
    assert store.target_version == -1
    assert worker.versions() == {0}  # the sampler's own
    store.set_target(4, path(4))
    assert (store.target_version, worker.versions(), sampler.version) == (4, {0, 4}, 0)
    worker.produce()
    worker.produce()
    store.set_target(8, path(8))
    assert worker.versions() == {4, 8}  # the sampler still holds 4
    worker.produce()
    assert worker.versions() == {4, 8}  # the buffer still holds groups of 4
    assert sampler.refreshed == [(4, str(path(4))), (8, str(path(8)))]
    assert [g.policy_version for g in held(store)] == [4] * 4 + [8] * 2
    assert worker.versions() == {8}


def test_groups_that_the_buffer_drops_are_counted(make, tmp_path):
    worker, _, store = make(zero_variance="drop", reward=lambda prompt, rollout: 0.0)
    worker.produce()
    assert len(store) == 0
    assert ledger_of(tmp_path) == {"zero_variance": GROUP_SIZE * PER_CALL}
    assert ends(store) == {"added": PER_CALL, "zero_variance": PER_CALL}
    assert store.take_metrics()["rollout/zero_variance"] == 1


def test_prompts_that_were_not_committed_are_sampled_again_first(make):
    worker, sampler, store = make()
    assert snapshot(store) == (0, [])
    worker.produce()
    assert snapshot(store) == (PER_CALL, [])
    sampler.failure = OSError("lost")
    with pytest.raises(OSError, match="lost"):
        worker.produce()
    assert sampler.asked == [[0, 1], [2, 3]]
    state = store.snapshot(lambda: None)
    assert snapshot(store) == (2 * PER_CALL, [2, 3])

    again, sampler, other = make()
    del state["buffer"]
    other.restore(state | {"ledger": 0}, read=lambda like: like)
    assert snapshot(other) == (2 * PER_CALL, [2, 3])
    again.produce()
    again.produce()
    assert sampler.asked == [[2, 3], [4, 5]]
    assert snapshot(other)[1] == []
    worker, _, whole = make()
    for _ in range(3):
        worker.produce()
    resumed = [(g.prompt.stream_index, g.prompt.id) for g in held(store) + held(other)]
    assert resumed == [(g.prompt.stream_index, g.prompt.id) for g in held(whole)]


def test_a_group_without_rollouts_is_counted_and_makes_room(make, tmp_path):
    worker, sampler, store = make()
    sampler.fails = {1, 2}
    worker.produce()
    worker.produce()
    assert (held_indices(store), snapshot(store)[1]) == ([0, 3], [])
    metrics = store.take_metrics()
    assert (metrics["rollout/failed"], metrics["rollout/groups"]) == (2, 2)
    # Two attempts each: the first was issued again, the second was the end.
    assert ledger_of(tmp_path) == {"trained": 6, "failed": 6, "reissued": 6}


def test_one_reward_thread_keeps_the_order_of_the_sampler(make):
    slow_first = lambda prompt, rollout: time.sleep(0.02 * (prompt.stream_index == 1)) or 1.0
    worker, sampler, store = make(reward=slow_first, reward_threads=1)
    sampler.order = slice(None, None, -1)
    worker.produce()
    worker.produce()
    assert held_indices(store) == [1, 0, 3, 2]


def test_groups_are_rewarded_beside_each_other(make):
    """Each reward waits until another group's is asked for too: one thread would wait for ever."""
    both = threading.Barrier(PER_CALL)
    meet = lambda prompt, rollout: float(both.wait(PATIENCE) >= 0)
    worker, _, store = make(reward=meet, reward_threads=PER_CALL)
    worker.produce()
    assert sorted(held_indices(store)) == [0, 1]


def test_the_thread_fills_the_buffer_and_goes_on_when_there_is_room(make):
    worker, sampler, store = make(capacity=5)  # two portions fit, a third does not
    worker.start()
    wait_until(lambda: len(store) == 4)
    wait_until(lambda: snapshot(store)[1] == [4])  # half of the third is taken
    time.sleep(0.1)
    assert (len(store), len(sampler.asked)) == (4, 2)
    worker.check()
    taken = store.take(1, 0, step=0)
    wait_until(lambda: len(store) == 5)
    time.sleep(0.1)
    assert (len(store), len(sampler.asked)) == (5, 3)
    assert snapshot(store)[1] == []
    assert [taken[0].prompt.stream_index, *held_indices(store)] == list(range(6))


def test_seconds_without_room_are_reported_even_if_the_learner_asks_before_the_next_groups(make):
    worker, sampler, store = make(capacity=2, permits=1)
    worker.start()
    wait_until(lambda: len(store) == 2)
    assert store.take_metrics()["rollout/groups"] == 2
    time.sleep(0.3)  # the thread has no room
    sampler.started.acquire()
    store.take(2, 0, step=0)
    assert sampler.started.acquire(timeout=PATIENCE)  # it samples again,
    assert store.take_metrics() == {}  # and has nothing to show yet
    sampler.permits.release()
    wait_until(lambda: len(store) == 2)
    assert 0.25 < store.take_metrics()["rollout/waiting_seconds"] < PATIENCE


def test_a_group_that_is_being_rewarded_is_in_the_state_and_its_version_stays(make):
    rewarded = threading.Event()
    slow = lambda prompt, rollout: float(prompt.stream_index != 1 or rewarded.wait(PATIENCE))
    worker, sampler, store = make(mode="keep_with_anchor", reward=slow, reward_threads=2, permits=1)
    store.set_target(4, path(4))
    worker.start()
    wait_until(lambda: len(sampler.asked) == 2 and len(store) == 1)
    assert snapshot(store)[1] == [1, 2, 3]
    store.set_target(8, path(8))
    sampler.permits.release()
    wait_until(lambda: sampler.version == 8 and len(store) == 3)
    assert held_indices(store) == [0, 2, 3]
    assert worker.versions() == {4, 8}  # only the group that is being rewarded still needs 4
    rewarded.set()
    wait_until(lambda: 1 in held_indices(store))
    assert worker.versions() == {8}


def test_a_version_stays_while_the_sampler_loads_it(make):
    worker, sampler, store = make(mode="keep_with_anchor")
    loading, loaded = threading.Event(), threading.Event()
    refresh = sampler.refresh

    def slow_refresh(version, path):
        loading.set()
        assert loaded.wait(PATIENCE)
        refresh(version, path)

    sampler.refresh = slow_refresh
    store.set_target(4, path(4))
    worker.start()
    assert loading.wait(PATIENCE)
    store.set_target(8, path(8))
    assert worker.versions() == {0, 4, 8}
    loaded.set()
    wait_until(lambda: sampler.version == 8)


def test_a_new_version_serves_between_portions_and_what_is_late_is_counted(make):
    worker, sampler, store = make(mode="clear_on_sync", capacity=100, permits=1)
    store.set_target(0, path(0))
    worker.start()
    wait_until(lambda: len(sampler.asked) == 2 and len(store) == 2)  # one held, one in progress
    store.set_target(5, path(5))
    assert (len(store), ends(store)) == (0, {"added": 2, "expired": 2})
    assert worker.versions() == {0, 5}
    assert sampler.version == 0  # a portion is never sampled from two versions
    sampler.permits.release()
    wait_until(lambda: len(sampler.asked) == 3 and ends(store)["added"] == 4)
    assert (len(store), ends(store)) == (0, {"added": 4, "expired": 4})
    assert sampler.refreshed == [(5, str(path(5)))]
    assert worker.versions() == {5}
    sampler.permits.release()
    wait_until(lambda: len(store) == 2)
    assert {g.policy_version for g in held(store)} == {5}


def test_an_exception_of_the_sampler_reaches_the_learner(make):
    worker, sampler, store = make(permits=0)
    worker.start()
    worker.check()
    failure = sampler.failure = ZeroDivisionError("the fleet is gone")
    threading.Timer(0.1, lambda: sampler.permits.release(1)).start()
    started = time.monotonic()
    with pytest.raises(ZeroDivisionError, match="the fleet is gone"):
        store.wait(lambda: len(store) > 0, "x", deadline=PATIENCE, check=worker.check)
    assert time.monotonic() - started < PATIENCE / 2
    with pytest.raises(ZeroDivisionError) as caught:
        wait_until(worker.check)
    assert caught.value is failure
    assert snapshot(store) == (PER_CALL, [0, 1])


def test_a_reward_that_fails_reaches_the_learner_in_turns_or_when_it_has_enough(make):
    worker, _, store = make(reward=lambda prompt, rollout: 1 / (1 - prompt.stream_index))
    with pytest.raises(ZeroDivisionError):
        worker.produce()
    assert (snapshot(store)[1], held_indices(store)) == ([1], [0])
    fails_at_2 = lambda prompt, rollout: 1 / (2 - prompt.stream_index)
    worker, sampler, store = make(reward=fails_at_2, capacity=100)
    worker.start()
    with pytest.raises(ZeroDivisionError):
        wait_until(worker.check)
    wait_until(lambda: len(store) >= 2)
    with pytest.raises(ZeroDivisionError):
        store.wait(lambda: len(store) > 0, "x", deadline=PATIENCE, check=worker.check)
    asked = len(sampler.asked)
    time.sleep(0.1)
    assert len(sampler.asked) == asked  # it samples no more
    assert 2 in snapshot(store)[1]


def test_stop_waits_for_what_the_sampler_goes_on_with(make):
    worker, sampler, store = make(permits=0)
    worker.start()
    wait_until(lambda: sampler.asked)
    threading.Timer(0.1, lambda: sampler.permits.release(1)).start()
    worker.stop()
    assert (len(sampler.asked), sampler.closed) == (1, 1)
    assert (len(store), snapshot(store)) == (PER_CALL, (PER_CALL, []))
    worker.check()


def test_stop_finishes_rewards_and_requeues_other_groups(make, tmp_path):
    slow = lambda prompt, rollout: time.sleep(0.05) or 1.0
    worker, sampler, store = make(reward=slow, permits=1)
    sampler.aborts = True
    worker.start()
    wait_until(lambda: len(sampler.asked) == 2)
    worker.stop()
    assert ledger_of(tmp_path) == {"held": 6, "in flight": 6}
    assert (held_indices(store), snapshot(store)) == ([0, 1], (2 * PER_CALL, [2, 3]))
    worker.check()


def test_stop_has_a_deadline(make):
    worker, sampler, _ = make(deadline=0.1, permits=0)
    worker.start()
    wait_until(lambda: sampler.asked)
    with pytest.raises(RunError, match=r"thread did not end in .* s \(rollout\.deadline\)"):
        worker.stop()


def test_rewards_have_a_deadline_in_turns(make):
    rewarded = threading.Event()
    slow = lambda prompt, rollout: float(prompt.stream_index != 1 or rewarded.wait(PATIENCE))
    worker, _, store = make(reward=slow, deadline=0.1)
    with pytest.raises(RunError, match=r"rollout\.deadline"):
        worker.produce()
    rewarded.set()
    wait_until(lambda: len(store) == PER_CALL)


def test_waiting_for_buffer_room_times_out_and_stops(make):
    waiting, _, store = make(capacity=2)
    waiting.start()
    wait_until(lambda: len(store) == 2)
    started = time.monotonic()
    waiting.stop()
    assert time.monotonic() - started < PATIENCE / 2
    worker, _, store = make(capacity=2, deadline=0.1)
    worker.start()
    with pytest.raises(RunError, match=r"rollout\.deadline"):
        wait_until(worker.check)
    assert len(store) == 2


def test_stop_has_a_deadline_for_rewards(make):
    """The sampler has failed, so only `stop` waits for the reward."""
    begun, rewarded = threading.Event(), threading.Event()

    def reward(prompt, rollout):
        begun.set()
        return float(rewarded.wait(PATIENCE))

    worker, sampler, store = make(reward=reward, deadline=0.1)

    def generate(prompts, **settings):
        yield from itertools.islice(type(sampler).generate(sampler, prompts, **settings), 1)
        assert begun.wait(PATIENCE)
        raise OSError("lost")

    sampler.generate = generate
    with pytest.raises(OSError, match="lost"):
        worker.produce()
    with pytest.raises(RunError, match=r"rollout\.deadline"):
        worker.stop()
    rewarded.set()
    wait_until(lambda: len(store) == 1)
