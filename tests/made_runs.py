"""Workdirs of runs that never ran: metrics, ledger, kept groups and notes of known values."""

import gzip
import json

import numpy as np
from etils import epath

from oapl_jax.config import save_config
from oapl_jax.model.tokenizer import make_character_tokenizer
from oapl_jax.rewards.grader import Grade
from oapl_jax.rollout.dataset import DatasetWriter
from oapl_jax.rollout.kept import KeptNotes
from oapl_jax.rollout.ledger import FILE, Ledger
from oapl_jax.rollout.sampler import Sampled
from oapl_jax.structs import Group, Prompt, Rollout

SIZE, WINDOW = 4, 4  # responses of a group; steps between two versions
CHARACTERS = "0123456789+= -"


def make_groups(count, *, tokenizer, length=None, seed=0):
    """Sums of two digits: response 0 is right, 1 is wrong, 2 is cut off, 3 is right and longer."""
    rng = np.random.default_rng(seed)
    encode = lambda text: np.array(tokenizer.encode(text, add_special_tokens=False), np.int32)
    for index in range(count):
        a, b = rng.integers(1, 5, 2)
        question, version = f"{a}+{b}=", index // 2 // WINDOW * WINDOW
        texts = (f"{a + b}", f"{a + b + 1}", f"{a}+{b}" * 2, f"{a} + {b} = {a + b}")
        rollouts = []
        for sample, text in enumerate(texts):
            tokens = encode(text)
            tokens = np.resize(tokens, length) if length else tokens
            logp = -rng.exponential(0.5, len(tokens)).astype(np.float32)
            rollouts.append(
                Rollout(tokens, logp, int(version), "length" if sample == 2 else "stop")
            )
        prompt = Prompt(f"sum-{index}", index, encode(question), question, f"{a + b}", "chain_sum")
        yield Group(prompt, tuple(rollouts), np.array([1, 0, 0, 1], np.float32))


def make_run(workdir, *, steps=12, seed=0, kept=None, length=None, config=None):
    """A run of two groups a step, of which all are kept, or the first `kept`."""
    workdir, rng = epath.Path(workdir), np.random.default_rng(seed)
    workdir.mkdir(parents=True, exist_ok=True)
    tokenizer = make_character_tokenizer(CHARACTERS, str(workdir / "model"))
    save_config(
        workdir,
        {"num_steps": steps, "seed": seed, "model": {"path": ""}, "lag": {"steps": WINDOW}}
        | (config or {}),
    )
    groups = list(make_groups(2 * steps, tokenizer=tokenizer, length=length, seed=seed))
    kept = len(groups) if kept is None else kept
    writer = DatasetWriter(
        workdir / "rollouts", {"by": "train"}, groups_per_shard=1 << 20, weights_digest=str
    )
    notes = KeptNotes(workdir / "rollouts", share=1.0, hosts=1)
    ledger = Ledger(workdir / FILE)
    with open(workdir / "metrics.jsonl", "w") as file:
        for step in range(steps):
            pair = groups[2 * step : 2 * step + 2]
            for group in pair:
                ledger.request(group.prompt, SIZE)
                ledger.sampled(Sampled(group.prompt, group.rollouts, "local", 0.5), group.reward)
                ledger.end(group, "trained", step)
            for group in pair if 2 * step < kept else ():
                grades = [
                    Grade(float(r), f"answer {i}", "right" if r else "wrong", f"reward {r:g}")
                    for i, r in enumerate(group.reward)
                ]
                notes.graded(group.prompt, grades)
                writer.add(group)
            if 2 * step < kept:
                notes.trained(pair, step, make_responses(pair, rng))
            file.write(json.dumps(make_line(step, rng)) + "\n")
    if not writer.flush():
        writer.keep(0)  # as a run does that begins again
    for part in (writer, notes, ledger):
        part.close()
    return workdir


def make_responses(groups, rng):
    rollouts = [r for group in groups for r in group.rollouts]
    logp = np.zeros((len(rollouts), max(len(r.tokens) for r in rollouts)), np.float32)
    for row, rollout in zip(logp, rollouts, strict=True):
        size = len(rollout.tokens)
        row[:size] = rollout.behavior_logp + rng.normal(0, 0.3, size)
    target = np.concatenate([5 * (group.reward - 0.8) for group in groups])
    log_ratio = 0.6 * target + rng.normal(0, 1, len(target))
    return {"log_ratio": log_ratio, "target": target, "logp": logp}


def make_line(step, rng):
    lag, learned = step % WINDOW, 1 - np.exp(-step / 20)
    noise = lambda scale: float(rng.normal(0, scale))
    return {
        "step": step + 1,
        "rollout/reward": 0.2 + 0.6 * learned + noise(0.02),
        "rollout/right_and_stopped": 0.15 + 0.6 * learned + noise(0.02),
        **({"eval/pass@1": 0.2 + 0.6 * learned, "eval/pass@8": 0.6} if step % 5 == 4 else {}),
        "lag/mean": float(lag),
        "lag/histogram": {str(lag): 2 * SIZE},
        "kl": 1e-3 + 0.01 * lag + abs(noise(1e-3)),
        "entropy": 0.8 - 0.4 * learned,
        "residual/right": 0.2 - 0.1 * learned,
        "residual/wrong": -0.3 + 0.1 * learned,
        "residual/by_lag": {str(lag): 0.1 * lag},
        "residual/rms_by_lag": {str(lag): 0.2 * lag},
        "log_ratio/right": learned,
        "log_ratio/wrong": -2 * learned,
        "rollout/length": 5.0,
        "rollout/truncated": 0.25,
        "loss": 0.1,
        "grad_norm": 1.0,
        "ess": 0.9,
        "learner/tokens_per_second": 900.0,
        "rollout/tokens_per_second": 400.0,
        "learner/waiting_seconds": 0.4,
        "rollout/waiting_seconds": 0.0,
        "seconds/groups": 0.4,
        "seconds/learn": 0.3,
        "seconds/evaluate": 0.1,
        "rl_seconds": 0.8 * (step + 1),
        "skipped": 0.0,
    }


def header_of(data):
    """The header of packed data; see tracking/page.py."""
    content = gzip.decompress(data)
    return json.loads(content[4 : 4 + int.from_bytes(content[:4], "little")])
