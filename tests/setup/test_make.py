"""Every make target that the documentation names: its commands exist and their imports install."""

import ast
import importlib.metadata
import importlib.util
import pathlib
import re
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")]
NAMED = sorted(
    {t for page in PAGES for t in re.findall(r"`?make ([a-z][a-z0-9-]+)", page.read_text())}
)
TARGETS = re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.M)[1].split()


def commands(target: str) -> list[str]:
    """The commands of a target and of all that it needs, which --always-make takes for missing.

    A loop of the shell is unrolled.
    """
    done = subprocess.run(
        ["make", "--dry-run", "--always-make", target],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    lines = done.stdout.replace("\\\n", " ").splitlines()
    return [command for line in lines for command in unrolled(line)]


def unrolled(line: str) -> list[str]:
    if not (loop := re.match(r"for (\w+) in ([\w ]+); do (.*); done", line)):
        return [line]
    name, values, body = loop.groups()
    variable = re.compile(rf"\${name}\b|\$\{{{name}\}}")
    return [variable.sub(value, body) for value in values.split()]


def test_the_documentation_names_targets():
    documented = set(NAMED) & set(TARGETS)
    assert documented >= {"run", "test", "lint", "parity", "golden", "benchmark"}
    assert {t for t in NAMED if t not in TARGETS} <= {"more"}  # "make more" is English


@pytest.mark.parametrize("target", TARGETS)
def test_commands_of_a_target_exist(target):
    lines = commands(target)
    assert lines
    for line in lines:
        paths = re.findall(
            r"(?<![\w/])((?:benchmarks|tests|experiments|configs|requirements)/[\w/.$-]+)", line
        )
        for path in paths:
            assert (ROOT / path).exists(), line
        modules = re.findall(r"-m ((?:oapl_jax|experiments)\.[\w.]+)", line)
        for module in modules:
            assert importlib.util.find_spec(module), line
        scripts = [ROOT / path for path in paths if re.search(r"^(?!configs).*\.py$", path)]
        scripts += [ROOT.joinpath(*module.split(".")).with_suffix(".py") for module in modules]
        if scripts := [script for script in scripts if script.exists()]:
            text = "".join(file.read_text() for file in (*scripts, ROOT / "oapl_jax/launch.py"))
            for flag in re.findall(r" --([a-z_]+)", line):
                assert re.search(rf"""["'](--)?{flag}["']""", text), (flag, line)


def local_files(name: str) -> list[pathlib.Path]:
    """The files of this repository behind "package.module.name"; [] for a third party's."""
    parts = name.split(".")
    places = [root.joinpath(*parts[:n]) for root in (ROOT, ROOT / "tests") for n in range(1, 9)]
    files = [file for p in places for file in (p.with_suffix(".py"), p / "__init__.py")]
    return [file for file in files if file.exists()]


def third_party(path: pathlib.Path) -> set[str]:
    """Top-level packages that a file of this repository imports, directly or through others.

    Imports inside functions count in the file itself alone: others need not be called.
    """
    seen, found, todo = set(), set(), [path]
    while todo:
        file = todo.pop()
        if file in seen:
            continue
        seen.add(file)
        tree = ast.parse(file.read_text())
        for node in ast.walk(tree) if file == path else tree.body:
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [f"{node.module}.{alias.name}" for alias in node.names]
            for name in names:
                files = local_files(name)
                todo += files
                found |= set() if files else {name.partition(".")[0]}
    return found - sys.stdlib_module_names


@pytest.mark.parametrize("script", ["tests/golden/make.py", "experiments/smollm2_checkpoint.py"])
def test_the_environment_for_parity_has_what_its_scripts_import(script):
    text = (ROOT / "requirements/parity.txt").read_text()
    pinned = {name.lower().replace("_", "-") for name in re.findall(r"^([\w-]+)==", text, re.M)}
    owners = importlib.metadata.packages_distributions() | {
        name: [name] for name in ("torch", "peft")
    }
    imported = third_party(ROOT / script)
    assert imported >= {"numpy", "transformers"}
    for package in imported:
        names = {name.lower().replace("_", "-") for name in owners[package]}
        assert names & pinned, f"{script} imports {package} of {names}"
