"""The command line: help, and where a run may live."""

import os
import sys

import pytest

from oapl_jax.errors import UserError
from oapl_jax.files import absolute
from oapl_jax.launch import read_command_line


def read(monkeypatch, workdir):
    command = ["train", "--config=configs/arithmetic.py", f"--workdir={workdir}"]
    monkeypatch.setattr(sys, "argv", command)
    return read_command_line()[1]


def test_a_workdir_is_the_same_from_any_directory(monkeypatch, tmp_path):
    here = os.getcwd()
    assert os.fspath(read(monkeypatch, "runs/../a")) == f"{here}/a"
    assert os.fspath(read(monkeypatch, tmp_path)) == os.fspath(tmp_path)


def test_a_workdir_in_a_bucket_is_refused_and_no_local_name(monkeypatch):
    with pytest.raises(UserError, match=r"--workdir=gs://fleet/run is in an object store"):
        read(monkeypatch, "gs://fleet/run")


def test_a_path_in_a_bucket_is_absolute_already():
    assert os.fspath(absolute("gs://fleet/versions")) == "gs://fleet/versions"
    assert os.fspath(absolute("versions")) == f"{os.getcwd()}/versions"


def test_help_names_the_flags_and_ends(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["train", "--help"])
    with pytest.raises(SystemExit) as end:
        read_command_line()
    assert not end.value.code
    said = capsys.readouterr().out
    assert "  --workdir: directory of the run" in said
    assert "--config.NAME=VALUE" in said
