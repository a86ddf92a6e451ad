"""Imports point downward, from the commands to the shared types, wherever they stand in a file."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "oapl_jax"

# From the bottom up: a package or top-level module imports from its own layer or from below.
LAYERS = (
    ("errors", "structs", "files"),
    ("config", "multihost", "objectives"),
    ("model", "data", "tracking"),
    ("learner", "rewards"),
    ("weights", "curriculum"),
    ("rollout",),
    ("fleet",),
    ("preferences", "evaluation"),
    ("launch", "planning"),
    ("build",),
    ("train", "evaluate", "record", "publish", "plan", "audit", "report", "grade"),
)
LAYER = {package: i for i, packages in enumerate(LAYERS) for package in packages}
# Packages that must not import each other, whatever the layers allow.
FORBIDDEN = {
    "objectives": ("model", "data"),
    "model": ("data", "learner"),
    "learner": ("data", "rewards", "rollout", "weights"),
    "weights": ("rollout", "fleet"),
    "rollout": ("fleet",),
}
# The whole configuration is seen by these alone; a package takes its own section.
SEE_CONFIG = (
    *("config", "build", "launch"),
    *("train", "evaluate", "record", "publish", "plan", "audit"),
)


def modules() -> list[Path]:
    return sorted(
        path for path in PACKAGE.rglob("*.py") if path.parent != PACKAGE or path.stem != "__init__"
    )


def package_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path: Path) -> set[str]:
    """Full names of everything a file imports, at module level and inside functions."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}: relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def packages_imported(path: Path) -> set[str]:
    found = {name.split(".")[1] for name in imports(path) if name.startswith("oapl_jax.")}
    return found - {package_of(path)}


def roots_imported(path: Path) -> set[str]:
    return {name.partition(".")[0] for name in imports(path)}


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(
        ".__init__"
    )


def test_every_package_has_a_layer():
    assert {package_of(path) for path in modules()} == set(LAYER)


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_downward(path):
    for other in packages_imported(path):
        assert LAYER[other] <= LAYER[package_of(path)], f"{path.name} imports {other} from above"


def test_no_import_cycle():
    known = {module_of(path) for path in modules()}
    owner = lambda name: name if name in known else name.rpartition(".")[0]
    graph = {module_of(p): {owner(name) for name in imports(p)} & known for p in modules()}
    done: set[str] = set()

    def visit(module: str, trail: tuple[str, ...]) -> None:
        assert module not in trail, f"import cycle: {' -> '.join((*trail, module))}"
        if module not in done:
            for other in graph[module] - {module}:
                visit(other, (*trail, module))
            done.add(module)

    for module in graph:
        visit(module, ())


@pytest.mark.parametrize(("package", "others"), FORBIDDEN.items())
def test_packages_that_must_not_import_each_other(package, others):
    for path in modules():
        assert package_of(path) != package or not packages_imported(path) & set(others)


def test_only_build_config_and_commands_see_the_whole_config():
    for path in modules():
        if package_of(path) in SEE_CONFIG:
            continue
        assert "oapl_jax.config.Config" not in imports(path), path
        assert "build" not in packages_imported(path), path
        assert "ml_collections" not in roots_imported(path), path
        tree = ast.parse(path.read_text())
        names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
        assert not names & {"ConfigDict", "FLAGS"}, path


def test_configurations_load_without_jax():
    for path in (PACKAGE.parent / "configs").glob("*.py"):
        assert not roots_imported(path) & {"jax", "flax", "optax", "oapl_jax"}


def test_no_torch_and_no_tensorflow():
    for path in modules():
        assert not roots_imported(path) & {"torch", "tensorflow"}
