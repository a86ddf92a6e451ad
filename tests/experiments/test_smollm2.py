"""A tiny model in the place of SmolLM2: a checkpoint with a chat template of its own learns from
problems in the form of GSM8K, and goes through the experiment of word problems."""

import dataclasses
import functools
import json
import re
import time
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest
from etils import epath
from small_runs import opened, typed

from configs import gsm8k
from experiments.smollm2 import LAG, MAX_MINUTES, SHOWN, Outcome, draw, page, run, table
from oapl_jax import train
from oapl_jax.data import samples
from oapl_jax.errors import UserError
from oapl_jax.evaluate import evaluate_benchmarks
from oapl_jax.learner import train_step
from oapl_jax.model import hf
from oapl_jax.model.policy import open_policy
from oapl_jax.model.transformer import Transformer
from oapl_jax.rollout.dataset import Dataset

CHARACTERS = "".join(map(chr, range(32, 127))) + "\n\u2019"
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def make_model(directory, family):
    """A decoder of two layers that knows nothing."""
    sizes = dict(
        model_type=family,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=512,
        rms_norm_eps=1e-5,
        rope_theta=10000.0,
        tie_word_embeddings=True,
    )
    fresh = directory / "fresh"
    policy = open_policy(fresh, path="", architecture=sizes, characters=CHARACTERS)
    network = Transformer(policy.config, jnp.dtype("float32"), remat="none")
    params = jax.jit(functools.partial(train_step.init_params, network))(jax.random.key(0))
    policy.tokenizer.chat_template = CHATML
    policy.tokenizer.save_pretrained(str(directory / family))
    hf.save_params(
        params, policy.config, directory / family, dtype="float32", max_shard_bytes=1 << 30
    )
    return directory / family


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_model(epath.Path(tmp_path_factory.mktemp("model")), "llama")


def of_gsm8k(choice, model, tmp_path):
    """The configuration for a tiny model, on made problems in the same form."""
    samples.write(str(tmp_path / "samples"), rows=8)
    config = gsm8k.get_config(choice)
    for name in ("train", "validation", "test"):
        config.data.sets[name].update(rows=0, part=(0, 100))
    config.benchmarks.gsm8k_test.rows = 0
    config.update_from_flattened_dict(
        {
            "num_steps": 2,
            "group_size": 4,
            "groups_per_step": 4,
            "releases": str(tmp_path / "samples"),
            "data.data_dir": str(tmp_path / "data"),
            "data.max_prompt_tokens": 320,  # one token a character
            "rollout.prompts_per_call": 4,
            "rollout.max_sequences": 16,
            "rollout.max_response_tokens": 16,
            "rollout.temperature": 0.5,
            "model.path": str(model),
            "model.dtype": "float32",
            "model.remat": "none",
            "publish_dtype": "float32",
            "mesh.data": 8,
            "mesh.fsdp": 1,
            "lag.steps": 1,
            "warmup.num_steps": 50,  # this one has to learn first what an answer looks like
            "warmup.batch_size": 16,
            "warmup.demonstrations": 8,
            "rollout.record": True,
            "buffer.zero_variance": "keep",
            "evaluation.every": 0,
            "evaluation.n": 2,
            "evaluation.ks": (1, 2),
            "tracking.tensorboard": False,
        }
    )
    return config


@pytest.mark.parametrize(("choice", "ending"), [("qwen3", "/no_think"), ("qwen2", r"\boxed{}.")])
def test_other_families_are_evaluated_on_problems_in_the_form_of_gsm8k(choice, ending, tmp_path):
    config = of_gsm8k(choice, make_model(epath.Path(tmp_path), choice), tmp_path)
    changes = {"num_steps": 0, "warmup.num_steps": 0, "evaluation.every": 1}
    config.update_from_flattened_dict({**changes, "evaluation.n": 1, "evaluation.ks": (1,)})
    workdir = epath.Path(tmp_path / "run")
    result = train.run(typed(config), workdir, SimpleNamespace(requested=""))
    assert result is not None
    assert result["after"]["prompts"] == 8
    job = opened(config, workdir)
    assert job.policy.config.model_type == choice
    text = job.policy.tokenizer.decode(job.prompts("test")[0].tokens)
    assert f"{ending}<|im_end|>" in text
    job.close()


def test_a_small_model_trains_on_problems_in_the_form_of_gsm8k(model, tmp_path):
    config = of_gsm8k("llama", model, tmp_path)
    workdir = epath.Path(tmp_path / "run")
    workdir.mkdir()
    result = train.run(typed(config), workdir, SimpleNamespace(requested=""))
    assert result is not None
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["lag/max"] for line in lines] == [0, 0]

    groups = list(Dataset(workdir / "rollouts"))
    job = opened(config, workdir)
    decode = job.policy.tokenizer.decode
    problems = {record.id: record for record in job.splits["train"]}
    paid = 0
    for group in groups:
        problem = problems[group.prompt.id]
        assert decode(group.prompt.tokens) == (
            f"<|im_start|>user\n{problem.question}\n\n{config.data.instruction}<|im_end|>\n"
            "<|im_start|>assistant\n"
        )
        for rollout, reward in zip(group.rollouts, group.reward, strict=True):
            right = decode(rollout.tokens) == rf"\boxed{{{problem.answer}}}<eos>"
            assert reward == float(right)
            paid += right
    assert 0 < paid < len(groups) * config.group_size

    what = dict(version_dir=None, n=2, log=lambda text: None)
    for step in (0, 2):
        directory, results = evaluate_benchmarks(
            job, ["gsm8k_test"], epath.Path(tmp_path / "evaluation"), step=step, **what
        )
        assert directory.name == f"v{step:06d}"
        assert results["gsm8k_test"]["problems"] == 8
        assert len(results["gsm8k_test"]["pass@k"]["value"]) == 2
    job.close()


# The experiment of word problems

TINY = {
    "num_steps": LAG + 2,
    "groups_per_step": 2,
    "rollout.prompts_per_call": 2,
    "rollout.max_sequences": 16,
    "rollout.max_response_tokens": 8,
    "rollout.prompt_multiple": 384,
    "data.max_prompt_tokens": 384,
    "data.train_size": 40,
    "data.validation_size": 2,
    "data.test_size": SHOWN,
    "learner.rows_multiple": 8,
    "buffer.zero_variance": "keep",
    "evaluation.every": 5,
    "mesh.data": 8,
    "mesh.fsdp": 1,
    "tracking.tensorboard": False,
}


def test_a_run_has_its_lag_its_curve_and_its_responses(model, tmp_path):
    stop, workdir = SimpleNamespace(requested=""), epath.Path(tmp_path / "run")
    started = time.monotonic()
    changes = {**TINY, "model.path": str(model), "data.data_dir": str(tmp_path / "data")}
    outcome = run(workdir, "lora,oapl", 0, changes, stop)
    assert outcome.lag >= LAG
    assert [step for step, *_ in outcome.curve] == [5, 10]
    assert outcome.before["prompts"] == outcome.after["prompts"] == SHOWN
    assert [sample["question"].count("?") for sample in outcome.samples] == [1] * SHOWN
    for sample in outcome.samples:
        name, hater = sample["answer"], sample["question"].rpartition("Who ")[2].partition("?")[0]
        assert f"{name} {hater}." in sample["question"]
    assert not (workdir / "versions").exists()

    kept = (workdir / "outcome.json").read_text()
    again = run(workdir, "lora,oapl", 0, changes, stop)
    assert dataclasses.asdict(again) == json.loads(kept)
    with pytest.raises(UserError, match=re.escape(str(workdir))):
        run(workdir, "lora,oapl", 0, {**changes, "num_steps": LAG + 3}, stop)
    assert (workdir / "outcome.json").read_text() == kept
    # The seconds of all steps, as if a pause between two starts had not been.
    lines = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    of_steps = sum(v for line in lines for k, v in line.items() if k.startswith("seconds/"))
    assert of_steps / 60 < outcome.minutes < (time.monotonic() - started) / 60
    draw([outcome], epath.Path(tmp_path / "curves.png"))
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    shown = page([outcome])
    assert all(sample["answer"] in shown for sample in outcome.samples)


def outcome(before=(0.2, 0.5), after=(0.6, 0.6), minutes=50.0, lag=8.0, name="full,oapl"):
    results = [{"pass@1": a, "pass@8": b, "greedy": a} for a, b in (before, after)]
    return Outcome(name, 0, *results, minutes, lag, [(16, *after)], [])


@pytest.mark.parametrize(
    ("changed", "holds"),
    [
        ({}, True),
        ({"after": (0.49, 0.6)}, False),
        ({"after": (0.51, 0.5)}, True),
        ({"after": (0.6, 0.49)}, False),
        ({"before": (0.04, 0.5)}, False),
        ({"before": (0.55, 0.6), "after": (0.9, 0.9)}, False),
        ({"minutes": MAX_MINUTES + 1}, False),
        ({"lag": LAG - 0.5}, False),
    ],
)
def test_the_claim(changed, holds):
    assert outcome(**changed).holds == holds
    verdict = table([outcome(**changed)]).splitlines()[-1].split("|")[-2].strip()
    assert verdict == ("holds" if holds else "FAILS")
    of_grpo = outcome(**changed, name="full,grpo_is")
    assert "FAILS" not in table([of_grpo])
