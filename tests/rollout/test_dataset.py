"""Datasets of groups on disk, the pipeline that fills them, and the streams that read them."""

import contextlib
import dataclasses
import json
import threading
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import xxhash
from array_record.python.array_record_module import ArrayRecordReader
from bucket import emulated
from etils import epath
from groups import (
    SAMPLING,
    VERSION,
    Killed,
    ScriptedSampler,
    assert_same_groups,
    make_group,
    make_prompts,
)
from small_models import small_config

from oapl_jax.errors import RunError, UserError
from oapl_jax.rollout import dataset
from oapl_jax.rollout.dataset import MANIFEST, Dataset, DatasetWriter, RecordedStream
from oapl_jax.rollout.ledger import FILE, Ledger, LedgerReport
from oapl_jax.rollout.sampler import Sampling
from oapl_jax.structs import Group, decode_groups, encode_groups


@pytest.fixture(scope="module")
def bucket():
    with emulated("sets") as bucket:
        yield bucket


def tokenizer(*tokens):
    vocabulary = {token: i for i, token in enumerate(tokens)}
    return SimpleNamespace(eos_token_id=1, get_vocab=lambda: vocabulary)


def about(**changes):
    settings = dict(task="chain_sum", tokenizer=tokenizer("a", "b"), model=small_config())
    settings |= dict(sampling=Sampling(0.7, 0.9, 5, 16), group_size=3, made={"by": "test"})
    return dataset.identity(**settings | changes)


def digest(version):
    return xxhash.xxh3_128_hexdigest(f"weights {version}".encode())


def write(directory, groups=(), *, groups_per_shard=4, of=None, weights_digest=digest, keep=None):
    """Adds groups to a dataset, after going back to `keep` shards; returns the shards there are."""
    settings = dict(groups_per_shard=groups_per_shard, weights_digest=weights_digest)
    writer = DatasetWriter(epath.Path(directory), of or about(), **settings)
    with contextlib.closing(writer):
        if keep is not None:
            writer.keep(keep)
        for group in groups:
            writer.add(group)
        assert writer.flush() == writer.flush()
        return writer.flush()


def read(directory):
    return Dataset(epath.Path(directory))


def indices(directory):
    return [group.prompt.stream_index for group in read(directory)]


def files(directory):
    return sorted(path.name for path in directory.iterdir() if path.name != "lock")


def test_records_and_manifest_are_what_the_documentation_says(tmp_path):
    group = make_group(7)
    write(tmp_path, [group])
    path = tmp_path / "groups-00000.array_record"
    (record,) = ArrayRecordReader(str(path)).read_all()
    assert_same_groups(decode_groups(record), [group])
    manifest = json.loads((tmp_path / MANIFEST).read_text())
    assert set(manifest) == {"format", "about", "weights", "shards"}
    assert manifest["weights"] == {"4": digest(4)}
    entry = manifest["shards"][path.name]
    assert entry.pop("seconds") >= 0
    assert entry == {
        "versions": [4],
        "samples": [[7, 3]],
        "bytes": path.stat().st_size,
        "xxh128": xxhash.xxh3_128_hexdigest(path.read_bytes()),
        "longest_prompt": len(group.prompt.tokens),
        "longest_response": max(len(r.tokens) for r in group.rollouts),
    }
    assert manifest["about"] == about()
    assert manifest["about"]["model"]["hidden_size"] == 32


def test_groups_come_back_by_index_over_all_shards_and_writers(tmp_path):
    groups = [make_group(i, version=i // 3) for i in range(11)]
    assert write(tmp_path, groups[:6]) == 2
    assert write(tmp_path, groups[6:]) == 4  # 4, 2, 4, 1
    found = read(tmp_path)
    assert (len(found), found.versions) == (11, [0, 1, 2, 3])
    for index in np.random.default_rng(0).permutation(11).tolist():
        assert_same_groups([found[index]], [groups[index]])
    for index in (-1, 11):
        with pytest.raises(IndexError):
            found[index]


def test_a_version_is_identified_while_it_is_there(tmp_path):
    """A run deletes versions that it no longer needs, long before the shard of their groups."""
    there = {0: "of zero", 4: "of four"}

    def groups():
        for version in (0, 4):
            yield make_group(version, version=version)
            del there[version]

    write(tmp_path, groups(), groups_per_shard=9, weights_digest=there.__getitem__)
    assert read(tmp_path).manifest["weights"] == {"0": "of zero", "4": "of four"}


def test_shards_after_a_checkpoint_are_removed(tmp_path):
    known = write(tmp_path, [make_group(i) for i in range(3)], groups_per_shard=2)
    assert known == 2
    write(tmp_path, [make_group(i, version=i) for i in range(3, 8)], groups_per_shard=2)
    assert set(read(tmp_path).versions) == {4, 3, 5, 6, 7}
    write(tmp_path, keep=known)
    assert files(tmp_path) == ["groups-00000.array_record", "groups-00001.array_record", MANIFEST]
    assert (indices(tmp_path), read(tmp_path).versions) == ([0, 1, 2], [4])
    write(tmp_path, [make_group(9)])
    assert indices(tmp_path) == [0, 1, 2, 9]
    write(tmp_path, keep=0)
    assert files(tmp_path) == [MANIFEST]
    with pytest.raises(UserError, match="no rollouts"):
        read(tmp_path)


def test_files_that_a_kill_leaves_do_not_count(tmp_path):
    write(tmp_path, [make_group(0)])
    whole = (tmp_path / "groups-00000.array_record").read_bytes()
    (tmp_path / "groups-00001.array_record.tmp").write_bytes(whole[:1000])
    (tmp_path / "groups-00001.array_record").write_bytes(whole)  # renamed, and not yet named
    assert indices(tmp_path) == [0]
    write(tmp_path)
    assert files(tmp_path) == ["groups-00000.array_record", MANIFEST]


CHANGES = {
    "task": dict(task="sorting"),
    "tokenizer": dict(tokenizer=tokenizer("b", "a")),
    "model": dict(model=small_config(hidden_size=64)),
    "temperature": dict(sampling=Sampling(0.8, 0.9, 5, 16)),
    "top_k": dict(sampling=Sampling(0.7, 0.9, 6, 16)),
    "group_size": dict(group_size=4),
    "made": dict(made={"by": "train"}),
}


def test_a_dataset_has_one_writer_on_a_local_disk(tmp_path):
    first = DatasetWriter(epath.Path(tmp_path), about(), groups_per_shard=1, weights_digest=digest)
    with pytest.raises(UserError, match="another process"):
        write(tmp_path)
    first.close()
    write(tmp_path)


def test_a_dataset_in_a_bucket_is_that_on_a_disk(bucket, tmp_path):
    groups = [make_group(i) for i in range(6)]
    write(tmp_path, groups)
    there = bucket / "set"
    write(there, groups)
    write(there, [])  # another process; no stray is left and none is missing
    assert encode_groups(list(read(there))) == encode_groups(list(read(tmp_path)))
    names = [path.name for path in tmp_path.iterdir() if path.name != "lock"]
    assert sorted(path.name for path in there.iterdir()) == sorted(names)
    shard = there / "groups-00001.array_record"
    shard.write_bytes(b"?" + shard.read_bytes()[1:])
    with pytest.raises(UserError, match="groups-00001"):
        Dataset(there)


def test_a_look_at_a_group_fetches_its_shard_alone(bucket, monkeypatch):
    there, fetched = bucket / "look", []
    groups = [make_group(i) for i in range(10)]
    write(there, groups)
    fetch = dataset.files.fetch

    def note(directory, shards, to, *, remedy):
        fetched.extend(shards)
        fetch(directory, shards, to, remedy=remedy)

    monkeypatch.setattr(dataset.files, "fetch", note)
    found = Dataset(there, checksums=False)
    assert (len(found), fetched) == (10, [])
    for index in (5, 4, 9):
        assert_same_groups([found[index]], [groups[index]])
    assert fetched == ["groups-00001.array_record", "groups-00002.array_record"]
    found.close()
    (there / "groups-00000.array_record").unlink()
    with pytest.raises(UserError, match="groups-00000"):
        Dataset(there, checksums=False)


def test_a_damaged_shard_is_refused_before_any_group_is_read(tmp_path):
    write(tmp_path, [make_group(i) for i in range(6)])
    path = tmp_path / "groups-00001.array_record"
    content = path.read_bytes()
    flipped = bytearray(content)
    flipped[len(content) // 2] ^= 1
    cut = lambda: path.write_bytes(content[:-1])
    for spoil in (lambda: path.write_bytes(flipped), cut, path.unlink):
        spoil()
        with pytest.raises(UserError, match=r"groups-00001\.array_record"):
            read(tmp_path)


@pytest.mark.parametrize(
    "content", [None, '{"format": "oapl_ja', "[]", '{"format": "oapl_jax rollouts 1"}']
)
def test_a_damaged_or_old_manifest_is_refused(tmp_path, content):
    write(tmp_path, [make_group(0)])
    (tmp_path / MANIFEST).unlink()
    if content is not None:
        (tmp_path / MANIFEST).write_text(content)
    with pytest.raises(UserError, match=r"manifest\.json"):
        read(tmp_path)


def test_a_dataset_has_one_identity_and_a_run_takes_only_groups_that_it_can_train_on(tmp_path):
    groups = [make_group(i) for i in range(6)]
    write(tmp_path, groups)
    found = read(tmp_path)
    longest = max(len(r.tokens) for g in groups for r in g.rollouts)
    found.check(about(made={}), max_prompt_tokens=4)
    found.check(about(sampling=Sampling(0.7, 1.0, 0, longest)), max_prompt_tokens=4)
    for name, change in CHANGES.items():
        with pytest.raises(UserError, match=rf"\({name}: .* -> "):
            write(tmp_path, of=about(**change))
        if name not in ("made", "top_k"):
            with pytest.raises(UserError, match=f"{name}: .* -> "):
                found.check(about(**change), max_prompt_tokens=4)
    shorter = Sampling(0.7, 0.9, 5, longest - 1)
    with pytest.raises(UserError, match=r"rollout\.max_response_tokens"):
        found.check(about(sampling=shorter), max_prompt_tokens=4)
    with pytest.raises(UserError, match=r"data\.max_prompt_tokens"):
        found.check(about(), max_prompt_tokens=3)
    assert len(read(tmp_path)) == 6


def run_fill(directory, sampler, *, prompts=3, n=5, at_once=2, reward=None, threads=1, see=print):
    """Samples what is missing; returns the tokens of each sample of each prompt."""
    about, sizes = {"task": "t"}, dict(groups_per_shard=2, weights_digest=str)
    reward = reward or (lambda prompt, rollout: float(prompt.answer))
    how = dict(version=VERSION, n=n, at_once=at_once, sampling=SAMPLING, reward_threads=threads)
    how |= dict(note=lambda group: None, progress=see)
    with contextlib.closing(DatasetWriter(epath.Path(directory), about, **sizes)) as writer:
        dataset.fill(writer, make_prompts(prompts), sampler, reward, **how)
    found = np.full((prompts, n, 2), -1)
    for group in read(directory):
        start, row = divmod(group.prompt.stream_index, prompts)
        assert group.prompt.id == f"id{row}"
        for column, rollout in enumerate(group.rollouts[: max(n - start, 0)], start):
            assert (found[row, column] == -1).all()
            found[row, column] = rollout.tokens
    assert (found >= 0).all()
    return found.tolist()


def test_requests_cover_the_missing_samples_and_nothing_else():
    rng = np.random.default_rng(0)
    for at_once in (1, 2, 3, 8):
        for _ in range(50):
            there = rng.random((3, 7)) < rng.random()
            after = there.astype(int)
            for start, row, count in dataset.missing(there, at_once):
                assert 1 <= count <= at_once
                after[row, start : start + count] += 1
            assert (after == 1).all()
    requests = dataset.missing(np.zeros((2, 5), bool), 2)
    assert requests == [(0, 0, 2), (0, 1, 2), (2, 0, 2), (2, 1, 2), (4, 0, 1), (4, 1, 1)]


@pytest.mark.parametrize("at_once", [1, 2, 3, 5, 99])
def test_every_prompt_gets_n_samples_with_random_numbers_of_their_own(tmp_path, at_once):
    sampler, seen = ScriptedSampler(), []
    found = run_fill(tmp_path, sampler, at_once=at_once, see=seen.append, threads=3)
    assert len({tuple(tokens) for row in found for tokens in row}) == 15
    assert {n for _, n in sampler.asked} <= set(range(1, min(at_once, 5) + 1))
    assert seen == sorted(set(seen))
    assert seen[-1] == 15
    for group in read(tmp_path):
        assert (group.reward == float(group.prompt.answer)).all()
    assert run_fill(tmp_path, again := ScriptedSampler(), at_once=at_once) == found
    assert again.asked == []


@pytest.mark.parametrize("place", ["disk", "bucket"])
@pytest.mark.parametrize("lives", range(9))
def test_killed_it_ends_with_the_same_samples(tmp_path, bucket, place, lives):
    there = tmp_path / "set" if place == "disk" else bucket / f"killed{lives}"
    unbroken = run_fill(tmp_path / "unbroken", ScriptedSampler())
    with pytest.raises(Killed):
        run_fill(there, ScriptedSampler(seed=lives, lives=lives))
    assert (len(read(there)) if lives else 0) == lives
    assert run_fill(there, sampler := ScriptedSampler(seed=lives + 1)) == unbroken
    assert len(sampler.asked) == 9 - lives  # stored groups are not sampled again


def test_a_shard_is_written_in_time(tmp_path, monkeypatch):
    limits = dict(groups_per_shard=9, seconds_per_shard=5.0)
    writer = DatasetWriter(epath.Path(tmp_path), about(), weights_digest=digest, **limits)
    now = [0.0]
    monkeypatch.setattr(dataset.time, "monotonic", lambda: now[0])
    writer.start_clock()
    for index, seconds in enumerate((1, 3, 5, 6, 11)):
        now[0] = seconds
        writer.add(make_group(index))
    assert writer.samples == [(i, 3) for i in range(5)]
    writer.close()
    assert [e["seconds"] for e in read(tmp_path).manifest["shards"].values()] == [5, 6]


def test_n_may_be_raised_and_lowered_and_the_first_samples_stay(tmp_path):
    three = run_fill(tmp_path, ScriptedSampler(), n=3, at_once=2)
    eight = run_fill(tmp_path, sampler := ScriptedSampler(), n=8, at_once=4)
    assert ([row[:3] for row in eight], sum(n for _, n in sampler.asked)) == (three, 3 * 5)
    assert len({tuple(tokens) for row in eight for tokens in row}) == 24
    before = files(tmp_path)
    two = run_fill(tmp_path, sampler := ScriptedSampler(), n=2)
    assert (two, sampler.asked) == ([row[:2] for row in eight], [])
    assert files(tmp_path) == before


@pytest.mark.parametrize("kind", ["fails", "stale"])
def test_failed_samples_are_missing_until_they_are_sampled(tmp_path, kind):
    with pytest.raises(RunError, match="10 of 15"):
        run_fill(tmp_path, ScriptedSampler(**{kind: ("id0", "id2")}))
    run_fill(tmp_path, again := ScriptedSampler())
    assert sum(n for _, n in again.asked) == 10


def test_groups_are_rewarded_beside_each_other_and_a_failure_ends_it(tmp_path):
    both = threading.Barrier(2, timeout=20)
    together = lambda prompt, rollout: both.wait()
    run_fill(tmp_path, ScriptedSampler(), prompts=2, n=1, reward=together, threads=2)
    with pytest.raises(ZeroDivisionError):
        run_fill(tmp_path / "other", ScriptedSampler(), reward=lambda p, r: 1 / (int(p.answer) - 1))


@pytest.fixture
def stream(tmp_path):
    """Makes streams over a dataset of ten groups, each with a ledger of its own."""
    made = []

    def new(groups=None, *, order="shuffled", seed=0, version=0, start=None, drop=False):
        if not (tmp_path / "set" / MANIFEST).exists():
            write(tmp_path / "set", groups or [make_group(i) for i in range(10)])
        ledger = Ledger(epath.Path(tmp_path / f"{len(made)}" / FILE))
        settings = dict(policy_version=version, start=start, drop_zero_variance=drop, ledger=ledger)
        recorded = RecordedStream(read(tmp_path / "set"), order=order, seed=seed, **settings)
        made.append(ledger)
        return recorded

    yield new
    for number, ledger in enumerate(made):
        ledger.close()
        found = LedgerReport(epath.Path(tmp_path / f"{number}" / FILE)).summary()
        assert found["balanced"], found


def ids(groups):
    return [group.prompt.id for group in groups]


def test_each_epoch_has_every_group_once_in_an_order_of_its_own(stream):
    recorded = stream()
    epochs = [ids(recorded.take(10, step=0)) for _ in range(3)]
    assert all(sorted(epoch) == sorted(epochs[0]) for epoch in epochs)
    assert len(set(map(tuple, epochs))) == 3
    other = stream(seed=1)
    assert ids(other.take(10, step=0)) != epochs[0]
    # A pure function of (seed, draw), however many are taken at a time.
    again = stream()
    together = [*epochs[0], *epochs[1], *epochs[2]]
    assert [i for _ in range(10) for i in ids(again.take(3, step=0))] == together
    assert ids([again.at(draw) for draw in (7, 23, 0)]) == [together[i] for i in (7, 23, 0)]


def test_groups_are_whole_but_for_version_and_draw(stream):
    recorded = stream()
    for draw, group in enumerate(recorded.take(20, step=0)):
        expected = make_group(int(group.prompt.id[2:]))
        assert (group.policy_version, group.prompt.stream_index) == (0, -1 - draw)
        rollouts = [dataclasses.replace(r, policy_version=0) for r in expected.rollouts]
        prompt = dataclasses.replace(expected.prompt, stream_index=-1 - draw)
        assert_same_groups([group], [Group(prompt, tuple(rollouts), expected.reward)])


def test_the_dataset_order_ends(stream):
    groups = [make_group(draw, version=draw // 4) for draw in range(10)]
    recorded = stream(groups, order="recorded", version=None)
    found = [recorded.take(3, step) for step in range(3)]
    assert [i for part in found for i in ids(part)] == ids(groups[:9])
    assert [g.policy_version for part in found for g in part] == [0] * 4 + [1] * 4 + [2]
    with pytest.raises(RunError, match="10 groups"):
        recorded.take(3, step=9)


def test_a_dataset_of_several_versions_is_of_none(stream):
    with pytest.raises(UserError, match=r"rollout\.dataset_version=-1"):
        stream([make_group(draw, version=draw) for draw in range(3)])


def test_the_weights_that_a_round_starts_from_are_those_that_sampled_it(stream, tmp_path):
    """And a learner with recorded versions is never older than a group."""
    path = epath.Path(tmp_path / "v000004")
    path.mkdir()
    stream(start=path)  # no manifest: nobody can tell
    (path / MANIFEST).write_text("weights 4")
    stream(start=path)
    (path / MANIFEST).write_text("weights 5")
    with pytest.raises(UserError, match=r"model\.path=.*v000004"):
        stream(start=path)
    recorded = stream(start=path, version=None)  # they are of version 4
    with pytest.raises(UserError, match="version 4"):
        recorded.take(1, step=3)
    assert recorded.take(1, step=4)[0].policy_version == 4


def test_groups_with_equal_rewards_are_dropped_and_counted(stream, tmp_path):
    groups = [make_group(draw, equal=draw % 3 == 0) for draw in range(10)]  # 0, 3, 6, 9
    recorded = stream(groups, order="recorded", drop=True)
    assert ids(recorded.take(4, step=5)) == ["id1", "id2", "id4", "id5"]
    assert recorded.counts == {"taken": 4, "zero_variance": 2}
    assert ids(recorded.take(1, step=6)) == ["id7"]
    found = LedgerReport(epath.Path(tmp_path / "0" / FILE))
    ends = {e.prompt: (e.state, e.step) for e in found.groups()}
    assert ends == {
        **{f"id{i}": ("trained", 5) for i in (1, 2, 4, 5)},
        **{f"id{i}": ("zero_variance", None) for i in (0, 3, 6)},
        "id7": ("trained", 6),
    }
    assert set(found.summary()["servers"]) == {"dataset"}
    kept = stream(order="recorded")
    assert ids(kept.take(2, step=0)) == ["id0", "id1"]


def test_a_dataset_with_only_equal_rewards_is_an_error(stream):
    recorded = stream([make_group(draw, equal=True) for draw in range(4)], drop=True)
    with pytest.raises(RunError, match=r"buffer\.zero_variance"):
        recorded.take(1, step=0)


def test_a_stream_is_restored_only_as_it_was_and_goes_on_like_the_first(stream, tmp_path):
    first, second = stream(drop=True), stream(drop=True)
    for step in range(3):
        first.take(4, step)
    state = json.loads(json.dumps(first.state()))
    second.restore(state)
    assert second.state() == state
    for step in range(3, 6):
        assert ids(first.take(4, step)) == ids(second.take(4, step))
    assert first.counts == second.counts == Counter(taken=24, zero_variance=0)
    for other in (dict(seed=1), dict(order="recorded")):
        with pytest.raises(UserError, match=r"rollout\.dataset"):
            stream(drop=True, **other).restore(state)
    write(tmp_path / "set", [make_group(99)])
    with pytest.raises(UserError, match=r"rollout\.dataset"):
        stream(drop=True).restore(state)
