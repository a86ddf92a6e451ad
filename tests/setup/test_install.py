"""Installs that documents, messages and scripts tell: editable, with extras that setup.py has."""

import ast
import re
import shlex
import subprocess

import pytest
from fake_checkout import ROOT

TRACKED = subprocess.run(
    ["git", "ls-files"], cwd=ROOT, check=True, capture_output=True, text=True
).stdout.splitlines()
TOLD = [path for path in TRACKED if not path.startswith("tests/")]
INSTALL = re.compile(r"\bpip install ((?:(?!&&|[;|]|\bpip install\b)[^`\n])+)")
VALUED = ("-r", "--requirement", "-c", "--constraint", "-p", "--python")


def commands() -> list[tuple[str, str]]:
    """(file, words after "pip install") of each command."""
    found = []
    for path in TOLD:
        try:
            text = (ROOT / path).read_text().replace("\\\n", " ")
        except (UnicodeDecodeError, FileNotFoundError):
            continue
        found += [(path, match[1]) for match in INSTALL.finditer(text)]
    return found


def words(command: str) -> list[str]:
    """Words of a command, without a comment."""
    command = re.sub(r"(?<=\S)[.,]?[\"\s]*$", "", command)  # the end of a sentence or a string
    lexer = shlex.shlex(command, posix=True, punctuation_chars=True)
    lexer.commenters, lexer.whitespace_split = "#", True
    try:
        return list(lexer)
    except ValueError:  # a quote that the text around it ends
        return command.replace("'", " ").split()


def extras() -> set[str]:
    (call,) = [
        node
        for node in ast.walk(ast.parse((ROOT / "setup.py").read_text()))
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "setup"
    ]
    (known,) = [word.value for word in call.keywords if word.arg == "extras_require"]
    assert isinstance(known, ast.Dict)
    return {key.value for key in known.keys if isinstance(key, ast.Constant)}


def is_checkout(word: str) -> bool:
    return word == "." or word.startswith((".[", "./"))


def test_the_commands_are_found():
    files = {path for path, _ in commands()}
    assert files >= {"Makefile", "docs/plan.md", "tpu_setup/on_worker/install.sh"}
    of_checkout = {path for path, told in commands() if any(map(is_checkout, words(told)))}
    assert of_checkout >= {"Makefile", "docs/plan.md", "oapl_jax/planning/hardware.py"}


@pytest.mark.parametrize(("path", "command"), commands())
def test_an_install_of_the_checkout_is_editable(path, command):
    parts = words(command)
    for before, word in zip(["", *parts], parts, strict=False):
        assert not word.startswith("oapl_jax"), f"{path}: the package is on no index"
        if is_checkout(word) and before not in VALUED:
            assert before in ("-e", "--editable"), f"{path}: pip install {command}"
        if is_checkout(word) and "[" in word:
            named = set(word[word.index("[") + 1 : word.index("]")].split(","))
            assert named <= extras(), f"{path}: {word}"


@pytest.mark.parametrize(("path", "command"), commands())
def test_files_that_an_install_names_exist(path, command):
    for name in re.findall(r"requirements/[\w.-]+", command):
        assert (ROOT / name).exists(), f"{path}: {name}"
