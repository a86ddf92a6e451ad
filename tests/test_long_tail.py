"""benchmarks/long_tail.py and its responses of given lengths."""

import importlib
import json
import sys
from types import ModuleType
from unittest import mock

import numpy as np
import pytest
from small_models import golden_model, small_mesh
from small_runs import ROOT

from oapl_jax.errors import RunError
from oapl_jax.rollout.local_sampler import LocalSampler
from oapl_jax.rollout.sampler import Sampling
from oapl_jax.structs import Prompt

LENGTHS = 3 * [[12, 1], [2, 3], [4, 9], [1, 1], [7, 2], [3, 12], [2, 2], [1, 5], [3, 1], [6, 2]]


def benchmark(name: str) -> ModuleType:
    with mock.patch.object(sys, "path", [str(ROOT / "benchmarks"), *sys.path]):
        return importlib.import_module(name)


def test_a_run_that_compiles_is_not_timed():
    """Responses of one token end together: a prefill of few prompts is compiled for others."""
    recorded = benchmark("recorded")
    config, params = golden_model("qwen3_tied")
    sampler = LocalSampler(
        config,
        small_mesh(),
        dtype="float32",
        stop_ids=(),
        seed=0,
        max_sequences=16,
        max_prompt_tokens=13,
        prompt_multiple=13,
        tokens_per_round=2,
    )
    sampler.set_params(0, params)
    prompts = [Prompt("", i, np.full(13, 2, np.int32), "", "", "") for i in range(len(LENGTHS))]
    lengths, sampling = np.array(LENGTHS), Sampling(1.0, 1.0, 0, 12)
    sample = lambda lengths: recorded.sample_lengths(sampler, prompts, lengths, sampling)
    sample(np.ones_like(lengths))
    with pytest.raises(RunError, match="compiled"):
        recorded.compiled_seconds(lambda: sample(lengths))
    assert recorded.compiled_seconds(lambda: sample(lengths)) > 0


def test_both_ways_decode_recorded_and_equal_lengths(monkeypatch, tmp_path, capsys):
    long_tail = benchmark("long_tail")
    file = tmp_path / "lengths.json"
    responses = [1, 3, 20, 2, 5, 2, 1, 7] * 3
    file.write_text(json.dumps({"prompt": [9] * 24, "response": responses}))
    monkeypatch.setattr(long_tail, "FILE", file)
    monkeypatch.setattr(sys, "argv", ["long_tail.py", "--groups=2", "--slots=8"])
    monkeypatch.chdir(tmp_path)
    long_tail.main()
    lines = json.loads((tmp_path / "runs" / "benchmarks" / "long_tail.json").read_text())
    assert [line["batches"] for line in lines] == ["continuous", "static"]
    for line in lines:
        rates = [line[f"tokens/s, {kind} lengths"] for kind in ("recorded", "equal")]
        assert min(rates) > 0
        assert line["recorded / equal"] == pytest.approx(rates[0] / rates[1], abs=0.01)
    assert "recorded / equal" in capsys.readouterr().out
