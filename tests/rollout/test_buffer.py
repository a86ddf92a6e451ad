"""The buffer: what each mode keeps, and an account in which every group appears once.

And the store, the state that two threads share: no group is lost, every snapshot is consistent.
"""

import threading
from collections import Counter

import numpy as np
import pytest
from etils import epath
from stores import buffer_config, store_of_sums

from oapl_jax.model.tokenizer import make_character_tokenizer
from oapl_jax.rollout.buffer import Buffer
from oapl_jax.rollout.sampler import Sampled
from oapl_jax.structs import Group, Prompt, Rollout, decode_groups

PATIENCE = 20.0  # seconds until a test gives up


def new_buffer(mode, *, seed=0, on_end=lambda group, end, step: None, **changes):
    config = buffer_config(**{"mode": mode, "max_age": 8, "max_reuse": 2, **changes})
    return Buffer(config, seed=seed, on_end=on_end)


def make_group(name, version=0, reward=(0.0, 1.0)):
    rollout = Rollout(np.array([name, 1], np.int32), np.zeros(2, np.float32), version, "stop")
    prompt = Prompt(f"p{name}", name, np.array([3], np.int32), "", "", "")
    return Group(prompt, (rollout,) * len(reward), np.array(reward, np.float32))


def fill(buffer, names, **options):
    for name in names:
        buffer.add(make_group(name, **options))


def names(groups):
    return [g.prompt.stream_index for g in groups]


def held(buffer):
    return names(decode_groups(buffer.state()["groups"]))


def assert_balanced(buffer):
    counts = buffer.counts
    assert set(counts) <= {"added", "expired", "zero_variance", "trained", "reused"}
    gone = sum(counts[key] for key in ("expired", "zero_variance", "trained"))
    assert counts["added"] == gone + len(buffer)


def test_clear_on_sync_keeps_only_the_version_that_serves():
    buffer = new_buffer("clear_on_sync")
    fill(buffer, [0, 1])
    buffer.sync(4)
    assert len(buffer) == 0
    fill(buffer, [2], version=0)  # it was in progress when the version changed
    fill(buffer, [3, 4], version=4)
    assert (held(buffer), buffer.counts) == ([3, 4], {"added": 5, "expired": 3})
    buffer.sync(4)
    buffer.expire(10**6)  # age is no reason here
    assert held(buffer) == [3, 4]


def test_replay_draws_are_uniform_and_depend_on_seed_and_step():
    def draw(count, of, seed, step):
        buffer = new_buffer("replay", seed=seed)
        fill(buffer, range(of))
        return tuple(names(buffer.sample(count, step)))

    assert draw(4, 16, seed=0, step=5) == draw(4, 16, seed=0, step=5)
    assert len({draw(4, 16, seed, step) for seed in range(3) for step in range(3)}) == 9
    counts = Counter(name for step in range(500) for name in draw(2, 8, 0, step))
    assert sorted(counts) == list(range(8))
    assert all(abs(count - 125) < 50 for count in counts.values())  # five deviations


def test_room_is_asked_for_by_the_number_of_groups():
    buffer = new_buffer("clear_on_sync", capacity=5)
    fill(buffer, range(3))
    assert buffer.has_room(2)
    assert not buffer.has_room(3)
    buffer.sample(1, step=0)
    assert buffer.has_room(3)


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("zero_variance", ["keep", "drop", "weight"])
@pytest.mark.parametrize("mode", ["clear_on_sync", "keep_with_anchor", "replay"])
def test_every_group_is_accounted_for_whatever_happens(mode, zero_variance, seed):
    """Random operations, against a plain list that follows the same rules."""
    rng = np.random.default_rng(seed)
    heard = []  # (draw, end, step) of each group, once
    options = dict(
        max_age=2,
        zero_variance=zero_variance,
        on_end=lambda group, end, step: heard.append((group.prompt.stream_index, end, step)),
    )
    buffer = new_buffer(mode, **options)
    kept, uses, ended, first_use = [], Counter(), Counter(), {}
    expected = {}
    version, step, added = 0, 0, 0

    def end(gone, reason=None):
        for group in gone:
            kept.remove(group)
            draw = group.prompt.stream_index
            why = reason or ("trained" if uses[draw] else "expired")
            ended[why] += 1
            expected[draw] = (draw, why, first_use.get(draw))

    for _ in range(200):
        stale = [g for g in kept if step - g.policy_version > 2]
        match rng.choice(["add", "add", "add", "sample", "sync", "expire", "resume"]):
            case "add":
                mixed = rng.random() < 0.7
                old = max(version - int(rng.random() < 0.3), 0)
                group = make_group(added, version=old, reward=(0.0, float(mixed)))
                buffer.add(group)
                kept.append(group)
                added += 1
                if zero_variance == "drop" and not mixed:
                    end([group], "zero_variance")
                elif mode == "clear_on_sync" and old != version:
                    end([group], "expired")
            case "sample":
                count = int(rng.integers(1, 4))
                groups = buffer.sample(count, step)
                assert len(groups) == (count if len(kept) >= count else 0)
                assert set(names(groups)) <= set(names(kept))
                if mode != "replay":
                    assert names(groups) == names(kept[: len(groups)])
                uses.update(names(groups))
                first_use.update({n: step for n in names(groups) if n not in first_use})
                most = 2 if mode == "replay" else 1
                end([g for g in kept if uses[g.prompt.stream_index] == most], "trained")
                step += 1
            case "sync":
                version = step
                buffer.sync(version)
                if mode == "clear_on_sync":
                    end([g for g in kept if g.policy_version != version])
            case "expire":
                buffer.expire(step)
                if mode != "clear_on_sync":
                    end(stale)
            case "resume":
                state = buffer.state()
                buffer = new_buffer(mode, **options)
                buffer.restore(state)
        assert held(buffer) == names(kept)
        assert buffer.versions() == {g.policy_version for g in kept}
        assert buffer.stream_indices() == set(names(kept))
        assert_balanced(buffer)
        # What is used the first time is heard of at once, though a replay may use it again.
        used = {n: (n, "trained", first_use[n]) for n in names(kept) if n in first_use}
        assert sorted(heard) == sorted((expected | used).values())
        reused = sum(count - 1 for count in uses.values())
        assert +buffer.counts == +Counter(added=added, reused=reused, **ended)
    assert ended["trained"] > 5  # it was no quiet run
    assert ended["expired"] > 0


def test_a_restored_buffer_goes_on_like_the_first():
    def step(buffer, step):
        fill(buffer, range(100 + 2 * step, 102 + 2 * step), version=step)
        buffer.expire(step)
        return names(buffer.sample(3, step))

    first = new_buffer("replay", max_reuse=3, max_age=4)
    fill(first, range(6))
    for now in range(3):
        step(first, now)
    second = new_buffer("replay", max_reuse=3, max_age=4)
    second.restore(first.state())
    assert (held(second), second.counts) == (held(first), first.counts)
    for now in range(3, 12):
        assert step(second, now) == step(first, now)
        assert second.counts == first.counts


def test_replay_draws_at_random_and_uses_a_group_so_often():
    buffer = new_buffer("replay", max_reuse=3, max_age=100)
    fill(buffer, range(10))
    uses, batches = Counter(), []
    for step in range(30):
        batch = names(buffer.sample(4, step))
        if not batch:
            break
        assert len(set(batch)) == 4  # one group once a step
        batches.append(tuple(batch))
        uses.update(batch)
        assert_balanced(buffer)
    left = held(buffer)
    assert len(left) < 4
    assert max(uses.values()) == 3
    assert {name for name, count in uses.items() if count == 3} == set(range(10)) - set(left)
    assert batches[0] != (0, 1, 2, 3)
    assert buffer.counts["reused"] == sum(uses.values()) - len(uses)
    assert buffer.counts["trained"] == 10 - len(left)


def test_keep_with_anchor_keeps_versions_up_to_an_age():
    buffer = new_buffer("keep_with_anchor", max_age=8)
    fill(buffer, [0], version=0)
    buffer.sync(4)
    fill(buffer, [1], version=4)
    fill(buffer, [2], version=0)
    assert (held(buffer), buffer.versions()) == ([0, 1, 2], {0, 4})
    assert buffer.stream_indices() == {0, 1, 2}
    buffer.expire(8)
    assert held(buffer) == [0, 1, 2]
    buffer.expire(9)
    assert (held(buffer), buffer.versions()) == ([1], {4})
    assert buffer.counts == {"added": 3, "expired": 2}


@pytest.fixture
def make_store(tmp_path):
    tokenizer = make_character_tokenizer("0123456789+=", tmp_path / "tokenizer")

    def make(**options):
        options = {"mode": "keep_with_anchor", "max_age": 10**6, **options}
        return store_of_sums(tokenizer, epath.Path(tmp_path / "ledger.jsonl"), **options)

    return make


def commit(store, prompt):
    group = make_group(0, reward=(1.0,))
    store.commit(Sampled(prompt, group.rollouts, "s", 0.1), group.reward)


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
