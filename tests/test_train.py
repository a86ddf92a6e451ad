"""The whole loop in real processes: results, lag, kills, signals, meshes, and what it says of
mistakes."""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from etils import epath
from made_runs import header_of
from small_runs import ROOT, Runs, metrics, small_arithmetic, timeless, typed

from oapl_jax import train
from oapl_jax.build import Run
from oapl_jax.config import Config, load_config
from oapl_jax.errors import UserError
from oapl_jax.publish import publish_step
from oapl_jax.report import open_runs, report_data
from oapl_jax.rollout.dataset import Dataset
from oapl_jax.rollout.kept import read_notes, token_gaps
from oapl_jax.structs import encode_groups

# For tests that read neither the warm-up nor evaluations.
ONLY_RL = {"evaluation.every": 0, "warmup.num_steps": 0}


@pytest.fixture(scope="module")
def unbroken(runs, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("unbroken")
    output = runs.run(workdir)
    return workdir, output


@pytest.fixture
def copy(unbroken, tmp_path):
    """A finished run that a test may spoil."""
    shutil.copytree(unbroken[0], tmp_path / "run")
    return tmp_path / "run"


def final_parameters(runs: Runs, workdir: Path) -> dict[str, np.ndarray]:
    """The arrays of the newest checkpoint, read by Orbax without any of our code."""
    code = (
        "import sys, jax, numpy as np, orbax.checkpoint as ocp\n"
        "m = ocp.CheckpointManager(sys.argv[1])\n"
        "p = m.restore(m.latest_step(), args=ocp.args.Composite("
        "params=ocp.args.StandardRestore(), optimizer=ocp.args.StandardRestore()))\n"
        "flat = jax.tree_util.tree_leaves_with_path((p.params, p.optimizer))\n"
        "np.savez(sys.argv[2], **{jax.tree_util.keystr(k): np.asarray(v) for k, v in flat})\n"
    )
    target = workdir / "parameters.npz"
    command = [sys.executable, "-c", code, str(workdir / "checkpoints"), str(target)]
    subprocess.run(command, check=True, env=runs.environment(1), capture_output=True)
    with np.load(target) as arrays:
        return dict(arrays)


def test_programs_are_kept_and_none_is_new_after_the_first_evaluation(runs, unbroken):
    compiled = [line["compile/programs"] for line in metrics(unbroken[0])]
    # The validation split, met after step 5, ends with a batch of another size than the test split.
    assert compiled == [compiled[0]] * 5 + [compiled[5]] * 7
    kept = {file.name.split("-")[0] for file in Path(os.environ["TEST_PROGRAMS"]).glob("*-cache")}
    assert kept >= {"jit_train_step", "jit_logp_step", "jit_decode"}


def test_a_run_writes_metrics_results_and_a_picture(unbroken):
    workdir, output = unbroken
    lines = metrics(workdir)
    assert [line["step"] for line in lines] == list(range(1, 13))
    for line in lines:
        for key in (
            "loss",
            "reward",
            "lag/mean",
            "kl",
            "entropy",
            "grad_norm",
            "length",
            "truncated",
        ):
            assert np.isfinite(line[key]), key
        # The window of 4 steps: a rollout of step s comes from the version published at s - s % 4.
        assert line["lag/mean"] == line["lag/max"] == (line["step"] - 1) % 4
        assert line["buffer/trained"] == line["step"] * 4
    assert {k for k in lines[4] if k.startswith("eval/pass")} == {"eval/pass@1", "eval/pass@4"}
    assert "eval/pass@1" not in lines[3]
    result = json.loads((workdir / "result.json").read_text())
    assert {"pass@1", "pass@4", "greedy", "length", "entropy"} <= set(result["before"]) & set(
        result["after"]
    )
    assert result["seconds"]["rl"] > 0
    assert (workdir / "learning.png").read_bytes().startswith(b"\x89PNG")
    assert list((workdir / "tensorboard").iterdir())
    assert "pass@1" in output
    assert "before" in output
    # At the last publication, step 8, the checkpoints of steps 3 and 6 still needed the older two.
    versions = {path.name for path in (workdir / "versions").iterdir()}
    assert versions == {"v000000", "v000004", "v000008"}
    assert sorted(int(p.name) for p in (workdir / "checkpoints").iterdir()) == [9, 12]


def test_a_default_run_keeps_groups_for_the_report(unbroken):
    """One in ten prompts, with verdicts, and the learner's log-probs at the step of the group."""
    workdir = epath.Path(unbroken[0])
    kept = list(Dataset(workdir / "rollouts"))
    indices = [group.prompt.stream_index for group in kept]
    assert indices == list(range(0, 60, 10))  # windows of 16 groups, each sampled six at a time
    notes = read_notes(workdir / "rollouts", indices)
    for group in kept:
        note = notes[group.prompt.stream_index]
        verdicts = [verdict for _, verdict, _ in note["grades"]]
        assert [verdict == "right" for verdict in verdicts] == (group.reward == 1).tolist()
        if "step" not in note:
            continue  # it expired with its window
        assert note["reward"] == group.reward.tolist()
        gap = token_gaps(note)
        assert len(gap) == sum(len(rollout.tokens) for rollout in group.rollouts)
        lag = note["step"] - group.policy_version
        assert (np.abs(gap).max() < 1e-3) == (lag == 0)


def test_the_report_of_a_run_has_every_figure(unbroken):
    data = report_data(open_runs([epath.Path(unbroken[0])], 0), 0, 10**6, "")
    figures = header_of(data)["figures"]
    assert len(figures) == 19
    assert all(figure["data"] for figure in figures)


def lines_written(workdir: Path) -> int:
    path = workdir / "metrics.jsonl"
    return path.read_text().count("\n") if path.exists() else 0


def test_killed_at_random_points_it_ends_in_the_same_bits(runs, unbroken, tmp_path):
    """SIGKILL three times, at moments that a seed draws from the unbroken run's own length."""
    moments = random.Random(20)
    workdir = tmp_path / "killed"
    for _ in range(3):
        wanted = moments.randint(1, 3) + lines_written(workdir)
        process = runs.start(runs.command(workdir))
        while lines_written(workdir) < wanted:
            assert process.poll() is None, "the run ended before it was killed three times"
            time.sleep(0.005)
        time.sleep(moments.random() * 0.2)  # in sampling, the step, a save, a publication
        process.kill()
        process.communicate()
    runs.run(workdir)
    expected, found = metrics(unbroken[0]), metrics(workdir)
    assert [timeless(line) for line in found] == [timeless(line) for line in expected]
    parameters, reference = final_parameters(runs, workdir), final_parameters(runs, unbroken[0])
    assert parameters.keys() == reference.keys()
    for name, value in reference.items():
        np.testing.assert_array_equal(parameters[name], value, err_msg=name)
    kept = [list(Dataset(epath.Path(w) / "rollouts")) for w in (unbroken[0], workdir)]
    assert encode_groups(kept[0]) == encode_groups(kept[1])


def test_a_signal_saves_and_leaves(runs, unbroken, tmp_path):
    workdir = tmp_path / "stopped"
    done = 0
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        # With default signals: a command in the background or of nohup ignores some.
        process = runs.start(["env", "--default-signal", *runs.command(workdir)])
        while lines_written(workdir) <= done:
            assert process.poll() is None, process.communicate()[0]
            time.sleep(0.01)
        process.send_signal(number)
        output, _ = process.communicate(timeout=120)
        assert process.returncode == 0, output
        assert number.name in output
        assert not done or f"step {done}" in output
        (last,) = [line for line in output.splitlines() if "saved:" in line]
        done = metrics(workdir)[-1]["step"]
        assert done < 12
        assert f"saved: step {done} in {workdir}" in last
        assert "lost: no finished step" in last
        assert "-m oapl_jax.train --config=configs/arithmetic.py" in last.partition("resume:")[2]
        assert f"--workdir={workdir}" in last
        assert str(done) in {p.name for p in (workdir / "checkpoints").iterdir()}
    assert f"step {done}" in runs.run(workdir)
    assert [timeless(x) for x in metrics(workdir)] == [timeless(x) for x in metrics(unbroken[0])]


def test_a_dry_run_describes_the_run_and_writes_nothing(runs, unbroken, tmp_path):
    workdir, settings = tmp_path / "new", {"data.data_dir": str(tmp_path / "data")}
    command = [*runs.command(workdir, **settings), "--dry-run"]
    output, _ = (process := runs.start(command)).communicate(timeout=120)
    assert process.returncode == 0, output
    assert not list(tmp_path.iterdir())
    for shown in (
        "lag.steps = 4  (the command line)",
        "lag.mode = 'window'  (configs/arithmetic.py)",
        "begins at step 0, ends after step 12; 6 steps of the warm-up",
        "48 groups of 4 trained on, lag window 4, 3 versions",
        "3 evaluations, 5 checkpoints",
        "16 sequences a step",
        "temporaries of the train step",
        f"jax {jax.__version__}",
        f"in {workdir}:",
        str(tmp_path / "data"),
    ):
        assert shown in output
    parameters = re.search(r"([\d,]+) parameters", output)
    assert parameters
    saved = final_parameters(runs, unbroken[0]).items()
    learned = sum(array.size for name, array in saved if name.startswith("[0]"))
    assert int(parameters[1].replace(",", "")) == learned
    finished = runs.run(unbroken[0], "--dry-run")
    assert "resumes at step 12, ends after step 12" in finished
    assert "0 groups" in finished


def test_a_stop_in_the_warm_up_is_acknowledged_and_acts_after_its_step(runs, tmp_path):
    settings = {"warmup.num_steps": 10**6, "evaluation.every": 0}
    process = runs.start(runs.command(tmp_path, **settings))
    try:
        while not (tmp_path / "model" / "config.json").exists():
            assert process.poll() is None, process.communicate()[0]
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        output, _ = process.communicate(timeout=240)
    finally:
        process.kill()
    assert process.returncode == 0, output
    assert "SIGINT" in output
    assert "saved: nothing" in output
    assert "begin again: " in output
    assert not (tmp_path / "config.json").exists()
    assert not (tmp_path / "lease.json").exists()


def test_restores_on_another_mesh(runs, copy):
    before = json.loads((copy / "result.json").read_text())
    runs.run(
        copy,
        devices=8,
        num_steps=14,
        mesh__data=2,
        mesh__fsdp=2,
        mesh__tensor=2,
        # a vocabulary of 16 characters and specials must divide over the tensor axis
    )
    lines = metrics(copy)
    assert [line["step"] for line in lines] == list(range(1, 15))
    assert json.loads((copy / "result.json").read_text())["before"] == before["before"]


@pytest.mark.parametrize(
    ("devices", "meshes", "sizes"),
    [
        (1, {}, (1, 1)),
        (8, dict(rollout__devices=4), (4, 4)),  # side by side
        (8, dict(rollout__mesh__tensor=2), (8, 8)),  # in turns, on the same devices
    ],
)
def test_overlap_samples_beside_the_learner(runs, tmp_path, devices, meshes, sizes):
    settings = dict(rollout__overlap=True, buffer__capacity=16, num_steps=16)
    runs.run(tmp_path, devices=devices, **settings, **meshes, **ONLY_RL)
    lines = metrics(tmp_path)
    assert [line["step"] for line in lines] == list(range(1, 17))
    assert all(0 <= line["lag/mean"] < 4 for line in lines)
    assert all("learner/waiting_seconds" in line for line in lines)
    assert any("rollout/waiting_seconds" in line for line in lines)
    last = lines[-1]
    held = last["buffer/added"] - sum(last.get(f"buffer/{k}", 0) for k in ("trained", "expired"))
    assert 0 <= held <= 16
    if devices == jax.device_count():
        run = Run(Config.from_dict(load_config(epath.Path(tmp_path)) or {}), epath.Path(tmp_path))
        learner, sampler = (set(mesh.devices.flat) for mesh in (run.mesh, run.sampler_mesh))
        assert (len(learner), len(sampler)) == sizes
        assert bool(learner & sampler) == (sizes == (8, 8))


@pytest.mark.parametrize(("mode", "buffer"), [("fixed", "keep_with_anchor"), ("uniform", "replay")])
def test_lag_modes_are_measured(runs, tmp_path, mode, buffer):
    settings = dict(lag__mode=mode, buffer__mode=buffer, rollout__prompts_per_call=4)
    runs.run(tmp_path, **settings, num_steps=8, **ONLY_RL)
    lines = metrics(tmp_path)
    if mode == "fixed":
        assert [line["lag/mean"] for line in lines] == [0, 1, 2, 3, 4, 4, 4, 4]
    else:
        assert all(line["lag/mean"] >= 0 for line in lines)
        assert len({line["lag/mean"] for line in lines}) > 2


@pytest.fixture(scope="module")
def warmed_up(runs, tmp_path_factory):
    """Settings of a run from a policy that solves some of the easiest problems."""
    workdir = tmp_path_factory.mktemp("warmed_up")
    easiest = {f"data.generator.{bound}_terms": 2 for bound in ("min", "max")}
    easiest |= {"data.train_size": 50, "data.validation_size": 4, "data.test_size": 4}
    runs.run(workdir, **easiest, num_steps=0, evaluation__every=0, warmup__num_steps=100)
    policy = publish_step(epath.Path(workdir), 0, epath.Path(workdir / "policy"), dtype=None)
    return {**easiest, **ONLY_RL, "model.path": policy, "seed": 1}


def test_the_learners_denominator_is_the_samplers(runs, warmed_up, tmp_path):
    # One window: the rollouts are the same. A small eps would make Adam's steps of rounding errors.
    settings = {**warmed_up, "num_steps": 4, "optim.eps": 1e-3}
    # No version follows before the end, which a line says.
    assert "lag.steps=4" in runs.run(tmp_path / "sampler", **settings)
    runs.run(tmp_path / "learner", **settings, **{"objective.denominator": "learner"})
    theirs, mine = metrics(tmp_path / "sampler"), metrics(tmp_path / "learner")
    assert sum(line["reward"] for line in theirs) > 0
    for a, b in zip(mine, theirs, strict=True):
        assert a["reward"] == b["reward"]
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-4)
        assert a["kl"] == pytest.approx(b["kl"], abs=1e-5)
    # At the head of the window the two policies are one: the learner sees its own log-probs.
    assert mine[0]["kl"] < theirs[0]["kl"]


def test_grpo_runs_by_its_name_alone(runs, tmp_path):
    runs.run(tmp_path, objective__name="grpo", num_steps=4, **ONLY_RL)
    assert "clip_fraction" in metrics(tmp_path)[-1]


@pytest.mark.parametrize("name", ["tba", "grpo"])
def test_a_reference_policy_is_version_0_to_the_end(runs, warmed_up, tmp_path, name):
    """As a denominator or by a KL; over a resume; and it is the policy of the start itself."""
    settings = {"config": f":objective={name}", "lag.steps": 2, **warmed_up}
    settings |= {"learner.micro_batches": 2, "group_size": 8, "rollout.max_sequences": 48}
    settings |= {"objective.kl_weight": 0.1} if name == "grpo" else {}
    settings |= {"optim.learning_rate": 2e-3}  # far enough from the start after two steps
    runs.run(tmp_path, **settings, num_steps=6)
    runs.run(tmp_path, **settings)
    assert (tmp_path / "versions" / "v000000" / "COMMITTED").exists()
    lines = metrics(tmp_path)
    assert sum(line["reward"] for line in lines) > 0
    # The spread of log-ratios, nats: the objective compares with the reference.
    distance = [line["reference_kl" if name == "grpo" else "log_ratio/wrong_std"] for line in lines]
    assert distance[0] < (1e-6 if name == "grpo" else 1e-3)
    assert min(distance[2:]) > (1e-5 if name == "grpo" else 1e-2)
    # The drift is from pi_lag, to which the learner is back at every second step.
    drift = [line["kl"] for line in lines]
    assert 10 * max(drift[::2]) < min(drift[1::2])


def test_evaluate_grades_any_checkpoint(runs, unbroken):
    workdir, _ = unbroken
    output = runs.run(workdir, module="evaluate")
    result = json.loads(output.splitlines()[-1])
    after = json.loads((workdir / "result.json").read_text())["after"]
    assert result == after
    earlier = json.loads(runs.run(workdir, "--step=9", module="evaluate").splitlines()[-1])
    assert earlier["version"] == 9
    output = runs.run(workdir, "--step=7", module="evaluate", code=2)
    assert "step 7" in output
    assert "9, 12" in output


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--config=configs/arithmetic.py", "--wrokdir=x"], "workdir"),
        (["--config=configs/arithmetic.py", "--config.lag.stepz=1"], "steps"),
    ],
)
def test_a_mistake_on_the_command_line_is_one_sentence(arguments, words):
    """tests/test_launch.py has more of them."""
    command = [sys.executable, "-m", "oapl_jax.train", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert words in done.stderr


@pytest.mark.parametrize(  # tests/test_config.py has those that need neither files nor devices
    ("settings", "setting"),
    [
        ({"mesh.data": 3}, "mesh.data=3"),
        ({"learner.row_length": 16}, "learner.row_length"),
        ({"data.max_prompt_tokens": 5}, "data.max_prompt_tokens"),
        ({"model.architecture.max_position_embeddings": 20}, "max_position_embeddings"),
        ({"model.path": "/no/such/model"}, "/no/such/model"),
    ],
)
def test_a_mistake_names_its_setting_before_any_step(runs, tmp_path, settings, setting):
    shared = {"data.data_dir": str(runs.data_dir), "data.train_size": 200}
    config = small_arithmetic({**shared, **settings})
    with pytest.raises(UserError, match=setting):
        train.run(typed(config), epath.Path(tmp_path), SimpleNamespace(requested=""))
    assert not (tmp_path / "metrics.jsonl").exists()
    assert not (tmp_path / "config.json").exists()
    assert not (tmp_path / "lease.json").exists()


@pytest.mark.parametrize("step", [0, 3, -1])
def test_a_step_to_restore_that_does_not_exist_is_named_before_any_work(tmp_path, step):
    stop = SimpleNamespace(requested="")
    with pytest.raises(UserError, match=f"step {step} "):
        train.run(typed(small_arithmetic({})), epath.Path(tmp_path), stop, restore_step=step)
    assert not (tmp_path / "model").exists()
    assert not (tmp_path / "config.json").exists()


def test_sizes_that_follow_from_devices_are_saved_as_given(runs, tmp_path, monkeypatch):
    """A run of one device is read on eight, without its configuration."""
    follow = {"learner.rows_multiple": 0, "buffer.capacity": 0, "mesh.data": 1, "mesh.fsdp": -1}
    settings = {**ONLY_RL, **follow, "data.data_dir": str(runs.data_dir), "num_steps": 0}
    workdir, one = epath.Path(tmp_path), jax.devices()[:1]
    with monkeypatch.context() as patch:
        patch.setattr(jax, "devices", lambda: one)
        config = typed(small_arithmetic({**settings, "data.train_size": 200}))
        train.run(config, workdir, SimpleNamespace(requested=""))
    saved = load_config(workdir) or {}
    assert saved == config.to_dict()
    run = Run(Config.from_dict(saved), workdir)
    assert (run.mesh.size, run.config.learner.rows_multiple) == (8, 8)
    assert run.config.buffer.capacity > 0
    assert run.params_at(None)[0] == 0
    run.close()


def test_a_workdir_of_another_structure_is_refused(runs, copy):
    saved = (copy / "config.json").read_text()
    output = runs.run(copy, code=2, group_size=2, model__architecture__hidden_size=64)
    assert "group_size: 4 -> 2" in output
    assert "model.architecture.hidden_size: 32 -> 64" in output
    assert (copy / "config.json").read_text() == saved
    assert "changed since this run began: optim.learning_rate" in runs.run(
        copy, optim__learning_rate=1e-5
    )


@pytest.mark.parametrize("damage", ["missing", "half-written", "corrupted"])
def test_a_damaged_version_is_refused(runs, copy, damage):
    version = copy / "versions" / "v000008"
    for step in (copy / "checkpoints").iterdir():
        if step.name == "12":  # so that it resumes at step 9, in the window of version 8
            shutil.rmtree(step)
    if damage == "missing":
        shutil.rmtree(version)
    elif damage == "half-written":
        (version / "COMMITTED").unlink()
    else:
        corrupt(version)
        shutil.rmtree(copy / "weights" / "8")
    output = runs.run(copy, code=2)
    assert "v000008" in output
    assert "Traceback" not in output
    assert (copy / "checkpoints" / "9").exists()


def test_a_corrupted_version_is_restored_from_its_orbax_step(runs, unbroken, copy):
    shutil.rmtree(copy / "checkpoints" / "12")
    corrupt(copy / "versions" / "v000008")
    output = runs.run(copy)
    assert "version 8 was damaged" in output
    assert "model.safetensors" in output
    assert [timeless(x) for x in metrics(copy)] == [timeless(x) for x in metrics(unbroken[0])]
    assert not list((copy / "versions").glob("*.*"))


def corrupt(version):
    weights = version / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4] + b"\x00\x00\x80\x3f")


def test_a_damaged_checkpoint_is_named_and_an_older_one_resumes_on_request(runs, unbroken, copy):
    state = copy / "host_states" / "12" / "host0of1"
    content = bytearray(state.read_bytes())
    content[-1] ^= 1
    state.write_bytes(content)
    output = runs.run(copy, code=2)
    assert "step 12" in output
    assert "--restore_step=9" in output
    assert "Traceback" not in output
    output = runs.run(copy, "--restore_step=9")
    assert "step 12" in output or "steps 12" in output  # removed, with a line
    assert [timeless(x) for x in metrics(copy)] == [timeless(x) for x in metrics(unbroken[0])]


def test_three_non_finite_steps_end_the_run_and_keep_the_checkpoint(runs, tmp_path):
    mistake = dict(optim__learning_rate=1e30, optim__warmup_steps=0)
    output = runs.run(tmp_path, code=1, **mistake, **ONLY_RL)
    assert "optim.learning_rate" in output
    assert "Traceback" not in output
    assert "failed (NotFinite); saved: step 0 in" in output
    assert [path.name for path in (tmp_path / "checkpoints").glob("[0-9]*")] == ["0"]
    assert metrics(tmp_path)[-1]["skipped_in_a_row"] == 3
