"""Every configuration loads, is locked, and takes an override of the right type at every path."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import ml_collections
import pytest

from oapl_jax.config import flatten

ROOT = Path(__file__).parent.parent
SHARED = ("__init__", "common", "objectives")
FILES = sorted(p for p in (ROOT / "configs").glob("*.py") if p.stem not in SHARED)
CHOICES = {
    "arithmetic": ["", "task=chain_sum", "task=number_sorting", "task=countdown", "objective=grpo"],
    "code_contests": ["", "round=2", "smoke", "smoke,round=0", "smoke,round=2,objective=grpo"],
    "documents": ["", "round=1", "round=2,objective=grpo"],
    "competition_math": ["", "smoke", "grpo_is", "smoke,objective=grpo_is"],
    "smollm2": [""],
}
# Scripts of users rely on these names.
PUBLIC = (
    *("num_steps", "seed", "group_size", "lag.mode", "lag.steps", "rollout.overlap"),
    *("objective.name", "objective.beta1", "objective.beta2", "optim.learning_rate"),
)
CASES = [(path, arg) for path in FILES for arg in CHOICES[path.stem]]


def load(path: Path, arg: str) -> ml_collections.ConfigDict:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config(arg) if arg else module.get_config()


def other_value(value):
    """Another value of the same type."""
    match value:
        case bool():
            return not value
        case int():
            return value + 1
        case float():
            return value * 2 + 1
        case str():
            return value + "x"
        case _:
            return value


@pytest.mark.parametrize(("path", "arg"), CASES, ids=lambda x: getattr(x, "stem", x))
def test_every_path_takes_its_type_and_no_other(path, arg):
    config = load(path, arg)
    assert config.is_locked
    paths = flatten(config.to_dict())
    assert set(PUBLIC) <= set(paths)
    for name, value in paths.items():
        if isinstance(value, list):
            continue
        config.update_from_flattened_dict({name: other_value(value)})
        assert flatten(config.to_dict())[name] == other_value(value)
        with pytest.raises(TypeError):
            config.update_from_flattened_dict({name: object()})
    with pytest.raises((AttributeError, KeyError)):
        config.no_such_setting = 1


def test_unknown_choices_are_refused_with_the_offer():
    path = ROOT / "configs" / "arithmetic.py"
    with pytest.raises(ValueError, match="choose among"):
        load(path, "no_such=choice")
    for wrong in ("task=no_such_task", "no_such_task"):
        with pytest.raises(ValueError, match="choose among"):
            load(path, wrong)


def test_a_value_alone_is_a_choice():
    path = ROOT / "configs" / "arithmetic.py"
    assert load(path, "countdown,grpo") == load(path, "task=countdown,objective=grpo")
    assert load(path, "grpo").data.task == "chain_sum"


def test_configurations_start_no_jax():
    code = "import sys, configs.arithmetic as c; c.get_config(); assert 'jax' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_grpo_has_its_own_aggregation():
    path = ROOT / "configs" / "arithmetic.py"
    assert load(path, "").objective.aggregation == "sequence"
    assert load(path, "objective=grpo").objective.aggregation == "token"
