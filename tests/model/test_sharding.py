"""The sharding table is strict and complete; invalid meshes are errors."""

import functools
import itertools
import re
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from small_models import golden_model, small_config, small_mesh

from oapl_jax.config import LORA_TARGETS
from oapl_jax.errors import UserError
from oapl_jax.model import hf, sharding
from oapl_jax.model.lora import Lora

INTO_HEADS, OUT_OF_HEADS = P(None, "fsdp", "tensor"), P(None, "tensor", "fsdp")
ALWAYS = {
    "embed/embedding": P("tensor", "fsdp"),
    "final_norm/scale": P(None),
    **{f"layers/{name}_norm/scale": P(None, None) for name in ("attention", "mlp")},
    **{f"layers/{name}/kernel": INTO_HEADS for name in ("q", "k", "v", "gate", "up")},
    **{f"layers/{name}/kernel": OUT_OF_HEADS for name in ("o", "down")},
}
VARIANTS = list(itertools.product(["qwen3", "qwen2", "llama"], [False, True], [False, True]))


def shapes_of(model_type, tied, bias):
    config = small_config(model_type, tie_word_embeddings=tied, attention_bias=bias)
    return hf.parameter_shapes(config)


def test_every_parameter_matches_one_rule_and_every_rule_is_used():
    used = set()
    paths = {path for variant in VARIANTS for path in shapes_of(*variant)}
    lora = Lora(2, 4.0, LORA_TARGETS)
    paths |= {*hf.parameter_shapes(small_config(), lora)} | {"score"}  # a curator's head
    for path in paths:
        matching = [rule for rule, _ in sharding.PARAMETER_RULES if re.fullmatch(rule, path)]
        assert len(matching) == 1, path
        used |= {*matching}
    assert used == {rule for rule, _ in sharding.PARAMETER_RULES}


@pytest.mark.parametrize(("model_type", "tied", "bias"), VARIANTS)
def test_every_parameter_has_its_axes(model_type, tied, bias):
    expected = dict(ALWAYS) | ({} if tied else {"head": P("fsdp", "tensor")})
    if model_type == "qwen3":
        expected |= {f"layers/{name}_norm/scale": P(None, None) for name in "qk"}
    if bias or model_type == "qwen2":
        expected |= {f"layers/{name}/bias": P(None, "tensor") for name in "qkv"}
    if bias and model_type != "qwen2":
        expected |= {"layers/o/bias": P(None, None)}
    mesh = small_mesh(data=2, fsdp=2, tensor=2)
    placed = sharding.parameter_shardings(shapes_of(model_type, tied, bias), mesh)
    assert {path: where.spec for path, where in placed.items()} == expected


@pytest.mark.parametrize(
    "path", ["layers/router/kernel", "layers/q/kernel_scale", "model/embed/embedding", ""]
)
def test_an_unknown_parameter_raises(path):
    tree = functools.reduce(lambda leaf, key: {key: leaf}, reversed(path.split("/")), jnp.zeros(8))
    place = lambda: sharding.parameter_shardings(tree, small_mesh(data=8))
    for look_up in (lambda: sharding.parameter_spec(path), place):
        with pytest.raises(KeyError, match=re.escape(repr(path))):
            look_up()


@pytest.mark.parametrize(
    ("mesh", "sizes", "names"),
    [
        ((1, 8, 1, 1), dict(hidden_size=36), ["mesh.fsdp=8"]),
        ((1, 1, 1, 8), dict(vocab_size=60), ["mesh.tensor=8", "embed/embedding"]),
        ((2, 1, 1, 4), dict(vocab_size=66), ["mesh.tensor=4", "(66, 32)"]),
        ((1, 1, 1, 8), dict(intermediate_size=44), ["layers/down/kernel", "(2, 44, 32)"]),
        ((1, 1, 1, 8), dict(head_dim=6), ["mesh.tensor=8", "layers/k/kernel"]),
    ],
)
def test_an_indivisible_axis_of_a_parameter_is_named(mesh, sizes, names):
    params = hf.parameter_shapes(small_config(**sizes))
    with pytest.raises(UserError) as error:
        sharding.parameter_shardings(params, small_mesh(*mesh))
    assert all(name in str(error.value) for name in names)
    sharding.parameter_shardings(params, small_mesh(data=8))  # parameters are whole along this axis


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ((1, 2, 4, 1), (1, 2, 4, 1)),
        ((-1, 1, 1, 1), (8, 1, 1, 1)),
        ((2, -1, 1, 2), (2, 2, 1, 2)),
        ((1, 2, 1, -1), (1, 2, 1, 4)),
        ((1, 2, -1, 1), (1, 2, 4, 1)),
        ((8, -1, 1, 1), (8, 1, 1, 1)),
    ],
)
def test_a_mesh_takes_all_devices_and_minus_one_takes_the_rest(sizes, expected):
    mesh = sharding.make_mesh(**dict(zip(sharding.AXES, sizes, strict=True)))
    assert dict(mesh.shape) == dict(zip(sharding.AXES, expected, strict=True))
    assert {d.id for d in mesh.devices.flat} == {d.id for d in jax.devices()}


@pytest.mark.parametrize(
    "sizes",
    [
        *((1, 1, 1, 1), (3, 1, 1, 1), (4, 4, 1, 1), (-1, 3, 1, 1), (-1, 16, 1, 1)),
        *((-1, -1, 1, 1), (-1, -2, 1, -1), (-2, -4, 1, 1), (0, 8, 1, 1), (-1, 0, 1, 1)),
    ],
)
def test_a_mesh_that_does_not_fit_the_devices_is_an_error(sizes):
    given = dict(zip(sharding.AXES, sizes, strict=True))
    names = " x ".join(rf"mesh\.{axis}={size}" for axis, size in given.items())
    with pytest.raises(UserError, match=names):
        sharding.make_mesh(**given)


def test_activations_are_sharded_on_a_mesh_only():
    x = np.arange(8 * 2 * 4, dtype=np.float32).reshape(8, 2, 4)
    np.testing.assert_array_equal(jax.jit(sharding.constrain_activations)(x), x)
    mesh = small_mesh(data=2, fsdp=2, context=2)
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        placed = jax.device_put(x, jax.sharding.NamedSharding(mesh, P(None, None, "context")))
        found = jax.jit(sharding.constrain_activations)(placed)
    np.testing.assert_array_equal(found, x)
    assert found.sharding.shard_shape(x.shape) == (2, 1, 4)


@pytest.mark.parametrize(
    ("sizes", "proposed"),
    [
        ((1, 64, 1, 1), (1, 8, 1, 1)),
        ((2, 8, 1, 2), (2, 2, 1, 2)),
        ((1, 1, 1, 1), (1, 8, 1, 1)),
        ((3, 1, 1, 1), (1, 8, 1, 1)),
        ((-1, -1, 1, 1), (1, 8, 1, 1)),
    ],
)
def test_a_refused_mesh_proposes_one_that_fits(sizes, proposed):
    with pytest.raises(UserError, match=rf"\bmesh\.fsdp={proposed[1]}\b"):
        sharding.make_mesh(**dict(zip(sharding.AXES, sizes, strict=True)))
    sharding.make_mesh(**dict(zip(sharding.AXES, proposed, strict=True)))


def test_a_mesh_that_can_not_divide_a_model_proposes_the_largest_size_that_does():
    params = hf.parameter_shapes(small_config(hidden_size=36))
    with pytest.raises(UserError, match=r"\bmesh\.fsdp=4 and mesh\.data=2\b"):
        sharding.parameter_shardings(params, small_mesh(fsdp=8))
    sharding.parameter_shardings(params, small_mesh(data=2, fsdp=4))


@pytest.mark.parametrize(
    ("sampler", "learner", "own"),
    [
        (0, [0, 1, 2, 3, 4, 5, 6, 7], [4, 5, 6, 7]),
        (1, [0, 1, 2, 4, 5, 6], [7]),
        (3, [0, 4], [5, 6, 7]),
    ],
)
def test_the_last_devices_of_each_host_are_its_samplers(sampler, learner, own):
    devices = [SimpleNamespace(id=i, process_index=i // 4) for i in range(8)]
    of_learner, of_sampler = sharding.split_devices(devices, sampler, host=1)
    assert [d.id for d in of_learner] == learner
    assert [d.id for d in of_sampler] == own


def test_a_sampler_that_leaves_the_learner_no_device_is_refused():
    with pytest.raises(UserError, match=r"rollout\.devices=8"):
        sharding.split_devices(jax.devices(), 8, host=0)


def test_parameters_move_to_a_local_mesh_in_the_samplers_dtype():
    _, params = golden_model("qwen3_tied")
    learner, sampler = small_mesh(fsdp=4, tensor=2), small_mesh(data=2, tensor=2)
    placed = jax.device_put(params, sharding.parameter_shardings(params, learner))
    moved = sharding.to_local_mesh(placed, sampler, "bfloat16")

    def compare(path, mine, theirs):
        assert mine.dtype == (jnp.float32 if path[-1].key == "scale" else jnp.bfloat16)
        np.testing.assert_array_equal(mine, np.asarray(theirs).astype(mine.dtype))

    jax.tree_util.tree_map_with_path(compare, moved, params)
    shardings = jax.tree.map(lambda x: x.sharding, moved)
    assert shardings == sharding.parameter_shardings(params, sampler)
