"""From ragged groups to packed rows: what went in is found again, and rows are used well."""

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
import pytest

from oapl_jax.errors import UserError
from oapl_jax.learner.packing import fill, make_batch, pack, to_mesh
from oapl_jax.learner.train_step import batch_shardings
from oapl_jax.model.sharding import make_mesh
from oapl_jax.structs import Group, Prompt, Rollout

ROOT = Path(__file__).parents[2]


def make_groups(rng, num_groups, group_size, max_prompt, max_response, version=3):
    """Groups of random lengths; all tokens are above 0, the padding."""
    groups = []
    for draw in range(num_groups):
        tokens = rng.integers(1, 1000, rng.integers(1, max_prompt + 1)).astype(np.int32)
        prompt = Prompt(id=str(draw), stream_index=draw, tokens=tokens, text="", answer="", task="")
        rollouts = []
        for _ in range(group_size):
            length = rng.integers(1, max_response + 1)
            rollouts.append(
                Rollout(
                    tokens=rng.integers(1, 1000, length).astype(np.int32),
                    behavior_logp=rng.normal(-1, 0.3, length).astype(np.float32),
                    policy_version=version + draw,
                    finish_reason="stop",
                )
            )
        reward = rng.normal(0, 1, group_size).astype(np.float32)
        groups.append(Group(prompt, tuple(rollouts), reward))
    return groups


def batch_of(groups, rng, **changes):
    sequences = sum(len(g.rollouts) for g in groups)
    advantages = [rng.normal(0, 1, len(g.rollouts)).astype(np.float32) for g in groups]
    weights = rng.uniform(0, 1, sequences).astype(np.float32)
    settings = dict(
        step=40,
        micro_batches=1,
        row_length=32,
        rows_multiple=1,
        max_prompt_tokens=16,
        max_response_tokens=16,
        together=1,
    )
    return make_batch(groups, advantages, weights, **{**settings, **changes}), advantages, weights


@pytest.mark.parametrize(
    ("lengths", "rows"),
    [
        ([10], [[0]]),
        ([10, 10], [[0], [1]]),
        ([3, 7], [[1, 0]]),
        ([6, 6, 4, 4], [[0, 2], [1, 3]]),
        ([3, 3, 3, 7, 7, 7], [[3, 0], [4, 1], [5, 2]]),
        (
            [5, 4, 2, 6, 3],
            [[3, 1], [0, 4, 2]],
        ),  # both full; in the order of arrival it takes 3 rows
        ([1] * 25, [list(range(10)), list(range(10, 20)), list(range(20, 25))]),
    ],
)
def test_rows_by_hand(lengths, rows):
    assert pack(lengths, 10) == rows


@pytest.mark.parametrize("seed", range(20))
def test_packing_keeps_every_sequence_overfills_no_row_and_wastes_little(seed):
    rng = np.random.default_rng(seed)
    row_length = int(rng.integers(5, 60))
    lengths = rng.integers(1, row_length + 1, rng.integers(1, 80)).tolist()
    rows = pack(lengths, row_length)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    assert max(sum(lengths[i] for i in row) for row in rows) <= row_length
    # First fit, longest first: it is in a later row only because the earlier ones had no room.
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    place = {index: rank for rank, index in enumerate(order)}
    for later, row in enumerate(rows):
        for index in row:
            for earlier in rows[:later]:
                before = sum(lengths[i] for i in earlier if place[i] < place[index])
                assert before + lengths[index] > row_length
    assert len(rows) < 2 * sum(lengths) / row_length + 1


@pytest.mark.parametrize("seed", range(25))
def test_every_response_is_found_again(seed):
    """Of ragged groups, over micro-batches: tokens, log-probs, positions, segments, order."""
    rng = np.random.default_rng(seed)
    micro_batches = int(rng.choice([1, 2, 4]))
    multiple = int(rng.choice([1, 3, 8]))
    groups = make_groups(rng, 2 * int(rng.integers(1, 4)), 4, 8, 16)
    row_length = int(rng.integers(24, 80))
    batch, advantages, weights = batch_of(
        groups, rng, micro_batches=micro_batches, row_length=row_length, rows_multiple=multiple
    )
    rollouts = [(g.prompt, r) for g in groups for r in g.rollouts]
    rows = batch.tokens.shape[1]
    assert batch.tokens.shape == (micro_batches, rows, row_length)
    assert batch.positions.shape == batch.segments.shape == batch.tokens.shape
    assert batch.where.shape == (len(rollouts), 16)
    assert rows % multiple == 0
    per_row = max(row_length // 32, 1)
    assert rows - multiple < len(rollouts) / per_row / micro_batches <= rows

    taken = np.zeros(batch.tokens.shape, int)
    for s, (prompt, rollout) in enumerate(rollouts):
        length, before = len(rollout.tokens), len(prompt.tokens)
        np.testing.assert_array_equal(batch.mask[s], np.arange(16) < length)
        where = batch.where[s, :length]
        assert np.all(np.diff(where) == 1)
        row, start = divmod(where[0] - before, row_length)
        m, row = divmod(row, rows)
        whole = slice(start, start + before + length)
        assert start >= 0
        assert whole.stop <= row_length
        expected = np.concatenate([prompt.tokens, rollout.tokens])
        np.testing.assert_array_equal(batch.tokens[m, row, whole], expected)
        np.testing.assert_array_equal(batch.tokens.reshape(-1)[where], rollout.tokens)
        np.testing.assert_array_equal(batch.positions[m, row, whole], np.arange(before + length))
        np.testing.assert_array_equal(batch.behavior_logp[s, :length], rollout.behavior_logp)
        segment = batch.segments[m, row, start]
        assert segment > 0
        # The segment is this sequence, all of it and nothing else.
        places = np.flatnonzero(batch.segments[m, row] == segment)
        np.testing.assert_array_equal(places, start + np.arange(before + length))
        taken[m, row, whole] += 1
        assert batch.lag[s] == 40 - rollout.policy_version
    assert taken.max() == 1  # nobody overlaps
    for padded in (batch.tokens, batch.segments, batch.positions):
        np.testing.assert_array_equal(padded[taken == 0], 0)
    np.testing.assert_array_equal(batch.behavior_logp[batch.mask == 0], 0)

    # Micro-batches and rows are filled in order.
    for part in (batch.segments.any((1, 2)), *batch.segments.any(2)):
        np.testing.assert_array_equal(part, np.sort(part)[::-1])
    np.testing.assert_array_equal(batch.advantage, np.concatenate(advantages))
    np.testing.assert_array_equal(batch.reward, np.concatenate([g.reward for g in groups]))
    np.testing.assert_array_equal(batch.weight, weights)
    floats = (batch.mask, batch.behavior_logp, batch.advantage, batch.reward, batch.weight)
    integers = (batch.tokens, batch.positions, batch.segments, batch.where, batch.lag)
    assert {x.dtype for x in floats} == {np.dtype(np.float32)}
    assert {x.dtype for x in integers} == {np.dtype(np.int32)}


def test_shapes_do_not_depend_on_lengths():
    """So one program is compiled, and whether it fits does not change."""
    rng = np.random.default_rng(0)
    shapes = []
    for longest in (1, 16):
        groups = make_groups(rng, 4, 4, longest, longest)
        batch, _, _ = batch_of(groups, rng, micro_batches=3, rows_multiple=2)
        shapes.append([getattr(batch, f.name).shape for f in dataclasses.fields(batch)])
        used = batch.segments.any((1, 2))
        np.testing.assert_array_equal(used, [True, longest > 1, False])
    assert shapes[0] == shapes[1]
    assert shapes[0][0] == (3, 6, 32)


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("together", [1, 4])
def test_groups_are_parted_only_where_they_may_be(seed, together):
    rng = np.random.default_rng(seed)
    groups = make_groups(rng, 6, 4, 8, 16)
    batch, advantages, _ = batch_of(groups, rng, micro_batches=3, row_length=24, together=together)
    rows = batch.tokens.shape[1]
    parts = (batch.where[:, 0] // (rows * 24)).reshape(6, 4)
    parted = np.any(parts != parts[:, :1])
    assert parted == (together == 1)
    assert np.all(np.diff(np.unique(parts)) == 1)
    np.testing.assert_array_equal(batch.advantage, np.concatenate(advantages))


def test_whole_groups_always_fit_a_divisor_of_their_number():
    """Even if all sequences are the longest."""
    filled = fill([9] * 24, row_length=10, rows=8, together=4)
    assert [len(rows) for rows in filled] == [8, 8, 8]
    filled = fill([5] * 24, row_length=10, rows=4, together=4)
    assert [len(rows) for rows in filled] == [4, 4, 4]
    rng = np.random.default_rng(0)
    settings = dict(row_length=2, max_prompt_tokens=1, together=4)
    with pytest.raises(UserError, match=r"learner\.micro_batches=5 .* whole groups of 4"):
        batch_of(make_groups(rng, 6, 4, 1, 1), rng, micro_batches=5, **settings)


@pytest.mark.parametrize("seed", range(10))
def test_the_longest_sequences_have_room(seed):
    """As many in a row as fit, whatever the others are."""
    rng = np.random.default_rng(seed)
    groups = make_groups(rng, 8, 4, 16, 16)
    row_length, micro_batches = int(rng.choice([32, 64, 100])), int(rng.integers(1, 33))
    batch, _, _ = batch_of(groups, rng, row_length=row_length, micro_batches=micro_batches)
    assert batch.tokens.shape[1] == -(-32 // (row_length // 32 * micro_batches))


@pytest.mark.parametrize("what", ["prompt", "response"])
def test_what_is_longer_than_its_setting_says_is_refused(what):
    rng = np.random.default_rng(5)
    groups = make_groups(rng, 4, 4, 12, 12)
    setting = f"max_{what}_tokens"
    with pytest.raises(UserError, match=rf"a {what} has \d+ tokens, more than .*{setting}=3;"):
        batch_of(groups, rng, **{setting: 3})


def test_a_sequence_longer_than_a_row_is_refused():
    rng = np.random.default_rng(2)
    groups = make_groups(rng, 4, 4, 8, 16)
    longest = max(len(g.prompt.tokens) + len(r.tokens) for g in groups for r in g.rollouts)
    batch_of(groups, rng, row_length=longest)
    settings = (
        rf"{longest} tokens .*learner\.row_length={longest - 1}.*"
        r"data\.max_prompt_tokens \+ rollout\.max_response_tokens"
    )
    with pytest.raises(UserError, match=settings):
        batch_of(groups, rng, row_length=longest - 1)


def test_to_mesh_splits_rows_and_changes_no_value():
    rng = np.random.default_rng(4)
    mesh = make_mesh(data=1, fsdp=2, context=2, tensor=2)
    batch, _, _ = batch_of(make_groups(rng, 4, 4, 8, 16), rng, micro_batches=2, rows_multiple=4)
    placed = to_mesh(batch, batch_shardings(mesh))
    jax.tree.map(np.testing.assert_array_equal, placed, batch)
    for field in dataclasses.fields(batch):
        array = getattr(placed, field.name)
        expected = array.shape
        if field.name in ("tokens", "positions", "segments"):
            micro, rows, places = array.shape
            expected = (micro, rows // 2, places // 2)
        assert array.sharding.shard_shape(array.shape) == expected


def test_recorded_lengths_fill_their_rows():
    """Of SmolLM2's answers to word problems, of which the longest are several times the median."""
    kept = json.loads((ROOT / "benchmarks" / "lengths_smollm2.json").read_text())
    responses = np.array(kept["response"])
    lengths = responses + np.array(kept["prompt"])
    assert len(lengths) >= 256
    assert responses.max() > 3 * np.median(responses)
    for sequences in (64, 256):
        for start in range(0, len(lengths) - sequences + 1, sequences):
            step, row = lengths[start : start + sequences], int(lengths.max())
            rows = fill(step.tolist(), row_length=row, rows=1, together=1)
            assert step.sum() >= 0.95 * len(rows) * row
