"""The model card: lineage, metrics at its step, settings without addresses and paths."""

import json
import re

from small_models import small_config

from oapl_jax.model.hf import parameter_count
from oapl_jax.weights.card import latest, model_card, public

CONFIG = {
    "seed": 3,
    "data": {"task": "chain_sum", "data_dir": "/home/someone/data"},
    "model": {"path": "/mnt/models/Qwen3-4B"},
    "objective": {"name": "oapl", "denominator": "behavior", "constants": {"beta2": 0.2}},
    "lag": {"mode": "window", "steps": 16},
    "fleet": {
        "servers": ["http://10.0.0.2:30000"],
        "router": "",
        "api_key_file": "/key",
        "attempts": 4,
    },
}
LINES = [
    {"step": 1, "reward": 0.25, "eval/pass@1": 0.1, "eval/greedy": 0.2, "rl_seconds": 9.0},
    {"step": 2, "reward": 0.5, "lag/histogram": {"0": 1}},
    {"step": 3, "reward": 0.75},
    {"step": 4, "reward": 1.0, "eval/pass@1": 0.4},
]


def test_the_metrics_are_those_of_the_step_and_of_the_last_evaluation_before():
    assert latest(LINES, 3) == {
        "eval/pass@1": (1, 0.1),
        "eval/greedy": (1, 0.2),
        "reward": (3, 0.75),
    }
    assert latest(LINES, 9) == {"reward": (4, 1.0), "eval/pass@1": (4, 0.4)}
    assert latest(LINES, 0) == {}


def test_a_card_has_lineage_metrics_and_settings_and_no_addresses():
    model = small_config()
    description = dict(version=3, parent="weights/3", config_hash="c0ffee", dtype="bfloat16")
    card = model_card(CONFIG, LINES, model, **description)
    assert card.startswith("---\nlibrary_name: transformers\n")
    for shown in ("weights/3", "c0ffee", "bfloat16", "window 16", "Qwen3-4B", "chain_sum", "oapl"):
        assert shown in card
    assert f"{parameter_count(model):,}" in card
    assert re.search(r"\| reward \| 0\.75 \| 3 \|", card)
    assert re.search(r"\| eval/pass@1 \| 0\.1 \| 1 \|", card)
    for hidden in ("10.0.0.2", "/home", "/mnt", "/key"):
        assert hidden not in card
    settings = json.loads(card.partition("```json\n")[2].partition("```")[0])
    assert settings == public(CONFIG)
    assert settings["fleet"] == {"attempts": 4}
    assert settings["objective"]["constants"] == {"beta2": 0.2}


def test_a_version_before_the_first_step_has_a_card_too():
    card = model_card({}, [], small_config(), version=0, parent="", config_hash="", dtype="float32")
    assert "step 0" in card
