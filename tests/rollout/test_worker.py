"""The worker, in turns with a learner and in a thread beside it; its sampler follows a script."""

import threading
import time

import numpy as np
import pytest
from etils import epath

from oapl_jax.buffer import Buffer
from oapl_jax.data.prompts import Prompts
from oapl_jax.data.tasks import Record
from oapl_jax.errors import RunError
from oapl_jax.rewards import Grader
from oapl_jax.rollout.sampler import Sampling
from oapl_jax.rollout.worker import Worker
from oapl_jax.structs import Rollout
from oapl_jax.tokenizer import make_character_tokenizer

SAMPLING = Sampling(temperature=1.0, top_p=1.0, top_k=0, max_response_tokens=4)
GROUP_SIZE = 3
PER_CALL = 2
PATIENCE = 20.0  # seconds until a test gives up


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return make_character_tokenizer("0123456789+-=,", tmp_path_factory.mktemp("tokenizer"))


class ScriptedSampler:
    """Answers right, right but cut off, and wrong; waits for a permit each time if it has any."""

    def __init__(self, tokenizer):
        self.version = 0
        self.refreshed: list[tuple[int, str]] = []
        self.asked: list[list[int]] = []
        self.failure: BaseException | None = None
        self.started, self.permits = threading.Semaphore(0), None
        self._tokenizer = tokenizer

    def refresh(self, version, path):
        self.version = version
        self.refreshed.append((version, str(path)))

    def generate(self, prompts, *, n, sampling):
        assert (n, sampling) == (GROUP_SIZE, SAMPLING)
        version = self.version
        self.asked.append([p.draw for p in prompts])
        self.started.release()
        if self.permits is not None:
            assert self.permits.acquire(timeout=PATIENCE)
        if self.failure:
            raise self.failure
        return [self._answers(prompt.answer, version) for prompt in prompts]

    def _answers(self, answer, version):
        def rollout(text, finish_reason):
            tokens = self._tokenizer.encode(text)
            tokens += [self._tokenizer.eos_token_id] * (finish_reason == "stop")
            logp = np.full(len(tokens), -0.5, np.float32)
            return Rollout(np.array(tokens, np.int32), logp, version, finish_reason)

        wrong = str(int(answer) + 1)
        return [rollout(answer, "stop"), rollout(answer, "length"), rollout(wrong, "stop")]


@pytest.fixture
def make(tokenizer):
    """Makes (worker, sampler, buffer) and stops the worker's thread at the end of the test."""
    workers = []

    def made(*, mode="clear_on_sync", capacity=6, deadline=PATIENCE, zero_variance="keep"):
        records = [Record(f"id{i}", f"{i}+1=", str(i + 1), "chain_sum", {}) for i in range(10, 17)]
        prompts = Prompts(records, tokenizer, task="chain_sum", seed=0, max_prompt_tokens=5)
        buffer = Buffer(
            mode=mode,
            max_age=100,
            max_reuse=1,
            capacity=capacity,
            zero_variance=zero_variance,
            seed=0,
        )
        sampler = ScriptedSampler(tokenizer)
        worker = Worker(
            prompts,
            sampler,
            Grader(tokenizer).reward,
            buffer,
            group_size=GROUP_SIZE,
            sampling=SAMPLING,
            prompts_per_call=PER_CALL,
            deadline=deadline,
        )
        workers.append((worker, sampler))
        return worker, sampler, buffer

    yield made
    for worker, sampler in workers:
        if sampler.permits is not None:
            sampler.permits.release(1000)
        worker.stop()


def held(buffer):
    return buffer.sample(len(buffer), step=0)


def until(condition):
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.002)


def path(version):
    return epath.Path(f"/versions/v{version:06d}")


# In turns


def test_produce_adds_rewarded_groups_of_one_version(make):
    worker, sampler, buffer = make()
    worker.produce()
    assert len(buffer) == PER_CALL
    groups = held(buffer)
    assert [g.prompt.draw for g in groups] == [0, 1]
    for group in groups:
        assert group.reward.dtype == np.float32
        assert group.reward.tolist() == [1, 0, 0]  # cut off: 0, although it says the right number
        assert group.policy_version == 0
        texts = [tuple(r.tokens) for r in group.rollouts]
        assert texts[0][:-1] == texts[1]
    assert sampler.refreshed == []


def test_serve_refreshes_once_and_before_the_next_portion(make):
    worker, sampler, buffer = make(mode="keep_with_anchor")
    assert worker.version == -1
    assert worker.versions() == set()
    worker.serve(4, path(4))
    assert (worker.version, worker.versions(), sampler.version) == (4, {4}, 0)
    worker.produce()
    worker.produce()
    worker.serve(8, path(8))
    assert worker.versions() == {4, 8}  # the sampler still holds 4
    worker.produce()
    assert worker.versions() == {8}
    assert sampler.refreshed == [(4, str(path(4))), (8, str(path(8)))]
    assert [g.policy_version for g in held(buffer)] == [4] * 4 + [8] * 2


def test_metrics_say_what_was_sampled_since_the_last_call(make):
    worker, _, _ = make()
    assert worker.take_metrics() == {}
    worker.produce()
    worker.produce()
    metrics = worker.take_metrics()
    assert metrics["rollout/groups"] == 2 * PER_CALL
    assert metrics["rollout/reward"] == pytest.approx(1 / 3)
    assert metrics["rollout/truncated"] == pytest.approx(1 / 3)
    assert metrics["rollout/length"] == pytest.approx((3 + 2 + 3) / 3)
    assert metrics["rollout/zero_variance"] == 0
    assert metrics["rollout/waiting_seconds"] == 0
    assert metrics["rollout/seconds"] > 0
    assert metrics["rollout/tokens_per_second"] == pytest.approx(
        8 * 2 * PER_CALL / metrics["rollout/seconds"]
    )
    assert worker.take_metrics() == {}


def test_metrics_count_groups_that_the_buffer_drops(make, monkeypatch):
    worker, sampler, buffer = make(zero_variance="drop")
    answers = sampler._answers
    monkeypatch.setattr(sampler, "_answers", lambda *a: answers(*a)[1:2] * GROUP_SIZE)
    worker.produce()
    assert len(buffer) == 0
    assert buffer.counts == {"added": PER_CALL, "zero_variance": PER_CALL}
    metrics = worker.take_metrics()
    assert (metrics["rollout/zero_variance"], metrics["rollout/truncated"]) == (1, 1)


def test_state_stands_behind_what_was_delivered_and_restore_draws_the_rest_again(make):
    worker, sampler, buffer = make()
    assert worker.state()["prompts"]["draw"] == 0
    worker.produce()
    after_one = worker.state()
    assert after_one["prompts"]["draw"] == PER_CALL
    sampler.failure = OSError("lost")
    with pytest.raises(OSError, match="lost"):
        worker.produce()
    assert sampler.asked == [[0, 1], [2, 3]]
    assert worker.state() == after_one  # those two were drawn, but never delivered

    again, sampler, other = make()
    again.restore(after_one)
    assert again.state() == after_one
    again.produce()
    assert sampler.asked == [[2, 3]]
    worker, _, whole = make()
    worker.produce()
    worker.produce()
    resumed = [g.prompt.id for g in held(buffer) + held(other)]
    assert resumed == [g.prompt.id for g in held(whole)]


# In a thread


def test_the_thread_fills_the_buffer_and_goes_on_when_there_is_room(make):
    worker, sampler, buffer = make(capacity=5)  # two portions fit, a third does not
    worker.start()
    until(lambda: len(buffer) == 4)
    time.sleep(0.1)
    assert (len(buffer), len(sampler.asked)) == (4, 2)
    worker.check()
    taken = buffer.sample(1, step=0)
    until(lambda: len(buffer) == 5)
    time.sleep(0.1)
    assert (len(buffer), len(sampler.asked)) == (5, 3)
    draws = [g.prompt.draw for g in taken + held(buffer)]
    assert draws == list(range(6))


def test_the_learner_waits_for_the_thread(make):
    worker, sampler, buffer = make()
    sampler.permits = threading.Semaphore(0)
    worker.start()
    threading.Timer(0.2, lambda: sampler.permits.release(1)).start()
    wait = buffer.wait(lambda: len(buffer) >= 2, what="groups", deadline=PATIENCE)
    assert 0.1 < wait < PATIENCE


def test_seconds_without_room_are_reported_even_if_the_learner_asks_before_the_next_groups(make):
    worker, sampler, buffer = make(capacity=2)
    sampler.permits = threading.Semaphore(1)
    worker.start()
    until(lambda: len(buffer) == 2)
    assert worker.take_metrics()["rollout/groups"] == 2
    time.sleep(0.3)  # the thread has no room
    sampler.started.acquire()
    buffer.sample(2, step=0)
    assert sampler.started.acquire(timeout=PATIENCE)  # it samples again,
    assert worker.take_metrics() == {}  # and has nothing to show yet
    sampler.permits.release()
    until(lambda: len(buffer) == 2)
    assert 0.25 < worker.take_metrics()["rollout/waiting_seconds"] < PATIENCE


def test_a_portion_in_progress_is_not_in_the_state(make):
    worker, sampler, buffer = make()
    sampler.permits = threading.Semaphore(1)
    worker.start()
    until(lambda: len(sampler.asked) == 2)
    with buffer.lock:
        assert worker.state()["prompts"]["draw"] == len(buffer) == PER_CALL
    sampler.permits.release()
    until(lambda: len(buffer) == 2 * PER_CALL)
    with buffer.lock:
        assert worker.state()["prompts"]["draw"] == 2 * PER_CALL


def test_a_new_version_serves_between_portions_and_what_is_late_is_counted(make):
    worker, sampler, buffer = make(mode="clear_on_sync", capacity=100)
    sampler.permits = threading.Semaphore(1)
    worker.serve(0, path(0))
    worker.start()
    until(lambda: len(sampler.asked) == 2)  # one portion held, one in progress
    assert len(buffer) == 2
    worker.serve(5, path(5))
    assert len(buffer) == 0
    assert buffer.counts == {"added": 2, "expired": 2}
    assert worker.versions() == {0, 5}
    assert sampler.version == 0  # a portion is never sampled from two versions
    sampler.permits.release()
    until(lambda: len(sampler.asked) == 3)
    assert len(buffer) == 0
    assert buffer.counts == {"added": 4, "expired": 4}
    assert sampler.refreshed == [(5, str(path(5)))]
    assert worker.versions() == {5}
    sampler.permits.release()
    until(lambda: len(buffer) == 2)
    assert {g.policy_version for g in held(buffer)} == {5}


def test_late_groups_stay_where_each_has_its_own_anchor(make):
    worker, sampler, buffer = make(mode="keep_with_anchor", capacity=6)
    sampler.permits = threading.Semaphore(1)
    worker.start()
    until(lambda: len(sampler.asked) == 2)
    worker.serve(5, path(5))
    sampler.permits.release(2)
    until(lambda: len(buffer) == 6)
    assert [g.policy_version for g in held(buffer)] == [0] * 4 + [5] * 2


def test_what_the_sampler_raises_reaches_the_learner(make):
    worker, sampler, buffer = make()
    sampler.permits = threading.Semaphore(0)
    worker.start()
    worker.check()
    failure = sampler.failure = ZeroDivisionError("the fleet is gone")
    threading.Timer(0.1, lambda: sampler.permits.release(1)).start()
    started = time.monotonic()
    with pytest.raises(ZeroDivisionError, match="the fleet is gone"):
        buffer.wait(lambda: len(buffer) > 0, what="x", deadline=PATIENCE, alive=worker.check)
    assert time.monotonic() - started < PATIENCE / 2
    with pytest.raises(ZeroDivisionError) as caught:
        worker.check()
    assert caught.value is failure
    assert worker.state()["prompts"]["draw"] == 0


def test_stop_ends_the_thread_after_its_portion(make):
    worker, sampler, buffer = make()
    sampler.permits = threading.Semaphore(0)
    worker.start()
    until(lambda: sampler.asked)
    threading.Timer(0.1, lambda: sampler.permits.release(1)).start()
    worker.stop()
    assert not worker._thread.is_alive()
    assert len(sampler.asked) == 1
    assert (len(buffer), worker.state()["prompts"]["draw"]) == (PER_CALL, PER_CALL)
    worker.check()


def test_stop_ends_a_thread_that_waits_for_room(make):
    worker, _, buffer = make(capacity=2)
    worker.start()
    until(lambda: len(buffer) == 2)
    started = time.monotonic()
    worker.stop()
    assert not worker._thread.is_alive()
    assert time.monotonic() - started < PATIENCE / 2


def test_a_thread_that_never_started_can_be_stopped(make):
    worker, _, buffer = make()
    worker.stop()
    assert (len(buffer), worker.state()["prompts"]["draw"]) == (0, 0)


def test_waiting_for_room_has_a_deadline_that_names_the_setting(make):
    worker, _, buffer = make(capacity=2, deadline=0.1)
    worker.start()
    worker._thread.join(timeout=PATIENCE)
    with pytest.raises(RunError, match=r"waited .* s for room in the buffer \(rollout\.deadline\)"):
        worker.check()
    assert len(buffer) == 2


def test_waiting_for_groups_has_a_deadline_that_names_them(make):
    _, _, buffer = make()
    with pytest.raises(RunError, match=r"waited .* s for 32 groups for step 7"):
        buffer.wait(lambda: False, what="32 groups for step 7", deadline=0.1)
