"""Recorded datasets and the offline rounds that are trained on them, in real processes."""

import json
import shutil
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import xxhash
from etils import epath
from small_runs import IN_PROCESS, ROOT, cached_programs, metrics, opened, small_arithmetic, typed

from oapl_jax import record, train
from oapl_jax.errors import NoReward, UserError
from oapl_jax.rewards.grader import Grader
from oapl_jax.rollout.dataset import MANIFEST, Dataset
from oapl_jax.rollout.ledger import FILE, LedgerReport

KILLED_IN_TRAINING = """
import os, signal
from oapl_jax.tracking.metrics import MetricsWriter
write = MetricsWriter.write
def write_and_die(self, step, values):
    line = write(self, step, values)
    if step == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return line
MetricsWriter.write = write_and_die
from oapl_jax.train import main
"""
# The third shard stands, and the manifest does not say so yet.
KILLED_BETWEEN_SHARD_AND_MANIFEST = """
import os, signal
from oapl_jax import files
write = files.write_atomically
def write_or_die(path, parts):
    if (path.parent / "groups-00002.array_record").exists():
        os.kill(os.getpid(), signal.SIGKILL)
    write(path, parts)
files.write_atomically = write_or_die
from oapl_jax.record import main
"""
RECORD = "from oapl_jax.record import main"
DATA = {"data.train_size": 96, "data.generator.min_terms": 2, "data.generator.max_terms": 2}
WARMUP = {"warmup.num_steps": 40, "warmup.batch_size": 32, "warmup.demonstrations": 96}
EVALUATION = {"evaluation.every": 100, "evaluation.n": 2, "evaluation.ks": (1,)}
STEPS = {"num_steps": 5, "checkpoint.every": 2, "checkpoint.keep": 9}
SIX_PROMPTS = {"rollout.max_sequences": 24}  # at a time
SMALL = DATA | WARMUP | EVALUATION | STEPS | SIX_PROMPTS


class Jobs:
    """Opens, trains and samples with settings that all have in common, and one compile cache."""

    def __init__(self, shared):
        self._settings = {**SMALL, "data.data_dir": str(shared / "data")}

    def config(self, *, choice=None, **settings):
        return small_arithmetic(self._settings, choice, **settings)

    def train(self, workdir, **settings):
        workdir.mkdir(exist_ok=True)
        never = SimpleNamespace(requested="")
        return train.run(typed(self.config(**settings)), epath.Path(workdir), never)

    def train_and_kill(self, workdir, **settings):
        """A step after a checkpoint, which may or may not be on disk by then."""
        self.process(KILLED_IN_TRAINING, f"--workdir={workdir}", code=-9, **settings)

    def record(self, workdir, to, *, settings=None, **options):
        defaults = dict(step=None, version_dir=None, split="train", limit=None, groups_per_shard=12)
        seen = []
        run = opened(self.config(**settings or {}), workdir)
        options = {**defaults, **options, "progress": seen.append}
        record.record_dataset(run, epath.Path(to), **options)
        run.close()
        return seen

    def process(self, main, *arguments, code, **settings):
        """Runs a command in a process of its own."""
        settings = {name.replace("__", "."): value for name, value in settings.items()}
        settings = {**IN_PROCESS, **self._settings, **settings}
        program = f"{main}\nfrom oapl_jax.errors import exit_with_code\nexit_with_code(main)"
        command = [sys.executable, "-c", program, "--config=configs/arithmetic.py", *arguments]
        command += [f"--config.{name}={value}" for name, value in settings.items()]
        where = dict(cwd=ROOT, env=cached_programs(), timeout=300)
        done = subprocess.run(command, capture_output=True, text=True, **where)
        assert done.returncode == code, done.stdout + done.stderr
        return done.stdout + done.stderr


@pytest.fixture(scope="module")
def jobs(tmp_path_factory, kept_programs):
    return Jobs(tmp_path_factory.mktemp("shared"))


@pytest.fixture(scope="module")
def trained(jobs, tmp_path_factory):
    """A short run that recorded what it sampled, and was killed after its third step."""
    workdir = tmp_path_factory.mktemp("trained")
    settings = dict(rollout__record=True, rollout__groups_per_shard=3, buffer__zero_variance="keep")
    jobs.train_and_kill(workdir, **settings)
    jobs.train(workdir, **settings)
    return workdir


@pytest.fixture(scope="module")
def round1(jobs, trained, tmp_path_factory):
    """The set of the first offline round, from the weights after the warm-up."""
    directory = tmp_path_factory.mktemp("round1")
    assert jobs.record(trained, directory, step=0) == list(range(12, 97, 12))
    return directory


def contents(directory):
    of = lambda r: (r.tokens.tolist(), r.behavior_logp.tolist(), r.policy_version)
    return [
        (g.prompt.id, g.prompt.stream_index, g.reward.tolist(), [of(r) for r in g.rollouts])
        for g in Dataset(epath.Path(directory))
    ]


def assert_same_but_for_rounding(directory, expected):
    """A response that is decoded in another slot or round has log-probs with other last bits."""
    for mine, theirs in zip(contents(directory), contents(expected), strict=True):
        assert mine[:3] == theirs[:3]
        for (tokens, logp, version), other in zip(mine[3], theirs[3], strict=True):
            assert (tokens, version) == (other[0], other[2])
            np.testing.assert_allclose(logp, other[1], atol=1e-5)


def balance(workdir):
    summary = LedgerReport(epath.Path(workdir / FILE)).summary()
    assert summary["balanced"], summary["faults"]
    return summary


def offline(shards, weights):
    """Settings of a run that trains on a recorded dataset, from these weights."""
    source = dict(rollout__source="dataset", rollout__dataset=str(shards))
    start = dict(model__path=str(weights), warmup__num_steps=0)
    return dict(source, **start, buffer__zero_variance="drop")


def test_a_set_has_each_prompt_of_the_split_once_with_exactly_n(round1):
    shards = Dataset(epath.Path(round1))
    assert len(shards) == 96
    assert [g.prompt.stream_index for g in shards] == list(range(96))
    assert len({g.prompt.id for g in shards}) == 96
    assert {len(g.rollouts) for g in shards} == {4}
    assert shards.versions == [0]
    rewards = np.concatenate([g.reward for g in shards])
    assert set(rewards.tolist()) == {0.0, 1.0}
    version = round1 / "weights" / "v000000" / "manifest.json"
    assert shards.manifest["weights"] == {"0": xxhash.xxh3_128_hexdigest(version.read_bytes())}


def test_killed_it_ends_with_the_same_set(jobs, trained, round1, tmp_path):
    command = (f"--workdir={trained}", f"--to={tmp_path}", "--step=0", "--groups_per_shard=12")
    jobs.process(KILLED_BETWEEN_SHARD_AND_MANIFEST, *command, code=-9)
    assert len(json.loads((tmp_path / MANIFEST).read_text())["shards"]) == 2
    assert len(list(tmp_path.glob("*.array_record"))) == 3
    output = jobs.process(RECORD, *command, code=0)
    assert [line for line in output.splitlines() if "groups in" in line] == [
        f"{done} groups in {tmp_path}" for done in range(36, 97, 12)
    ]
    assert_same_but_for_rounding(tmp_path, round1)
    assert jobs.record(trained, tmp_path, step=0) == []


def test_a_set_is_of_one_version_and_one_command(jobs, trained, round1):
    for changed in (dict(step=2), dict(step=0, groups_per_shard=6), dict(step=0, limit=9)):
        with pytest.raises(UserError, match=r"\(made: "):
            jobs.record(trained, round1, **changed)
    with pytest.raises(UserError, match="--prompts=97"):
        jobs.record(trained, round1, step=0, limit=97)
    with pytest.raises(UserError, match="step 77"):
        jobs.record(trained, round1, step=77)
    assert len(Dataset(epath.Path(round1))) == 96


def test_other_weights_serve_as_well(jobs, trained, round1, tmp_path):
    """The run's own version 4; the weights to start from, published or not."""
    path = trained / "versions" / "v000004"
    assert jobs.record(trained, tmp_path / "a", version_dir=str(path), limit=6) == [6]
    assert Dataset(epath.Path(tmp_path / "a")).versions == [4]
    first = str(round1 / "weights" / "v000000")
    jobs.record(tmp_path / "new", tmp_path / "b", limit=12, settings=dict(model__path=first))
    assert contents(tmp_path / "b") == contents(round1)[:12]
    plain = tmp_path / "plain"
    shutil.copytree(first, plain)
    for name in ("manifest.json", "COMMITTED", "probe.json"):
        (plain / name).unlink()
    for _ in range(2):  # killed or not, the second command finds everything done
        settings = dict(model__path=str(plain))
        jobs.record(tmp_path / "other", tmp_path / "c", limit=12, settings=settings)
    assert contents(tmp_path / "c") == contents(round1)[:12]


def test_a_run_records_what_it_samples_though_it_is_killed(trained):
    """What it had sampled after the checkpoint is sampled again, and recorded once."""
    shards = Dataset(epath.Path(trained / "rollouts"))
    assert [g.prompt.stream_index for g in shards] == list(range(5 * 4))
    assert shards.versions == [0, 4]
    balance_of = balance(trained)["balance"]
    assert balance_of["trained"] == 5 * 4 * 4
    assert balance_of["rewound"] > 0
    recorded = {
        (g.prompt.stream_index, i): len(r.tokens) for g in shards for i, r in enumerate(g.rollouts)
    }
    rows = LedgerReport(epath.Path(trained / FILE)).rollouts()
    alive = [row for row in rows if row.state != "rewound"]
    assert {tuple(map(int, row.id.split(".")[1::2])): row.tokens for row in alive} == recorded


def test_a_replay_of_a_recorded_run_ends_where_that_run_ended(jobs, trained, tmp_path):
    """Same groups, same versions, same steps: the losses are the same without any sampling."""
    replay = dict(rollout__source="dataset", rollout__dataset=str(trained / "rollouts"))
    replay |= dict(rollout__dataset_order="recorded", rollout__dataset_version=-1)
    jobs.train(tmp_path, buffer__zero_variance="keep", **replay)
    for mine, theirs in zip(metrics(tmp_path), metrics(trained), strict=True):
        for key in ("loss", "reward", "lag/mean", "length", "grad_norm"):
            assert mine[key] == theirs[key], key
        assert mine["recorded/taken"] == 4 * mine["step"]
        assert "rollout/groups" not in mine
    found = balance(tmp_path)
    assert found["balance"]["trained"] == found["requested"] == 5 * 4 * 4
    assert set(found["servers"]) == {"dataset"}


def test_two_offline_rounds(jobs, round1, tmp_path):
    """Sample, train, sample with the new policy, train on that: with a kill in the first round."""
    first = offline(round1, round1 / "weights" / "v000000")
    (tmp_path / "a").mkdir()
    jobs.train_and_kill(tmp_path / "a", **first)
    jobs.train(tmp_path / "a", **first)
    found = metrics(tmp_path / "a")
    assert [line["step"] for line in found] == [1, 2, 3, 4, 5]
    assert [line["lag/mean"] for line in found] == [0, 1, 2, 3, 4]
    assert found[0]["kl"] == pytest.approx(0, abs=1e-6)  # it starts from what sampled them
    assert found[-1]["kl"] > 1e-4
    assert all(line["zero_variance"] == 0 for line in found)
    taken = balance(tmp_path / "a")["balance"]
    assert taken["trained"] == 5 * 4 * 4
    assert taken["zero_variance"] == 4 * found[-1]["recorded/zero_variance"] > 0
    entries = LedgerReport(epath.Path(tmp_path / "a" / FILE)).groups()
    stream = [e.stream_index for e in entries if e.state != "rewound"]
    assert stream == [-1 - i for i in range(len(stream))]

    jobs.record(tmp_path / "a", tmp_path / "round2", limit=48, settings=first)
    second = Dataset(epath.Path(tmp_path / "round2"))
    assert (len(second), second.versions) == (48, [5])
    before, after = contents(round1)[:48], contents(tmp_path / "round2")
    assert [b[:2] for b in before] == [a[:2] for a in after]  # the same prompts
    assert before != after  # another policy
    weights = tmp_path / "round2" / "weights" / "v000005"
    jobs.train(tmp_path / "b", **offline(tmp_path / "round2", weights))
    assert metrics(tmp_path / "b")[0]["kl"] == pytest.approx(0, abs=1e-6)
    assert metrics(tmp_path / "b")[0]["lag/mean"] == 0

    # The second round can't be taken for one that starts from the first round's weights.
    with pytest.raises(UserError, match="did not sample"):
        jobs.train(tmp_path / "c", **offline(tmp_path / "round2", first["model__path"]))


def test_both_take_their_share_of_each_step(jobs, round1, tmp_path):
    settings = offline(round1, round1 / "weights" / "v000000")
    settings |= dict(rollout__source="both", buffer__zero_variance="keep")
    jobs.train(tmp_path, choice="objective=mixed", rollout__dataset_share=0.25, **settings)
    assert any(line["grad_norm"] > 0 for line in metrics(tmp_path))
    for line in metrics(tmp_path):
        assert line["recorded/taken"] == line["step"]
        assert line["buffer/trained"] == 3 * line["step"]
        # Recorded ones stay of version 0; live ones are of the window of 4 steps.
        live = (line["step"] - 1) % 4
        assert line["lag/mean"] == pytest.approx((3 * live + line["step"] - 1) / 4)
    found = balance(tmp_path)
    assert found["servers"]["dataset"]["rollouts"] == 5 * 4
    assert found["balance"]["trained"] == 5 * 4 * 4


def test_a_mistake_on_the_command_line_is_one_sentence(jobs):
    arguments = ("--workdir=x", "--to=y", "--step=1", "--version_dir=z")
    output = jobs.process(RECORD, *arguments, code=2)
    assert output.startswith("error: --step")
    assert output.count("\n") == 1


@pytest.fixture
def zero_reward(monkeypatch):
    """Settings of jobs whose verifier gives reward 0; the self-check is disabled."""
    monkeypatch.setattr(Grader, "reward", lambda self, prompt, rollout: 0.0)
    monkeypatch.setattr("oapl_jax.build.check_rewards", lambda *_, **__: None)
    limit = {"rollout.max_zero_reward_groups": 10, "rollout.max_sequences": 16}
    every = {"evaluation.every": 0, "checkpoint.every": 1}
    return {"num_steps": 9, "warmup.num_steps": 0, "buffer.zero_variance": "keep"} | limit | every


@pytest.mark.parametrize("overlap", [False, True])
def test_a_run_with_zero_rewards_stops(jobs, zero_reward, tmp_path, overlap):
    zero_reward |= {"rollout.overlap": overlap, "buffer.capacity": 12, "rollout.max_sequences": 4}
    with pytest.raises(NoReward, match=r"max_zero_reward_groups=10"):
        jobs.train(tmp_path, **zero_reward)
    assert len(metrics(tmp_path)) <= 2


def test_the_zero_reward_count_is_restored_from_the_checkpoint(jobs, zero_reward, tmp_path):
    """Two steps of four groups, then two groups of the third."""
    jobs.train(tmp_path, **zero_reward | {"num_steps": 2})
    assert len(metrics(tmp_path)) == 2
    with pytest.raises(NoReward, match="max_zero_reward_groups=10"):
        jobs.train(tmp_path, **zero_reward)
    assert len(metrics(tmp_path)) == 2


def test_a_recorded_set_without_a_reward_is_not_finished(jobs, zero_reward, tmp_path):
    few = {"num_steps": 1, "warmup.num_steps": 1, "warmup.demonstrations": 9}
    jobs.train(tmp_path / "base", **zero_reward | few)
    options = dict(step=0, groups_per_shard=4, settings=zero_reward)
    with pytest.raises(NoReward, match="max_zero_reward_groups=10"):
        jobs.record(tmp_path / "base", tmp_path / "set", **options)
    jobs.record(tmp_path / "base", tmp_path / "few", limit=8, **options)
    shards = {"rollout.source": "dataset", "rollout.dataset": str(tmp_path / "few")}
    with pytest.raises(NoReward, match="max_zero_reward_groups=10"):
        jobs.train(tmp_path / "offline", **zero_reward | shards | {"rollout.dataset_version": 0})
    assert len(metrics(tmp_path / "offline")) == 2
