"""The state that two threads share: no group is lost, and every snapshot is consistent."""

import threading

import numpy as np
import pytest
from etils import epath
from stores import store_of_sums

from oapl_jax.model.tokenizer import make_character_tokenizer
from oapl_jax.rollout.sampler import Sampled
from oapl_jax.structs import Rollout

PATIENCE = 20.0  # seconds until a test gives up


@pytest.fixture
def make_store(tmp_path):
    tokenizer = make_character_tokenizer("0123456789+=", tmp_path / "tokenizer")

    def make(**options):
        options = {"mode": "keep_with_anchor", "max_age": 10**6, **options}
        return store_of_sums(tokenizer, epath.Path(tmp_path / "ledger.jsonl"), **options)

    return make


def commit(store, prompt, reward=1.0):
    rollout = Rollout(np.array([1], np.int32), np.zeros(1, np.float32), 0, "stop")
    store.commit(Sampled(prompt, (rollout,), "s", 0.1), np.array([reward], np.float32))


def test_two_threads_lose_no_group(make_store):
    store, total, taken = make_store(capacity=6), 600, []
    check = lambda: None

    def produce():
        for _ in range(total):
            store.wait(store.has_room, "room", deadline=PATIENCE, check=check)
            commit(store, store.reserve())

    thread = threading.Thread(target=produce)
    thread.start()
    most = 0
    while len(taken) < total:
        store.wait(lambda: len(store) >= 3, "groups", deadline=PATIENCE, check=check)
        most = max(most, len(store))
        taken += [group.prompt.stream_index for group in store.take(3, 0, step=0)]
    thread.join()
    assert taken == list(range(total))
    assert most <= 6


def test_a_snapshot_waits_for_the_end_of_a_step(make_store):
    """The ledger hears of an end before the buffer has forgotten the group."""
    taking, snapshots = threading.Event(), []

    def on_end(group, end, step):
        taking.set()
        thread.join(0.2)
        assert thread.is_alive()  # the snapshot waits

    store = make_store(on_end=on_end)
    commit(store, store.reserve())

    def snapshot():
        assert taking.wait(PATIENCE)
        snapshots.append(store.snapshot(lambda: None))

    thread = threading.Thread(target=snapshot)
    thread.start()
    store.take(1, 0, step=0)
    thread.join(PATIENCE)
    assert snapshots[0]["buffer"]["counts"]["trained"] == 1


def test_a_wait_raises_the_failure_of_the_other_thread_even_if_the_condition_holds(make_store):
    def check():
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        make_store().wait(lambda: True, "groups", deadline=PATIENCE, check=check)
