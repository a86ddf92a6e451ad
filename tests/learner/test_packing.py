"""Packing: every response is found in its row, and groups of equal rewards are weighed."""

import dataclasses
import json
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest
from small_runs import ROOT, typed

from configs import arithmetic
from oapl_jax import train
from oapl_jax.config import LearnerConfig
from oapl_jax.errors import UserError
from oapl_jax.learner.packing import build_batch, check_whole_groups, fill, pack, to_mesh
from oapl_jax.learner.train_step import batch_shardings
from oapl_jax.model.sharding import make_mesh
from oapl_jax.objectives import bind
from oapl_jax.objectives.aggregation import sequence_weights
from oapl_jax.structs import Group, Prompt, Rollout

OAPL = bind("oapl", dict(beta1=0.5, beta2=0.1))
TBA = bind("tba", dict(tba=dict(beta=0.1)), group_size=4)  # needs whole groups
LAYOUT = dict(micro_batches=1, row_length=32, rows_multiple=1, logp_chunk=1)
SETTINGS = dict(aggregation="sequence", step=40, max_prompt_tokens=16, max_response_tokens=16)


def make_groups(rng, num_groups, max_prompt, max_response, group_size=4, version=3):
    """Groups of random lengths; all tokens are above 0, the padding."""
    draw = lambda longest: rng.integers(1, 1000, rng.integers(1, longest + 1)).astype(np.int32)
    normal = lambda mean, deviation, n: rng.normal(mean, deviation, n).astype(np.float32)
    groups = []
    for i in range(num_groups):
        prompt = Prompt(str(i), i, draw(max_prompt), "", "", "")
        responses = [draw(max_response) for _ in range(group_size)]
        rollouts = [Rollout(r, normal(-1, 0.3, len(r)), version + i, "stop") for r in responses]
        groups.append(Group(prompt, tuple(rollouts), normal(0, 1, group_size)))
    return groups


def with_equal_rewards():
    """Three groups, of which the last two have equal rewards."""
    groups = make_groups(np.random.default_rng(3), 3, 8, 16)
    for group, reward in zip(groups, ([0, 1, 0, 1], [1] * 4, [0] * 4), strict=True):
        group.reward[:] = reward
    return groups


def batch_of(groups, objective=OAPL, **changes):
    layout = {name: changes.pop(name, value) for name, value in LAYOUT.items()}
    return build_batch(groups, objective, LearnerConfig(**layout), **{**SETTINGS, **changes})


@pytest.mark.parametrize(
    ("lengths", "rows"),
    [
        ([10], [[0]]),
        ([10, 10], [[0], [1]]),
        ([3, 7], [[1, 0]]),
        ([6, 6, 4, 4], [[0, 2], [1, 3]]),
        ([3, 3, 3, 7, 7, 7], [[3, 0], [4, 1], [5, 2]]),
        ([5, 4, 2, 6, 3], [[3, 1], [0, 4, 2]]),  # full; in the order of arrival it takes 3 rows
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
    # First fit, longest first: a sequence is in a later row only if the earlier ones had no room.
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
    micro_batches, multiple = int(rng.choice([1, 2, 4])), int(rng.choice([1, 3, 8]))
    groups = make_groups(rng, 2 * int(rng.integers(1, 4)), 8, 16)
    row_length = int(rng.integers(24, 80))
    layout = dict(micro_batches=micro_batches, row_length=row_length, rows_multiple=multiple)
    batch = batch_of(groups, aggregation="token", **layout)
    rollouts = [(g.prompt, r) for g in groups for r in g.rollouts]
    rows = batch.tokens.shape[1]
    assert batch.tokens.shape == (micro_batches, rows, row_length)
    assert batch.positions.shape == batch.segments.shape == batch.tokens.shape
    assert batch.token_index.shape == (len(rollouts), 16)
    assert rows % multiple == 0
    per_row = max(row_length // 32, 1)
    assert rows - multiple < len(rollouts) / per_row / micro_batches <= rows

    taken = np.zeros(batch.tokens.shape, int)
    for s, (prompt, rollout) in enumerate(rollouts):
        length, before = len(rollout.tokens), len(prompt.tokens)
        np.testing.assert_array_equal(batch.mask[s], np.arange(16) < length)
        index = batch.token_index[s, :length]
        assert np.all(np.diff(index) == 1)
        row, start = divmod(index[0] - before, row_length)
        m, row = divmod(row, rows)
        whole = slice(start, start + before + length)
        assert start >= 0
        assert whole.stop <= row_length
        expected = np.concatenate([prompt.tokens, rollout.tokens])
        np.testing.assert_array_equal(batch.tokens[m, row, whole], expected)
        np.testing.assert_array_equal(batch.tokens.reshape(-1)[index], rollout.tokens)
        np.testing.assert_array_equal(batch.positions[m, row, whole], np.arange(before + length))
        np.testing.assert_array_equal(batch.behavior_logp[s, :length], rollout.behavior_logp)
        segment = batch.segments[m, row, start]
        assert segment > 0
        # The segment is this sequence, all of it and nothing else.
        places = np.flatnonzero(batch.segments[m, row] == segment)
        np.testing.assert_array_equal(places, start + np.arange(before + length))
        taken[m, row, whole] += 1
        assert batch.lag[s] == 40 - rollout.policy_version
    assert taken.max() == 1  # sequences do not overlap
    for padded in (batch.tokens, batch.segments, batch.positions):
        np.testing.assert_array_equal(padded[taken == 0], 0)
    np.testing.assert_array_equal(batch.behavior_logp[batch.mask == 0], 0)

    # Micro-batches and rows are filled in order.
    for part in (batch.segments.any((1, 2)), *batch.segments.any(2)):
        np.testing.assert_array_equal(part, np.sort(part)[::-1])
    advantages = [OAPL.advantage(g.reward) for g in groups]
    np.testing.assert_array_equal(batch.advantage, np.concatenate(advantages))
    np.testing.assert_array_equal(batch.reward, np.concatenate([g.reward for g in groups]))
    weights = sequence_weights(batch.mask.sum(-1), "token", constant_length=1)
    np.testing.assert_array_equal(batch.weight, weights)
    integers = ("tokens", "positions", "segments", "token_index", "lag")
    for field in dataclasses.fields(batch):
        dtype = np.int32 if field.name in integers else np.float32
        assert getattr(batch, field.name).dtype == dtype


def test_shapes_do_not_depend_on_lengths():
    """One program is compiled, and its memory does not change."""
    shapes = []
    for longest in (1, 16):
        groups = make_groups(np.random.default_rng(0), 4, longest, longest)
        batch = batch_of(groups, micro_batches=3, rows_multiple=2)
        shapes.append([getattr(batch, f.name).shape for f in dataclasses.fields(batch)])
        used = batch.segments.any((1, 2))
        np.testing.assert_array_equal(used, [True, longest > 1, False])
    assert shapes[0] == shapes[1]
    assert shapes[0][0] == (3, 6, 32)


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("objective", [OAPL, TBA])
def test_groups_are_split_only_if_the_objective_allows_it(seed, objective):
    groups = make_groups(np.random.default_rng(seed), 6, 8, 16)
    batch = batch_of(groups, objective, micro_batches=3, row_length=24)
    parts = (batch.token_index[:, 0] // (batch.tokens.shape[1] * 24)).reshape(6, 4)
    assert np.any(parts != parts[:, :1]) == (objective is OAPL)
    assert np.all(np.diff(np.unique(parts)) == 1)


def test_whole_groups_always_fit_a_divisor_of_their_number():
    """Even if all sequences are the longest."""
    filled = fill([9] * 24, row_length=10, rows=8, group_size=4)
    assert [len(rows) for rows in filled] == [8, 8, 8]
    filled = fill([5] * 24, row_length=10, rows=4, group_size=4)
    assert [len(rows) for rows in filled] == [4, 4, 4]
    groups = make_groups(np.random.default_rng(0), 6, 1, 1)
    five, three = (LearnerConfig(**LAYOUT | dict(micro_batches=m, row_length=2)) for m in (5, 3))
    with pytest.raises(UserError, match=r"learner\.micro_batches=5"):
        batch_of(groups, TBA, max_prompt_tokens=1, **five)
    with pytest.raises(UserError, match=r"learner\.micro_batches=5"):
        check_whole_groups(6, 4, 2, five)
    check_whole_groups(6, 4, 2, three)


def test_a_prompt_response_or_sequence_that_is_too_long_is_refused():
    groups = make_groups(np.random.default_rng(2), 4, 8, 16)
    longest = max(len(g.prompt.tokens) + len(r.tokens) for g in groups for r in g.rollouts)
    batch_of(groups, row_length=longest)
    limits = dict(row_length=longest - 1, max_prompt_tokens=3, max_response_tokens=3)
    for name, limit in limits.items():
        with pytest.raises(UserError, match=rf"\.{name}={limit}"):
            batch_of(groups, **{name: limit})


@pytest.mark.parametrize("weight", [0.0, 0.1])
@pytest.mark.parametrize("aggregation", ["sequence", "token"])
def test_groups_of_equal_rewards_weigh_what_the_setting_says(aggregation, weight):
    """The others keep theirs: the normaliser is the whole batch, as if no group weighed less."""
    groups = with_equal_rewards()
    kept = batch_of(groups, aggregation=aggregation)
    whole = {"sequence": 12, "token": kept.mask.sum()}[aggregation]
    np.testing.assert_allclose(kept.weight, np.full(12, 1 / whole), rtol=1e-6)
    weighed = batch_of(groups, aggregation=aggregation, zero_variance_weight=weight)
    expected = np.repeat([1, weight, weight], 4) / whole
    np.testing.assert_allclose(weighed.weight, expected, rtol=1e-6)
    np.testing.assert_array_equal(weighed.advantage, kept.advantage)
    np.testing.assert_array_equal(weighed.advantage != 0, np.repeat([True, False, False], 4))


def test_to_mesh_splits_rows_and_changes_no_value():
    mesh = make_mesh(data=1, fsdp=2, context=2, tensor=2)
    groups = make_groups(np.random.default_rng(4), 4, 8, 16)
    batch = batch_of(groups, micro_batches=2, rows_multiple=4)
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
    """Of SmolLM2's answers to word problems; the longest are several times the median."""
    kept = json.loads((ROOT / "benchmarks" / "lengths_smollm2.json").read_text())
    responses = np.array(kept["response"])
    lengths = responses + np.array(kept["prompt"])
    assert len(lengths) >= 256
    assert responses.max() > 3 * np.median(responses)
    for sequences in (64, 256):
        for start in range(0, len(lengths) - sequences + 1, sequences):
            step, row = lengths[start : start + sequences], int(lengths.max())
            rows = fill(step.tolist(), row_length=row, rows=1)
            assert step.sum() >= 0.95 * len(rows) * row


@pytest.mark.parametrize(("mode", "factor"), [("keep", 1.0), ("weight", 0.1)])
def test_only_the_mode_weight_weighs_groups_of_equal_rewards(mode, factor):
    config = arithmetic.get_config()
    config.buffer.update(zero_variance=mode, zero_variance_weight=0.1)
    run: Any = SimpleNamespace(config=typed(config), objective=OAPL)
    batch = train.build_batch(run, with_equal_rewards(), 40)
    np.testing.assert_allclose(batch.weight, np.repeat([1, factor, factor], 4) / 12, rtol=1e-6)
