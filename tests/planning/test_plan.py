"""Plans made by the TPU compiler, for a v5e 2x2 that is not there."""

import functools
import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from configs import arithmetic
from oapl_jax.errors import UserError
from oapl_jax.model.config import ModelConfig
from oapl_jax.model.sharding import AXES
from oapl_jax.planning import memory, programs, topology
from oapl_jax.planning.collectives import by_kind_and_axis, collectives
from oapl_jax.planning.estimate import step_times
from oapl_jax.planning.module import Module

HIDDEN, LAYERS, ROWS, LENGTH = 512, 2, 8, 512
GIB = 2**30


@pytest.fixture(scope="module")
def where():
    return topology.open_slice("v5e:2x2")


@pytest.fixture(scope="module")
def plan(where):
    """A decoder of 5 million parameters, two micro-batches of two rows a chip."""
    config = arithmetic.get_config().unlock()
    config.group_size, config.groups_per_step = 4, 4
    config.data.max_prompt_tokens, config.rollout.max_response_tokens = 128, LENGTH - 128
    config.model.update(dtype="bfloat16", remat="full")
    config.mesh.update(data=1, fsdp=4, context=1, tensor=1)
    config.rollout.sampler, config.evaluation.every = "fleet", 0
    config.learner.update(micro_batches=2, row_length=LENGTH, rows_multiple=ROWS, logp_chunk=128)
    sizes = dict(config.model.architecture, hidden_size=HIDDEN, intermediate_size=2 * HIDDEN)
    sizes |= dict(
        head_dim=64, num_hidden_layers=LAYERS, vocab_size=2048, max_position_embeddings=LENGTH
    )
    model = ModelConfig.from_hf(sizes, source="this test")
    assert list(config.mesh) != list(AXES)  # a mesh has its axes in this order all the same
    return programs.Learner(config, model, topology.make_mesh(where, config.mesh), False)


@pytest.fixture(scope="module")
def traced(plan):
    return plan.train_step().trace()


@pytest.fixture(scope="module")
def verdict(plan, traced, where):
    return memory.judge(plan.train_step(), traced, topology.hbm_available(where))


def test_hbm_is_the_compilers_own_figure(plan, verdict):
    layer = HIDDEN * (2 * 256 + 2 * 128 + 3 * 2 * HIDDEN)
    parameters = 4 * (LAYERS * layer + 2048 * HIDDEN) / 4  # float32, over 4 chips
    kinds, said = verdict.hbm, verdict.compiled.memory_analysis()
    assert verdict.fits
    assert parameters < kinds["parameters"] < 1.01 * parameters  # and the norms
    assert abs(kinds["optimizer"] - 2 * kinds["parameters"]) < 100  # and the counts
    assert min(kinds.values()) > 0
    made = said.temp_size_in_bytes + said.output_size_in_bytes - said.alias_size_in_bytes
    made = max(made, said.peak_memory_in_bytes - said.argument_size_in_bytes)
    own = said.argument_size_in_bytes + made + said.generated_code_size_in_bytes
    unused = programs.per_chip(plan.batch.reference_logp)  # given all the same
    assert own < sum(kinds.values()) <= own + unused + 1024


def test_no_argument_is_copied(plan, verdict):
    donated = verdict.donated
    assert plan.mesh.axis_names == AXES
    assert donated["arrays"] == len(jax.tree.leaves(plan.state))
    assert donated["bytes"] >= programs.per_chip(plan.state)
    assert donated["results not in an argument's place"] < 64 * 1024  # the metrics


def test_nothing_is_resharded_by_replication(verdict):
    assert verdict.replicated == 0


def test_what_is_resharded_by_replication_is_counted(where):
    """No exchange between two chips leads from rows over all of them to columns and planes."""
    mesh = topology.make_mesh(where, dict(data=2, fsdp=2))
    rows, rest = (NamedSharding(mesh, P(*axes)) for axes in ([AXES[:2]], [None, *AXES[:2]]))
    x = jax.ShapeDtypeStruct((8, 8, 128), jnp.float32, sharding=rows)
    turned = lambda x: jnp.cos(jax.lax.with_sharding_constraint(jnp.sin(x), rest))
    program = programs.Program("turning", lambda: jax.jit(turned).trace(x), {"numbers": x}, {})
    assert memory.judge(program, program.trace(), topology.hbm_available(where)).replicated == 1


def test_the_learners_collectives_go_over_fsdp(plan, traced, verdict, where):
    times = step_times(plan, where, traced, verdict.text)
    table = times["collectives"]
    assert {"all-gather", "reduce-scatter"} <= table.keys()
    assert {axes for row in table.values() for axes in row} == {"fsdp"}
    # Weights in bfloat16, three quarters of them from other chips, at least once in each pass over
    # two micro-batches.
    kernels = LAYERS * HIDDEN * (2 * 256 + 2 * 128 + 3 * 2 * HIDDEN)
    assert 2 * 2 * 2 * kernels * 3 / 4 < table["all-gather"]["fsdp"] < 60 * kernels
    assert times["roofline"]["interconnect"] == sum(r["fsdp"] for r in table.values()) / 100e9


def test_the_program_does_the_work_of_the_formula_and_that_of_remat(plan, traced, verdict, where):
    flops = step_times(plan, where, traced, verdict.text)["flops"]
    forward = flops["formula"] / 3
    # The formula has no logits of prompts, and no products that attention's backward pass repeats.
    assert 1.0 < (flops["program"] - flops["remat"]) / flops["formula"] < 1.35
    assert 0.6 < flops["remat"] / forward < 1.2


def test_bytes_of_each_collective_equal_a_hand_computation(where):
    """Five turns of a loop with one collective of each kind, over a mesh of 2 x 2."""
    mesh = topology.make_mesh(where, dict(data=2, fsdp=2))
    rows, columns = 256, 512

    def turn(x, _):
        gathered = jax.lax.all_gather(x, "fsdp", axis=0, tiled=True)
        scattered = jax.lax.psum_scatter(jnp.sin(gathered), "fsdp", tiled=True)
        summed = jax.lax.psum(jnp.cos(scattered), "data")
        return jax.lax.ppermute(jnp.tanh(summed), "fsdp", [(0, 1), (1, 0)]), None

    @functools.partial(
        jax.shard_map, mesh=mesh, in_specs=P("fsdp"), out_specs=P("fsdp"), check_vma=False
    )
    def loop(x):
        return jax.lax.scan(turn, x, None, length=5)[0]

    x = jax.ShapeDtypeStruct(
        (2 * rows, columns), jnp.float32, sharding=NamedSharding(mesh, P("fsdp"))
    )
    found = collectives(Module(jax.jit(loop).lower(x).compile().as_text()), mesh)
    part = rows * columns * 4
    assert by_kind_and_axis(found) == {
        "all-gather": {"fsdp": 5 * part},  # the other chip's part
        "reduce-scatter": {"fsdp": 5 * part},  # the other chip's summand of my part
        "all-reduce": {"data": 5 * 2 * part / 2},
        "collective-permute": {"fsdp": 5 * part},
    }


def program_of(size, beside, donated=True):
    device = topology.open_slice("v5e:2x2").devices[0]
    x = jax.ShapeDtypeStruct(
        (size // 4,), jnp.float32, sharding=jax.sharding.SingleDeviceSharding(device)
    )
    traced = jax.jit(lambda x: x * 2, donate_argnums=(0,) if donated else ()).trace(x)
    return programs.Program("doubling", lambda: traced, {"numbers": x}, beside)


def test_what_does_not_fit_is_said_not_to_fit(where):
    available = topology.hbm_available(where)
    assert available == 15.75 * GIB
    judge = lambda program: memory.judge(program, program.trace(), available)
    assert judge(program_of(15 * GIB, {})).fits
    refused = judge(program_of(9 * GIB, {}, donated=False))  # argument and result
    assert not refused.fits
    assert "exceeds available HBM (15.75G)" in refused.because
    assert memory.too_large(program_of(15 * GIB, {}), available) is None
    unasked = memory.too_large(program_of(9 * GIB, {"another copy": 9 * GIB}), available)
    assert unasked
    assert not unasked.fits
    assert unasked.because == "arguments alone are 18.00 GiB of 15.75 GiB"
    crowded = judge(program_of(15 * GIB, {"another copy": GIB}))
    assert not crowded.fits
    assert crowded.hbm["another copy"] == GIB
    assert crowded.because == "16.00 GiB of 15.75 GiB"


def test_slices_and_meshes_that_do_not_exist_are_refused(where):
    for name in ("v9:2x2", "v5e", "v5e:2x2x2", "v5e:3x3", "v5p:4x4"):
        with pytest.raises(UserError, match=f"--topology={name} is "):
            topology.open_slice(name)
    for sizes in (dict(data=3, fsdp=-1), dict(data=-1, fsdp=-1), dict(data=1, fsdp=2)):
        with pytest.raises(UserError, match="does not make the 4 chips of v5e:2x2"):
            topology.make_mesh(where, sizes)
    with pytest.raises(UserError, match="can't be laid out on v6e:8x8"):
        topology.make_mesh(topology.open_slice("v6e:8x8"), dict(data=4, fsdp=16))


@pytest.mark.parametrize(
    ("name", "sizes", "links"),
    [
        ("v5e:8x8", dict(data=8, fsdp=8), dict(data=1, fsdp=1)),  # lines: one link at their ends
        ("v5e:8x16", dict(data=8, fsdp=16), dict(data=1, fsdp=2)),  # sixteen chips are a ring
        ("v5p:4x4x4", dict(data=4, fsdp=16), dict(data=2, fsdp=4)),
        ("v5p:2x4x4", dict(data=2, fsdp=16), dict(data=1, fsdp=2)),  # not made of whole cubes
    ],
)
def test_an_axis_has_the_links_of_its_part_of_the_torus(name, sizes, links):
    where = topology.open_slice(name)
    mesh = topology.make_mesh(where, sizes)
    for axis, count in links.items():
        wanted = count * where.chip.link_bandwidth
        assert topology.axis_bandwidth(where, mesh, [axis]) == wanted


def test_the_command_prints_and_writes_a_plan(tmp_path):
    command = [
        *(sys.executable, "-m", "oapl_jax.plan", "--config=configs/arithmetic.py"),
        *("--topology=v5e:2x2", f"--workdir={tmp_path}", "--config.learner.row_length=128"),
        *("--config.rollout.sampler=fleet", "--config.objective.denominator=learner"),
        "--config.model.remat=offload",
    ]
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    # The flag that docs/plan.md and tpu_setup/train.sh speak of; an unknown one ends the compiler.
    asked = "--xla_jf_spmd_threshold_for_windowed_einsum_mib=1000000000"
    environment["LIBTPU_INIT_ARGS"] = asked
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    assert f"Compiled with {asked}" in done.stdout
    plan = json.loads((tmp_path / "v5e-2x2.json").read_text())
    assert plan["compiler_flags"] == asked
    assert plan["fits"]
    assert [p["program"] for p in plan["programs"]] == [
        *("train step", "initialisation", "recomputed log-probs", "probe")
    ]
    verdict = "FITS, but for what is not planned and needs HBM too: the warm-up (warmup.num_steps)"
    for said in (verdict, "FLOPs of a step", "all-gather", "MFU", "generated tokens/s", "of RAM"):
        assert said in done.stdout
    for number in ("host_memory", "publish_seconds", "fleet", "roofline", "flops", "hbm_traffic"):
        assert plan[number]
    held = dict(plan["host_memory"])
    del held["ram"]
    assert held.pop("total") == sum(held.values())
    assert held["offloaded"] == 4 * max(p["offloaded"] for p in plan["programs"]) > 0
    assert plan["host_traffic"] > 0
