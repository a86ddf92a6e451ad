"""The command line: help, and where a run may live."""

import errno
import json
import os
import re
import signal
import subprocess
import sys

import pytest
from absl.testing import flagsaver
from bucket import emulated
from etils import epath
from small_runs import opened

from configs import arithmetic
from oapl_jax import report
from oapl_jax.config import (
    Config,
    changed_settings,
    load_config,
    save_config,
    sections,
    settings_of,
)
from oapl_jax.errors import UserError, exit_with_code
from oapl_jax.files import absolute
from oapl_jax.launch import origins, read_command_line


def read(monkeypatch, workdir, *words):
    command = ["train", "--config=configs/arithmetic.py", f"--workdir={workdir}", *words]
    monkeypatch.setattr(sys, "argv", command)
    with flagsaver.flagsaver():
        return read_command_line()[1]


def test_the_settings_of_a_run_stand_in_for_a_configuration_where_they_may(monkeypatch, tmp_path):
    config = arithmetic.get_config("objective=grpo")
    config.lag.steps = 7
    saved = Config.from_dict(config.to_dict()).to_dict()
    save_config(epath.Path(tmp_path), saved)
    monkeypatch.setattr(sys, "argv", ["evaluate", f"--workdir={tmp_path}"])
    with flagsaver.flagsaver():
        assert read_command_line(or_saved=True)[0].to_dict() == saved
        with pytest.raises(UserError, match="--config"):
            read_command_line()


def test_a_workdir_is_the_same_from_any_directory(monkeypatch, tmp_path):
    here = os.getcwd()
    assert os.fspath(read(monkeypatch, "runs/../a")) == f"{here}/a"
    assert os.fspath(read(monkeypatch, tmp_path)) == os.fspath(tmp_path)


def test_a_workdir_in_a_bucket_is_no_local_name(monkeypatch):
    with emulated("fleet"):
        assert os.fspath(read(monkeypatch, "gs://fleet/run")) == "gs://fleet/run"
        with pytest.raises(UserError, match=r"--workdir=gs://nobody/run"):
            read(monkeypatch, "gs://nobody/run")


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--config.num_step=1"], "num_steps"),
        (["--config.total_steps=9"], "num_steps"),
        (["--config.rewards.math.second=9"], "seconds"),
        (["--config.learning_rate=1e-3"], r"optim\.learning_rate"),
        (["--config.optim.group_size=9"], "group_size"),
        (["--config.num_steps=many"], "num_steps"),
        (["--config.num_steps=1" + "0" * 400], "num_steps"),
        (["--config.optim.learning_rate=1" + "0" * 400], r"learning_rate"),
        (["--config=configs/arithmetic.py:task=sums"], r"task=chain_sum\|"),
        (["--config=configs/nothing.py"], r"configs/nothing\.py"),
    ],
)
def test_a_mistake_on_the_command_line_names_its_setting(monkeypatch, words, named):
    with pytest.raises(UserError, match=named):
        read(monkeypatch, "x", *words)


@pytest.mark.parametrize(
    ("command", "flag"),
    [(["--config=configs/arithmetic.py"], "--workdir"), (["--workdir=x"], "--config")],
)
def test_a_missing_flag_is_named(monkeypatch, command, flag):
    monkeypatch.setattr(sys, "argv", ["train", *command])
    with flagsaver.flagsaver(), pytest.raises(UserError, match=flag):
        read_command_line()


@pytest.mark.parametrize("sampler", ["local", "fleet"])
@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("fleet.servers", "('http://10.0.0.2:30000', '10.0.0.3:30000')"),
        ("fleet.router", "10.0.0.3:30000"),
        ("preferences.language_model.servers", "('10.0.0.3:30000',)"),
    ],
)
def test_a_malformed_address_is_named_with_its_setting(monkeypatch, sampler, setting, value):
    words = (f"--config.{setting}={value}", f"--config.rollout.sampler={sampler}")
    with pytest.raises(UserError, match=rf"{setting} .*10\.0\.0\.3:30000"):
        read(monkeypatch, "x", *words)


@pytest.mark.parametrize(
    ("number", "code"),
    [
        *((errno.ENOSPC, 1), (errno.EMFILE, 1), (errno.EIO, 1), (errno.ESTALE, 1)),
        *((errno.ENOENT, 2), (errno.EACCES, 2), (errno.ELOOP, 2), (errno.ENOTDIR, 2)),
    ],
)
def test_an_error_of_the_operating_system_is_one_sentence_with_the_file(capsys, number, code):
    def command():
        raise OSError(number, os.strerror(number), "/runs/a")

    with pytest.raises(SystemExit) as end:
        exit_with_code(command)
    assert end.value.code == code
    said = capsys.readouterr().err
    assert said.startswith("error: /runs/a")
    assert said.count("\n") == 1


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("write() failed: No space left on device; writing /runs/a"),  # array_record
        ValueError("RESOURCE_EXHAUSTED: /runs/a: No space left on device [28]"),  # TensorStore
        ValueError("RESOURCE_EXHAUSTED: /runs/a: Disk quota exceeded [122]"),
    ],
)
def test_a_full_disk_in_the_words_of_a_library_is_one_sentence_too(capsys, error):
    def command():
        raise error

    with pytest.raises(SystemExit) as end:
        exit_with_code(command)
    assert end.value.code == 1
    said = capsys.readouterr().err
    assert "/runs/a" in said
    assert said.count("\n") == 1


@pytest.mark.parametrize("command", ["train", "evaluate", "record"])
def test_an_interrupt_before_the_run_is_one_line(tmp_path, command):
    config = tmp_path / "slow.py"
    config.write_text("import time\nprint('loading', flush=True)\ntime.sleep(600)\n")
    # With default signals: a command in the background ignores some.
    python = ["env", "--default-signal", sys.executable]
    process = subprocess.Popen(
        [*python, "-m", f"oapl_jax.{command}", f"--config={config}", "--workdir=x"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    try:
        assert process.stdout.readline() == "loading\n"
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=60)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == -signal.SIGINT
    assert "Ctrl-C" in said
    assert said.count("\n") == 1


@pytest.mark.parametrize("workdir", ["", "runs/[a]", "runs/a*", "runs/a\\\\b"])
def test_a_workdir_that_can_not_be_is_refused(monkeypatch, workdir):
    with pytest.raises(UserError, match="--workdir"):
        read(monkeypatch, workdir)


def test_a_workdir_at_home(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert os.fspath(read(monkeypatch, "~/a")) == f"{tmp_path}/a"


@pytest.mark.parametrize("word", ["num_steps=3", "+config.num_steps=3", "config.num_steps=3"])
def test_a_word_without_dashes_is_refused(monkeypatch, tmp_path, word):
    with pytest.raises(UserError, match=re.escape(word)):
        read(monkeypatch, tmp_path, word)


def test_a_path_in_a_bucket_is_absolute_already():
    assert os.fspath(absolute("gs://fleet/versions")) == "gs://fleet/versions"
    assert os.fspath(absolute("versions")) == f"{os.getcwd()}/versions"


def test_help_names_the_flags_and_ends(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["train", "--help"])
    with pytest.raises(SystemExit) as end:
        read_command_line()
    assert not end.value.code
    said = capsys.readouterr().out
    assert "--workdir" in said
    assert "--config.NAME=VALUE" in said
    groups = [line.partition(":")[0] for line in said.splitlines() if line[:1].isalpha()]
    for path, section in sections():
        assert not settings_of(section, path) or (path or "the whole run") in groups
        for setting in settings_of(section, path):
            assert f"  {setting.name} (" in said


@pytest.mark.parametrize(
    ("words", "setting", "value", "place"),
    [
        (["--config.lag.steps=8"], "lag.steps", 8, "the command line"),
        ([], "lag.steps", 16, "configs/arithmetic.py"),
        (["--config=configs/arithmetic.py:objective=grpo"], "objective.name", "grpo", "grpo"),
        (
            ["--config=configs/arithmetic.py:objective=grpo"],
            "seed",
            0,
            "configs/arithmetic.py",
        ),
        (["--config.rollout.max_response_tokens=9"], "evaluation.max_response_tokens", 9, "follow"),
        (["--config.evaluation.ks=(1,2)"], "evaluation.ks", [1, 2], "the command line"),
        (["--config.objective.gspo.clip_low=0.1"], "objective.gspo.clip_low", 0.1, "command line"),
        ([], "releases", "", "oapl_jax/config.py"),
    ],
)
def test_the_origin_of_a_value(monkeypatch, tmp_path, words, setting, value, place):
    command = ["train", "--config=configs/arithmetic.py", f"--workdir={tmp_path}", *words]
    monkeypatch.setattr(sys, "argv", command)
    with flagsaver.flagsaver():
        found = origins(read_command_line()[0])
    assert found[setting][0] == value
    assert place in found[setting][1]


# The workdir's configuration

CONFIG = {
    "seed": 0,
    "num_steps": 100,
    "group_size": 8,
    "groups_per_step": 4,
    "model": {"path": "", "architecture": {"hidden_size": 32}},
    "data": {"task": "sum"},
    "warmup": {"num_steps": 10, "optim": {"learning_rate": 0.1}},
    "optim": {"learning_rate": 0.01},
    "mesh": {"data": 1},
    "lag": {"mode": "window", "steps": 4},
    "buffer": {"mode": "replay", "max_age": None},
    "evaluation": {"every": 5, "n": 8, "ks": (1, 8)},
    "modelling": 1,
}


def changed(**changes):
    """CONFIG with dotted keys set, or removed where the value is ...."""
    config = json.loads(json.dumps(CONFIG))
    for key, value in changes.items():
        *sections, last = key.split("__")
        at = config
        for section in sections:
            at = at.setdefault(section, {})
        at[last] = value
        if value is ...:
            del at[last]
    return config


@pytest.fixture
def saved(tmp_path):
    """A workdir with CONFIG."""
    save_config(epath.Path(tmp_path), CONFIG)
    return epath.Path(tmp_path)


def test_the_same_configuration_is_welcome(saved):
    assert load_config(saved) == changed()
    assert changed_settings(saved, CONFIG) == []
    assert [p.name for p in saved.iterdir()] == ["config.json"]


def test_a_new_workdir_has_nothing_to_differ_from(tmp_path):
    assert changed_settings(epath.Path(tmp_path / "new"), CONFIG) == []
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("content", ["", "[1]", "\0\0", '{"a": ', '{"model_type": "qwen3"}'])
def test_a_damaged_configuration_is_named(saved, content):
    (saved / "config.json").write_text(content)
    with pytest.raises(UserError, match=r"config\.json"):
        load_config(saved)


def test_checkpoints_without_their_configuration_are_refused(saved):
    (saved / "checkpoints" / "3").mkdir(parents=True)
    assert changed_settings(saved, CONFIG) == []
    (saved / "config.json").unlink()
    for read_workdir in (load_config, lambda workdir: changed_settings(workdir, CONFIG)):
        with pytest.raises(UserError, match=r"config\.json"):
            read_workdir(saved)
    (saved / "checkpoints" / "3").rename(saved / "checkpoints" / "3.orbax-checkpoint-tmp")
    assert load_config(saved) is None  # never finished


def test_harmless_differences_are_reported_and_saved(saved):
    other = changed(num_steps=200, optim__learning_rate=0.02, mesh__data=8, modelling=2)
    assert changed_settings(saved, other) == [
        "mesh.data: 1 -> 8",
        "modelling: 1 -> 2",
        "num_steps: 100 -> 200",
        "optim.learning_rate: 0.01 -> 0.02",
    ]
    assert load_config(saved) == changed()
    save_config(saved, other)
    assert load_config(saved) == other
    assert changed_settings(saved, other) == []


@pytest.mark.parametrize(
    "key",
    [
        "seed",
        "group_size",
        "groups_per_step",
        "model__architecture__hidden_size",
        "data__task",
        "warmup__optim__learning_rate",
        "lag__mode",
        "lag__steps",
        "buffer__mode",
        "evaluation__n",
        "evaluation__ks",
    ],
)
def test_structural_differences_are_refused(saved, key):
    before = (saved / "config.json").read_text()
    with pytest.raises(UserError, match=re.escape(key.replace("__", ".") + ": ")):
        changed_settings(saved, changed(**{key: 77}))
    assert (saved / "config.json").read_text() == before


def test_all_refused_keys_are_listed_and_no_other(saved):
    other = changed(
        seed=1,
        data__task=...,
        data__name="sum",
        buffer__max_age=...,
        optim__b1=None,
        num_steps=7,
    )
    with pytest.raises(UserError) as caught:
        changed_settings(saved, other)
    message = str(caught.value)
    assert str(saved) in message
    assert "another --workdir" in message
    for difference in (
        "seed: 0 -> 1",
        "data.task: sum -> absent",
        "data.name: absent -> sum",
        "buffer.max_age: None -> absent",
        "optim.b1: absent -> None",
    ):
        assert difference in message
    assert "num_steps" not in message


def test_every_command_refuses_a_workdir_of_another_format(tmp_path, monkeypatch):
    """As version 0.1 wrote them, without a format."""
    workdir, config = epath.Path(tmp_path), arithmetic.get_config()
    (workdir / "config.json").write_text(json.dumps(config.to_dict()))
    (workdir / "ledger.jsonl").write_text('{"event": "resume", "position": 0, "held": []}\n')
    monkeypatch.setattr(sys, "argv", ["report", str(workdir)])
    for command in (
        lambda: changed_settings(workdir, config.to_dict()),
        lambda: opened(config, workdir).params_at(None),
        report.main,
    ):
        with pytest.raises(UserError, match="format"):
            command()
