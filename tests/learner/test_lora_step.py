"""The learner's step with LoRA: adapters alone are trained, on every mesh alike."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from etils import epath
from small_models import OPTIM, assert_same, random_params, small_config, small_mesh

from oapl_jax.config import LearnerConfig
from oapl_jax.learner import packing, train_step
from oapl_jax.learner.optimizer import make_optimizer
from oapl_jax.model.lora import Lora, join, merge
from oapl_jax.model.sharding import parameter_shardings, serving_dtype
from oapl_jax.model.transformer import Transformer
from oapl_jax.objectives import bind
from oapl_jax.weights.checkpoint import Checkpoints, checksums
from oapl_jax.weights.probe import probe_batch

LORA = Lora(4, 8.0, ("q_proj", "v_proj", "o_proj", "gate_proj", "down_proj"))
CONFIG = small_config("qwen3", vocab_size=64)
MODEL = Transformer(CONFIG, jnp.float32, "none", LORA)
PLAIN = Transformer(CONFIG, jnp.float32, "none")
OPTIMIZER = make_optimizer(**OPTIM)
LAYOUT = LearnerConfig(micro_batches=2, row_length=36, rows_multiple=8, logp_chunk=8)
SETTINGS: dict[str, Any] = dict(temperature=1.0, logp_chunk=8)


@functools.cache
def batch():
    rows = probe_batch(CONFIG.vocab_size, LAYOUT)[0]
    right = np.ones_like(rows.reward)
    return dataclasses.replace(rows, reward=right, advantage=right)


def frozen_on(mesh):
    """Small weights with norms about one, in bfloat16."""
    scale = lambda path, x: 0.2 * x + (path[-1].key == "scale")
    params = jax.tree_util.tree_map_with_path(scale, random_params(CONFIG, 0))
    narrow = lambda path, x: x.astype(serving_dtype(path[-1].key, "bfloat16"))
    params = jax.tree_util.tree_map_with_path(narrow, params)
    return jax.device_put(params, parameter_shardings(params, mesh))


def make_step(mesh):
    off: dict[str, Any] = dict(kl_weight=0.0, ess_power=0.0, to_reference=False)
    objective = bind("sft", {})
    return train_step.make_train_step(MODEL, objective, OPTIMIZER, mesh, **SETTINGS, **off)


@functools.cache
def trained(sizes, steps=3):
    """State, losses and frozen weights after some steps on a mesh."""
    mesh = small_mesh(*sizes)
    frozen, step = frozen_on(mesh), make_step(mesh)
    state = train_step.init_state(MODEL, OPTIMIZER, mesh, 1)
    placed = packing.to_mesh(batch(), train_step.batch_shardings(mesh))
    losses = []
    for _ in range(steps):
        state, metrics = step(state, placed, frozen)
        losses.append(float(metrics["loss"]))
    return jax.device_get(state), losses, frozen


def test_the_state_has_adapters_and_their_moments_alone():
    state, _, _ = trained((1, 1, 1, 1))
    names = {path for path, _ in _flat(state.params)}
    assert names == {
        f"layers/{target.removesuffix('_proj')}/lora_{which}"
        for target in LORA.targets
        for which in "ab"
    }
    moments = optax.tree.get(state.opt_state, "mu")
    assert jax.tree.structure(moments) == jax.tree.structure(state.params)
    assert all(np.any(leaf) for leaf in jax.tree.leaves(state.params))


def test_training_lowers_the_loss_and_leaves_the_frozen_weights():
    _, losses, frozen = trained((1, 1, 1, 1))
    assert losses == sorted(losses, reverse=True)
    assert losses[0] - losses[-1] > 1e-3
    assert_same(jax.device_get(frozen), jax.device_get(frozen_on(small_mesh())))


@pytest.mark.parametrize("sizes", [(8, 1, 1, 1), (1, 8, 1, 1), (2, 2, 1, 2), (1, 2, 2, 2)])
def test_steps_are_the_same_on_every_mesh(sizes):
    alone, losses, _ = trained((1, 1, 1, 1))
    state, found, frozen = trained(sizes)
    np.testing.assert_allclose(found, losses, rtol=1e-5)
    close = functools.partial(np.testing.assert_allclose, atol=2e-5, rtol=1e-4)
    jax.tree.map(close, state.params, alone.params)
    assert_same(jax.device_get(frozen), jax.device_get(frozen_on(small_mesh())))


def test_log_probs_with_adapters_are_those_of_merged_weights():
    state, _, frozen = trained((1, 1, 1, 1))
    mesh = small_mesh()
    placed = packing.to_mesh(batch(), train_step.batch_shardings(mesh))
    whole = join(frozen, state.params)
    found = train_step.make_logp_step(MODEL, mesh, **SETTINGS)(whole, placed)
    merged = jax.jit(functools.partial(merge, lora=LORA, dtype=jnp.float32))(whole)
    of = train_step.make_logp_step(PLAIN, mesh, **SETTINGS)
    np.testing.assert_allclose(found, of(merged, placed), atol=1e-5)
    assert np.abs(found - of(frozen, placed)).max() > 1e-3


def test_a_checkpoint_has_adapters_alone(tmp_path):
    mesh = small_mesh(fsdp=8)
    state = train_step.init_state(MODEL, OPTIMIZER, mesh, 1)
    checkpoints = Checkpoints(epath.Path(tmp_path) / "checkpoints", deadline=60.0, keep=1)
    checkpoints.save(0, state, {}, b"", probe={})
    checkpoints.wait()
    abstract = train_step.abstract_state(MODEL, OPTIMIZER, small_mesh(data=2, fsdp=2, tensor=2))
    restored, _, _ = checkpoints.restore(0, abstract)
    checkpoints.close()
    assert_same(jax.device_get(restored), jax.device_get(state))
    assert all("lora_" in path for path in checksums(restored.params))


def test_the_frozen_weights_of_a_plan_are_in_bfloat16_where_the_learner_has_them():
    mesh = small_mesh(data=2, fsdp=2, tensor=2)
    planned, real = train_step.abstract_frozen(MODEL, mesh), frozen_on(mesh)
    assert jax.tree.structure(planned) == jax.tree.structure(real)
    for there, here in zip(jax.tree.leaves(planned), jax.tree.leaves(real), strict=True):
        assert (there.shape, there.dtype) == (here.shape, here.dtype)
        assert there.sharding == here.sharding
    assert train_step.abstract_frozen(PLAIN, mesh) == {}


def _flat(tree):
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return [(jax.tree_util.keystr(p, simple=True, separator="/"), x) for p, x in leaves]
