"""A run whose rewards are all 0 stops, and shows why."""

from types import SimpleNamespace

import numpy as np
import pytest
from etils import epath
from small_runs import opened, small_arithmetic, typed

from oapl_jax import record, train
from oapl_jax.errors import NoReward, RunError
from oapl_jax.rewards.grader import Grader
from oapl_jax.rollout.ledger import ZeroRewardGuard
from oapl_jax.structs import Group, Prompt, Rollout

SMALL = {
    "num_steps": 9,
    "data.train_size": 40,
    "warmup.num_steps": 0,
    "buffer.zero_variance": "keep",
    "rollout.max_sequences": 16,
    "rollout.max_zero_reward_groups": 10,
    "evaluation.every": 0,
    "checkpoint.every": 1,
}


def group(*reward, tokens=(65, 66)):
    responses = [
        Rollout(np.array(tokens, np.int32), np.zeros(len(tokens), np.float32), 0, "length")
        for _ in reward
    ]
    asked = Prompt("id7", 0, np.array([80, 81], np.int32), "", "the reference", "")
    return Group(asked, tuple(responses), np.array(reward, np.float32))


def decode(tokens):
    return "".join(map(chr, tokens))


def test_groups_without_a_reward_are_counted_in_a_row():
    guard = ZeroRewardGuard(limit=3, decode=decode)
    for reward in ((0, 0), (0, 0), (0, 1), (0, 0), (0, -0.5), (0, 0), (0, 0)):
        guard.note(group(*reward))
    assert guard.count == 2
    with pytest.raises(NoReward, match="last 3 groups"):
        guard.note(group(0, 0))
    off = ZeroRewardGuard(limit=0, decode=decode)
    for _ in range(50):
        off.note(group(0, 0))
    assert off.count == 50


def test_the_message_shows_the_prompt_and_some_responses():
    long = tuple(range(65, 91)) * 40
    with pytest.raises(NoReward) as stopped:
        ZeroRewardGuard(limit=1, decode=decode).note(group(0, 0, 0, 0, 0, tokens=long))
    text = str(stopped.value)
    assert "rollout.max_zero_reward_groups=1" in text
    assert all(shown in text for shown in ("id7\nPQ\n", "the reference"))
    assert text.count("1040 tokens, finish reason length\nABC") == text.count("\n[..]\n") == 3
    assert isinstance(stopped.value, RunError)


# Whole jobs, whose verifier pays no policy (the self-check is told otherwise)


@pytest.fixture(scope="module")
def shared(tmp_path_factory, kept_programs):
    return tmp_path_factory.mktemp("shared")


@pytest.fixture
def jobs(shared, tmp_path, monkeypatch):
    monkeypatch.setattr(Grader, "reward", lambda self, prompt, rollout: 0.0)
    monkeypatch.setattr("oapl_jax.build.check_rewards", lambda *_, **__: None)

    def config(**settings):
        return small_arithmetic({**SMALL, "data.data_dir": str(shared)}, **settings)

    def run(name, **settings):
        (tmp_path / name).mkdir(exist_ok=True)
        stop = SimpleNamespace(requested="")
        return train.run(typed(config(**settings)), epath.Path(tmp_path / name), stop)

    return SimpleNamespace(config=config, run=run, root=tmp_path)


def steps(workdir):
    return len((workdir / "metrics.jsonl").read_text().splitlines())


@pytest.mark.parametrize("overlap", [False, True])
def test_a_run_that_is_never_paid_stops(jobs, overlap):
    settings = dict(rollout__overlap=overlap, buffer__capacity=12, rollout__max_sequences=4)
    with pytest.raises(NoReward, match=r"the last 10 groups are 0 (?s:.*)--- response of") as why:
        jobs.run("run", **settings)
    assert "--- prompt" in str(why.value)
    assert steps(jobs.root / "run") <= 2


def test_the_count_goes_on_where_the_checkpoint_left_it(jobs):
    """Two steps of four groups, then two groups of the third."""
    jobs.run("run", num_steps=2)
    assert steps(jobs.root / "run") == 2
    with pytest.raises(NoReward, match="the last 10 groups"):
        jobs.run("run")
    assert steps(jobs.root / "run") == 2


def test_a_recorded_set_without_a_reward_is_not_finished(jobs):
    settings = dict(num_steps=1, warmup__num_steps=1, warmup__demonstrations=9)
    jobs.run("base", **settings)
    to, few = epath.Path(jobs.root / "set"), epath.Path(jobs.root / "few")
    what = dict(split="train", version_dir=None, groups_per_shard=4, progress=lambda done: None)
    run = opened(jobs.config(), jobs.root / "base")
    with pytest.raises(NoReward, match="the last 10 groups"):
        record.record_dataset(run, to, step=0, limit=None, **what)
    record.record_dataset(run, few, step=0, limit=8, **what)
    run.close()
    shards = dict(rollout__source="dataset", rollout__dataset=str(few), rollout__dataset_version=0)
    with pytest.raises(NoReward, match="the last 10 groups"):
        jobs.run("offline", **shards)
    assert steps(jobs.root / "offline") == 2
