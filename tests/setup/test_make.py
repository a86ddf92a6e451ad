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
    """The commands of a target and of all that it needs, which --always-make takes for missing."""
    done = subprocess.run(
        ["make", "--dry-run", "--always-make", target],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.replace("\\\n", " ").splitlines()


def test_the_documentation_names_targets():
    documented = set(NAMED) & set(TARGETS)
    assert documented >= {"run", "test", "lint", "parity", "golden", "benchmark"}
    assert {t for t in NAMED if t not in TARGETS} <= {"more"}  # "make more" is English


@pytest.mark.parametrize("target", TARGETS)
def test_commands_of_a_target_exist(target):
    lines = commands(target)
    assert lines
    for line in lines:
        for module in re.findall(r"-m ((?:oapl_jax|experiments)\.[\w.]+)", line):
            assert importlib.util.find_spec(module), line
        for path in re.findall(
            r"(?<![\w/])((?:benchmarks|tests|experiments|configs|requirements)/[\w/.$-]+)", line
        ):
            assert "$" in path or (ROOT / path).exists(), line


def third_party(path: pathlib.Path) -> set[str]:
    """Top-level packages that a file of this repository imports, directly or through others."""
    seen, found, todo = set(), set(), [path]
    while todo:
        file = todo.pop()
        if file in seen:
            continue
        seen.add(file)
        for node in ast.walk(ast.parse(file.read_text())):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [f"{node.module}.{alias.name}" for alias in node.names]
            for name in names:
                parts = name.split(".")
                if parts[0] not in ("oapl_jax", "experiments", "configs"):
                    found.add(parts[0])
                    continue
                for end in range(1, len(parts) + 1):
                    module = ROOT.joinpath(*parts[:end])
                    todo += [
                        f for f in (module.with_suffix(".py"), module / "__init__.py") if f.exists()
                    ]
    return found - sys.stdlib_module_names


@pytest.mark.parametrize("script", ["tests/golden/make.py"])
def test_the_environment_for_parity_has_what_its_scripts_import(script):
    text = (ROOT / "requirements/parity.txt").read_text()
    pinned = {name.lower().replace("_", "-") for name in re.findall(r"^([\w-]+)==", text, re.M)}
    owners = importlib.metadata.packages_distributions() | {"torch": ["torch"]}
    for package in third_party(ROOT / script):
        names = {name.lower().replace("_", "-") for name in owners[package]}
        assert names & pinned, f"{script} imports {package} of {names}"
