"""A run with LoRA from end to end: what is trained, saved, published, sampled and resumed."""

import functools
import json
import shutil
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from flax.traverse_util import flatten_dict
from small_models import assert_same
from small_runs import metrics, opened, small_arithmetic, typed

from oapl_jax import train
from oapl_jax.data.synthetic.tasks import TASKS
from oapl_jax.errors import UserError
from oapl_jax.learner import train_step
from oapl_jax.model import hf
from oapl_jax.model.policy import open_policy
from oapl_jax.model.transformer import Transformer
from oapl_jax.publish import publish_step
from oapl_jax.weights.publisher import check_version, open_params, published_versions, read_manifest

SIZES = dict(
    model_type="qwen3",
    hidden_size=32,
    intermediate_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    max_position_embeddings=64,
    rms_norm_eps=1e-6,
    rope_theta=10000.0,
    tie_word_embeddings=True,
)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A pretrained model that knows nothing, in bfloat16."""
    directory = epath.Path(tmp_path_factory.mktemp("model"))
    characters = TASKS["chain_sum"].characters
    fresh = directory / "fresh"
    policy = open_policy(fresh, path="", architecture=SIZES, characters=characters)
    network = Transformer(policy.config, jnp.dtype("float32"), remat="none")
    params = jax.jit(functools.partial(train_step.init_params, network))(jax.random.key(0))
    policy.tokenizer.save_pretrained(str(directory / "model"))
    limits = dict(dtype="bfloat16", max_shard_bytes=1 << 30)
    hf.save_params(params, policy.config, directory / "model", **limits)
    return directory / "model"


@pytest.fixture(scope="module")
def settings(model, tmp_path_factory):
    shared = {
        "data.data_dir": str(tmp_path_factory.mktemp("data")),
        "model.path": str(model),
        "model.lora.rank": 2,
        "mesh.data": 2,
        "mesh.fsdp": 4,
        "num_steps": 4,
        "warmup.num_steps": 20,
        "warmup.batch_size": 16,
        "warmup.demonstrations": 64,
        "objective.kl_weight": 1e-3,
        "optim.learning_rate": 1e-2,
        "optim.weight_decay": 1.0,  # no answer is right, and yet the adapters must move
        "lag.steps": 2,
        "evaluation.every": 4,
        "checkpoint.every": 2,
        "buffer.zero_variance": "keep",
    }
    return lambda **more: small_arithmetic(shared, **more)


@pytest.fixture(scope="module")
def done(settings, tmp_path_factory):
    """The workdir of a finished run."""
    workdir = epath.Path(tmp_path_factory.mktemp("run"))
    assert train.run(typed(settings()), workdir, SimpleNamespace(requested="")) is not None
    return workdir


def adapter_paths(run):
    return set(hf.parameter_shapes(run.policy.config, run.model.lora))


def test_checkpoints_and_versions_have_adapters_alone(done, settings, model):
    run = opened(settings(), done)
    for source in (done / "checkpoints" / "4", done / "weights" / "2"):
        assert set(open_params(source)) == adapter_paths(run)
    assert published_versions(done / "versions")[-1] == 2
    version = done / "versions" / "v000002"
    check_version(version)
    files = set(read_manifest(version)["files"])
    assert read_manifest(version)["dtype"] == "float32"  # as the file's tensors
    assert {hf.ADAPTER, hf.ADAPTER_CONFIG, "probe.json", "README.md"} <= files
    assert not {hf.SINGLE, hf.CONFIG} & files
    lora, base = hf.read_adapter_config(version)
    assert (lora, base) == (run.model.lora, epath.Path(model))
    assert "library_name: peft" in (version / "README.md").read_text()


def test_the_sampler_has_the_policy_of_the_learner(done):
    """The drift at lag 0 is the difference between the two."""
    lines = metrics(done)
    assert [line["lag/max"] for line in lines] == [0, 1, 0, 1]
    assert max(line["kl"] for line in lines[::2]) < 1e-10
    assert min(line["kl"] for line in lines[1::2]) > 1e-8


def test_versions_share_the_frozen_weights(done, settings):
    run = opened(settings(), done)
    frozen = flatten_dict(run.frozen)
    assert all(x.dtype == "bfloat16" for path, x in frozen.items() if path[-1] != "scale")
    for whole in (run.versions.reference, run.versions.load(2)):
        whole = flatten_dict(whole)
        assert all(whole[path] is leaf for path, leaf in frozen.items())
    merged = hf.load_params(run.versions.path(2), run.policy.config, mesh=run.mesh)
    close = functools.partial(np.testing.assert_allclose, atol=1e-6)
    load = functools.partial(hf.load_adapters, run.versions.path(2), run.policy.config)
    of_version = load(run.model.lora, mesh=run.mesh)
    jax.tree.map(close, merged, jax.tree.map(jnp.float32, run.merged(of_version)))


def test_a_run_resumes_as_if_it_had_not_stopped(done, settings, tmp_path):
    halves = epath.Path(tmp_path / "run")
    shutil.copytree(done, halves)
    stop = SimpleNamespace(requested="")
    train.run(typed(settings()), halves, stop, restore_step=2)
    whole, again = (opened(settings(), workdir).params_at(4)[1] for workdir in (done, halves))
    assert_same(jax.device_get(again), jax.device_get(whole))


def test_a_run_does_not_resume_over_other_weights(done, settings, model, tmp_path):
    other, workdir = tmp_path / "model", epath.Path(tmp_path / "run")
    shutil.copytree(done, workdir)
    shutil.copytree(model, other)
    saved = json.loads((workdir / "config.json").read_text())
    saved["model"]["path"] = str(other)
    (workdir / "config.json").write_text(json.dumps(saved))
    weights = bytearray((other / hf.SINGLE).read_bytes())
    weights[-2:] = b"\x00\x3f"  # 0.5
    (other / hf.SINGLE).write_bytes(weights)
    config = typed(settings(model__path=str(other)))
    with pytest.raises(UserError, match=r"model\.path"):
        train.run(config, workdir, SimpleNamespace(requested=""))


def test_the_denominator_of_the_learner_is_that_of_each_version(done, settings, tmp_path):
    """A lag of 0 is no drift at all: the learner's log-probs stand above and below."""
    config = settings(objective__denominator="learner")
    workdir = epath.Path(tmp_path / "run")
    assert train.run(typed(config), workdir, SimpleNamespace(requested="")) is not None
    mine, theirs = metrics(workdir), metrics(done)
    assert mine[0]["reward"] == theirs[0]["reward"]  # the same responses
    assert [line["lag/max"] for line in mine] == [0, 1, 0, 1]
    at_lag_0 = lambda lines: max(line["kl"] for line in lines[::2])
    assert at_lag_0(mine) < min(at_lag_0(theirs), 1e-13)
    assert min(line["kl"] for line in mine[1::2]) > 1e-8


@pytest.mark.parametrize("step", [2, 4])
def test_merged_weights_are_published_on_request(step, done, settings, tmp_path):
    run = opened(settings(), done)
    how = dict(dtype="float32", merged=True)
    path = publish_step(done, step, epath.Path(tmp_path / "versions"), **how)
    check_version(path)
    assert hf.load_config(path) == run.policy.config
    assert "library_name: transformers" in (path / "README.md").read_text()
    _, params = run.params_at(step)
    close = functools.partial(np.testing.assert_allclose, atol=1e-6)
    found = hf.load_params(path, run.policy.config)
    jax.tree.map(close, found, jax.device_get(run.merged(params)))
    assert run.adapters is not None
    assert_same(
        jax.device_get(run.adapters.load(path, run.policy.config, mesh=run.mesh)),
        jax.device_get(params),
    )


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"model.path": ""}, r"model\.path"),
        ({"model.lora.targets": ("q_proj", "lm_head")}, r"model\.lora\.targets"),
        ({"model.lora.targets": ()}, r"model\.lora\.targets"),
        ({"model.lora.targets": ("q_proj", "q_proj")}, r"model\.lora\.targets"),
        ({"model.lora.alpha": 0.0}, r"model\.lora\.alpha"),
        ({"model.lora.rank": -1}, r"model\.lora\.rank"),
        ({"model.lora.rank": 0, "model.lora.merged": True}, r"model\.lora\.merged"),
        ({"publish_full_every": 2}, r"publish_full_every"),
    ],
)
def test_impossible_adapters_are_refused(changes, name, settings):
    config = settings()
    config.update_from_flattened_dict(changes)
    with pytest.raises(UserError, match=name):
        typed(config)
