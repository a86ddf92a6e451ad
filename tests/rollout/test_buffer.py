"""The buffer: what each mode keeps, and an account in which every group appears once."""

import json
import threading
from collections import Counter

import numpy as np
import pytest

from oapl_jax.errors import UserError
from oapl_jax.rollout.buffer import MODES, ZERO_VARIANCE, Buffer, flatten, unflatten
from oapl_jax.structs import Group, Prompt, Rollout


def new_buffer(
    mode,
    *,
    max_age=8,
    max_reuse=2,
    capacity=16,
    zero_variance="keep",
    seed=0,
    on_end=lambda group, end, step: None,
):
    return Buffer(
        mode=mode,
        max_age=max_age,
        max_reuse=max_reuse,
        capacity=capacity,
        zero_variance=zero_variance,
        seed=seed,
        on_end=on_end,
    )


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
    return names(unflatten(*buffer.state()))


def assert_balanced(buffer):
    counts = buffer.counts
    assert set(counts) <= {"added", "expired", "zero_variance", "trained", "reused"}
    gone = sum(counts[key] for key in ("expired", "zero_variance", "trained"))
    assert counts["added"] == gone + len(buffer)


# The modes


@pytest.mark.parametrize("mode", ["clear_on_sync", "keep_with_anchor"])
def test_groups_train_once_oldest_first(mode):
    buffer = new_buffer(mode)
    fill(buffer, range(7))
    assert names(buffer.sample(3, step=0)) == [0, 1, 2]
    assert names(buffer.sample(3, step=1)) == [3, 4, 5]
    assert buffer.sample(3, step=2) == []
    assert held(buffer) == [6]
    assert buffer.counts == {"added": 7, "trained": 6, "reused": 0}


def test_clear_on_sync_keeps_only_the_version_that_serves():
    buffer = new_buffer("clear_on_sync")
    fill(buffer, [0, 1])
    buffer.sync(4)
    assert len(buffer) == 0
    fill(buffer, [2], version=0)  # it was in progress when the version changed
    fill(buffer, [3, 4], version=4)
    assert held(buffer) == [3, 4]
    assert buffer.counts == {"added": 5, "expired": 3}
    buffer.sync(4)
    buffer.expire(10**6)  # age is no reason here
    assert held(buffer) == [3, 4]


def test_keep_with_anchor_keeps_versions_up_to_an_age():
    buffer = new_buffer("keep_with_anchor", max_age=8)
    fill(buffer, [0], version=0)
    buffer.sync(4)
    fill(buffer, [1], version=4)
    fill(buffer, [2], version=0)
    assert held(buffer) == [0, 1, 2]
    assert buffer.versions() == {0, 4}
    assert buffer.draws() == {0, 1, 2}
    buffer.expire(8)
    assert held(buffer) == [0, 1, 2]
    buffer.expire(9)
    assert held(buffer) == [1]
    assert buffer.versions() == {4}
    assert buffer.counts == {"added": 3, "expired": 2}


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


def test_replay_draws_depend_on_seed_and_step():
    def draw(seed, step):
        buffer = new_buffer("replay", seed=seed)
        fill(buffer, range(16))
        return names(buffer.sample(4, step))

    assert draw(0, 5) == draw(0, 5)
    assert len({tuple(draw(seed, step)) for seed in range(3) for step in range(3)}) == 9


def test_replay_covers_all_groups_alike():
    counts = Counter()
    for step in range(500):
        buffer = new_buffer("replay")
        fill(buffer, range(8))
        counts.update(names(buffer.sample(2, step)))
    assert sorted(counts) == list(range(8))
    assert all(abs(count - 125) < 50 for count in counts.values())  # five deviations


def test_replay_ages_by_version_and_a_used_group_counts_as_trained():
    buffer = new_buffer("replay", max_age=3, max_reuse=5)
    fill(buffer, [0], version=0)
    assert names(buffer.sample(1, step=0)) == [0]
    fill(buffer, [1], version=0)
    fill(buffer, [2], version=2)
    buffer.expire(3)
    assert held(buffer) == [0, 1, 2]
    buffer.expire(4)
    assert held(buffer) == [2]
    assert buffer.counts == {"added": 3, "trained": 1, "expired": 1, "reused": 0}
    assert_balanced(buffer)


@pytest.mark.parametrize("mode", ["clear_on_sync", "keep_with_anchor"])
def test_max_reuse_is_replays_alone(mode):
    buffer = new_buffer(mode, max_reuse=5)
    fill(buffer, [0])
    buffer.sample(1, step=0)
    assert len(buffer) == 0


@pytest.mark.parametrize(("policy", "kept"), [("keep", 3), ("drop", 1), ("weight", 3)])
def test_groups_of_equal_rewards(policy, kept):
    buffer = new_buffer("clear_on_sync", zero_variance=policy)
    fill(buffer, [0], reward=(0.0, 0.0))
    fill(buffer, [1], reward=(1.0, 1.0))
    fill(buffer, [2], reward=(1.0, 0.0))
    assert len(buffer) == kept
    assert buffer.counts["zero_variance"] == 3 - kept
    assert names(buffer.sample(kept, step=0))[-1] == 2
    assert_balanced(buffer)


def test_room_is_asked_for_by_the_number_of_groups():
    buffer = new_buffer("clear_on_sync", capacity=5)
    fill(buffer, range(3))
    assert buffer.has_room(2)
    assert not buffer.has_room(3)
    buffer.sample(1, step=0)
    assert buffer.has_room(3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(mode="clear"), r"buffer\.mode='clear' .* clear_on_sync, keep_with_anchor, replay"),
        (dict(mode="replay", zero_variance="no"), r"buffer\.zero_variance='no' .* keep, drop"),
        (dict(mode="replay", max_reuse=0), r"buffer\.max_reuse=0 .* at least 1"),
    ],
)
def test_impossible_settings_are_refused_by_name(options, message):
    with pytest.raises(UserError, match=message):
        new_buffer(**options)


# The account


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("zero_variance", ZERO_VARIANCE)
@pytest.mark.parametrize("mode", MODES)
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
                meta, arrays = buffer.state()
                buffer = new_buffer(mode, **options)
                buffer.restore(json.loads(json.dumps(meta)), arrays)
        assert held(buffer) == names(kept)
        assert buffer.versions() == {g.policy_version for g in kept}
        assert buffer.draws() == set(names(kept))
        assert_balanced(buffer)
        # What is used the first time is heard of at once, though a replay may use it again.
        used = {n: (n, "trained", first_use[n]) for n in names(kept) if n in first_use}
        assert sorted(heard) == sorted((expected | used).values())
        reused = sum(count - 1 for count in uses.values())
        assert +buffer.counts == +Counter(added=added, reused=reused, **ended)
    assert ended["trained"] > 5  # it was no quiet run
    assert ended["expired"] > 0


def test_two_threads_lose_no_group():
    buffer = new_buffer("keep_with_anchor", capacity=6, max_age=10**6)
    total, taken = 3000, []

    def produce():
        for name in range(0, total, 2):
            buffer.wait(lambda: buffer.has_room(2), what="room", deadline=20)
            fill(buffer, [name, name + 1])

    thread = threading.Thread(target=produce)
    thread.start()
    most = 0
    while len(taken) < total:
        buffer.wait(lambda: len(buffer) >= 3, what="groups", deadline=20)
        most = max(most, len(buffer))
        taken += names(buffer.sample(3, step=0))
    thread.join()
    assert taken == list(range(total))
    assert most <= 6
    assert buffer.counts == {"added": total, "trained": total, "reused": 0}


@pytest.mark.parametrize("mode", MODES)
def test_the_lock_is_held_while_an_end_is_heard(mode):
    """Who notes the end in a file that a checkpoint names must not be overtaken by one."""
    free = []

    def on_end(group, end, step):
        def other():
            free.append(buffer.lock.acquire(blocking=False))

        thread = threading.Thread(target=other)
        thread.start()
        thread.join()

    buffer = new_buffer(mode, zero_variance="drop", max_age=0, on_end=on_end)
    fill(buffer, [0], reward=(0.0, 0.0))
    fill(buffer, [1, 2])
    buffer.sample(1, step=0)
    buffer.sync(1)
    buffer.expire(1)
    assert free == [False] * 3


def test_who_waits_hears_of_the_other_sides_death_though_nothing_is_missing():
    buffer = new_buffer("replay")

    def alive():
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        buffer.wait(lambda: True, what="x", deadline=20, alive=alive)


# On disk and back


def ragged_groups():
    rng = np.random.default_rng(0)
    groups = []
    for draw, size in enumerate([1, 4, 2]):
        rollouts = tuple(
            Rollout(
                rng.integers(0, 99, length).astype(np.int32),
                -rng.exponential(size=length).astype(np.float32),
                10 * draw,
                str(rng.choice(["stop", "length"])),
            )
            for length in rng.integers(0, 5, size)
        )
        tokens = rng.integers(0, 99, draw).astype(np.int32)  # the first is empty
        prompt = Prompt(f"id{draw}", draw + 7, tokens, 'a "text"\n', "é", "chain_sum")
        groups.append(Group(prompt, rollouts, rng.normal(size=size).astype(np.float32)))
    return groups


def through_json(groups):
    meta, arrays = flatten(groups)
    assert all(len(array) for array in arrays.values())  # Orbax saves no empty array
    return unflatten(json.loads(json.dumps(meta)), {k: v.copy() for k, v in arrays.items()})


@pytest.mark.parametrize("count", [0, 1, 2, 3])
def test_flatten_and_back_changes_no_bit(count):
    groups = ragged_groups()[:count]
    again = through_json(groups)
    assert len(again) == count
    for old, new in zip(groups, again, strict=True):
        scalars = lambda p: (p.id, p.stream_index, p.text, p.answer, p.task)
        assert scalars(new.prompt) == scalars(old.prompt)
        pairs = [(old.prompt.tokens, new.prompt.tokens), (old.reward, new.reward)]
        for a, b in zip(old.rollouts, new.rollouts, strict=True):
            assert (a.policy_version, a.finish_reason) == (b.policy_version, b.finish_reason)
            pairs += [(a.tokens, b.tokens), (a.behavior_logp, b.behavior_logp)]
        for a, b in pairs:
            assert a.dtype == b.dtype
            np.testing.assert_array_equal(a, b)


def test_a_restored_buffer_goes_on_like_the_first():
    def step(buffer, step):
        fill(buffer, range(100 + 2 * step, 102 + 2 * step), version=step)
        buffer.expire(step)
        return names(buffer.sample(3, step))

    first = new_buffer("replay", max_reuse=3, max_age=4)
    fill(first, range(6))
    for now in range(3):
        step(first, now)
    meta, arrays = first.state()
    second = new_buffer("replay", max_reuse=3, max_age=4)
    second.restore(json.loads(json.dumps(meta)), arrays)
    assert (held(second), second.counts) == (held(first), first.counts)
    for now in range(3, 12):
        assert step(second, now) == step(first, now)
        assert second.counts == first.counts


def test_a_restored_buffer_knows_the_version_that_serves():
    first = new_buffer("clear_on_sync")
    first.sync(16)
    fill(first, [0], version=16)
    second = new_buffer("clear_on_sync")
    second.restore(*first.state())
    fill(second, [1], version=16)
    fill(second, [2], version=0)
    assert held(second) == [0, 1]


def test_the_state_is_a_copy():
    buffer = new_buffer("clear_on_sync")
    fill(buffer, [0])
    meta, _ = buffer.state()
    fill(buffer, [1])
    assert meta["counts"] == {"added": 1}
    other = new_buffer("clear_on_sync")
    other.restore(*buffer.state())
    fill(other, [2])
    assert buffer.counts["added"] == 2
