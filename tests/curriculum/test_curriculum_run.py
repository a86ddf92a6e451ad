"""Curricula in whole runs: phases, utilities, and exact resumption after a kill."""

import json
import re
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from etils import epath
from flax import serialization
from small_models import assert_same
from small_runs import metrics, timeless

from oapl_jax.curriculum.curator import utility
from oapl_jax.model import hf
from oapl_jax.model.transformer import Transformer, head, logits
from oapl_jax.rollout.dataset import Dataset
from oapl_jax.rollout.ledger import LedgerReport
from oapl_jax.weights.checkpoint import DIGEST_BYTES

CANDIDATES, PICKS, STEPS, TEMPERATURE = 16, 6, 16, 0.8
DORMANT, WARMUP = 2, 2
ASLEEP = 2 * PICKS  # groups sampled before the second step, each of four
SETTINGS = {
    "num_steps": STEPS,
    "group_size": 8,
    "data.generator.min_terms": 2,  # easy enough for rewards after a short warm-up
    "data.generator.max_terms": 2,
    "data.train_size": 60,
    "data.validation_size": 4,
    "data.test_size": 4,
    "warmup.num_steps": 60,
    "rollout.prompts_per_call": PICKS,  # so that some groups wait at a checkpoint
    "rollout.max_sequences": 48,
    "rollout.temperature": TEMPERATURE,
    "rollout.record": True,
    "evaluation.every": 0,
    "checkpoint.keep": STEPS,
    "tracking.tensorboard": False,
    "curriculum.name": "actor_curator",
    "curriculum.candidates": CANDIDATES,
    "curriculum.curator.architecture.num_hidden_layers": 1,
    "curriculum.curator.architecture.hidden_size": 16,
    "curriculum.curator.architecture.intermediate_size": 16,
    "curriculum.curator.dormant": DORMANT,
    "curriculum.curator.warmup": WARMUP,
    "curriculum.curator.passes": 2,
    "curriculum.curator.rows": 8,
    "curriculum.curator.optim.learning_rate": 1e-2,
}
CONFIG = ":objective=grpo"


@pytest.fixture(scope="module")
def unbroken(runs, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("unbroken")
    runs.run(workdir, config=CONFIG, **SETTINGS)
    return workdir


def saved(workdir: Path, step: int, item: str):
    """The arrays of a checkpoint's item, read by Orbax without any of our code."""
    path = workdir / "checkpoints" / str(step) / item
    with ocp.PyTreeCheckpointer() as reader:
        tree = reader.metadata(path).item_metadata.tree
        as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
        return reader.restore(path, ocp.args.PyTreeRestore(restore_args=as_numpy))


def share(workdir: Path, step: int) -> dict:
    """The host's own state in a checkpoint, and its buffered groups."""
    path = workdir / "host_states" / str(step) / "host0of1"
    content: Any = serialization.msgpack_restore(path.read_bytes()[DIGEST_BYTES:])
    return {**json.loads(content["state"]), "groups": content["groups"]}


def entries(workdir: Path) -> list:
    """The sampled groups by stream index, without groups rewound by a kill."""
    found = LedgerReport(epath.Path(workdir / "ledger.jsonl")).groups()
    return sorted((e for e in found if e.state != "rewound"), key=lambda e: e.stream_index)


def rollouts(workdir: Path) -> list[tuple]:
    """Stream index, sample, prompt, response and end of each rollout not rewound by a kill."""
    found = LedgerReport(epath.Path(workdir / "ledger.jsonl")).rollouts()
    return sorted(
        (*map(int, r.id.split(".")[1:]), r.prompt, r.tokens, r.reward, r.state, str(r.step))
        for r in found
        if r.state != "rewound"
    )


def round_of(index: int) -> int:
    """Number of the choice that had a prompt as a candidate; below 0 in the dormant phase."""
    return (index - ASLEEP) // CANDIDATES


def test_a_run_has_the_phases_dormant_warmup_and_choosing(unbroken):
    draws, lines = [entry.stream_index for entry in entries(unbroken)], metrics(unbroken)
    assert draws[:ASLEEP] == list(range(ASLEEP))
    rounds = [round_of(draw) for draw in draws[ASLEEP:]]
    assert rounds == [i // PICKS for i in range(len(rounds))]
    shares = [line.get("curriculum/effective_share") for line in lines]
    # The first choice is made for the fourth step.
    assert shares[:3] == [None] * 3
    assert shares[3] == pytest.approx(1)
    assert all(share < 0.999 for share in shares[5:])
    assert lines[3]["curriculum/steps"] > 0
    assert lines[-1]["curriculum/steps"] > lines[6]["curriculum/steps"]
    assert lines[-1]["curriculum/skipped"] == 0


def score(config, apply, params, group, width=32) -> list[np.ndarray]:
    """float64 log-probs of each response's tokens, a row each, over the whole vocabulary."""
    before = len(group.prompt.tokens)
    texts = [[*group.prompt.tokens, *rollout.tokens] for rollout in group.rollouts]
    rows = np.array([text + [0] * (width - len(text)) for text in texts], np.int32)
    places = np.broadcast_to(np.arange(width, dtype=np.int32), rows.shape)
    segments = np.array([places[0] < len(text) for text in texts], np.int32)
    hidden = apply({"params": params}, rows, places, segments)
    z = np.asarray(logits(hidden, head(params, config)), np.float64) / TEMPERATURE
    logp = z - np.log(np.exp(z).sum(-1, keepdims=True))
    of_next = np.take_along_axis(logp[:, :-1], rows[:, 1:, None], axis=-1)[..., 0]
    return [row[before - 1 : len(text) - 1] for row, text in zip(of_next, texts, strict=True)]


def test_utility_is_measured_by_the_learner_after_the_step(unbroken):
    """Recomputed from the run's recorded groups and checkpoints."""
    recorded = Dataset(epath.Path(unbroken / "rollouts"))
    groups = {group.prompt.stream_index: group for group in recorded}
    trained = {e.stream_index: e.step + 1 for e in entries(unbroken) if e.state == "trained"}
    config = hf.load_config(epath.Path(unbroken / "versions" / "v000000"))
    apply = jax.jit(Transformer(config, jnp.float32, "none").apply)
    compared = []
    for line in metrics(unbroken):
        step = line["step"]
        if not (unbroken / "checkpoints" / str(step)).exists() or step <= DORMANT:
            continue
        params, sums = saved(unbroken, step, "params"), {}
        for draw in (d for d, s in trained.items() if s == step and round_of(d) >= 0):
            logp, at = score(config, apply, params, groups[draw]), round_of(draw)
            sums[at] = sums.get(at, 0) + utility(groups[draw], logp)
        sums = {at: total for at, total in sums.items() if total}
        if sums:  # else no group of the step had a mixture of rewards
            assert line["curriculum/utility"] == pytest.approx(sums[max(sums)] / PICKS, abs=2e-5)
            compared.append((step, line["curriculum/utility"]))
    recorded.close()
    assert len(compared) >= 3
    # At the head of a window the policy before the step is the one that sampled: its own log-probs
    # would have the utility 0.
    heads = [abs(value) for step, value in compared if step % 4 == 1]
    assert min(heads) > 1e-3


def test_resumes_bit_for_bit_after_a_kill_within_a_round(runs, unbroken, tmp_path):
    """Losses, choices and the curator, with groups in the buffer."""
    process = runs.start(runs.command(tmp_path, config=CONFIG, **SETTINGS))
    path, deadline = tmp_path / "metrics.jsonl", time.monotonic() + 120
    written = lambda: path.read_text().count("\n") if path.exists() else 0
    while written() < 7 or not (tmp_path / "checkpoints" / "6").exists():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.kill()
    process.communicate()
    assert len(metrics(tmp_path)) < STEPS
    known = share(tmp_path, 6)
    assert known["groups"]
    assert known["scorer"]["rounds"]
    assert known["scorer"]["steps"] > 0
    output = runs.run(tmp_path, config=CONFIG, **SETTINGS)
    assert re.search("resumed from checkpoint step [1-9]", output)
    found, expected = metrics(tmp_path), metrics(unbroken)
    assert [timeless(line) for line in found] == [timeless(line) for line in expected]
    assert rollouts(tmp_path) == rollouts(unbroken)
    mine, theirs = share(tmp_path, STEPS), share(unbroken, STEPS)
    assert [mine[name] for name in ("scorer", "prompts")] == [theirs["scorer"], theirs["prompts"]]
    for item in ("curriculum", "params", "optimizer"):
        assert_same(*(saved(workdir, STEPS, item) for workdir in (tmp_path, unbroken)))
    assert np.abs(saved(tmp_path, STEPS, "curriculum")["params"]["score"]).max() > 1e-3


def test_pass_rates_count_every_sampled_prompt(runs, tmp_path):
    changes = {"curriculum.name": "learnability", "num_steps": 10}
    runs.run(tmp_path, config=CONFIG, **{**SETTINGS, **changes})
    sampled, lines = entries(tmp_path), metrics(tmp_path)
    rounds = [entry.stream_index // CANDIDATES for entry in sampled]
    assert rounds == [i // PICKS for i in range(len(rounds))]
    for line in lines:
        before = sampled[: int(line["buffer/added"])]
        assert line["curriculum/known"] == len({entry.prompt for entry in before})
    shares = [line["curriculum/effective_share"] for line in lines]
    assert shares[0] == pytest.approx(1)  # nothing is known of any prompt
    assert shares[-1] < 0.97
