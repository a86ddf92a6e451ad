"""Rematerialization: residuals of a layer, on a CPU and as compiled ahead of time for a v5e 2x2.

test_transformer.py tests that all policies give the same gradients.
"""

import collections
import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from small_models import small_config, small_mesh

from oapl_jax.model.sharding import ROWS, parameter_shardings
from oapl_jax.model.transformer import REMAT_POLICIES, Transformer
from oapl_jax.planning import hardware
from oapl_jax.planning.programs import program_flops

LAYERS, HIDDEN, LENGTH, ROWS_PER_CHIP = 256, 256, 256, 2
SIZES = dict(vocab_size=128, hidden_size=HIDDEN, intermediate_size=256, num_hidden_layers=LAYERS)
SIZES |= dict(num_attention_heads=2, num_key_value_heads=1, head_dim=128)
CONFIG = small_config("qwen3", **SIZES, max_position_embeddings=LENGTH)


def gradient(remat, mesh):
    """A jitted gradient of all parameters, and the shapes of its arguments."""
    model = Transformer(CONFIG, jnp.bfloat16, remat)

    def loss(params, tokens):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            out: Any = model.apply({"params": params}, tokens, tokens, jnp.ones_like(tokens))
        return jnp.sum(jnp.square(out), dtype=jnp.float32)

    blank = jnp.zeros((1, 2), jnp.int32)
    shapes = jax.eval_shape(lambda key: model.init(key, blank, blank, blank), jax.random.key(0))
    shardings = parameter_shardings(shapes["params"], mesh)
    spec = lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where)
    tokens = jax.ShapeDtypeStruct(
        (ROWS_PER_CHIP * mesh.size, LENGTH), jnp.int32, sharding=NamedSharding(mesh, ROWS)
    )
    given = jax.tree.map(spec, shapes["params"], shardings), tokens
    return jax.jit(jax.grad(loss), out_shardings=shardings), given


def recomputed(jaxpr, again=False):
    """Counts each operation that is recomputed for the backward pass."""
    counts = collections.Counter()
    for equation in jaxpr.eqns:
        here = again or "rematted_computation" in str(equation.source_info.name_stack)
        counts[equation.primitive.name] += here
        for value in equation.params.values():
            for part in value if isinstance(value, list | tuple) else (value,):
                body = getattr(part, "jaxpr", part)
                if hasattr(body, "eqns"):
                    counts += recomputed(body, here)
    return counts


def test_saved_residuals_are_not_recomputed():
    mesh = small_mesh()
    loops, products = {}, {}
    for remat in REMAT_POLICIES:
        run, given = gradient(remat, mesh)
        counts = recomputed(run.trace(*given).jaxpr.jaxpr)
        loops[remat] = counts["while"]  # over blocks of keys: attention's forward pass
        products[remat] = counts["dot_general"] - 2 * loops[remat]  # with weights
    assert loops == dict(none=0, full=1, attention=0, dots=1, offload=0)
    # The backward pass does not need the last of a layer's seven products.
    assert products == dict(none=0, full=6, attention=6, dots=0, offload=6)


# Compiled for a TPU


@functools.cache
def traced(remat):
    where = hardware.open_slice("v5e:2x2")
    mesh = hardware.make_mesh(where, data=1, fsdp=4, context=1, tensor=1)
    run, given = gradient(remat, mesh)
    return run.trace(*given)


@functools.cache
def compiled(remat):
    return traced(remat).lower().compile()


def kernels(remat):
    """Counts each splash kernel in the program."""
    calls = [line for line in compiled(remat).as_text().splitlines() if "tpu_custom_call" in line]
    return collections.Counter(re.findall(r"splash_mha_([a-z]+)", call)[0] for call in calls)


def test_splash_runs_forward_once_if_its_residuals_are_saved():
    assert kernels("full") == dict(fwd=2, dkv=1, dq=1)
    assert kernels("attention") == dict(fwd=1, dkv=1, dq=1)
    # The compiler peels iterations off the loops of both passes alike.
    offload = kernels("offload")
    assert offload["fwd"] == offload["dkv"] == offload["dq"] > 0


def test_flops_are_those_of_the_compiled_program():
    """Attention's forward kernel is not recomputed where its residuals are saved."""
    work = {remat: program_flops(traced(remat)) for remat in ("full", "attention", "offload")}
    attention = LAYERS * 4 * ROWS_PER_CHIP * 2 * 2 * 2 * 128 * LENGTH**2 / 2  # two products, causal
    assert work["attention"] == work["offload"]
    for part in ("program", "remat"):
        assert work["full"][part] - work["attention"][part] == attention


def test_offload_moves_residuals_to_host_memory():
    kept = LAYERS * ROWS_PER_CHIP * LENGTH * HIDDEN * 2  # inputs; residuals are as large
    said = {remat: compiled(remat).memory_analysis() for remat in ("full", "attention", "offload")}
    temporaries = {remat: figures.temp_size_in_bytes for remat, figures in said.items()}
    assert kept < temporaries["full"] < 1.1 * kept
    assert 2 * kept < temporaries["attention"] < 2.1 * kept
    assert temporaries["offload"] < 0.1 * kept
    on_host = {remat: figures.host_temp_size_in_bytes for remat, figures in said.items()}
    assert on_host["full"] == on_host["attention"] == 0
    assert 2 * kept < on_host["offload"] < 2.1 * kept  # and the logarithms of attention's sums
