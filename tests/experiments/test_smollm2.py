"""The path of configs/smollm2.py with a tiny model in the place of the real one: a checkpoint with
a chat template of its own, problems in the form of GSM8K, the verifier, a step, the evaluation."""

import functools
import json
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest
from etils import epath
from small_runs import opened, typed

from configs import smollm2
from oapl_jax import train
from oapl_jax.data import samples
from oapl_jax.evaluate import evaluate_benchmarks
from oapl_jax.learner import train_step
from oapl_jax.model import hf
from oapl_jax.model.policy import open_policy
from oapl_jax.model.transformer import Transformer
from oapl_jax.rollout.dataset import Dataset

CHARACTERS = "".join(map(chr, range(32, 127))) + "\n"
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A Llama of two layers that knows nothing."""
    directory = epath.Path(tmp_path_factory.mktemp("model"))
    sizes = dict(
        model_type="llama",
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=256,
        rms_norm_eps=1e-5,
        rope_theta=10000.0,
        tie_word_embeddings=True,
    )
    fresh = directory / "fresh"
    policy = open_policy(fresh, path="", architecture=sizes, characters=CHARACTERS)
    network = Transformer(policy.config, jnp.dtype("float32"), remat="none")
    params = jax.jit(functools.partial(train_step.init_params, network))(jax.random.key(0))
    policy.tokenizer.chat_template = CHATML
    policy.tokenizer.save_pretrained(str(directory / "llama"))
    hf.save_params(
        params, policy.config, directory / "llama", dtype="float32", max_shard_bytes=1 << 30
    )
    return directory / "llama"


def test_a_small_model_goes_the_way_of_the_real_one(model, tmp_path):
    samples.write(str(tmp_path / "samples"), rows=8)
    config = smollm2.get_config()
    config.update_from_flattened_dict(
        {
            "releases": str(tmp_path / "samples"),
            "data.data_dir": str(tmp_path / "data"),
            "data.max_prompt_tokens": 192,  # one token a character
            "learner.row_length": 208,
            "rollout.max_response_tokens": 16,
            "model.path": str(model),
            "mesh.data": 8,
            "mesh.fsdp": 1,
            "learner.rows_multiple": 8,
            "warmup.num_steps": 50,  # this one has to learn first what an answer looks like
            "warmup.batch_size": 16,
            "warmup.demonstrations": 8,
            "rollout.record": True,
            "buffer.zero_variance": "keep",
            "tracking.tensorboard": False,
        }
    )
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
