"""Sets of groups on disk, and the streams that are drawn from them."""

import dataclasses
import json
from collections import Counter

import numpy as np
import pytest
import xxhash
from array_record.python.array_record_module import ArrayRecordReader
from etils import epath
from flax import serialization

from oapl_jax.errors import RunError, UserError
from oapl_jax.model.config import ModelConfig
from oapl_jax.rollout.dataset import MANIFEST, Shards, ShardWriter, describe
from oapl_jax.rollout.encoding import decode, encode
from oapl_jax.rollout.ledger import FILE, Ledger
from oapl_jax.rollout.ledger_report import LedgerReport
from oapl_jax.rollout.recorded import Recorded
from oapl_jax.rollout.sampler import Sampling
from oapl_jax.structs import Group, Prompt, Rollout


def make_group(draw, *, version=4, equal=False, size=3):
    rng = np.random.default_rng(draw)
    rollouts = tuple(
        Rollout(
            rng.integers(0, 99, length).astype(np.int32),
            -rng.exponential(size=length).astype(np.float32),
            version,
            str(rng.choice(["stop", "length"])),
        )
        for length in rng.integers(0, 6, size)
    )
    tokens = rng.integers(0, 99, draw % 5).astype(np.int32)
    prompt = Prompt(f"id{draw}", draw, tokens, 'a "text"\n', "é", "chain_sum")
    reward = np.zeros(size) if equal else np.arange(size)
    return Group(prompt, rollouts, reward.astype(np.float32))


def assert_same(found, expected):
    scalars = lambda g: (
        g.prompt.id,
        g.prompt.text,
        g.prompt.answer,
        g.prompt.task,
        g.prompt.stream_index,
    )
    assert scalars(found) == scalars(expected)
    pairs = [(found.prompt.tokens, expected.prompt.tokens), (found.reward, expected.reward)]
    for a, b in zip(found.rollouts, expected.rollouts, strict=True):
        assert (a.policy_version, a.finish_reason) == (b.policy_version, b.finish_reason)
        pairs += [(a.tokens, b.tokens), (a.behavior_logp, b.behavior_logp)]
    for a, b in pairs:
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


def sizes(hidden_size=32):
    config = dict(
        model_type="llama",
        vocab_size=32,
        hidden_size=hidden_size,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        rms_norm_eps=1e-6,
    )
    return ModelConfig.from_hf(config, source="test")


class Tokenizer:
    eos_token_id = 1

    def __init__(self, *tokens):
        self._vocabulary = {token: i for i, token in enumerate(tokens)}

    def get_vocab(self):
        return self._vocabulary


def about(**changes):
    settings = dict(
        task="chain_sum",
        tokenizer=Tokenizer("a", "b"),
        model=sizes(),
        sampling=Sampling(0.7, 0.9, 5, 16),
        group_size=3,
        made={"by": "test"},
    )
    return describe(**{**settings, **changes})


def identify(version):
    return xxhash.xxh3_128_hexdigest(f"weights {version}".encode())


def new_writer(directory, *, groups_per_shard=4, of=None):
    return ShardWriter(
        epath.Path(directory),
        of or about(),
        groups_per_shard=groups_per_shard,
        identify=identify,
    )


def write_set(directory, groups, *, groups_per_shard=4):
    writer = new_writer(directory, groups_per_shard=groups_per_shard)
    for group in groups:
        writer.add(group)
    writer.flush()
    return Shards(epath.Path(directory))


def files(directory):
    return sorted(path.name for path in directory.iterdir())


# Records


@pytest.mark.parametrize("draw", range(6))
def test_a_record_is_the_group_to_the_last_bit(draw):
    group = make_group(draw, size=draw + 1)
    assert_same(decode(encode(group)), group)


def test_a_record_without_any_token():
    rollout = Rollout(np.zeros(0, np.int32), np.zeros(0, np.float32), 1, "length")
    group = Group(make_group(0).prompt, (rollout,) * 2, np.zeros(2, np.float32))
    assert_same(decode(encode(group)), group)


def test_records_are_what_the_documentation_says(tmp_path):
    group = make_group(7)
    write_set(tmp_path, [group])
    reader = ArrayRecordReader(str(tmp_path / "groups-00000.array_record"))
    (record,) = reader.read_all()
    content = serialization.msgpack_restore(record)
    kinds = {
        name: str(value.dtype) if isinstance(value, np.ndarray) else type(value)
        for name, value in content.items()
    }
    assert kinds == {
        "prompt": dict,
        "policy_version": int,
        "lengths": "int32",
        "tokens": "int32",
        "behavior_logp": "float32",
        "finish_reasons": list,
        "reward": "float32",
    }
    lengths = [len(r.tokens) for r in group.rollouts]
    assert content["lengths"].tolist() == lengths
    assert content["tokens"].tolist() == [t for r in group.rollouts for t in r.tokens]
    assert {k: v for k, v in content["prompt"].items() if k != "tokens"} == {
        "id": "id7",
        "stream_index": 7,
        "text": 'a "text"\n',
        "answer": "é",
        "task": "chain_sum",
    }
    manifest = json.loads((tmp_path / MANIFEST).read_text())
    assert set(manifest) == {"format", "about", "weights", "shards"}
    assert manifest["weights"] == {"4": identify(4)}
    path = tmp_path / "groups-00000.array_record"
    assert manifest["shards"] == {
        path.name: {
            "groups": 1,
            "versions": [4],
            "bytes": path.stat().st_size,
            "xxh128": xxhash.xxh3_128_hexdigest(path.read_bytes()),
            "longest_prompt": len(group.prompt.tokens),
            "longest_response": max(lengths),
        }
    }
    assert set(manifest["about"]) == {
        *("task", "tokenizer", "model", "temperature", "top_p", "top_k", "max_response_tokens"),
        *("group_size", "made"),
    }
    assert manifest["about"]["model"]["hidden_size"] == 32
    assert "dtype" not in manifest["about"]["model"]


# Writing


def test_groups_come_back_by_index_over_all_shards(tmp_path):
    groups = [make_group(draw, version=draw // 3) for draw in range(11)]
    shards = write_set(tmp_path, groups)
    assert [e["groups"] for e in shards.manifest["shards"].values()] == [4, 4, 3]
    assert len(shards) == 11
    assert shards.versions == [0, 1, 2, 3]
    for index in np.random.default_rng(0).permutation(11).tolist():
        assert_same(shards[index], groups[index])
    for index in (-1, 11):
        with pytest.raises(IndexError):
            shards[index]


def test_a_writer_goes_on_where_another_ended(tmp_path):
    groups = [make_group(draw) for draw in range(7)]
    for part in (groups[:3], groups[3:]):
        writer = new_writer(tmp_path, groups_per_shard=2)
        for group in part:
            writer.add(group)
        shards = writer.flush()
    assert shards == 4  # 2, 1, 2, 2
    assert writer.flush() == 4  # nothing was added since
    found = Shards(epath.Path(tmp_path))
    for a, b in zip(found, groups, strict=True):
        assert_same(a, b)


def test_a_version_is_identified_while_it_is_there(tmp_path):
    """A run deletes versions that it no longer needs, long before the shard of their groups."""
    there = {0: "of zero", 4: "of four"}
    writer = ShardWriter(
        epath.Path(tmp_path), about(), groups_per_shard=9, identify=there.__getitem__
    )
    for version in (0, 4):
        writer.add(make_group(version, version=version))
        del there[version]
    writer.flush()
    assert Shards(epath.Path(tmp_path)).manifest["weights"] == {"0": "of zero", "4": "of four"}


def test_shards_after_a_checkpoint_are_removed(tmp_path):
    writer = new_writer(tmp_path, groups_per_shard=2)
    for draw in range(3):
        writer.add(make_group(draw))
    known = writer.flush()
    assert known == 2
    for draw in range(3, 8):
        writer.add(make_group(draw, version=draw))
    assert set(Shards(epath.Path(tmp_path)).versions) == {4, 3, 5, 6}  # 7 waits for a shard

    again = new_writer(tmp_path, groups_per_shard=2)
    again.keep(known)
    assert files(tmp_path) == [
        "groups-00000.array_record",
        "groups-00001.array_record",
        MANIFEST,
    ]
    found = Shards(epath.Path(tmp_path))
    assert ([g.prompt.stream_index for g in found], found.versions) == ([0, 1, 2], [4])
    again.add(make_group(9))
    again.flush()
    assert [g.prompt.stream_index for g in Shards(epath.Path(tmp_path))] == [0, 1, 2, 9]
    again.keep(0)
    assert files(tmp_path) == [MANIFEST]


def test_what_a_kill_leaves_does_not_count(tmp_path):
    write_set(tmp_path, [make_group(0)])
    whole = (tmp_path / "groups-00000.array_record").read_bytes()
    (tmp_path / "groups-00001.array_record.writing").write_bytes(whole[:1000])
    (tmp_path / "groups-00001.array_record").write_bytes(whole)  # renamed, and not yet named
    (tmp_path / f"{MANIFEST}.new").write_text('{"form')
    assert [g.prompt.stream_index for g in Shards(epath.Path(tmp_path))] == [0]
    new_writer(tmp_path).add(make_group(1))
    assert files(tmp_path) == ["groups-00000.array_record", MANIFEST, f"{MANIFEST}.new"]


@pytest.mark.parametrize(
    ("change", "name"),
    [
        (dict(task="sorting"), "task"),
        (dict(tokenizer=Tokenizer("b", "a")), "tokenizer"),
        (dict(model=sizes(64)), "model"),
        (dict(sampling=Sampling(0.7, 0.9, 6, 16)), "top_k"),
        (dict(group_size=4), "group_size"),
        (dict(made={"by": "train"}), "made"),
    ],
)
def test_a_set_holds_one_kind(tmp_path, change, name):
    write_set(tmp_path, [make_group(0)])
    with pytest.raises(UserError, match=rf"holds rollouts of another kind \({name}: .* -> "):
        new_writer(tmp_path, of=about(**change))
    assert len(Shards(epath.Path(tmp_path))) == 1


def test_buckets_are_refused():
    with pytest.raises(UserError, match="gs://bucket/set; name a local directory"):
        new_writer("gs://bucket/set")


# Reading


def damage(path, how):
    match how:
        case "missing":
            path.unlink()
        case "cut":
            path.write_bytes(path.read_bytes()[:-1])
        case "flipped":
            content = bytearray(path.read_bytes())
            content[len(content) // 2] ^= 1
            path.write_bytes(bytes(content))


@pytest.mark.parametrize("how", ["missing", "cut", "flipped"])
def test_a_damaged_shard_is_refused_before_any_group_is_read(tmp_path, how):
    write_set(tmp_path, [make_group(draw) for draw in range(6)])
    damage(tmp_path / "groups-00001.array_record", how)
    with pytest.raises(UserError, match=r"groups-00001.array_record is missing or damaged"):
        Shards(epath.Path(tmp_path))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "is missing"),
        ('{"format": "oapl_ja', "is damaged"),
        ("[]", "is damaged"),
        ('{"format": "oapl_jax rollouts 0"}', "is of format 'oapl_jax rollouts 0'"),
    ],
)
def test_a_damaged_manifest_is_refused(tmp_path, content, words):
    write_set(tmp_path, [make_group(0)])
    (tmp_path / MANIFEST).unlink()
    if content is not None:
        (tmp_path / MANIFEST).write_text(content)
    with pytest.raises(UserError, match=words):
        Shards(epath.Path(tmp_path))


def test_a_set_without_groups_is_refused(tmp_path):
    new_writer(tmp_path).keep(0)
    with pytest.raises(UserError, match="holds no rollouts yet"):
        Shards(epath.Path(tmp_path))


def test_a_job_takes_only_what_it_can_train_on(tmp_path):
    groups = [make_group(draw) for draw in range(6)]
    shards = write_set(tmp_path, groups)
    longest = max(len(r.tokens) for g in groups for r in g.rollouts)
    shards.check(about(made={}), max_prompt_tokens=4)
    shards.check(about(sampling=Sampling(0.7, 1.0, 0, longest)), max_prompt_tokens=4)
    for change, words in (
        (dict(task="sorting"), "task: chain_sum -> sorting"),
        (dict(tokenizer=Tokenizer("a")), "tokenizer: "),
        (dict(model=sizes(64)), "model: "),
        (dict(sampling=Sampling(0.8, 0.9, 5, 16)), "temperature: 0.7 -> 0.8"),
        (dict(group_size=4), "group_size: 3 -> 4"),
        (dict(sampling=Sampling(0.7, 0.9, 5, longest - 1)), r"max_response_tokens \(4\)"),
    ):
        with pytest.raises(UserError, match=words):
            shards.check(about(**change), max_prompt_tokens=4)
    with pytest.raises(UserError, match=r"a prompt of 4 tokens.*data.max_prompt_tokens \(3\)"):
        shards.check(about(), max_prompt_tokens=3)


# Streams


@pytest.fixture
def stream(tmp_path):
    """Makes streams over a set of ten groups, each with a ledger of its own."""
    made = []

    def new(groups=None, *, order="shuffled", seed=0, version=0, start=None, drop=False):
        if not (tmp_path / "set" / MANIFEST).exists():
            write_set(tmp_path / "set", groups or [make_group(draw) for draw in range(10)])
        ledger = Ledger(epath.Path(tmp_path / f"{len(made)}" / FILE))
        recorded = Recorded(
            Shards(epath.Path(tmp_path / "set")),
            order=order,
            seed=seed,
            policy_version=version,
            start=start,
            drop_zero_variance=drop,
            ledger=ledger,
        )
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
    assert [i for _ in range(10) for i in ids(again.take(3, step=0))] == [
        *epochs[0],
        *epochs[1],
        *epochs[2],
    ]
    assert ids([again.at(draw) for draw in (7, 23, 0)]) == [
        epochs[0][7],
        epochs[2][3],
        epochs[0][0],
    ]


def test_groups_are_whole_but_for_version_and_draw(stream):
    recorded = stream()
    for draw, group in enumerate(recorded.take(20, step=0)):
        expected = make_group(int(group.prompt.id[2:]))
        assert (group.policy_version, group.prompt.stream_index) == (0, -1 - draw)
        rollouts = [dataclasses.replace(r, policy_version=0) for r in expected.rollouts]
        prompt = dataclasses.replace(expected.prompt, stream_index=-1 - draw)
        assert_same(group, Group(prompt, tuple(rollouts), expected.reward))


def test_the_recorded_order_ends(stream):
    groups = [make_group(draw, version=draw // 4) for draw in range(10)]
    recorded = stream(groups, order="recorded", version=None)
    found = [recorded.take(3, step) for step in range(3)]
    assert [i for part in found for i in ids(part)] == ids(groups[:9])
    assert [g.policy_version for part in found for g in part] == [0] * 4 + [1] * 4 + [2]
    with pytest.raises(RunError, match=r"all 10 groups of .* are used up"):
        recorded.take(3, step=9)


def test_a_group_newer_than_the_learner_is_refused(stream):
    recorded = stream(version=None)  # they are of version 4
    with pytest.raises(UserError, match=r"version 4, newer than the learner at step 3"):
        recorded.take(1, step=3)
    assert recorded.take(1, step=4)[0].policy_version == 4


def test_a_set_of_several_versions_has_none_of_its_own(stream):
    groups = [make_group(draw, version=draw) for draw in range(3)]
    with pytest.raises(UserError, match=r"versions \[0, 1, 2\].*recorded_version=-1"):
        stream(groups, version=0)


def test_the_weights_that_a_round_starts_from_are_those_that_sampled_it(stream, tmp_path):
    path = epath.Path(tmp_path / "v000004")
    path.mkdir()
    stream(start=path)  # no manifest: nobody can tell
    (path / MANIFEST).write_text("weights 4")
    stream(start=path)
    (path / MANIFEST).write_text("weights 5")
    with pytest.raises(UserError, match=r"model\.path=.*v000004 did not sample"):
        stream(start=path)
    stream(start=path, version=None)


def test_groups_of_equal_rewards_are_passed_over_and_counted(stream, tmp_path):
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
    assert set(found.summary()["servers"]) == {"shards"}
    kept = stream(order="recorded")
    assert ids(kept.take(2, step=0)) == ["id0", "id1"]


def test_a_set_of_equal_rewards_alone_ends_the_run(stream):
    recorded = stream([make_group(draw, equal=True) for draw in range(4)], drop=True)
    with pytest.raises(RunError, match=r"every group of .* has equal rewards"):
        recorded.take(1, step=0)


def test_a_restored_stream_goes_on_like_the_first(stream):
    first, second = stream(drop=True), stream(drop=True)
    for step in range(3):
        first.take(4, step)
    state = json.loads(json.dumps(first.state()))
    second.restore(state)
    assert second.state() == state
    for step in range(3, 6):
        assert ids(first.take(4, step)) == ids(second.take(4, step))
    assert first.counts == second.counts == Counter(taken=24, zero_variance=0)


def test_a_stream_is_restored_only_as_it_was(stream, tmp_path):
    state = stream().state()
    for other in (dict(seed=1), dict(order="recorded")):
        with pytest.raises(UserError, match=r"recorded stream .* is not the configured one"):
            stream(**other).restore(state)
    new_writer(tmp_path / "set").write(7, [make_group(99)])
    with pytest.raises(UserError, match=r"recorded stream .* is not the configured one"):
        stream().restore(state)


def test_an_unknown_order_is_refused_by_name(stream):
    with pytest.raises(UserError, match=r"rollout\.recorded_order='sorted' .* shuffled, recorded"):
        stream(order="sorted")
