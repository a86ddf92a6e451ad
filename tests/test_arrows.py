"""Imports go one way through the house: structs and mathematics below, the loop on top."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "oapl_jax"

# Floors from the ground up; a module imports from its own floor or from below.
FLOORS = (
    ("errors", "structs", "hosts", "heartbeat"),
    ("objectives",),
    ("sharding", "optim", "lag", "models", "data", "tokenizer"),
    ("rewards", "policy", "metrics"),
    ("learner", "batching", "buffer", "publisher", "rollout", "curriculum", "preferences"),
    ("checkpoint", "warmup", "evaluate", "probe", "check", "saved_config"),
    ("job", "report"),
    ("resize",),
    ("begin", "command", "compile_cache", "supply", "assemble"),
    ("open_supply",),
    ("train", "plan"),
)
# What the learner, the objectives and the model must never know, whatever the floors allow.
FORBIDDEN = {
    "objectives": ("models", "data", "sharding"),
    "learner": ("data", "rewards", "rollout", "publisher", "tokenizer"),
    "publisher": ("rollout", "learner", "buffer"),
    "models": ("data", "tokenizer"),
}
COMMANDS = ("train", "plan", "evaluate", "command")


def modules():
    return sorted(
        path for path in PACKAGE.rglob("*.py") if path.parent != PACKAGE or path.stem != "__init__"
    )


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path: Path, *, whole: bool = True) -> set[str]:
    """Names of modules that a file imports; without `whole`, only those imported when it is
    loaded."""
    tree = ast.parse(path.read_text())
    names = set()
    for node in ast.walk(tree) if whole else tree.body:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}: relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def rooms_imported(path: Path, **how) -> set[str]:
    found = {name.split(".")[1] for name in imports(path, **how) if name.startswith("oapl_jax.")}
    return found - {room_of(path)}


def floor(room: str) -> int:
    return next(i for i, rooms in enumerate(FLOORS) if room in rooms)


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_go_down(path):
    for other in rooms_imported(path, whole=False):
        assert floor(other) <= floor(room_of(path)), f"{path.name} imports {other} from above"


@pytest.mark.parametrize(("room", "others"), FORBIDDEN.items())
def test_rooms_that_must_not_know_each_other(room, others):
    for path in modules():
        if room_of(path) == room:
            assert not rooms_imported(path) & set(others)


def test_only_commands_and_the_job_know_a_configuration():
    for path in modules():
        if any(name.startswith("ml_collections") for name in imports(path)):
            assert room_of(path) in COMMANDS
        if room_of(path) not in (*COMMANDS, "job"):
            names = {
                node.id
                for node in ast.walk(ast.parse(path.read_text()))
                if isinstance(node, ast.Name)
            }
            assert "ConfigDict" not in names
            assert "FLAGS" not in names


def test_configurations_load_without_jax():
    for path in (PACKAGE.parent / "configs").glob("*.py"):
        assert not {n.split(".")[0] for n in imports(path)} & {"jax", "flax", "optax", "oapl_jax"}


def test_every_room_has_a_floor():
    assert {room_of(p) for p in modules()} == {room for rooms in FLOORS for room in rooms}


def test_no_torch_and_no_tensorflow():
    for path in modules():
        assert not {n.split(".")[0] for n in imports(path)} & {"torch", "tensorflow", "pickle"}
