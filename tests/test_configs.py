"""Every configuration loads, is locked, and takes an override of the right type at every path."""

import importlib
import operator
import subprocess
import sys
from pathlib import Path

import pytest

from configs import arithmetic
from oapl_jax.config import flatten

ROOT = Path(__file__).parent.parent
SHARED = {"__init__", "common", "objectives"}
FILES = sorted({path.stem for path in (ROOT / "configs").glob("*.py")} - SHARED)
CHOICES = {
    "arithmetic": ["", "task=chain_sum", "task=number_sorting", "task=countdown", "objective=grpo"],
    "code_contests": ["", "round=2", "smoke", "smoke,round=0", "smoke,round=2,objective=grpo"],
    "documents": ["", "round=1", "round=2,objective=grpo"],
    "competition_math": ["", "smoke", "grpo_is", "smoke,objective=grpo_is"],
    "own_task": ["", "start=pretrained", "objective=grpo"],
    "gsm8k": ["", "lora", "llama,lora", "train=lora,family=qwen2,objective=grpo"],
    "smollm2": ["", "lora", "train=lora,objective=grpo_is"],
}
# Scripts of users rely on these names.
PUBLIC = (
    *("num_steps", "seed", "group_size", "lag.mode", "lag.steps", "rollout.overlap"),
    *("objective.name", "objective.beta1", "objective.beta2", "optim.learning_rate"),
)
CASES = [(name, arg) for name in FILES for arg in CHOICES[name]]
OTHER = {bool: operator.not_, int: (1).__add__, float: lambda x: x * 2 + 1, str: "x".__add__}


def other_value(value):
    """Another value of the same type."""
    return OTHER.get(type(value), lambda x: x)(value)


@pytest.mark.parametrize(("name", "arg"), CASES)
def test_every_path_takes_its_type_and_no_other(name, arg):
    get_config = importlib.import_module(f"configs.{name}").get_config
    config = get_config(arg) if arg else get_config()
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


@pytest.mark.parametrize("wrong", ["no_such=choice", "task=no_such_task", "no_such_task"])
def test_unknown_choices_are_refused_with_the_offer(wrong):
    with pytest.raises(ValueError, match="choose among"):
        arithmetic.get_config(wrong)


def test_a_value_alone_is_a_choice():
    load = arithmetic.get_config
    assert load("countdown,grpo") == load("task=countdown,objective=grpo")
    assert load("grpo").data.task == "chain_sum"


def test_configurations_start_no_jax():
    code = "import sys, configs.arithmetic as c; c.get_config(); assert 'jax' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_grpo_has_its_own_aggregation():
    assert arithmetic.get_config().objective.aggregation == "sequence"
    assert arithmetic.get_config("objective=grpo").objective.aggregation == "token"
