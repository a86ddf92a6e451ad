"""benchmarks/accelerator.py: its sections in tiny shapes, and error reporting."""

import contextlib
import dataclasses
import importlib
import json
import os
import subprocess
import sys
import time
from types import ModuleType
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from small_runs import ROOT, quick_compilation

from oapl_jax.errors import RunError, UserError
from oapl_jax.model.blockwise_attention import blockwise_attention
from oapl_jax.model.config import ModelConfig


@pytest.fixture(scope="module")
def accelerator() -> ModuleType:
    with mock.patch.object(sys, "path", [str(ROOT / "benchmarks"), *sys.path]):
        return importlib.import_module("accelerator")


# Sections


def test_kernels_are_compared_with_plain_attention_on_whole_and_packed_rows(accelerator):
    lines = list(accelerator.check_attention(accelerator.SMALL))
    assert [(x["kernel"], x["length"], x["rows"]) for x in lines] == [
        (kernel, length, rows)
        for length in (64, 128)
        for rows in ("whole", "packed")
        for kernel in ("blockwise", "mask")
    ]
    for line in lines:
        assert 0 < line["output error"] < 1e-4
        assert 0 < line["gradient error"] < 1e-4
        assert line["forward ms"] > 0
        assert line["forward and backward ms"] > 0


def test_a_kernel_that_ignores_segments_fails_on_packed_rows(accelerator, monkeypatch):
    def ignorant(query, key, value, query_segments, key_segments, slots):
        ones = jnp.ones_like(query_segments)
        return blockwise_attention(query, key, value, ones, ones, slots)

    kernel = 2, lambda *_: (jax.tree_util.Partial(ignorant), P())
    monkeypatch.setattr(accelerator, "kernels", lambda platform: {"ignorant": kernel})
    lines = accelerator.check_attention(accelerator.SMALL)
    failed = {(x["length"], x["rows"]): "error" in x for x in lines}
    assert failed == {
        (64, "whole"): False,
        (64, "packed"): True,
        (128, "whole"): False,
        (128, "packed"): True,
    }


def test_packed_rows_have_eight_sequences_in_order_and_padding(accelerator):
    rows = accelerator.packed_segments(np.random.default_rng(0), 4, 256)
    for row in rows:
        found = row[np.flatnonzero(np.diff(row, prepend=-1))]
        np.testing.assert_array_equal(found, [*range(found[0], 9), 0])


def test_the_learner_is_timed_with_each_kernel(accelerator, monkeypatch):
    """The kernel of a line is the one that its step has."""
    traced, kernels = [], accelerator.kernels

    def recorded(platform):
        def recording(name, multiple, make_kernel):
            def make(*given):
                traced.append(name)
                return make_kernel(*given)

            return multiple, make

        return {name: recording(name, *kernel) for name, kernel in kernels(platform).items()}

    monkeypatch.setattr(accelerator, "kernels", recorded)
    lines = []
    for line in accelerator.check_learner(accelerator.SMALL):
        assert set(traced) == {line["kernel"]}
        traced.clear()
        lines.append(line)
    expected = [("blockwise", 64), ("mask", 64), ("mask", 128)]
    assert [(x["kernel"], x["row length"]) for x in lines] == expected
    for line in lines:
        assert line["tokens"] == 2 * 128 * jax.device_count()
        assert line["tokens/s"] == line["tokens"] / line["s"]
        assert line["MFU"] > 0


def test_a_step_that_fails_is_an_error_of_its_line(accelerator, monkeypatch):
    def raising(*given):
        raise FloatingPointError("no such kernel")

    two = {"broken": (2, raising), "mask": accelerator.kernels("cpu")["mask"]}
    monkeypatch.setattr(accelerator, "kernels", lambda platform: two)
    sizes = dataclasses.replace(accelerator.SMALL, lengths=(64,))
    lines = list(accelerator.check_learner(sizes))
    assert ["error" in line for line in lines] == [True, False]
    assert "FloatingPointError" in lines[0]["error"]


def test_the_sampler_decodes_the_recorded_lengths(accelerator):
    (line,) = accelerator.check_sampler(accelerator.SMALL)
    recorded = json.loads((ROOT / "benchmarks" / "lengths_smollm2.json").read_text())
    lengths = -(-np.array(recorded["response"][:8]) // 64)
    assert line["tokens"] == lengths.sum() * jax.device_count()
    assert line["responses"] == 8 * jax.device_count()
    assert line["slots"] == 4 * jax.device_count()
    assert line["share of the bound"] == line["tokens/s"] / line["bound"]


# Bytes, in half precision: the embedding; q, k, v and o; the feed-forward; norms.
WEIGHTS = 2 * (64 * 32 + 32 * (64 + 32 + 32 + 64) + 3 * 32 * 32 + 3 * 32 + 2 * 16)
PLACE = 2 * 2 * 2 * 16  # bytes of one key and value of two heads of 16


@pytest.mark.parametrize(
    ("prompts", "lengths", "slots", "devices", "read"),
    [
        # One slot: all weights and the places so far, for each of two tokens.
        ([10], [[2]], 1, 1, 2 * WEIGHTS + (11 + 12) * PLACE),
        # Two slots share the weights; a second device has its own.
        ([10], [[2, 2]], 2, 1, 2 * WEIGHTS + 2 * (11 + 12) * PLACE),
        ([10, 10], [[2], [2]], 2, 2, 2 * WEIGHTS + (11 + 12) * PLACE),
        ([10, 0], [[1], [3]], 2, 1, 2 * WEIGHTS + (11 + 1 + 2 + 3) * PLACE),
    ],
)
def test_the_bound_counts_weights_and_cache(accelerator, prompts, lengths, slots, devices, read):
    bound = accelerator.tokens_per_second_bound(
        ModelConfig.from_hf(dict(accelerator.SMALL.model), source="a test"),
        itemsize=2,
        prompts=np.array(prompts),
        lengths=np.array(lengths),
        slots=slots,
        devices=devices,
        bandwidth=1e6,
    )
    assert bound == pytest.approx(np.sum(lengths) * 1e6 / read)


def test_a_host_without_accelerator_is_refused(accelerator):
    with pytest.raises(UserError, match="--small"):
        next(accelerator.check_device(accelerator.FULL))


# The command

SLEEP = "import subprocess, sys; subprocess.run(['sleep', '61.25'])"


@pytest.mark.parametrize(
    ("program", "lines", "error", "code"),
    [
        ("print('{\"a\": 1}'); print('not a line'); print('{}')", [{"a": 1}, {}], None, 0),
        ("print('{\"error\": \"B: c\"}')", [{"error": "B: c"}], "B: c", 0),
        ("print('{\"a\": 1}'); raise OSError('gone')", [{"a": 1}], "OSError: gone", 1),
        ("import sys; sys.exit('error: gone')", [], "gone", 1),
        ("import os; os.kill(os.getpid(), 9)", [], "SIGKILL", -9),
        (f"print('{{\"a\": 1}}\\n{{\"a\":', end='', flush=True); {SLEEP}", [{"a": 1}], "2 s", None),
    ],
)  # fmt: skip
def test_a_section_ends_as(accelerator, program, lines, error, code):
    command = [sys.executable, "-S", "-c", program]
    started = time.monotonic()
    entry, found = accelerator.run_section(command, 2.0 if code is None else 60.0)
    assert time.monotonic() - started < 30
    assert (entry["lines"], found) == (lines, code)
    assert (error or "") in entry.get("error", "")
    assert ("error" in entry) == ("stderr" in entry) == (error is not None)


def test_a_section_ends_with_its_own_processes(accelerator):
    command = "sleep 61.25 & echo '{\"sleeps\": true}'; wait"
    entry, code = accelerator.run_section(["sh", "-c", command], 1.0)
    assert (entry["lines"], code) == ([{"sleeps": True}], None)
    running = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True)
    assert "sleep 61.25" not in running.stdout


ENTRIES = {
    "device": ({"lines": [{"devices": 1}]}, 0),
    "attention": ({"lines": [{"error": "A: b"}], "error": "A: b"}, 0),
    "learner": ({"lines": [], "error": "not done"}, None),
    "sampler": ({"lines": []}, 0),
    "job": ({"lines": []}, 0),
}


def run_with(accelerator, monkeypatch, to, entries):
    """Runs all sections, which end as in `entries`; returns the names of those that ran."""
    ran = []

    def run_section(command, budget):
        name = command[2].removeprefix("--section=")
        ran.append(name)
        assert budget == accelerator.SECTIONS[name][1]
        return entries[name]

    monkeypatch.setattr(accelerator, "run_section", run_section)
    with contextlib.suppress(RunError):
        accelerator.check_host(False, to)
        ran.append("ok")
    return ran


def test_sections_that_fail_are_named_and_the_others_run(accelerator, monkeypatch, tmp_path):
    to = tmp_path / "new" / "found.json"
    ran = run_with(accelerator, monkeypatch, to, ENTRIES)
    assert ran == list(accelerator.SECTIONS) == list(ENTRIES)
    found = json.loads(to.read_text())
    assert found["failed"] == ["attention", "learner"]
    assert found["sections"] == {name: entry for name, (entry, _) in ENTRIES.items()}
    assert found["versions"]["jax"] == jax.__version__


def test_sections_that_succeed_end_the_command_with_success(accelerator, monkeypatch, tmp_path):
    entries = dict.fromkeys(ENTRIES, ({"lines": []}, 0))
    assert run_with(accelerator, monkeypatch, tmp_path / "a", entries) == [*ENTRIES, "ok"]


def test_a_mistake_ends_the_command_at_once(accelerator, monkeypatch, tmp_path):
    entries = {"device": ({"lines": [], "error": "no accelerator"}, 2)}
    with pytest.raises(UserError, match="no accelerator"):
        run_with(accelerator, monkeypatch, tmp_path / "a", entries)


def test_the_sections_take_less_than_eight_minutes(accelerator):
    budgets = {name: budget for name, (_, budget) in accelerator.SECTIONS.items()}
    assert accelerator.FULL.patience * sum(budgets.values()) < 480
    assert accelerator.FULL.job_seconds < accelerator.FULL.patience * budgets["job"]


def test_the_sections_import_no_tokenizer_and_no_server():
    names = ("transformers", "tokenizers", "torch", "sglang", "reasoning_gym", "aiohttp")
    program = f"import accelerator, sys; sys.exit(str(set({names}) & set(sys.modules)))"
    environment = os.environ | {"PYTHONPATH": f"{ROOT}/benchmarks:{ROOT}"}
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True
    )
    assert done.stderr.endswith("set()\n")


@pytest.mark.slow
def test_the_command_in_tiny_shapes(tmp_path):
    command = [sys.executable, ROOT / "benchmarks" / "accelerator.py", "--small"]
    environment = quick_compilation() | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "runs" / "benchmarks" / "accelerator.json").read_text())
    lines = {name: entry["lines"] for name, entry in found["sections"].items()}
    assert found["failed"] == []
    counts = {name: len(of_section) for name, of_section in lines.items()}
    assert counts == dict(device=1, attention=8, learner=3, sampler=1, job=1)
    assert lines["device"][0]["platform"] == "cpu"
    assert lines["job"][0]["steps"] == 2
